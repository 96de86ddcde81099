"""Models whose weights are elsewhere until a module is called: what accelerate's offloading makes of equipped ones."""

import pytest
import torch
from torch import nn

from irpe import RPEMultiheadAttention
from irpe.equip import equip

accelerate = pytest.importorskip("accelerate")

QKV = "rpe-1.9-product-ctx-0-qkv"


def timm_vit(config=QKV):
    timm = pytest.importorskip("timm")
    options = dict(img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return equip(timm.models.VisionTransformer(**options), config), torch.randn(2, 3, 8, 12)


def timm_swin():
    timm = pytest.importorskip("timm")
    options = dict(img_size=(16, 24), patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 3), window_size=(4, 3))
    return equip(timm.models.SwinTransformer(**options), QKV), torch.randn(2, 3, 16, 24)


def hf_vit():
    transformers = pytest.importorskip("transformers", minversion="5.18")
    settings = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)
    config = transformers.ViTConfig(**settings, image_size=(8, 12), patch_size=4)
    return equip(transformers.ViTForImageClassification(config), QKV), torch.randn(2, 3, 8, 12)


def in_torch():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = RPEMultiheadAttention(24, 3, batch_first=True, rpe_config=QKV)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False, hw=(2, 3))[0]

    return Block(), torch.randn(2, 6, 24)


MODELS = {
    "vit": timm_vit,
    "vit cross": lambda: timm_vit("rpe-20-cross-bias-1-qk"),
    "swin": timm_swin,
    "transformers": hf_vit,
    "torch": in_torch,
}


def make(name):
    model, x = MODELS[name]()
    for key, one in model.named_parameters():
        if "lookup_table" in key:
            nn.init.normal_(one)
    return model.eval(), x


def output(model, x):
    out = model(x)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_offloaded(tmp_path, name, how):
    model, x = make(name)
    expected = output(model, x).detach()
    # torch's attention reads the weights of its projection beside its own: its class is loaded as a whole
    whole = dict(preload_module_classes=["RPEMultiheadAttention"])
    if how == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"), **whole)
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"), **whole)
    assert all(table.is_meta for key, table in model.named_parameters() if "lookup_table" in key)
    torch.testing.assert_close(output(model, x).detach(), expected)
    accelerate.hooks.remove_hook_from_submodules(model)


def test_a_device_map_with_disk(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.18")
    from irpe.integrations.hf_vit import from_pretrained

    model, x = make("transformers")
    expected = output(model, x).detach()
    model.save_pretrained(tmp_path / "saved")
    where = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    loaded = from_pretrained(
        transformers.ViTForImageClassification, tmp_path / "saved", device_map=where, offload_folder=tmp_path / "disk"
    )
    assert all(table.is_meta for key, table in loaded.named_parameters() if "lookup_table" in key)
    torch.testing.assert_close(output(loaded, x).detach(), expected)
