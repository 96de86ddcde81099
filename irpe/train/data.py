"""Where images come from: folders, tar archives, digits, and the data sets that timm reads by name."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import IterableDataset

from ..runs.files import read_text
from ..runs.picture import converted, mode_of, read_picture
from ..runs.settings import DIGITS, refuse_two_digits
from .pictures import ReaderSource, pictures
from .settings import Settings
from .shards import check_pattern, check_shards, local_only, root_of

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
    """What a run trains on and what it is measured on, each a Source or a stream; `classes` are their names.

    `notes` are sentences about what was found, for whoever started the run.
    """

    train: Any
    val: Any
    classes: list[str]
    notes: list[str] = field(default_factory=list)


class TorchvisionSource:
    """A data set of torchvision, which gives (PIL image, class)."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        if getattr(getattr(dataset, "loader", None), "__name__", "") == "default_loader":
            dataset.loader = functools.partial(read_picture, mode=mode)  # torchvision's spoils 16-bit pictures
        targets = getattr(dataset, "targets", None)
        self._labels = None if targets is None else [int(target) for target in targets]
        names = getattr(dataset, "classes", None)
        count = len(names) if names is not None else max(self._labels or [0]) + 1
        self.classes = list(map(str, range(count) if names is None else names))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return converted(image, self.mode), int(target)

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
        return [int(label) for label in self.digits.labels]


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
        return None if labels is None else [labels[index] for index in self.indices]


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
    rest = [index for index in range(len(labels)) if index not in chosen]
    return Subset(source, rest), Subset(source, sorted(chosen))


def open_data(settings: Settings, *, train: bool = True) -> Data:
    """Finds the data of a run and checks it, without reading images.

    Args:
        train: whether the part to train on is wanted too.

    Raises:
        ValueError: nothing is there; a class without images; classes that differ between train and val; a data set
            that has to be downloaded; --val-share where there is a part to evaluate on.
    """
    mode = mode_of(settings.in_chans)
    if settings.val_share and settings.val_split:
        raise ValueError(
            f"--val-share {settings.val_share:g} and --val-split {settings.val_split} both say what to evaluate on; "
            "leave one out"
        )
    if settings.data == DIGITS:
        if train:
            refuse_two_digits(settings.data)
        if settings.val_share and not settings.train_split:
            raise ValueError("--val-share: digits has a part to evaluate on; leave it out, or add --train-split train")
        return _data(
            DigitsSource(settings.train_split or "fit", mode),
            DigitsSource(settings.val_split or "valid", mode),
            settings,
        )
    if settings.data.startswith(NAMED):
        return _named(settings, mode, train)
    return _on_disk(settings, mode, train)


def located(settings: Settings, start: Path) -> Settings:
    """The settings with paths of data that are relative to the folder `start` made absolute, where they are there."""

    def there(text: str) -> str:
        kind = next((prefix for prefix in NAMED if text.startswith(prefix)), "")
        path = start / text.removeprefix(kind)
        return kind + str(path.resolve()) if text != kind and path.exists() else text

    # the names of torchvision's sets and of the built-in digits are no paths
    data = settings.data if settings.data == DIGITS or settings.data.startswith("torch/") else there(settings.data)
    return dataclasses.replace(settings, data=data, data_dir=settings.data_dir and there(settings.data_dir))


def elsewhere(data: str) -> bool:
    """Whether a name of data is one on the hub, or of a download: no folder or file here has it."""
    kind = next((prefix for prefix in ("hfds/", "hfids/", "tfds/") if data.startswith(prefix)), None)
    return kind is not None and not Path(data.removeprefix(kind)).exists()


def fetched(settings: Settings, *, goes_on: bool = False) -> list[str]:
    """Names of the settings whose values would be fetched, or let something be fetched.

    Args:
        goes_on: with a run, which has its weights, and data that was there.
    """
    wanted = {
        "data": elsewhere(settings.data), "download": settings.download and not goes_on, "model": ":" in settings.model,
        "pretrained": settings.pretrained == "hub" and not goes_on,
    }  # fmt: skip
    return [name for name, is_so in wanted.items() if is_so]


def check_card(name: str) -> None:
    """Refuses a local data set of Hugging Face whose card names addresses, which would be fetched.

    Raises:
        ValueError: with the card.
    """
    card = Path(name.removeprefix("hfds/")) / "README.md"
    if not card.is_file():
        return
    head = read_text(card).split("\n---", 1)[0]
    if head.startswith("---") and re.search(r"data_(?:files|dir)[^\0]*?(?:://|::)", head):
        raise ValueError(
            f"{name}: {card} names data at an address; what a file names is not fetched. Download it first"
        )


def same_data(a: str, b: str) -> bool:
    """Whether both name the same data: pictures, ./pictures/ and /home/me/pictures do."""
    return a == b or (DIGITS not in (a, b) and Path(a).exists() and Path(b).exists() and os.path.samefile(a, b))


def _data(train: Any, val: Any, settings: Settings, notes: Sequence[str] = ()) -> Data:
    if train is not None and settings.val_share:
        train, val = divided(train, settings.val_share, settings.split_seed)
    classes = list((train if train is not None else val).classes)
    if train is not None and list(val.classes) != classes:
        raise ValueError(difference(classes, list(val.classes)))
    if len(classes) < 2:
        raise ValueError(f"{settings.data} has {len(classes)} class; expected at least 2")
    return Data(train, val, classes, list(notes))


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
    root, share = Path(settings.data), settings.val_share
    if not root.exists():
        elsewhere = "" if train else "; --data says where it lies now"
        raise ValueError(
            f"{root} does not exist; expected a folder of class folders, a .tar, digits, or a name that begins with "
            f"{', '.join(NAMED)}{elsewhere}"
        )
    first, second = _part(root, TRAIN, settings.train_split), _part(root, VAL, settings.val_split)
    named = settings.train_split if train or share else None
    if share and (own := _part(root, VAL[:-1], None)):  # a part named test may well be kept for the end
        raise ValueError(
            f"--val-share {share:g}, but {own} is there to evaluate on: leave --val-share out, or name "
            f"{first or root / TRAIN[0]} as DATA"
        )
    if not (first or second or named or settings.val_split):  # one part
        if train and not share:
            raise ValueError(
                f"{root} has no part to evaluate on; expected {root / 'train'} and {root / 'val'} (folders or .tar "
                "files), or --val-share 0.1 to hold some of it out"
            )
        whole, notes = pictures(root, mode)
        return _data(whole, None, settings, notes) if share else _data(None, whole, settings, notes)
    parts: list[Any] = []
    notes = []
    for path, names, wanted, needed in (
        (first, TRAIN, settings.train_split, train or share), (second, VAL, settings.val_split, not share),
    ):  # fmt: skip
        if needed and path is None:
            others = "" if wanted else f" (or {', '.join(names[1:])})"
            part = wanted or names[0]
            raise ValueError(f"{root} has no {part}: expected {root / part} or {root / part}.tar{others}")
        found, words = pictures(path, mode) if path is not None and needed else (None, [])
        parts.append(found)
        notes += words
    return _data(parts[0], parts[1], settings, notes)


def in_one_part(settings: Settings) -> bool:
    """Whether the data lies on the disk as it is, without a part to train on and one to evaluate on."""
    root = Path(settings.data)
    if settings.data == DIGITS or settings.data.startswith(NAMED) or settings.val_share:
        return False
    splits = (TRAIN, settings.train_split), (VAL, settings.val_split)
    return root.exists() and not any(wanted or _part(root, names, None) for names, wanted in splits)


def _part(root: Path, names: Sequence[str], wanted: str | None) -> Path | None:
    for name in (wanted,) if wanted else names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    return None


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
        return Data(parts[0], parts[1], [str(number) for number in range(settings.num_classes)])
    return _data(parts[0], parts[1], settings)


def _create(settings: Settings, mode: str, split: str, training: bool) -> Any:
    from timm.data import create_dataset

    name, root = settings.data, settings.data_dir
    if name.startswith("torch/") and root is None:
        raise ValueError(f"{name} needs --data-dir: the folder where it lies, or is put by --download")
    options: dict[str, Any] = dict(root=root, split=split, download=settings.download)
    if name.startswith("wds/"):
        # timm takes the folder of the shards as root, and the split as a pattern such as train-{000..009}.tar
        check_pattern(split)
        name, options = "wds/", dict(root=root_of(name, name.removeprefix("wds/") or root or ""), split=split)
    if name.startswith("hfds/"):
        check_card(name)
    if settings.data.startswith(STREAMS):
        # tfds decodes into the mode itself; what the others have decoded is converted by StreamSamples
        own = mode if name.startswith("tfds/") else ""
        options |= dict(is_training=training, seed=settings.seed, input_img_mode=own, batch_size=1)
        if training and settings.train_samples:
            options["num_samples"] = settings.train_samples
    try:
        if name == "wds/":
            local_only()
        dataset = create_dataset(name, **options)
    except ImportError as error:
        raise ValueError(f"{settings.data}: {error}; install the package that reads it") from None
    except Exception as error:  # what a data set of somebody else can bring about has no end
        hint = "" if settings.download or not name.startswith("torch/") else "; --download lets torchvision fetch it"
        raise ValueError(f"{settings.data}, split {split}: {error or type(error).__name__}{hint}") from None
    if name == "wds/":
        check_shards(settings.data, dataset.reader)
    if settings.data.startswith(STREAMS):
        if not training and hasattr(dataset.reader, "dist_num_replicas"):
            # shares of processes would leave images out, or count them twice, where shards do not divide
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        return dataset
    if name.startswith("torch/"):
        _check_split(settings, dataset, split)
        return TorchvisionSource(dataset, mode)
    reader = dataset.reader
    if not reader.class_to_idx:
        labels = range(settings.num_classes)
        if not labels:
            raise ValueError(f"{settings.data} does not tell its classes; say how many with --num-classes")
        return ReaderSource(reader, {str(label): label for label in labels}, mode)
    return ReaderSource(reader, reader.class_to_idx, mode)


def _check_split(settings: Settings, dataset: Any, split: str) -> None:
    """Refuses splits for which timm gives another one: that of the test, or the whole folder."""
    name, known = settings.data, (*TRAIN, *VAL, "evaluation")
    kind, asked = name.split("/", 2)[-1].lower(), split in (settings.train_split, settings.val_split)
    if kind in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist") and split not in known:
        raise ValueError(f"{name} has no split {split!r}; expected train or test")
    if kind in ("image_folder", "folder") and dataset.root == settings.data_dir and (asked or not settings.val_share):
        raise ValueError(f"{name}: {dataset.root} has no {split}: expected {Path(dataset.root) / split}")
