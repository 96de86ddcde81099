"""Equipped BEiTs of timm: the matrix, their own and their shared relative position bias, other sizes."""

import pytest
import torch
from equipped import QKV, assert_refused, fill
from families import DYNAMIC, FAMILIES, SMALL, attention_by_hand, images, make
from family_matrix import Matrix
from timm.models.beit import Attention, Beit
from torch import nn

from irpe.equip import equip
from irpe.integrations.on_map import blocks_on_map


def bias_by_hand(table, height, width):
    """The bias of BEiT for each pair of tokens: offsets of the map, then class to patch, patch to class, class."""
    tokens = [(row, column) for row in range(height) for column in range(width)]
    bias = table.new_zeros(1 + len(tokens), 1 + len(tokens), table.shape[1])
    bias[0, :], bias[:, 0], bias[0, 0] = table[-3], table[-2], table[-1]
    for i, (row, column) in enumerate(tokens, 1):
        for j, (other_row, other_column) in enumerate(tokens, 1):
            offset = (row - other_row + height - 1) * (2 * width - 1) + column - other_column + width - 1
            bias[i, j] = table[offset]
    return bias.movedim(-1, 0)


def by_hand(model, image, height, width):
    x = torch.cat([model.cls_token.expand(len(image), -1, -1), model.patch_embed(image)], 1)
    if model.pos_embed is not None:
        x = x + model.pos_embed
    for block in model.blocks:
        attn, y = block.attn, block.norm1(x)
        product = y @ attn.qkv.weight.T
        if attn.q_bias is not None:
            product = product + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = product.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        added = 0
        if model.rel_pos_bias is not None:
            added = added + bias_by_hand(model.rel_pos_bias.relative_position_bias_table, height, width)
        if attn.relative_position_bias_table is not None:
            added = added + bias_by_hand(attn.relative_position_bias_table, height, width)
        y = attn.proj(attention_by_hand(attn, q, k, v, height, width, 1, added))
        x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
        y = block.mlp(block.norm2(x))
        x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
    return model.forward_head(model.norm(x))


class TestBeit(Matrix):
    adapter = "timm_beit"
    compiled = ("beit both biases", "beit dynamic")
    registered = ("beit_base_patch16_224", dict(img_size=(32, 48), embed_dim=24, depth=2, num_heads=3))
    by_hand = staticmethod(by_hand)


@pytest.mark.parametrize("family", ["beit", "beit shared bias", "beit both biases", "beit positions"])
def test_set_input_size(family):
    model = make(family)
    model.set_input_size((16, 8))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 4, 2)).abs().max() <= 1e-12
    model.set_input_size(patch_size=(2, 4))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 8, 2)).abs().max() <= 1e-12
    model.reset_classifier(7)
    assert model(images(16, 8)).shape == (2, 7)


def test_biases_get_their_gradients_and_checkpointing_keeps_them():
    model = make("beit both biases").train()

    def of_biases():
        model.zero_grad()
        model(images(8, 12)).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if "bias_table" in n}

    expected = of_biases()
    assert len(expected) == 3
    assert all(one.abs().max() > 1e-9 for one in expected.values())
    model.set_grad_checkpointing()
    got = of_biases()
    assert all((got[name] - expected[name]).abs().max() <= 1e-12 for name in expected)


def test_separate_biases_of_the_projections():
    model = FAMILIES["beit"].build()
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    before = model(images(8, 12))
    equip(model, QKV)
    assert (model(images(8, 12)) - before).abs().max() <= 1e-12
    fill(model)
    assert (model(images(8, 12)) - by_hand(model, images(8, 12), 2, 3)).abs().max() <= 1e-12
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images(8, 12, dtype=torch.float32)).isfinite().all()


def test_blocks_by_hand_need_the_map_and_can_have_it():
    model = make("beit dynamic")
    for size, (height, width) in DYNAMIC:
        image = images(*size)
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(image)], 1)
        with pytest.raises(RuntimeError, match="blocks_on_map"):
            model.blocks[0](tokens)
        assert torch.equal(model.norm(blocks_on_map(model, height, width)(tokens)), model.forward_features(image))
    shared = make("beit shared bias")
    x = torch.cat([shared.cls_token.expand(2, -1, -1), shared.patch_embed(images(8, 12))], 1)
    for block in blocks_on_map(shared, 2, 3):
        x = block(x, shared.rel_pos_bias())
    assert torch.equal(shared.norm(x), shared.forward_features(images(8, 12)))


class MyBeit(Beit):
    pass


class MyAttention(Attention):
    pass


def test_refused():
    assert_refused(MyBeit(**SMALL), "MyBeit changes the forward of Beit")
    model = Beit(**SMALL)
    model.blocks[1].attn = MyAttention(24, 3)
    assert_refused(model, "blocks.1.attn is a MyAttention; expected timm.models.beit.Attention")
    model.blocks[1] = nn.Identity()
    assert_refused(model, "blocks.1 is a Identity; expected timm.models.beit.Block")
    for where in ("", "blocks.1", "blocks.1.attn"):
        model = Beit(**SMALL)
        module = model.get_submodule(where)
        module.forward = type(module).forward.__get__(module)
        assert_refused(model, f"the forward of {where or 'the model'} has been replaced")
