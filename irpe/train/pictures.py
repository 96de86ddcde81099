"""Pictures on a disk: folders of class folders, and tar archives."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ..runs.files import check_regular, reason_of
from ..runs.picture import converted, decoded, extension, hidden, kinds, natural, read_picture, walk

_INDEXED = 10 * 1024**3  # bytes of archives from which on timm writes an index beside them


class FolderSource:
    """Pictures in folders, of which each that holds some is a class, whatever it lies in."""

    def __init__(self, classes: Sequence[str], paths: Sequence[str], targets: Sequence[int], mode: str) -> None:
        self.classes, self.paths, self.mode = list(classes), list(paths), mode
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_picture(self.paths[index], self.mode), self.targets[index]

    def name(self, index: int) -> str:
        return self.paths[index]

    def labels(self) -> list[int] | None:
        return self.targets


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
            for archive in (state, *state.children.values()):
                archive.tf = None

    def labels(self) -> list[int] | None:
        if hasattr(self.reader, "targets"):
            return [int(target) for target in self.reader.targets]
        return None


def pictures(root: Path, mode: str) -> tuple[FolderSource | ReaderSource, list[str]]:
    """(the pictures of a folder of class folders, of a .tar, or of a folder of .tar files; what to say about them).

    Raises:
        ValueError: there are none; a class has none; a picture has no class; two folders would be one class.
    """
    if not root.is_dir() or (any(root.glob("*.tar")) and not any(entry.is_dir() for entry in root.iterdir())):
        return _archives(root, mode)
    return _folders(root, mode)


def _folders(root: Path, mode: str) -> tuple[FolderSource, list[str]]:
    where: dict[str, str] = {}
    places: set[str] = set()
    found: list[tuple[str, str]] = []
    empty, others = [], []
    for folder, mine, rest, has_folders in walk(root):
        others += rest
        if not mine:
            if not has_folders:
                empty.append(folder)
            continue
        if Path(folder) == root:
            raise ValueError(
                f"{root} holds pictures itself; expected a folder for each class, with its pictures inside"
            )
        name = os.path.basename(folder)
        places.add(folder)
        if (parent := next((str(outer) for outer in Path(folder).parents if str(outer) in places), None)) is not None:
            raise ValueError(nested(parent, folder))
        if name in where:
            raise ValueError(f"two folders of the name {name!r} would be one class: {where[name]} and {folder}")
        where[name] = folder
        found += [(os.path.join(folder, file), name) for file in mine]
    if empty and where:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ValueError(
            f"classes without a picture (.jpg, .png, .webp, ...): {', '.join(sorted(empty)[:5])}{more}; remove the "
            "folders or fill them"
        )
    if not where:
        raise ValueError(f"{root} has no pictures; expected a folder for each class, with its pictures inside")
    # the order of timm's reader of folders, whose epochs are the same then
    classes = sorted(where, key=natural)
    found.sort(key=lambda picture: natural(picture[0]))
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
    indexed = index.exists() and sum(path.stat().st_size for path in paths) > _INDEXED
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
    shown, labels = [], []
    where: dict[str, PurePosixPath] = {}
    files: Counter[str] = Counter()
    for number, (file, archive, inner) in enumerate(reader.samples):
        parts = [PurePosixPath(part).with_suffix("").as_posix() for part in (archive, inner and inner.name) if part]
        path = PurePosixPath(file.path)  # which has no ./ any more
        if any(map(hidden, path.parts)):
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
        above = (folder for folder in place.parents if folder.name and where.get(folder.name) == folder)
        if outer := next(above, None):
            raise ValueError(nested(f"{outer} in {root}", place))
    if twice := [name for name, count in files.items() if count > 1]:
        raise ValueError(
            f"{root} holds {len(twice)} names twice, such as {twice[0]}: the last one of a name is its content; make "
            "the archive anew"
        )
    if not shown:
        raise ValueError(f"{root} has no pictures; expected a folder for each class, with its pictures inside")
    reader.class_name_to_idx = {name: k for k, name in enumerate(sorted(set(labels), key=natural))}
    reader.samples = reader.samples[shown]
    reader.targets = np.array([reader.class_name_to_idx[name] for name in labels])


def _others(archive: tarfile.TarFile, within: str = "") -> Iterator[str]:
    """The names of the files of an archive, and of archives in it, that are no pictures."""
    for member in archive:
        if not member.isfile() or any(map(hidden, PurePosixPath(member.name).parts)):
            continue
        if extension(member.name) == ".tar":
            if within:
                raise ValueError(f"{within}/{member.name} is an archive in an archive in another; expected one level")
            with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                yield from _others(inner, member.name)
        elif extension(member.name) not in kinds():
            yield member.name


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


def _left_out(root: Path, names: Iterable[str]) -> list[str]:
    """A line about files that are no pictures, or none."""
    count = Counter(extension(name) or "no extension" for name in names)
    if not count:
        return []
    shown = [f"{name} ({number:,})" for name, number in count.most_common(8)] + ["..."] * (len(count) > 8)
    total = sum(count.values())
    words = "file was left out that is no picture" if total == 1 else "files were left out that are no pictures"
    return [f"{root}: {total:,} {words}: {', '.join(shown)}"]
