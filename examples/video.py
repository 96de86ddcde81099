"""iRPE on videos: VideoMAE of transformers, trained tables saved and loaded; and an image's tables in a video model."""

import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from irpe import convert_tables, equip
from irpe.integrations.hf_vit import from_pretrained

torch.manual_seed(0)
config = VideoMAEConfig(
    image_size=16, patch_size=4, num_frames=8, tubelet_size=2, num_channels=3, num_labels=2,
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
)  # fmt: skip
model = equip(VideoMAEForVideoClassification(config), "rpe-1.9-product-ctx-1-qkv-3d").train()

video = 0.1 * torch.randn(16, 8, 3, 16, 16)  # a bar that moves to the right, or to the left
for frame in range(8):
    video[:8, frame, :, :, 2 * frame] += 1
    video[8:, frame, :, :, 14 - 2 * frame] += 1
labels = torch.arange(16) // 8
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(14):
    loss = model(pixel_values=video, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 2:
        print(f"step {step:2}  loss {loss:.2f}")
model.eval().save_pretrained("videomae-with-irpe")
again = from_pretrained(VideoMAEForVideoClassification, "videomae-with-irpe")
torch.testing.assert_close(again(video).logits, model(video).logits)

old, new = "rpe-1.9-product-ctx-1-qkv", "rpe-1.9-product-ctx-1-qkv-3d"
image = equip(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), old, grid=(3, 5)).eval()
frames = equip(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), new, grid=(4, 3, 5)).eval()
frames.load_state_dict(convert_tables(image.state_dict(), old, new))
x = torch.randn(2, 3 * 5, 32)
torch.testing.assert_close(frames(x.repeat(1, 4, 1)), image(x).repeat(1, 4, 1))  # a video of four equal frames
