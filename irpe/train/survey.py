"""What a data set of pictures holds, and what a model sees of it: counts, sizes, what is broken or there twice."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runs.files import reason_of
from ..runs.grid import Panel, Row, short
from ..runs.picture import converted, decoded, mode_of, open_picture
from ..runs.seeds import mixed, seed_all
from ..runs.survey import Look, Looks, contradictions, look_at, looked, of_part, scarce, shared, unnormalised
from .data import STREAMS, Data, Source, Subset, in_one_part, open_data
from .loader import Samples, Shape, Transform, epoch_order, reading_of, start_worker
from .model import make_mixup
from .pictures import FolderSource, ReaderSource
from .settings import Settings

VIEWS = 4  # augmentations of a picture that are drawn
_LARGEST = 512  # pixels along a side of what is drawn
Advance = Callable[[int], None]


def open_parts(settings: Settings) -> tuple[Data, dict[str, Source]]:
    """(the data, its parts "train" and "val"; or "all", where pictures lie there as they are).

    Raises:
        ValueError: see `open_data`; or the data can only be read as a stream.
    """
    if settings.data.startswith(STREAMS):
        raise ValueError(
            f"{settings.data} is a stream, whose pictures are not counted and have no order; irpe inspect takes "
            "folders, archives, torch/ and hfds/"
        )
    whole = in_one_part(settings)
    data = open_data(settings, train=not whole)
    return data, {"all": data.val} if whole else {"train": data.train, "val": data.val}


def stored(source: Any, number: int) -> tuple[Image.Image, int]:
    """(the picture as it is stored, where the source tells, and else as it is read; its class)."""
    if isinstance(source, Subset):
        return stored(source.source, source.indices[number])
    if isinstance(source, FolderSource):
        return open_picture(source.paths[number]), source.targets[number]
    if isinstance(source, ReaderSource):
        file, target = source.reader[number]
        with file:
            return decoded(file), int(target)
    image, target = source[number]
    return image, int(target)


def _look(mode: str, source: Source, number: int) -> Look:
    image, label = stored(source, number)
    return look_at(number, label, image, converted(image, mode))


def _name(source: Source, number: int) -> str:
    return source.name(number)


def survey(
    settings: Settings, data: Data, parts: dict[str, Source], advance: Advance, *, verify: bool = True
) -> dict[str, Any]:
    """The facts about the data, in plain values.

    Args:
        advance: is told how many more pictures were looked at.
        verify: whether every picture is read; without it there are counts alone.
    """
    look, reading = functools.partial(_look, mode_of(settings.in_chans)), reading_of(settings)
    looks: dict[str, list[Look]] = {}
    facts: dict[str, Any] = {"kind": "classification", "data": settings.data, "verified": verify, "parts": {}}
    counts: dict[str, Counter[int] | None] = {}
    for part, source in parts.items():
        known = source.labels()
        facts["parts"][part] = {"pictures": len(source)}
        if verify:
            looks[part] = looked(Looks(source, look, _name), reading, advance, worker_init_fn=start_worker)
            facts["parts"][part] |= of_part(looks[part], source.name)
            known = known or [look.label for look in looks[part]]
        counts[part] = None if known is None else Counter(known)
    facts["classes"] = [
        {"name": name, **{part: None if found is None else found[k] for part, found in counts.items()}}
        for k, name in enumerate(data.classes)
    ]
    first = next(iter(parts))
    learned = [row[first] for row in facts["classes"]]
    known = [count for count in learned if count is not None]
    facts["few_under"] = scarce(known) if known else None
    facts["few"] = [row["name"] for row in facts["classes"] if known and row[first] < facts["few_under"]]
    if verify and len(parts) == 2:
        pairs = shared(looks["train"], looks["val"])
        facts["in_both"] = [
            {"train": parts["train"].name(a.number), "val": parts["val"].name(b.number)} for a, b in pairs
        ]
    if verify:
        pairs = contradictions(looks[first])
        facts["of_two_classes"] = [[parts[first].name(look.number) for look in pair] for pair in pairs]
    return facts | {"notes": data.notes}


def shown(source: Source, seed: int) -> Iterator[int]:
    """The numbers of pictures in the order in which they are to be shown: one of every class, then one more, ..."""
    order = epoch_order(len(source), 1, seed, 0).tolist()
    labels, met = source.labels(), Counter[int]()
    places = []
    for at, number in enumerate(order):
        label = 0 if labels is None else labels[number]
        places.append((met[label], at, number))
        met[label] += 1
    return (number for _, _, number in sorted(places))


def rows_of(
    settings: Settings, classes: Sequence[str], source: Source, shape: Shape, count: int
) -> tuple[list[str], list[Row]]:
    """(names of columns, a row for each of `count` pictures): as stored, in evaluation, and several times in training.

    Where mixup or cutmix are on the last column is a batch of the one before, mixed.

    Raises:
        ValueError: no picture can be read.
    """
    still = Samples(source, Transform(shape, settings.interpolation), None)
    lively = Samples(source, Transform(shape, settings.interpolation, settings), None)
    rows: list[Row] = []
    views, targets, reason = [], [], ""
    for number in shown(source, settings.seed):
        try:
            image, plain = source[number][0], still[number, number]
        except Exception as error:  # the survey tells of it
            reason = reason or reason_of(error)
            continue
        seen = [lively[number, mixed(settings.seed, "shown", number, k)].image for k in range(VIEWS)]
        size = f"{image.height}×{image.width}"
        image.thumbnail((_LARGEST, _LARGEST))
        panels = [
            Panel(np.asarray(image) / 255),
            *(Panel(unnormalised(image, shape.mean, shape.std)) for image in (plain.image, *seen)),
        ]
        rows.append(Row(f"{short(classes[plain.target], 40)}  {size}", panels))
        views.append(seen[-1])
        targets.append(plain.target)
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{settings.data}: none of its pictures can be read: {reason}")
    columns = ["stored", "evaluation", *["training"] * VIEWS]
    even = len(rows) // 2 * 2
    mixup = make_mixup(settings, len(classes), even) if even else None
    if mixup is None:
        return columns, rows
    seed_all(settings.seed, "mixed")
    images, soft = mixup(torch.stack(views[:even]), torch.tensor(targets[:even]))
    floor = settings.smoothing / len(classes)
    mixes = [
        Panel(
            unnormalised(image, shape.mean, shape.std), title=_shares((of - floor) / (1 - settings.smoothing), classes)
        )
        for image, of in zip(images, soft, strict=True)
    ]
    rows = [Row(row.title, [*row.panels, *mixes[k : k + 1]]) for k, row in enumerate(rows)]
    return [*columns, "mixed in its batch"], rows


def _shares(shares: Tensor, classes: Sequence[str]) -> str:
    values, numbers = shares.topk(min(2, len(classes)))
    parts = zip(values.tolist(), numbers.tolist(), strict=True)
    return " + ".join(f"{value:.0%} {short(classes[k], 9)}" for value, k in parts if value >= 0.005)
