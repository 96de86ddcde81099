"""Equipped vision models of transformers: outputs, masks, gradients, checkpointing, compile, export, saving, peft."""

import copy
import io
import json
import pickle

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import RPEConfig, get_bucket_ids_2d, get_rpe_config, get_single_rpe_config
from irpe.equip import equip, rpe_parameters, unequip

transformers = pytest.importorskip("transformers", minversion="5.18")

from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402

from irpe.integrations import hf_vit  # noqa: E402

QKV = get_rpe_config(ratio=1.9, method="product", rpe_on="qkv")

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
    "d_model": 48,
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
    "dinov3": ("DINOv3ViTModel", {**PATCHES, "num_register_tokens": 2}, {}, 3, 4),
    "dinov3 backbone": (
        "DINOv3ViTBackbone", {**PATCHES, "out_features": ["stage2"], "use_gated_mlp": True}, {}, 1, 4,
    ),
    "clip vision": ("CLIPVisionModel", PATCHES, INTERPOLATE, 1, 4),
    "clip projection": ("CLIPVisionModelWithProjection", {**PATCHES, "projection_dim": 8}, INTERPOLATE, 1, 4),
    "clip": ("CLIPModel", TOWERS, {**INTERPOLATE, **IDS}, 1, 4),
    "siglip vision": ("SiglipVisionModel", PATCHES, INTERPOLATE, 0, 4),
    "siglip": ("SiglipModel", TOWERS, {**INTERPOLATE, **IDS}, 0, 4),
    "beit": ("BeitModel", {**PATCHES, "use_relative_position_bias": True}, {}, 1, 4),
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
    model = cls(cls.config_class(**{**copy.deepcopy(arguments), **settings}, attn_implementation=attn))
    for one in model.parameters():
        nn.init.normal_(one, std=0.3) if one.dim() > 1 else nn.init.normal_(one, mean=0.5, std=0.3)
    model = model.to(dtype).eval()
    return fill(equip(model, config)) if tables else model


def fill(model):
    torch.manual_seed(1)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    return model


def tables_of(model):
    return {name: one for name, one in model.named_parameters() if "lookup_table" in name}


def images(family, height, width, batch=2, dtype=torch.float64):
    pixels = FAMILIES[family][4]
    generator = torch.Generator().manual_seed(10 * height + width)
    return torch.randn(batch, 3, height * pixels, width * pixels, dtype=dtype, generator=generator)


def run(family, model, image, **kwargs):
    return model(pixel_values=image, **{**FAMILIES[family][2], **kwargs})


def features(output):
    """What the vision transformer itself has made of every token."""
    output = getattr(output, "vision_model_output", output)
    for name in ("encoder_last_hidden_state", "last_hidden_state", "feature_maps", "image_embeds", "logits"):
        value = getattr(output, name, None)
        if value is None:
            value = getattr(output, "cls_logits", None) if name == "logits" else None
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise AssertionError(type(output))


def forward(family, model, *size, **kwargs):
    return features(run(family, model, images(family, *size), **kwargs))


def spread(value):
    return (value * torch.arange(value.numel(), dtype=value.dtype).view_as(value).cos()).sum()


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale, name


def parts_of(model):
    return hf_vit.find(model)


def snapshot(model):
    """Classes, attributes, hooks, parameters and configurations."""
    return [
        (name, type(one), sorted(vars(one)), list(one._parameters), list(one._modules), one.training,
         [len(hooks) for key, hooks in sorted(vars(one).items()) if "hooks" in key and isinstance(hooks, dict)],
         id(getattr(one, "config", None)), json.dumps(one.config.to_dict(), default=str) if "config" in vars(one) else "")
        for name, one in model.named_modules()
    ]  # fmt: skip


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
    assert [one.rpe_k.rpe_config.skip for one in hf_vit.attentions(part)] == [prefix] * 2
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
        self.modules = {id(one): one for one in hf_vit.attentions(part)}
        self.size, self.skip = (height, width), hf_vit.attentions(part)[0].rpe_k.rpe_config.skip

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
        assert all(got[name].abs().max() > 1e-9 for name in tables_of(model))


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
    # transformers' eager attention of float64 is exact too here: it has no cast to float32
    for name in ("last_hidden_state", "encoder_last_hidden_state"):
        assert (getattr(got, name) - getattr(expected, name)).abs().max() <= 1e-12
        assert (getattr(got, name) - getattr(unmasked, name)).abs().max() > 1e-6
    # what lies under the padding has no say in what is not
    other = image.clone()
    other[1, :, 16:] += 1
    fill(model)
    _, small = (model.model if family == "detr detection" else model).backbone(image, mask)[-1]
    keep = small.flatten(1)[1]
    feature = model.config.backbone_config  # the backbone's own borders see beyond the padding
    assert feature is not None and keep.sum() == 8


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


@pytest.mark.parametrize("kind", ["tokens", "bool", "float"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2 registers", "dinov3", "siglip vision"])
def test_masks(family, attn, kind):
    if kind == "tokens" and family in ("dinov3", "siglip vision"):
        pytest.skip("transformers hands it to the attention as it is")
    if kind != "tokens" and family == "siglip vision":
        pytest.skip("its vision tower takes masks, and makes nothing of them")
    if kind == "bool" and attn == "eager":
        pytest.skip("transformers' eager attention adds 1 where a boolean mask is true")
    model = make(family, tables=False, attn=attn)
    mask = masked(family, kind, FAMILIES[family][3] + 16)
    expected, unmasked = forward(family, model, 2, 8, attention_mask=mask), forward(family, model, 2, 8)
    equip(model, QKV)
    tolerance = 1e-12 if attn == "sdpa" else 1e-4  # eager attention of float64 computes its softmax in float32
    assert (forward(family, model, 2, 8, attention_mask=mask) - expected).abs().max() <= tolerance * expected.abs().max()
    fill(model)
    with by_hand(model, 2, 8):
        expected = forward(family, model, 2, 8, attention_mask=mask)
    got = forward(family, model, 2, 8, attention_mask=mask)
    assert (got - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())
    assert (got - forward(family, model, 2, 8)).abs().max() > 1e-6
    assert (unmasked - expected).abs().max() > 1e-6
