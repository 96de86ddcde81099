"""Runs side by side: those that differ in nothing but the seed are one row, with mean and spread."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .. import viz
from ..runs.files import printable
from ..runs.logs import epochs_of, read_log
from .run import read_record
from .settings import Settings, settings_from_dict


@dataclass(frozen=True)
class Run:
    """A run's settings, number of weights, and measured epochs as its log has them."""

    folder: Path
    settings: Settings
    parameters: int
    epochs: list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Runs of one row; `title` is what distinguishes it from the others."""

    title: str
    runs: list[Run]

    def values(self, key: str, which: str, part: str = "val") -> list[float]:
        """A figure of each run at its "last" or "best" epoch (that of the highest top-1)."""
        found = []
        for run in self.runs:
            best = max(run.epochs, key=lambda line: (line[part]["top1"], -line[part]["loss"]))
            found.append((best if which == "best" else run.epochs[-1])[part][key])
        return found


def load(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        ValueError: the folder is not that of a run, or no epoch of it has been measured.
    """
    record = read_record(folder)
    epochs = [line for line in read_log(folder) if line["kind"] == "epoch"]
    if not epochs:
        raise ValueError(f"{folder} has no measured epoch yet")
    for line in epochs:
        numbers = [line.get("train_loss")]
        for part in (line["val"], line.get("ema", line["val"])):
            numbers += [part.get(name) if isinstance(part, dict) else None for name in ("loss", "top1", "top5")]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(
                f"{folder}: the line of epoch {line['epoch']} has no scores of a classifier; it is damaged"
            )
    return Run(folder, settings_from_dict(record["settings"]), record["parameters"], epochs)


def _identity(run: Run) -> dict[str, Any]:
    """What runs of one row have in common: all settings that decide the result, but for the seed."""
    names = [
        field.name for field in dataclasses.fields(Settings) if not field.metadata.get("free") and field.name != "seed"
    ]
    return {"data": Path(run.settings.data).name, **{name: getattr(run.settings, name) for name in names}}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The rows, in the order in which they appear, each named by the settings in which rows differ.

    Raises:
        ValueError: a row has two runs of the same seed, or runs of different lengths.
    """
    rows: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        identity = _identity(run)
        members = next((members for other, members in rows if other == identity), None)
        if members is None:
            rows.append((identity, [run]))
        else:
            members.append(run)
    for _, members in rows:
        seeds = [run.settings.seed for run in members]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"two runs differ in nothing, not even the seed: {', '.join(str(r.folder) for r in members)}"
            )
        if len({run.epochs[-1]["step"] for run in members}) > 1:
            steps = ", ".join(f"{run.folder} has {run.epochs[-1]['step']} steps" for run in members)
            raise ValueError(
                f"runs that differ in the seed alone are of different lengths: {steps}; let them end first"
            )
    varied = [name for name in rows[0][0] if len({repr(identity[name]) for identity, _ in rows}) > 1]
    if "rpe" not in varied and len(rows) == 1:
        varied = ["model", "rpe"]
    return [Group(", ".join(_words(name, identity[name]) for name in varied), members) for identity, members in rows]


def _words(name: str, value: Any) -> str:
    if name in ("data", "model"):
        return str(value)
    if name == "rpe":
        return "no iRPE" if value == "none" else str(value)
    return f"{name.replace('_', ' ')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, deviation of a sample; 0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw(path: Path, groups: Sequence[Group]) -> Path:
    """Accuracy and training loss over epochs: the mean of the seeds as a line, their range as a band."""
    found = []
    for group in groups:
        runs = [epochs_of(run.epochs) for run in group.runs]
        top1 = np.array([[line["val"]["top1"] for line in lines] for lines in runs])
        loss = np.array([[line["train_loss"] for line in lines] for lines in runs])
        found.append((printable(group.title), [line["epoch"] for line in runs[0]], top1, loss))

    def curves(which: int) -> list[viz.Curve]:
        parts = zip(cycle(viz.COLORS), found, strict=False)
        return [viz.Curve(title, epochs, values[which], color) for color, (title, epochs, *values) in parts]

    return viz.draw_panels(path, [viz.Panel("top-1 in percent", curves(0)), viz.Panel("training loss", curves(1))])
