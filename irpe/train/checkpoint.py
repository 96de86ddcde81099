"""Files that are whole or absent: checkpoints, weights and JSON, written beside their place and renamed into it."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})\.pt")


class WriteError(OSError):
    """A file could not be written; what was there before still is."""


def write_whole(path: Path, write: Callable[[Any], object]) -> Path:
    """Calls write(file) and leaves its result at `path`, whole and on the disk, or nothing new at all.

    Raises:
        WriteError: the disk is full, or the file may not be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # torch reports a failed write of its zip file as a RuntimeError, with the OSError as its cause or in its text
        if isinstance(error, (OSError, RuntimeError)):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise WriteError(f"{path} could not be written: {reason}; what was there before still is") from error
        raise
    return path


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> Path:
    """Writes plain values."""
    text = json.dumps(values, indent=1) + "\n"
    return write_whole(path, lambda file: file.write(text.encode()))


def write_weights(path: Path, state: dict[str, Tensor], notes: dict[str, str]) -> Path:
    """Writes safetensors; tensors that share memory become tensors of their own."""
    from safetensors.torch import save

    data = save({name: one.detach().cpu().contiguous().clone() for name, one in state.items()}, metadata=notes)
    return write_whole(path, lambda file: file.write(data))


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of step `state["step"]` into a run's folder and removes all but the last `keep`."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    # torch's own writer does not tell why a write failed, so it writes to memory and the file is ours
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = write_whole(place / f"step-{state['step']:09d}.pt", lambda file: file.write(buffer.getbuffer()))
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one at the end."""
    place = folder / FOLDER
    return sorted(one for one in place.iterdir() if _NAME.fullmatch(one.name)) if place.is_dir() else []


def empty(folder: Path, files: tuple[str, ...]) -> None:
    """Removes the checkpoints and these files of a run that is overwritten; what else is there stays."""
    for one in (*checkpoints(folder), *(folder / name for name in files)):
        one.unlink(missing_ok=True)
    for one in (folder / "tensorboard").glob("events.*"):
        one.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Removes what a killed process has left unfinished."""
    for place in (folder, folder / FOLDER):
        for one in place.glob(".*.tmp"):
            one.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; only plain data is loaded.

    Raises:
        ValueError: it cannot be read, with the checkpoint before it where there is one.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged zip files raise many kinds
        others = [one for one in checkpoints(path.parent.parent) if one < path] if path.parent.name == FOLDER else []
        hint = f"; remove it, and --resume auto goes on from {others[-1].name}" if others else ""
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}{hint}") from None
    if not isinstance(state, dict) or "step" not in state or "settings" not in state:
        raise ValueError(f"{path} is not a checkpoint of irpe train")
    return state
