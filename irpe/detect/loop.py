"""The training loop of detection, and all that it needs to go on where it was."""

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..train import checkpoint
from ..train.evaluation import autocast
from ..train.files import reason_of
from ..train.loader import RunError, seed_all
from ..train.logs import Log
from ..train.loop import Stopped
from ..train.tensors import not_finite
from ..train.world import World, wrapped
from . import model as models
from .batches import Batch, train_batches, transform_of
from .data import Coco
from .evaluation import Interrupted, Prediction, average_precision, predict, words
from .settings import Settings

Stop = Callable[[], int]  # the number of the signal that asked for an end, or 0


class DetectionLog(Log):
    """The log of irpe train, with lines of AP."""

    def score(self, *, step: int, epoch: int, score: dict[str, Any], seconds: float) -> None:
        """The line of a measurement."""
        if self.folder is not None:
            self._write({"kind": "epoch", "step": step, "epoch": epoch, "seconds": seconds, "val": score})
            self.console.print(f"epoch {epoch}, step {step}: {words(score)}", soft_wrap=True)


class Trainer:
    """A DETR under training. Every process of the world has one."""

    def __init__(self, settings: Settings, train: Coco, val: Coco, model: Any, processor: Any, world: World) -> None:
        if settings.batch_size % (world.size * settings.accumulate):
            batches = f" and {settings.accumulate} batches of each" * (settings.accumulate > 1)
            raise ValueError(f"--batch-size {settings.batch_size} cannot be shared by {world.size} processes{batches}")
        if len(train) < settings.batch_size:
            raise ValueError(f"--batch-size {settings.batch_size}, but there are {len(train)} images to train on")
        self.settings, self.train, self.val, self.processor, self.world = settings, train, val, processor, world
        self.steps_per_epoch = len(train) // settings.batch_size
        self.schedule = self.steps_per_epoch * settings.epochs
        self.total_steps = min(self.schedule, settings.max_steps) if settings.max_steps else self.schedule
        self.model = model.to(world.device)
        self.model.loss_function = in_float32(self.model.loss_function)
        self.wrapped = wrapped(self.model, world, "ddp")
        # of depthwise convolutions, whose gradients are the same in either order
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        self.optimizer = torch.optim.AdamW(
            models.parameter_groups(self.model, settings), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp == "fp16")
        self.step = self.measured = 0
        self.best, self.best_step, self.seconds = -1.0, 0, 0.0
        self.score: dict[str, Any] = {}
        self.predictions: list[Prediction] = []  # of the last measurement
        self._losses: list[Tensor] = []  # of the last steps, still on the device

    # ---- state

    def state(self) -> dict[str, Any]:
        """Everything that decides how the run goes on. Random numbers follow from the step, so they are not in it."""
        progress = {name: getattr(self, name) for name in _PROGRESS}
        return {
            "settings": asdict(self.settings), "step": self.step, "progress": json.dumps(progress),
            "images": len(self.train), "classes": self.train.classes, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "losses": self._sum(),
        }  # fmt: skip

    def load(self, state: dict[str, Any], *, elsewhere: bool = False) -> None:
        """Goes to where `state` was taken.

        Args:
            elsewhere: whether the run goes on in another folder, which has no best weights yet.

        Raises:
            ValueError: the data has changed since then, or the state holds numbers that are not finite.
        """
        try:
            self._load(state)
        except (KeyError, AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"the checkpoint is not of this run: {type(error).__name__} {reason_of(error)}") from None
        if elsewhere:
            self.best, self.best_step, self.measured = -1.0, 0, 0

    def _load(self, state: dict[str, Any]) -> None:
        if bad := not_finite(state["model"]):
            raise ValueError(
                f"the checkpoint of step {state['step']} holds numbers that are not finite, in {', '.join(bad[:3])}; "
                "remove it, and go on from one before it"
            )
        if state["images"] != len(self.train) or state["classes"] != self.train.classes:
            raise ValueError(
                f"the data has changed: there were {state['images']} images of {len(state['classes'])} classes, now "
                f"{len(self.train)} of {len(self.train.classes)}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        progress = json.loads(state["progress"])
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        self._losses = list(state["losses"]) if self.world.first else []

    def _sum(self) -> Tensor:
        """The losses since the last line, on the CPU."""
        return torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)

    # ---- the loop

    def run(self, folder: Path, log: DetectionLog, stop: Stop) -> None:
        """Trains to the end of the schedule, measuring and saving on the way.

        Raises:
            Stopped: a signal came, and a checkpoint was written.
            RunError: the loss is not finite, or an image cannot be read.
            WriteError: a file could not be written.
        """
        per_epoch, every = self.steps_per_epoch, self.settings.eval_every
        while self.step < self.total_steps:
            epoch = self.step // per_epoch
            end = min((epoch + 1) * per_epoch, self.total_steps)
            self._epoch(epoch, end, folder, log, stop)
            ended = self.step == self.total_steps
            if ended or (epoch + 1) % every == 0:
                self._measure(epoch + 1, folder, log, stop)
            if not ended:
                self.save(folder)
        if not self.predictions:  # the run had ended before
            self._measure(-(-self.step // per_epoch), folder, log, stop)

    def _epoch(self, epoch: int, end: int, folder: Path, log: DetectionLog, stop: Stop) -> None:
        settings, world = self.settings, self.world
        transform = transform_of(settings, self.processor, training=True)
        first = self.step - epoch * self.steps_per_epoch
        batches = train_batches(self.train, transform, settings, world.rank, world.size, epoch=epoch, first=first)
        self.wrapped.train()
        while self.step < end:
            began = time.perf_counter()
            norm = self._step(batches)
            self.seconds += time.perf_counter() - began
            log.advance(settings.batch_size)
            if self.step % settings.log_every == 0 or self.step == self.total_steps:
                self._line(epoch + 1, norm, log)
            signal = world.any(stop())
            if signal:
                self._leave(folder, signal)
            if settings.save_every and self.step % settings.save_every == 0 and self.step < end:
                self.save(folder)

    def _step(self, batches: Iterator[Batch]) -> float:
        """One step of the optimizer over `accumulate` batches; the norm of the gradient."""
        settings, device = self.settings, self.world.device
        parts = [next(batches) for _ in range(settings.accumulate)]
        totals = Totals.of(parts, self.model.config, self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._factor()
        self.optimizer.zero_grad()
        losses = []
        for micro, batch in enumerate(parts):
            seed_all(settings.seed, "step", self.step, self.world.rank, micro)
            labels = [{name: value.to(device) for name, value in one.items()} for one in batch.labels]
            with self._without_sync(last=micro + 1 == len(parts)):
                try:
                    with autocast(settings.amp, device):
                        output = self.wrapped(batch.images.to(device), pixel_mask=batch.mask.to(device), labels=labels)
                except ValueError as error:
                    if "corner" not in str(error):  # transformers' word on boxes that are not numbers
                        raise
                    raise self._not_finite("boxes are not numbers", self.step) from None
                loss = whole_loss(output.loss_dict, batch, self.model.config, totals)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad or math.inf))
        # the loss scaler leaves such steps out by itself
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            total = float(torch.stack(losses).sum())
            what = "the gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
            raise self._not_finite(what, self.step + 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._losses.append(torch.stack(losses).sum())
        return norm

    def _without_sync(self, last: bool) -> Any:
        """Gradients are exchanged in the last of the accumulated batches only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def _factor(self) -> float:
        """Of the peak learning rates: linear warm-up, then a step down to a tenth, or half a cosine down to zero."""
        warmup = min(self.settings.warmup_steps, self.schedule // 2)
        if self.step < warmup:
            return (self.step + 1) / warmup
        if self.settings.lr_drop:
            return 1.0 if self.step < self.settings.lr_drop * self.steps_per_epoch else 0.1
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.schedule - warmup)))

    def _not_finite(self, what: str, step: int) -> RunError:
        return RunError(
            f"{what} at step {step}; the last checkpoint is from before. A lower --lr, more --warmup-steps or a "
            "smaller --clip-grad often helps"
        )

    def _line(self, epoch: int, norm: float, log: DetectionLog) -> None:
        total = self.world.total(torch.tensor([float(self._sum().sum()), float(len(self._losses))]))
        self._losses.clear()
        loss = float(total[0] / total[1])
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}", self.step)
        log.step(step=self.step, epoch=epoch, loss=loss, lr=self.settings.lr * self._factor(), grad_norm=norm)

    def measure(self, stop: Stop = lambda: 0) -> dict[str, Any]:
        """AP on the pictures to evaluate on, in every process."""
        transform = transform_of(self.settings, self.processor, training=False)
        self.predictions = predict(
            self.model, self.val, transform, self.processor, self.settings, self.world, lambda: bool(stop())
        )
        return self.world.from_first(lambda: average_precision(self.predictions, self.val))

    def _measure(self, epoch: int, folder: Path, log: DetectionLog, stop: Stop) -> None:
        """Measures, writes the line, and saves the best weights and a checkpoint."""
        try:
            self.score = self.measure(stop)
        except Interrupted:
            self._leave(folder, self.world.any(stop()))
        log.score(step=self.step, epoch=epoch, score=self.score, seconds=self.seconds)
        self.measured = self.step
        is_best = (self.score["AP"] or 0.0) > self.best
        if is_best:
            self.best, self.best_step = self.score["AP"] or 0.0, self.step
        # the checkpoint comes before the best weights, which `restore_best` takes from it after a kill between them
        self.save(folder)
        if is_best:
            self._write_best(folder)

    def _write_best(self, folder: Path) -> None:
        if self.world.first:
            models.save(self.model, self.processor, folder / models.BEST, {"step": str(self.best_step)})

    def restore_best(self, folder: Path) -> None:
        """Makes the best weights in the folder those that this run knows of, where it goes on.

        A kill may have come before they were written; or they are of a later step, from which the run does not go on.
        """
        if self.best < 0 or self.world.from_first(lambda: models.saved_at(folder / models.BEST)) == self.best_step:
            return
        if self.best_step == self.step:
            self._write_best(folder)
        else:
            self.best, self.best_step = -1.0, 0

    def save(self, folder: Path) -> None:
        """Writes a checkpoint.

        Raises:
            RunError: weights are not finite; the checkpoints that are there stay.
        """
        if self.world.first:
            state = self.state()
            if bad := not_finite({name: state[name] for name in ("model", "optimizer")}):
                raise self._not_finite(f"{bad[0]} is not finite", self.step)
            checkpoint.save(folder, state, self.settings.keep, later=False)

    def _leave(self, folder: Path, signal: int) -> None:
        self.save(folder)
        raise Stopped(signal, self.step, folder)


_PROGRESS = ("step", "measured", "best", "best_step", "seconds", "score")


@dataclass(frozen=True)
class Totals:
    """What the losses of a step are divided by, for each process: boxes, and the weights of all queries' classes."""

    boxes: float
    weights: float

    @staticmethod
    def of(batches: Sequence[Batch], config: Any, world: World) -> "Totals":
        """The sums over the batches of all processes, so that the mean over processes is the loss of the whole step."""
        boxes = sum(_boxes(one) for one in batches)
        weights = sum(_weight(one, config) for one in batches)
        total = world.total(torch.tensor([float(boxes), weights], dtype=torch.float64)).tolist()
        return Totals(max(1.0, total[0]) / world.size, total[1] / world.size)


def _boxes(batch: Batch) -> int:
    return sum(len(one["boxes"]) for one in batch.labels)


def _weight(batch: Batch, config: Any) -> float:
    """Of the classes of all queries: 1 for those with a box, eos_coefficient for the others."""
    matched = sum(min(len(one["boxes"]), config.num_queries) for one in batch.labels)
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
            return loss(wide(logits), *map(wide, arguments), **{name: wide(one) for name, one in options.items()})

    return of
