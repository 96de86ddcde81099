"""The versions of one vision transformer, which differ in how they know positions and in nothing else."""

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from irpe import equip

SIDE, PATCH = 32, 4
NONE, LEARNED, ROTARY = "none", "learned", "rotary"


@dataclass(frozen=True)
class Shape:
    """Of the transformer: width, heads and blocks. Width 192 and 3 heads are DeiT-Tiny's."""

    width: int = 192
    heads: int = 3
    depth: int = 6

    def __str__(self) -> str:
        return f"width {self.width}, {self.heads} heads, {self.depth} blocks"


@dataclass(frozen=True)
class Arm:
    """What a version is called, its positions ("none", "learned", "rotary") and its encoding; the paper's top-1."""

    title: str
    positions: str = NONE
    rpe: str | None = None
    paper: float | None = None

    @property
    def name(self) -> str:
        """The beginning of its files' names."""
        return "-".join(filter(None, [self.positions, self.rpe]))


def _product(on: str, positions: str = NONE) -> Arm:
    title = f"iRPE on {', '.join(on)}" if positions == NONE else f"learned absolute and iRPE on {', '.join(on)}"
    paper = {"q": 80.9, "k": 80.9, "v": 80.2, "qk": 81.0, "qkv": 81.3} if positions == NONE else {"k": 80.9}
    return Arm(title, positions, f"rpe-1.9-product-ctx-1-{on}", paper[on])


WITHOUT = Arm("none", paper=77.6)
ABSOLUTE = Arm("learned absolute", LEARNED, paper=79.9)
# 15x15 numbers for each head: Swin's table of a window of 8x8; larger offsets have the outermost
SWIN = Arm("table of biases, as in Swin", rpe="rpe-3.5-product-bias-0-k-clip")
ROPE = Arm("rotary", ROTARY)

# in the order of importance
MAIN = (
    WITHOUT, ABSOLUTE, _product("k"), _product("qkv"), ROPE, SWIN, _product("qk"), _product("k", LEARNED),
    _product("q"), _product("v"),
)  # fmt: skip
_METHODS = {"euc": (20, 80.1, 80.4), "quant": (33, 80.3, 80.5), "cross": (20, 80.5, 80.8), "product": (1.9, 80.5, 80.9)}
_WORDS = {"euc": "Euclidean", "quant": "Quantization", "cross": "Cross", "product": "Product"}
# on keys beside learned positions, as in the paper
TABLE1 = (
    ABSOLUTE,
    *(
        Arm(f"{_WORDS[name]}, {words}", LEARNED, f"rpe-{ratio}-{name}-{mode}-k", paper)
        for name, (ratio, bias, ctx) in _METHODS.items()
        for mode, words, paper in (("bias-0", "bias", bias), ("ctx-1", "contextual", ctx))
    ),
)
TABLE2 = tuple(
    Arm(f"{words}, {heads}", LEARNED, f"rpe-1.9-product-{mode}-{shared}-k", paper)
    for mode, words, shared, heads, paper in (
        ("bias", "bias", 0, "each head", 80.54),
        ("bias", "bias", 1, "shared", 80.05),
        ("ctx", "contextual", 0, "each head", 80.99),
        ("ctx", "contextual", 1, "shared", 80.89),
    )
)
BUCKETS = tuple(
    Arm(f"{count}x{count} buckets", NONE, f"rpe-{ratio}-product-ctx-1-k")
    for count, ratio in ((3, "0.9"), (5, "1.4"), (7, "1.9"), (11, "2.5"), (15, "3.5"))
)
PARTS = {"main": MAIN, "table 1": TABLE1, "table 2": TABLE2, "buckets": BUCKETS}


def _vit(shape: Shape, positions: str) -> VisionTransformer:
    return VisionTransformer(
        img_size=SIDE, patch_size=PATCH, num_classes=10, class_token=False, global_pool="avg", pos_embed=positions,
        embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads, dynamic_img_size=True,
    )  # fmt: skip


def build(arm: Arm, shape: Shape, seed: int) -> nn.Module:
    """The model of an arm. Weights that all arms have are those of the model without positions and this seed.

    Learned positions are drawn by the seed too, so they are those of every arm that has them. Tables start at zero.
    """
    torch.manual_seed(seed)
    plain = _vit(shape, "none")
    if arm.positions == NONE:
        model: nn.Module = plain
    elif arm.positions == LEARNED:
        model = _vit(shape, "learn")
    else:
        model = Eva(
            img_size=SIDE, patch_size=PATCH, num_classes=10, class_token=False, global_pool="avg",
            embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads, dynamic_img_size=True, attn_type="rope",
            use_abs_pos_emb=False, use_rot_pos_emb=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"pos_embed"}, (missing, unexpected)
    return model if arm.rpe is None else equip(model, arm.rpe)
