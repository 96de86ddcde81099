"""Files as they come and go: text and JSON from anybody, read with a sentence for what is wrong; files whole or absent.

A run folder, a checkpoint, a data set and their names may come from strangers: what is read here is data.
"""

import json
import math
import os
import stat
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGEST_JSON = 4 * 1024**3  # bytes; COCO's largest file of annotations has half of one


class WriteError(OSError):
    """A file could not be written; what was there before still is."""


def counted(number: int, one: str, many: str) -> str:
    """A number with what is counted, in words for one and for any other number.

    >>> counted(1, "category", "categories"), counted(1200, "category", "categories")
    ('1 category', '1,200 categories')
    """
    return f"{number:,} {one if number == 1 else many}"


def printable(text: object) -> str:
    """The text without what a terminal would obey: control characters and marks of direction as \\x1b or \\u202e.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    words = str(text)
    if words.isascii() and words.isprintable():
        return words
    return "".join(letter if _shown(letter) else letter.encode("unicode_escape").decode() for letter in words)


def _shown(letter: str) -> bool:
    # C: control, format, surrogates (bytes of a name that are no UTF-8), unassigned; Zl, Zp: other ends of lines
    return unicodedata.category(letter)[0] != "C" and unicodedata.category(letter) not in ("Zl", "Zp")


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def check_regular(path: str | Path) -> os.stat_result:
    """Refuses what would wait for a writer or never end: pipes, sockets, devices; and folders.

    Raises:
        ValueError: it is no file of a disk.
        OSError: it is not there, or may not be looked at.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}; expected a file")
    return found


def read_text(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte-order mark, whatever the locale.

    Raises:
        ValueError: it is no file, or not UTF-8.
    """
    try:
        if (size := check_regular(path).st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes; expected at most {LARGEST_JSON:,}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None


def parse_json(text: str, name: object) -> Any:
    """Plain values from JSON.

    Raises:
        ValueError: it is none, or nested too deeply; `name` says what it is.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; expected JSON of some levels") from None
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        raise ValueError(f"{name} is not JSON: {reason_of(error)}") from None


def read_json(path: Path) -> Any:
    """The plain values in a JSON file; see `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def plain(value: Any) -> Any:
    """Values for JSON, which has no word for numbers that are not finite: they become None, and tuples lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(values: Any, indent: int | None = None) -> bytes:
    """Plain values as JSON in UTF-8, with a line end; what is not finite is null."""
    return (json.dumps(plain(values), indent=indent, allow_nan=False) + "\n").encode()


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
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where it could not be made it cannot be removed: the first error is the one to tell
            unfinished.unlink(missing_ok=True)
        # torch reports a failed write of its zip file as a RuntimeError, with the OSError as its cause or in its text
        if isinstance(error, (OSError, RuntimeError)):
            raise WriteError(
                f"{path} could not be written: {reason_of(error)}; what was there before still is"
            ) from error
        raise
    return path


def sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> Path:
    """Writes plain values; numbers that are not finite become null."""
    data = as_json(values, indent=1)
    return write_whole(path, lambda file: file.write(data))
