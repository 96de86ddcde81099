"""iRPE in plain torch: in a transformer encoder that exists, and as an attention of one's own."""

import torch
from torch import nn

from irpe import RPEMultiheadAttention, equip

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
encoder = equip(nn.TransformerEncoder(layer, num_layers=2), "rpe-1.9-product-ctx-1-qkv", grid=(6, 9))
features = torch.randn(2, 6 * 9, 32)  # a map of 6x9 tokens, row by row
encoder(features).square().mean().backward()
print("encoder:", encoder.layers[0].self_attn.rpe_v)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = RPEMultiheadAttention(dim, heads, batch_first=True, rpe_config="rpe-1.9-cross-ctx-0-k")
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, height, width):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False, height=height, width=width)[0]


block = Block(32, 4)
for height, width in ((6, 9), (3, 5)):  # any size and shape
    print("block:", tuple(block(torch.randn(2, height * width, 32), height, width).shape))

# tokens that are no full grid: the places of those that are left
places = torch.cartesian_prod(torch.arange(6), torch.arange(9))[torch.randperm(54)[:20]]
x = torch.randn(2, 20, 32)
print("kept tokens:", tuple(block.attention(x, x, x, need_weights=False, positions=places)[0].shape))
