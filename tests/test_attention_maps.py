"""irpe/attention_maps.py: beside attention written out in loops, what is chosen, and whom it refuses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from timm.models import Beit, Eva, SwinTransformer, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from irpe import equip, get_bucket_ids_2d
from irpe.attention_calls import Windows
from irpe.attention_maps import attention_maps

PIXELS = (8, 12)  # 4 x 6 tokens
SIZE = dict(img_size=PIXELS, patch_size=2, embed_dim=24, num_heads=3, num_classes=2, in_chans=1)
SIDES = [
    "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-0-qkv", "rpe-20-cross-ctx-0-qv", "rpe-20-euc-bias-0-qk",
    "rpe-33-quant-ctx-1-v", "rpe-20-cross-bias-1-k",
]  # fmt: skip


def filled(model, std=1.0):
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=std)
        elif "rel_pos" in name or "relative_position" in name:
            nn.init.normal_(parameter)
    return model.eval()


def vit(side="rpe-1.9-product-ctx-0-qkv", depth=2, cls=VisionTransformer, **more):
    return filled(equip(cls(**SIZE, depth=depth, **more), side))


def image(seed=1):
    return torch.randn(1, *PIXELS, generator=torch.Generator().manual_seed(seed))


def entering(model, number):
    """(L, C): what the attention of a block is asked with."""
    found = []
    handle = model.blocks[number].attn.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    with torch.no_grad():
        model(image()[None])
    handle.remove()
    return found[0]


def parts(rpe):
    return [] if rpe is None else rpe.parts() if hasattr(rpe, "parts") else [rpe]


def by_hand(model, number, head, i, skip):
    """A `Row` in loops over keys: W[ids] of each table, and nothing of the attention's code."""
    attention, x = model.blocks[number].attn, entering(model, number)
    dim, scale = x.shape[1] // 3, (x.shape[1] // 3) ** -0.5
    with torch.no_grad():
        q, k, v = attention.qkv(x).view(len(x), 3, 3, dim).permute(1, 2, 0, 3)[:, head].double()  # (L, D) each

    def entries(rpe, a, b):
        """What the tables have for the pair, D numbers or one."""
        found = []
        for one in parts(rpe):
            c = one.rpe_config
            ids, _ = get_bucket_ids_2d(one.method, 4, 6, skip, c.alpha, c.beta, c.gamma)
            table = one.table.detach().double()[head if one.num_heads > 1 else 0]
            found.append(table[ids[a, b]] if not one.transposed or one.mode == "bias" else table[:, ids[a, b]])
        return sum(found)

    def score(rpe, x, a, b):
        entry = entries(rpe, a, b)
        return float(entry) if rpe.mode == "bias" else float(scale * x @ entry)

    scores = [float(scale * q[i] @ k[j]) for j in range(len(x))]
    rpe_q, rpe_k, rpe_v = attention.rpe_q, attention.rpe_k, attention.rpe_v
    on_keys = None if rpe_k is None else [score(rpe_k, q[i], i, j) for j in range(len(x))]
    on_queries = None if rpe_q is None else [score(rpe_q, k[j], j, i) for j in range(len(x))]

    def softmax(scores):
        total = sum(map(math.exp, scores))
        return [math.exp(one) / total for one in scores]

    added = [sum(one[j] for one in (on_keys, on_queries) if one is not None) for j in range(len(x))]
    weights = softmax([one + more for one, more in zip(scores, added, strict=True)])
    on_values, share = None, 0.0
    if rpe_v is not None:
        each = [w * entries(rpe_v, i, j) for j, w in enumerate(weights)]
        on_values = [float(one.norm()) for one in each]
        share = float(sum(each).norm() / sum(w * v[j] for j, w in enumerate(weights)).norm())
    return SimpleNamespace(
        scores=scores, on_keys=on_keys, on_queries=on_queries, without=softmax(scores), weights=weights,
        on_values=on_values, share=share,
    )  # fmt: skip


def check(row, expected):
    for name in ("scores", "on_keys", "on_queries", "without", "weights", "on_values", "share"):
        own, other = getattr(row, name), getattr(expected, name)
        assert (own is None) == (other is None), name
        if own is not None:
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5, err_msg=name)
    half = sum(abs(a - b) for a, b in zip(expected.weights, expected.without, strict=True)) / 2
    assert row.moved == pytest.approx(half, abs=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_attention_in_loops(side):
    model = vit(side)
    maps = attention_maps(model, image(), query=(2, 5), block=2, head=3)
    assert (maps.size, maps.skip, maps.at, maps.block, maps.blocks) == ((4, 6), 1, (2, 5), 2, 2)
    assert (maps.head, maps.heads, maps.note) == (3, 3, "")
    check(maps.query, by_hand(model, 1, 2, 1 + 2 * 6 + 5, 1))
    check(maps.class_token, by_hand(model, 1, 2, 0, 1))
    np.testing.assert_array_equal(maps.map(maps.query.weights)[3], maps.query.weights[1 + 18 :])


def test_a_model_without_a_class_token():
    model = vit(class_token=False, global_pool="avg", depth=1)
    maps = attention_maps(model, image(), query=(3, 0), head=2)
    assert maps.skip == 0 and maps.class_token is None and maps.block == 1
    check(maps.query, by_hand(model, 0, 1, 18, 0))


FAMILIES = {
    "vit": dict(cls=VisionTransformer, qk_norm=True, global_pool="avg"),
    "registers": dict(cls=VisionTransformer, reg_tokens=3),
    "deit": dict(cls=VisionTransformerDistilled),
    "beit": dict(cls=Beit, use_abs_pos_emb=False, use_rel_pos_bias=True),
    "eva": dict(cls=Eva, use_rot_pos_emb=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", SIDES[1:4])
def test_weights_are_those_of_the_model_and_the_sum_of_what_is_shown(family, side):
    model = vit(side, **FAMILIES[family])
    expected = model(image()[None])
    maps = attention_maps(model, image(), block=2, head=2)
    seen = {}
    attention = model.blocks[1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda module, args, out: seen.update(weights=args[0]))
    assert torch.allclose(model(image()[None]), expected, atol=1e-4)
    handle.remove()
    token = maps.skip + 6 * maps.at[0] + maps.at[1]
    for row, i in ((maps.query, token), (maps.class_token, 0)):
        np.testing.assert_allclose(row.weights, seen["weights"][0, 1, i].detach(), atol=1e-5)
        for weights, scores in ((row.without, row.scores), (row.weights, row.scores + row.added)):
            np.testing.assert_allclose(weights, np.exp(scores) / np.exp(scores).sum(), atol=1e-5)
    assert maps.query.moved > 1e-3 or "q" not in side.split("-")[-1]


def test_the_model_is_left_as_it_was():
    model = vit()
    before = model(image()[None])
    attention_maps(model, image())
    assert torch.equal(model(image()[None]), before)
    with pytest.raises(AssertionError):
        attention_maps(model, torch.randn(1, 8, 14))
    assert not any("attend" in vars(block.attn) for block in model.blocks)


@pytest.mark.parametrize("side", SIDES[:2])
def test_what_is_not_given_is_what_is_changed_most(side):
    model, picture = vit(side), image(0)  # where the largest of the means is not that of all
    changed = np.zeros((3, 4, 6))
    for place in np.ndindex(3, 4, 6):
        row = attention_maps(model, picture, block=2, head=place[0] + 1, query=place[1:]).query
        changed[place] = row.moved + row.share
    maps = attention_maps(model, picture)
    assert maps.block == 2 and maps.head == 1 + changed.mean((1, 2)).argmax()
    assert maps.at == np.unravel_index(changed[maps.head - 1].argmax(), (4, 6))
    other = attention_maps(model, picture, head=1)
    assert other.head == 1 and other.at == np.unravel_index(changed[0].argmax(), (4, 6))
    given = attention_maps(model, picture, query=(1, 4))
    assert given.at == (1, 4) and given.head == 1 + changed[:, 1, 4].argmax()


@pytest.mark.parametrize("side", ["rpe-1.9-product-ctx-0-qkv", "rpe-20-cross-ctx-1-k", "rpe-1.9-product-ctx-1-v"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_last_block_learns_nothing_on_the_map_where_the_class_token_alone_is_read(side, pool):
    model = equip(VisionTransformer(**SIZE, depth=3, global_pool=pool), side)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for step in range(4):
        images = torch.randn(8, 1, *PIXELS, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 2).backward()
        optimizer.step()
    maps = attention_maps(model, image())
    assert maps.note == "" and maps.block == (2 if pool == "token" else 3)
    last = attention_maps(model, image(), block=3)
    if pool == "avg":
        assert last.note == ""
        return
    assert "only the class token is read" in last.note and last.at == (2, 3)
    for one in (last.query.on_keys, last.query.on_queries):
        assert one is None or np.ptp(last.map(one)) == 0
    assert last.query.on_values is None or not last.map(last.query.on_values).any()
    if "q" in side.split("-")[-1]:  # keys, asked by the class token, differ
        assert np.ptp(last.map(last.class_token.on_queries)) > 1e-4 and last.class_token.moved > 1e-5
        rows = [attention_maps(model, image(), block=3, head=k).class_token for k in (1, 2, 3)]
        assert last.head == 1 + np.argmax([one.moved + one.share for one in rows])


def test_untrained_tables_are_told():
    model = equip(VisionTransformer(**SIZE, depth=2), SIDES[1])
    maps = attention_maps(model, image())
    assert maps.note.startswith("All tables are zero") and maps.block == 2
    np.testing.assert_array_equal(maps.query.weights, maps.query.without)
    with torch.no_grad():
        model.blocks[0].attn.rpe_k.table.normal_()
    assert attention_maps(model, image()).block == 1
    with torch.no_grad():
        model.blocks[0].attn.rpe_k.table.fill_(1)
    assert "add the same to every key" in attention_maps(model, image(), block=1).note


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (dict(query=(4, 0)), "row 4, column 0 is not on the map of 4x6"),
        (dict(query=(0, 6)), "row 0, column 6 is not on the map of 4x6"),
        (dict(query=(-1, 0)), "row -1, column 0 is not"),
        (dict(block=0), "block 0; the model has 3, counted from 1"),
        (dict(block=4), "block 4; the model has 3"),
        (dict(block=2), "block 2 has no encodings; expected one of 1, 3"),
        (dict(head=0), "head 0; the model has 3"),
        (dict(head=4), "head 4; the model has 3"),
    ],
)
def test_numbers_out_of_range(wanted, words):
    model = equip(VisionTransformer(**SIZE, depth=3), SIDES[0], blocks=[0, 2])
    with pytest.raises(ValueError, match=words):
        attention_maps(model, image(), **wanted)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="this VisionTransformer has none: irpe.equip"):
        attention_maps(VisionTransformer(**SIZE, depth=1), image())
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, batch_first=True), 1)
    with pytest.raises(ValueError, match="timm's ViT.*this is a TransformerEncoder"):
        attention_maps(equip(encoder, SIDES[0], grid=(4, 6)), image())


def test_places_of_windows():
    """A map of 3 x 5, shifted by (1, 2), filled up to 4 x 6 and cut into windows of 2 x 3."""
    places = Windows((3, 5), (2, 3), (1, 2)).places()
    assert places.tolist() == [
        [7, 8, 9, 12, 13, 14], [5, 6, -1, 10, 11, -1], [2, 3, 4, -1, -1, -1], [0, 1, -1, -1, -1, -1],
    ]  # fmt: skip


# 10 x 14 pixels are maps of 5 x 7 and 3 x 4 tokens, filled up to windows of 2 x 3
SWIN = dict(
    img_size=(10, 14), patch_size=2, window_size=(2, 3), depths=(2, 2), embed_dim=12, num_heads=(2, 3), in_chans=1,
    num_classes=2, always_partition=True, strict_img_size=False,
)  # fmt: skip


def swin(side=SIDES[1], **more):
    return filled(equip(SwinTransformer(**SWIN | more), side))


def picture_of_swin():
    return torch.randn(1, 10, 14, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [SIDES[1], SIDES[3]])
def test_rows_of_swin_are_those_of_its_windows(block, side):
    """The weights that its own formula hands to attn_drop, found again by what each token is: its place on the map."""
    model, picture = swin(side), picture_of_swin()
    one = [block for stage in model.layers for block in stage.blocks][block - 1]
    one.attn.fused_attn = False
    seen = {}
    one.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.update(weights=args[0]))
    one.register_forward_pre_hook(lambda module, args: seen.update(size=args[0].shape[1:3]))
    model(picture[None])
    (h, w), (sh, sw) = seen["size"], one.shift_size
    assert any(one.shift_size) == (block % 2 == 0)
    across = -(-w // 3)
    for row, column in ((0, 0), (1, 3), (h - 1, w - 1), (h - 2, 0)):
        maps = attention_maps(model, picture, query=(row, column), block=block, head=2)
        assert (maps.size, maps.at, maps.block, maps.blocks, maps.skip) == ((h, w), (row, column), block, 4, 0)
        assert maps.class_token is None
        r, c = (row - sh) % h, (column - sw) % w
        window, token = r // 2 * across + c // 3, r % 2 * 3 + c % 3
        weights = seen["weights"][window, 1, token].detach().numpy()
        np.testing.assert_allclose(maps.query.weights, weights, atol=1e-5)
        scores = np.exp(maps.query.scores + maps.query.added)
        np.testing.assert_allclose(maps.query.weights, scores / scores.sum(), atol=1e-5)
        expected = np.full((h, w), np.nan, np.float32)
        for k, weight in enumerate(weights):
            at = r // 2 * 2 + k // 3, c // 3 * 3 + k % 3
            if at[0] < h and at[1] < w:
                expected[(at[0] + sh) % h, (at[1] + sw) % w] = weight
        np.testing.assert_allclose(maps.map(maps.query.weights), expected, atol=1e-5)
        assert np.isfinite(maps.map(maps.query.on_keys)).sum() == np.isfinite(expected).sum()


def test_what_is_not_given_of_swin_is_what_is_changed_most_in_any_window():
    model, picture = swin(), picture_of_swin()
    changed = np.zeros((2, 5, 7))
    for place in np.ndindex(2, 5, 7):
        row = attention_maps(model, picture, block=2, head=place[0] + 1, query=place[1:]).query
        changed[place] = row.moved + row.share
    maps = attention_maps(model, picture, block=2)
    assert maps.head == 1 + changed.mean((1, 2)).argmax()
    assert maps.at == np.unravel_index(changed[maps.head - 1].argmax(), (5, 7))
    assert attention_maps(model, picture).block == 4
    assert not any(one._forward_pre_hooks or "attend" in vars(one) for one in model.modules())


def test_blocks_of_swin_without_encodings_and_untrained_tables():
    model = equip(SwinTransformer(**SWIN), SIDES[1], blocks=[1])
    with pytest.raises(ValueError, match="block 1 has no encodings; expected one of 2"):
        attention_maps(model, picture_of_swin(), block=1)
    maps = attention_maps(model, picture_of_swin())
    assert maps.note.startswith("All tables are zero") and maps.at == (maps.size[0] // 2, maps.size[1] // 2)


HF = {
    "vit": ("ViT", 1, {}), "deit": ("DeiT", 2, {}), "beit": ("Beit", 1, dict(use_relative_position_bias=True)),
    "dinov2": ("Dinov2", 1, {}), "registers": ("Dinov2WithRegisters", 5, dict(num_register_tokens=4)),
    "dinov3": ("DINOv3ViT", 3, dict(num_register_tokens=2)), "clip": ("CLIPVision", 1, {}),
    "siglip": ("SiglipVision", 0, {}),
}  # fmt: skip


@pytest.mark.parametrize("family", HF)
@pytest.mark.parametrize("side", SIDES[1:3])
def test_rows_of_transformers_are_the_weights_that_the_model_gives(family, side):
    transformers = pytest.importorskip("transformers")
    name, skip, more = HF[family]
    height, width = (12, 12) if family in ("clip", "siglip") else (8, 12)  # those want squares
    size = (height, width) if family in ("vit", "deit", "beit") else 12
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, num_channels=1,
        image_size=size, patch_size=2, **more,
    )  # fmt: skip
    model = filled(equip(getattr(transformers, f"{name}Model")(config), side))
    picture = torch.randn(1, height, width, generator=torch.Generator().manual_seed(1))
    given = model(pixel_values=picture[None], output_attentions=True).attentions[1]
    maps = attention_maps(model, picture, query=(2, 5), block=2, head=2)
    assert (maps.size, maps.skip, maps.blocks, maps.heads) == ((height // 2, width // 2), skip, 2, 3)
    rows = [(maps.query, skip + width + 5), *([(maps.class_token, 0)] if skip else [])]
    assert (maps.class_token is None) == (not skip)
    for row, i in rows:
        np.testing.assert_allclose(row.weights, given[0, 1, i].detach(), atol=1e-5)
        scores = row.scores + row.added
        np.testing.assert_allclose(row.weights, np.exp(scores) / np.exp(scores).sum(), atol=1e-5)
    assert maps.query.moved > 1e-3 or "q" not in side.split("-")[-1]
    assert torch.allclose(model(pixel_values=picture[None], output_attentions=True).attentions[1], given)


def test_what_is_not_drawn_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(image_size=8, patch_size=2, embed_dim=12, depths=[1], num_heads=[2], window_size=2)
    with pytest.raises(ValueError, match="are drawn of timm's ViT, .* of transformers' ViT.* this SwinModel has none"):
        attention_maps(transformers.SwinModel(config), torch.randn(3, 8, 8))
    size = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24, image_size=8)
    config = transformers.VideoMAEConfig(patch_size=2, num_frames=4, tubelet_size=2, **size)
    with pytest.raises(ValueError, match="are drawn of .*; this is a VideoMAEModel"):
        attention_maps(equip(transformers.VideoMAEModel(config), f"{SIDES[0]}-3d"), torch.randn(3, 8, 8))


def test_the_class_token_of_a_vit_that_classifies_is_all_that_is_read():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, num_channels=1,
        image_size=PIXELS, patch_size=2,
    )  # fmt: skip
    model = filled(equip(transformers.ViTForImageClassification(config), SIDES[1]))
    for one in model.vit.layers[1].modules():
        if hasattr(one, "lookup_table_weight"):
            nn.init.zeros_(one.lookup_table_weight)
    assert attention_maps(model, image()).block == 1
    assert "only the class token is read" in attention_maps(model, image(), block=2).note
