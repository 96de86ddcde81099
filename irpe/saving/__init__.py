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
from ..runs.folder import SETTINGS
from .common import CONFIG, MODEL, NOTE, check_classes, with_classifier
from .of_timm import load_timm, save_timm
from .of_torchvision import load_torchvision, save_torchvision
from .of_transformers import load_transformers, save_transformers

_HUB_FILES = (CONFIG, NOTE, "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "README.md")


def save(model: nn.Module, folder: str | Path, *, classes: list[str] | None = None, processor: Any = None) -> Path:
    """Writes a model with iRPE into a folder, from which `irpe.load` gives it back.

    >>> irpe.save(model, "my-model")
    >>> model = irpe.load("my-model")

    The loaders of timm and transformers refuse the folder of an equipped model, instead of leaving the encodings out.

    Args:
        model: of timm (made by `timm.create_model`), of transformers, or torchvision's `VisionTransformer`, equipped or
            not, on any device.
        folder: a new or an empty one, or one that `save` has written, whose model is replaced by this one.
        classes: names, one for each output, in their order; those that are known of models that `irpe.load` gave.
        processor: how pictures are prepared, for `predict`: an image processor of transformers, the `transforms()` of
            torchvision's weights, or an `irpe.prediction.Preprocessing`. timm's models know it themselves.

    Returns:
        The folder.

    Raises:
        TypeError: the model, or the processor, is of another kind.
        ValueError: the folder holds something else; classes are more or fewer than outputs; or the model was changed so
            that its own library could not build it again (layers taken out or added by hand).
        OSError: the folder could not be written. Whatever is raised, what was in the folder before still is.
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    library = _library(model)
    _check_place(folder)
    own, count = getattr(model, "predict", None), _outputs(model)
    if classes is None:
        classes = list(getattr(own, "classes", None) or [])
        classes = classes if len(classes) == count else []  # of a head that was there before
    else:
        check_classes(classes, count)
    if processor is None:
        processor = getattr(own, "processor", None) or getattr(own, "preprocessing", None)
    writers = {"timm": save_timm, "transformers": save_transformers, "torchvision": save_torchvision}
    from ..runs.files import write_json
    from ..runs.whole_folder import write_folder

    note = {"library": library, "classes": classes, "versions": {"irpe": __version__, "torch": torch.__version__}}

    def write(new: Path) -> None:
        write_json(new / NOTE, note | writers[library](model, new, classes, processor))

    write_folder(folder, write, MODEL)
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

        _check_which(weights, path)
        return load_onnx(path)
    if not path.exists():
        _check_left(path)
        return load(_fetched(str(source)), weights=weights)
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected the folder of a model or of a run, or an .onnx file")
    if (path / SETTINGS).exists():
        return _run(path, read_json(path / SETTINGS), weights)
    if not (path / CONFIG).exists():
        _check_left(path)
        raise ValueError(
            f"{path} has neither {CONFIG} nor {SETTINGS}; expected what irpe.save or save_pretrained wrote, or the "
            "folder of a run"
        )
    _check_which(weights, path)
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


def _outputs(model: Any) -> int:
    """How many classes the model tells apart."""
    return int(getattr(getattr(model, "config", model), "num_labels", getattr(model, "num_classes", 0)))


def _check_which(weights: str, path: Path) -> None:
    if weights != "best":
        raise ValueError(f"weights={weights!r}, but {path} is not the folder of a run; leave weights out")


def _check_left(path: Path) -> None:
    """Says where the model is, if a process was killed in the moment in which it put another one in its place."""
    from ..runs.whole_folder import unfinished

    if (left := unfinished(path)) is not None:
        raise ValueError(
            f"{path} was being replaced when its process was killed; the model of before is whole, in {left}: move it "
            f"back to {path}, or save the model again"
        )


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NOTE).is_file():
        raise ValueError(f"{folder} holds files that irpe.save has not written; name a new folder")


def _run(folder: Path, values: Any, weights: str) -> Any:
    """The model of a run of `irpe train` or `irpe detect`."""
    from ..detect.settings import is_record
    from ..train import run as job

    if isinstance(values, dict) and is_record(values):
        from ..detect.model import BEST, FOLDER

        places = {"best": (BEST, FOLDER), "last": (FOLDER,)}
        if weights not in places:
            raise ValueError(f"weights={weights!r}; expected best or last of a run of irpe detect")
        found = next((folder / place for place in places[weights] if (folder / place / CONFIG).exists()), None)
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
