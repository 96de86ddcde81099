"""The training loop of detection, and all that it needs to go on where it was."""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..train import checkpoint
from ..train.loader import RunError, seed_all
from ..train.logs import Log
from ..train.loop import Stopped
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
        if settings.batch_size % world.size:
            raise ValueError(f"--batch-size {settings.batch_size} cannot be shared by {world.size} processes")
        if len(train) < settings.batch_size:
            raise ValueError(f"--batch-size {settings.batch_size}, but there are {len(train)} images to train on")
        self.settings, self.train, self.val, self.processor, self.world = settings, train, val, processor, world
        self.steps_per_epoch = len(train) // settings.batch_size
        self.schedule = self.steps_per_epoch * settings.epochs
        self.total_steps = min(self.schedule, settings.max_steps) if settings.max_steps else self.schedule
        self.model = model.to(world.device)
        self.wrapped = wrapped(self.model, world, "ddp")
        # of depthwise convolutions, whose gradients are the same in either order
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        self.optimizer = torch.optim.AdamW(
            models.parameter_groups(self.model, settings), lr=settings.lr, weight_decay=settings.weight_decay
        )
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
            "optimizer": self.optimizer.state_dict(), "losses": self._sum(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: the data has changed since then.
        """
        if state["images"] != len(self.train) or state["classes"] != self.train.classes:
            raise ValueError(
                f"the data has changed: there were {state['images']} images of {len(state['classes'])} classes, now "
                f"{len(self.train)} of {len(self.train.classes)}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in json.loads(state["progress"]).items():
            setattr(self, name, value)
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
            norm = self._step(next(batches))
            self.seconds += time.perf_counter() - began
            log.advance(settings.batch_size)
            if self.step % settings.log_every == 0 or self.step == self.total_steps:
                self._line(epoch + 1, norm, log)
            signal = world.any(stop())
            if signal:
                self._leave(folder, signal)
            if settings.save_every and self.step % settings.save_every == 0 and self.step < end:
                self.save(folder)

    def _step(self, batch: Batch) -> float:
        """One step of the optimizer; the norm of the gradient."""
        settings, device = self.settings, self.world.device
        seed_all(settings.seed, "step", self.step, self.world.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._factor()
        labels = [{name: value.to(device) for name, value in one.items()} for one in batch.labels]
        try:
            output = self.wrapped(batch.images.to(device), pixel_mask=batch.mask.to(device), labels=labels)
        except ValueError as error:
            if "corner" not in str(error):  # transformers' word on boxes that are not numbers
                raise
            raise self._not_finite("boxes are not numbers") from None
        loss = whole_loss(output.loss_dict, batch, self.model.config, self.world)
        self.optimizer.zero_grad()
        loss.backward()
        clip = settings.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.step += 1
        self._losses.append(loss.detach())
        return float(norm)

    def _factor(self) -> float:
        """Of the peak learning rates: linear warm-up, then half a cosine down to zero."""
        warmup = min(self.settings.warmup_steps, self.schedule // 2)
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.schedule - warmup)))

    def _not_finite(self, what: str) -> RunError:
        return RunError(
            f"{what} at step {self.step}; the last checkpoint is from before. A lower --lr, more --warmup-steps or a "
            "smaller --clip-grad often helps"
        )

    def _line(self, epoch: int, norm: float, log: DetectionLog) -> None:
        total = self.world.total(torch.tensor([float(self._sum().sum()), float(len(self._losses))]))
        self._losses.clear()
        loss = float(total[0] / total[1])
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}")
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
        if (self.score["AP"] or 0.0) > self.best:
            self.best, self.best_step = self.score["AP"] or 0.0, self.step
            if self.world.first:
                models.save(self.model, self.processor, folder / "best")
        self.save(folder)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint."""
        if self.world.first:
            checkpoint.save(folder, self.state(), self.settings.keep)

    def _leave(self, folder: Path, signal: int) -> None:
        self.save(folder)
        raise Stopped(signal, self.step, checkpoint.checkpoints(folder)[-1] if self.world.first else folder)


_PROGRESS = ("step", "measured", "best", "best_step", "seconds", "score")


def whole_loss(parts: dict[str, Tensor], batch: Batch, config: Any, world: World) -> Tensor:
    """The loss of DETR, normalised over the batch of all processes as over that of one.

    transformers divides by what is in the batch of a process. Each part is scaled here so that the mean over processes
    is what one process with all pictures would have.
    """
    boxes = sum(len(one["boxes"]) for one in batch.labels)
    matched = sum(min(len(one["boxes"]), config.num_queries) for one in batch.labels)
    weight = matched + config.eos_coefficient * (len(batch.labels) * config.num_queries - matched)
    share, of_class = max(1.0, boxes), weight
    if world.size > 1:
        total = world.total(torch.tensor([float(boxes), weight])) / world.size
        share, of_class = max(1.0 / world.size, float(total[0])), float(total[1])
    scale = {
        "loss_ce": weight / of_class,
        "loss_bbox": config.bbox_loss_coefficient * max(1.0, boxes) / share,
        "loss_giou": config.giou_loss_coefficient * max(1.0, boxes) / share,
    }
    # names of auxiliary losses end in the number of their layer
    terms = [value * factor for name, value in parts.items() for kind, factor in scale.items() if name.startswith(kind)]
    return torch.stack(terms).sum()
