"""Tensors on a disk: read as plain data alone, damaged files refused; safetensors carry a checksum."""

import argparse
import hashlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .files import check_regular, reason_of, write_whole

CHECKSUM = "checksum"  # among the notes of a file of safetensors
_PIECE = 1 << 22


def write_weights(path: Path, state: dict[str, Tensor], notes: dict[str, str]) -> Path:
    """Writes safetensors; tensors that share memory become tensors of their own."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, metadata=notes)
    return write_whole(path, lambda file: file.write(sealed(data)))


def sealed(data: bytes, more: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The bytes of a file of safetensors, with a checksum of names, shapes and numbers (and more) among its notes."""
    (size,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]
    notes = header.pop("__metadata__", {})
    digest = _digest(header)
    digest.update(numbers)
    # the notes come first, as in the library's own files
    whole = {"__metadata__": {**notes, **more, CHECKSUM: digest.hexdigest()}, **header}
    words = json.dumps(whole, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)  # numbers begin at a multiple of eight bytes
    return struct.pack("<Q", len(words)) + words + bytes(numbers)


def _digest(header: dict[str, Any]) -> Any:
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)


def notes_of(path: Path) -> dict[str, str]:
    """The notes of a file of safetensors, of which the checksum is compared where it has one.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    size = check_regular(path).st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, 100_000_000):  # the library's own bound
            raise ValueError("it is no file of safetensors")
        try:
            header = json.loads(file.read(length))
            notes = {str(name): str(note) for name, note in header.pop("__metadata__", {}).items()}
        except (ValueError, AttributeError, RecursionError):
            raise ValueError("it is no file of safetensors") from None
        if CHECKSUM in notes:
            digest = _digest(header)
            while piece := file.read(_PIECE):
                digest.update(piece)
            if digest.hexdigest() != notes[CHECKSUM]:
                raise ValueError("it is damaged: its checksum is another one")
    return notes


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Raises:
        ValueError: it is none, or damaged.
    """
    from safetensors.torch import load_file

    try:
        notes_of(path)
        return load_file(path)
    except ValueError:
        raise
    except Exception as error:  # the library has a kind of its own
        raise ValueError(f"it is no file of safetensors: {reason_of(error)}") from None


class ObjectsError(ValueError):
    """A file of torch holds Python objects, which would be code."""


def read_torch(path: Path) -> Any:
    """What torch.save wrote, on the CPU: tensors and plain containers alone, of a file that is whole.

    Raises:
        ObjectsError: there is something else in it, which is not loaded.
        ValueError: it is no such file, damaged, or larger inside than it is.
    """
    size = check_regular(path).st_size
    try:
        if zipfile.is_zipfile(path):
            _check_zip(path, size)
        # DETR and timm keep the arguments of a training beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the protocol of a pickle, before the error that tells
            return torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("there is not enough memory for it") from None
    except Exception as error:  # damaged files raise many kinds; torch's words advise what is never done here
        words = str(error)
        if any(phrase in words.lower() for phrase in ("unsupported global", "unsupported class", "allowlisted")):
            raise ObjectsError("it holds Python objects besides tensors, which are not loaded") from None
        raise ValueError("it is not what torch.save writes, or it is damaged") from None


def _check_zip(path: Path, size: int) -> None:
    """torch stores its records as they are: what inflates is not of torch, and may not fit in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in inside):
                raise ValueError("it is a compressed archive, which torch.save does not write")
            if sum(record.file_size for record in inside) > size:
                raise ValueError("it is damaged: its parts are larger than the file")
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"it is damaged: the checksum of {bad} is another one")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"it is damaged: {reason_of(error)}") from None


def as_torch(state: Any) -> memoryview:
    """What torch.save writes, in memory: its own writer does not tell why a write failed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def not_finite(state: Any) -> list[str]:
    """The names, from outside to inside, of tensors that hold a number which is not finite."""
    found: list[str] = []

    def look(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            if local.is_floating_point() and not bool(torch.isfinite(local).all()):
                found.append(name)
        elif isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{name}.{key}" if name else str(key))
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(item, f"{name}.{number}")

    look(state, "")
    return found
