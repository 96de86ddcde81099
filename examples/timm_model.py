"""iRPE in a model of timm: equip, train the tables with a learning rate of their own, save, load."""

import timm
import torch
from safetensors.torch import load_file, save_file

from irpe import digits, equip, rpe_parameters


def build():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, depth=2, dynamic_img_size=True
    )
    return equip(model, "rpe-1.9-product-ctx-1-qkv")


torch.manual_seed(0)
train = digits.splits()["train"]
model = build()
tables = rpe_parameters(model, lr=1e-2)
rest = [p for name, p in model.named_parameters() if "lookup_table" not in name]
optimizer = torch.optim.AdamW([tables, {"params": rest}], lr=1e-3)
for step, batch in enumerate(torch.randperm(len(train.labels)).split(64)[:12]):
    loss = torch.nn.functional.cross_entropy(model(train.images[batch]), train.labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step:2}  loss {loss:.2f}")

save_file(model.state_dict(), "model.safetensors")
again = build()
again.load_state_dict(load_file("model.safetensors"))
wide = torch.rand(1, 1, 8, 12)  # another size and shape: the encodings mean the same offsets
assert torch.equal(again.eval()(wide), model.eval()(wide))
