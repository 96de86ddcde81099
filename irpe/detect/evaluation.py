"""Predictions for every picture exactly once, with any number of processes, and their average precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from ..runs.trainer import Interrupted, autocast, not_numbers
from ..runs.world import World
from .batches import Transform, eval_batches, found_on
from .data import Coco
from .settings import Settings

Prediction = dict[str, Tensor]  # boxes (n, 4) as x, y, x, y in pixels of the file, scores (n,), labels (n,)
NAMES = {
    "map": "AP", "map_50": "AP50", "map_75": "AP75", "map_small": "AP small", "map_medium": "AP medium",
    "map_large": "AP large", "mar_100": "AR100",
}  # fmt: skip


@torch.no_grad()
def predict(
    model: Any, data: Coco, transform: Transform, processor: Any, settings: Settings, world: World,
    interrupted: Callable[[], bool] = lambda: False, on_batch: Callable[[int, int], None] = lambda images, total: None,
) -> list[Prediction]:  # fmt: skip
    """What the model finds on each picture, in their order, in the first process; in the others as well.

    Every query gives one prediction, of its likeliest class, however small its score.

    Args:
        on_batch: is told how many pictures this process has seen, and of how many.

    Raises:
        Interrupted: `interrupted()` became true, in any process.
        RunError: outputs of the model are not numbers.
    """
    model.eval()
    mine: list[tuple[int, Prediction]] = []
    strange = 0
    # processes agree on an end before each batch, and may have one batch more or less than others
    batches = eval_batches(data, transform, settings, world.rank, world.size)
    most = -(-len(data) // world.size)
    for _ in range(-(-most // settings.eval_batch_size)):
        on_batch(len(mine), most)
        if world.any(int(interrupted())):
            raise Interrupted
        if (batch := next(batches, None)) is None:
            continue
        sizes = [(data.pictures[number].height, data.pictures[number].width) for number in batch.numbers]
        with autocast(settings.amp, world.device):
            found, bad = found_on(model, batch, sizes, processor, threshold=0.0)
        strange += bad
        mine += zip(batch.numbers, found, strict=True)
    both: Any = world.gathered(mine)
    everything: dict[int, Prediction] = dict(both)
    if count := int(world.total(torch.tensor([float(strange)]))):
        raise not_numbers(count, len(data), "pictures")
    if len(everything) != len(data):
        raise RuntimeError(f"{len(everything)} pictures were measured, of {len(data)}")
    return [everything[number] for number in range(len(data))]


def average_precision(predictions: Sequence[Prediction], data: Coco) -> dict[str, Any]:
    """{"AP": ..., "AP50": ..., "per_class": {name: AP}}: COCO's figures by torchmetrics and pycocotools, in percent.

    A figure is None where there is nothing to measure it on, such as large objects. Boxes of crowds (`iscrowd`) are
    neither right nor wrong.
    """
    # the predictions are those of all processes already, and this one computes alone
    options: dict[str, Any] = dict(class_metrics=True, backend="pycocotools", sync_on_compute=False)
    metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", **options)
    metric.warn_on_many_detections = False  # more than 100, of which the best count
    targets = [
        {"boxes": picture.boxes, "labels": picture.labels, "area": picture.areas, "iscrowd": picture.crowd}
        for picture in data.pictures
    ]
    metric.update([dict(prediction) for prediction in predictions], targets)
    values = metric.compute()
    found: dict[str, Any] = {name: _percent(values[key]) for key, name in NAMES.items()}
    numbers, each = values["classes"].reshape(-1).tolist(), values["map_per_class"].reshape(-1)
    per_class = {data.classes[number]: _percent(ap) for number, ap in zip(numbers, each, strict=True)}
    boxes = sum(len(picture.boxes) for picture in data.pictures)
    return {**found, "per_class": per_class, "images": len(data), "boxes": boxes}


def _percent(value: Tensor) -> float | None:
    return None if value < 0 else round(100 * float(value), 3)


def words(score: dict[str, Any]) -> str:
    """AP, AP50 and AP75 in a line."""
    return ", ".join(
        f"{name} {'-' if score[name] is None else format(score[name], '.1f')}" for name in ("AP", "AP50", "AP75")
    )
