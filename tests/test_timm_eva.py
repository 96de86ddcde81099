"""Equipped models of timm's EVA family: the matrix, rotary positions, masks, options of the attentions."""

import pytest
import torch
from equipped import QKV, assert_refused, fill, spread
from families import DYNAMIC, FAMILIES, SMALL, attention_by_hand, images, make
from family_matrix import Matrix
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from torch import nn

from irpe.equip import equip, unequip
from irpe.integrations.on_map import blocks_on_map


def attention(attn, x, rope, height, width, mask=None):
    """timm's formula with the terms of the paper, written out again."""
    skip = x.shape[1] - height * width
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        product = x @ attn.qkv.weight.T
        if attn.qkv.bias is not None:
            product = product + attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            product = product + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = product.chunk(3, -1)
    q, k, v = (one.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for one in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (
            torch.cat([one[:, :, :skip], apply_rot_embed_cat(one[:, :, skip:], rope, half=attn.rotate_half)], 2)
            for one in (q, k)
        )
    heads = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1]
    out = attn.norm(attention_by_hand(attn, q, k[:, heads], v[:, heads], height, width, skip, mask))
    return attn.proj(out if attn.gate is None else out * attn.gate(x).sigmoid())


def by_hand(model, image, height, width, mask=None):
    x, rope = model._pos_embed(model.patch_embed(image))
    x = model.norm_pre(x)
    for number, block in enumerate(model.blocks):
        own = rope[number] if model.rope_mixed else rope
        if isinstance(block, EvaBlockPostNorm):
            x = x + block.norm1(attention(block.attn, x, own, height, width, mask))
            x = x + block.norm2(block.mlp(x))
        else:
            added = attention(block.attn, block.norm1(x), own, height, width, mask)
            x = x + (added if block.gamma_1 is None else block.gamma_1 * added)
            added = block.mlp(block.norm2(x))
            x = x + (added if block.gamma_2 is None else block.gamma_2 * added)
    return model.forward_head(model.norm(x))


class TestEva(Matrix):
    adapter = "timm_eva"
    compiled = ("eva02 dynamic", "dinov3", "rope mixed", "grouped queries")
    registered = ("eva02_tiny_patch14_224", dict(img_size=(28, 42), embed_dim=24, depth=2, num_heads=3))
    by_hand = staticmethod(by_hand)


@pytest.mark.parametrize("family", ["eva02 dynamic", "rope mixed"])
@pytest.mark.parametrize("kind", ["float", "bool", "causal", "causal beside a mask"])
def test_masks(family, kind):
    model = make(family)
    image, tokens = images(8, 32), 1 + 2 * 8
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    keep = (torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)) < 0.7) | torch.eye(tokens).bool()
    added = torch.randn(tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forbidden = torch.zeros_like(added).masked_fill(~causal, -torch.inf)
    arguments, mask = {
        "float": (dict(attn_mask=added), added),
        "bool": (dict(attn_mask=keep), torch.zeros_like(added).masked_fill(~keep, -torch.inf)),
        "causal": (dict(is_causal=True), forbidden),
        "causal beside a mask": (dict(is_causal=True, attn_mask=added), forbidden),
    }[kind]
    expected = by_hand(model, image, 2, 8, mask)
    assert (model(image, **arguments) - expected).abs().max() <= 1e-12
    features, _ = model.forward_intermediates(image, **arguments)
    assert (model.forward_head(features) - expected).abs().max() <= 1e-12
    assert (model(image) - expected).abs().max() > 1e-6


OPTIONS = dict(norm_layer=nn.LayerNorm, gated=True, qk_norm=True, scale_norm=True, rotate_half=True)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (EvaAttention, dict(qkv_bias_separate=True)),
        (EvaAttention, dict(OPTIONS)),
        (EvaAttention, dict(OPTIONS, qkv_fused=False)),
        (AttentionRope, dict(OPTIONS, attn_head_dim=4, proj_bias=False)),
        (AttentionRope, dict(OPTIONS, qkv_fused=False, num_kv_heads=1, qkv_bias=False)),
    ],
)
def test_options_of_the_attentions(cls, options):
    """Those that no argument of the model leads to."""
    model = FAMILIES["eva02 dynamic"].build(rope_rotate_half="rotate_half" in options)
    model.blocks[1].attn = cls(24, 3, **{"scale_norm": False, **options}).double()
    if options.get("attn_head_dim"):
        with torch.no_grad():
            model.rope = None
    for one in model.blocks[1].attn.parameters():
        nn.init.normal_(one, std=0.3)
    model.eval()
    image = images(8, 32)
    before = model(image)
    equip(model, QKV)
    assert (model(image) - before).abs().max() <= 1e-12
    fill(model)
    assert (model(image) - by_hand(model, image, 2, 8)).abs().max() <= 1e-12
    unequip(model)
    assert (model(image) - before).abs().max() <= 1e-12


def test_separate_biases_under_autocast():
    model = make("eva02 dynamic", dtype=torch.float32, qkv_fused=True)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    image = images(8, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(image) - model.float()(image)).abs().max() < 0.1


@pytest.mark.parametrize("family", ["eva02", "rope mixed fixed", "perception encoder"])
def test_set_input_size_and_reset_classifier(family):
    model = make(family)
    model.set_input_size((16, 8))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 4, 2)).abs().max() <= 1e-12
    model.set_input_size(patch_size=(2, 4))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 8, 2)).abs().max() <= 1e-12
    model.reset_classifier(7)
    assert model(images(16, 8)).shape == (2, 7)


@pytest.mark.parametrize("family", ["eva02 dynamic", "rope mixed", "dinov3"])
def test_blocks_by_hand_need_the_map_and_can_have_it(family):
    model = make(family)
    for size, (height, width) in DYNAMIC:
        image = images(*size)
        x, rope = model._pos_embed(model.patch_embed(image))
        with pytest.raises(RuntimeError, match="blocks_on_map"):
            model.blocks[0](x, rope=rope[0] if model.rope_mixed else rope)
        for number, block in enumerate(blocks_on_map(model, height, width)):
            x = block(x, rope[number] if model.rope_mixed else rope)
        assert torch.equal(model.norm(x), model.forward_features(image))


def test_random_rope_of_training_is_seen_by_the_encodings():
    model = make("dinov3", rope_rescale_coords=2.0).train()
    torch.manual_seed(5)
    got = model(images(8, 32))
    torch.manual_seed(5)
    assert (by_hand(model, images(8, 32), 2, 8) - got).abs().max() <= 1e-12
    torch.manual_seed(5)
    loss = spread(model.forward_features(images(8, 32)))
    model.zero_grad()
    loss.backward()
    expected = model.blocks[0].attn.rpe_k.lookup_table_weight.grad.clone()
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    model.zero_grad()
    spread(model.forward_features(images(8, 32))).backward()
    assert (model.blocks[0].attn.rpe_k.lookup_table_weight.grad - expected).abs().max() <= 1e-12


class MyEva(Eva):
    pass


class MyAttention(EvaAttention):
    pass


def test_refused():
    assert_refused(Eva(**SMALL, patch_drop_rate=0.5), "patch dropout removes tokens.*patch_drop_rate=0")
    assert_refused(MyEva(**SMALL), "MyEva changes the forward of Eva")
    model = Eva(**SMALL)
    model.blocks[1].attn = MyAttention(24, 3, scale_norm=False)
    assert_refused(
        model, "blocks.1.attn is a MyAttention; expected timm.models.eva.EvaAttention or timm.layers.attention.Att"
    )
    model.blocks[1] = nn.Identity()
    assert_refused(model, "blocks.1 is a Identity; expected timm.models.eva.EvaBlock or ")
    for where in ("", "blocks.1", "blocks.1.attn"):
        model = Eva(**SMALL)
        module = model.get_submodule(where)
        module.forward = type(module).forward.__get__(module)
        assert_refused(model, f"the forward of {where or 'the model'} has been replaced")
    with pytest.raises(ValueError, match="the model knows the size of its map; leave grid out"):
        equip(Eva(**SMALL), QKV, grid=(2, 3))
