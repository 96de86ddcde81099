"""iRPE in a model of transformers: equip, train, save, and one call that loads it again."""

import torch
from transformers import ViTConfig, ViTForImageClassification

from irpe import digits, equip, load, save

torch.manual_seed(0)
config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
)  # fmt: skip
model = equip(ViTForImageClassification(config), "rpe-1.9-product-ctx-1-qkv").train()

train = digits.splits()["train"]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(80):
    batch = torch.randint(len(train.labels), (64,))
    loss = model(pixel_values=(train.images[batch] - 0.3) / 0.38, labels=train.labels[batch]).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 8 == 7:
        print(f"step {step:2}  loss {loss:.2f}")

save(model.eval(), "vit-with-irpe")  # or model.save_pretrained; transformers' own loaders refuse what either writes
again = load("vit-with-irpe")
image = torch.rand(1, 1, 8, 12)  # not square, and not the size of training
logits = [one(pixel_values=image, interpolate_pos_encoding=True).logits for one in (model, again)]
torch.testing.assert_close(*logits)
