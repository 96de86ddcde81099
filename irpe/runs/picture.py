"""Pictures: which files are some, where they lie, how one is decoded, and what it becomes. The one way to them."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .files import check_regular, reason_of

# formats that Pillow registers and cannot decode by itself, and one of measurements
_OTHERS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_NOISE = {"thumbs.db", "desktop.ini", "__macosx"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# where a decoded picture keeps its orientation
_TELLING = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# of boxes, by the number of their class; white words are read on each
CLASS_COLORS = (
    *("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#1f78b4", "#e31a1c", "#6a3d9a", "#b15928"),
)


@functools.cache
def kinds() -> frozenset[str]:
    """The extensions of files that are read as pictures: .jpg, .png, .webp and all others that Pillow decodes."""
    known = Image.registered_extensions()
    readable = {name for name, kind in known.items() if kind in Image.OPEN and kind not in _OTHERS}
    return frozenset((readable | {".mpo"}) - {".pfm"})  # .mpo is opened as JPEG, .pfm holds 32-bit numbers


def extension(name: str) -> str:
    """That of a file's name, in small letters."""
    return os.path.splitext(name)[1].lower()


def hidden(name: str) -> bool:
    """Whether a file or folder is one that systems put there: .DS_Store, Thumbs.db, ..."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _NOISE


def natural(name: str) -> list[Any]:
    """The key of an order in which 9.png comes before 10.png, and small letters count as large ones."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name.lower()))]


class Place(NamedTuple):
    """A folder, the names of the pictures and of the other files in it, and whether it has folders."""

    folder: str
    pictures: list[str]
    others: list[str]
    has_folders: bool


def walk(root: str | Path) -> Iterator[Place]:
    """A folder and all below it, without what systems put there, in natural order.

    Links are followed, but not to a folder that they lie in, which would have no end.
    """
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted((name for name in below if not hidden(name) and not _back(folder, name)), key=natural)
        pictures: list[str] = []
        others: list[str] = []
        for name in sorted((name for name in files if not hidden(name)), key=natural):
            (pictures if extension(name) in kinds() else others).append(name)
        yield Place(folder, pictures, others, bool(below))


def _back(folder: str, name: str) -> bool:
    """Whether a name in a folder is a link to a folder that it lies in, on the way there or on the disk."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    place = Path(os.path.realpath(path))
    way = (Path(os.path.realpath(path)) for path in (Path(folder), *Path(folder).parents))
    return any(place == path or place in path.parents for path in way)


def mode_of(channels: int) -> str:
    """Pillow's name of pictures with 3 channels, RGB, or with 1, L (grey)."""
    return "RGB" if channels == 3 else "L"


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in RGB or L (grey): 16 bits become 8, transparency is dropped, of several frames it is the first.

    Raises:
        ValueError: it has 32-bit numbers, of which nobody knows what is black and what is white.
    """
    # Pillow has PNG and PGM of 16 bits in 32 where it has no better mode
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # .convert would cut off all above 255
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (Pillow's mode {image.mode}), whose black and white are not known; "
            "save it with 8 or 16 bits"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without a warning of Pillow's for each file
    return image.convert(mode)


def decoded(file: Any) -> Image.Image:
    """The picture in an open file, decoded.

    Raises:
        ValueError: it is none, damaged, or of more pixels than Pillow takes for a picture.
    """
    try:
        image = Image.open(file)
        image.load()
    except UnidentifiedImageError:  # whose words are about the Python object
        raise ValueError("its bytes are of no image format that Pillow knows") from None
    except MemoryError:
        raise ValueError("there is not enough memory to decode it") from None
    except Exception as error:  # each format has errors of its own: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"it cannot be decoded: {reason_of(error)}") from None
    return image


def open_picture(path: str | Path) -> Image.Image:
    """The picture of a file, decoded; the one way to pictures, of classification and of detection.

    Raises:
        ValueError: it is no file of a disk, or see `decoded`.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return decoded(file)
    except OSError as error:
        raise ValueError(f"it cannot be read: {reason_of(error)}") from None


def read_picture(path: str | Path, mode: str) -> Image.Image:
    """The picture of a file in RGB or L; see `open_picture` and `converted`."""
    return converted(open_picture(path), mode)


def orientation(image: Image.Image) -> int:
    """The orientation that EXIF tells of a decoded picture: 1 is as stored, 2 to 8 are turned or mirrored."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF tells nothing
        return 1
    return found if found in range(1, 9) else 1


def displayed(image: Image.Image) -> Image.Image:
    """A decoded picture turned as its EXIF says; itself where that says nothing, or is damaged."""
    image.load()  # some formats turn themselves then
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format  # by which `converted` knows 16 bits
    for name in _TELLING:  # it is told no more, so nobody turns the picture again
        turned.info.pop(name, None)
    return turned


def orientation_of(path: str | Path) -> int:
    """The orientation that EXIF tells of a file, without decoding it; 1 where nothing can be read.

    Formats that Pillow turns by itself when it decodes them (TIFF) are 1.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file, Image.open(file) as image:
            return 1 if image.format == "TIFF" else orientation(image)
    except Exception:  # reading the picture itself will tell what is wrong
        return 1
