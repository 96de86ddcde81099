"""The folder of a run: whose it is, who writes there now, and what of it may be removed.

Only files that a run writes are ever removed, one by one and by their whole names, and only in a folder whose
settings.json a run has written. Nothing is removed through a link.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoint
from .files import WriteError, read_json, reason_of

SETTINGS, LOCK, BOARD, TRACKERS = "settings.json", ".lock", "tensorboard", "trackers.json"
_UNFINISHED = re.compile(r"\.(.+)\.\d+\.(?:tmp|old)")
_EVENTS = re.compile(r"events\.out\.tfevents\..*")
_STEP = re.compile(r"step-\d{9}\.pt")
# what transformers' save_pretrained writes for a model and its image processor
SAVED = re.compile(
    r"(?:config|generation_config|preprocessor_config|processor_config|model\.safetensors\.index)\.json"
    r"|model(?:-\d{5}-of-\d{5})?\.safetensors"
)


@dataclass(frozen=True)
class Kind:
    """What a command writes into the folder of a run, and how its settings.json is told from somebody else's."""

    command: str
    files: tuple[str, ...]
    results: tuple[str, ...]  # files and folders that training has made, which a run without a checkpoint would lose
    is_ours: Callable[[dict[str, Any]], bool]
    settings_from: Callable[[Mapping[str, Any]], Any]  # those of a checkpoint
    recorded: Callable[[Any], Any]  # the settings in what its settings.json holds
    folders: dict[str, re.Pattern[str]] = field(default_factory=dict)  # name: names of the files inside
    signed: dict[str, str] = field(default_factory=dict)  # files of common names, with words that ours hold

    @property
    def inside(self) -> dict[str, re.Pattern[str]]:
        """Every folder in the folder of a run, with what is written there."""
        return {checkpoint.FOLDER: _STEP, BOARD: _EVENTS, **self.folders}


def is_run(folder: Path, kind: Kind) -> bool:
    """Whether a run of this kind has written the settings.json of a folder."""
    try:
        values = read_json(folder / SETTINGS)
    except ValueError:
        return False
    return isinstance(values, dict) and kind.is_ours(values)


def run_of(path: Path, kind: Kind) -> Path | None:
    """The folder of the run whose checkpoint a file is; None for a file that lies anywhere else."""
    folder = path.parent.parent
    own = path.parent.name == checkpoint.FOLDER and _STEP.fullmatch(path.name) and is_run(folder, kind)
    return folder if own else None


def lies_in(path: Path, folder: Path, kind: Kind) -> bool:
    """Whether a checkpoint is one of the run of a folder."""
    own = run_of(path, kind)
    return own is not None and own.resolve() == folder.resolve()


def resumed(resume: str, kind: Kind) -> Path:
    """The checkpoint that --resume names: itself, or the last one of the folder of a run.

    Raises:
        ValueError: there is none.
    """
    path = Path(resume)
    if path.is_dir():
        found = checkpoint.checkpoints(path)
        if not found:
            raise ValueError(f"--resume {path}: there is no checkpoint in it; expected the folder of a run")
        if not is_run(path, kind):
            raise ValueError(
                f"--resume {path} is not the folder of a run of {kind.command}: it has no {SETTINGS} of one; name a "
                f"checkpoint itself, such as {found[-1]}, to go on in a new folder"
            )
        return found[-1]
    if not path.exists():
        raise ValueError(f"--resume {path} does not exist; expected auto, a checkpoint, or the folder of a run")
    return path


def begin(folder: Path, kind: Kind, *, auto: bool, sources: tuple[str | None, ...] = ()) -> Path | None:
    """Looks at a folder that a run is to write into; the checkpoint to go on from if `auto`, or None to begin.

    Args:
        sources: files that the run has begun from, which must not lie among what beginning anew removes.

    Raises:
        ValueError: the folder holds what no run of this kind wrote, or a run without a checkpoint.
    """
    entries = sorted(entry.name for entry in folder.iterdir() if not _leftover(entry.name, kind))
    if entries and not is_run(folder, kind):
        shown = ", ".join(entries[:3]) + (" and others" if len(entries) > 3 else "")
        raise ValueError(
            f"{folder} is not the folder of a run of {kind.command}: it holds {shown}, and no {SETTINGS} of one; "
            "nothing in it was touched; name another folder with --name or --out"
        )
    check_names(folder, kind)
    found = checkpoint.checkpoints(folder)
    if auto and found:
        return found[-1]
    if auto and (lost := [name for name in kind.results if name in entries]):
        raise ValueError(
            f"{folder} has {', '.join(lost)} of a run, but no checkpoint to go on from. --overwrite begins anew and "
            "removes them; --name begins in another folder"
        )
    for source in filter(None, sources):
        path, own = Path(source).resolve(), folder.resolve()
        if path.exists() and own in (path, *path.parents):
            raise ValueError(f"{source} lies in {folder}, which would be emptied before the run; use another --name")
    return None


def check_results(folder: Path, name: str, keys: set[str], command: str) -> None:
    """Refuses to write several runs, or a measurement, over what something else has made.

    Args:
        name: the JSON file of their results, by which they are known.
        keys: some that it has.

    Raises:
        ValueError: the folder has files, and none of this name that the command wrote.
    """
    path, files = folder / name, sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
    try:
        values = read_json(path) if name in files and not path.is_symlink() else None
    except ValueError:
        values = None
    if files and not (isinstance(values, dict) and keys <= set(values)):
        raise ValueError(
            f"{folder} holds {', '.join(files[:3])}{' and others' * (len(files) > 3)}, and no {name} of {command}; "
            "nothing in it was touched. Name another folder with --name or --out"
        )


def check_names(folder: Path, kind: Kind) -> None:
    """Refuses a folder in which a link, or something else than a file, has the name of a file of a run.

    Raises:
        ValueError: with its name.
    """
    for name in kind.files:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = "a link" if path.is_symlink() else "no file"
            raise ValueError(f"{path} is {what}; expected a file of a run, or nothing. Use another --name")
    for name, words in kind.signed.items():
        path = folder / name
        if path.exists() and words not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} was not written by a run, which would replace it; move it, or use another --name")
    for name in kind.inside:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            what = "a link" if path.is_symlink() else "no folder"
            raise ValueError(f"{path} is {what}; expected a folder of a run, or nothing. Use another --name")


def empty(folder: Path, kind: Kind) -> None:
    """Removes the files of a run that begins anew; what else is there stays."""
    _remove([folder / name for name in kind.files])
    for name, pattern in kind.inside.items():
        remove_ours(folder / name, pattern)


def clean(folder: Path, kind: Kind) -> None:
    """Removes what a killed process has left unfinished."""
    checkpoint.clean(folder)
    for entry in list(folder.iterdir()):
        if entry.is_symlink() or not _leftover(entry.name, kind) or entry.name == LOCK:
            continue
        if entry.is_dir():
            _restore(entry, kind)
        else:
            _remove([entry])


def _restore(entry: Path, kind: Kind) -> None:
    """A folder that was being written, or that was about to be replaced and comes back where nothing took its place."""
    name = entry.name[1:].rsplit(".", 2)[0]
    if name not in kind.folders:
        return
    if entry.name.endswith(".old") and not (entry.parent / name).exists():
        os.replace(entry, entry.parent / name)
    elif entry.name.endswith(".tmp"):
        remove_ours(entry, kind.inside[name])
    else:
        give_back(entry, entry.parent / name, kind.inside[name])


def remove_ours(place: Path, pattern: re.Pattern[str]) -> None:
    """Removes the files of a folder whose whole names fit, and the folder where nothing is left in it."""
    if place.is_symlink() or not place.is_dir():
        return
    _remove(
        [file for file in place.iterdir() if pattern.fullmatch(file.name) and (file.is_file() or file.is_symlink())]
    )
    if not any(place.iterdir()):
        place.rmdir()


def give_back(old: Path, new: Path, pattern: re.Pattern[str]) -> None:
    """Removes our files of a folder that `new` has replaced; what somebody else put there moves into `new`."""
    remove_ours(old, pattern)
    for file in list(old.iterdir()) if old.is_dir() else ():
        if not (new / file.name).exists():
            os.replace(file, new / file.name)
    if old.is_dir() and not any(old.iterdir()):
        old.rmdir()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{path} could not be removed: {reason_of(error)}") from error


def _leftover(name: str, kind: Kind) -> bool:
    """Whether a name is that of the lock, or of something of ours that was being written."""
    match = _UNFINISHED.fullmatch(name)
    return name == LOCK or (match is not None and match[1] in {SETTINGS, *kind.files, *kind.folders})


_held: set[str] = set()  # locks of this process, which the system does not hold against itself


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while the block runs; a killed process leaves no lock behind.

    Raises:
        ValueError: another run writes there now.
    """
    path = folder / LOCK
    name = str(folder.resolve() / LOCK)
    busy = ValueError(f"another run writes into {folder} now; wait for its end, or use another --name")
    if name in _held:
        raise busy
    handle = _lock(path, busy)
    _held.add(name)
    try:
        yield
    finally:
        _held.discard(name)
        with suppress(OSError):  # the folder may be gone by now
            path.unlink(missing_ok=True)  # before it is let go: who opens it afterwards makes a new one
        os.close(handle)


def _lock(path: Path, busy: ValueError) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise WriteError(f"{path.parent} cannot be written: {reason_of(error)}") from error
        try:
            _exclusive(handle)
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        except BlockingIOError:
            os.close(handle)
            raise busy from None
        except PermissionError:
            os.close(handle)
            raise busy from None
        except FileNotFoundError:
            pass  # the run that had it removed it between
        os.close(handle)


def _exclusive(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    try:
        # of the process, not of its children: loader workers that outlive a killed run for some seconds hold nothing
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise
        # a disk that knows no locks
