"""Equipped vision models of transformers: outputs, masks, gradients, checkpointing, compile, export, saving, peft."""

import copy
import json

import pytest
import torch
from conftest import ROOT
from equipped import QKV, Equipped, assert_same, fill, gradients, spread, tables_of
from methods import METHODS
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import RPEConfig, get_bucket_ids_2d, get_rpe_config, get_single_rpe_config
from irpe.equip import equip, rpe_parameters, unequip

transformers = pytest.importorskip("transformers", minversion="5.18")

from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

from irpe.integrations import hf_vit  # noqa: E402

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)
PATCHES = dict(**SMALL, image_size=12, patch_size=4)
TEXT = dict(**SMALL, vocab_size=16, max_position_embeddings=8, projection_dim=8, eos_token_id=2, bos_token_id=1)
TOWERS = dict(text_config=TEXT, vision_config=PATCHES, projection_dim=8)
DINOV2 = {**{k: v for k, v in PATCHES.items() if k != "intermediate_size"}, "mlp_ratio": 2}
RESNET = dict(
    model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
    out_features=["stage2"],
)  # fmt: skip
DETR = dict(
    use_timm_backbone=False, backbone_config=RESNET, d_model=24, encoder_layers=2, decoder_layers=1,
    encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=4,
    dropout=0.0, num_labels=3,
)  # fmt: skip
SEGMENTATION = {
    **DETR,
    "d_model": 32,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "backbone_config": {
        **RESNET, "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "out_features": [f"stage{n}" for n in (1, 2, 3, 4)],
    },
}  # fmt: skip
INTERPOLATE = dict(interpolate_pos_encoding=True)
IDS = dict(input_ids=torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2]]))

# name: class, arguments of its configuration, arguments of its forward, prefix tokens, pixels for a token of the map
FAMILIES = {
    "vit": ("ViTModel", PATCHES, INTERPOLATE, 1, 4),
    "vit head": ("ViTForImageClassification", {**PATCHES, "num_labels": 5}, INTERPOLATE, 1, 4),
    "deit": ("DeiTModel", PATCHES, INTERPOLATE, 2, 4),
    "deit head": ("DeiTForImageClassificationWithTeacher", PATCHES, INTERPOLATE, 2, 4),
    "dinov2": ("Dinov2Model", DINOV2, {}, 1, 4),
    "dinov2 head": ("Dinov2ForImageClassification", {**DINOV2, "num_labels": 5, "use_swiglu_ffn": True}, {}, 1, 4),
    "dinov2 backbone": ("Dinov2Backbone", {**DINOV2, "out_features": ["stage1", "stage2"]}, {}, 1, 4),
    "dinov2 registers": ("Dinov2WithRegistersModel", {**DINOV2, "num_register_tokens": 3}, {}, 4, 4),
    "dinov2 registers backbone": ("Dinov2WithRegistersBackbone", {**DINOV2, "out_features": ["stage2"]}, {}, 5, 4),
    "dinov3": ("DINOv3ViTModel", {**PATCHES, "num_register_tokens": 2, "pos_embed_rescale": None}, {}, 3, 4),
    "dinov3 backbone": (
        "DINOv3ViTBackbone", {**PATCHES, "out_features": ["stage2"], "use_gated_mlp": True}, {}, 1, 4,
    ),
    "clip vision": ("CLIPVisionModel", PATCHES, INTERPOLATE, 1, 4),
    "clip projection": ("CLIPVisionModelWithProjection", {**PATCHES, "projection_dim": 8}, INTERPOLATE, 1, 4),
    "clip": ("CLIPModel", TOWERS, {**INTERPOLATE, **IDS}, 1, 4),
    "siglip vision": ("SiglipVisionModel", PATCHES, INTERPOLATE, 0, 4),
    "siglip": ("SiglipModel", TOWERS, {**INTERPOLATE, **IDS}, 0, 4),
    "beit": ("BeitModel", {**PATCHES, "use_relative_position_bias": True, "drop_path_rate": 0.0}, {}, 1, 4),
    "beit shared": (
        "BeitForImageClassification", {**PATCHES, "use_shared_relative_position_bias": True}, INTERPOLATE, 1, 4,
    ),
    "beit positions": (
        "BeitModel", {**PATCHES, "use_absolute_position_embeddings": True, "use_mean_pooling": False}, {}, 1, 4,
    ),
    "beit backbone": ("BeitBackbone", {**PATCHES, "out_features": ["stage2"], "reshape_hidden_states": True}, {}, 1, 4),
    "detr": ("DetrModel", DETR, {}, 0, 8),
    "detr detection": ("DetrForObjectDetection", {**DETR, "position_embedding_type": "learned"}, {}, 0, 8),
    "detr segmentation": ("DetrForSegmentation", SEGMENTATION, {}, 0, 32),
}  # fmt: skip
BASES = ["vit", "deit", "dinov2", "dinov2 registers", "dinov3", "clip vision", "siglip vision", "beit", "detr"]


def make(family="vit", config=QKV, *, tables=True, dtype=torch.float64, attn="sdpa", **settings):
    """A small model in evaluation mode with weights that matter, equipped with random tables if `tables`."""
    torch.manual_seed(0)
    name, arguments, *_ = FAMILIES[family]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**{**copy.deepcopy(arguments), **settings}))
    if attn != "sdpa":  # which is transformers' own choice
        model.set_attn_implementation(attn)
    for name, one in model.named_parameters():
        if "backbone." not in name:  # a random convolutional network as it is has features of a useful size
            nn.init.normal_(one, mean=0.5 * (one.dim() == 1), std=0.3)
    model = model.to(dtype).eval()
    return fill(equip(model, config)) if tables else model


def images(family, height, width, batch=2, dtype=torch.float64):
    pixels = FAMILIES[family][4]
    generator = torch.Generator().manual_seed(10 * height + width)
    return torch.randn(batch, 3, height * pixels, width * pixels, dtype=dtype, generator=generator)


def run(family, model, image, **kwargs):
    return model(pixel_values=image, **{**FAMILIES[family][2], **kwargs})


def features(output):
    """What the vision transformer itself has made of every token."""
    output = getattr(output, "vision_model_output", output)
    for name in ("encoder_last_hidden_state", "feature_maps", "last_hidden_state", "image_embeds", "logits"):
        value = getattr(output, name, None)
        if value is None:
            value = getattr(output, "cls_logits", None) if name == "logits" else None
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise AssertionError(type(output))


def forward(family, model, *size, **kwargs):
    return features(run(family, model, images(family, *size), **kwargs))


def parts_of(model):
    return hf_vit.ADAPTER.find(model)


def snapshot(model):
    """Classes, attributes, hooks, parameters and configurations."""
    return [
        (name, type(one), sorted(vars(one)), list(one._parameters), list(one._modules), one.training,
         [len(hooks) for key, hooks in sorted(vars(one).items()) if "hooks" in key and isinstance(hooks, dict)],
         id(getattr(one, "config", None)), str(one.config) if "config" in vars(one) else "")
        for name, one in model.named_modules()
    ]  # fmt: skip


class TestEquipped(Equipped):
    copied = ("vit", "siglip vision", "clip", "detr detection", "detr segmentation")
    snapshot = staticmethod(snapshot)

    @staticmethod
    def families():
        return FAMILIES

    @staticmethod
    def build(family):
        return make(family, tables=False)

    @staticmethod
    def run(model, family):
        return forward(family, model, 2, 3)

    @staticmethod
    def form(model):
        """Configurations are copied too."""
        return [(*row[:-2], row[-1]) for row in snapshot(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_tables_change_nothing(family):
    model = make(family, tables=False)
    before, weights = forward(family, model, 2, 3), copy.deepcopy(model.state_dict())
    assert equip(model, QKV) is model
    assert (forward(family, model, 2, 3) - before).abs().max() <= 1e-12 * max(1, before.abs().max())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert len(after.keys() - weights.keys()) == 2 * 3
    assert {key.split(".")[-2] for key in after.keys() - weights.keys()} == {"rpe_q", "rpe_k", "rpe_v"}
    (part,) = parts_of(model)
    prefix = FAMILIES[family][3]
    assert [one.rpe_k.rpe_config.skip for one in hf_vit.ADAPTER.attentions(part)] == [prefix] * 2
    assert not any("text" in key for key in after.keys() - weights.keys())


@pytest.mark.parametrize("family", BASES)
def test_zero_tables_in_float32_stay_within_the_gap_between_backends(family):
    outputs = []
    for attn in ("sdpa", "eager"):
        model = make(family, tables=False, dtype=torch.float32, attn=attn)
        outputs.append(features(run(family, model, images(family, 3, 5, dtype=torch.float32))))
    got = features(run(family, equip(model, QKV), images(family, 3, 5, dtype=torch.float32)))
    gap = (outputs[0] - outputs[1]).abs().max()
    assert gap > 0
    assert min((got - one).abs().max() for one in outputs) <= 2 * gap


# an own attention function: the formula of the paper with ids of buckets, for a map that is fixed beforehand
class ByHand:
    def __init__(self, model, height, width):
        (part,) = parts_of(model)
        self.modules = {id(one): one for one in hf_vit.ADAPTER.attentions(part)}
        self.size, self.skip = (height, width), hf_vit.ADAPTER.attentions(part)[0].rpe_k.rpe_config.skip

    def __call__(self, module, q, k, v, attention_mask, scaling=None, dropout=0.0, **kwargs):
        c = module.rpe_k.rpe_config
        ids, _ = get_bucket_ids_2d(c.method, *self.size, self.skip, c.alpha, c.beta, c.gamma)
        rows = torch.arange(len(ids))[:, None]
        q, k_scaled = q * scaling, k * scaling
        scores = q @ k.mT
        scores = scores + (q @ module.rpe_k.lookup_table_weight)[:, :, rows, ids]
        scores = scores + (k_scaled @ module.rpe_q.lookup_table_weight)[:, :, rows, ids].mT
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(scores).masked_fill(~attention_mask, -torch.inf)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        values = v[:, :, None] + module.rpe_v.lookup_table_weight[0][ids]  # (B, H, L, L, D)
        return torch.einsum("bhij,bhijd->bihd", weights, values), weights


class by_hand:
    """Inside it an equipped model computes with `ByHand`, on one map, without the adapter's function and hooks."""

    def __init__(self, model, height, width):
        self.model, self.function = model, ByHand(model, height, width)

    def __enter__(self):
        AttentionInterface.register("by_hand", self.function)
        self.hooks = {}
        for one in self.model.modules():
            self.hooks[one] = one._forward_pre_hooks.copy()
            one._forward_pre_hooks.clear()
        for one in self.function.modules.values():
            one.config._attn_implementation_internal = "by_hand"

    def __exit__(self, *error):
        for one, hooks in self.hooks.items():
            one._forward_pre_hooks.update(hooks)
        for one in self.function.modules.values():
            one.config._attn_implementation_internal = "irpe"


SIZES = [(2, 3), (2, 8), (4, 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_formula(family):
    model = make(family)
    plain = unequip(copy.deepcopy(model))
    for size in SIZES[:2] if FAMILIES[family][4] == 32 else SIZES:
        with by_hand(model, *size):
            output = forward(family, model, *size)
            expected = gradients(model, spread(output))
        got = forward(family, model, *size)
        scale = max(1, output.abs().max())
        assert (got - output).abs().max() <= 1e-12 * scale
        assert (forward(family, plain, *size) - output).abs().max() > 1e-6 * scale
        got = gradients(model, spread(got))
        assert_same(got, expected, 1e-11)
        # a class token alone sees one bucket, so heads on it leave the last layer's tables out
        reached = [name for name in tables_of(model) if "head" not in family or "layers.0" in name or "layer.0" in name]
        assert len(reached) == (3 if "head" in family else 6)
        assert all(got[name].abs().max() > 1e-9 for name in reached)


@pytest.mark.parametrize("family", ["clip vision", "dinov2", "siglip vision"])
def test_images_that_are_no_whole_number_of_patches(family):
    model = make(family)
    image = torch.randn(2, 3, 4 * 2 + 3, 4 * 5 + 1, dtype=torch.float64)
    with by_hand(model, 2, 5):
        expected = features(run(family, model, image))
    assert (features(run(family, model, image)) - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())


def test_vit_on_hidden_states():
    model = make("vit")
    image = images("vit", 2, 8)
    x = model.embeddings(image, interpolate_pos_encoding=True)
    ids, _ = get_bucket_ids_2d("product", 2, 8, 1, 1.9, 3.8, 15.2)
    for layer in model.layers:
        attn, y = layer.attention, layer.layernorm_before(x)
        heads = []
        for h in range(3):
            at = slice(8 * h, 8 * h + 8)
            q, k, v = attn.q_proj(y)[..., at] / 8**0.5, attn.k_proj(y)[..., at], attn.v_proj(y)[..., at]
            table_q, table_k, table_v = (getattr(attn, f"rpe_{x}").lookup_table_weight[0] for x in "qkv")
            out = torch.zeros_like(v)
            for i in range(17):
                scores = [
                    (q[:, i] * k[:, j]).sum(-1) + q[:, i] @ table_k[:, ids[i, j]]
                    + k[:, j] / 8**0.5 @ table_q[:, ids[j, i]]
                    for j in range(17)
                ]  # fmt: skip
                weights = torch.stack(scores, -1).softmax(-1)
                out[:, i] = sum(weights[:, j, None] * (v[:, j] + table_v[ids[i, j]]) for j in range(17))
            heads.append(out)
        x = x + attn.o_proj(torch.cat(heads, -1))
        x = x + layer.mlp(layer.layernorm_after(x))
    assert (model.layernorm(x) - model(image, interpolate_pos_encoding=True).last_hidden_state).abs().max() <= 1e-11


def padded(height, width):
    """Images of which the second fills only a part, the height and width of that part in tokens, and the mask."""
    image = images("detr", 3, 5)
    mask = torch.ones(2, 24, 40)
    mask[1, 8 * height :] = mask[1, :, 8 * width :] = 0
    return image, mask


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(3, 4), (2, 5), (2, 2)])
def test_detr_on_hidden_states_with_padding(size, attn):
    model = make("detr", attn=attn)
    image, mask = padded(*size)
    feature, small = model.backbone(image, mask)[-1]
    assert feature.shape[-2:] == (3, 5)
    positions = model.position_embedding(feature.shape, image.device, image.dtype, small).flatten(2).mT
    x, keep = model.input_projection(feature).flatten(2).mT, small.flatten(1)
    assert keep[1].sum() == size[0] * size[1]
    ids, _ = get_bucket_ids_2d("product", 3, 5, 0, 1.9, 3.8, 15.2)
    rows = torch.arange(15)[:, None]
    for layer in model.encoder.layers:
        attention = layer.self_attn
        q, k, v = (
            project(y).view(2, 15, 3, 8).transpose(1, 2)
            for project, y in (
                (attention.q_proj, x + positions), (attention.k_proj, x + positions), (attention.v_proj, x)
            )
        )  # fmt: skip
        q = q * 8**-0.5
        scores = q @ k.mT + (q @ attention.rpe_k.lookup_table_weight)[:, :, rows, ids]
        scores = scores + (k * 8**-0.5 @ attention.rpe_q.lookup_table_weight)[:, :, rows, ids].mT
        weights = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
        out = torch.einsum("bhij,bhijd->bihd", weights, v[:, :, None] + attention.rpe_v.lookup_table_weight[0][ids])
        x = layer.self_attn_layer_norm(x + attention.o_proj(out.flatten(2)))
        x = layer.final_layer_norm(x + layer.mlp(x))
    got = model(image, pixel_mask=mask).encoder_last_hidden_state
    assert (got - x).abs().max() <= 1e-11
    assert (model(image).encoder_last_hidden_state - x).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["detr", "detr detection"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_detr_keeps_its_padding_masks(family, attn):
    model = make(family, tables=False, attn=attn)
    image, mask = padded(2, 4)
    expected, unmasked = model(image, pixel_mask=mask), model(image)
    got = equip(model, QKV)(image, pixel_mask=mask)
    for name in ("last_hidden_state", "encoder_last_hidden_state"):
        assert (getattr(got, name) - getattr(expected, name)).abs().max() <= 1e-12
        assert (getattr(got, name) - getattr(unmasked, name)).abs().max() > 1e-6


def test_a_model_that_is_switched_to_irpe_by_name_says_what_is_missing():
    for family in ("vit", "detr", "siglip vision"):
        equip(make(family, tables=False), QKV)  # registers the name
        with pytest.raises(RuntimeError, match=r"no tables.*call irpe.equip"):
            forward(family, make(family, tables=False, attn="irpe"), 2, 3)
    # the name has a mask function, so that DETR's decoder, say, would not lose its masks either
    assert AttentionMaskInterface()["irpe"] is sdpa_mask


def masked(family, kind, tokens):
    generator = torch.Generator().manual_seed(0)
    keep = (torch.rand(2, 1, tokens, tokens, generator=generator) < 0.7) | torch.eye(tokens).bool()
    return {
        "tokens": keep[:, 0, 0].long(),
        "bool": keep,
        "float": torch.randn(2, 1, tokens, tokens, dtype=torch.float64, generator=generator),
    }[kind]


# not: masks of tokens for DINOv3, which hands them to the attention as they are; booleans for eager attention, which
# adds them; any for SigLIP's vision tower, which takes them and makes nothing of them
MASKS = [
    *((family, attn, "tokens") for family in ("vit", "deit", "dinov2 registers", "beit") for attn in ("sdpa", "eager")),
    *((family, "sdpa", "bool") for family in ("vit", "dinov2", "dinov3", "clip vision")),
    *((family, attn, "float") for family in ("deit", "dinov3", "beit") for attn in ("sdpa", "eager")),
]


@pytest.mark.parametrize(("family", "attn", "kind"), MASKS)
def test_masks(family, attn, kind):
    model = make(family, tables=False, attn=attn)
    mask = masked(family, kind, FAMILIES[family][3] + 16)
    expected = forward(family, model, 2, 8, attention_mask=mask)
    equip(model, QKV)
    tolerance = 1e-12 if attn == "sdpa" else 1e-5  # eager attention computes its softmax in float32
    scale = max(1, expected.abs().max())
    assert (forward(family, model, 2, 8, attention_mask=mask) - expected).abs().max() <= tolerance * scale
    fill(model)
    with by_hand(model, 2, 8):
        expected = forward(family, model, 2, 8, attention_mask=mask)
    got = forward(family, model, 2, 8, attention_mask=mask)
    assert (got - expected).abs().max() <= 1e-12 * scale
    assert (got - forward(family, model, 2, 8)).abs().max() > 1e-6


def test_masks_that_cannot_be_read():
    with pytest.raises(TypeError, match=r'shape torch.Size\(\[2, 11\]\).*set_attn_implementation\("sdpa"\)'):
        forward("dinov3", make("dinov3"), 2, 4, attention_mask=torch.ones(2, 11))


def test_causal_attention():
    model = make("vit")
    causal = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
    expected = forward("vit", model, 2, 8, attention_mask=causal)
    assert (forward("vit", model, 2, 8, is_causal=True) - expected).abs().max() <= 1e-12
    assert (forward("vit", model, 2, 8) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_and_hidden_states(family):
    model = make(family)
    kwargs = dict(output_attentions=True, output_hidden_states=True)

    def weights(output):
        output = getattr(output, "vision_model_output", output)
        return getattr(output, "encoder_attentions", None) or output.attentions

    output = run(family, model, images(family, 2, 3), **kwargs)
    tokens = FAMILIES[family][3] + 6
    got = weights(output)
    assert [one.shape for one in got] == [(2, 8 if "seg" in family else 3, tokens, tokens)] * 2
    assert (features(output) - forward(family, model, 2, 3)).abs().max() <= 1e-11 * features(output).abs().max()
    with by_hand(model, 2, 3):
        expected = run(family, model, images(family, 2, 3), **kwargs)
    for one, other in zip(got, weights(expected), strict=True):
        assert (one - other).abs().max() <= 1e-12
        assert (one.sum(-1) - 1).abs().max() <= 1e-12
    for name in ("hidden_states", "encoder_hidden_states"):
        if getattr(output, name, None) is not None:
            assert len(getattr(output, name)) == 3
            assert all(map(torch.allclose, getattr(output, name), getattr(expected, name)))


def test_attention_weights_asked_for_by_the_configuration_and_with_masks():
    model = make("vit", attn="eager")
    model.config.output_attentions = True
    keep = masked("vit", "bool", 17)
    keep[0, 0, 3] = False
    output = run("vit", model, images("vit", 2, 8), attention_mask=keep)
    assert all((one[~keep.expand_as(one)] == 0).all() for one in output.attentions)
    assert output.attentions[0][0, :, 3].abs().max() == 0
    model.config.output_attentions = False
    other = run("vit", model, images("vit", 2, 8), attention_mask=keep)
    assert (other.last_hidden_state - output.last_hidden_state).abs().max() <= 1e-12
    dropped = make("vit", attention_probs_dropout_prob=0.5).train()
    weights = run("vit", dropped, images("vit", 2, 8), output_attentions=True).attentions[0]
    assert 0.3 < (weights == 0).double().mean() < 0.7


@pytest.mark.parametrize("family", BASES)
def test_attention_dropout_in_training_only(family):
    name = "attention_probs_dropout_prob"
    if any(one in family for one in ("dinov3", "clip", "siglip", "detr")):
        name = "attention_dropout"
    model = make(family, **{name: 0.5})
    assert torch.equal(forward(family, model, 2, 8), forward(family, model, 2, 8))
    model.train()
    torch.manual_seed(3)
    first = forward(family, model, 2, 8)
    assert (forward(family, model, 2, 8) - first).abs().max() > 1e-6
    torch.manual_seed(3)
    assert torch.equal(forward(family, model, 2, 8), first)


def test_another_implementation_for_the_rest_changes_nothing_for_equipped_attentions():
    for family in ("vit", "detr", "siglip"):
        model = make(family)
        expected = forward(family, model, 2, 3)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        assert (forward(family, model, 2, 3) - expected).abs().max() <= 1e-12


def test_layers_by_hand_need_the_map():
    model = make("vit")
    tokens = model.embeddings(images("vit", 2, 8), interpolate_pos_encoding=True)
    with pytest.raises(RuntimeError, match=r"does not know the height and width.*irpe_map=.*Map\("):
        model.layers[0](tokens)
    from irpe.integrations.hf_vit.attention import Map

    for layer in model.layers:
        tokens = layer(tokens, irpe_map=Map(2, 8, False))
    assert torch.equal(model.layernorm(tokens), forward("vit", model, 2, 8))
    with pytest.raises(ValueError, match=r"height=3.*17|17.*height=3"):
        model.layers[0](tokens, irpe_map=Map(3, 8, False))


def test_features_from_outside_are_taken_for_a_square_as_detr_does():
    model = make("detr")
    image = images("detr", 4, 4)
    inputs = model.input_projection(model.backbone(image, torch.ones(2, 32, 32))[-1][0]).flatten(2).mT
    got = model(inputs_embeds=inputs).encoder_last_hidden_state
    assert (got - model(image).encoder_last_hidden_state).abs().max() <= 1e-12
    encoded = BaseModelOutput(last_hidden_state=got)
    assert torch.equal(model(image, encoder_outputs=encoded).last_hidden_state, model(image).last_hidden_state)


# two maps of 16 tokens: whoever mixes them up gets no error from the shapes
SHARED = [(2, 8), (4, 4)]


@pytest.mark.parametrize("how", ["layers", "reentrant", "whole"])
@pytest.mark.parametrize("family", BASES)
def test_checkpointing_repeats_each_pass_on_its_own_map(family, how):
    model = make(family).train()

    def loss(whole):
        outputs = [
            checkpoint(forward, family, model, *size, use_reentrant=False) if whole else forward(family, model, *size)
            for size in SHARED
        ]
        return spread(outputs[0]) + 2 * spread(outputs[1])

    expected = gradients(model, loss(False))
    if how != "whole":
        if how == "reentrant":  # torch's own rule: without a gradient at its input the part has none
            model.enable_input_require_grads() if family != "detr" else None
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    total = loss(how == "whole")
    forward(family, model, 2, 3)  # a later pass on another map
    model.zero_grad()
    total.backward()
    got = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert_same(got, expected, 1e-11)
    assert all(name in got for name in tables_of(model))


def test_pickles_load_where_nothing_is_imported(run_python, tmp_path):
    for family in ("vit", "detr"):
        torch.save((make(family), images(family, 2, 8), FAMILIES[family][2]), tmp_path / f"{family}.pt")
    code = f"""
        import torch
        for family in ("vit", "detr"):
            model, image, arguments = torch.load(f"{tmp_path}/{{family}}.pt", weights_only=False)
            model(image, **arguments)
    """
    run_python(code, path=[ROOT])


def test_hooks_of_others_stay():
    model = make("siglip vision", tables=False)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    model.encoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append("attention"))
    equip(model, QKV)
    forward("siglip vision", model, 2, 3)
    forward("siglip vision", unequip(model), 2, 3)
    assert calls == ["model", "attention"] * 2


def equipped(model):
    return [n for n, one in enumerate(hf_vit.ADAPTER.attentions(parts_of(model)[0])) if hasattr(one, "rpe_k")]


@pytest.mark.parametrize("family", ["vit", "siglip vision", "detr"])
def test_some_blocks(family):
    layers = {"encoder_layers" if family == "detr" else "num_hidden_layers": 4}
    model = make(family, tables=False, **layers)
    before, state = forward(family, model, 2, 3), snapshot(model)
    equip(model, "rpe-1.9-product-ctx-1-k", blocks=slice(None, None, 2))
    assert equipped(model) == [0, 2]
    assert (forward(family, model, 2, 3) - before).abs().max() <= 1e-12
    part = parts_of(model)[0]
    kinds = [one.config._attn_implementation for one in hf_vit.ADAPTER.attentions(part)]
    assert kinds == ["irpe", "sdpa", "irpe", "sdpa"]
    assert hf_vit.ADAPTER.attentions(part)[1].config is part.config
    with pytest.raises(ValueError, match="has iRPE already; call unequip first, or name other blocks"):
        equip(model, "rpe-1.9-product-ctx-1-k", blocks=[0])
    equip(model, "rpe-20-cross-bias-0-q", blocks=lambda number, name: number == 3)
    assert equipped(model) == [0, 2, 3]
    assert [one["attentions"] for one in part.config.irpe] == [[0, 2], [3]]
    fill(model)
    got = gradients(model, spread(forward(family, model, 2, 3)))
    assert len(tables_of(model)) == 4
    assert all(got[name].abs().max() > 1e-9 for name in tables_of(model))
    assert snapshot(unequip(model)) == state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mode", "shared", "on"), [("ctx", False, "qkv"), ("ctx", True, "v"), ("bias", False, "qk")])
def test_every_encoding_reaches_every_head(method, mode, shared, on):
    model = make("clip vision", get_rpe_config(1.9, method, mode, shared, 0, on))
    got = gradients(model, spread(forward("clip vision", model, 2, 8)))
    assert len(tables_of(model)) == 2 * len(on) * (2 if method == "cross" else 1)
    for name, table in tables_of(model).items():
        assert table.shape[0] == (1 if shared else 3)
        assert got[name].flatten(1).abs().amax(1).min() > 1e-9, name
    exact = forward("clip vision", model, 2, 8)
    weights = run("clip vision", model, images("clip vision", 2, 8), output_attentions=True)
    assert (weights.last_hidden_state - exact).abs().max() <= 1e-12


def refused(model, reason, error=ValueError, config="rpe-1.9-product-ctx-1-k", **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=reason) as caught:
        equip(model, config, **kwargs)
    if error is TypeError or "cannot be added" in str(caught.value):
        assert "of transformers ViT, DeiT, BEiT, DINOv2" in str(caught.value)
    assert snapshot(model) == before


def build(name, **settings):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**settings))


def test_refused_models():
    refused(build("ViTMAEModel", **PATCHES), "ViTMAEModel: it removes and shuffles tokens")
    refused(build("ViTMAEForPreTraining", **PATCHES), "ViTMAEModel: it removes and shuffles tokens")
    swin = dict(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    refused(build("SwinModel", **swin), "SwinModel: its attention runs in windows")
    refused(build("Swinv2ForImageClassification", **swin), "Swinv2Model: its attention runs in windows.*cosine")
    refused(build("ResNetModel", **RESNET), "ResNetModel is not a model that iRPE can be added to", TypeError)
    refused(build("CLIPTextModel", **TEXT), "CLIPTextModel is not a model", TypeError)
    refused(build("ViTMSNModel", **PATCHES), "ViTMSNModel is not a model", TypeError)


def test_refused_subclass():
    class Mine(transformers.ViTModel):
        pass

    refused(Mine(transformers.ViTConfig(**PATCHES)), "Mine: Mine changes ViTModel")
    model = make("vit", tables=False)

    class Other(type(model.layers[1].attention)):
        pass

    model.layers[1].attention.__class__ = Other
    refused(model, "layers has 2 layers; expected one ViTAttention in each, as transformers has it from 5.18 on")


def test_refused_arguments():
    model = make("vit", tables=False)
    refused(model, "the model knows the size of its map; leave grid out", grid=(2, 3))
    refused(model, "rpe_v has skip=7, but the model has 1 prefix token;", config=get_rpe_config(skip=7, rpe_on="v"))
    refused(model, "blocks holds 7, but the model has 2 attentions", blocks=[7])
    refused(make("detr", tables=False), "skip=1, but the model has 0", config=get_rpe_config(skip=1))
    equip(model, get_rpe_config(skip=1))
    refused(model, "has iRPE already; call unequip first")
    with pytest.raises(ValueError, match="ViTModel has no iRPE"):
        unequip(make("vit", tables=False))
    for family, where in (("vit", "layers.0.attention"), ("detr", "")):
        model = make(family, tables=False)
        module = model.get_submodule(where)
        module.forward = type(module).forward.__get__(module)
        refused(model, "the forward of .* has been replaced on the object")


def test_encodings_that_differ():
    config = RPEConfig(
        rpe_q=get_single_rpe_config(20, "euc", "bias", False), rpe_v=get_single_rpe_config(2.0, "cross", skip=2)
    )
    attn = hf_vit.ADAPTER.attentions(make("deit", config))[0]
    assert attn.rpe_k is None
    assert attn.rpe_q.lookup_table_bias.shape == (3, 82)
    assert attn.rpe_v.rp_cols.lookup_table_weight.shape == (1, 10, 8)


def test_only_the_vision_tower_of_a_pair():
    for family in ("clip", "siglip"):
        model = make(family)
        assert {name.split(".")[0] for name in tables_of(model)} == {"vision_model"}
        assert model.text_model.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"
        assert model.get_image_features(images(family, 2, 3), **INTERPOLATE) is not None


def test_a_tower_inside_a_model_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = make("dinov2", tables=False), make("vit", tables=False)

        def forward(self, image):
            return self.student(image)[0].sum() + self.teacher(image, interpolate_pos_encoding=True)[0].sum()

    model = Mine()
    before = model(images("vit", 2, 3))
    equip(model, QKV)
    assert (model(images("vit", 2, 3)) - before).abs() <= 1e-10
    assert len(tables_of(model)) == 12
    assert not tables_of(unequip(model))


def test_nothing_is_imported_for_models_of_others(run_python):
    code = """
        import sys
        import transformers
        from torch import nn
        import irpe
        try:
            irpe.equip(nn.Linear(2, 3), "rpe-1.9-product-ctx-1-k")
        except TypeError as error:
            assert "Linear is not a model" in str(error), error
        else:
            raise AssertionError
        assert ("irpe.integrations.hf_vit" in sys.modules) == ("transformers" in sys.modules)
        loaded = [name for name in sys.modules if name.startswith("transformers.model")]
        assert not [name for name in loaded if "modeling_" in name], loaded
    """
    run_python(code, path=[ROOT])
    run_python(code.replace("import transformers", ""), path=[ROOT], forbid=["transformers"])


def test_signatures_stay_for_those_who_read_them():
    import inspect

    for family in ("detr", "detr segmentation", "vit"):
        model = make(family, tables=False)
        before, text = inspect.signature(model.forward), repr(model)
        equip(model, RPEConfig(rpe_k=get_single_rpe_config()), blocks=[0])
        assert inspect.signature(model.forward) == before
        assert type(model).__name__ == type(unequip(model)).__name__
        assert repr(model) == text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["vit", "siglip vision", "detr"])
def test_half_precision(family, dtype):
    model = make(family, dtype=dtype)
    assert all(one.dtype == dtype for one in tables_of(model).values())
    equipped_after = equip(make(family, tables=False, dtype=dtype), QKV)
    assert all(one.dtype == dtype for one in tables_of(equipped_after).values())
    image = images(family, 2, 8, dtype=dtype)
    got = features(run(family, model, image))
    exact = make(family)
    exact.load_state_dict(model.state_dict())
    plain = unequip(copy.deepcopy(model))
    error = (got.double() - features(run(family, exact, image.double()))).abs().max()
    own = (
        (features(run(family, plain, image)).double() - features(run(family, unequip(exact), image.double())))
        .abs()
        .max()
    )
    assert error <= 4 * own + 4 * torch.finfo(dtype).eps * got.abs().max()
    got.float().sum().backward()
    assert all(one.grad.isfinite().all() for one in tables_of(model).values())


def test_autocast():
    for family in ("vit", "beit", "detr"):
        model = make(family, dtype=torch.float32)
        image = images(family, 2, 8, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = features(run(family, model, image))
            got.float().sum().backward()
        assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in tables_of(model).values())


def test_a_frozen_model_trains_its_tables():
    model = equip(make("dinov2 registers", tables=False).train().requires_grad_(False), QKV)
    assert all(one.training for one in model.modules())
    assert {name for name, one in model.named_parameters() if one.requires_grad} == tables_of(model).keys()
    spread(forward("dinov2 registers", model, 2, 8)).backward()
    assert all(one.grad is not None for one in rpe_parameters(model)["params"])
    assert not any(one.training for one in model.eval().modules())


def saved(model, folder):
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config, {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading(family, tmp_path, caplog):
    model = make(family, dtype=torch.float32)
    config, files = saved(model, tmp_path)
    assert "model.safetensors" in files
    assert config["architectures"] == [FAMILIES[family][0]]
    inner = config.get("vision_config", config)
    assert [one["attentions"] for one in inner["irpe"]] == [[0, 1]]
    cls = getattr(transformers, FAMILIES[family][0])
    other, info = hf_vit.from_pretrained(cls, tmp_path, output_loading_info=True)
    assert type(other) is type(model)
    assert not any(info.values()), info
    assert_same(dict(other.state_dict()), dict(model.state_dict()), 0)
    assert not other.training
    image = images(family, 2, 3, dtype=torch.float32)
    expected = features(run(family, model, image))
    assert torch.equal(features(run(family, other, image)), expected)
    assert parts_of(other)[0].config.irpe == parts_of(model)[0].config.irpe
    # as often as one likes
    again = tmp_path / "again"
    other.save_pretrained(again)
    assert torch.equal(
        features(run(family, hf_vit.from_pretrained(cls, again), image)), features(run(family, model, image))
    )
    # and without: transformers alone would leave the tables out
    with pytest.raises(Exception, match=r"load it with irpe\.load\(folder\)"):
        cls.from_pretrained(tmp_path)
    unequip(model).save_pretrained(tmp_path)
    assert torch.equal(features(run(family, cls.from_pretrained(tmp_path), image)), features(run(family, model, image)))


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("vit", "AutoModel"), ("vit head", "AutoModelForImageClassification"), ("clip", "AutoModel"),
        ("siglip vision", "AutoModel"), ("detr detection", "AutoModelForObjectDetection"),
        ("dinov3", "AutoModel"), ("beit", "AutoModel"),
    ],
)  # fmt: skip
def test_auto_classes(family, auto, tmp_path):
    model = make(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    cls = getattr(transformers, auto)
    other = hf_vit.from_pretrained(cls, tmp_path, dtype="auto")
    assert type(other) is type(model)
    image = images(family, 2, 3, dtype=torch.float32)
    assert torch.equal(features(run(family, other, image)), features(run(family, model, image)))
    with pytest.raises(Exception, match=r"load it with irpe\.load\(folder\)"):
        cls.from_pretrained(tmp_path)  # the Auto class itself is as it was


def test_arguments_of_from_pretrained(tmp_path):
    model = make("vit head", "rpe-1.9-cross-ctx-0-qv", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    other, info = hf_vit.from_pretrained(
        transformers.AutoModelForImageClassification, str(tmp_path), dtype=torch.bfloat16, num_labels=7,
        ignore_mismatched_sizes=True, attn_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert other.classifier.out_features == 7
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert {one.dtype for one in other.parameters()} == {torch.bfloat16}
    assert other.config._attn_implementation == "eager"
    for name, table in tables_of(model).items():
        assert torch.equal(tables_of(other)[name], table.bfloat16()), name
    # a head that was not there is new, as transformers has it, and a tower comes out of a pair
    make("vit", dtype=torch.float32).save_pretrained(tmp_path / "base")
    headed, info = hf_vit.from_pretrained(
        transformers.ViTForImageClassification, tmp_path / "base", output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert len(tables_of(headed)) == 6
    pair = make("clip", dtype=torch.float32)
    pair.save_pretrained(tmp_path / "pair")
    tower = hf_vit.from_pretrained(transformers.CLIPVisionModel, tmp_path / "pair")
    image = images("clip", 2, 3, dtype=torch.float32)
    assert torch.equal(forward_of(tower, image), forward_of(pair.vision_model, image))


def forward_of(tower, image):
    return tower(image, interpolate_pos_encoding=True).last_hidden_state


def test_some_blocks_are_saved_as_some_blocks(tmp_path):
    model = make("vit", tables=False, dtype=torch.float32, num_hidden_layers=4)
    equip(model, "rpe-1.9-product-ctx-1-k", blocks=[1])
    config = RPEConfig(
        rpe_q=get_single_rpe_config(20, "euc", "bias", False), rpe_v=get_single_rpe_config(2.0, "cross", skip=1)
    )
    fill(equip(model, config, blocks=[3]))
    model.save_pretrained(tmp_path)
    other = hf_vit.from_pretrained(transformers.ViTModel, tmp_path)
    assert equipped(other) == [1, 3]
    assert repr(other) == repr(model)
    assert_same(dict(other.state_dict()), dict(model.state_dict()), 0)


def test_folders_without_irpe(tmp_path):
    plain = make("vit", tables=False, dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    for cls in (transformers.ViTModel, transformers.AutoModel):
        with pytest.raises(ValueError, match="says nothing of iRPE.*ViTModel.from_pretrained, and call irpe.equip"):
            hf_vit.from_pretrained(cls, tmp_path)
    equip(plain, QKV).save_pretrained(tmp_path / "with")
    assert "irpe" not in unequip(plain).config.to_dict()
    config = (tmp_path / "with" / "config.json").read_text()
    plain.save_pretrained(tmp_path / "with")
    (tmp_path / "with" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"no weights for layers.0.attention.rpe_k.lookup_table_weight.*and others"):
        hf_vit.from_pretrained(transformers.AutoModel, tmp_path / "with")
    with pytest.raises(OSError, match="nowhere"):
        hf_vit.from_pretrained(transformers.ViTModel, tmp_path / "nowhere")


def compiled_gradients(model, expected, *losses):
    """Those that the model has uncompiled too: a compiled one has zeros for outputs that no one used."""
    return {name: one for name, one in gradients(model, *losses).items() if name in expected}


# one size after the other; DINOv2's resampling of positions fails in torch where sizes are symbols
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("family", "dynamic"), [("vit", None), *((one, False) for one in BASES[1:])])
def test_compile_fullgraph_with_image_sizes_in_turns(family, dynamic):
    model = make(family, **{"encoder_layers" if family == "detr" else "num_hidden_layers": 1})

    def losses(function):
        return [n * spread(features(run(family, function, images(family, *one)))) for n, one in enumerate(SHARED, 1)]

    expected = gradients(model, *losses(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    # DINOv2 resamples its positions in float32
    assert_same(compiled_gradients(model, expected, *losses(compiled)), expected, 1e-6 if "dino" in family else 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_checkpointing():
    model = make("vit").train()

    def losses(function):
        return [n * spread(features(run("vit", function, images("vit", *one)))) for n, one in enumerate(SHARED, 1)]

    expected = gradients(model, *losses(model))
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled_gradients(model, expected, *losses(compiled)), expected, 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    model = make("vit")
    expected = gradients(model, spread(forward("vit", model, 2, 8)))
    compiled = torch.compile(model, fullgraph=True)
    got = spread(features(run("vit", compiled, images("vit", 2, 8))))
    assert_same(compiled_gradients(model, expected, got), expected, 1e-10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "strict"),
    [*((one, False) for one in BASES), *(pytest.param(one, True, marks=pytest.mark.slow) for one in BASES)],
)
def test_export(family, strict):
    model = make(family)
    arguments = dict(pixel_values=images(family, 2, 3), **FAMILIES[family][2])
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, strict=strict)
    got = features(run(family, program.module(), images(family, 2, 3)))
    assert (got - forward(family, model, 2, 3)).abs().max() <= 1e-11
    spread(forward(family, model, 2, 3)).backward()  # tracing left nothing behind


def test_export_with_dynamic_height_and_width():
    model = make("vit")
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    with torch.no_grad():
        program = torch.export.export(
            model, (), dict(pixel_values=images("vit", 3, 5), **INTERPOLATE), strict=False,
            dynamic_shapes=dict(pixel_values={2: 4 * height, 3: 4 * width}, interpolate_pos_encoding=None),
        )  # fmt: skip
    for size in ((2, 8), (8, 2), (5, 3)):
        got = features(run("vit", program.module(), images("vit", *size)))
        assert (got - forward("vit", model, *size)).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["vit head", "siglip vision", "detr detection"])
def test_lora(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = make(family, tables=False, dtype=torch.float32)
    equip(model, QKV)
    image = images(family, 2, 8, dtype=torch.float32)
    expected = features(run(family, model, image))
    names = [name.rpartition(".")[0] for name in tables_of(model)]
    settings = dict(r=2, target_modules=["q_proj", "v_proj"])
    frozen = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).train()
    spread(features(run(family, frozen, image))).backward()
    assert all(one.grad is None and not one.requires_grad for one in tables_of(frozen).values())
    trained = peft.get_peft_model(model, peft.LoraConfig(**settings, modules_to_save=["rpe_q", "rpe_k", "rpe_v"]))
    assert (features(run(family, trained, image)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tables = {name: one for name, one in tables_of(trained).items() if one.requires_grad}
    assert len(tables) == len(names) == 6
    optimizer = torch.optim.SGD([one for one in trained.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(3):  # LoRA starts at zero on one side, and the tables do
        optimizer.zero_grad()
        spread(features(run(family, trained.train(), image))).backward()
        optimizer.step()
    reached = [one.abs().max() > 0 for name, one in tables.items() if "head" not in family or ".0." in name]
    assert len(reached) >= 3 and all(reached)
    got = features(run(family, trained.eval(), image))
    assert (got - expected).abs().max() > 1e-6
    with trained.disable_adapter():
        assert (features(run(family, trained, image)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    trained.save_pretrained(tmp_path)
    base = equip(make(family, tables=False, dtype=torch.float32), QKV)
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert (features(run(family, other, image)) - got).abs().max() <= 1e-5 * got.abs().max()
    merged = trained.merge_and_unload()
    assert (features(run(family, merged, image)) - got).abs().max() <= 1e-4 * got.abs().max()
    assert tables_of(merged).keys() == {f"{name}.lookup_table_weight" for name in names}
    merged.save_pretrained(tmp_path / "merged")
    again = hf_vit.from_pretrained(type(merged), tmp_path / "merged")
    assert torch.equal(features(run(family, again, image)), features(run(family, merged, image)))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["dinov2", "detr"])
def test_two_processes(run_python, tmp_path, family, how):
    code = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})

        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        def work(rank):
            torch.set_num_threads(1)
            from equipped import gradients, spread, tables_of
            from test_hf_vit import features, images, make, run
            torch.distributed.init_process_group(
                "gloo", init_method="file://{tmp_path / "meeting"}", rank=rank, world_size=2
            )
            model = make({family!r})
            image = images({family!r}, 2, 8, batch=4)
            parts = [spread(features(run({family!r}, model, part))) / 2 for part in image.split(2)]
            expected = gradients(model, *parts)
            model.zero_grad()
            if {how!r} == "ddp":
                parallel = DistributedDataParallel(model, find_unused_parameters=True)
            else:
                mesh = init_device_mesh("cpu", (2,))
                layers = ("Dinov2Layer", "DetrEncoderLayer")
                for one in [one for one in model.modules() if type(one).__name__ in layers]:
                    fully_shard(one, mesh=mesh)
                parallel = fully_shard(model, mesh=mesh)
            spread(features(run({family!r}, parallel, image.split(2)[rank]))).backward()
            for name in tables_of(model):
                grad = model.get_parameter(name).grad
                grad = grad.full_tensor() if {how!r} == "fsdp2" else grad
                error = (grad - expected[name]).abs().max()
                assert error <= 1e-11 * max(1, expected[name].abs().max()), (name, error)
            open(f"{tmp_path}/done{{rank}}", "w").close()

        # processes that are forked see this function, which was never in a file
        torch.multiprocessing.start_processes(work, nprocs=2, start_method="fork")
    """
    run_python(code, path=[ROOT])
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.parametrize("family", ["vit", "siglip vision"])
@pytest.mark.parametrize("after", [False, True], ids=["equipped first", "dispatched first"])
def test_hooks_of_accelerate(family, after):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make(family, tables=not after)
    expected = forward(family, make(family), 2, 8)
    for one in model.modules():
        hooks.add_hook_to_module(one, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    if after:
        fill(equip(model, QKV))
    assert (forward(family, model, 2, 8) - expected).abs().max() <= 1e-12
