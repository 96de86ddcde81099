"""Equipped Swin transformers of timm: the matrix, shifted windows that are no squares, windows that change."""

from typing import ClassVar

import torch
from equipped import QKV, assert_refused
from families import SWIN, attention_by_hand, images, make
from family_matrix import Matrix
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import nn

from irpe.equip import equip, unequip


def window_bias(block, height, width):
    """What is added to the scores of the whole map (H, L, L): -inf between windows, -100 over the seam of a shift."""
    attn, (wh, ww), (sh, sw) = block.attn, block.window_size, block.shift_size
    tokens = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    row, column = (tokens[:, None, axis] - tokens[None, :, axis] for axis in (0, 1))
    near = (row.abs() < wh) & (column.abs() < ww)
    ids = ((row + wh - 1) * (2 * ww - 1) + column + ww - 1).where(near, 0)
    windows = tokens[:, 0] // wh * width + tokens[:, 1] // ww
    wrapped = (tokens[:, 0] >= height - sh) * 2 + (tokens[:, 1] >= width - sw) * 1
    bias = attn.relative_position_bias_table[ids].movedim(-1, 0)
    bias = bias - 100.0 * (wrapped[:, None] != wrapped[None, :])
    return bias.masked_fill(windows[:, None] != windows[None, :], -torch.inf)


def by_hand(model, image, height=None, width=None):
    x = model.patch_embed(image)
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            attn, y = block.attn, block.norm1(x)
            height, width = y.shape[1:3]
            y = y.roll([-one for one in block.shift_size], (1, 2))
            y = nn.functional.pad(y, (0, 0, 0, -width % block.window_size[1], 0, -height % block.window_size[0]))
            padded = y.shape[1:3]
            q, k, v = attn.qkv(y.flatten(1, 2)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = attn.proj(attention_by_hand(attn, q, k, v, *padded, 0, window_bias(block, *padded)))
            y = y.unflatten(1, padded)[:, :height, :width].roll(block.shift_size, (1, 2))
            x = x + y
            x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


class TestSwin(Matrix):
    adapter = "timm_swin"
    compiled = ("swin", "swin dynamic")
    smaller: ClassVar = dict(depths=(2,), num_heads=(2,))
    registered = (
        "swin_tiny_patch4_window7_224",
        dict(img_size=(32, 48), embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=(4, 3)),
    )
    by_hand = staticmethod(by_hand)

    @staticmethod
    def plain_key(key):
        return key.replace("layers_", "layers.")


def test_the_matrix_has_shifted_windows():
    shifts = [block.shift_size for stage in make("swin").layers for block in stage.blocks]
    assert shifts == [(0, 0), (2, 1), (0, 0), (0, 1)]


def test_windows_that_change():
    model = make("swin")
    model.set_input_size((16, 24), window_size=(2, 6))
    assert {block.attn.window_size for block in model.layers[0].blocks} == {(2, 6)}
    assert (model(images(16, 24)) - by_hand(model, images(16, 24))).abs().max() <= 1e-12
    model.set_input_size((24, 16))  # the windows grow with the map
    assert (model(images(24, 16)) - by_hand(model, images(24, 16))).abs().max() <= 1e-12
    model.set_input_size((24, 40), window_size=((3, 5), (2, 5)))
    assert (model(images(24, 40)) - by_hand(model, images(24, 40))).abs().max() <= 1e-12
    block = model.layers[0].blocks[0]
    block.set_input_size((12, 20), (6, 4))
    assert (model(images(24, 40)) - by_hand(model, images(24, 40))).abs().max() <= 1e-12
    model(images(24, 40)).square().sum().backward()
    assert all(one.attn.rpe_k.lookup_table_weight.grad.abs().max() > 0 for one in model.layers[0].blocks)
    model.reset_classifier(7)
    assert model(images(24, 40)).shape == (2, 7)


def test_the_bias_of_the_model_gets_its_gradient():
    model = make("swin").train()
    model(images(16, 24)).square().sum().backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters() if "bias_table" in name}
    assert len(expected) == 4
    model.zero_grad()
    by_hand(model, images(16, 24)).square().sum().backward()
    for name, one in expected.items():
        assert one.abs().max() > 1e-9
        assert (model.get_parameter(name).grad - one).abs().max() <= 1e-12


def test_blocks_run_by_hand():
    model = make("swin")
    x = model.patch_embed(images(16, 24))
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            x = block(x)
    assert torch.equal(model.norm(x), model.forward_features(images(16, 24)))


def test_a_stage_alone():
    stage = make("swin").layers[1]
    assert len([name for name, _ in stage.named_parameters() if "lookup_table" in name]) == 2 * 3
    assert not [name for name, _ in unequip(stage).named_parameters() if "lookup_table" in name]
    equip(stage, QKV)


class MyStage(SwinTransformerStage):
    pass


class MyAttention(WindowAttention):
    pass


def test_refused():
    model = SwinTransformer(**SWIN)
    model.layers[1].blocks[1].attn = MyAttention(24, 3)
    assert_refused(
        model, "SwinTransformerStage: blocks.1.attn is a MyAttention; expected .*swin_transformer.WindowAttention"
    )
    model.layers[1].blocks[1] = nn.Identity()
    assert_refused(model, "blocks.1 is a Identity; expected timm.models.swin_transformer.SwinTransformerBlock")
    model = SwinTransformer(**SWIN)
    model.layers[1].__class__ = MyStage
    assert_refused(model, "MyStage changes the forward of SwinTransformerStage")
    for where in ("layers.0", "layers.1.blocks.1", "layers.0.blocks.1.attn"):
        model = SwinTransformer(**SWIN)
        module = model.get_submodule(where)
        module.forward = type(module).forward.__get__(module)
        assert_refused(model, "the forward of .* has been replaced")
    assert isinstance(SwinTransformer(**SWIN).layers[0].blocks[0], SwinTransformerBlock)
