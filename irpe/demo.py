"""Trains a small vision transformer on handwritten digits, with and without iRPE: what `irpe train` does.

Every side is the same timm VisionTransformer (patch 2, dim 48, 3 blocks, 3 heads, mean pooling, no class token),
trained at 8x8 by the same recipe (AdamW, one-cycle), and tested at 8x8 and on wider canvases 8x12 and 8x16. Sides
differ in how they know positions, and in the learning rate, which was chosen for each of them from the same grid on
validation images: `irpe train --tune` repeats that, docs/digits.md has its numbers.

Data is `irpe.digits`, and `irpe.paired` runs `fit` and compares sides; below come model, loop, and what weights hold.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import digits, paired
from .encodings import Encodings, learned
from .equip import equip

NONE, ABSOLUTE = "none", "absolute"
RPE = ("rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv")
MODEL: dict[str, Any] = dict(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0)
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)  # learning rates that every side was offered
RATES = {NONE: 8e-3, ABSOLUTE: 4e-3, RPE[0]: 1.6e-2, RPE[1]: 8e-3}  # what `best_rates` chose, docs/digits.md
TUNE_SEEDS = (100, 101)  # never among the reported ones


@dataclass(frozen=True)
class Run(paired.Run):
    """One training: side "none", "absolute" or the string form of iRPE."""

    points: int = 5  # how often accuracy is measured, about; always at the end


def rate_of(side: str) -> float:
    """The chosen peak learning rate; an iRPE that was not tuned takes the one of the first that was."""
    return RATES.get(side, RATES[RPE[0]])


def title_of(side: str) -> str:
    """Which positions the side has, in words."""
    if side in (NONE, ABSOLUTE):
        return "none" if side == NONE else "learned absolute"
    if side in RPE:
        return f"iRPE on {', '.join(side.rsplit('-', 1)[1])}"
    return side


def build_model(side: str) -> VisionTransformer:
    """A new model of this side, for canvases of any size; its weights come from torch's random state."""
    model = VisionTransformer(
        img_size=digits.HEIGHT, patch_size=digits.PATCH, in_chans=1, num_classes=10, class_token=False,
        global_pool="avg", dynamic_img_size=True, **MODEL,
    )  # fmt: skip
    if side != ABSOLUTE:
        model.pos_embed = None  # drawn all the same, so that a seed gives all sides the same weights but for positions
    return model if side in (NONE, ABSOLUTE) else equip(model, side)


def standardised(images: Tensor) -> Tensor:
    """Images in [0, 1] as models take them: about mean 0 and deviation 1 over all pixels of the digits."""
    return (images - 0.3) / 0.38


def accuracy(model: nn.Module, data: digits.Digits) -> float:
    """Share of right answers, in percent."""
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(standardised(images)).argmax(-1) == labels).sum())
            for images, labels in zip(data.images.split(200), data.labels.split(200), strict=True)
        )
    return 100.0 * right / len(data.labels)


def fit(run: Run, on_epoch: Callable[[int], None] = lambda epoch: None) -> dict[str, Any]:
    """Trains one model and measures it about `run.points` times on the way, the last time at the end.

    Nothing depends on what is measured: no early stop, no choice of an epoch. The result depends on `run` alone when
    torch has one thread.

    Returns:
        The fields of `run`; "parameters"; "measured_at" (epochs), "accuracy" {width: percents at these epochs}, "loss"
        (mean of every epoch), "seconds" (wall) and "cpu_seconds", both with the tests; "state" {name: numpy array}.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(run.seed)
    order = torch.Generator().manual_seed(run.seed)
    data = digits.splits()[run.fit_on]
    images, labels = standardised(data.images[: run.limit]), data.labels[: run.limit]
    tests = {width: digits.on_canvas(digits.splits()[run.test_on], width) for width in digits.WIDTHS}
    model = build_model(run.side)
    optimizer = torch.optim.AdamW(paired.parameter_groups(model), lr=run.lr)
    steps = run.epochs * math.ceil(len(labels) / run.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=steps)
    measured_at: list[int] = []
    accuracies: dict[int, list[float]] = {width: [] for width in tests}
    losses = []
    for epoch in range(1, run.epochs + 1):
        model.train()
        batches = torch.randperm(len(labels), generator=order).split(run.batch_size)
        losses.append(paired.train_epoch(model, optimizer, schedule, images, labels, batches))
        if (run.epochs - epoch) % max(1, run.epochs // run.points) == 0:
            measured_at.append(epoch)
            for width, test in tests.items():
                accuracies[width].append(accuracy(model, test))
        on_epoch(epoch)
    return asdict(run) | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "measured_at": measured_at,
        "accuracy": accuracies,
        "loss": losses,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "state": {name: weight.numpy() for name, weight in model.state_dict().items()},
    }


def save(path: Path, result: dict[str, Any]) -> Path:
    """Writes the weights of a result as a plain state dict of tensors, for `build_model(side).load_state_dict`."""
    torch.save({name: torch.from_numpy(weight) for name, weight in result["state"].items()}, path)
    return path


def encodings(result: dict[str, Any], examples: Sequence[int] = (0, 2, 4, 5, 7)) -> Encodings | None:
    """What a trained model's encodings on keys have learned; None where the side has none.

    Args:
        examples: classes, of which the first test image asks, from a token with ink.
    """
    model = build_model(result["side"])
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in result["state"].items()})
    test = digits.splits()["test"]
    images = [int((test.labels == label).nonzero()[0]) for label in examples]
    inked = F.avg_pool2d(test.images, digits.PATCH).flatten(1) > 0.3  # (B, L)
    return learned(model, standardised(test.images), test.images[:, 0], images, title_of(result["side"]), inked)
