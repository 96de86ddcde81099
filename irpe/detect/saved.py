"""Weights of a detector in a folder, as save_pretrained writes them: whole or absent, checked, and plain data alone."""

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.utils import logging

from ..integrations.hf_vit.on_disk import readable
from ..runs.elsewhere import named_elsewhere
from ..runs.files import read_json, reason_of, write_whole
from ..runs.folder import SAVED
from ..runs.tensors import notes_of, sealed
from ..runs.whole_folder import write_folder

_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def save(model: Any, processor: Any, folder: Path, notes: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Writes weights, configuration (with `irpe`) and image processor, as `save_pretrained` does, all or nothing.

    What somebody else has put into the folder stays there.

    Args:
        notes: go into the file of weights, beside their checksum.

    Raises:
        WriteError: the disk is full, or the folder may not be written; what was there before still is.
    """
    return write_folder(folder, lambda new: write_pretrained(model, processor, new, notes), SAVED)


def write_pretrained(model: Any, processor: Any, folder: Path, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """`save_pretrained` of a model and of its image processor, if there is one, with checksums of the weights."""
    with quiet():
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        write_whole(path, functools.partial(_seal, path.read_bytes(), notes))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of a second's work."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """The hub is not asked: a folder is all that there is to a model, whatever classes of transformers would add to it.

    Nothing changes where there is no such folder, but a name on the hub, which the user has given.

    Raises:
        ValueError: parts of the model are on the hub.
    """
    if not folder.is_dir():
        yield
        return
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except (OSError, ValueError) as error:
        if re.search("offline mode is enabled|couldn't connect to", str(error)):
            raise ValueError(
                f"{folder} leaves parts of the model to the hub, which is not asked; expected a folder of "
                "save_pretrained that says all of it"
            ) from None
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _seal(data: bytes, notes: Mapping[str, str], file: Any) -> None:
    file.write(sealed(data, notes))


def saved_at(folder: Path) -> int | None:
    """The step at which the weights of a folder were saved, or None where there are none or they do not tell."""
    try:
        step = notes_of(folder / "model.safetensors").get("step", "")
    except (ValueError, OSError):
        return None
    return int(step) if step.isdigit() else None


def check_folder(folder: Path) -> None:
    """Refuses a folder of a model whose files are damaged, or name what would be fetched or run.

    Raises:
        ValueError: with the file.
    """
    if not folder.is_dir():
        return  # a name on the hub, which the user has given
    for path in folder.glob("*.safetensors"):
        try:
            notes_of(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter, whose adapter_config.json names another model to fetch; expected the weights "
            "of the whole model, as save_pretrained writes them after merge_and_unload"
        )
    for path in folder.glob("*.index.json"):
        _check_index(path)
    for name in ("config.json", *_PROCESSORS):
        if name == "config.json" or (folder / name).exists():
            values = read_json(folder / name)
            readable(values)
            if strange := named_elsewhere(values):
                raise ValueError(f"{folder / name} has {strange}; what a file names is neither fetched nor run")


def _check_index(path: Path) -> None:
    """Refuses an index of weights that names files outside its folder."""
    values = read_json(path)
    names = values.get("weight_map") if isinstance(values, dict) else None
    for name in set(map(str, names.values())) if isinstance(names, dict) else ():
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{path} names {name!r}; expected files beside it")
