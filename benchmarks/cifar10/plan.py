"""Which runs, and how long ones, fit in a budget."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arms import ABSOLUTE, MAIN, PARTS, Arm, Shape
from .fit import SIZES, Effort, Run

RATES = (1e-3, 2e-3, 4e-3)  # of which the pilot chooses one for all arms
SEEDS, MORE_SEEDS = range(3), range(3, 5)
# from the longest to the shortest
EFFORTS = (
    *(Effort(epochs=epochs) for epochs in (60, 30, 15, 8)),
    Effort(pictures=20_000, epochs=8, batch=128),
    Effort(pictures=10_000, epochs=6, test_pictures=5_000, batch=64, depth=4),
    # narrower than DeiT-Tiny: what two cores can train far enough for differences to show
    Effort(pictures=4_000, epochs=4, test_pictures=2_000, batch=32, width=64, heads=2, depth=2),
)


@dataclass(frozen=True)
class Rates:
    """Seconds for a picture of a step of each timed arm, and of a test at 32x32, in one of the processes."""

    train: Mapping[str, float]
    test: float

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
    """The effort of every run, how many of `ordered` fit, and the parts that are left out, with the number of runs."""

    effort: Effort
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


def plan(
    rates: Mapping[Shape, Rates], budget: float, processes: int, amp: bool, efforts: Sequence[Effort] = EFFORTS
) -> Plan:
    """The longest effort at which pilot and main arms take at most half of the budget, and the runs that fit then.

    Where none is short enough the shortest, and as many runs as fit.

    Args:
        rates: those of each model.
        budget: seconds for all of it.
        processes: how many runs go on at once.
    """
    for effort in efforts:
        one = rates[effort.shape]
        runs = ordered(effort, RATES[0], amp)
        pilot = sum(seconds_of(run, one) for run in pilots(effort, amp)) / processes
        times = [seconds_of(run, one) / processes for _, run in runs]
        main = sum(time for time, (part, _) in zip(times, runs, strict=True) if part == "main")
        if pilot + main <= budget / 2:
            break
    spent, count = pilot, 0
    while count < len(runs) and spent + times[count] <= budget:
        spent, count = spent + times[count], count + 1
    left: dict[str, int] = {}
    for part, _ in runs[count:]:
        left[part] = left.get(part, 0) + 1
    return Plan(effort, count, spent, left)


def chosen_effort(**wanted: int | None) -> Effort | None:
    """The shortest effort with what was asked for in place of its own; None where nothing was."""
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return replace(EFFORTS[-1], **given) if given else None


def parsed(budget: str) -> float:
    """Seconds of 90s, 10m or 1.5h.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if found is None:
        raise ValueError(f"budget {budget!r}; expected a number and s, m or h, such as 10m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
