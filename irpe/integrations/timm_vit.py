"""timm's vision transformers: iRPE in every `timm.layers.Attention` of a `VisionTransformer`."""

import dataclasses
from typing import Any

import torch
from timm.layers import Attention, PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..irpe import RPEConfig, RPEModule, build_rpe, rpe_attention
from .grid import GridTracker


class RPEAttention(Attention):
    """`timm.layers.Attention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    rpe_q: RPEModule | None
    rpe_k: RPEModule | None
    rpe_v: RPEModule | None
    rpe_grid: GridTracker
    rpe_skip: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention over x (B, L, C), with the encodings of the map that the model's patch embedding has made."""
        batch, tokens, _ = x.shape
        height, width = self.rpe_grid.grid(tokens, self.rpe_skip)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, L, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if is_causal:  # as in timm, a mask that is given beside it is not used
            attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        x = rpe_attention(
            q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height=height, width=width, scale=self.scale,
            attn_mask=attn_mask, dropout_p=self.attn_drop.p if self.training else 0.0,
        )  # fmt: skip
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


def find(model: nn.Module) -> list[VisionTransformer]:
    """The vision transformers inside a model (itself, or what a wrapper such as timm's features_only holds)."""
    return [one for one in model.modules() if isinstance(one, VisionTransformer)]


def why_not(vit: VisionTransformer, config: RPEConfig) -> str | None:
    """The reason that these encodings cannot be added to this model, or None."""
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        return f"{type(vit).__name__} changes the forward of VisionTransformer"
    if isinstance(vit.patch_drop, PatchDropout):
        return "patch dropout removes tokens, so the rest is no full map; build the model with patch_drop_rate=0"
    if not hasattr(vit.patch_embed, "dynamic_feat_size"):
        return f"its patch embedding {type(vit.patch_embed).__name__} does not tell the size of its map"
    for name, block in vit.blocks.named_children():
        if type(block) not in (Block, ResPostBlock):
            return f"blocks.{name} is a {type(block).__name__}; expected Block or ResPostBlock"
        if isinstance(block.attn, RPEAttention):
            return f"blocks.{name} has iRPE already; call unequip first"
        if type(block.attn) is not Attention:
            return f"blocks.{name}.attn is a {type(block.attn).__name__}; expected timm.layers.Attention"
    skip = vit.num_prefix_tokens
    for name, single in vars(config).items():
        if single is not None and single.skip not in (0, skip):
            return f"{name} has skip={single.skip}, but the model has {skip} prefix tokens; leave skip at 0"
    return None


def equip(vit: VisionTransformer, config: RPEConfig) -> None:
    """Adds rpe_q, rpe_k and rpe_v to every attention of a model for which `why_not` has no reason."""
    skip = vit.num_prefix_tokens
    config = RPEConfig(**{n: one and dataclasses.replace(one, skip=skip) for n, one in vars(config).items()})
    tracker = GridTracker()
    vit.patch_embed.register_forward_hook(tracker.on_patch_embed)
    for block in vit.blocks:
        attn: Any = block.attn
        weight = attn.qkv.weight
        rpe = build_rpe(config, attn.head_dim, attn.num_heads, device=weight.device, dtype=weight.dtype)
        attn.__class__ = RPEAttention
        attn.rpe_q, attn.rpe_k, attn.rpe_v = rpe
        attn.rpe_grid, attn.rpe_skip = tracker, skip
        block.register_forward_pre_hook(tracker.on_block)


def is_equipped(vit: VisionTransformer) -> bool:
    """Whether one of its blocks has iRPE."""
    return any(isinstance(getattr(block, "attn", None), RPEAttention) for block in vit.blocks)


def unequip(vit: VisionTransformer) -> None:
    """Takes out what `equip` has added: class, tables and hooks."""
    trackers = set()
    for block in vit.blocks:
        attn: Any = block.attn
        if not isinstance(attn, RPEAttention):
            continue
        trackers.add(attn.rpe_grid)
        attn.__class__ = Attention
        for name in ("rpe_q", "rpe_k", "rpe_v", "rpe_grid", "rpe_skip"):
            delattr(attn, name)
    for module in vit.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) in trackers]:
                del hooks[key]
