"""equip and unequip: what they take, what they refuse, and that a refusal changes nothing."""

import equipped
import pytest
import torch
from equipped import structure
from torch import nn

from irpe import RPEConfig, get_rpe_config, get_single_rpe_config
from irpe.equip import equip, rpe_parameters, unequip

timm = pytest.importorskip("timm")

from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)

SMALL = dict(img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
SUPPORTED = "Supported are timm's VisionTransformer"


def assert_refused(model, reason, config="rpe-1.9-product-ctx-1-k", error=ValueError):
    equipped.assert_refused(model, reason, config, error, SUPPORTED)


def test_a_string_says_the_same_as_a_configuration():
    models = []
    for config in ("rpe-2.5-cross-bias-0-qk", get_rpe_config(2.5, "cross", "bias", False, 0, "qk")):
        torch.manual_seed(0)
        models.append(equip(VisionTransformer(**SMALL), config))
    one, other = models
    assert [(name, value.shape) for name, value in one.state_dict().items()] == [
        (name, value.shape) for name, value in other.state_dict().items()
    ]
    assert repr(one) == repr(other)
    assert one.blocks[1].attn.rpe_v is None
    assert one.blocks[1].attn.rpe_q.rp_rows.lookup_table_bias.shape == (3, 2 * 5 + 2)


def test_encodings_that_differ():
    config = RPEConfig(
        rpe_q=get_single_rpe_config(20, "euc", "bias", False), rpe_v=get_single_rpe_config(2.0, "cross", skip=1)
    )
    attn = equip(VisionTransformer(**SMALL), config).blocks[0].attn
    assert attn.rpe_k is None
    assert attn.rpe_q.lookup_table_bias.shape == (3, 82)
    assert attn.rpe_v.rp_cols.lookup_table_weight.shape == (1, 10, 8)
    assert config.rpe_q.skip == 0  # the user's own object is left alone


@pytest.mark.parametrize(("extra", "prefix"), [({}, 1), (dict(reg_tokens=4), 5), (dict(class_token=False), 0)])
def test_skip_is_the_models(extra, prefix):
    extra = {**extra, "global_pool": "avg"}
    for skip in {0, prefix}:
        model = equip(VisionTransformer(**SMALL, **extra), get_rpe_config(skip=skip))
        assert model.blocks[1].attn.rpe_k.rpe_config.skip == prefix
        assert model(torch.randn(1, 3, 8, 12)).shape == (1, 5)
    model = VisionTransformer(**SMALL, **extra)
    assert_refused(
        model, rf"rpe_v has skip=7, but the model has {prefix} prefix tokens?;", get_rpe_config(skip=7, rpe_on="v")
    )


@pytest.mark.parametrize("config", [None, 3, RPEConfig(), get_single_rpe_config(), {"ratio": 1.9}])
def test_configurations_of_another_type(config):
    model = VisionTransformer(**SMALL)
    before = structure(model)
    with pytest.raises(TypeError, match="get_rpe_config returns"):
        equip(model, config)
    assert structure(model) == before


def test_configurations_with_another_form():
    model = VisionTransformer(**SMALL)
    before = structure(model)
    with pytest.raises(ValueError, match="expected rpe-RATIO-METHOD-MODE-SHARED-ON"):
        equip(model, "rpe-1.9-product-ctx-1")
    assert structure(model) == before


class Replaced(Attention):
    pass


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (dict(block_fn=ParallelScalingBlock), "blocks.0 is a ParallelScalingBlock"),
        (dict(block_fn=DiffParallelScalingBlock), "blocks.0 is a DiffParallelScalingBlock"),
        (dict(block_fn=ParallelThingsBlock), "blocks.0 is a ParallelThingsBlock"),
        (dict(attn_layer="diff"), "blocks.0.attn is a DiffAttention"),
        (dict(attn_layer=Replaced), "blocks.0.attn is a Replaced; expected timm.layers.attention.Attention"),
        (dict(patch_drop_rate=0.5), "patch dropout removes tokens.*patch_drop_rate=0"),
    ],
)
def test_refused_parts(extra, reason):
    kwargs = {**SMALL, "num_heads": 2} if extra.get("attn_layer") == "diff" else SMALL
    assert_refused(VisionTransformer(**kwargs, **extra), reason)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet18", {}), ("vit_relpos_small_patch16_224", dict(depth=1)), ("deepseek_vit_412m", dict(depth=1))],
)
def test_unknown_models(name, kwargs):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    assert_refused(model, "is not a model that iRPE can be added to", error=TypeError)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("naflexvit_base_patch16_gap", dict(depth=1), "NaFlexVit: images of one batch have maps of different sizes"),
        ("swinv2_tiny_window8_256", dict(depths=(1, 1, 1, 1)), "SwinTransformerV2: its scores are cosines"),
        ("swinv2_cr_tiny_ns_224", dict(depths=(1, 1, 1, 1)), "SwinTransformerV2Cr: its scores are cosines"),
    ],
)
def test_refused_models(name, kwargs, reason):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    assert_refused(model, reason)
    assert_refused(nn.Sequential(VisionTransformer(**SMALL), model), reason)


def test_refused_modules():
    assert_refused(nn.Sequential(nn.Linear(2, 3)), "Sequential is not a model", error=TypeError)
    with pytest.raises(TypeError, match=r"model is a str; expected a torch\.nn\.Module"):
        equip("deit_small_patch16_224", "rpe-1.9-product-ctx-1-k")


def test_refused_subclass():
    class Mine(VisionTransformer):
        pass

    assert_refused(Mine(**SMALL), "Mine: Mine changes the forward of VisionTransformer")


def test_refused_patch_embedding():
    class Embedding(nn.Module):
        num_patches, grid_size = 6, (2, 3)

        def __init__(self, **kwargs):
            super().__init__()

    assert_refused(
        VisionTransformer(**SMALL, embed_layer=Embedding), "patch embedding Embedding does not tell the size"
    )


@pytest.mark.parametrize("where", ["", "blocks.1", "blocks.1.attn"])
def test_refused_where_the_forward_is_the_objects_own(where):
    model = VisionTransformer(**SMALL)
    module = model.get_submodule(where)
    module.forward = type(module).forward.__get__(module)
    assert_refused(model, f"the forward of {where or 'the model'} has been replaced")


def test_refused_twice():
    model = equip(VisionTransformer(**SMALL), "rpe-1.9-product-ctx-1-k")
    assert_refused(model, "has iRPE already; call unequip first", "rpe-1.9-product-ctx-1-q")
    equip(unequip(model), "rpe-1.9-product-ctx-1-q")


def test_blocks_of_an_equipped_model_are_refused_elsewhere():
    model = equip(VisionTransformer(**SMALL), "rpe-1.9-product-ctx-1-k")
    other = VisionTransformer(**SMALL)
    other.blocks[1] = model.blocks[1]
    assert_refused(other, "blocks.1.attn is a RPEAttention")


def test_several_models_in_one_or_none_of_them():
    pair = nn.ModuleDict(dict(student=VisionTransformer(**SMALL), teacher=VisionTransformer(**SMALL, reg_tokens=2)))
    equip(pair, get_rpe_config())
    assert [one.blocks[0].attn.rpe_k.rpe_config.skip for one in pair.values()] == [1, 3]
    assert [type(one) for one in unequip(pair).values()] == [VisionTransformer] * 2
    assert_refused(pair, "rpe_k has skip=1, but the model has 3", get_rpe_config(skip=1))
    pair["teacher"].patch_drop = VisionTransformer(**SMALL, patch_drop_rate=0.5).patch_drop
    assert_refused(pair, "patch dropout")
    pair["teacher"] = nn.Identity()
    equip(pair, get_rpe_config(skip=1))


def test_unequip_what_was_never_equipped():
    model = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match="VisionTransformer has no iRPE"):
        unequip(model)
    unequip(equip(model, get_rpe_config()))
    with pytest.raises(ValueError, match="has no iRPE: it was never equipped, or unequipped before"):
        unequip(model)
    with pytest.raises(TypeError, match="is not a model"):
        unequip(nn.Linear(2, 3))


def test_without_timm(run_python):
    code = """
        from torch import nn
        from irpe.equip import equip
        try:
            equip(nn.Linear(2, 3), "rpe-1.9-product-ctx-1-k")
        except TypeError as error:
            assert "Linear is not a model" in str(error), error
        else:
            raise AssertionError
    """
    from conftest import ROOT

    run_python(code, path=[ROOT], forbid=["timm"])


def equipped_blocks(model):
    return [n for n, block in enumerate(model.blocks) if hasattr(block.attn, "rpe_k")]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (slice(0, 2), [0, 1]),
        (slice(None, None, 2), [0, 2]),
        ([1], [1]),
        ((0, -1), [0, 3]),
        (range(3), [0, 1, 2]),
        (lambda number, name: number > 1 and name == f"blocks.{number}.attn", [2, 3]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_some_blocks(blocks, expected):
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, "depth": 4}).eval()
    image = torch.randn(1, 3, 8, 12)
    before, snap = model(image), structure(model)
    assert equipped_blocks(equip(model, "rpe-1.9-product-ctx-1-k", blocks=blocks)) == expected
    torch.testing.assert_close(model(image), before)
    tables = rpe_parameters(model)["params"]
    assert len(tables) == len(expected)
    with torch.no_grad():
        tables[0].normal_()
    assert not torch.allclose(model(image), before)
    assert structure(unequip(model)) == snap


def test_different_configurations_for_different_blocks():
    model = VisionTransformer(**{**SMALL, "depth": 3})
    equip(model, "rpe-1.9-product-ctx-1-k", blocks=slice(0, 2))
    assert_refused(model, "has iRPE already; call unequip first, or name other blocks")
    equip(model, "rpe-20-cross-bias-0-q", blocks=slice(2, None))
    model(torch.randn(1, 3, 8, 12)).sum().backward()
    assert model.blocks[1].attn.rpe_k.lookup_table_weight.grad is not None
    assert model.blocks[2].attn.rpe_k is None
    assert model.blocks[2].attn.rpe_q.rp_rows.lookup_table_bias.shape == (3, 2 * 40 + 2)
    unequip(model)
    assert equipped_blocks(model) == []


@pytest.mark.parametrize(
    ("blocks", "error", "reason"),
    [
        ([7], ValueError, "blocks holds 7, but the model has 2 attentions"),
        (["blocks.0"], ValueError, "blocks holds 'blocks.0'"),
        ([], ValueError, "names none of the 2 attentions"),
        (slice(5, 9), ValueError, "names none of the 2 attentions"),
        (lambda *_: False, ValueError, "names none"),
        (3, TypeError, "blocks is 3; expected a slice, numbers, or a function"),
        ("01", TypeError, "expected a slice"),
    ],
)
def test_refused_blocks(blocks, error, reason):
    model = VisionTransformer(**SMALL)
    before = structure(model)
    with pytest.raises(error, match=reason):
        equip(model, "rpe-1.9-product-ctx-1-k", blocks=blocks)
    assert structure(model) == before


def test_refused_grids():
    model = VisionTransformer(**SMALL)
    for grid in ((0, 3), (), (2.0, 3), 0, 2.0, True):
        with pytest.raises(ValueError, match="expected .height, width. in tokens"):
            equip(model, "rpe-1.9-product-ctx-1-k", grid=grid)
    for grid in ((2, 3), (2, 3, 4)):
        with pytest.raises(ValueError, match="the model knows the size of its map; leave grid out"):
            equip(model, "rpe-1.9-product-ctx-1-k", grid=grid)


@pytest.mark.parametrize("ndim", [1, 3])
def test_models_of_images_refuse_other_axes(ndim):
    model = VisionTransformer(**SMALL)
    before = structure(model)
    with pytest.raises(ValueError, match=rf"rpe_k has ndim={ndim}, but the maps of the model are images.*ndim=2 in"):
        equip(model, f"rpe-1.9-product-ctx-1-k-{ndim}d")
    assert structure(model) == before


def test_tables_as_a_parameter_group():
    model = equip(VisionTransformer(**SMALL), "rpe-1.9-cross-ctx-0-qkv")
    group = rpe_parameters(model, lr=0.5, betas=(0.8, 0.9))
    assert len(group["params"]) == 2 * 3 * 2
    own = set(group["params"])
    rest = [p for p in model.parameters() if p not in own]
    assert {name for name, p in model.named_parameters() if p in own} == {
        name for name, _ in model.named_parameters() if "lookup_table" in name
    }
    optimizer = torch.optim.AdamW([group, {"params": rest}], lr=1e-3, weight_decay=0.1)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["weight_decay"]) == (1e-3, 0.1)
    assert rpe_parameters(model, weight_decay=0.3)["weight_decay"] == 0.3
    model.requires_grad_(False)
    for table in rpe_parameters(model)["params"]:
        table.requires_grad_()
    model(torch.randn(2, 3, 8, 12)).square().sum().backward()
    assert all((p.grad is not None) == (p in own) for p in model.parameters())
    with pytest.raises(ValueError, match="has no tables of iRPE"):
        rpe_parameters(unequip(model))
