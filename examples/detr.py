"""iRPE in the encoder of DETR: a padded batch of images of two sizes, one step of training."""

import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from irpe import equip

torch.manual_seed(0)
backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
config = DetrConfig(
    use_timm_backbone=False, backbone_config=backbone, num_queries=5, num_labels=3, d_model=32,
    encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64,
)  # fmt: skip
model = equip(DetrForObjectDetection(config), "rpe-2.0-product-ctx-1-k")
# released weights: irpe.detr.detr_r50("rpe-2.0-product-ctx-1-k", "checkpoint.pth") builds and loads in one call

pixels, mask = torch.zeros(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.long)
for n, (height, width) in enumerate([(64, 96), (48, 72)]):  # the second image is padded
    pixels[n, :, :height, :width] = torch.rand(3, height, width)
    mask[n, :height, :width] = 1
labels = [{"class_labels": torch.tensor([n]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])} for n in range(2)]
output = model(pixel_values=pixels, pixel_mask=mask, labels=labels)
output.loss.backward()
table = model.model.encoder.layers[0].self_attn.rpe_k.lookup_table_weight
print(f"loss {output.loss:.2f}, boxes {tuple(output.pred_boxes.shape)}, largest gradient {table.grad.abs().max():.1e}")
assert table.grad.abs().max() > 0
