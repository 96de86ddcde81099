"""Models of timm in a folder: the config.json that timm writes, with what `equip` has recorded in it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .common import CONFIG, WEIGHTS, check_same, fill, preprocessing_of, with_classifier

_SHAPE = {
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes"),
    *("first_conv", "classifier", "pool_size"),
}


def save_timm(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    from timm.models._hub import save_config_for_hf

    from ..runs.files import read_json, write_json
    from ..runs.tensors import write_weights

    data: dict[str, Any] = {}
    preprocessing = preprocessing_of(processor)
    if preprocessing is not None:
        channels = len(preprocessing.mean)
        data = {**asdict(preprocessing), "input_size": (channels, *preprocessing.size)}
        del data["size"]
    config = {"label_names": classes} if classes else None
    file = folder / CONFIG
    save_config_for_hf(model, str(file), model_config=config, data_config=data)
    values = read_json(file)
    arguments = values.get("model_args") or {}
    for name in [key for key in arguments if key.startswith("pretrained")]:
        del arguments[name]  # how weights were read once
        write_json(file, values)
    try:
        with torch.device("meta"):
            again = _build_timm(values)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm could not build this model again: {error}") from None
    check_same(model, again)
    write_weights(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    return {"preprocessing": None if preprocessing is None else asdict(preprocessing)}


def _build_timm(config: dict[str, Any]) -> Any:
    """The model of timm's config.json, equipped, with random weights."""
    import timm

    from .. import models  # noqa: F401 - the released DeiTs are models of timm then
    from ..config_io import rpe_config_from_dict
    from ..equip import equip
    from ..integrations.timm_record import RECORD
    from ..runs.elsewhere import is_of_timm, loading_arguments

    name, arguments = config["architecture"], dict(config.get("model_args") or {})
    entries = arguments.pop(RECORD, [])
    if not is_of_timm(name):
        raise ValueError(f"timm has no model {name!r}, or this version of it has not")
    if strange := loading_arguments(arguments):
        raise ValueError(f"model_args has {', '.join(strange)}; what a file names is neither fetched nor read")
    shape = {key: value for key, value in (config.get("pretrained_cfg") or {}).items() if key in _SHAPE}
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}
    model = timm.create_model(name, pretrained=False, pretrained_cfg={"architecture": name, **shape}, **arguments)
    for entry in entries:
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    return model


def load_timm(folder: Path, config: dict[str, Any], note: dict[str, Any]) -> Any:
    from timm.data import resolve_model_data_config

    from ..prediction import Preprocessing
    from ..train.loader import evaluated

    model = _build_timm(config)
    fill(model, folder)
    data = resolve_model_data_config(model)
    values = {"size": data["input_size"][1:], **{key: data[key] for key in ("mean", "std", "crop_pct", "crop_mode")}}
    values["interpolation"] = evaluated(str(data["interpolation"]))
    said = note.get("preprocessing")
    # pictures have one channel or three: images of another number are made by whoever has them
    known = said is not None or data["input_size"][0] in (1, 3)
    preprocessing = Preprocessing.from_dict(said or values, folder / CONFIG) if known else None
    names = config.get("label_names") or note.get("classes")
    return with_classifier(model, names, preprocessing, model.num_classes)
