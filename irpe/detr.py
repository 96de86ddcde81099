"""DETR-R50 with iRPE in the encoder: released checkpoints as transformers' `DetrForObjectDetection`.

>>> model = detr_r50("rpe-2.0-product-ctx-1-k", checkpoint="rpe-2.0-product-ctx-1-k.pth")

The addresses of the checkpoints are in `RELEASED_DETRS`.
"""

import argparse
import os
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .equip import equip
from .irpe import RPEConfig


class ReleasedDETR(NamedTuple):
    """A checkpoint of the release: encodings, epochs of training, AP on COCO val2017, address."""

    config: str
    epochs: int
    ap: float
    url: str


_ZOO = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"

RELEASED_DETRS: dict[str, ReleasedDETR] = {
    "rpe-1.9-product-ctx-1-k": ReleasedDETR(
        "rpe-1.9-product-ctx-1-k", 150, 0.409, _ZOO + "rpe-1.9-product-ctx-1-k.pth"
    ),
    "rpe-2.0-product-ctx-1-k": ReleasedDETR(
        "rpe-2.0-product-ctx-1-k", 150, 0.410, _ZOO + "rpe-2.0-product-ctx-1-k.pth"
    ),
    "rpe-2.0-product-ctx-1-k (300 epochs)": ReleasedDETR(
        "rpe-2.0-product-ctx-1-k", 300, 0.422, _ZOO + "rpe-2.0-product-ctx-1-k_300epochs.pth"
    ),
}

_ENCODER = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_DECODER = {
    "norm1": "self_attn_layer_norm",
    "multihead_attn": "encoder_attn",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
}
_LAYER = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "self_attn": "self_attn"}
_OUTSIDE = {
    "transformer.decoder.norm": "model.decoder.layernorm",
    "class_embed": "class_labels_classifier",
    "bbox_embed": "bbox_predictor",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_projection",
    "backbone.0.body": "model.backbone.model",
}


def detr_state_dict(state_dict: dict[str, Tensor], *, timm_backbone: bool = True) -> dict[str, Tensor]:
    """A state dict of the release's (or the original) DETR under the names of transformers' `DetrForObjectDetection`.

    `transformer.encoder.layers.0.self_attn.rpe_k.lookup_table_weight` becomes
    `model.encoder.layers.0.self_attn.rpe_k.lookup_table_weight`; each `in_proj_weight` (3E, E) is cut into those of
    `q_proj`, `k_proj` and `v_proj`, (E, E) each; all other tensors are the same objects under new names. Equal weights
    give equal outputs: nothing is transposed or scaled.

    Args:
        state_dict: what the checkpoint has under "model"; left as it is.
        timm_backbone: True for a `DetrConfig` with a timm backbone, which is transformers' own choice; False for one
            with transformers' ResNet.

    Raises:
        ValueError: a key that a DETR with a ResNet does not have, or an in-projection that is no multiple of three.
    """
    if set(state_dict) >= {"model"}:
        raise ValueError('this is a checkpoint; its state dict is under "model": pass checkpoint["model"]')
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"(.+\.)in_proj_(weight|bias)", key):
            if value.shape[0] % 3:
                raise ValueError(f"{key} has shape {tuple(value.shape)}; expected q, k and v, of equal sizes, in it")
            prefix = _rename(match[1] + "out_proj", timm_backbone).removesuffix("o_proj")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                # copies, so that files hold each number once
                renamed[f"{prefix}{name}_proj.{match[2]}"] = part.clone()
        else:
            renamed[_rename(key, timm_backbone)] = value
    return renamed


def _rename(key: str, timm_backbone: bool) -> str:
    if match := re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", key):
        side, number, part, rest = match.groups()
        names = _LAYER | (_ENCODER if side == "encoder" else _DECODER)
        if part in names:
            return f"model.{side}.layers.{number}.{names[part]}.{re.sub('^out_proj', 'o_proj', rest)}"
    for old, new in _OUTSIDE.items():
        if key.startswith(old + "."):
            rest = key.removeprefix(old + ".")
            if not timm_backbone and old.startswith("backbone"):
                rest = _rename_resnet(key, rest)
            return f"{new}.{rest}"
    raise ValueError(f"the key {key!r} is not one of a DETR with a ResNet, so it has no name in transformers' DETR")


def _rename_resnet(key: str, name: str) -> str:
    """torchvision's and timm's name of a ResNet's parameter in transformers' ResNet."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kinds[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(?:downsample\.([01])|(conv|bn)([1-3]))\.(\w+)", name):
        stage, layer, shortcut, kind, number, rest = match.groups()
        part = "shortcut" if shortcut else f"layer.{int(number) - 1}"
        return f"encoder.stages.{int(stage) - 1}.layers.{layer}.{part}.{kinds[shortcut or kind]}.{rest}"
    raise ValueError(f"the key {key!r} is not one of a ResNet-50")


def detr_r50(
    config: RPEConfig | str | None = "rpe-2.0-product-ctx-1-k",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """transformers' DETR-R50 for COCO's 91 classes, iRPE in its encoder, frozen where the release froze it.

    >>> model = detr_r50("rpe-2.0-product-ctx-1-k")     # 41,540,320 parameters, 41,317,920 of them are trained

    Nothing is downloaded. As in the release, the stem and the first stage of the ResNet get no gradients (transformers
    5.18 freezes nothing of a timm backbone, and all of its own ResNet).

    Args:
        config: from `get_rpe_config`, its string form, or None for the plain DETR.
        checkpoint: a file of the release (or of the original DETR, with `config=None`), loaded strictly. It is read as
            tensors and plain containers alone, so one with code in it is refused by `torch.load`.
        options: for `transformers.DetrConfig`, such as `num_labels`, `dropout` or `auxiliary_loss`.
    """
    from transformers import DetrConfig, DetrForObjectDetection

    model = DetrForObjectDetection(DetrConfig(**{"num_labels": 91, **options}))
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(re.search(r"\b(layer[234]|stages\.[123])\.", name) is not None)
    if config is not None:
        equip(model, config)
    if checkpoint is not None:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DETR keeps the arguments of its training there
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
        timm_backbone = getattr(model.config.backbone_config, "model_type", None) == "timm_backbone"
        renamed = detr_state_dict(loaded.get("model", loaded), timm_backbone=timm_backbone)
        model.load_state_dict(renamed, strict=True)
    return model
