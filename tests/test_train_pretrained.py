"""irpe/train/pretrained.py: weights of every family and form either fit or end in one sentence."""

import pytest
import timm
import torch

from irpe.runs.tensors import write_weights
from irpe.train import model as models
from irpe.train.settings import settings_from

SMALL = {
    "vit_tiny_patch16_224": ("depth=2", "embed_dim=24", "num_heads=3", "patch_size=8"),
    "deit_tiny_distilled_patch16_224": ("depth=2", "embed_dim=24", "num_heads=3", "patch_size=8"),
    "beit_base_patch16_224": ("depth=2", "embed_dim=24", "num_heads=3", "patch_size=8"),
    "eva02_tiny_patch14_224": ("depth=2", "embed_dim=24", "num_heads=3", "patch_size=8"),
    "swin_tiny_patch4_window7_224": ("depths=(1,1)", "embed_dim=12", "num_heads=(1,2)", "window_size=4x6"),
}


def settings(name, **more):
    size = "32x48"
    return settings_from("small", {"data": "x", "model": name, "img_size": size, "model_arg": SMALL[name], **more})


def weights(name):
    return models.build(settings(name), 3).state_dict()


def states():
    """State dicts that a user may take for those of a model, by what they are."""
    for name in SMALL:
        yield name, weights(name)
    vit = weights("vit_tiny_patch16_224")
    yield "flat positions", vit | {"pos_embed": vit["pos_embed"][0]}
    yield "positions of one number", vit | {"pos_embed": vit["pos_embed"].sum()}
    yield "no patches", {name: one for name, one in vit.items() if "patch_embed" not in name}
    yield "flat patches", vit | {"patch_embed.proj.weight": vit["patch_embed.proj.weight"].flatten()}
    yield "clip", {f"visual.{name}": one for name, one in vit.items()} | {"visual.class_embedding": torch.zeros(24)}
    yield "open_clip", {f"visual.trunk.{name}": one for name, one in vit.items() if "embed" not in name}
    yield "dinov2", vit | {"mask_token": torch.zeros(1, 24)}
    yield "beit3", {f"beit3.{name}": one for name, one in vit.items()}
    yield "hugging face", {f"vit.encoder.layer.0.{name}": one for name, one in vit.items()}
    yield "a number", {"a": torch.zeros(3)}
    yield "no tensors", vit | {"norm.weight": 3.0, "head.bias": None, "pos_embed": "x"}
    yield "an encoder inside", {"encoder": vit}


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_another_family_or_form_are_a_sentence(name, tmp_path):
    for what, state in states():
        torch.save(state, tmp_path / "some.pth")
        model = models.build(settings(name), 3)
        before = {key: one.clone() for key, one in model.state_dict().items()}
        try:
            models.load_weights(model, tmp_path / "some.pth", lambda words: None)
        except ValueError as error:
            told = str(error)
            assert "some.pth" in told and what != name, (what, told)
            assert "does not fit the model: " in told or "positions for" in told or "no state dict" in told, (
                what,
                told,
            )
            assert len(told) < 700 and "old_window_size" not in told and "\n" not in told
            after = model.state_dict()
            assert all(torch.equal(one, after[key]) for key, one in before.items())
        else:
            assert (
                what == name or "embed" in what or what in ("flat patches", "dinov2", "beit3", "an encoder inside")
            ), (name, what)


def test_a_bias_that_all_blocks_of_beit_shared_becomes_one_of_each(tmp_path):
    own = weights("beit_base_patch16_224")
    tables = [name for name in own if name.endswith("relative_position_bias_table")]
    assert len(tables) == 2
    shared = torch.randn_like(own[tables[0]])
    state = {name: one for name, one in own.items() if name not in tables}
    state |= {
        "rel_pos_bias.relative_position_bias_table": shared,
        "rel_pos_bias.relative_position_index": torch.zeros(3),
    }
    torch.save({"model": state}, tmp_path / "beit.pth")
    model, said = models.build(settings("beit_base_patch16_224"), 3), []
    models.load_weights(model, tmp_path / "beit.pth", said.append)
    assert all(torch.equal(model.state_dict()[name], shared) for name in tables)
    assert said == ["beit.pth has one table of relative positions for all blocks; each block got a copy of it"]


def test_tables_of_windows_that_are_not_square(tmp_path):
    """Of a run they are those of the model, also where their number is a square; others are refused in plain words."""
    name = "swin_tiny_patch4_window7_224"
    for window, size in (("4x6", "32x48"), ("1x5", "8x40")):  # of 1 x 5: 9 offsets, which timm takes for 3 x 3
        more = {"model_arg": (*SMALL[name][:-1], f"window_size={window}"), "img_size": size}
        source = models.build(settings(name, **more), 3)
        for one in source.parameters():
            torch.nn.init.normal_(one)
        write_weights(tmp_path / "model.safetensors", source.state_dict(), {})
        again = models.build(settings(name, **more), 3)
        models.load_weights(again, tmp_path / "model.safetensors", lambda words: None, same_size=True)
        for key, one in source.state_dict().items():
            assert torch.equal(one, again.state_dict()[key]), key
    write_weights(tmp_path / "model.safetensors", weights(name), {})
    other = models.build(settings(name, model_arg=(*SMALL[name][:-1], "window_size=8x4"), img_size="64x32"), 3)
    with pytest.raises(
        ValueError, match="does not fit the model: its tables of relative positions are of a window that is"
    ):
        models.load_weights(other, tmp_path / "model.safetensors", lambda words: None)


def test_models_of_the_release_refuse_weights_of_other_families_too(tmp_path):
    import irpe.models  # noqa: F401

    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    for what, state in states():
        torch.save(state, tmp_path / "some.pth")
        with pytest.raises((ValueError, RuntimeError), match=r"checkpoint|state_dict|tables") as caught:
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "some.pth")))
        assert "weights_only" not in str(caught.value), what
