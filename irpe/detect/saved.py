"""Weights of a detector in a folder, as save_pretrained writes them: whole or absent, checked, and plain data alone."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.utils import logging as silence

from ..runs.files import WriteError, read_json, reason_of, write_whole
from ..runs.folder import SAVED, give_back, remove_ours
from ..runs.tensors import notes_of, sealed


def save(model: Any, processor: Any, folder: Path, notes: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Writes weights, configuration (with `irpe`) and image processor, as `save_pretrained` does, all or nothing.

    What somebody else has put into the folder stays there.

    Args:
        notes: go into the file of weights, beside their checksum.

    Raises:
        WriteError: the disk is full, or the folder may not be written; what was there before still is.
    """
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    silence.disable_progress_bar()  # of a second's work
    try:
        model.save_pretrained(new)
        processor.save_pretrained(new)
        for path in new.iterdir():
            if path.suffix == ".safetensors":
                write_whole(path, functools.partial(_seal, path.read_bytes(), notes))
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except Exception as error:  # safetensors has its own error for a full disk
        remove_ours(new, SAVED)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise WriteError(f"{folder} could not be written: {str(error).splitlines()[0]}") from error
        raise
    give_back(old, folder, SAVED)
    return folder


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
    config = read_json(folder / "config.json")
    if strange := _fetches(config):
        raise ValueError(f"{folder / 'config.json'} has {strange}; what a file names is neither fetched nor run")


def _fetches(config: Any) -> str | None:
    """What in a configuration names code, or a model elsewhere, or None."""
    if not isinstance(config, dict):
        return "no settings"
    for part in (config, config.get("backbone_config") or {}):
        if not isinstance(part, dict):
            return "a backbone_config that is none"
        for name in ("auto_map", "custom_pipelines", "quantization_config"):
            if part.get(name):
                return f"{name}: {part[name]!r}"
        for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if part.get(name) and part[name] not in ("eager", "sdpa", "flash_attention_2", "irpe"):
                return f"{name}: {part[name]!r}"
        backbone = part.get("backbone")
        if backbone and not (isinstance(backbone, str) and _is_of_timm(backbone)):
            return f"the backbone {backbone!r}, which is none of timm"
        if backbone and part.get("use_timm_backbone", True) is False:
            return f"the backbone {backbone!r}, which is not timm's"
    return None


def _is_of_timm(backbone: str) -> bool:
    import timm  # models without a backbone are loaded where it is not installed

    return bool(timm.is_model(backbone))
