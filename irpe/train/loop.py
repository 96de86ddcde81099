"""The loop of classification: what a step, a measurement and a checkpoint of `irpe train` are."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..runs import trainer
from ..runs.config import on_command_line
from ..runs.files import printable
from ..runs.logs import Log
from ..runs.progress import Progress, Sums
from ..runs.seeds import seed_all
from ..runs.tensors import notes_of, write_weights
from ..runs.trainer import Measured, Stop, autocast
from ..runs.workers import RunError
from ..runs.world import World, shard, wrapped
from . import confusion
from . import model as models
from .data import Data, fetched
from .evaluation import Score, check_labels, evaluate, to_device
from .loader import Batch, Transform, train_loader
from .pretrained import AVERAGE, BEST, WEIGHTS
from .settings import Settings


class Trainer(trainer.Trainer):
    """A classifier under training. Every process of the world has one."""

    settings: Settings
    advice = "A lower --lr, a longer --warmup-epochs, --clip-grad 1, or --amp bf16 in place of fp16 often helps"

    def __init__(self, settings: Settings, data: Data, model: nn.Module, world: World) -> None:
        from timm.utils import ModelEmaV3

        super().__init__(settings, images_of(data.train, settings.train_samples), world)
        self.data = data
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

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """What this process takes of an epoch, from step `first` of it on."""
        transform = Transform(self.shape, self.settings.interpolation, self.settings)
        found = iter(train_loader(self.data.train, transform, self.settings, self.share, epoch=epoch, first=first))
        if isinstance(self.data.train, IterableDataset):
            for _ in range(first * self.settings.accumulate):  # a stream has no other way to the place where it was
                next(found)
        return found

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on, the same in all processes; random numbers follow from the step."""
        return {
            "settings": asdict(self.settings), "steps_per_epoch": self.steps_per_epoch, "step": self.progress.step,
            "classes": self.data.classes, "progress": asdict(self.progress), "model": self._weights(self.model),
            "ema": None if self.ema is None else self._weights(self.ema.module), "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None, "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
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
        values = state["progress"]
        self.progress = Progress(**values | {"sums": Sums(**values["sums"])})

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

    def _step(self, batches: Iterator[Batch]) -> float | None:
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
            images = to_device(batch.images, settings.channels_last, device)
            targets = batch.targets.to(device, non_blocking=True)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            last = micro + 1 == settings.accumulate
            with self.without_sync(last):
                with autocast(settings.amp, device):
                    output = self.wrapped(images)
                loss = self.loss(output.float(), targets)
                self.scaler.scale(loss / settings.accumulate).backward()
            self.losses.append((loss.detach(), len(images), progress.step + 1))
        norm = None
        if settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            total = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
            total = total.full_tensor() if hasattr(total, "full_tensor") else total
            norm = float(total)
        else:
            grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            total = nn.utils.get_total_norm([grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads])
        if not self.scaler.is_enabled():  # which leaves such steps out by itself
            self.norms.append((total.detach(), progress.step + 1))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        return norm

    def without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last of the accumulated batches only."""
        if self.settings.parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return super().without_sync(last)

    def command(self) -> str:
        """What goes on with the run, together with --resume."""
        return f"irpe train {on_command_line(self.settings, fetched(self.settings, goes_on=True))}".rstrip()

    def measure(self, log: Log, stop: Stop) -> Measured:
        """The score on the part to evaluate on, of the model and of its moving average."""
        score = self._score(self.model, log, stop)
        if log.folder is not None:
            confusion.write(log.folder, score.pairs, self.data.classes, self.progress.step)
        values, words = {"val": score.plain()}, f"val {score.loss:.4f}, top-1 {score.top1:.2f}"
        if self.ema is not None:
            average = self._score(self.ema.module, log, stop)
            values["ema"] = average.plain()
            words += f", average {average.top1:.2f}"
        return Measured(values, score.top1, words, score.loss)

    def _score(self, model: nn.Module, log: Log, stop: Stop) -> Score:
        transform = Transform(self.shape, self.settings.interpolation)
        score, bad = evaluate(
            model, self.data.val, transform, self.settings, self.world, num_classes=len(self.data.classes),
            interrupted=lambda: bool(stop()), on_batch=log.measuring,
        )  # fmt: skip
        log.bad_images(bad)
        return score

    def write_best(self, folder: Path) -> None:
        """Writes the weights as the best ones; called in every process."""
        weights, progress = self._weights(self.model), self.progress  # of all processes, where they share the model
        if self.world.first:
            notes = {"epoch": progress.best_epoch, "step": progress.step, "top1": f"{progress.best:.4f}"}
            write_weights(folder / BEST, weights, {name: str(note) for name, note in notes.items()})

    def has_best(self, folder: Path) -> bool:
        """Whether the folder's best weights are of the best epoch, and of no later step."""
        try:
            notes = notes_of(folder / BEST)
        except (ValueError, OSError):
            return False
        step = notes.get("step", "0")  # older files do not tell
        return (
            notes.get("epoch") == str(self.progress.best_epoch) and step.isdigit() and int(step) <= self.progress.step
        )

    def export(self, folder: Path) -> None:
        """Writes the weights at the end of the run, and their moving average."""
        parts = {WEIGHTS: self.model} | ({} if self.ema is None else {AVERAGE: self.ema.module})
        for name, model in parts.items():
            weights = self._weights(model)
            if self.world.first:
                write_weights(folder / name, weights, {"step": str(self.progress.step)})


def images_of(source: Any, train_samples: int) -> int:
    """How many images an epoch has; of a stream as --train-samples says, or as it tells itself.

    Raises:
        ValueError: neither says it.
    """
    if not isinstance(source, IterableDataset):
        return len(source)
    try:
        count = train_samples or len(source)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if not count:
        raise ValueError("this data does not tell how many images it has; say it with --train-samples")
    return count
