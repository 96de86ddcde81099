"""One file as a picture: which files are some, how one is decoded, and what it becomes. The one way to pictures."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .files import check_regular, reason_of

# formats that Pillow registers and cannot decode by itself, and one of measurements
_OTHERS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def kinds() -> frozenset[str]:
    """The extensions of files that are read as pictures: .jpg, .png, .webp and all others that Pillow decodes."""
    known = Image.registered_extensions()
    readable = {name for name, kind in known.items() if kind in Image.OPEN and kind not in _OTHERS}
    return frozenset((readable | {".mpo"}) - {".pfm"})  # .mpo is opened as JPEG, .pfm holds 32-bit numbers


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
