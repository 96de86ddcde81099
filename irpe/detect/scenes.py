"""Real digits on real photographs, with annotations in COCO's format: data for detection that needs no download.

Digits are scikit-learn's (training and validation have different ones), photographs the two inside scikit-learn:
training cuts its backgrounds out of their left parts, validation out of their right parts. Scene number i of a part is
a function of (part, seed, i) alone.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..digits import splits
from ..runs.files import write_json

HEIGHTS, WIDTHS = (40, 56), (56, 80)  # pixels of a scene: least and largest
SIDES = (20, 36)  # pixels of a digit before it is cut to its ink
MOST = 2  # digits of a scene
ZOOM = 1.8  # largest number of pixels of the photograph for one of the scene, along a side
BORDER = 400  # column that divides the photographs
DIM = 0.5  # of the photographs, so that light digits can be seen everywhere
INK = 0.1  # what is darker than this share of full ink belongs to the digit
_PARTS = {"train": ("train", 0, BORDER), "val": ("test", BORDER, 640)}


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(image) for image in load_sample_images().images)


def scene(part: str, seed: int, number: int) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """(image, [(digit, (x, y, width, height) in pixels), ...]) of one scene; boxes are tight and do not overlap.

    >>> image, found = scene("train", 0, 7)

    Args:
        part: "train" or "val".
    """
    if part not in _PARTS:
        raise ValueError(f"part={part!r}; expected one of {', '.join(_PARTS)}")
    name, left, right = _PARTS[part]
    digits = splits()[name]
    draw = np.random.default_rng((list(_PARTS).index(part), seed, number))
    height, width = int(draw.integers(HEIGHTS[0], HEIGHTS[1] + 1)), int(draw.integers(WIDTHS[0], WIDTHS[1] + 1))
    canvas = _background(draw, height, width, left, right)
    found: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(int(draw.integers(1, MOST + 1))):
        row, side = int(draw.integers(len(digits.labels))), int(draw.integers(SIDES[0], SIDES[1] + 1))
        small = Image.fromarray(digits.images[row, 0].numpy())
        ink = np.clip(1.2 * np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)), 0, 1)
        rows, columns = np.flatnonzero((ink > INK).any(1)), np.flatnonzero((ink > INK).any(0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if (place := _free_place(draw, canvas.shape, ink.shape, [box for _, box in found])) is None:
            continue  # no room left; the first digit always finds one
        x, y = place
        under = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
        under += ink[..., None] * (draw.uniform(195, 255, 3) - under)
        found.append((int(digits.labels[row]), (x, y, ink.shape[1], ink.shape[0])))
    return Image.fromarray(canvas.round().astype(np.uint8)), found


def _background(draw: np.random.Generator, height: int, width: int, left: int, right: int) -> np.ndarray:
    photograph = _photographs()[int(draw.integers(len(_photographs())))]
    zoom = draw.uniform(1, ZOOM)
    rows, columns = round(zoom * height), round(zoom * width)
    top = int(draw.integers(photograph.shape[0] - rows + 1))
    start = left + int(draw.integers(right - left - columns + 1))
    cut = Image.fromarray(photograph[top : top + rows, start : start + columns])
    return DIM * np.asarray(cut.resize((width, height), Image.Resampling.BILINEAR)).astype(np.float64)


def _free_place(
    draw: np.random.Generator, canvas: tuple[int, ...], size: tuple[int, ...], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """(x, y) where a box of `size` (height, width) lies on the canvas and on no other box; None after 20 tries."""
    for _ in range(20):
        x, y = int(draw.integers(canvas[1] - size[1] + 1)), int(draw.integers(canvas[0] - size[0] + 1))
        if all(x >= a + c or a >= x + size[1] or y >= b + d or b >= y + size[0] for a, b, c, d in taken):
            return x, y
    return None


def document(part: str, seed: int, count: int, classes: int = 10) -> dict[str, Any]:
    """Annotations of the first `count` scenes, as in COCO's JSON files.

    Args:
        classes: 10, a category for each digit, or 1, the category "digit".
    """
    if classes not in (1, 10):
        raise ValueError(f"{classes} classes of digits; expected 1 or 10")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        image, found = scene(part, seed, number)
        images.append({"id": number, "file_name": f"{number:06d}.png", "height": image.height, "width": image.width})
        for digit, box in found:
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": digit % classes + 1,
                    "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0,
                }
            )  # fmt: skip
    names = ["digit"] if classes == 1 else [str(digit) for digit in range(10)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, seed: int, counts: dict[str, int], classes: int = 10) -> Path:
    """Writes scenes as a folder in COCO's layout: train/*.png, val/*.png, annotations/train.json and val.json.

    Raises:
        ValueError: there is something else in the folder.
        WriteError: a file could not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; expected a new one to write the scenes into")
    (folder / "annotations").mkdir(parents=True)
    for part, count in counts.items():
        (folder / part).mkdir()
        for number in range(count):
            image, _ = scene(part, seed, number)
            image.save(folder / part / f"{number:06d}.png")
        write_json(folder / "annotations" / f"{part}.json", document(part, seed, count, classes))
    return folder
