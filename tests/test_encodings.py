"""irpe/encodings.py: what is drawn is what attention adds, and which heads and queries are shown."""

import pytest
import torch

pytest.importorskip("timm")

import numpy as np
from timm.models import VisionTransformer
from torch import nn

from irpe import RPEMultiheadAttention, equip, unequip
from irpe.encodings import learned

SIDES = ["rpe-1.9-product-ctx-1-k", "rpe-20-cross-ctx-0-qk", "rpe-20-euc-bias-0-k", "rpe-33-quant-ctx-1-k"]
PIXELS = (8, 12)  # 4 x 6 tokens


def vit(side, **more):
    torch.manual_seed(0)
    size = dict(img_size=PIXELS, patch_size=2, embed_dim=24, depth=2, num_heads=3, num_classes=2, in_chans=1)
    model = equip(VisionTransformer(**size, **more), side)
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter)
    return model.eval()


def images(count=7):
    return torch.randn(count, 1, *PIXELS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("class_token", [True, False])
def test_they_are_what_attention_adds(side, class_token):
    more = {} if class_token else dict(class_token=False, global_pool="avg")
    model, batch = vit(side, **more), images()
    found = learned(model, batch, batch[:, 0], (1, 4, 6), "a title")
    assert found.mean.shape == (2, 3, 7, 11) and found.single.shape == (2, 3, 7, 11) and found.patch == 2
    assert not any(attention.attn.rpe_k._forward_pre_hooks for attention in model.blocks)
    np.testing.assert_array_equal(found.images, batch[[1, 4, 6], 0])
    added = {}
    handles = [
        block.attn.rpe_k.register_forward_hook(lambda module, args, out, number=number: added.update({number: out}))
        for number, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    skip = int(class_token)
    for line, (block, head) in enumerate(found.shown):
        for k, (image, (row, column)) in enumerate(zip((1, 4, 6), found.at, strict=True)):
            scores = added[block].expand(len(batch), 3, -1, -1)[image, head, skip + 6 * row + column, skip:].view(4, 6)
            drawn = found.single[line, k, 3 - row : 7 - row, 5 - column : 11 - column]
            np.testing.assert_allclose(drawn - drawn.mean(), scores - scores.mean(), atol=1e-5)
    if "bias" in side:
        block, head = found.shown[0]
        np.testing.assert_allclose(found.mean[block, head], found.single[0, 0], atol=1e-6)
    assert np.abs(found.mean.mean((-2, -1))).max() < 1e-6


def test_the_heads_that_are_shown_are_those_whose_queries_differ():
    model = vit("rpe-1.9-product-ctx-0-k")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.rpe_k.lookup_table_weight.mul_(0.01)
        model.blocks[1].attn.rpe_k.lookup_table_weight[2].mul_(1000)
        model.blocks[0].attn.rpe_k.lookup_table_weight[1].mul_(500)
    assert learned(model, images(), images()[:, 0], (0, 1), "").shown == [(1, 2), (0, 1)]


def test_only_tokens_that_may_ask_are_shown():
    model, asking = vit(SIDES[0]), torch.zeros(7, 24, dtype=torch.bool)
    asking[:, 9] = True
    assert learned(model, images(), images()[:, 0], (0, 3), "", asking).at == [(1, 3), (1, 3)]


class OnPlaces(nn.Module):
    """An attention that knows where its tokens are, and no map."""

    def __init__(self):
        super().__init__()
        config = "rpe-1.9-product-ctx-1-k"
        self.attention = RPEMultiheadAttention(8, 2, batch_first=True, rpe_config=config)

    def forward(self, images):
        tokens = images.flatten(1)[:, :48].view(len(images), 6, 8)
        return self.attention(tokens, tokens, tokens, positions=torch.tensor([[0, k] for k in range(6)]))[0]


def test_without_encodings_on_keys_of_a_map_there_is_nothing():
    plain = vit("rpe-1.9-product-ctx-1-k")
    for model in (vit("rpe-1.9-product-ctx-1-v"), OnPlaces(), unequip(plain)):
        assert learned(model, images(), images()[:, 0], (0,), "") is None
