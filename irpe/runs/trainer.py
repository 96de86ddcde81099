"""The loop of every run: epochs of steps, measurements, checkpoints, an early end, and going on from there."""

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from . import checkpoint
from .files import reason_of
from .logs import Log
from .progress import Progress, Sums
from .seeds import Share
from .settings import RunSettings
from .tensors import not_finite
from .trackers import trackers_of
from .workers import RunError
from .world import World

Stop = Callable[[], int]  # the number of the signal that asked for an end, or 0


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to end, and has saved where it is."""

    def __init__(self, signal: int, step: int, folder: Path, command: str) -> None:
        super().__init__(f"stopped after step {step}; {command} goes on")
        self.signal, self.step, self.folder = signal, step, folder


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for an end while images were measured."""


class Measured(NamedTuple):
    """A measurement: what its line has besides steps and losses, the figure that decides which is best, and words.

    Of equal figures the lower loss is the better, where there is one.
    """

    values: dict[str, Any]
    figure: float
    words: str
    loss: float | None = None


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The precision that --amp (none, bf16 or fp16) asks for."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def not_numbers(count: int, seen: int, what: str) -> RunError:
    """The error for outputs that are not finite, whose figures would look like any others."""
    return RunError(
        f"the outputs are not numbers on {count:,} of {seen:,} {what}: the weights are damaged or training went wrong, "
        "or --amp fp16 is too narrow for this model (--amp bf16 or none has the range)"
    )


class Trainer:
    """A model under training. Every process of the world has one.

    A child makes `model` (as it is), `wrapped` (as it is called) and `optimizer`, and says what its batches, a step, a
    measurement, a checkpoint and the best weights are.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    advice = "A lower --lr often helps"  # where numbers have become none
    measure_every = 1  # epochs

    def __init__(self, settings: RunSettings, count: int, world: World) -> None:
        """count: of the images to train on."""
        self.settings, self.world = settings, world
        self.share = Share(world.rank, world.size, settings.batch_size, settings.accumulate)
        if count < settings.batch_size:
            raise ValueError(f"--batch-size {settings.batch_size}, but there are {count} images to train on")
        self.steps_per_epoch = count // settings.batch_size
        self.schedule = self.steps_per_epoch * settings.epochs
        self.total_steps = min(self.schedule, settings.max_steps) if settings.max_steps else self.schedule
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp == "fp16")
        self.progress = Progress()
        # of the last steps, still on the device: (loss, images, step) of each batch, and (norm of the gradient, step)
        self.losses: list[tuple[Tensor, int, int]] = []
        self.norms: list[tuple[Tensor, int]] = []

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """What this process takes of an epoch, from step `first` of it on: `accumulate` batches for each step."""
        raise NotImplementedError

    def _step(self, batches: Iterator[Any]) -> float | None:
        """One step of the optimizer; the norm of the gradient where it is clipped."""
        raise NotImplementedError

    def command(self) -> str:
        """What goes on with the run, together with --resume."""
        raise NotImplementedError

    def measure(self, log: Log, stop: Stop) -> Measured:
        """Measures the model, in every process; may raise Interrupted."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, the same in all processes; random numbers follow from the step."""
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def write_best(self, folder: Path) -> None:
        """Writes the weights as the best ones; called in every process."""
        raise NotImplementedError

    def has_best(self, folder: Path) -> bool:
        """Whether the folder has the best weights that the progress knows of; asked in the first process."""
        raise NotImplementedError

    def load(self, state: dict[str, Any], *, elsewhere: bool = False) -> None:
        """Goes to where `state` was taken.

        Args:
            elsewhere: whether the run goes on in another folder, which has no best weights yet.

        Raises:
            ValueError: the data has changed since then, or the state holds numbers that are not finite.
        """
        try:
            if bad := not_finite({name: state.get(name) for name in ("model", "ema")}):
                raise ValueError(
                    f"the checkpoint of step {state['step']} holds numbers that are not finite, in "
                    f"{', '.join(bad[:3])}; remove it, and go on from one before it"
                )
            self._load(state)
        except (KeyError, AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"the checkpoint is not of this run: {type(error).__name__} {reason_of(error)}") from None
        if not self.world.first:
            self.progress.sums = Sums()  # those of all processes, which the first one holds
        if elsewhere:
            self.progress.forget_best()
            self.progress.measured = 0

    def run(self, folder: Path, console: Console, stop: Stop) -> None:
        """Trains to the end of the schedule, measuring, writing the log and saving on the way.

        Raises:
            Stopped: a signal came, and a checkpoint was written.
            RunError: the loss is not finite, or an image cannot be read.
            WriteError: a file could not be written.
        """
        settings, progress = self.settings, self.progress
        log = Log(
            folder if self.world.first else None, console, step=progress.step, measured=progress.measured,
            total_images=(self.total_steps - progress.step) * settings.batch_size,
        )  # fmt: skip
        with log:
            if self.world.first:  # now that the log of before has been read, and is that of a run
                log.trackers = trackers_of(folder, settings, progress.step)
            while True:
                if self.is_due():
                    try:
                        self._finish_epoch(folder, log, stop)
                    except Interrupted:
                        self._leave(folder, self.world.any(stop()))
                if progress.step >= self.total_steps:
                    return
                self._train(folder, log, stop)

    def epoch(self) -> int:
        """Epochs begun so far: the number of the one that the last step belongs to, from 1."""
        return math.ceil(self.progress.step / self.steps_per_epoch)

    def is_due(self) -> bool:
        """Whether the next thing to do is a measurement: at the end, and after some epochs, unless it has been made."""
        step, epochs = self.progress.step, self.steps_per_epoch * self.measure_every
        return (step >= self.total_steps or step % epochs == 0) and step > self.progress.measured

    def _train(self, folder: Path, log: Log, stop: Stop) -> None:
        """From here to the end of the epoch, or to the last step."""
        settings, progress, per_epoch = self.settings, self.progress, self.steps_per_epoch
        epoch = progress.step // per_epoch
        end = min((epoch + 1) * per_epoch, self.total_steps)
        batches = self.batches(epoch, progress.step - epoch * per_epoch)
        self.wrapped.train()
        while progress.step < end:
            began = time.perf_counter()
            norm = self._step(batches)
            progress.seconds += time.perf_counter() - began
            log.advance(settings.batch_size)
            if progress.step % settings.log_every == 0 or progress.step == self.total_steps:
                self._line(log, norm)
            if signal := self.world.any(stop()):
                self._leave(folder, signal)
            if settings.save_every and progress.step % settings.save_every == 0 and progress.step < end:
                self.save(folder)
        if not self.is_due():
            self.save(folder)

    def without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last of the accumulated batches only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def share_sums(self) -> None:
        """Adds the losses of the last steps up, and leaves the sums over all processes with the first.

        Raises:
            RunError: a loss or a gradient was not finite, in any process.
        """
        sums = self.progress.sums
        losses = torch.stack([loss for loss, _, _ in self.losses]).tolist() if self.losses else []
        norms = torch.stack([norm for norm, _ in self.norms]).tolist() if self.norms else []
        of_loss = [step for value, (_, _, step) in zip(losses, self.losses, strict=True) if not math.isfinite(value)]
        of_gradient = [step for value, (_, step) in zip(norms, self.norms, strict=True) if not math.isfinite(value)]
        # every process has to stop, and the earliest step is the one to tell
        if late := self.world.any(max((2**31 - step for step in of_loss + of_gradient), default=0)):
            first = 2**31 - late
            of_first = (value for value, (_, _, step) in zip(losses, self.losses, strict=True) if step == first)
            what = f"the loss is {next(of_first, math.nan)}" if first in of_loss else "the gradient is not finite"
            raise self.not_finite(what, first)
        for value, (_, count, _) in zip(losses, self.losses, strict=True):
            sums.loss, sums.line_loss = sums.loss + value * count, sums.line_loss + value * count
            sums.images, sums.line_images = sums.images + count, sums.line_images + count
        self.losses.clear()
        self.norms.clear()
        if self.world.size == 1:
            return
        values = asdict(sums)
        total = self.world.total(
            torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        ).tolist()
        kinds = [type(value) for value in values.values()]
        whole = Sums(*(kind(value) for kind, value in zip(kinds, total, strict=True)))
        self.progress.sums = whole if self.world.first else Sums()

    def not_finite(self, what: str, step: int) -> RunError:
        """The end of a run whose numbers are none any more; nothing is saved then."""
        return RunError(f"{what} at step {step}; the last checkpoint is from before. {self.advice}")

    def rate(self) -> float:
        """The learning rate of the last step; the largest where there are several."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _line(self, log: Log, norm: float | None) -> None:
        self.share_sums()
        sums = self.progress.sums
        log.step(
            step=self.progress.step, epoch=self.epoch(), loss=sums.line_loss / max(1, sums.line_images),
            lr=self.rate(), **({} if norm is None else {"grad_norm": norm}),
        )  # fmt: skip
        sums.line_loss, sums.line_images = 0.0, 0

    def _finish_epoch(self, folder: Path, log: Log, stop: Stop) -> None:
        """Measures, writes the line of the epoch, and saves."""
        progress = self.progress
        self.share_sums()  # a loss that is not finite is told before what came of it
        measured = self.measure(log, stop)
        sums = progress.sums
        values = {
            "epoch": self.epoch(), "step": progress.step, "train_loss": sums.loss / max(1, sums.images),
            "bad_images": sums.bad, "seconds": progress.seconds, **measured.values,
        }  # fmt: skip
        if progress.step % self.steps_per_epoch == 0:  # a run that ends within an epoch may go on with it
            progress.sums = Sums()
        progress.measured = progress.step
        is_best = measured.figure > progress.best
        if measured.figure == progress.best and measured.loss is not None and progress.best_loss is not None:
            is_best = measured.loss < progress.best_loss
        if is_best:
            progress.best, progress.best_loss, progress.best_epoch = measured.figure, measured.loss, self.epoch()
        log.epoch(values, measured.words, is_best=is_best)
        # the checkpoint comes before the best weights, which `restore_best` takes from it after a kill between them
        self.save(folder)
        if is_best:
            self.write_best(folder)

    def restore_best(self, folder: Path) -> None:
        """Makes the best weights in the folder those that this run knows of, where it goes on.

        A kill may have come before they were written; or they are of a later step, from which the run does not go on.
        """
        progress = self.progress
        if progress.best < 0 or self.world.from_first(lambda: self.has_best(folder)):
            return
        if progress.step == progress.measured and progress.best_epoch == self.epoch():
            self.write_best(folder)
        else:
            progress.forget_best()

    def save(self, folder: Path) -> None:
        """Writes a checkpoint.

        Raises:
            RunError: weights are not finite; the checkpoints that are there stay.
        """
        self.share_sums()
        state = self.state()
        bad = not_finite({name: state.get(name) for name in ("model", "ema", "optimizer")})
        if self.world.any(int(bool(bad))):
            raise self.not_finite(f"{bad[0] if bad else 'a weight'} is not finite", self.progress.step)
        if self.world.first:
            checkpoint.save(folder, state, self.settings.keep, later=False)

    def _leave(self, folder: Path, signal: int) -> None:
        self.save(folder)
        command = f"{self.command()} --resume {shlex.quote(str(folder))}"
        raise Stopped(signal, self.progress.step, folder, command)
