"""irpe.save(model, folder) and irpe.load(folder): models with iRPE on a disk, of timm, transformers and torchvision.

Nothing in a folder is run, and nothing that its files name is fetched: tensors, JSON, and names of classes and models
that are looked up in the libraries.
"""

import importlib
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._version import __version__

NOTE = "irpe.json"  # beside config.json: which library, and how pictures are prepared
CONFIG, WEIGHTS, SETTINGS = "config.json", "model.safetensors", "settings.json"
_HUB_FILES = (CONFIG, NOTE, "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "README.md")
_VIT = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")


def save(model: nn.Module, folder: str | Path, *, classes: list[str] | None = None, processor: Any = None) -> Path:
    """Writes a model with iRPE into a folder, from which `irpe.load` gives it back.

    >>> irpe.save(model, "my-model")
    >>> model = irpe.load("my-model")

    The loaders of timm and transformers refuse the folder, instead of leaving the encodings out.

    Args:
        model: of timm (made by `timm.create_model`), of transformers, or torchvision's `VisionTransformer`, equipped or
            not, on any device.
        folder: a new or an empty one, or one that `save` has written.
        classes: names, in the order of the outputs; those that are known of models that `irpe.load` gave.
        processor: how pictures are prepared, for `predict`: an image processor of transformers, the `transforms()` of
            torchvision's weights, or an `irpe.prediction.Preprocessing`. timm's models know it themselves.

    Returns:
        The folder.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the folder holds something else; or the model was changed so that its own library could not build it
            again (layers taken out or added by hand).
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    library = _library(model)
    _check_place(folder)
    own = getattr(model, "predict", None)
    if classes is None:
        classes = list(getattr(own, "classes", None) or [])
    if processor is None:
        processor = getattr(own, "processor", None) or getattr(own, "preprocessing", None)
    writers = {"timm": _save_timm, "transformers": _save_transformers, "torchvision": _save_torchvision}
    folder.mkdir(parents=True, exist_ok=True)
    more = writers[library](model, folder, classes, processor)
    from .train.files import write_json

    note = {"library": library, "classes": classes, "versions": {"irpe": __version__, "torch": torch.__version__}}
    write_json(folder / NOTE, note | more)
    return folder


def load(source: str | Path, *, weights: str = "best") -> Any:
    """The model of a folder, of a run, of an exported file, or of a name on the hub, in evaluation mode, on the CPU.

    >>> model = irpe.load("runs/NAME")
    >>> model.predict("cat.jpg")

    Args:
        source: a folder of `irpe.save` or of `save_pretrained`; the folder of a run of `irpe train` or `irpe detect`; a
            file of `irpe export` that ends in .onnx, with its JSON beside it; or a name on the hub, such as
            "user/name" or "user/name@revision", where nothing of that name is here.
        weights: which of a run's: best, last or, of `irpe train`, ema.

    Returns:
        The model of timm, transformers or torchvision, with its tables, and with `predict`, see `irpe.prediction`.

    Raises:
        ValueError: there is no such model, files are damaged or of another kind, or they name code or what would be
            fetched.
    """
    from .train.files import read_json

    path = Path(source)
    if path.suffix == ".onnx":
        from .exported import load_onnx

        return load_onnx(path)
    if not path.exists():
        return load(_fetched(str(source)), weights=weights)
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected the folder of a model or of a run, or an .onnx file")
    if (path / SETTINGS).exists():
        return _run(path, read_json(path / SETTINGS), weights)
    if not (path / CONFIG).exists():
        raise ValueError(
            f"{path} has neither {CONFIG} nor {SETTINGS}; expected what irpe.save or save_pretrained wrote, or the "
            "folder of a run"
        )
    config, note = read_json(path / CONFIG), read_json(path / NOTE) if (path / NOTE).exists() else {}
    if not isinstance(config, dict) or not isinstance(note, dict):
        raise ValueError(f"{path / CONFIG} holds no settings; expected those of a model")
    try:
        if note.get("library") == "torchvision":
            return _load_torchvision(path, config, note)
        if "model_type" in config or "architectures" in config:
            return _load_transformers(path, config)
        if "architecture" in config:
            return _load_timm(path, config, note)
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {type(error).__name__} {error}"[:500]) from None
    raise ValueError(f"{path / CONFIG} is of no model of timm, transformers or torchvision")


def _library(model: Any) -> str:
    """Which library can build the model again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    names = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        return "transformers"
    if "timm" in names and "pretrained_cfg" in vars(model):
        return "timm"
    if "torchvision" in names and type(model).__name__ == "VisionTransformer":
        return "torchvision"
    remedy = "made by timm.create_model" if "timm" in names else "save a model of your own by its state_dict()"
    raise TypeError(
        f"model is a {type(model).__module__}.{type(model).__name__}; expected a model of timm, of transformers, or "
        f"torchvision's VisionTransformer ({remedy})"
    )


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NOTE).is_file():
        raise ValueError(f"{folder} holds files that irpe.save has not written; name a new folder")


def _save_timm(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    from timm.models._hub import save_config_for_hf

    from .train.tensors import write_weights

    data: dict[str, Any] = {}
    preprocessing = _preprocessing(processor)
    if preprocessing is not None:
        channels = len(preprocessing.mean)
        data = {**asdict(preprocessing), "input_size": (channels, *preprocessing.size)}
        del data["size"]
    config = {"label_names": classes} if classes else None
    file = folder / CONFIG
    save_config_for_hf(model, str(file), model_config=config, data_config=data)
    try:
        with torch.device("meta"):
            again = _build_timm(_plain(file))
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        file.unlink()
        raise ValueError(f"timm could not build this model again: {error}") from None
    _check_same(model, again, file)
    write_weights(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    return {"preprocessing": None if preprocessing is None else asdict(preprocessing)}


def _plain(file: Path) -> dict[str, Any]:
    from .train.files import read_json

    values: dict[str, Any] = read_json(file)
    return values


def _check_same(model: nn.Module, again: nn.Module, file: Path) -> None:
    """Refuses a model that is not what its configuration builds, and takes the configuration away again."""
    own, other = ({name: one.shape for name, one in part.state_dict().items()} for part in (model, again))
    if own != other:
        file.unlink()
        strange = sorted({name for name, _ in set(own.items()) ^ set(other.items())})
        raise ValueError(
            f"the model was changed after it was built: its own library would build it with other {strange[0]}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; save such a model by its state_dict()"
        )


# arguments of timm.create_model that fetch or read what they name
_FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
_SHAPE = {
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes"),
    *("first_conv", "classifier", "pool_size"),
}


def _build_timm(config: dict[str, Any]) -> Any:
    """The model of timm's config.json, equipped, with random weights."""
    import timm

    from . import models  # noqa: F401 - the released DeiTs are models of timm then
    from .config_io import rpe_config_from_dict
    from .equip import equip
    from .integrations.timm_record import RECORD

    name, arguments = config["architecture"], dict(config.get("model_args") or {})
    entries = arguments.pop(RECORD, [])
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}, or this version of it has not")
    if strange := sorted(_FETCHING & set(arguments)):
        raise ValueError(f"model_args has {', '.join(strange)}; what a file names is neither fetched nor read")
    shape = {key: one for key, one in (config.get("pretrained_cfg") or {}).items() if key in _SHAPE}
    shape = {key: tuple(one) if isinstance(one, list) else one for key, one in shape.items()}
    model = timm.create_model(name, pretrained=False, pretrained_cfg={"architecture": name, **shape}, **arguments)
    for entry in entries:
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    return model


def _load_timm(folder: Path, config: dict[str, Any], note: dict[str, Any]) -> Any:
    from timm.data import resolve_model_data_config

    from .prediction import Classifier, Preprocessing

    model = _build_timm(config)
    _fill(model, folder)
    data = resolve_model_data_config(model)
    values = {"size": data["input_size"][1:], **{key: data[key] for key in ("mean", "std", "crop_pct")}}
    values["interpolation"] = str(data["interpolation"]).replace("random", "bicubic")
    preprocessing = Preprocessing.from_dict(note.get("preprocessing") or values, folder / CONFIG)
    names = config.get("label_names") or note.get("classes")
    return _with_classifier(model, names, preprocessing, model.num_classes, Classifier)


def _with_classifier(model: Any, names: Any, preprocessing: Any, count: int, kind: Any) -> Any:
    """The model in evaluation mode, with `predict`."""
    if not isinstance(names, list) or len(names) != count:
        names = [str(number) for number in range(count)]
    prepare = None if preprocessing is None else preprocessing.transform()
    channels = 3 if preprocessing is None else len(preprocessing.mean)
    names = [str(one) for one in names]
    model.eval().predict = kind(model, names, prepare, preprocessing=preprocessing, channels=channels)
    return model


def _fill(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a folder, all of them."""
    from .train.pretrained import read_weights

    file = next((one for one in (folder / WEIGHTS, folder / "pytorch_model.bin") if one.exists()), folder / WEIGHTS)
    try:
        model.load_state_dict(read_weights(file), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model: {' '.join(str(error).split())[:300]}") from None


def _save_torchvision(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    from .integrations import torch_mha
    from .integrations.timm_record import entries_of
    from .train.files import write_json
    from .train.tensors import write_weights

    layers = list(model.encoder.layers)
    arguments = {name: getattr(model, name) for name in _VIT}
    arguments |= {"num_layers": len(layers), "num_heads": layers[0].num_heads}
    config = {"arguments": arguments, "irpe": entries_of(torch_mha.attentions(model))}
    file = write_json(folder / CONFIG, config)
    with torch.device("meta"):
        again = _build_torchvision(config)
    _check_same(model, again, file)
    write_weights(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    preprocessing = _preprocessing(processor)
    return {"preprocessing": None if preprocessing is None else asdict(preprocessing)}


def _build_torchvision(config: dict[str, Any]) -> Any:
    from torchvision.models import VisionTransformer

    from .config_io import rpe_config_from_dict
    from .equip import equip

    model = VisionTransformer(**config["arguments"])
    for entry in config["irpe"]:
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    return model


def _load_torchvision(folder: Path, config: dict[str, Any], note: dict[str, Any]) -> Any:
    from .prediction import Classifier, Preprocessing

    model = _build_torchvision(config)
    _fill(model, folder)
    values = note.get("preprocessing")
    preprocessing = None if values is None else Preprocessing.from_dict(values, folder / NOTE)
    return _with_classifier(model, note.get("classes"), preprocessing, model.num_classes, Classifier)


def _preprocessing(processor: Any) -> Any:
    """A `Preprocessing`, as it is or from what torchvision's weights have as `transforms()`."""
    from .prediction import Preprocessing

    if processor is None or isinstance(processor, Preprocessing):
        return processor
    if not hasattr(processor, "crop_size"):
        raise TypeError(
            f"processor is a {type(processor).__name__}; expected an irpe.prediction.Preprocessing, or the "
            "transforms() of torchvision's weights"
        )
    crop, resize = processor.crop_size[0], processor.resize_size[0]
    mean, std = tuple(processor.mean), tuple(processor.std)
    return Preprocessing((crop, crop), mean, std, crop / resize, processor.interpolation.value)


def _save_transformers(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    if classes and getattr(model.config, "num_labels", None) == len(classes):
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: number for number, name in enumerate(classes)}
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise TypeError(f"processor is a {type(processor).__name__}; expected an image processor of transformers")
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return {}


def _load_transformers(folder: Path, config: dict[str, Any]) -> Any:
    import transformers

    from .detect.saved import check_folder
    from .integrations import hf_vit
    from .prediction import Classifier, Detector

    check_folder(folder)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder / CONFIG} names {name!r}, which is no model of transformers; load a class of your own with its "
            "from_pretrained"
        )
    if name == "DetrForObjectDetection":
        from .detect.model import load as load_detr

        model = load_detr(folder)
    else:
        own: Any = hf_vit.read_config(cls.config_class, folder)
        if hasattr(getattr(own, "backbone_config", None), "use_pretrained_backbone"):
            own.backbone_config.use_pretrained_backbone = False  # its weights are in the folder
        if own.model_type == "timm_wrapper" and getattr(own, "irpe", None):
            model = _timm_wrapper(cls, own, folder)
        else:
            with_tables = bool(re.search(r'"irpe": *\[', own.to_json_string()))
            make = hf_vit.from_pretrained if with_tables else _from_pretrained
            model = make(cls, folder, config=own)
    processor = None
    if (folder / "preprocessor_config.json").exists():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    labels = [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]
    if name == "DetrForObjectDetection":
        model.eval().predict = Detector(model, labels, processor)
    elif str(name).endswith("ForImageClassification"):
        model.eval().predict = Classifier(model, labels, None if processor is None else _Prepared(processor))
        model.predict.processor = processor
    return model.eval()


def _from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    return cls.from_pretrained(folder, **options)


def _timm_wrapper(cls: Any, config: Any, folder: Path) -> Any:
    from .config_io import rpe_config_from_dict
    from .equip import equip

    model = cls(config)
    for entry in list(config.irpe):
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    _fill(model, folder)
    return model


class _Prepared:
    """A picture -> the image (channels, height, width) that an image processor of transformers makes of it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _run(folder: Path, values: Any, weights: str) -> Any:
    """The model of a run of `irpe train` or `irpe detect`."""
    from .train import run as job

    if isinstance(values, dict) and {"queries", "rpe", "train_scenes"} <= set(values):
        places = {"best": ("best", "model"), "last": ("model",)}
        if weights not in places:
            raise ValueError(f"weights={weights!r}; expected best or last of a run of irpe detect")
        found = next((folder / one for one in places[weights] if (folder / one / CONFIG).exists()), None)
        if found is None:
            raise ValueError(f"{folder} has no weights: the run has not ended")
        return load(found)
    from dataclasses import replace

    from .prediction import Classifier, Preprocessing
    from .train import model as models

    settings, classes = job.settings_of(folder)
    file = job.weights_of(folder, weights)
    settings = replace(settings, pretrained=str(file), grad_checkpointing=False)
    model = models.build(settings, len(classes), strict=True)
    shape = models.shape_of(settings, model)
    interpolation = settings.interpolation.replace("random", "bicubic")
    preprocessing = Preprocessing(shape.size, shape.mean, shape.std, shape.crop_pct, interpolation)
    return _with_classifier(model, classes, preprocessing, len(classes), Classifier)


def _fetched(name: str) -> Path:
    """The folder that a name on the hub was fetched into: weights and JSON alone."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise ValueError(f"{name} does not exist; expected a folder, an .onnx file, or a name on the hub as user/name")
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(match[1], revision=match[2], allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name} is neither here nor on the hub: {reason}") from None
