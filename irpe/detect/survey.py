"""What a data set of boxes holds, and what a model sees of it: counts, sizes, what is broken or there twice."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runs.grid import Box, Panel, Row
from ..runs.seeds import mixed
from ..runs.survey import Look, Looks, look_at, looked, of_part, scarce, shared, spread, unnormalised
from ..runs.workers import Reading, RunError
from .batches import Samples, transform_of
from .data import Coco, open_part, turned
from .model import processor_of
from .settings import Settings

VIEWS = 2  # of a picture in training that are drawn
_LARGEST = 800  # pixels along a side of what is drawn
_SMALL, _LARGE = 32**2, 96**2  # areas in pixels, between which COCO calls a box medium


def open_parts(settings: Settings) -> dict[str, Coco]:
    """The parts "train" and "val".

    Raises:
        ValueError: see `open_part`.
    """
    train = open_part(settings, "train")
    return {"train": train, "val": open_part(settings, "val", train.classes)}


def _look(data: Coco, number: int) -> Look:
    image = data.image(number)
    return look_at(number, -1, image, image)


def _name(data: Coco, number: int) -> str:
    return data.pictures[number].name


def survey(
    settings: Settings, parts: dict[str, Coco], advance: Callable[[int], None], *, verify: bool = True
) -> dict[str, Any]:
    """The facts about the data, in plain values; see `irpe.train.survey.survey`.

    Sizes are those of the annotations: a picture of another size counts as one that cannot be read.
    """
    reading = Reading(settings.loader_workers, settings.loader_timeout)
    facts: dict[str, Any] = {"kind": "detection", "data": settings.data, "verified": verify, "parts": {}}
    looks: dict[str, list[Look]] = {}
    counts: dict[str, Counter[int]] = {}
    for part, data in parts.items():
        counts[part] = Counter(int(label) for picture in data.pictures for label in picture.labels)
        facts["parts"][part] = of_boxes(data)
        if verify:
            looks[part] = looked(Looks(data, _look, _name), reading, advance)
            found = of_part(looks[part], lambda number, data=data: _name(data, number))  # type: ignore[misc]
            # what is decoded has been converted, and perhaps turned
            facts["parts"][part] |= {name: found[name] for name in ("unreadable", "copies")}
    names = parts["train"].classes
    facts["classes"] = [
        {"name": name, **{part: found[k] for part, found in counts.items()}} for k, name in enumerate(names)
    ]
    learned = [row["train"] for row in facts["classes"]]
    facts["few_under"] = scarce(learned)
    facts["few"] = [row["name"] for row in facts["classes"] if row["train"] < facts["few_under"]]
    if verify:
        pairs = [(a.number, b.number) for a, b in shared(looks["train"], looks["val"])]
        facts["in_both"] = [{"train": _name(parts["train"], a), "val": _name(parts["val"], b)} for a, b in pairs]
    notes = [words for data in parts.values() for words in (*data.notes, *turned(data, settings))]
    return facts | {"notes": notes}


def of_boxes(data: Coco) -> dict[str, Any]:
    """What the annotations of a part tell, in plain values."""
    each = [len(picture.boxes) for picture in data.pictures]
    areas = torch.cat([picture.areas for picture in data.pictures])
    small, large = int((areas < _SMALL).sum()), int((areas > _LARGE).sum())
    widths, heights = [picture.width for picture in data.pictures], [picture.height for picture in data.pictures]
    return {
        "pictures": len(data), "boxes": sum(each), "boxes_of_a_picture": spread(each),
        "without_boxes": each.count(0), "of_crowds": sum(int(picture.crowd.sum()) for picture in data.pictures),
        "box_areas": {"small": small, "medium": len(areas) - small - large, "large": large},
        "width": spread(widths), "height": spread(heights),
        "of_known_size": len(data), "not_square": sum(picture.width != picture.height for picture in data.pictures),
    }  # fmt: skip


def shown(data: Coco, seed: int) -> Iterator[int]:
    """The numbers of pictures in the order in which they are to be shown: those with boxes first."""
    order = np.random.default_rng(mixed(seed, "shown")).permutation(len(data)).tolist()
    return iter(sorted(order, key=lambda number: not len(data.pictures[number].boxes)))


def rows_of(settings: Settings, data: Coco, count: int) -> tuple[list[str], list[Row]]:
    """(names of columns, a row for each of `count` pictures): as annotated, in evaluation, and twice in training.

    Raises:
        ValueError: no picture can be read.
    """
    processor = processor_of(settings)
    still, lively = (Samples(data, transform_of(settings, processor, training=training)) for training in (False, True))
    rows: list[Row] = []
    reason = ""
    for number in shown(data, settings.seed):
        try:
            image, picture = data.image(number), data.pictures[number]
        except RunError as error:  # the survey tells of it
            reason = reason or str(error)
            continue
        image.thumbnail((_LARGEST, _LARGEST))
        sides = torch.tensor([picture.width, picture.height] * 2)
        annotated = _boxes(picture.boxes / sides, picture.labels, data.classes, picture.crowd)
        panels = [Panel(np.asarray(image), annotated), _panel(still, number, 0)]
        panels += [_panel(lively, number, mixed(settings.seed, "shown", number, k)) for k in range(VIEWS)]
        rows.append(Row(f"{picture.name}  {picture.height}×{picture.width}", panels))
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{data.name}: none of its pictures can be read: {reason}")
    return ["annotated", "evaluation", *["training"] * VIEWS], rows


def _panel(samples: Samples, number: int, seed: int) -> Panel:
    """What the model sees, with the boxes that it learns, and its size in pixels above."""
    image, labels, _ = samples[number, seed]
    height, width = image.shape[1:]
    centre, half = labels["boxes"][:, :2], labels["boxes"][:, 2:] / 2
    boxes = _boxes(torch.cat([centre - half, centre + half], 1), labels["class_labels"], samples.data.classes)
    return Panel(unnormalised(image, samples.transform.mean, samples.transform.std), boxes, f"{height}×{width}")


def _boxes(corners: Tensor, labels: Tensor, classes: Sequence[str], crowd: Tensor | None = None) -> list[Box]:
    crowds = [0] * len(labels) if crowd is None else crowd.tolist()
    each = zip(corners.tolist(), labels.tolist(), crowds, strict=True)
    return [Box((a, b, c, d), classes[label], label, bool(of_crowd)) for (a, b, c, d), label, of_crowd in each]
