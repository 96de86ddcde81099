"""timm's EVA family: iRPE in every attention of an `Eva` (eva, eva02, dinov3, vits with rope, perception encoders).

Where the model has rotary positions, it turns queries and keys as before, and the encodings see the turned ones. Where
keys and values have fewer heads than queries, each is repeated for its group as timm does it, so the encodings have
as many heads as the queries.
"""

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from ..fx import one_call, one_node
from .blocks import BlockFamily, qkv_without_bias_on_keys
from .on_map import AttentionOnMap, BlockOnMap, ModelOnMap


class EvaBlockOnMap(BlockOnMap):
    """An `EvaBlock` or `EvaBlockPostNorm` bound to a map."""

    def __call__(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.block(x, rope=rope, attn_mask=self.on_map(attn_mask), is_causal=is_causal)


class _RopeAttention(AttentionOnMap):
    """What timm's two attentions with rope have in common."""

    block_on_map = EvaBlockOnMap

    @one_node
    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        """Attention over x (B, L, C), with the encodings of the map that `attn_mask` names."""
        height, width, mask = self.map_of(attn_mask)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.heads(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self.turned(x, rope).type_as(v) for x in (q, k))
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        x = self.norm(self.attend(q, k, v, height, width, mask, is_causal))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))

    def heads(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x, (B, H, L, D) each; keys and values may have fewer heads."""
        batch, tokens, _ = x.shape
        if self.qkv is None:
            of_each = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            return tuple(each.reshape(batch, tokens, -1, self.head_dim).transpose(1, 2) for each in of_each)
        qkv = self.project(x)
        return qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    @one_call
    def turned(self: Any, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, H, L, D) turned by rope, but for its prefix tokens."""
        skip = self.num_prefix_tokens
        on_map = apply_rot_embed_cat(x[:, :, skip:], rope, half=getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :skip], on_map], dim=2)


class RPEEvaAttention(_RopeAttention, EvaAttention):
    """`EvaAttention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    project = qkv_without_bias_on_keys


class RPEAttentionRope(_RopeAttention, AttentionRope):
    """`timm.layers.AttentionRope` with iRPE: the class of an equipped attention."""

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class RPEEva(ModelOnMap, Eva):
    """The class of an equipped `Eva`."""

    original = Eva


ADAPTER = BlockFamily(
    models={Eva: RPEEva},
    blocks=(EvaBlock, EvaBlockPostNorm),
    attentions={EvaAttention: RPEEvaAttention, AttentionRope: RPEAttentionRope},
)
