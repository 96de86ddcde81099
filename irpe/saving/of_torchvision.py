"""torchvision's VisionTransformer in a folder: its arguments, its encodings, its weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .common import CONFIG, NOTE, WEIGHTS, check_same, fill, preprocessing_of, with_classifier

_VIT = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")


def save_torchvision(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    from ..integrations.timm_record import entries_of
    from ..integrations.torch_mha import ADAPTER
    from ..runs.files import write_json
    from ..runs.tensors import write_weights

    layers = list(model.encoder.layers)
    arguments = {name: getattr(model, name) for name in _VIT}
    arguments |= {"num_layers": len(layers), "num_heads": layers[0].num_heads}
    config = {"arguments": arguments, "irpe": entries_of(ADAPTER.attentions(model))}
    write_json(folder / CONFIG, config)
    with torch.device("meta"):
        again = _build_torchvision(config)
    check_same(model, again)
    write_weights(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    preprocessing = preprocessing_of(processor)
    return {"preprocessing": None if preprocessing is None else asdict(preprocessing)}


def _build_torchvision(config: dict[str, Any]) -> Any:
    from torchvision.models import VisionTransformer

    from ..config_io import rpe_config_from_dict
    from ..equip import equip

    model = VisionTransformer(**config["arguments"])
    for entry in config["irpe"]:
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    return model


def load_torchvision(folder: Path, config: dict[str, Any], note: dict[str, Any]) -> Any:
    from ..prediction import Preprocessing

    model = _build_torchvision(config)
    fill(model, folder)
    values = note.get("preprocessing")
    preprocessing = None if values is None else Preprocessing.from_dict(values, folder / NOTE)
    return with_classifier(model, note.get("classes"), preprocessing, model.num_classes)
