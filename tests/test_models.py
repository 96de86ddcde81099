"""The released DeiTs as models of timm: names, shapes, counts, checkpoints, other sizes, and files that are refused."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import GOLDEN, load_golden, relative_error

timm = pytest.importorskip("timm")

from timm.models import resolve_pretrained_cfg  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import irpe  # noqa: E402
from irpe.models import BASES, VARIANTS, count_macs  # noqa: E402

RELEASED = json.loads((GOLDEN / "published_models.json").read_text())
PRODUCT_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"
PRODUCT_QKV = "deit_small_patch16_224_ctx_product_50_shared_qkv"
CROSS_K = "deit_small_patch16_224_ctx_cross_56_shared_k"
TINY = dict(embed_dim=32, num_heads=2, depth=2)


def on_meta(name):
    return timm.create_model(name, device="meta")


def fill(model):
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lookup_table" in name:
                one.normal_()
    return model.eval()


def save(model, file):
    torch.save({"model": model.state_dict()}, file)
    return str(file)


# the table, against what was published


def test_every_released_model_is_a_variant():
    assert list(VARIANTS) == list(RELEASED)
    assert set(timm.list_models("*_ctx_*")) >= set(RELEASED)
    with_weights = {name for name, one in RELEASED.items() if "published" in one}
    assert set(timm.list_pretrained("deit_*_ctx_*")) == with_weights and len(with_weights) == 6
    for name, one in RELEASED.items():
        figures = {**one["published"], "url": one["url"]} if "published" in one else None
        ours = VARIANTS[name].published
        assert (ours and ours._asdict()) == figures
        assert resolve_pretrained_cfg(name).url == (one.get("url") or "")


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_and_parameters_are_the_released_ones(name):
    model = on_meta(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = RELEASED[name]["state_dict"]
    # block 0 stands for all blocks
    expected = {
        key.replace("blocks.0.", f"blocks.{block}."): shape
        for key, shape in expected.items()
        for block in (range(12) if key.startswith("blocks.0.") else range(1))
    } | expected
    assert shapes == expected
    assert sum(one.numel() for one in model.parameters()) == RELEASED[name]["params"]


@pytest.mark.parametrize("name", [name for name, one in RELEASED.items() if "published" in one])
def test_macs_are_the_published_ones(name):
    """To 1%; on values the release spent L*L*D where bucket sums spend L*N*D."""
    variant, tokens, head_dim, buckets = VARIANTS[name], 197, 64, 50
    heads = BASES[variant.base]["num_heads"]
    on_values = 12 * heads * tokens * head_dim * (tokens - buckets) if variant.config.endswith("v") else 0
    ours, published = count_macs(on_meta(name)), RELEASED[name]["published"]["macs_M"] * 1e6
    assert abs(ours + on_values - published) < 0.01 * published
    if on_values:
        assert (published - ours) / published == pytest.approx({6: 0.031, 12: 0.017}[heads], abs=1e-3)
        # the encodings themselves are as many products as the formula says
        plain = count_macs(timm.create_model(variant.base, device="meta"))
        assert ours - plain == 3 * 12 * heads * tokens * head_dim * buckets


def test_figures_in_the_docstring():
    for on, macs in (("k", 4644.271104), ("qkv", 4735.048704)):
        assert count_macs(on_meta(f"deit_small_patch16_224_ctx_product_50_shared_{on}")) == round(macs * 1e6)


def test_macs_see_through_fused_operators_and_leave_the_model_alone():
    model = fill(timm.create_model(PRODUCT_QKV, img_size=(32, 48), **TINY)).train()
    image = torch.randn(1, 3, 32, 48)
    before = model.eval()(image)
    model.train()
    macs = count_macs(model, (3, 32, 48))
    assert model.training and torch.equal(model.eval()(image), before)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() // 2 <= macs  # fused operators are not seen where the model computes
    tokens, dim, head_dim = 1 + 2 * 3, 32, 16
    attention = 2 * (2 * tokens * tokens * head_dim + 3 * tokens * head_dim * 50)
    block = tokens * (4 * dim * dim + 2 * dim * 4 * dim) + attention
    assert macs == 6 * (3 * 16 * 16) * dim + 2 * block + dim * 1000


# checkpoints


@pytest.mark.parametrize(("golden", "name"), [("product_k", PRODUCT_K), ("product_qkv", PRODUCT_QKV)])
def test_small_models_of_the_release_load_from_a_file(golden, name, tmp_path):
    """A state dict that the release wrote, through timm's loader, gives the release's logits."""
    arrays, meta = load_golden(f"deit_{golden}")
    assert irpe.rpe_config_to_string(irpe.get_rpe_config(**meta.pop("rpe"))) == VARIANTS[name].config
    assert meta.pop("layer_norm_eps") == 1e-6  # timm's own
    state = {key.removeprefix("state/"): torch.tensor(a) for key, a in arrays.items() if key.startswith("state/")}
    torch.save({"model": state}, tmp_path / "small.pth")
    overlay = dict(file=str(tmp_path / "small.pth"), num_classes=meta["num_classes"])
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **meta).double().eval()
    with torch.no_grad():
        logits = model(torch.tensor(arrays["input"], dtype=torch.float64))
    assert relative_error(logits, arrays["logits"]) < 1e-9


@pytest.mark.parametrize("source", ["pth", "safetensors", "address", "plain state dict"])
@pytest.mark.parametrize("name", [PRODUCT_QKV, CROSS_K])
def test_round_trip(name, source, tmp_path):
    saved = fill(timm.create_model(name, img_size=(32, 48), **TINY))
    file = tmp_path / ("model.safetensors" if source == "safetensors" else "model.pth")
    if source == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(saved.state_dict(), file)
    else:
        torch.save(saved.state_dict() if source == "plain state dict" else {"model": saved.state_dict()}, file)
    overlay = dict(url=file.as_uri()) if source == "address" else dict(file=str(file))
    loaded = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(32, 48), cache_dir=tmp_path / "cache", **TINY
    )
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(one, loaded.state_dict()[key]) for key, one in saved.state_dict().items())
    saved.load_state_dict(loaded.state_dict(), strict=True)


def test_published_address_is_where_weights_come_from(monkeypatch, tmp_path):
    """The address of the table is what is downloaded (here from a file, without a network)."""
    saved = fill(timm.create_model(PRODUCT_K, img_size=(32, 48), **TINY))
    asked = []

    def download(url, *args, **kwargs):
        asked.append(url)
        return save(saved, tmp_path / "model.pth")

    monkeypatch.setattr("irpe.models.download_cached_file", download)
    loaded = timm.create_model(PRODUCT_K, pretrained=True, img_size=(32, 48), **TINY)
    assert asked == [RELEASED[PRODUCT_K]["url"]]
    assert all(torch.equal(one, loaded.state_dict()[key]) for key, one in saved.state_dict().items())


def test_without_released_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(CROSS_K, pretrained=True, img_size=(32, 48), **TINY)


def test_a_new_head_keeps_every_table(tmp_path):
    saved = fill(timm.create_model(PRODUCT_QKV, img_size=(32, 48), **TINY))
    overlay = dict(file=save(saved, tmp_path / "model.pth"))
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=(32, 48), **TINY)
    loaded = timm.create_model(PRODUCT_QKV, num_classes=10, **options).state_dict()
    assert loaded["head.weight"].shape == (10, 32)
    kept = {key for key, one in saved.state_dict().items() if torch.equal(one, loaded[key]) or "head" in key}
    assert kept == set(saved.state_dict())
    features = timm.create_model(PRODUCT_QKV, features_only=True, out_indices=(1,), **options).eval()
    with torch.no_grad():
        (map_of_tokens,) = features(torch.randn(1, 3, 32, 48))
    assert map_of_tokens.shape == (1, 32, 2, 3)


@pytest.mark.parametrize("num_classes", [1000, 10])
@pytest.mark.parametrize("of", ["deit_small_patch16_224", CROSS_K, PRODUCT_QKV])
def test_tables_of_other_variants_are_refused(of, num_classes, tmp_path):
    """Also with a new head, where timm loads what fits."""
    file = save(timm.create_model(of, img_size=(32, 48), **TINY), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"tables of iRPE.*create the variant"):
        timm.create_model(
            PRODUCT_K, pretrained=True, pretrained_cfg_overlay=dict(file=file), img_size=(32, 48),
            num_classes=num_classes, **TINY,
        )  # fmt: skip


class Harm:
    """Unpickled as code that leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("source", ["file", "url"])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_code_in_a_checkpoint_is_refused(kind, source, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "bad.pth"
    torch.save({"model": {}, "args": Harm(mark)}, file, _use_new_zipfile_serialization=kind == "zip")
    overlay = dict(file=str(file)) if source == "file" else dict(url=file.as_uri())
    with pytest.raises(RuntimeError, match="weights_only=True"):
        timm.create_model(PRODUCT_K, True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache", **TINY)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # so it would have done harm


@pytest.mark.parametrize("source", ["file", "url"])
def test_a_checkpoint_that_fails_in_another_way_is_not_read_again_without_care(source, tmp_path):
    """A TypeError while it is read with weights_only=True: timm's own loader of addresses then reads all of it."""
    mark, file = tmp_path / "ran", tmp_path / "archive.pth"
    before = pickle.dumps({"first": OrderedDict(), "second": Harm(mark)}, protocol=2)
    built = b"ccollections\nOrderedDict\nq\x02)Rq\x03"
    assert built in before
    # an OrderedDict with a state that pickle takes as (nothing, no slots) and torch's careful reader stumbles on
    data = before.replace(built, built + b"N}\x86b")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    with pytest.raises(TypeError):
        torch.load(file, weights_only=True)
    overlay = dict(file=str(file)) if source == "file" else dict(url=file.as_uri())
    with pytest.raises(RuntimeError, match="weights_only=True"):
        timm.create_model(PRODUCT_K, True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache", **TINY)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_foreign_formats_are_refused(tmp_path):
    overlay = dict(file=str(tmp_path / "jax.npz"), custom_load=True)
    with pytest.raises(ValueError, match="custom_load"):
        timm.create_model(PRODUCT_K, pretrained=True, pretrained_cfg_overlay=overlay, **TINY)


# other sizes


@pytest.mark.parametrize("size", [384, (224, 320)])
@pytest.mark.parametrize("name", [PRODUCT_QKV, CROSS_K])
def test_saved_at_224_runs_at_other_sizes(name, size, tmp_path):
    """Absolute positions are resampled, tables stay, and an offset has the encoding that it had at 224."""
    saved = fill(timm.create_model(name, **TINY))
    assert saved.patch_embed.grid_size == (14, 14)
    overlay = dict(file=save(saved, tmp_path / "model.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, **TINY).eval()
    height, width = model.patch_embed.grid_size
    assert (height, width) == ((24, 24) if size == 384 else (14, 20))
    assert model.pos_embed.shape == (1, 1 + height * width, 32)
    assert torch.equal(model.pos_embed[:, 0], saved.pos_embed[:, 0])  # the class token's own
    with torch.no_grad():
        assert model(torch.randn(1, 3, 16 * height, 16 * width)).isfinite().all()
    resized = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **TINY).eval()
    resized.set_input_size((16 * height, 16 * width))
    image = torch.randn(1, 3, 16 * height, 16 * width)
    with torch.no_grad():
        assert torch.allclose(resized(image), model(image), atol=1e-5)
    for old, new in zip(saved.blocks, model.blocks, strict=True):
        for one, other in ((old.attn.rpe_q, new.attn.rpe_q), (old.attn.rpe_k, new.attn.rpe_k)):
            if one is not None:
                assert torch.equal(by_offset(one, 14, 14), by_offset(other, height, width))


def by_offset(rpe, height, width):
    """Encoding of one and the same query at every offset up to 13, both ways, and with the class token."""
    x = torch.linspace(-1, 1, 16).expand(1, 2, 1 + height * width, 16)
    with torch.no_grad():
        y = rpe(x, height=height, width=width)[0, 0]
    on_map = y[1:, 1:].view(height, width, height, width)
    ahead, behind = on_map[0, 0, :14, :14], on_map[13, 13, :14, :14]  # offsets (-r, -c) and (13 - r, 13 - c)
    left, right = on_map[0, 13, :14, :14], on_map[13, 0, :14, :14]
    assert (y[0] == y[0, 0]).all() and (y[:, 0] == y[0, 0]).all()
    return torch.stack([ahead, behind, left, right, y[0, 0].expand(14, 14)])
