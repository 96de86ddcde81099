"""irpe.save(model, folder) and irpe.load(folder): models with iRPE on a disk, of timm, transformers and torchvision.

Nothing in a folder is run, and nothing that its files name is fetched: tensors, JSON, and names of classes and models
that are looked up in the libraries.
"""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from .common import CONFIG, NOTE, with_classifier
from .of_timm import load_timm, save_timm
from .of_torchvision import load_torchvision, save_torchvision
from .of_transformers import load_transformers, save_transformers

SETTINGS = "settings.json"  # of a run
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
    writers = {"timm": save_timm, "transformers": save_transformers, "torchvision": save_torchvision}
    from ..runs.files import write_json

    note = {"library": library, "classes": classes, "versions": {"irpe": __version__, "torch": torch.__version__}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTE, note)  # first, so that a folder which was left unfinished is known as one of ours
    write_json(folder / NOTE, note | writers[library](model, folder, classes, processor))
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
    from ..runs.files import read_json

    path = Path(source)
    if path.suffix == ".onnx":
        from .of_onnx import load_onnx

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
    if weights != "best":
        raise ValueError(f"weights={weights!r}, but {path} is not the folder of a run; leave weights out")
    config, note = read_json(path / CONFIG), read_json(path / NOTE) if (path / NOTE).exists() else {}
    if not isinstance(config, dict) or not isinstance(note, dict):
        raise ValueError(f"{path / CONFIG} holds no settings; expected those of a model")
    try:
        if note.get("library") == "torchvision":
            return load_torchvision(path, config, note)
        if "model_type" in config or "architectures" in config:
            return load_transformers(path, config)
        if "architecture" in config:
            return load_timm(path, config, note)
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


def _run(folder: Path, values: Any, weights: str) -> Any:
    """The model of a run of `irpe train` or `irpe detect`."""
    from ..train import run as job

    if isinstance(values, dict) and {"queries", "rpe", "train_scenes"} <= set(values):
        places = {"best": ("best", "model"), "last": ("model",)}
        if weights not in places:
            raise ValueError(f"weights={weights!r}; expected best or last of a run of irpe detect")
        found = next((folder / one for one in places[weights] if (folder / one / CONFIG).exists()), None)
        if found is None:
            raise ValueError(f"{folder} has no weights: the run has not ended")
        return load(found)
    from ..prediction import Preprocessing
    from ..train import model as models
    from ..train.loader import evaluated

    settings, classes = job.settings_of(folder)
    file = job.weights_of(folder, weights)
    settings = replace(settings, pretrained=str(file), grad_checkpointing=False)
    model = models.build(settings, len(classes), strict=True)
    shape = models.shape_of(settings, model)
    interpolation = evaluated(settings.interpolation)
    preprocessing = Preprocessing(shape.size, shape.mean, shape.std, shape.crop_pct, interpolation)
    return with_classifier(model, classes, preprocessing, len(classes))


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
