"""Checkpoints of a run: whole or absent, the last ones kept, read as plain data and only where they are whole."""

import re
from pathlib import Path
from typing import Any

from .files import WriteError, write_whole
from .tensors import ObjectsError, as_torch, read_torch

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})\.pt")
_UNFINISHED = re.compile(r"\.step-\d{9}\.pt\.\d+\.tmp")


def save(folder: Path, state: dict[str, Any], keep: int, *, later: bool = True) -> Path:
    """Writes the checkpoint of step `state["step"]` into a run's folder and removes all but the last `keep`.

    Args:
        later: whether those of later steps stay. A run that went on from an earlier checkpoint leaves the branch that
            they are of.
    """
    place = folder / FOLDER
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError(f"{place} could not be made: {error.strerror}") from error
    data = as_torch(state)
    path = write_whole(place / f"step-{state['step']:09d}.pt", lambda file: file.write(data))
    found = checkpoints(folder)
    branch = found if later else [step for step in found if step <= path]
    for old in set(found) - set(branch[-keep:]):
        old.unlink(missing_ok=True)
    return path


def clean(folder: Path) -> None:
    """Removes checkpoints that a killed process has left unfinished."""
    place = folder / FOLDER
    for entry in place.iterdir() if place.is_dir() else ():
        if _UNFINISHED.fullmatch(entry.name) and not entry.is_dir():
            entry.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one at the end."""
    place = folder / FOLDER
    return sorted(entry for entry in place.iterdir() if _NAME.fullmatch(entry.name)) if place.is_dir() else []


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; only plain data is loaded.

    Raises:
        ValueError: it cannot be read, with the checkpoint before it where there is one.
    """
    try:
        state = read_torch(path)
    except (ValueError, OSError) as error:
        if isinstance(error, ObjectsError):
            raise ValueError(
                f"{path} cannot be read as a checkpoint: {error}; do not trust where it came from"
            ) from None
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}{_before(path)}") from None
    wanted = {"step": int, "settings": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"{path} is not a checkpoint of irpe train or irpe detect")
    return state


def _before(path: Path) -> str:
    others = [step for step in checkpoints(path.parent.parent) if step < path] if path.parent.name == FOLDER else []
    return f"; remove it, and --resume auto goes on from {others[-1].name}" if others else ""
