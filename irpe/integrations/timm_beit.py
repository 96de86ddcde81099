"""timm's BEiT: iRPE in every attention of a `Beit`, beside the relative position bias that it has itself.

Biases of the model, its attentions' own and the one that they share, stay and are added to the scores. While such a
bias is trained, `rpe_attention` computes by the formula: the fused kernels have no gradient of what is added.
"""

from typing import Any

from timm.models.beit import Attention, Beit, Block
from torch import Tensor

from ..fx import one_node
from .blocks import BlockFamily, qkv_without_bias_on_keys
from .on_map import AttentionOnMap, BlockOnMap, ModelOnMap


class BeitBlockOnMap(BlockOnMap):
    """A `Block` of BEiT bound to a map."""

    def __call__(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.block(x, shared_rel_pos_bias=self.on_map(shared_rel_pos_bias))


class RPEBeitAttention(AttentionOnMap, Attention):
    """BEiT's `Attention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    block_on_map = BeitBlockOnMap

    @one_node
    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        """Attention over x (B, L, C), with the encodings of the map that `shared_rel_pos_bias` names."""
        height, width, bias = self.map_of(shared_rel_pos_bias)
        batch, tokens, _ = x.shape
        qkv = qkv_without_bias_on_keys(self, x)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(self.attend(q, k, v, height, width, bias)))


class RPEBeit(ModelOnMap, Beit):
    """The class of an equipped `Beit`."""

    original = Beit


ADAPTER = BlockFamily(models={Beit: RPEBeit}, blocks=(Block,), attentions={Attention: RPEBeitAttention})
