"""The tables of docs/results.md, from the figures that `python -m benchmarks.cifar10` writes."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEVICES = ("cuda", "cpu")
Runs = dict[int, dict[str, Any]]  # of one arm, by seed


def _figures(results: Path) -> list[dict[str, Any]]:
    files = [results / f"cifar10_{device}.json" for device in DEVICES]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _runs(found: dict[str, Any], arm: str) -> Runs:
    return {run["seed"]: run for run in found["runs"] if run["arm"] == arm}


def _comparable(found: dict[str, Any], part: str) -> list[tuple[dict[str, Any], Runs]]:
    """The arms of a part that have run, each with the runs of the seeds that all of them have: seeds differ by more
    than arms do.
    """
    arms = [(arm, runs) for arm in found["parts"][part] if (runs := _runs(found, arm["arm"]))]
    seeds = set.intersection(*(set(runs) for _, runs in arms)) if arms else set()
    return [(arm, {seed: runs[seed] for seed in sorted(seeds)}) for arm, runs in arms if seeds]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]).replace(
        "| --- " * len(head) + "|", "|---" * len(head) + "|"
    )


def _under(found: dict[str, Any]) -> str:
    """The line under a table: settings and machine."""
    of, facts = found["settings"], found["machine"]
    where = f"{facts['isa']}, {facts['device']}" if facts.get("isa") else facts["device"]
    return (
        f"{of['pictures']:,} pictures, {of['epochs']} epochs, batches of {of['batch']}, peak lr {of['lr']:g}; width "
        f"{of['width']}, {of['heads']} heads, {of['depth']} blocks; {of['test_pictures']:,} test pictures; "
        f"{'bfloat16 autocast' if of['amp'] else 'float32'}, {where}, torch {facts['torch'].split('+')[0]}, "
        f"timm {facts['timm']}, {facts['date']}"
    )


def spread(values: Sequence[float]) -> str:
    """Mean ± deviation of a sample, with one value that alone."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def paired(runs: Runs, base: Runs, size: str) -> str:
    """Mean over the common seeds of the difference to `base` ± its standard error."""
    seeds = sorted(runs.keys() & base.keys())
    if not seeds:
        return ""
    differences = [runs[seed]["accuracy"][size] - base[seed]["accuracy"][size] for seed in seeds]
    mean = round(statistics.mean(differences), 1) + 0.0  # no -0.0
    if len(seeds) == 1:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {statistics.stdev(differences) / math.sqrt(len(seeds)):.1f}"


def _sizes(found: dict[str, Any]) -> list[str]:
    return list(found["runs"][0]["accuracy"])


def accuracy(results: Path) -> str:
    """Main arms: mean and deviation at each size, over the seeds that all of them have."""
    parts = []
    for found in _figures(results):
        rows = []
        for arm, runs in _comparable(found, "main"):
            cells = [spread([run["accuracy"][size] for run in runs.values()]) for size in _sizes(found)]
            rows.append([arm["title"], *cells, str(len(runs))])
        parts += [_table(["positions", *_sizes(found), "seeds"], rows), _under(found)]
    return "\n\n".join(parts)


def differences(results: Path, base: str) -> str:
    """Main arms: the paired difference to the arm `base` at each size."""
    parts = []
    for found in _figures(results):
        of = _runs(found, base)
        rows = []
        for arm in found["parts"]["main"]:
            runs = _runs(found, arm["arm"])
            if arm["arm"] != base and runs.keys() & of.keys():
                cells = [paired(runs, of, size) for size in _sizes(found)]
                rows.append([arm["title"], *cells, str(len(runs.keys() & of.keys()))])
        title = next(arm["title"] for arm in found["parts"]["main"] if arm["arm"] == base)
        parts.append(_table([f"over {title}", *_sizes(found), "seeds"], rows))
    return "\n\n".join(parts)


def rows_of_paper(results: Path, part: str) -> str:
    """The rows of a table of the paper, its figure, ours, and the paired difference to learned absolute positions."""
    parts = []
    for found in _figures(results):
        rows, base = [], _runs(found, "learned")
        size = _sizes(found)[0]
        for arm, runs in _comparable(found, part):
            cells = [spread([run["accuracy"][size] for run in runs.values()]), paired(runs, base, size)]
            rows.append([arm["title"], f"{arm['paper']:g}", *cells, str(len(runs))])
        if len(rows) > 1:
            head = ["row", "paper, ImageNet", f"here, {size}", "over learned absolute", "seeds"]
            parts += [_table(head, rows), _under(found)]
    return "\n\n".join(parts)


def buckets(results: Path) -> str:
    """Contextual product on keys without other positions: sizes of the table, at each size of the pictures."""
    parts = []
    for found in _figures(results):
        rows = []
        for arm, runs in _comparable(found, "buckets"):
            cells = [spread([run["accuracy"][size] for run in runs.values()]) for size in _sizes(found)]
            rows.append([arm["title"], *cells, str(len(runs))])
        if len(rows) > 1:
            parts += [_table(["product on k", *_sizes(found), "seeds"], rows), _under(found)]
    return "\n\n".join(parts)


def cost(results: Path) -> str:
    """Main arms: weights, and the time of a training step over that of the model without positions."""
    parts = []
    for found in _figures(results):
        step = found["step"]
        rows = []
        for arm in found["parts"]["main"]:
            weights = [run["parameters"] for run in _runs(found, arm["arm"]).values()]
            count = f"{weights[0]:,}" if weights else ""
            rows.append([arm["title"], count, f"{step[arm['arm']]:,.0f} us", f"{step[arm['arm']] / step['none']:.2f}"])
        parts += [_table(["positions", "weights", "a step, for each picture", "over none"], rows), _under(found)]
    return "\n\n".join(parts)


def pilot(results: Path) -> str:
    """The choice of the learning rate."""
    parts = []
    for found in _figures(results):
        rows = [[f"{run['lr']:g}", f"{run['accuracy']['32x32']:.1f}"] for run in found["pilot"]]
        parts += [_table(["peak lr", "right answers on pictures held out"], rows)]
    return "\n\n".join(parts)


TABLES = {
    "cifar accuracy": accuracy,
    "cifar over absolute": lambda results: differences(results, "learned"),
    "cifar over none": lambda results: differences(results, "none"),
    "cifar table 1": lambda results: rows_of_paper(results, "table 1"),
    "cifar table 2": lambda results: rows_of_paper(results, "table 2"),
    "cifar buckets": buckets,
    "cifar cost": cost,
    "cifar pilot": pilot,
}
