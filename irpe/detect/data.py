"""Pictures with boxes, from annotations in COCO's format: a folder, or the scenes of digits made on the fly."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..train.loader import RunError
from ..train.pictures import converted
from . import scenes
from .settings import DIGITS, Settings

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

    Raises:
        ValueError: the file has no images or lacks a part, a category is not among `classes`, a box lies outside of its
            image, or an annotation belongs to nothing. Boxes that reach over the edge are clipped, boxes
            without area left out; `notes` says how many.
    """

    def __init__(
        self, document: Any, read: Callable[[str], Image.Image], name: str, classes: Sequence[str] | None = None
    ) -> None:
        if not isinstance(document, dict) or (lacks := [k for k in _PARTS if not isinstance(document.get(k), list)]):
            lacks = lacks if isinstance(document, dict) else list(_PARTS)
            raise ValueError(
                f"{name} has no list of {', '.join(lacks)}; expected a JSON file in COCO's detection format"
            )
        self.name, self._read = name, read
        try:
            self._fill(document, classes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} is not in COCO's detection format: {type(error).__name__} {error}") from None

    def _fill(self, document: dict[str, Any], classes: Sequence[str] | None) -> None:
        categories = sorted(document["categories"], key=lambda one: one["id"])
        names = [str(one["name"]) for one in categories]
        if not document["images"] or not names:
            raise ValueError(f"{self.name} has {len(document['images'])} images and {len(names)} categories")
        if len(set(names)) < len(names) or len({one["id"] for one in categories}) < len(names):
            raise ValueError(f"{self.name} has two categories of one name or id, among {', '.join(names[:20])}")
        self.classes = list(names if classes is None else classes)
        if strange := [one for one in names if one not in self.classes]:
            raise ValueError(
                f"{self.name} has categories that the training set or the model does not have: {', '.join(strange[:5])}"
                f"{' and others' * (len(strange) > 5)}; it has {', '.join(self.classes[:10])}"
            )
        self.ids = {str(one["name"]): int(one["id"]) for one in categories}
        label_of = {one["id"]: self.classes.index(str(one["name"])) for one in categories}
        sizes = {one["id"]: (one["width"], one["height"]) for one in document["images"]}
        if len(sizes) < len(document["images"]):
            raise ValueError(f"{self.name} has several images of one id")
        found: dict[Any, list[tuple[Box, int, float, int]]] = {one: [] for one in sizes}
        clipped = empty = 0
        for one in document["annotations"]:
            where = f"annotation {one.get('id')} of {self.name}"
            if one["image_id"] not in sizes:
                raise ValueError(f"{where} is of image {one['image_id']}, which is not among its images")
            if one["category_id"] not in label_of:
                raise ValueError(f"{where} is of category {one['category_id']}, which is not among its categories")
            box, was_clipped = _corners(one["bbox"], sizes[one["image_id"]], where)
            clipped += was_clipped
            if box[2] <= box[0] or box[3] <= box[1]:
                empty += 1
                continue
            area = float(one.get("area", (box[2] - box[0]) * (box[3] - box[1])))
            found[one["image_id"]].append((box, label_of[one["category_id"]], area, int(one.get("iscrowd", 0))))
        self.pictures = [_picture(one, found[one["id"]]) for one in document["images"]]
        if not any(len(one.boxes) for one in self.pictures):
            raise ValueError(f"{self.name} has no boxes")
        self.notes = [
            words
            for number, words in (
                (clipped, f"{self.name}: {clipped} boxes reach over the edge of their image and were clipped"),
                (empty, f"{self.name}: {empty} boxes without area were left out"),
            )
            if number
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, number: int) -> Image.Image:
        """The image of a picture, in RGB.

        Raises:
            RunError: it cannot be read, or is not as large as the annotations say.
        """
        picture = self.pictures[number]
        try:
            image = converted(self._read(picture.name), "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RunError(f"{picture.name} of {self.name} cannot be read: {error}") from None
        if image.size != (picture.width, picture.height):
            raise RunError(
                f"{picture.name} has {image.width}x{image.height} pixels, but {self.name} says {picture.width}x"
                f"{picture.height}: its boxes are of another version of the image, such as one that was turned"
            )
        return image


_PARTS = ("images", "annotations", "categories")


def _corners(bbox: Any, size: tuple[int, int], where: str) -> tuple[Box, bool]:
    """(x, y, x, y inside the image, whether something was cut off)."""
    if len(bbox) != 4 or not all(math.isfinite(one) for one in bbox):
        raise ValueError(f"{where} has the bbox {bbox}; expected [x, y, width, height] in pixels")
    x, y, width, height = (float(one) for one in bbox)
    if width < 0 or height < 0 or x + width < 0 or y + height < 0 or x > size[0] or y > size[1]:
        raise ValueError(
            f"{where} has the bbox {bbox} outside of its image of {size[0]}x{size[1]} pixels; expected [x, y, width, "
            "height] in pixels"
        )
    box = (max(0.0, x), max(0.0, y), min(float(size[0]), x + width), min(float(size[1]), y + height))
    # annotations are rounded to hundredths of a pixel, which is no reason for a message
    reach = max(-x, -y, x + width - size[0], y + height - size[1])
    return box, reach > 0.5


def _picture(image: dict[str, Any], found: list[tuple[Box, int, float, int]]) -> Picture:
    boxes, labels, areas, crowd = zip(*found, strict=True) if found else ((), (), (), ())
    return Picture(
        str(image["file_name"]), int(image["height"]), int(image["width"]), torch.tensor(boxes).reshape(-1, 4).float(),
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
    try:
        document = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    data = Coco(document, _Files(folder), str(file), classes)
    present = {one.name for one in os.scandir(folder)}
    lost = [one.name for one in data.pictures if one.name not in present and not (folder / one.name).is_file()]
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
        return Image.open(self.folder / name)


def _places(settings: Settings, part: str) -> tuple[Path, Path]:
    """(annotation file, folder of images) of a part: as the options say, or the first that exists."""
    root = Path(settings.data)
    if not root.is_dir():
        raise ValueError(f"DATA {settings.data} is not a folder; expected one in COCO's layout, or {DIGITS}")
    year = f"{part}2017"
    named = settings.train_json if part == "train" else settings.val_json
    notes = root / "annotations"
    files = [Path(named)] if named else [
        *(notes / f"{one}.json" for one in (f"instances_{year}", f"instances_{part}", part)),
        *(root / one / "_annotations.coco.json" for one in (part, "valid" if part == "val" else part)),
    ]  # fmt: skip
    file = next((one for one in files if one.is_file()), None)
    if file is None:
        option = "" if named else f"; or name it with --{part}-json"
        raise ValueError(f"there is no annotation file for {part}: looked for {', '.join(map(str, files))}{option}")
    named = settings.train_images if part == "train" else settings.val_images
    beside = [file.parent] if file.name == "_annotations.coco.json" else []
    folders = [Path(named)] if named else [*beside, root / year, root / part, root / "images" / part, root / "images"]
    folder = next((one for one in folders if one.is_dir()), None)
    if folder is None:
        option = "" if named else f"; or name it with --{part}-images"
        raise ValueError(f"there is no folder of images for {part}: looked for {', '.join(map(str, folders))}{option}")
    return file, folder
