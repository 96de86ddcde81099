"""One run: a model is trained at 32x32 and measured at several sizes."""

import dataclasses
import importlib.metadata
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from irpe import paired

from . import data
from .arms import Arm, Shape, build

SIZES = ((32, 32), (32, 48), (24, 40), (48, 48))  # height, width
HELD_OUT = 5_000  # the last training pictures: learning rates are chosen on them, and no run trains on them


@dataclass(frozen=True)
class Effort:
    """How much of everything a run has; a curve is measured on a quarter of the pictures of the final test."""

    pictures: int = 45_000
    epochs: int = 30
    test_pictures: int = 10_000
    batch: int = 256
    width: int = 192
    heads: int = 3
    depth: int = 6

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return Shape(self.width, self.heads, self.depth)


@dataclass(frozen=True)
class Run:
    """One training. A pilot is measured on the pictures that are held out, at 32x32."""

    arm: Arm
    seed: int
    lr: float
    effort: Effort
    amp: bool
    pilot: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        return f"pilot-lr{self.lr:g}" if self.pilot else f"{self.arm.name}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """As its JSON has them."""
        found = dataclasses.asdict(self)
        return {"positions": self.arm.positions, "rpe": self.arm.rpe} | {k: v for k, v in found.items() if k != "arm"}


class Training:
    """A model, its optimizer, and one step of both."""

    def __init__(self, run: Run, device: str) -> None:
        self.device, self.amp = device, run.amp
        self.model = build(run.arm, run.effort.shape, run.seed).to(device)
        self.optimizer = torch.optim.AdamW(paired.parameter_groups(self.model), lr=run.lr, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of the batch, without waiting for the device."""
        with self.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def accuracy(self, images: Tensor, labels: Tensor, size: tuple[int, int], batch: int = 500) -> float:
        """Right answers in percent, of uint8 pictures stretched to a size."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        with torch.inference_mode(), self.autocast():
            for part, answers in zip(images.split(batch), labels.split(batch), strict=True):
                right += (self.model(data.resized(part, *size)).argmax(-1) == answers).sum()
        self.model.train()
        return 100.0 * right.item() / len(labels)


def fit(run: Run, tensors: dict[str, Tensor], device: str) -> dict[str, Any]:
    """Trains and measures; nothing depends on what is measured: no early stop, no choice of an epoch.

    Order, crops and mirrors of the pictures follow from the seed alone, so all arms see the same batches.
    """
    start = time.perf_counter()
    effort = run.effort
    images, labels = (tensors[name][: effort.pictures].to(device) for name in ("train", "train labels"))
    if run.pilot:
        tests, answers = (tensors[name][-HELD_OUT:][: effort.test_pictures] for name in ("train", "train labels"))
    else:
        tests, answers = (tensors[name][: effort.test_pictures] for name in ("test", "test labels"))
    tests, answers = tests.to(device), answers.to(device)
    few = max(1, len(answers) // 4)
    training = Training(run, device)
    batches = max(1, len(labels) // effort.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(training.optimizer, run.lr, total_steps=effort.epochs * batches)
    generator = torch.Generator().manual_seed(run.seed)
    losses, curve, seconds = [], [], 0.0
    for _ in range(effort.epochs):
        begin = time.perf_counter()
        order, moves = (one.to(device) for one in data.epoch(len(labels), generator))
        total = torch.zeros((), device=device)
        for batch, move in list(zip(order.split(effort.batch), moves.split(effort.batch), strict=True))[:batches]:
            total += training.step(data.augmented(images[batch], move), labels[batch])
            schedule.step()
        losses.append(total.item() / batches)
        seconds += time.perf_counter() - begin
        curve.append(training.accuracy(tests[:few], answers[:few], SIZES[0]))
    sizes = SIZES[:1] if run.pilot else SIZES
    return {
        "arm": run.arm.name,
        "settings": run.settings(),
        "parameters": sum(weight.numel() for weight in training.model.parameters()),
        "loss": losses,
        "curve": curve,
        "accuracy": {
            f"{height}x{width}": training.accuracy(tests, answers, (height, width)) for height, width in sizes
        },
        "training seconds": seconds,
        "seconds": time.perf_counter() - start,
        "machine": common.machine(device) | {"timm": importlib.metadata.version("timm")},
    }
