"""timm's Swin transformers: iRPE in every window of a `SwinTransformer`, beside its relative position bias.

A window attention knows the height and width of its windows, which need not be squares, also after `set_input_size` has
changed them: so nothing but its class changes, and the encodings follow `window_size`. There are no prefix tokens.
While the model's own bias is trained, `rpe_attention` computes by the formula: the fused kernels have no gradient of
what is added to the scores.
"""

from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor

from ..fx import one_node
from .blocks import BlockFamily, EncodedAttention


class RPEWindowAttention(EncodedAttention, WindowAttention):
    """`WindowAttention` with iRPE: the class of an equipped attention, whose weights stay where they were."""

    @one_node
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over the windows x (B * windows, L, C), mask (windows, L, L) added to the scores of each image."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._get_rel_pos_bias()  # (1, H, L, L)
        if mask is not None:
            images = batch // mask.shape[0]
            bias = (bias + mask.unsqueeze(1)).expand(images, -1, -1, -1, -1).flatten(0, 1)
        height, width = self.window_size
        return self.proj_drop(self.proj(self.attend(q, k, v, height, width, bias)))


# a part is a stage: timm's features_only takes the stages out of the model
ADAPTER = BlockFamily(
    models={SwinTransformerStage: SwinTransformerStage},
    blocks=(SwinTransformerBlock,),
    attentions={WindowAttention: RPEWindowAttention},
)
