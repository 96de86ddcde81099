"""Pictures on a disk: which files are pictures, folders of class folders, tar archives, and how one file is read."""

import functools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .files import check_regular, reason_of

# formats that Pillow registers and cannot decode by itself, and one of measurements
_OTHERS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_NOISE = {"thumbs.db", "desktop.ini", "__macosx"}
_INDEXED = 10 * 1024**3  # bytes of archives from which on timm writes an index beside them


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


class FolderSource:
    """Pictures in folders, of which each that holds some is a class, whatever it lies in."""

    def __init__(self, classes: Sequence[str], paths: Sequence[str], targets: Sequence[int], mode: str) -> None:
        self.classes, self.paths, self.mode = list(classes), list(paths), mode
        self._targets = list(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_picture(self.paths[index], self.mode), self._targets[index]

    def name(self, index: int) -> str:
        return self.paths[index]

    def labels(self) -> list[int] | None:
        return self._targets


class ReaderSource:
    """A reader of timm with random access (tar, Hugging Face)."""

    def __init__(self, reader: Any, class_to_idx: dict[str, int], mode: str) -> None:
        self.reader, self.mode = reader, mode
        self.classes = sorted(class_to_idx, key=lambda name: class_to_idx[name])

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return converted(decoded(file), self.mode), int(target)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))

    def reopen(self) -> None:
        """Forgets open archives: a process that was forked shares their place in the file with its parent."""
        states = getattr(self.reader, "tar_state", {})
        for state in states.values() if isinstance(states, dict) else [states]:
            for one in (state, *state.children.values()):
                one.tf = None

    def labels(self) -> list[int] | None:
        if hasattr(self.reader, "targets"):
            return [int(one) for one in self.reader.targets]
        return None


def pictures(root: Path, mode: str) -> tuple[FolderSource | ReaderSource, list[str]]:
    """(the pictures of a folder of class folders, of a .tar, or of a folder of .tar files; what to say about them).

    Raises:
        ValueError: there are none; a class has none; a picture has no class; two folders would be one class.
    """
    if not root.is_dir() or (any(root.glob("*.tar")) and not any(one.is_dir() for one in root.iterdir())):
        return _archives(root, mode)
    return _folders(root, mode)


def _folders(root: Path, mode: str) -> tuple[FolderSource, list[str]]:
    from timm.utils.misc import natural_key

    where: dict[str, str] = {}
    places: set[str] = set()
    found: list[tuple[str, str]] = []
    empty, others = [], []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not _hidden(name))
        mine = [name for name in files if not _hidden(name) and _extension(name) in kinds()]
        others += [name for name in files if not _hidden(name) and _extension(name) not in kinds()]
        if not mine:
            if not below:
                empty.append(folder)
            continue
        if Path(folder) == root:
            raise ValueError(
                f"{root} holds pictures itself; expected a folder for each class, with its pictures inside"
            )
        name = os.path.basename(folder)
        places.add(folder)
        if (parent := next((str(one) for one in Path(folder).parents if str(one) in places), None)) is not None:
            raise ValueError(nested(parent, folder))
        if name in where:
            raise ValueError(f"two folders of the name {name!r} would be one class: {where[name]} and {folder}")
        where[name] = folder
        found += [(os.path.join(folder, one), name) for one in mine]
    if empty and where:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ValueError(
            f"classes without a picture (.jpg, .png, .webp, ...): {', '.join(sorted(empty)[:5])}{more}; remove the "
            "folders or fill them"
        )
    if not where:
        raise ValueError(f"{root} has no pictures; expected a folder for each class, with its pictures inside")
    # the order of timm's reader of folders, whose epochs are the same then
    classes = sorted(where, key=natural_key)
    found.sort(key=lambda one: natural_key(one[0]))
    number = {name: k for k, name in enumerate(classes)}
    source = FolderSource(classes, [path for path, _ in found], [number[name] for _, name in found], mode)
    return source, _left_out(root, others)


def nested(parent: object, folder: object) -> str:
    """The sentence about two folders of which the inner one would be a class beside the outer one."""
    return (
        f"{parent} holds pictures, and so does {folder} inside it, which would be a class of its own; move its "
        "pictures up, or the folder out"
    )


def _archives(root: Path, mode: str) -> tuple[ReaderSource, list[str]]:
    from timm.data import get_img_extensions, set_img_extensions
    from timm.data.readers import reader_image_in_tar

    paths = [root] if not root.is_dir() else sorted(root.glob("*.tar"))
    _check_tars(paths)
    place = root.parent if root.is_file() else root
    index = place / f"_{root.stem if root.is_file() else root.name}_tarinfos.pickle"
    indexed = index.exists() and sum(one.stat().st_size for one in paths) > _INDEXED
    own = get_img_extensions()
    set_img_extensions(sorted(kinds()))  # the reader has no argument for them
    try:
        others: list[str] = []
        for path in () if indexed else paths:
            with tarfile.open(path) as archive:
                others += _others(archive)
        # the index is a pickle; timm reads it as plain data, and did not always
        may = os.access(place, os.W_OK) and hasattr(reader_image_in_tar, "_TarInfoUnpickler")
        reader = reader_image_in_tar.ReaderImageInTar(str(root), cache_tarinfo=None if may else False)
    except RecursionError:
        raise ValueError(f"{root} holds archives in archives without an end; expected one level of them") from None
    except Exception as error:  # what a damaged archive, or its index, raises has no end
        raise ValueError(f"{root} cannot be read as a tar archive with pictures: {reason_of(error)}") from None
    finally:
        set_img_extensions(own)
    notes = _left_out(root, others)
    if indexed:
        notes = [f"{root}: its files were taken from {index}, which timm wrote; remove that if they have changed"]
    _name_classes(reader, root)
    return ReaderSource(reader, reader.class_name_to_idx, mode), notes


def _name_classes(reader: Any, root: Path) -> None:
    """Names the classes of timm's reader anew, without what it takes from ./ in names and from hidden files.

    (`tar -C cat .` writes ./1.jpg, whose class is "." there; macOS puts ._1.jpg beside.)
    """
    from timm.utils.misc import natural_key

    shown, labels = [], []
    where: dict[str, PurePosixPath] = {}
    files: Counter[str] = Counter()
    for number, (file, archive, inner) in enumerate(reader.samples):
        parts = [PurePosixPath(one).with_suffix("").as_posix() for one in (archive, inner and inner.name) if one]
        path = PurePosixPath(file.path)  # which has no ./ any more
        if any(map(_hidden, path.parts)):
            continue
        place = PurePosixPath(*parts, *path.parent.parts)
        if not place.name:
            raise ValueError(
                f"{root} holds pictures itself ({path}); expected a folder for each class, with its pictures inside"
            )
        if where.setdefault(place.name, place) != place:
            raise ValueError(
                f"two folders of the name {place.name!r} would be one class: {where[place.name]} and {place} in {root}"
            )
        files[f"{place}/{path.name}"] += 1
        shown.append(number)
        labels.append(place.name)
    for place in where.values():
        if outer := next((one for one in place.parents if where.get(one.name) == one and one.name), None):
            raise ValueError(nested(f"{outer} in {root}", place))
    if twice := [name for name, count in files.items() if count > 1]:
        raise ValueError(
            f"{root} holds {len(twice)} names twice, such as {twice[0]}: the last one of a name is its content; make "
            "the archive anew"
        )
    if not shown:
        raise ValueError(f"{root} has no pictures; expected a folder for each class, with its pictures inside")
    reader.class_name_to_idx = {name: k for k, name in enumerate(sorted(set(labels), key=natural_key))}
    reader.samples = reader.samples[shown]
    reader.targets = np.array([reader.class_name_to_idx[name] for name in labels])


def _others(archive: tarfile.TarFile, within: str = "") -> Iterator[str]:
    """The names of the files of an archive, and of archives in it, that are no pictures."""
    for one in archive:
        if not one.isfile() or any(map(_hidden, PurePosixPath(one.name).parts)):
            continue
        if _extension(one.name) == ".tar":
            if within:
                raise ValueError(f"{within}/{one.name} is an archive in an archive in another; expected one level")
            with tarfile.open(fileobj=archive.extractfile(one)) as inner:
                yield from _others(inner, one.name)
        elif _extension(one.name) not in kinds():
            yield one.name


def _check_tars(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            check_regular(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
        if path.suffix.lower() != ".tar":
            raise ValueError(f"{path} is a file; expected a folder, or an archive that ends in .tar (not compressed)")
        if not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is not a tar archive")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    """Whether a file or folder is one that systems put there: .DS_Store, Thumbs.db, ..."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _NOISE


def _left_out(root: Path, names: Iterable[str]) -> list[str]:
    """A line about files that are no pictures, or none."""
    count = Counter(_extension(name) or "no extension" for name in names)
    if not count:
        return []
    shown = [f"{name} ({number:,})" for name, number in count.most_common(8)] + ["..."] * (len(count) > 8)
    total = sum(count.values())
    words = "file was left out that is no picture" if total == 1 else "files were left out that are no pictures"
    return [f"{root}: {total:,} {words}: {', '.join(shown)}"]
