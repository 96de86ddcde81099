"""Which runs, and how long ones, fit in a budget."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arms import ABSOLUTE, MAIN, PARTS, Arm, Shape
from .fit import SIZES, Effort, Run

RATES = (1e-3, 2e-3, 4e-3)  # of which the pilot chooses one for all arms
SEEDS, MORE_SEEDS = range(3), range(3, 5)
# from the shortest to the longest; the first two are narrower than DeiT-Tiny: what two cores can train in minutes
EFFORTS = (
    Effort(pictures=4_000, epochs=4, test_pictures=2_000, batch=32, width=64, heads=2, depth=2),
    Effort(pictures=10_000, epochs=5, test_pictures=4_000, batch=32, width=64, heads=2, depth=2),
    Effort(pictures=20_000, epochs=8, test_pictures=5_000, batch=64, width=96, depth=3),
    Effort(pictures=20_000, epochs=8, batch=128, depth=4),
    *(Effort(epochs=epochs) for epochs in (8, 15, 30, 60)),
)


@dataclass(frozen=True)
class Rates:
    """Seconds for a picture of a step of each main arm, and of a test at 32x32; whether in bfloat16."""

    train: Mapping[str, float]
    test: float
    amp: bool = False

    def train_of(self, arm: Arm) -> float:
        """That of the arm itself, or of the one on keys."""
        return self.train[arm.name] if arm.name in self.train else self.train[MAIN[2].name]


def seconds_of(run: Run, rates: Rates) -> float:
    """What a run is expected to take."""
    effort = run.effort
    area = 1.0 if run.pilot else sum(height * width for height, width in SIZES) / (SIZES[0][0] * SIZES[0][1])
    tests = effort.test_pictures * (area + effort.epochs / 4)
    return effort.pictures * effort.epochs * rates.train_of(run.arm) + tests * rates.test


def pilots(effort: Effort, amp: bool) -> list[Run]:
    """Learned absolute positions with each of the rates; its seed is none of those that are reported."""
    return [Run(ABSOLUTE, 100, lr, effort, amp, pilot=True) for lr in RATES]


def ordered(effort: Effort, lr: float, amp: bool) -> list[tuple[str, Run]]:
    """(part, run) of everything, the most important first.

    Main arms with seeds 0, 1, 2, all arms of a seed before the next seed, so that what is there can be compared in
    pairs; then the paper's Table 1, its Table 2, and the number of buckets, likewise; then two more seeds of the main
    arms.
    """
    found: dict[str, tuple[str, Run]] = {}
    for part, seeds in (*((part, SEEDS) for part in PARTS), ("main", MORE_SEEDS)):
        words = f"{part}, more seeds" if seeds is MORE_SEEDS else part
        for seed in seeds:
            for arm in PARTS[part]:
                run = Run(arm, seed, lr, effort, amp)
                found.setdefault(run.name, (words, run))
    return list(found.values())


@dataclass(frozen=True)
class Plan:
    """The effort of every run, whether in bfloat16, how many of `ordered` fit, and {part: runs of it left out}."""

    effort: Effort
    amp: bool
    count: int
    seconds: float
    left_out: dict[str, int]

    def words(self) -> str:
        """A sentence for whoever waits."""
        effort = self.effort
        left = ", ".join(f"{number} of {part}" for part, number in self.left_out.items())
        return (
            f"{self.count} runs of {effort.epochs} epochs on {effort.pictures:,} pictures, {effort.shape}, about "
            f"{self.seconds / 60:.1f} minutes; left out: {left or 'nothing'}"
        )


def plan(rates: Callable[[Shape], Rates], budget: float, processes: int, efforts: Sequence[Effort] = EFFORTS) -> Plan:
    """The longest effort at which pilot and main arms take at most half of the budget, and the runs that fit then.

    Where none is short enough the shortest, and as many runs as fit.

    Args:
        rates: measures a model. It is not asked for a larger one that would not fit at the speed of the one before.
        budget: seconds for all of it.
        processes: how many runs go on at once.
        efforts: from the shortest to the longest.
    """

    def times(effort: Effort, one: Rates) -> tuple[float, list[tuple[str, float]]]:
        """Seconds of the pilot, and (part, seconds) of each run."""
        pilot = sum(seconds_of(run, one) for run in pilots(effort, one.amp)) / processes
        return pilot, [(part, seconds_of(run, one) / processes) for part, run in ordered(effort, RATES[0], one.amp)]

    def fits(effort: Effort, one: Rates) -> bool:
        pilot, runs = times(effort, one)
        return pilot + sum(seconds for part, seconds in runs if part == "main") <= budget / 2

    chosen, best = efforts[0], rates(efforts[0].shape)
    for effort in efforts[1:]:
        if not fits(effort, best) or not fits(effort, found := rates(effort.shape)):
            break
        chosen, best = effort, found
    spent, runs = times(chosen, best)
    count = 0
    while count < len(runs) and spent + runs[count][1] <= budget:
        spent, count = spent + runs[count][1], count + 1
    left: dict[str, int] = {}
    for part, _ in runs[count:]:
        left[part] = left.get(part, 0) + 1
    return Plan(chosen, best.amp, count, spent, left)


def chosen_effort(**wanted: int | None) -> Effort | None:
    """The shortest effort with what was asked for in place of its own; None where nothing was."""
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return replace(EFFORTS[0], **given) if given else None


def parsed(budget: str) -> float:
    """Seconds of 90s, 10m or 1.5h.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if found is None:
        raise ValueError(f"budget {budget!r}; expected a number and s, m or h, such as 10m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
