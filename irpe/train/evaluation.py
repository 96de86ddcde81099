"""Measuring a classifier on every image exactly once, with any number of processes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..runs.files import counted
from ..runs.trainer import Interrupted, autocast, not_numbers
from ..runs.workers import RunError
from ..runs.world import World
from .loader import eval_loader
from .settings import Settings


@dataclass(frozen=True)
class Score:
    """Mean cross entropy, percent of images whose class is first or among the first five, and what was counted."""

    loss: float
    top1: float
    top5: float
    images: int
    bad: int
    per_class: tuple[float, ...]  # percent right; nan where a class has no image
    pairs: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (class, guess): images

    def words(self) -> str:
        bad = f", {self.bad} unreadable" if self.bad else ""
        return f"loss {self.loss:.4f}, top-1 {self.top1:.2f}, top-5 {self.top5:.2f} on " + (
            counted(self.images, "image", "images") + bad
        )

    def plain(self) -> dict[str, Any]:
        """For JSON: nan, which JSON lacks, is None. Without the pairs, of which there may be a million."""
        values = asdict(self) | {"per_class": [None if percent != percent else percent for percent in self.per_class]}
        del values["pairs"]
        return values


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Refuses numbers of classes that the model does not have; streams tell theirs picture by picture.

    Raises:
        RunError: with the number.
    """
    strange = targets[(targets < 0) | (targets >= num_classes)]
    if len(strange):
        raise RunError(
            f"an image is of class {int(strange[0])}, and there are {num_classes}, numbered from 0; --num-classes says "
            "how many"
        )


def to_device(images: Tensor, channels_last: bool, device: torch.device) -> Tensor:
    """Images where the model is, in the memory order that it is in."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout)


def evaluate(
    model: nn.Module,
    source: Any,
    transform: Any,
    settings: Settings,
    world: World,
    *,
    num_classes: int,
    interrupted: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int, int | None], None] = lambda images, total: None,
) -> tuple[Score, list[str]]:
    """(score, names of unreadable images) of a model on a source.

    Args:
        on_batch: is told how many images this process has seen, and of how many where that is known.

    Raises:
        Interrupted: `interrupted()` became true, in any process.
        RunError: outputs of the model are not numbers.
        RuntimeError: images were left out or counted twice, which would be a mistake of ours.
    """
    model.eval()
    batch_size = settings.eval_batch_size or max(1, settings.batch_size // (world.size * settings.accumulate))
    pairs = Counter[tuple[int, int]]()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, among the first five, images whose outputs are not numbers
    bad: list[str] = []
    stream = isinstance(source, IterableDataset)
    loader = eval_loader(source, transform, settings, world.rank, world.size, batch_size)
    for number, batch in enumerate(loader):
        # processes have to agree on an end at the same batch, and a stream is read by the first one alone
        together = not stream and number % 10 == 0
        asked = interrupted() if world.size == 1 else together and world.any(int(interrupted()))
        if asked:
            raise Interrupted
        bad += batch.bad
        # not compiled: the last batch has another size, and --compile is for the many steps of training
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.no_grad(), autocast(settings.amp, world.device):
            output = model(to_device(batch.images, settings.channels_last, world.device))
        output, targets = output.float().cpu()[batch.real], batch.targets[batch.real]
        check_labels(targets, num_classes)
        sums[2] += (~output.isfinite()).any(1).sum()
        first = output.topk(min(5, num_classes), dim=1).indices
        sums[0] += F.cross_entropy(output.double(), targets, reduction="sum") if len(targets) else 0.0
        sums[1] += (first == targets[:, None]).any(1).sum()
        pairs.update(zip(targets.tolist(), first[:, 0].tolist(), strict=True))
        on_batch(pairs.total() + len(bad), None if stream else -(-len(source) // world.size))
    sums, bad = world.total(sums), world.gathered(bad)
    parts, pairs = world.gathered(list(pairs.items())), Counter()
    for pair, images in parts:
        pairs[pair] += images
    seen = pairs.total()
    if not stream and seen + len(bad) != len(source):
        raise RuntimeError(f"{seen} images and {len(bad)} unreadable ones were counted, of {len(source)}")
    if not seen:
        raise ValueError("no image could be read")
    if sums[2]:
        raise not_numbers(int(sums[2]), seen, "images")
    right, count = torch.zeros(2, num_classes, dtype=torch.float64)
    for (one, guess), images in pairs.items():
        count[one] += images
        right[one] += images * (one == guess)
    score = Score(
        loss=float(sums[0]) / seen, top1=100 * float(right.sum()) / seen, top5=100 * float(sums[1]) / seen, images=seen,
        bad=len(bad), per_class=tuple((100 * right / count).tolist()), pairs=pairs,
    )  # fmt: skip
    return score, bad
