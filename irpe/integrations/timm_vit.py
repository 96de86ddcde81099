"""timm's vision transformers: iRPE in every `timm.layers.Attention` of a `VisionTransformer`."""

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from ..fx import one_node
from .blocks import BlockFamily
from .on_map import AttentionOnMap, BlockOnMap, ModelOnMap


class ViTBlockOnMap(BlockOnMap):
    """A `Block` or `ResPostBlock` bound to a map."""

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.block(x, attn_mask=self.on_map(attn_mask), is_causal=is_causal)


class RPEAttention(AttentionOnMap, Attention):
    """`timm.layers.Attention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    block_on_map = ViTBlockOnMap

    @one_node
    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Attention over x (B, L, C), with the encodings of the map that `attn_mask` names."""
        height, width, mask = self.map_of(attn_mask)
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = self.norm(self.attend(q, k, v, height, width, mask, is_causal))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class RPEVisionTransformer(ModelOnMap, VisionTransformer):
    """The class of an equipped `VisionTransformer`."""

    original = VisionTransformer


class RPEVisionTransformerDistilled(ModelOnMap, VisionTransformerDistilled):
    """The class of an equipped `VisionTransformerDistilled`."""

    original = VisionTransformerDistilled


ADAPTER = BlockFamily(
    models={VisionTransformer: RPEVisionTransformer, VisionTransformerDistilled: RPEVisionTransformerDistilled},
    blocks=(Block, ResPostBlock),
    attentions={Attention: RPEAttention},
)
