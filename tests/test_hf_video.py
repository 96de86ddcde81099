"""Equipped video models of transformers: maps of (frames, height, width), tokens that are left out, saving."""

import copy
import itertools
import json

import pytest
import torch
from equipped import Equipped, assert_same, fill, gradients, spread, tables_of
from torch import nn

from irpe import get_bucket_ids, get_rpe_config
from irpe.equip import equip, unequip

transformers = pytest.importorskip("transformers", minversion="5.18")

from irpe.integrations import hf_vit  # noqa: E402

QKV = get_rpe_config(ratio=1.5, method="product", rpe_on="qkv", ndim=3)
SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=4, tubelet_size=2)
VIDEOMAE = dict(**SMALL, intermediate_size=32, image_size=12, num_frames=8)
DECODER = dict(decoder_num_attention_heads=2, decoder_hidden_size=8, decoder_num_hidden_layers=1)
DECODER |= dict(decoder_intermediate_size=16)
VJEPA2 = dict(**SMALL, mlp_ratio=2, crop_size=12, frames_per_clip=8, pred_hidden_size=24, pred_num_attention_heads=3)
VJEPA2 |= dict(pred_num_hidden_layers=1, pred_num_mask_tokens=2, num_pooler_layers=1)

# class, arguments of its configuration, name of the videos among the arguments of its forward, (frames, height, width)
FAMILIES = {
    "videomae": ("VideoMAEModel", VIDEOMAE, "pixel_values", (4, 3, 3)),
    "videomae classification": ("VideoMAEForVideoClassification", VIDEOMAE, "pixel_values", (4, 3, 3)),
    "videomae pre-training": ("VideoMAEForPreTraining", {**VIDEOMAE, **DECODER}, "pixel_values", (4, 3, 3)),
    "vjepa2": ("VJEPA2Model", VJEPA2, "pixel_values_videos", (4, 2, 3)),
    "vjepa2 classification": ("VJEPA2ForVideoClassification", VJEPA2, "pixel_values_videos", (4, 3, 3)),
}
BASES = ["videomae", "vjepa2"]


def make(family, config=QKV, *, tables=True, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    name, arguments, *_ = FAMILIES[family]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**{**copy.deepcopy(arguments), **settings}))
    for one in model.parameters():
        nn.init.normal_(one, mean=0.5 * (one.dim() == 1), std=0.3)
    model = model.to(dtype).eval()
    return fill(equip(model, config)) if tables else model


def videos(family, dtype=torch.float64, size=None):
    frames, height, width = size or FAMILIES[family][3]
    generator = torch.Generator().manual_seed(width)
    return torch.randn(2, 2 * frames, 3, 4 * height, 4 * width, dtype=dtype, generator=generator)


def mask_of(kept=20, batch=2, tokens=36):
    """True where a token is left out; each sample has others."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(tokens, generator=generator) >= kept for _ in range(batch)])


def run(family, model, video=None, **kwargs):
    video = videos(family) if video is None else video
    if family == "videomae pre-training":
        kwargs = dict(bool_masked_pos=mask_of()) | kwargs
    return model(**{FAMILIES[family][2]: video}, **kwargs)


def features(output):
    return next(getattr(output, name) for name in ("last_hidden_state", "logits") if hasattr(output, name))


def forward(family, model, *args, **kwargs):
    return features(run(family, model, *args, **kwargs))


def attentions(model):
    (part,) = hf_vit.ADAPTER.find(model)
    return hf_vit.ADAPTER.attentions(part)


def snapshot(model):
    return [
        (name, type(one), sorted(vars(one)), list(one._parameters), list(one._modules), len(one._forward_pre_hooks),
         len(one._forward_pre_hooks_with_kwargs), id(getattr(one, "config", None)))
        for name, one in model.named_modules()
    ]  # fmt: skip


class TestEquipped(Equipped):
    snapshot = staticmethod(snapshot)

    @staticmethod
    def families():
        return FAMILIES

    @staticmethod
    def build(family):
        return make(family, tables=False)

    @staticmethod
    def equip(model, family):
        return equip(model, QKV)

    @staticmethod
    def run(model, family):
        return forward(family, model)

    @staticmethod
    def form(model):
        """Configurations are copied too."""
        return [row[:-1] for row in snapshot(model)]


def by_hand(attn, size, mask=None):
    """A forward of an attention: the formula of the paper with a vector for each pair of tokens that are there."""
    cells = torch.tensor(list(itertools.product(*map(range, size)))).expand(2, -1, -1)
    places = cells if mask is None else cells[~mask].view(2, -1, 3)
    c = attn.rpe_k.rpe_config
    ids, _ = get_bucket_ids(c.method, places, places, 0, c.alpha, c.beta, c.gamma)  # (B, L, L)

    def forward(x, position_mask=None, irpe_map=None):
        q, k, v = (part(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (attn.query, attn.key, attn.value))
        if hasattr(attn, "apply_rotary_embeddings"):
            at = attn.get_position_ids(x)
            q, k = attn.apply_rotary_embeddings(q, at), attn.apply_rotary_embeddings(k, at)
        scale = q.shape[-1] ** -0.5
        on_k, on_q = (one.lookup_table_weight[0].T[ids] for one in (attn.rpe_k, attn.rpe_q))  # (B, L, L, D)
        scores = scale * (q @ k.mT + torch.einsum("bhid,bijd->bhij", q, on_k))
        weights = (scores + scale * torch.einsum("bhjd,bjid->bhij", k, on_q)).softmax(-1)
        out = weights @ v + torch.einsum("bhij,bijd->bhid", weights, attn.rpe_v.lookup_table_weight[0][ids])
        out = out.transpose(1, 2).flatten(2)
        return (attn.proj(out) if hasattr(attn, "proj") else out), weights

    return forward


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_tables_change_nothing(family):
    model = make(family, tables=False)
    before, weights = forward(family, model), copy.deepcopy(model.state_dict())
    assert equip(model, QKV) is model
    assert (forward(family, model) - before).abs().max() <= 1e-12 * max(1, before.abs().max())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert len(after.keys() - weights.keys()) == 2 * 3
    assert not any("predictor" in key or "decoder" in key for key in after.keys() - weights.keys())


@pytest.mark.parametrize("family", BASES)
def test_zero_tables_on_tokens_of_real_clips(family):
    """(8, 14, 14) tokens, of 16 frames in tubelets of 2."""
    sides = dict(image_size=56, num_frames=16) if family == "videomae" else dict(crop_size=56, frames_per_clip=16)
    model = make(family, tables=False, num_hidden_layers=1, **sides)
    video, kwargs = videos(family, size=(8, 14, 14))[:1], {} if family == "videomae" else dict(skip_predictor=True)
    with torch.no_grad():
        before = forward(family, model, video, **kwargs)
        assert before.shape == (1, 8 * 14 * 14, 24)
        equip(model, "rpe-1.9-product-ctx-1-qkv-3d")
        assert (forward(family, model, video, **kwargs) - before).abs().max() <= 1e-12 * max(1, before.abs().max())
        fill(model)
        assert (forward(family, model, video, **kwargs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_formula(family):
    model = make(family)
    got = forward(family, model)
    found = gradients(model, spread(got))
    for attn in attentions(model):
        attn.forward = by_hand(attn, FAMILIES[family][3], mask_of() if "pre-training" in family else None)
    expected = forward(family, model)
    assert (got - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())
    assert_same(found, gradients(model, spread(expected)), 1e-10)
    assert len(tables_of(model)) == 6 and all(found[name].abs().max() > 1e-9 for name in tables_of(model))
    for attn in attentions(model):
        del attn.forward
    assert (forward(family, unequip(model)) - expected).abs().max() > 1e-6


def test_tokens_that_are_left_out_keep_their_places():
    model, mask = make("videomae"), mask_of()
    got = model(videos("videomae"), mask).last_hidden_state  # by position, too
    assert torch.equal(forward("videomae", model, bool_masked_pos=mask), got)
    for attn in attentions(model):
        attn.forward = by_hand(attn, (4, 3, 3), mask)
    assert (forward("videomae", model, bool_masked_pos=mask) - got).abs().max() <= 1e-11
    for attn in attentions(model):
        attn.forward = by_hand(attn, (4, 5, 1))  # 20 tokens as if they were the first ones
    assert (forward("videomae", model, bool_masked_pos=mask) - got).abs().max() > 1e-3
    kept = torch.zeros(2, 36, dtype=torch.bool)
    whole = make("videomae")
    torch.testing.assert_close(
        forward("videomae", whole, bool_masked_pos=kept), forward("videomae", whole), rtol=1e-11, atol=1e-11
    )


def test_videos_of_other_sizes():
    """V-JEPA 2 takes any number of frames, and repeats those that are too few; VideoMAE refuses other sizes itself."""
    model = make("vjepa2")
    for size in ((2, 3, 3), (5, 1, 3)):
        got = forward("vjepa2", model, videos("vjepa2", size=size))
        for attn in attentions(model):
            attn.forward = by_hand(attn, size)
        expected = forward("vjepa2", model, videos("vjepa2", size=size))
        assert (got - expected).abs().max() <= 1e-11 * max(1, expected.abs().max())
        for attn in attentions(model):
            del attn.forward
    assert forward("vjepa2", model, videos("vjepa2")[:, :1]).shape == (2, 6, 24)
    with pytest.raises(ValueError, match="doesn't match model"):
        forward("videomae", make("videomae"), videos("videomae", size=(4, 3, 4)))


@pytest.mark.parametrize("family", BASES)
def test_attention_weights(family):
    model = make(family)
    output = run(family, model, output_attentions=True)
    tokens = output.last_hidden_state.shape[1]
    assert [one.shape for one in output.attentions] == [(2, 3, tokens, tokens)] * 2
    assert (output.last_hidden_state - forward(family, model)).abs().max() <= 1e-11
    for attn in attentions(model):
        attn.forward = by_hand(attn, FAMILIES[family][3])
    expected = run(family, model, output_attentions=True)
    for got, want in zip(output.attentions, expected.attentions, strict=True):
        assert (got - want).abs().max() <= 1e-12


@pytest.mark.parametrize("family", BASES)
def test_some_blocks(family):
    model = make(family, tables=False)
    before = forward(family, model)
    fill(equip(model, "rpe-1.9-cross-ctx-0-k-3d", blocks=[1]))
    assert {name.split(".rpe_k.")[1] for name in tables_of(model)} == {
        f"{part}.lookup_table_weight" for part in ("rp_depth", "rp_rows", "rp_cols")
    }
    assert (forward(family, model) - before).abs().max() > 1e-6
    (part,) = hf_vit.ADAPTER.find(model)
    assert [one["attentions"] for one in part.config.irpe] == [[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading(family, tmp_path):
    model = make(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [FAMILIES[family][0]]
    assert saved["irpe"][0]["rpe_config"]["rpe_k"]["ndim"] == 3
    cls = getattr(transformers, FAMILIES[family][0])
    other, info = hf_vit.from_pretrained(cls, tmp_path, output_loading_info=True)
    assert type(other) is type(model) and not any(info.values())
    video = videos(family, torch.float32)
    assert torch.equal(forward(family, other, video), forward(family, model, video))
    with pytest.raises(Exception, match=r"load it with irpe\.load\(folder\)"):
        cls.from_pretrained(tmp_path)
    unequip(model).save_pretrained(tmp_path)
    assert torch.equal(forward(family, cls.from_pretrained(tmp_path), video), forward(family, model, video))


@pytest.mark.parametrize("family", BASES)
def test_half_precision(family):
    model = make(family, dtype=torch.bfloat16)
    assert all(one.dtype == torch.bfloat16 for one in tables_of(model).values())
    exact = make(family)
    exact.load_state_dict(model.state_dict())
    video = videos(family, torch.bfloat16)
    got, expected = forward(family, model, video), forward(family, exact, video.double())
    own = forward(family, unequip(copy.deepcopy(model)), video).double()
    own = (own - forward(family, unequip(exact), video.double())).abs().max()
    assert (got.double() - expected).abs().max() <= 4 * own + 4 * torch.finfo(torch.bfloat16).eps * got.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["videomae", "videomae pre-training", "vjepa2"])
def test_checkpointing(family, reentrant):
    model = make(family).train()
    video = videos(family).requires_grad_()
    expected = gradients(model, spread(forward(family, model, video)))
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert_same(gradients(model, spread(forward(family, model, video))), expected, 1e-11)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", BASES)
def test_compile_fullgraph(family):
    model = make(family, num_hidden_layers=1)
    kwargs = {} if family == "videomae" else dict(skip_predictor=True)
    expected = gradients(model, spread(forward(family, model, **kwargs)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = gradients(model, spread(forward(family, compiled, **kwargs)))
    assert_same({name: one for name, one in got.items() if name in expected}, expected, 1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", BASES)
def test_export(family, strict):
    model = make(family)
    arguments = {FAMILIES[family][2]: videos(family)} | ({} if family == "videomae" else dict(skip_predictor=True))
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, strict=strict)
        assert (features(program.module()(**arguments)) - features(model(**arguments))).abs().max() <= 1e-11


@pytest.mark.parametrize("family", ["videomae classification", "videomae pre-training", "vjepa2 classification"])
def test_training_moves_the_tables(family):
    model = equip(make(family, tables=False, dtype=torch.float32), QKV).train()
    for name, one in model.named_parameters():  # a size from which steps go down
        if "lookup_table" not in name and one.dim() > 1:
            one.data.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = {} if "pre-training" in family else dict(labels=torch.tensor([0, 1]))
    losses = []
    for _ in range(8):
        loss = run(family, model, videos(family, torch.float32), **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(one.abs().max() > 0 for one in tables_of(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused(family):
    model = make(family, tables=False)
    before = snapshot(model)
    for config, message in (
        ("rpe-1.9-product-ctx-1-k", r"ndim=2, but the maps of the model are videos.*ndim=3 in .*-3d"),
        ("rpe-1.9-product-ctx-1-k-1d", "ndim=1, but the maps of the model are videos"),
        (get_rpe_config(skip=1, ndim=3), "skip=1, but the model has 0 prefix tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            equip(model, config)
    with pytest.raises(ValueError, match="knows the size of its map; leave grid out"):
        equip(model, QKV, grid=FAMILIES[family][3])
    assert snapshot(model) == before


def test_models_of_images_refuse_videos():
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with torch.device("meta"):
        model = transformers.ViTModel(config)
    with pytest.raises(ValueError, match="ndim=3, but the maps of the model are images"):
        equip(model, QKV)


def test_layers_alone_do_not_know_their_map():
    model = make("videomae")
    with pytest.raises(RuntimeError, match="does not know the height and width of its map"):
        model.encoder(torch.randn(2, 36, 24, dtype=torch.float64))
