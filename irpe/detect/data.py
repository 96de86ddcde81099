"""Pictures with boxes, from annotations in COCO's format: a folder, or the scenes of digits made on the fly."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..runs.files import counted, read_json, reason_of
from ..runs.picture import converted, displayed, open_picture, orientation_of
from ..runs.settings import DIGITS
from ..runs.workers import RunError
from . import scenes
from .settings import Settings

NONE = "N/A"  # name of a class that no category has; COCO's numbers have holes
Box = tuple[float, float, float, float]


class Picture(NamedTuple):
    """An image of the annotations with what is on it: boxes (n, 4) as x, y, x, y in pixels, labels (n,), areas (n,)."""

    name: str
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor  # (n,) boxes of crowds are not learned, and neither right nor wrong in evaluation


class Coco:
    """Pictures of one annotation file.

    >>> data = Coco(scenes.document("val", 0, 10), lambda name: scenes.scene("val", 0, int(name[:-4]))[0], "digits")
    >>> len(data), data.classes[3], data.pictures[0].boxes.shape

    Args:
        document: what the JSON file holds.
        read: gives the image of a file name.
        name: of the file, for messages.
        classes: names of the classes of the model, in the order of its outputs; by default those of the file, in the
            order of their ids.
        stored: whether boxes are drawn on pixels as they are stored, where EXIF turns a picture and its size does not
            tell; by default they are drawn on what is displayed.

    Raises:
        ValueError: the file has no images or lacks a part, a category is not among `classes`, a box lies outside of its
            image, or an annotation belongs to nothing. Boxes that reach over the edge are clipped, boxes
            without area left out; `notes` says how many.
    """

    def __init__(
        self, document: Any, read: Callable[[str], Image.Image], name: str, classes: Sequence[str] | None = None, *,
        stored: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(document, dict) or (lacks := [k for k in _PARTS if not isinstance(document.get(k), list)]):
            lacks = lacks if isinstance(document, dict) else list(_PARTS)
            raise ValueError(
                f"{name} has no list of {', '.join(lacks)}; expected a JSON file in COCO's detection format"
            )
        self.name, self._read, self._stored = name, read, stored
        for part in _PARTS:
            strange = (k for k, entry in enumerate(document[part]) if not isinstance(entry, dict))
            if (at := next(strange, None)) is not None:
                raise ValueError(
                    f"{name}: number {at} of its {part} is {document[part][at]!r}; expected names and values"
                )
        try:
            self._fill(document, classes)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{name} is not in COCO's detection format: {type(error).__name__} {error}") from None

    def _fill(self, document: dict[str, Any], classes: Sequence[str] | None) -> None:
        categories = sorted(document["categories"], key=lambda category: category["id"])
        names = [str(category["name"]) for category in categories]
        if not document["images"] or not names:
            raise ValueError(f"{self.name} has {len(document['images'])} images and {len(names)} categories")
        if len(set(names)) < len(names) or len({category["id"] for category in categories}) < len(names):
            raise ValueError(f"{self.name} has two categories of one name or id, among {', '.join(names[:20])}")
        self.classes = list(names if classes is None else classes)
        known = named(self.classes)
        if strange := [name for name in names if name not in known]:
            raise ValueError(
                f"{self.name} has categories that the training set or the model does not have: {', '.join(strange[:5])}"
                f"{' and others' * (len(strange) > 5)}; it has {', '.join(list(known)[:10])}"
            )
        self.ids = {str(category["name"]): int(category["id"]) for category in categories}
        label_of = {category["id"]: known[str(category["name"])] for category in categories}
        sizes = {image["id"]: _size(image, self.name) for image in document["images"]}
        if len(sizes) < len(document["images"]):
            raise ValueError(f"{self.name} has several images of one id")
        found: dict[Any, list[Annotation]] = {number: [] for number in sizes}
        count = Counter[str]()
        for annotation in document["annotations"]:
            where = f"annotation {annotation.get('id')!r} of {self.name}"
            for kind, key, ids in (("image", "image_id", sizes), ("category", "category_id", label_of)):
                if annotation[key] not in ids:
                    plural, other = "images" if kind == "image" else "categories", next(iter(ids))
                    raise ValueError(
                        f"{where} is of {kind} {annotation[key]!r}, which is not among its {plural}, such as {other!r}"
                    )
            if annotation.get("bbox") is None:
                raise ValueError(f"{where} has no bbox; expected [x, y, width, height] in pixels")
            box, was_clipped = _corners(annotation["bbox"], sizes[annotation["image_id"]], where)
            count["clipped"] += was_clipped
            if box[2] <= box[0] or box[3] <= box[1]:
                count["empty"] += 1
                continue
            area, was_given = _area(annotation.get("area"), box)
            count["area"] += not was_given
            crowd = annotation.get("iscrowd") or 0
            if crowd not in (0, 1):
                raise ValueError(f"{where} has iscrowd {crowd!r}; expected 0 or 1")
            found[annotation["image_id"]].append((box, label_of[annotation["category_id"]], area, int(crowd)))
        self.pictures = [
            _picture(image, sizes[image["id"]], found[image["id"]], self.name) for image in document["images"]
        ]
        if not any(len(picture.boxes) for picture in self.pictures):
            raise ValueError(f"{self.name} has no boxes")
        if all(picture.crowd.all() for picture in self.pictures):
            raise ValueError(
                f"{self.name} has boxes of crowds alone (iscrowd 1), which are not learned and not measured"
            )
        self.notes = self._notes(count) + _of_categories(categories, document["annotations"], self.name, classes)

    def _notes(self, count: Mapping[str, int]) -> list[str]:
        files = Counter(picture.name for picture in self.pictures)
        twice = [name for name, number in files.items() if number > 1]
        return [
            f"{self.name}: {counted(number, one, many)}"
            for number, one, many in (
                (
                    count["clipped"],
                    "box reaches over the edge of its image and was clipped",
                    "boxes reach over the edge of their image and were clipped",
                ),
                (count["empty"], "box without area was left out", "boxes without area were left out"),
                (
                    count["area"],
                    "area that is none was computed from the box",
                    "areas that are none were computed from the boxes",
                ),
                (
                    len(twice),
                    f"file is several images: {', '.join(twice)}",
                    f"files are several images each, such as {', '.join(twice[:2])}",
                ),
            )
            if number
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, number: int) -> Image.Image:
        """The image of a picture, in RGB, as its boxes are drawn on it.

        Raises:
            RunError: it cannot be read, or is not as large as the annotations say.
        """
        picture = self.pictures[number]
        try:
            image = self._turned(self._read(picture.name), picture)
            image = converted(image, "RGB")
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise RunError(f"{picture.name} of {self.name} cannot be read: {reason_of(error)}") from None
        if image.size != (picture.width, picture.height):
            raise RunError(
                f"{picture.name} has {image.width}x{image.height} pixels, but {self.name} says {picture.width}x"
                f"{picture.height}: its boxes are of another version of the image, such as one that was turned"
            )
        return image

    def _turned(self, image: Image.Image, picture: Picture) -> Image.Image:
        """The image as displayed or as stored: the annotations' size tells where it can."""
        shown, size = displayed(image), (picture.width, picture.height)
        if shown.size == image.size:
            return image if self._stored else shown
        return shown if shown.size == size else image


Annotation = tuple[Box, int, float, int]  # box, label, area, crowd
_PARTS = ("images", "annotations", "categories")
_LARGEST = 1_000_000  # pixels along a side


def named(classes: Sequence[str]) -> dict[str, int]:
    """{name: number} of classes, without those that stand for holes among COCO's numbers."""
    holes = list(classes).count(NONE) > 1
    found: dict[str, int] = {}
    for number, name in enumerate(classes):
        if not (holes and name == NONE):
            found.setdefault(name, number)
    return found


def _size(image: dict[str, Any], name: str) -> tuple[int, int]:
    size = image["width"], image["height"]
    if not all(isinstance(side, (int, float)) and 0 < side <= _LARGEST and side == int(side) for side in size):
        raise ValueError(
            f"image {image['id']!r} of {name} has width and height {size}; expected whole numbers of pixels"
        )
    return int(size[0]), int(size[1])


def _corners(bbox: Any, size: tuple[int, int], where: str) -> tuple[Box, bool]:
    """(x, y, x, y inside the image, whether something was cut off)."""
    try:
        x, y, width, height = (float(number) for number in bbox)
        finite = all(map(math.isfinite, (x, y, width, height))) and not isinstance(bbox, str)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{where} has the bbox {str(bbox)[:80]}; expected [x, y, width, height] in pixels")
    if width < 0 or height < 0 or x + width < 0 or y + height < 0 or x > size[0] or y > size[1]:
        raise ValueError(
            f"{where} has the bbox {bbox} outside of its image of {size[0]}x{size[1]} pixels; expected [x, y, width, "
            "height] in pixels"
        )
    box = (max(0.0, x), max(0.0, y), min(float(size[0]), x + width), min(float(size[1]), y + height))
    # annotations are rounded to hundredths of a pixel, which is no reason for a message
    reach = max(-x, -y, x + width - size[0], y + height - size[1])
    return box, reach > 0.5


def _area(given: Any, box: Box) -> tuple[float, bool]:
    """(area, whether the file told a number that is one, or none at all); that of the box otherwise."""
    own = (box[2] - box[0]) * (box[3] - box[1])
    if given is None:
        return own, True
    try:
        area = float(given)
    except (TypeError, ValueError, OverflowError):
        area = math.nan
    return (area, True) if 0 <= area < math.inf else (own, False)


def _of_categories(
    categories: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    name: str,
    classes: Sequence[str] | None,
) -> list[str]:
    """What is kept of numbers with holes, and of a category that only stands above the others."""
    ids, notes = [category["id"] for category in categories], []
    if classes is None and ids != list(range(ids[0], ids[0] + len(ids))):
        names = ", ".join(str(category["name"]) for category in categories[:5]) + ", ..." * (len(categories) > 5)
        notes.append(
            f"{name}: the ids of its {len(ids)} categories, {ids[0]} to {ids[-1]}, have holes; classes are numbered "
            f"from 0 in their order: {names}"
        )
    used = {annotation["category_id"] for annotation in annotations}
    above = {str(category.get("supercategory")) for category in categories}
    for category in categories:
        if category["id"] not in used and str(category["name"]) in above and len(categories) > 1:
            notes.append(
                f"{name}: category {category['name']} (id {category['id']}) has no boxes and stands above others; it "
                "is kept as a class of its own"
            )
    return notes


def _picture(image: dict[str, Any], size: tuple[int, int], found: list[Annotation], where: str) -> Picture:
    name = image["file_name"]
    path = PurePath(name) if isinstance(name, str) and name else None
    if path is None or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"image {image['id']!r} of {where} has the file_name {name!r}; expected a name inside the folder of images"
        )
    boxes, labels, areas, crowd = zip(*found, strict=True) if found else ((), (), (), ())
    return Picture(
        name, size[1], size[0], torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(labels, dtype=torch.long), torch.tensor(areas).float(), torch.tensor(crowd, dtype=torch.long),
    )  # fmt: skip


def open_part(settings: Settings, part: str, classes: Sequence[str] | None = None) -> Coco:
    """The pictures to train on ("train") or to evaluate on ("val").

    Raises:
        ValueError: see `Coco`; or a file or a folder is missing, with the places where it was looked for.
    """
    if settings.data == DIGITS:
        count = settings.train_scenes if part == "train" else settings.val_scenes
        # scenes are the same for all seeds of a training
        document = scenes.document(part, 0, count, settings.digit_classes)
        return Coco(document, _Scenes(part), f"digits ({part})", classes)
    file, folder = _places(settings, part)
    data = Coco(read_json(file), _Files(folder), str(file), classes, stored=settings.orientation == "stored")
    present = {entry.name for entry in os.scandir(folder)}
    lost = [
        picture.name
        for picture in data.pictures
        if picture.name not in present and not (folder / picture.name).is_file()
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(data)} images that {file} names are not in {folder}: {', '.join(lost[:3])}"
        )
    return data


class _Scenes:
    """Makes the scene of a file name; a class, so that loader workers can be started with it."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, name: str) -> Image.Image:
        return scenes.scene(self.part, 0, int(name.removesuffix(".png")))[0]


class _Files:
    """Opens the file of a file name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Image.Image:
        return open_picture(self.folder / name)


def turned(data: Coco, settings: Settings) -> list[str]:
    """A line about pictures that EXIF turns, or none: how many, and what their boxes are taken to be drawn on."""
    if settings.data == DIGITS or not isinstance(data._read, _Files):
        return []
    paths = [data._read.folder / picture.name for picture in data.pictures]
    with ThreadPoolExecutor(8) as threads:
        count = sum(turn != 1 for turn in threads.map(orientation_of, paths))
    if not count:
        return []
    return [
        f"{data.name}: {count} of {len(data)} pictures have an orientation in EXIF; their boxes are taken to be drawn "
        f"on them as they are {settings.orientation} (--orientation), unless the sizes in the file say otherwise"
    ]


def is_annotated(data: str) -> bool:
    """Whether a folder has a file of annotations where `open_part` looks for them."""
    return any(file.is_file() for part in ("train", "val") for file in _annotation_files(Path(data), part))


def _annotation_files(root: Path, part: str) -> list[Path]:
    notes = root / "annotations"
    return [
        *(notes / f"{name}.json" for name in (f"instances_{part}2017", f"instances_{part}", part)),
        *(root / name / "_annotations.coco.json" for name in (part, "valid" if part == "val" else part)),
    ]


def _places(settings: Settings, part: str) -> tuple[Path, Path]:
    """(annotation file, folder of images) of a part: as the options say, or the first that exists."""
    root = Path(settings.data)
    if not root.is_dir():
        raise ValueError(f"DATA {settings.data} is not a folder; expected one in COCO's layout, or {DIGITS}")
    year = f"{part}2017"
    named = settings.train_json if part == "train" else settings.val_json
    files = [Path(named)] if named else _annotation_files(root, part)
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        option = "" if named else f"; or name it with --{part}-json"
        raise ValueError(f"there is no annotation file for {part}: looked for {', '.join(map(str, files))}{option}")
    named = settings.train_images if part == "train" else settings.val_images
    beside = [file.parent] if file.name == "_annotations.coco.json" else []
    folders = [Path(named)] if named else [*beside, root / year, root / part, root / "images" / part, root / "images"]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        option = "" if named else f"; or name it with --{part}-images"
        raise ValueError(f"there is no folder of images for {part}: looked for {', '.join(map(str, folders))}{option}")
    return file, folder
