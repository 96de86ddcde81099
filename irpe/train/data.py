"""Where images come from: folders, tar archives, digits, and the data sets that timm reads by name."""

import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import IterableDataset

from .settings import Settings

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "eval", "test")
NAMED = ("torch/", "hfds/", "wds/", "hfids/", "tfds/")  # of timm.data.create_dataset
STREAMS = ("wds/", "hfids/", "tfds/")  # read in their own order only


class Source(Protocol):
    """Labelled images that can be read in any order."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, decoded, and the number of its class."""

    def name(self, index: int) -> str:
        """What a message calls it."""

    def labels(self) -> list[int] | None:
        """The classes of all images, where that costs no reading of images."""


Stream = IterableDataset[tuple[Image.Image, int]]


@dataclass
class Data:
    """What a run trains on and what it is measured on, each a Source or a stream; `classes` are their names."""

    train: Any
    val: Any
    classes: list[str]


class ReaderSource:
    """A reader of timm with random access (folder, tar, Hugging Face)."""

    def __init__(self, reader: Any, class_to_idx: dict[str, int], mode: str) -> None:
        self.reader, self.mode = reader, mode
        self.classes = sorted(class_to_idx, key=lambda name: class_to_idx[name])

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return Image.open(file).convert(self.mode), int(target)

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
        return [int(target) for _, target in self.reader.samples] if hasattr(self.reader, "samples") else None


class TorchvisionSource:
    """A data set of torchvision, which gives (PIL image, class)."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        targets = getattr(dataset, "targets", None)
        self._labels = None if targets is None else [int(one) for one in targets]
        names = getattr(dataset, "classes", None)
        count = len(names) if names is not None else max(self._labels or [0]) + 1
        self.classes = [str(one) for one in names] if names is not None else [str(one) for one in range(count)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return image.convert(self.mode), int(target)

    def name(self, index: int) -> str:
        return f"{type(self.dataset).__name__}[{index}]"

    def labels(self) -> list[int] | None:
        return self._labels


class DigitsSource:
    """A part of `irpe.digits.splits()`, as pictures of 8x8 pixels."""

    classes = tuple("0123456789")

    def __init__(self, part: str, mode: str) -> None:
        from .. import digits

        parts = digits.splits()
        if part not in parts:
            raise ValueError(f"digits has no split {part!r}; expected one of {', '.join(parts)}")
        self.part, self.mode, self.digits = part, mode, parts[part]

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = (self.digits.images[index, 0] * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy()).convert(self.mode), int(self.digits.labels[index])

    def name(self, index: int) -> str:
        return f"digits {self.part}[{index}]"

    def labels(self) -> list[int] | None:
        return [int(one) for one in self.digits.labels]


class Subset:
    """Some images of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.classes = source, list(indices), source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.source[self.indices[index]]

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def labels(self) -> list[int] | None:
        labels = self.source.labels()
        return None if labels is None else [labels[one] for one in self.indices]


def divided(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """(the rest, `share` of every class, at least one image of it), chosen by `seed` alone.

    Raises:
        ValueError: the source does not tell its classes, or one has a single image.
    """
    labels = source.labels()
    if labels is None:
        raise ValueError("--val-share needs data that tells its classes without reading it; name a --val-split instead")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).tolist()
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(labels[index], []).append(index)
    held: list[int] = []
    for label, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"class {source.classes[label]!r} has one image; --val-share needs at least two of each")
        held += indices[: min(len(indices) - 1, max(1, round(share * len(indices))))]
    chosen = set(held)
    return Subset(source, [one for one in range(len(labels)) if one not in chosen]), Subset(source, sorted(chosen))


def open_data(settings: Settings, *, train: bool = True) -> Data:
    """Finds the data of a run and checks it, without reading images.

    Args:
        train: whether the part to train on is wanted too.

    Raises:
        ValueError: nothing is there; a class without images; classes that differ between train and val; a data set
            that has to be downloaded.
    """
    mode = "RGB" if settings.in_chans == 3 else "L"
    if settings.data == "digits":
        return _data(
            DigitsSource(settings.train_split or "fit", mode),
            DigitsSource(settings.val_split or "valid", mode),
            settings,
        )
    if settings.data.startswith(NAMED):
        return _named(settings, mode, train)
    return _on_disk(settings, mode, train)


def _data(train: Any, val: Any, settings: Settings) -> Data:
    if train is not None and settings.val_share:
        train, val = divided(train, settings.val_share, settings.seed)
    classes = list((train if train is not None else val).classes)
    if train is not None and list(val.classes) != classes:
        raise ValueError(difference(classes, list(val.classes)))
    if len(classes) < 2:
        raise ValueError(f"{settings.data} has {len(classes)} class; expected at least 2")
    return Data(train, val, classes)


def difference(train: Sequence[str], val: Sequence[str]) -> str:
    """In which classes two lists of them differ, in words."""

    def some(names: Iterable[str]) -> str:
        names = list(names)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = []
    if missing := [name for name in train if name not in set(val)]:
        parts.append(f"{some(missing)} only in train")
    if extra := [name for name in val if name not in set(train)]:
        parts.append(f"{some(extra)} only in val")
    return f"the classes of train ({len(train)}) and val ({len(val)}) differ: {'; '.join(parts) or 'in their order'}"


def _on_disk(settings: Settings, mode: str, train: bool) -> Data:
    root = Path(settings.data)
    if not root.exists():
        raise ValueError(
            f"{root} does not exist; expected a folder of class folders, a .tar, digits, or a name that begins with "
            f"{', '.join(NAMED)}"
        )
    one_part = not _part(root, TRAIN, settings.train_split) and not _part(root, VAL, settings.val_split)
    if one_part:
        whole = _pictures(root, mode)
        if train and not settings.val_share:
            raise ValueError(
                f"{root} has no part to evaluate on; expected {root / 'train'} and {root / 'val'} (folders or .tar "
                "files), or --val-share 0.1 to hold some of it out"
            )
        if settings.val_share:
            return _data(whole, None, settings)
        return _data(None, whole, settings)
    found = {
        "train": _part(root, TRAIN, settings.train_split), "val": _part(root, VAL, settings.val_split),
    }  # fmt: skip
    for part, path in found.items():
        if path is None and (train if part == "train" else not settings.val_share):
            raise ValueError(f"{root} has no {part}: expected {root / part} or {root / part}.tar")
    first = _pictures(found["train"], mode) if found["train"] and (train or settings.val_share) else None
    second = _pictures(found["val"], mode) if found["val"] and not settings.val_share else None
    return _data(first, second, settings)


def _part(root: Path, names: Sequence[str], wanted: str | None) -> Path | None:
    for name in (wanted,) if wanted else names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    return None


def _pictures(root: Path, mode: str) -> ReaderSource:
    from timm.data.readers.reader_image_folder import ReaderImageFolder
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    if root.is_file() or (any(root.glob("*.tar")) and not any(one.is_dir() for one in root.iterdir())):
        _check_tars([root] if root.is_file() else sorted(root.glob("*.tar")))
        try:
            # timm writes an index beside archives of 10 GB and more
            place = root.parent if root.is_file() else root
            reader = ReaderImageInTar(str(root), cache_tarinfo=None if os.access(place, os.W_OK) else False)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{root} cannot be read as a tar archive with pictures: {error}") from None
        return ReaderSource(reader, reader.class_name_to_idx, mode)
    _check_folders(root)
    folders = ReaderImageFolder(str(root))
    return ReaderSource(folders, folders.class_to_idx, mode)


def _check_tars(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.suffix.lower() != ".tar":
            raise ValueError(f"{path} is a file; expected a folder, or an archive that ends in .tar (not compressed)")
        if not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is not a tar archive")


def _check_folders(root: Path) -> None:
    """Refuses what timm's reader would pass over: classes without pictures, pictures without a class, equal names."""
    from timm.data import get_img_extensions

    kinds = set(get_img_extensions())
    where: dict[str, str] = {}
    empty = []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        pictures = any(os.path.splitext(name)[1].lower() in kinds for name in files)
        if not pictures:
            if not below:
                empty.append(folder)
            continue
        if Path(folder) == root:
            raise ValueError(
                f"{root} holds pictures itself; expected a folder for each class, with its pictures inside"
            )
        name = os.path.basename(folder)
        if name in where:
            raise ValueError(f"two folders of the name {name!r} would be one class: {where[name]} and {folder}")
        where[name] = folder
    if empty and where:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ValueError(
            f"classes without a picture ({', '.join(sorted(kinds)[:6])}, ...): {', '.join(sorted(empty)[:5])}{more}; "
            "remove the folders or fill them"
        )
    if not where:
        raise ValueError(f"{root} has no pictures; expected a folder for each class, with its pictures inside")


def _named(settings: Settings, mode: str, train: bool) -> Data:
    """A data set of `timm.data.create_dataset`: torch/cifar10, hfds/NAME or hfds/FOLDER, wds/FOLDER."""
    splits = {"train": settings.train_split or "train", "val": settings.val_split or "validation"}
    parts = [_create(settings, mode, splits["train"], training=True) if train or settings.val_share else None]
    parts.append(None if settings.val_share else _create(settings, mode, splits["val"], training=False))
    if settings.data.startswith(STREAMS):
        if not settings.num_classes:
            raise ValueError(f"{settings.data} does not tell how many classes it has; say it with --num-classes")
        if settings.parallel == "fsdp":
            raise ValueError(f"--parallel fsdp cannot evaluate on a stream ({settings.data}); use --parallel ddp")
        if settings.val_share:
            raise ValueError("--val-share needs data that can be read in any order; name a --val-split instead")
        return Data(parts[0], parts[1], [str(one) for one in range(settings.num_classes)])
    return _data(parts[0], parts[1], settings)


def _create(settings: Settings, mode: str, split: str, training: bool) -> Any:
    from timm.data import create_dataset

    name, root = settings.data, settings.data_dir
    if name.startswith("torch/") and root is None:
        raise ValueError(f"{name} needs --data-dir: the folder where it lies, or is put by --download")
    options: dict[str, Any] = dict(root=root, split=split, download=settings.download)
    if name.startswith("wds/"):
        # timm takes the folder of the shards as root, and the split as a pattern such as train-{000..009}.tar
        name, options = "wds/", dict(root=settings.data.removeprefix("wds/") or root, split=split)
    if settings.data.startswith(STREAMS):
        options |= dict(is_training=training, seed=settings.seed, input_img_mode=mode, batch_size=1)
        if training and settings.train_samples:
            options["num_samples"] = settings.train_samples
    try:
        dataset = create_dataset(name, **options)
    except ImportError as error:
        raise ValueError(f"{settings.data}: {error}; install the package that reads it") from None
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        hint = "" if settings.download or not name.startswith("torch/") else "; --download lets torchvision fetch it"
        raise ValueError(f"{settings.data}, split {split}: {error}{hint}") from None
    if settings.data.startswith(STREAMS):
        if not training and hasattr(dataset.reader, "dist_num_replicas"):
            # shares of processes would leave images out, or count them twice, where shards do not divide
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        return dataset
    if name.startswith("torch/"):
        return TorchvisionSource(dataset, mode)
    reader = dataset.reader
    if not reader.class_to_idx:
        labels = range(settings.num_classes)
        if not labels:
            raise ValueError(f"{settings.data} does not tell its classes; say how many with --num-classes")
        return ReaderSource(reader, {str(one): one for one in labels}, mode)
    return ReaderSource(reader, reader.class_to_idx, mode)
