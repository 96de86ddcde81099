"""Where a run is, and which weights were the best so far."""

from dataclasses import dataclass, field
from pathlib import Path

from .tensors import notes_of

BEST = "best.safetensors"


@dataclass
class Sums:
    """What has been added up since the epoch began and since the last line of the log."""

    loss: float = 0.0
    images: int = 0
    line_loss: float = 0.0
    line_images: int = 0
    bad: int = 0


@dataclass
class Progress:
    """Where a run is: optimizer steps done, the last that was measured, the best epoch, seconds of training."""

    step: int = 0
    measured: int = 0
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0
    sums: Sums = field(default_factory=Sums)


def best_is(path: Path, progress: Progress) -> bool:
    """Whether a file of best weights is of the epoch of the progress, and of no later step."""
    try:
        notes = notes_of(path)
    except (ValueError, OSError):
        return False
    step = notes.get("step", "0")  # older files do not tell
    return notes.get("epoch") == str(progress.best_epoch) and step.isdigit() and int(step) <= progress.step
