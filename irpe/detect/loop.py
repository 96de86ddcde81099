"""The loop of detection: what a step, a measurement and a checkpoint of `irpe detect` are."""

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..runs import progress as of_runs
from ..runs import trainer
from ..runs.config import on_command_line
from ..runs.logs import Log
from ..runs.progress import Sums
from ..runs.seeds import seed_all
from ..runs.trainer import Interrupted, Measured, Stop, autocast
from ..runs.world import World, wrapped
from . import model as models
from .batches import Batch, train_batches, transform_of
from .data import Coco
from .evaluation import Prediction, average_precision, predict, words
from .saved import save, saved_at
from .settings import Settings, fetched


@dataclass
class Progress(of_runs.Progress):
    """Where a run is; also the step of the best weights, and the last score."""

    best_step: int = 0
    score: dict[str, Any] = field(default_factory=dict)

    def forget_best(self) -> None:
        super().forget_best()
        self.best_step = 0


class Trainer(trainer.Trainer):
    """A DETR under training. Every process of the world has one."""

    settings: Settings
    progress: Progress
    model: Any
    advice = "A lower --lr, more --warmup-steps or a smaller --clip-grad often helps"

    def __init__(self, settings: Settings, train: Coco, val: Coco, model: Any, processor: Any, world: World) -> None:
        super().__init__(settings, len(train), world)
        self.train, self.val, self.processor = train, val, processor
        self.measure_every = settings.eval_every
        self.model = model.to(world.device)
        self.model.loss_function = in_float32(self.model.loss_function)
        self.wrapped = wrapped(self.model, world, "ddp")
        # of depthwise convolutions, whose gradients are the same in either order
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        self.optimizer = torch.optim.AdamW(
            models.parameter_groups(self.model, settings), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.progress = Progress()
        self.predictions: list[Prediction] = []  # of the last measurement

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """What this process takes of an epoch, from step `first` of it on."""
        transform, world = transform_of(self.settings, self.processor, training=True), self.world
        return train_batches(self.train, transform, self.settings, world.rank, world.size, epoch=epoch, first=first)

    def state(self) -> dict[str, Any]:
        """Everything that decides how the run goes on. Random numbers follow from the step, so they are not in it."""
        progress = json.dumps(asdict(self.progress))
        return {
            "settings": asdict(self.settings), "step": self.progress.step, "progress": progress,
            "images": len(self.train), "classes": self.train.classes, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        if state["images"] != len(self.train) or state["classes"] != self.train.classes:
            raise ValueError(
                f"the data has changed: there were {state['images']} images of {len(state['classes'])} classes, now "
                f"{len(self.train)} of {len(self.train.classes)}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        values = json.loads(state["progress"])
        if "sums" in values:
            sums = Sums(**values["sums"])
        else:  # of a version that kept the losses since the last line, and knew the best step alone
            images = self.settings.batch_size * len(state["losses"])
            loss = self.settings.batch_size * float(state["losses"].sum())
            sums = Sums(loss, images, loss, images)
            values["best_epoch"] = math.ceil(values["best_step"] / self.steps_per_epoch)
        self.progress = Progress(**values | {"sums": sums})

    def run(self, folder: Path, console: Console, stop: Stop) -> None:
        """Trains to the end of the schedule; there are predictions then, also where the run had ended before."""
        super().run(folder, console, stop)
        if not self.predictions:
            try:
                self._predict(stop)
            except Interrupted:
                self._leave(folder, self.world.any(stop()))

    def _step(self, batches: Iterator[Batch]) -> float:
        """One step of the optimizer over `accumulate` batches; the norm of the gradient."""
        settings, device, step = self.settings, self.world.device, self.progress.step
        parts = [next(batches) for _ in range(settings.accumulate)]
        totals = Totals.of(parts, self.model.config, self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._factor()
        self.optimizer.zero_grad()
        losses = []
        for micro, batch in enumerate(parts):
            seed_all(settings.seed, "step", step, self.world.rank, micro)
            labels = [{name: value.to(device) for name, value in picture.items()} for picture in batch.labels]
            with self.without_sync(last=micro + 1 == len(parts)):
                try:
                    with autocast(settings.amp, device):
                        output = self.wrapped(batch.images.to(device), pixel_mask=batch.mask.to(device), labels=labels)
                except ValueError as error:
                    if "corner" not in str(error):  # transformers' word on boxes that are not numbers
                        raise
                    raise self.not_finite("boxes are not numbers", step) from None
                loss = whole_loss(output.loss_dict, batch, self.model.config, totals)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad or math.inf))
        # the loss scaler leaves such steps out by itself
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            total = float(torch.stack(losses).sum())
            what = "the gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
            raise self.not_finite(what, step + 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1
        self.losses.append((torch.stack(losses).sum(), self.share.local * settings.accumulate, step + 1))
        return norm

    def _factor(self) -> float:
        """Of the peak learning rates: linear warm-up, then a step down to a tenth, or half a cosine down to zero."""
        step, warmup = self.progress.step, min(self.settings.warmup_steps, self.schedule // 2)
        if step < warmup:
            return (step + 1) / warmup
        if self.settings.lr_drop:
            return 1.0 if step < self.settings.lr_drop * self.steps_per_epoch else 0.1
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.schedule - warmup)))

    def _predict(self, stop: Stop, on_batch: Callable[[int, int], None] = lambda images, total: None) -> None:
        """AP on the pictures to evaluate on, in every process."""
        transform = transform_of(self.settings, self.processor, training=False)
        self.predictions = predict(
            self.model, self.val, transform, self.processor, self.settings, self.world, lambda: bool(stop()), on_batch
        )
        self.progress.score = self.world.from_first(lambda: average_precision(self.predictions, self.val))

    def command(self) -> str:
        """What goes on with the run, together with --resume."""
        return f"irpe detect {on_command_line(self.settings, fetched(self.settings))}".rstrip()

    def measure(self, log: Log, stop: Stop) -> Measured:
        """AP on the pictures to evaluate on."""
        self._predict(stop, log.measuring)
        score = self.progress.score
        figure = score["AP"] or 0.0
        if figure > self.progress.best:
            self.progress.best_step = self.progress.step
        return Measured({"val": score}, figure, words(score))

    def write_best(self, folder: Path) -> None:
        """Writes the weights as the best ones; called in every process."""
        if self.world.first:
            save(self.model, self.processor, folder / models.BEST, {"step": str(self.progress.best_step)})

    def has_best(self, folder: Path) -> bool:
        """Whether the folder's best weights are those of the best step."""
        return saved_at(folder / models.BEST) == self.progress.best_step


@dataclass(frozen=True)
class Totals:
    """What the losses of a step are divided by, for each process: boxes, and the weights of all queries' classes."""

    boxes: float
    weights: float

    @staticmethod
    def of(batches: Sequence[Batch], config: Any, world: World) -> "Totals":
        """The sums over the batches of all processes, so that the mean over processes is the loss of the whole step."""
        boxes = sum(map(_boxes, batches))
        weights = sum(_weight(batch, config) for batch in batches)
        total = world.total(torch.tensor([float(boxes), weights], dtype=torch.float64)).tolist()
        return Totals(max(1.0, total[0]) / world.size, total[1] / world.size)


def _boxes(batch: Batch) -> int:
    return sum(len(picture["boxes"]) for picture in batch.labels)


def _weight(batch: Batch, config: Any) -> float:
    """Of the classes of all queries: 1 for those with a box, eos_coefficient for the others."""
    matched = sum(min(len(picture["boxes"]), config.num_queries) for picture in batch.labels)
    return matched + config.eos_coefficient * (len(batch.labels) * config.num_queries - matched)


def whole_loss(parts: dict[str, Tensor], batch: Batch, config: Any, totals: Totals) -> Tensor:
    """The loss of DETR, normalised over the whole step as over one batch.

    transformers divides by what is in the batch of a process. Each part is scaled here so that the sum over the batches
    of a step, and the mean over processes, is what one process with all pictures in one batch would have.
    """
    boxes = max(1.0, _boxes(batch)) / totals.boxes
    scale = {
        "loss_ce": _weight(batch, config) / totals.weights,
        "loss_bbox": config.bbox_loss_coefficient * boxes,
        "loss_giou": config.giou_loss_coefficient * boxes,
    }
    # names of auxiliary losses end in the number of their layer
    terms = [value * factor for name, value in parts.items() for kind, factor in scale.items() if name.startswith(kind)]
    return torch.stack(terms).sum()


def in_float32(loss: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' loss of float32 numbers, out of autocast: boxes of eight bits have no exact overlaps."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    @functools.wraps(loss)
    def of(logits: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(logits.device.type, enabled=False):
            return loss(wide(logits), *map(wide, arguments), **{name: wide(value) for name, value in options.items()})

    return of
