"""Released DETRs under transformers' names: every key once, the same shapes, the same outputs."""

import argparse
import json
import math
import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, load_golden, relative_error
from torch import nn

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("timm")

from transformers import DetrConfig, DetrForObjectDetection  # noqa: E402

from irpe import build_rpe, equip, get_rpe_config, rpe_attention, rpe_config_from_string  # noqa: E402
from irpe.detr import RELEASED_DETRS, detr_r50, detr_state_dict  # noqa: E402

RELEASED = json.loads((GOLDEN / "published_detr.json").read_text())
RPE = "rpe-2.0-product-ctx-1-k"
TINY = dict(dim=32, heads=2, ffn=48, layers=2, queries=5, classes=6)
BACKBONES = {
    True: {},
    False: dict(use_timm_backbone=False, backbone_config=dict(model_type="resnet", out_features=["stage4"])),
}


# DETR as its paper has it, with the released names, from plain torch and the pieces of this project


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, config):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * dim, dim)),
            nn.Parameter(torch.empty(3 * dim)),
        )
        self.out_proj = nn.Linear(dim, dim)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(config, dim // heads, heads)

    def forward(self, query_key, value, height, width, padding):
        inputs = (query_key, query_key, value)
        rows = zip(inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, w, b in rows)
        out = rpe_attention(
            q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height=height, width=width,
            attn_mask=~padding[:, None, None, :], backend="eager",
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn, config):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, config)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, pos, height, width, padding):
        x = self.norm1(x + self.self_attn(x + pos, x, height, width, padding))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, queries, memory, pos, padding):
        x = self.norm1(x + self.self_attn(x + queries, x + queries, x, need_weights=False)[0])
        across = self.multihead_attn(x + queries, memory + pos, memory, key_padding_mask=padding, need_weights=False)
        x = self.norm2(x + across[0])
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


def container(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class DETR(nn.Module):
    def __init__(self, dim, heads, ffn, layers, queries, classes, config):
        super().__init__()
        encoder = nn.ModuleList(EncoderLayer(dim, heads, ffn, config) for _ in range(layers))
        decoder = nn.ModuleList(DecoderLayer(dim, heads, ffn) for _ in range(layers))
        self.transformer = container(
            encoder=container(layers=encoder), decoder=container(layers=decoder, norm=nn.LayerNorm(dim))
        )
        self.class_embed = nn.Linear(dim, classes + 1)
        self.bbox_embed = container(layers=nn.ModuleList([nn.Linear(dim, n) for n in (dim, dim, 4)]))
        self.query_embed = nn.Embedding(queries, dim)
        self.input_proj = nn.Conv2d(2048, dim, 1)
        body = torchvision.models.resnet50(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d)
        del body.avgpool, body.fc
        self.backbone = nn.ModuleList([container(body=body)])

    def features(self, image):
        body = self.backbone[0].body
        x = body.maxpool(body.relu(body.bn1(body.conv1(image))))
        return body.layer4(body.layer3(body.layer2(body.layer1(x))))

    def encode(self, x, pos, height, width, padding):
        for layer in self.transformer.encoder.layers:
            x = layer(x, pos, height, width, padding)
        return x

    def forward(self, image, valid):
        x = self.input_proj(self.features(image))
        height, width = x.shape[-2:]
        padding = ~F.interpolate(valid[None].float(), size=(height, width))[0].bool()
        pos = sine_positions(padding, x.shape[1]).to(x.dtype)
        padding = padding.flatten(1)
        x = self.encode(x.flatten(2).mT, pos, height, width, padding)
        queries = self.query_embed.weight.expand(len(image), -1, -1)
        y = torch.zeros_like(queries)
        for layer in self.transformer.decoder.layers:
            y = layer(y, queries, x, pos, padding)
        y = self.transformer.decoder.norm(y)
        first, second, third = self.bbox_embed.layers
        return self.class_embed(y), third(second(first(y).relu()).relu()).sigmoid()


def sine_positions(padding, dim):
    """(B, h*w, dim): sines and cosines of the row, then of the column, each counted over what is no padding."""
    halves = []
    for axis in (1, 2):
        place = (~padding).cumsum(axis).double()
        place = 2 * math.pi * place / (place.select(axis, -1).unsqueeze(axis) + 1e-6)
        wave = 10000 ** (2 * (torch.arange(dim // 2) // 2).double() / (dim // 2))
        angle = place[..., None] / wave
        halves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(halves, -1).flatten(1, 2)


def reference(config=RPE, tables=True, **sizes):
    model = DETR(**{**TINY, **sizes}, config=config and rpe_config_from_string(config)).double().eval()
    with torch.no_grad():
        for name, one in model.state_dict().items():
            if "lookup_table" in name:
                one.normal_() if tables else one.zero_()
            elif name.endswith("running_var"):
                one.uniform_(0.5, 2)
            elif one.dim() == 1:
                one.normal_(1.0 if re.search(r"(norm|bn|downsample\.1)\d?\.weight", name) else 0.0, 0.1)
            elif "in_proj" in name or "query_embed" in name:
                one.normal_(0, 0.3)
    return model


def tiny_config(timm_backbone=True):
    sizes = TINY
    return dict(
        d_model=sizes["dim"], encoder_layers=sizes["layers"], decoder_layers=sizes["layers"],
        encoder_attention_heads=sizes["heads"], decoder_attention_heads=sizes["heads"],
        encoder_ffn_dim=sizes["ffn"], decoder_ffn_dim=sizes["ffn"], num_queries=sizes["queries"],
        num_labels=sizes["classes"], **BACKBONES[timm_backbone],
    )  # fmt: skip


def tiny_detr(timm_backbone=True):
    return DetrForObjectDetection(DetrConfig(**tiny_config(timm_backbone))).double().eval()


def equipped(model, config):
    try:
        return equip(model, config)
    except TypeError as error:
        pytest.skip(f"equip does not know DETR here: {error}")


class Harm:
    """Unpickled as code that leaves a folder behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# names


@pytest.fixture(scope="module")
def full_size():
    """The released DETR's names and shapes, all layers, on the meta device."""
    with torch.device("meta"):
        model = DETR(dim=256, heads=8, ffn=2048, layers=6, queries=100, classes=91, config=get_rpe_config(2.0))
    return model.state_dict()


def test_the_reference_has_the_released_names_and_shapes(full_size):
    stem = re.compile(r"\.(layers|layer[1-4])\.\d+\.")
    shapes = {key: list(value.shape) for key, value in full_size.items()}
    assert {key: shapes[key] for key in RELEASED["state_dict"]} == RELEASED["state_dict"]
    # layer 0 stands for all layers, and layer1.0 for the stages of the ResNet
    kinds = {stem.sub(r".\1.0.", key) for key in RELEASED["state_dict"]}
    kinds = {re.sub(r"layer[1-4]\.", "layer1.", key) for key in kinds}
    assert {re.sub(r"layer[1-4]\.", "layer1.", stem.sub(r".\1.0.", key)) for key in shapes} == kinds
    with_gradients = [value for key, value in full_size.items() if not re.search(r"(bn\d|downsample\.1)\.", key)]
    assert sum(one.numel() for one in with_gradients) == RELEASED["params"]


@pytest.mark.parametrize("timm_backbone", [True, False], ids=["timm", "transformers' ResNet"])
def test_every_key_has_one_place(full_size, timm_backbone):
    with torch.device("meta"):
        model = DetrForObjectDetection(DetrConfig(num_labels=91, **BACKBONES[timm_backbone]))
    expected = {key: value.shape for key, value in model.state_dict().items()}
    renamed = {key: value.shape for key, value in detr_state_dict(full_size, timm_backbone=timm_backbone).items()}
    cuts = sum("in_proj" in key for key in full_size)
    assert len(renamed) == len(full_size) + 2 * cuts  # nothing overwritten
    tables = {f"model.encoder.layers.{n}.self_attn.rpe_k.lookup_table_weight": (1, 32, 81) for n in range(6)}
    assert renamed == expected | tables


def test_tables_of_every_kind_keep_their_names():
    for config in ("rpe-20-cross-ctx-0-qkv", "rpe-2.0-product-bias-0-qk"):
        with torch.device("meta"):
            state = DETR(**TINY, config=rpe_config_from_string(config)).state_dict()
        tables = {key.replace("transformer", "model") for key in state if "lookup_table" in key}
        assert {key for key in detr_state_dict(state) if "lookup_table" in key} == tables and tables


def test_in_projection_is_cut_in_order_and_the_input_is_left_alone():
    state = reference().state_dict()
    before = {key: value.clone() for key, value in state.items()}
    renamed = detr_state_dict(state)
    for key, whole in state.items():
        assert torch.equal(whole, before[key])
        if "in_proj_weight" in key:
            prefix = key.replace("transformer", "model").replace("multihead_attn", "encoder_attn")
            parts = [renamed[prefix.replace("in_proj_", f"{name}_proj.")] for name in "qkv"]
            assert torch.equal(torch.cat(parts), whole)
            assert all(one.untyped_storage().nbytes() == one.nbytes for one in parts)


def test_refused():
    state = reference().state_dict()
    with pytest.raises(ValueError, match=r"checkpoint\[.model.\]"):
        detr_state_dict({"model": state, "epoch": 3})
    for key in ("transformer.encoder.norm.weight", "transformer.encoder.layers.0.norm3.weight", "mask_head.lay1.bias"):
        with pytest.raises(ValueError, match=f"{key}.*not one of a DETR"):
            detr_state_dict({**state, key: torch.zeros(1)})
    with pytest.raises(ValueError, match="not one of a ResNet-50"):
        detr_state_dict({"backbone.0.body.fc.weight": torch.zeros(1)}, timm_backbone=False)
    key = "transformer.encoder.layers.0.self_attn.in_proj_weight"
    with pytest.raises(ValueError, match=r"\(64, 32\); expected q, k and v"):
        detr_state_dict({key: torch.zeros(64, 32)})


# numbers


@pytest.mark.parametrize("golden", ["product_k", "product_qkv"])
def test_the_reference_attention_is_the_released_one(golden):
    arrays, meta = load_golden(f"detr_attention_{golden}")
    attention = SelfAttention(meta["embed_dim"], meta["num_heads"], rpe_config_from_string(meta["enc_rpe2d"])).double()
    state = {key.removeprefix("state/"): torch.tensor(a) for key, a in arrays.items() if key.startswith("state/")}
    attention.load_state_dict(state, strict=True)
    inputs = (torch.tensor(arrays[name]).double().transpose(0, 1) for name in ("query_key", "value"))
    out = attention(*inputs, meta["height"], meta["width"], torch.tensor(arrays["key_padding_mask"]).bool())
    assert relative_error(out.transpose(0, 1), arrays["output"]) < 1e-9


IMAGE, VALID = (2, 3, 128, 192), torch.ones(2, 128, 192, dtype=torch.long)  # a map of 4 x 6 tokens
VALID[1, :, 130:] = 0
VALID[1, 70:] = 0


@pytest.mark.parametrize("timm_backbone", [True, False], ids=["timm", "transformers' ResNet"])
def test_outputs_without_tables(timm_backbone):
    """Backbone, encoder, decoder and heads, with padding: the whole model, for a plain DETR."""
    model, ours = reference(config=None), tiny_detr(timm_backbone)
    ours.load_state_dict(detr_state_dict(model.state_dict(), timm_backbone=timm_backbone), strict=True)
    image = torch.randn(*IMAGE, dtype=torch.float64)
    with torch.no_grad():
        logits, boxes = model(image, VALID)
        out = ours(pixel_values=image, pixel_mask=VALID)
        assert logits.std() > 0.1
    # transformers counts positions in the dtype of the image, so they are in float64 on both sides
    assert (out.logits - logits).abs().max() <= 1e-12 * logits.abs().max()
    assert (out.pred_boxes - boxes).abs().max() <= 1e-12


def test_encoder_with_zero_tables():
    """The released encoder, its tables at zero, in transformers' DetrEncoder."""
    model, ours = reference(tables=False), tiny_detr()
    renamed = detr_state_dict(model.state_dict())
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert not missing and all("rpe_k" in key for key in unexpected) and len(unexpected) == TINY["layers"]
    assert all((renamed[key] == 0).all() for key in unexpected)
    x, pos = torch.randn(2, 2, 4 * 6, TINY["dim"], dtype=torch.float64)
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1, 15:] = True
    with torch.no_grad():
        expected = model.encode(x, pos, 4, 6, padding)
        out = ours.model.encoder(inputs_embeds=x, attention_mask=~padding, spatial_position_embeddings=pos)
    assert (out.last_hidden_state - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "config", [RPE, "rpe-1.9-product-ctx-0-qkv", "rpe-20-cross-ctx-1-k", "rpe-2.0-product-bias-0-qk"]
)
def test_outputs_with_tables(config):
    """The whole released model, with random tables."""
    model, ours = reference(config), equipped(tiny_detr(), config)
    ours.load_state_dict(detr_state_dict(model.state_dict()), strict=True)
    image = torch.randn(*IMAGE, dtype=torch.float64)
    with torch.no_grad():
        logits, boxes = model(image, VALID)
        out = ours(pixel_values=image, pixel_mask=VALID)
        without = reference(None)
        without.load_state_dict({k: v for k, v in model.state_dict().items() if "rpe_" not in k}, strict=True)
        assert (without(image, VALID)[0] - logits).abs().max() > 1e-3  # the tables matter
    assert (out.logits - logits).abs().max() <= 1e-12 * logits.abs().max()
    assert (out.pred_boxes - boxes).abs().max() <= 1e-12


# the builder


def test_detr_r50_without_iRPE():
    with torch.device("meta"):
        model = detr_r50(None)
    assert sum(one.numel() for one in model.parameters()) == RELEASED["params"] - 6 * 32 * 81
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert trained == RELEASED["trainable"] - 6 * 32 * 81
    assert model.config.num_labels == 91


@pytest.mark.parametrize("timm_backbone", [True, False], ids=["timm", "transformers' ResNet"])
def test_checkpoint_of_a_plain_detr(timm_backbone, tmp_path):
    """As DETR's training writes it, arguments and all."""
    reference_model = reference(config=None)
    args = argparse.Namespace(lr=1e-4, backbone="resnet50")
    torch.save({"model": reference_model.float().state_dict(), "epoch": 3, "args": args}, tmp_path / "detr.pth")
    model = detr_r50(None, checkpoint=tmp_path / "detr.pth", **tiny_config(timm_backbone))
    expected = detr_state_dict(reference_model.state_dict(), timm_backbone=timm_backbone)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    stem = r"backbone\.model\.(layer1|conv1)\." if timm_backbone else r"stages\.0\.|embedder"
    assert frozen == {key for key, _ in model.named_parameters() if re.search(stem, key)}
    torch.save({"model": {"query_embed.weight": torch.zeros(5, 32)}}, tmp_path / "part.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        detr_r50(None, checkpoint=tmp_path / "part.pth", **tiny_config(timm_backbone))


def test_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"model": {}, "args": Harm(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        detr_r50(None, checkpoint=tmp_path / "bad.pth", **tiny_config())
    assert not (tmp_path / "ran").exists()


def test_checkpoint_with_tables(tmp_path):
    reference_model = reference()
    torch.save({"model": reference_model.float().state_dict()}, tmp_path / "detr.pth")
    equipped(tiny_detr(), RPE)
    model = detr_r50(RPE, checkpoint=tmp_path / "detr.pth", **tiny_config())
    for number, layer in enumerate(reference_model.transformer.encoder.layers):
        assert torch.equal(model.model.encoder.layers[number].self_attn.rpe_k.table, layer.self_attn.rpe_k.table)


def test_detr_r50_is_the_released_one(full_size):
    with torch.device("meta"):
        model = detr_r50(None)
        equipped(model, RPE)
        model = detr_r50()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in detr_state_dict(full_size).items()}
    assert sum(one.numel() for one in model.parameters()) == RELEASED["params"]
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == RELEASED["trainable"]


def test_table_of_released_detrs():
    assert RELEASED_DETRS.keys() == RELEASED["published"].keys()
    for name, one in RELEASED["published"].items():
        ours = RELEASED_DETRS[name]
        assert (ours.epochs, ours.ap, ours.url) == (one["epochs"], one["AP"], one["url"])
        assert name.startswith(ours.config)
