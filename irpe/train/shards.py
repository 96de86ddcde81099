"""Shards of WebDataset from local folders alone: its own opener would run commands that a name holds."""

import importlib
import re
import tarfile
import warnings
from pathlib import Path
from typing import Any

from ..runs.files import check_regular, reason_of

SCHEME = "irpe-shard"
_MOST = 1_000_000  # shards that a pattern may stand for


def local_only() -> None:
    """Makes webdataset refuse pipes, addresses and rewritten names, in this process; our scheme opens files.

    Raises:
        ImportError: the package is not there.
    """
    # the package hides its module of this name behind a function
    gopen: Any = importlib.import_module("webdataset.gopen")
    utils: Any = importlib.import_module("webdataset.utils")
    utils.enforce_security = True
    gopen.gopen_schemes[SCHEME] = _open
    # timm would log what it cannot read, and go on with the rest
    importlib.import_module("timm.data.readers.reader_wds").log_and_continue = _stop  # type: ignore[attr-defined]


def _stop(error: Exception) -> bool:
    """What is done with an error: a damaged shard ends the run, a picture alone is left out with a warning."""
    what = next(iter(error.args), "")
    if isinstance(error, (tarfile.TarError, EOFError)):
        where = str(error.args[-1]).removeprefix(f"{SCHEME}:")
        raise ValueError(f"the shard {where} cannot be read: {what}") from None
    if "duplicate file name" in str(what):
        raise ValueError(f"a shard holds the name {str(what).split(': ')[0]} twice in a row") from None
    if isinstance(error, TypeError) or type(error).__name__ == "WdsTargetKeyError":  # of the options, not of the data
        raise error
    warnings.warn(f"unreadable image of a stream, left out: {error}", stacklevel=1)
    return True


def _open(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    path = url.removeprefix(f"{SCHEME}:")
    if mode != "rb":
        raise ValueError(f"{path}: shards are read, not written")
    check_regular(path)
    return open(path, "rb")


def root_of(name: str, place: str) -> str:
    """What timm takes as the folder of shards.

    Raises:
        ValueError: it is no local folder, with what was asked for.
    """
    path = Path(place)
    try:
        is_folder = bool(place) and path.is_dir()
    except (OSError, ValueError):  # a name that no disk has
        is_folder = False
    if not is_folder:
        raise ValueError(
            f"{name}: {place or 'nothing'} is no folder here; expected wds/FOLDER. Shards are read from local folders "
            "alone: download what lies elsewhere first"
        )
    return f"{SCHEME}:{path.resolve()}"


def check_pattern(split: str) -> None:
    """Refuses patterns of more shards than a disk has, which would fill the memory.

    Raises:
        ValueError: with the pattern.
    """
    count = 1
    for first, last in re.findall(r"\{(\d+)\.\.(\d+)", split):
        count *= abs(int(last) - int(first)) + 1 if len(first) < 12 and len(last) < 12 else _MOST + 1
    if count > _MOST:
        raise ValueError(f"the split {split!r} stands for {count:,} shards; expected at most {_MOST:,}")


def check_shards(name: str, reader: Any) -> None:
    """Refuses shards that are no files of the folder.

    Raises:
        ValueError: with the first one.
    """
    root = Path(str(reader.root).removeprefix(f"{SCHEME}:"))
    for file in reader.split_info.filenames:
        path = root / str(file)
        try:
            inside = root in (path.resolve(), *path.resolve().parents)
            if not inside:
                raise ValueError(f"it lies outside of {root}")
            check_regular(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: the shard {file} cannot be read: {reason_of(error)}") from None
