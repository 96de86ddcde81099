"""The training loop, and all that it needs to go on where it was."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from . import checkpoint
from . import model as models
from .data import Data
from .evaluation import Interrupted, Score, autocast, check_labels, evaluate, to_device
from .files import printable, reason_of
from .loader import RunError, Share, Transform, seed_all, train_loader
from .logs import Log
from .progress import BEST, Progress, Sums, best_is
from .settings import Settings
from .tensors import not_finite
from .world import World, shard, wrapped

Stop = Callable[[], int]  # the number of the signal that asked for an end, or 0


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to end, and has saved where it is."""

    def __init__(self, signal: int, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}; --resume {folder} goes on")
        self.signal, self.step, self.folder = signal, step, folder


class Trainer:
    """A model under training. Every process of the world has one."""

    def __init__(self, settings: Settings, data: Data, model: nn.Module, world: World) -> None:
        from timm.utils import ModelEmaV3

        self.settings, self.data, self.world = settings, data, world
        self.share = Share(world.rank, world.size, settings.batch_size, settings.accumulate)
        self.steps_per_epoch = self._steps_per_epoch()
        total = self.steps_per_epoch * settings.epochs
        self.total_steps = min(total, settings.max_steps) if settings.max_steps else total
        self.shape = models.shape_of(settings, model)
        self.mixup = models.make_mixup(settings, len(data.classes), self.share.local)
        self.loss = models.make_loss(settings)
        layout = torch.channels_last if settings.channels_last else torch.preserve_format
        self.model = model.to(device=world.device, memory_format=layout)  # type: ignore[call-overload]
        self.ema = ModelEmaV3(self.model, decay=settings.ema) if settings.ema else None
        self.wrapped = wrapped(self.model, world, settings.parallel)
        if self.ema is not None and settings.parallel == "fsdp":
            shard(self.ema.module, world)
        if settings.compile:
            self.model.compile()
        self.optimizer = models.make_optimizer(self.model, settings)
        self.scheduler = models.make_scheduler(self.optimizer, settings, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp == "fp16")
        self.progress = Progress()
        # of the last steps, still on the device: (loss, images, step) of each batch, and (norm of the gradient, step)
        self._losses: list[tuple[Tensor, int, int]] = []
        self._norms: list[tuple[Tensor, int]] = []

    def _steps_per_epoch(self) -> int:
        source, size = self.data.train, self.settings.batch_size
        count = self.settings.train_samples if isinstance(source, IterableDataset) else len(source)
        if not count and isinstance(source, IterableDataset):
            try:
                count = len(source)  # type: ignore[arg-type]
            except TypeError:
                count = 0
            if not count:
                raise ValueError("this data does not tell how many images it has; say it with --train-samples")
        if count < size:
            raise ValueError(f"--batch-size {size}, but there are {count} images to train on")
        return count // size

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, the same in all processes; random numbers follow from the step."""
        self._share_sums()
        return {
            "settings": asdict(self.settings), "steps_per_epoch": self.steps_per_epoch, "step": self.progress.step,
            "classes": self.data.classes, "progress": asdict(self.progress), "model": self._weights(self.model),
            "ema": None if self.ema is None else self._weights(self.ema.module), "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None, "scaler": self.scaler.state_dict(),
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
            self._forget_best()

    def _forget_best(self) -> None:
        """The best weights are not in this folder: those of the next measurement will be."""
        self.progress.best, self.progress.best_epoch, self.progress.measured = -1.0, 0, 0

    def _load(self, state: dict[str, Any]) -> None:
        if bad := not_finite({name: state[name] for name in ("model", "ema")}):
            raise ValueError(
                f"the checkpoint of step {state['step']} holds numbers that are not finite, in {', '.join(bad[:3])}; "
                "remove it, and go on from one before it"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch or state["classes"] != self.data.classes:
            raise ValueError(
                f"the data has changed: an epoch had {state['steps_per_epoch']} steps and "
                f"{len(state['classes'])} classes, now {self.steps_per_epoch} and {len(self.data.classes)}"
            )
        if self.settings.parallel == "fsdp":
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True)
            sharded.set_model_state_dict(self.model, state["model"], options=options)
            sharded.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
            if self.ema is not None:
                sharded.set_model_state_dict(self.ema.module, state["ema"], options=options)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        values = dict(state["progress"])
        sums = Sums(**values.pop("sums"))
        # the sums are those of all processes; the first one holds them
        self.progress = Progress(**values, sums=sums if self.world.first else Sums())

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        if self.settings.parallel == "fsdp":
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
            return sharded.get_model_state_dict(model, options=options)  # type: ignore[return-value]
        return model.state_dict()

    def _optimizer_state(self) -> dict[str, Any]:
        if self.settings.parallel == "fsdp":
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
            return sharded.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return self.optimizer.state_dict()

    def _share_sums(self) -> None:
        """Adds the losses of the last steps up, and leaves the sums over all processes with the first.

        Raises:
            RunError: a loss or a gradient was not finite, in any process.
        """
        sums = self.progress.sums
        losses = torch.stack([one[0] for one in self._losses]).tolist() if self._losses else []
        norms = torch.stack([one[0] for one in self._norms]).tolist() if self._norms else []
        steps = [step for value, (_, _, step) in zip(losses, self._losses, strict=True) if not math.isfinite(value)]
        of_gradient = [step for value, (_, step) in zip(norms, self._norms, strict=True) if not math.isfinite(value)]
        # every process has to stop, and the earliest step is the one to tell
        if late := self.world.any(max((2**31 - step for step in steps + of_gradient), default=0)):
            first = 2**31 - late
            value = next((one for one, at in zip(losses, self._losses, strict=True) if at[2] == first), math.nan)
            raise self.not_finite(f"the loss is {value}" if first in steps else "the gradient is not finite", first)
        for value, (_, count, _) in zip(losses, self._losses, strict=True):
            sums.loss, sums.line_loss = sums.loss + value * count, sums.line_loss + value * count
            sums.images, sums.line_images = sums.images + count, sums.line_images + count
        self._losses.clear()
        self._norms.clear()
        if self.world.size == 1:
            return
        values = asdict(self.progress.sums)
        total = self.world.total(torch.tensor([float(one) for one in values.values()], dtype=torch.float64)).tolist()
        kinds = [type(one) for one in values.values()]
        whole = Sums(*(kind(one) for kind, one in zip(kinds, total, strict=True)))
        self.progress.sums = whole if self.world.first else Sums()

    def not_finite(self, what: str, step: int) -> RunError:
        """The end of a run whose numbers are none any more; nothing is saved then."""
        return RunError(
            f"{what} at step {step}; the last checkpoint is from before. A lower --lr, a longer --warmup-epochs, "
            "--clip-grad 1, or --amp bf16 in place of fp16 often helps"
        )

    def run(self, folder: Path, log: Log, stop: Stop) -> None:
        """Trains to the end of the schedule, saving on the way.

        Raises:
            Stopped: a signal came, and a checkpoint was written.
            RunError: the loss is not finite, or an image cannot be read.
            WriteError: a file could not be written.
        """
        progress = self.progress
        while True:
            ended = progress.step >= self.total_steps
            if (ended or progress.step % self.steps_per_epoch == 0) and progress.step > progress.measured:
                try:
                    self._finish_epoch(folder, log, stop)
                except Interrupted:
                    self._leave(folder, self.world.any(stop()))
            if ended:
                return
            self._train(folder, log, stop)

    def _epoch(self) -> int:
        """Epochs begun so far: the number of the one that the last step belongs to, from 1."""
        return math.ceil(self.progress.step / self.steps_per_epoch)

    def _train(self, folder: Path, log: Log, stop: Stop) -> None:
        """From here to the end of the epoch, or to the last step."""
        settings, progress, per_epoch = self.settings, self.progress, self.steps_per_epoch
        epoch = progress.step // per_epoch
        transform = Transform(settings, self.shape, training=True)
        first = progress.step - epoch * per_epoch
        batches = iter(train_loader(self.data.train, transform, settings, self.share, epoch=epoch, first=first))
        if isinstance(self.data.train, IterableDataset):
            for _ in range(first * settings.accumulate):  # a stream has no other way to the place where it was
                next(batches)
        end = min((epoch + 1) * per_epoch, self.total_steps)
        self.wrapped.train()
        while progress.step < end:
            began = time.perf_counter()
            norm = self._step(batches)
            progress.seconds += time.perf_counter() - began
            log.advance(settings.batch_size)
            if progress.step % settings.log_every == 0 or progress.step == self.total_steps:
                self._line(log, norm)
            signal = self.world.any(stop())
            if signal or (settings.save_every and progress.step % settings.save_every == 0 and progress.step < end):
                if signal:
                    self._leave(folder, signal)
                self.save(folder)

    def _step(self, batches: Any) -> float:
        """One optimizer step over `accumulate` batches; the norm of the gradient where it is clipped."""
        settings, progress, device = self.settings, self.progress, self.world.device
        if self.scheduler:
            self.scheduler.step_update(progress.step)
        self.optimizer.zero_grad()
        for micro in range(settings.accumulate):
            try:
                batch = next(batches)
            except StopIteration:
                raise RunError(
                    f"the data ended in step {progress.step + 1}, before the {self.steps_per_epoch} steps of an epoch; "
                    "give --train-samples the number that there are for each process"
                ) from None
            for words in batch.bad[: max(0, 10 - progress.sums.bad)]:
                print(f"irpe: unreadable image, another one stands in: {printable(words)}", flush=True)
            progress.sums.bad += len(batch.bad)
            seed_all(settings.seed, "step", progress.step, self.world.rank, micro)
            check_labels(batch.targets, len(self.data.classes))
            images, targets = to_device(batch.images, settings, device), batch.targets.to(device, non_blocking=True)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            last = micro + 1 == settings.accumulate
            with self._without_sync(last):
                with autocast(settings.amp, device):
                    output = self.wrapped(images)
                loss = self.loss(output.float(), targets)
                self.scaler.scale(loss / settings.accumulate).backward()
            self._losses.append((loss.detach(), len(images), progress.step + 1))
        norm = 0.0
        if settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            total = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
            total = total.full_tensor() if hasattr(total, "full_tensor") else total
            norm = float(total)
        else:
            grads = [one.grad for one in self.model.parameters() if one.grad is not None]
            total = nn.utils.get_total_norm([one.to_local() if hasattr(one, "to_local") else one for one in grads])
        if not self.scaler.is_enabled():  # which leaves such steps out by itself
            self._norms.append((total.detach(), progress.step + 1))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        return norm

    def _without_sync(self, last: bool) -> Any:
        """Gradients are exchanged in the last of the accumulated batches only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        if self.settings.parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _line(self, log: Log, norm: float) -> None:
        self._share_sums()
        sums, lr = self.progress.sums, max(group["lr"] for group in self.optimizer.param_groups)
        if self.world.first:
            log.step(
                step=self.progress.step, epoch=self._epoch(), loss=sums.line_loss / max(1, sums.line_images), lr=lr,
                **({"grad_norm": norm} if self.settings.clip_grad else {}),
            )  # fmt: skip
        sums.line_loss, sums.line_images = 0.0, 0

    def measure(self, model: nn.Module, log: Log, stop: Stop) -> Score:
        """The score of a model on the part to evaluate on."""
        transform = Transform(self.settings, self.shape, training=False)
        score, bad = evaluate(
            model, self.data.val, transform, self.settings, self.world, num_classes=len(self.data.classes),
            interrupted=lambda: bool(stop()), on_batch=log.measuring,
        )  # fmt: skip
        if self.world.first:
            log.bad_images(bad)
        return score

    def _finish_epoch(self, folder: Path, log: Log, stop: Stop) -> None:
        """Measures, writes the line of the epoch, and saves."""
        progress = self.progress
        self._share_sums()  # a loss that is not finite is told before what came of it
        score = self.measure(self.model, log, stop)
        average = None if self.ema is None else self.measure(self.ema.module, log, stop)
        self._share_sums()
        sums = progress.sums
        values = {
            "epoch": self._epoch(), "step": progress.step, "train_loss": sums.loss / max(1, sums.images),
            "bad_images": sums.bad, "seconds": progress.seconds, "val": score.plain(),
        }  # fmt: skip
        if average is not None:
            values["ema"] = average.plain()
        if progress.step % self.steps_per_epoch == 0:  # a run that ends within an epoch may go on with it
            progress.sums = Sums()
        progress.measured = progress.step
        is_best = score.top1 > progress.best
        if is_best:
            progress.best, progress.best_epoch = score.top1, self._epoch()
        if self.world.first:
            log.epoch(values, is_best=is_best)
        # the checkpoint comes before the best weights, which `restore_best` takes from it after a kill between them
        self.save(folder)
        if is_best:
            self._write_best(folder)

    def _write_best(self, folder: Path) -> None:
        weights, progress = self._weights(self.model), self.progress  # of all processes, where they share the model
        if self.world.first:
            notes = {"epoch": progress.best_epoch, "step": progress.step, "top1": f"{progress.best:.4f}"}
            checkpoint.write_weights(folder / BEST, weights, {name: str(one) for name, one in notes.items()})

    def restore_best(self, folder: Path) -> None:
        """Makes the best weights in the folder those that this run knows of, where it goes on.

        A kill may have come before they were written; or they are of a later step, from which the run does not go on.
        """
        progress = self.progress
        if progress.best < 0 or self.world.from_first(lambda: best_is(folder / BEST, progress)):
            return
        if progress.step == progress.measured and progress.best_epoch == self._epoch():
            self._write_best(folder)
        else:
            progress.best, progress.best_epoch = -1.0, 0

    def save(self, folder: Path) -> None:
        """Writes a checkpoint.

        Raises:
            RunError: weights are not finite; the checkpoints that are there stay.
        """
        state = self.state()
        if self.world.any(int(bool(bad := not_finite({name: state[name] for name in ("model", "ema", "optimizer")})))):
            raise self.not_finite(f"{bad[0] if bad else 'a weight'} is not finite", self.progress.step)
        if self.world.first:
            checkpoint.save(folder, state, self.settings.keep, later=False)

    def _leave(self, folder: Path, signal: int) -> None:
        self.save(folder)
        raise Stopped(signal, self.progress.step, folder)

    def export(self, folder: Path) -> None:
        """Writes the weights at the end of the run, and their moving average."""
        parts = {models.WEIGHTS: self._weights(self.model)}
        if self.ema is not None:
            parts["ema.safetensors"] = self._weights(self.ema.module)
        for name, state in parts.items():
            if self.world.first:
                checkpoint.write_weights(folder / name, state, {"step": str(self.progress.step)})
