"""A folder written whole or not at all: what was there before stays until all of the new is on the disk."""

import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from .files import WriteError, reason_of, sync_folder
from .folder import give_back

LAST = "config.json"  # without which nobody takes a folder for a model


def write_folder(folder: Path, write: Callable[[Path], object], ours: re.Pattern[str]) -> Path:
    """Calls write(new) with an empty folder beside `folder`, and puts it into its place: all of it, or nothing changes.

    Of what was there before, files go whose whole names fit `ours` or that are written anew; everything else stays.
    A folder that cannot be moved (where something is mounted, or in which this process works) gets its files one by
    one, `config.json` last.

    Raises:
        WriteError: the disk is full, or the folder may not be written; what was there before still is.
    """
    place = Path(os.path.realpath(folder))
    inside = place.is_dir() and not _may_move(place)
    near = place if inside else place.parent
    try:
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        near.mkdir(parents=True, exist_ok=True)
        _recover(place, ours)
        new, old = _free(near, place.name)
        new.mkdir()
    except OSError as error:
        raise _failed(folder, error) from error
    try:
        write(new)
        written = [path.name for path in new.iterdir()]
        for name in written:
            with open(new / name, "rb") as file:
                os.fsync(file.fileno())
        if place.exists():
            shutil.copymode(place, new)
        if inside:
            _replace_files(place, new, old, ours)
        else:
            _replace(place, new, old)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)  # all in it is of this call
        # safetensors has its own error for a full disk
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise _failed(folder, error) from error
        raise
    try:
        _clear(old, place, ours, written)
        sync_folder(near)
    except OSError as error:
        raise WriteError(f"{folder} is written, but not all else that was in it, which is in {old}: {error}") from error
    return folder


def unfinished(folder: Path) -> Path | None:
    """The folder of before, or the files of it, which a process that was killed while it replaced them has left."""
    return next((place for place in _left(folder) if (place / LAST).is_file()), None)


def _left(folder: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.old")
    places = [path for path in (folder.parent, folder) if path.is_dir()]
    found = (path for place in places for path in place.iterdir() if name.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _recover(place: Path, ours: re.Pattern[str]) -> None:
    """Puts back, or takes away, what killed processes have left of the folder of before."""
    for left in _left(place):
        if not place.exists():
            os.replace(left, place)
        elif left.parent == place and not (place / LAST).exists():
            for file in list(left.iterdir()):
                os.replace(file, place / file.name)
            left.rmdir()
        else:
            _clear(left, place, ours)


def _failed(folder: Path, error: BaseException) -> WriteError:
    return WriteError(f"{folder} could not be written: {reason_of(error)}")


def _may_move(place: Path) -> bool:
    return not os.path.ismount(place) and os.access(place.parent, os.W_OK) and not _works_in(place)


def _works_in(place: Path) -> bool:
    with suppress(OSError):  # the folder of this process may be gone
        return os.path.samefile(place, os.getcwd())
    return False


def _free(near: Path, name: str) -> tuple[Path, Path]:
    """Two names that nobody has: numbers of processes come again, and killed ones leave folders behind."""
    for number in itertools.count(os.getpid()):
        new, old = (near / f".{name}.{number}.{word}" for word in ("tmp", "old"))
        if not os.path.lexists(new) and not os.path.lexists(old):
            return new, old
    raise AssertionError


def _replace(place: Path, new: Path, old: Path) -> None:
    if not place.exists():
        os.replace(new, place)
        return
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise


def _clear(old: Path, place: Path, ours: re.Pattern[str], written: Iterable[str] = ()) -> None:
    """Takes away a folder that was replaced, but for what somebody else has put there, which moves over."""
    for name in written:
        if (old / name).is_file():
            (old / name).unlink()
    give_back(old, place, ours)


def _replace_files(place: Path, new: Path, old: Path, ours: re.Pattern[str]) -> None:
    names = sorted((file.name for file in new.iterdir()), key=lambda name: name == LAST)
    before = [
        file.name for file in place.iterdir() if file.is_file() and (ours.fullmatch(file.name) or file.name in names)
    ]
    before.sort(key=lambda name: name != LAST)
    steps = [(place / name, old / name) for name in before] + [(new / name, place / name) for name in names]
    done: list[tuple[Path, Path]] = []
    old.mkdir()
    try:
        for source, target in steps:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        old.rmdir()
        raise
    shutil.rmtree(old)
    new.rmdir()
