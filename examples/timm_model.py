"""iRPE in a model of timm: equip, train the tables with a learning rate of their own, save, load."""

import timm
import torch
from safetensors.torch import load_file, save_file

from irpe import digits, equip, rpe_parameters

SMALL = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, dynamic_img_size=True)


def build():
    return equip(timm.create_model("vit_tiny_patch16_224", **SMALL), "rpe-1.9-product-ctx-1-qkv")


torch.manual_seed(0)
train = digits.splits()["train"]
model = build()
tables = rpe_parameters(model, lr=1e-2)
rest = [p for name, p in model.named_parameters() if "lookup_table" not in name]
optimizer = torch.optim.AdamW([tables, {"params": rest}], lr=3e-3)
for step in range(80):
    batch = torch.randint(len(train.labels), (64,))
    loss = torch.nn.functional.cross_entropy(model((train.images[batch] - 0.3) / 0.38), train.labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 8 == 7:
        print(f"step {step:2}  loss {loss:.2f}")

save_file(model.state_dict(), "model.safetensors")
again = build()
again.load_state_dict(load_file("model.safetensors"))
wide = torch.rand(1, 1, 8, 12)  # another size and shape: the encodings mean the same offsets
torch.testing.assert_close(again.eval()(wide), model.eval()(wide))
