"""Where a run is: steps, measurements, losses."""

from dataclasses import dataclass, field


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
    best_loss: float | None = None  # in that measurement, where there is one
    best_epoch: int = 0
    seconds: float = 0.0
    sums: Sums = field(default_factory=Sums)

    def forget_best(self) -> None:
        """The best weights are not in the folder: those of the next measurement will be."""
        self.best, self.best_loss, self.best_epoch = -1.0, None, 0
