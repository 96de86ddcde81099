"""timm's vision transformers: iRPE in every `timm.layers.Attention` of a `VisionTransformer`.

Height and width of the map travel from the image to every attention as an argument of each call, never as state: the
model runs timm's own forward on a view of itself whose blocks are bound to the map of this very image. Whatever repeats
a block later (gradient checkpointing of any kind, in any thread, compiled or not) repeats it on the same map.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..irpe import RPEConfig, RPEModule, build_rpe, rpe_attention


class OnMap(NamedTuple):
    """What an equipped attention gets as `attn_mask`, which timm's blocks hand through as it is."""

    height: int
    width: int
    attn_mask: Tensor | None = None


class RPEAttention(Attention):
    """`timm.layers.Attention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    rpe_q: RPEModule | None
    rpe_k: RPEModule | None
    rpe_v: RPEModule | None

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Attention over x (B, L, C), with the encodings of the map that `attn_mask` names."""
        if not isinstance(attn_mask, OnMap):
            raise RuntimeError(
                "this attention does not know the height and width of its map: call the model, its forward_features "
                "or its forward_intermediates; to run the blocks yourself, take them from "
                "irpe.integrations.timm_vit.blocks_on_map(model, height, width)"
            )
        height, width, mask = attn_mask
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, L, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if is_causal:  # as in timm's own formula, a mask that is given beside it is not used
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        x = rpe_attention(
            q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height=height, width=width, scale=self.scale,
            attn_mask=mask, dropout_p=self.attn_drop.p if self.training else 0.0,
        )  # fmt: skip
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class BlockOnMap:
    """A block bound to a map: called as the block is."""

    def __init__(self, block: nn.Module, height: int, width: int) -> None:
        self.block, self.height, self.width = block, height, width

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.block(x, attn_mask=OnMap(self.height, self.width, attn_mask), is_causal=is_causal)


class BlocksOnMap(tuple[Any, ...]):
    """The blocks of a model, those with iRPE bound to a map: a tuple that can be called as `model.blocks` can."""

    def __call__(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def blocks_on_map(vit: VisionTransformer, height: int, width: int) -> BlocksOnMap:
    """The blocks of an equipped model for tokens of a map of height x width, for those who run them by hand.

    >>> tokens = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    >>> for block in blocks_on_map(model, *model.patch_embed.dynamic_feat_size(image.shape[-2:])):
    ...     tokens = block(tokens)
    """
    return BlocksOnMap(
        BlockOnMap(block, height, width) if type(block.attn) is RPEAttention else block for block in vit.blocks
    )


class _View:
    """A model whose `blocks` are bound to the map of one image, and which is the model itself in all else."""

    def __init__(self, vit: VisionTransformer, image: Tensor) -> None:
        self._vit, self._image = vit, image

    @property
    def blocks(self) -> BlocksOnMap:
        # read here and not in __init__: the checks of the patch embedding, which runs in between, make torch.compile
        # take the image's height and width for constants
        return blocks_on_map(self._vit, *self._vit.patch_embed.dynamic_feat_size(self._image.shape[-2:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vit, name)


class _RPEMixin:
    # the two ways through the blocks that timm's models have; everything else calls one of them
    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        view: Any = _View(self, x)
        return VisionTransformer.forward_features(view, x, *args, **kwargs)

    def forward_intermediates(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        view: Any = _View(self, x)
        return VisionTransformer.forward_intermediates(view, x, *args, **kwargs)


class RPEVisionTransformer(_RPEMixin, VisionTransformer):
    """The class of an equipped `VisionTransformer`."""


class RPEVisionTransformerDistilled(_RPEMixin, VisionTransformerDistilled):
    """The class of an equipped `VisionTransformerDistilled`."""


_EQUIPPED = {VisionTransformer: RPEVisionTransformer, VisionTransformerDistilled: RPEVisionTransformerDistilled}
_ORIGINAL = {equipped: original for original, equipped in _EQUIPPED.items()}


def find(model: nn.Module) -> list[VisionTransformer]:
    """The vision transformers inside a model (itself, or what a wrapper such as timm's features_only holds)."""
    return [one for one in model.modules() if isinstance(one, VisionTransformer)]


def attentions(vit: VisionTransformer) -> list[nn.Module]:
    """The attention of every block that has one."""
    found = [getattr(block, "attn", None) for block in vit.blocks]
    return [attn for attn in found if isinstance(attn, nn.Module)]


def why_not(
    vit: VisionTransformer, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, int] | None
) -> str | None:
    """The reason that these encodings cannot be added to these attentions of a model, or None."""
    if is_equipped(vit) and any(type(attn) is RPEAttention for attn in attentions):
        return "it has iRPE already; call unequip first, or name other blocks"
    if type(vit) not in _EQUIPPED and not is_equipped(vit):
        return f"{type(vit).__name__} changes the forward of VisionTransformer"
    if grid is not None:
        return f"grid={grid}, but the model knows the size of its map; leave grid out"
    if isinstance(vit.patch_drop, PatchDropout):
        return "patch dropout removes tokens, so the rest is no full map; build the model with patch_drop_rate=0"
    if not hasattr(vit.patch_embed, "dynamic_feat_size"):
        return f"its patch embedding {type(vit.patch_embed).__name__} does not tell the size of its map"
    for name, block in vit.blocks.named_children():
        if type(block) not in (Block, ResPostBlock):
            return f"blocks.{name} is a {type(block).__name__}; expected Block or ResPostBlock"
        if type(block.attn) is not Attention and not (is_equipped(vit) and type(block.attn) is RPEAttention):
            return f"blocks.{name}.attn is a {type(block.attn).__name__}; expected timm.layers.Attention"
    for name, module in vit.named_modules():
        if "forward" in vars(module) and isinstance(module, (VisionTransformer, Block, ResPostBlock, Attention)):
            return f"the forward of {name or 'the model'} has been replaced on the object, which would leave iRPE out"
    skip = vit.num_prefix_tokens
    for name, single in vars(config).items():
        if single is not None and single.skip not in (0, skip):
            return f"{name} has skip={single.skip}, but the model has {skip} prefix tokens; leave skip at 0"
    return None


def equip(vit: VisionTransformer, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, int] | None) -> None:
    """Adds rpe_q, rpe_k and rpe_v to attentions of a model, which `why_not` has no reason against."""
    skip = vit.num_prefix_tokens
    config = RPEConfig(**{n: one and dataclasses.replace(one, skip=skip) for n, one in vars(config).items()})
    for attn in attentions:
        one: Any = attn
        weight = one.qkv.weight
        rpe = build_rpe(config, one.head_dim, one.num_heads, device=weight.device, dtype=weight.dtype)
        one.__class__ = RPEAttention
        one.rpe_q, one.rpe_k, one.rpe_v = (rp and rp.train(one.training) for rp in rpe)
    if not is_equipped(vit):
        vit.__class__ = _EQUIPPED[type(vit)]


def is_equipped(vit: VisionTransformer) -> bool:
    """Whether it has iRPE."""
    return type(vit) in _ORIGINAL


def unequip(vit: VisionTransformer) -> None:
    """Takes out what `equip` has added: classes and tables."""
    for attn in attentions(vit):
        if type(attn) is RPEAttention:
            one: Any = attn
            one.__class__ = Attention
            del one.rpe_q, one.rpe_k, one.rpe_v
    vit.__class__ = _ORIGINAL[type(vit)]
