"""Trains every arm on CIFAR-10 and measures it: what docs/results.md is made of.

    python -m benchmarks.cifar10 DATA --budget 10m            # `make results DATA=... BUDGET=10m`
    python -m benchmarks.cifar10 DATA --out runs/cifar10      # goes on where it was stopped

DATA has folders train and test with a folder for each class, or is where torchvision keeps its CIFAR10. Every finished
run is one JSON in --out, the figures of all of them go to --figures. The first start in a folder measures steps and
chooses how long runs are; later ones keep that, and go on as long as their own budget allows.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

from . import collect, plan
from .fit import Effort, Run
from .work import Calibration, Place, carry_out, finished, pool, rates_of, write

OF_EFFORT = ("pictures", "epochs", "test_pictures", "batch", "width", "heads", "depth")


def settled(options: argparse.Namespace, place: Place, workers: Executor) -> tuple[dict[str, Any], Effort]:
    """What was measured and chosen in this folder, at the first start there."""
    kept = place.out / "plan.json"
    wanted = plan.chosen_effort(**{name: getattr(options, name) for name in OF_EFFORT})
    if not kept.exists():
        efforts = (wanted,) if wanted else plan.EFFORTS
        print(f"measuring steps on {place.device}, {place.processes} at once", flush=True)
        measured = Calibration(place, workers)
        whole, half = (
            plan.plan(measured.rates, budget, place.processes, efforts)
            for budget in (options.budget, options.budget / 2)
        )
        print(f"in {options.budget / 60:g} minutes: {whole.words()}\nin half of it: {half.words()}", flush=True)
        chosen = {"effort": asdict(whole.effort), "amp": whole.amp, "machine": common.machine(place.device)}
        write(kept, chosen | {"steps": {str(shape): steps for shape, steps in measured.steps.items()}})
    found = json.loads(kept.read_text())
    effort = Effort(**found["effort"])
    if wanted and wanted != effort:
        raise ValueError(f"{place.out} has runs of {effort}, not of {wanted}; use another --out")
    return found, effort


def results(options: argparse.Namespace, place: Place, workers: Executor) -> None:
    """All of it: data, calibration, pilot, runs, and the file of figures."""
    until = time.monotonic() + options.budget
    place.out.mkdir(parents=True, exist_ok=True)
    place.tensors()
    found, effort = settled(options, place, workers)
    rates = rates_of(found["steps"][str(effort.shape)], found["amp"])

    def go_on(runs: list[Run], ended: dict[str, dict[str, Any]]) -> None:
        todo = [run for run in runs if run.name not in ended]
        # what would not end in time is not begun
        last = until - max((plan.seconds_of(run, rates) for run in todo), default=0.0)
        for run, result in carry_out(todo, place, workers, last):
            ended[run.name] = result
            sizes = "  ".join(f"{size} {value:.1f}" for size, value in result["accuracy"].items())
            left = max(0.0, until - time.monotonic()) / 60
            print(f"{len(ended)}/{len(runs)} {run.name}: {sizes} ({result['seconds']:.0f} s, {left:.0f} minutes left)")
            sys.stdout.flush()

    pilots = plan.pilots(effort, found["amp"])
    tried = finished(pilots, place.out)
    go_on(pilots, tried)
    if len(tried) < len(pilots):
        sys.exit("the budget ended before the pilot did: start again to go on, or give it more")
    lr = max(pilots, key=lambda run: tried[run.name]["accuracy"]["32x32"]).lr
    runs = [run for _, run in plan.ordered(effort, lr, found["amp"])]
    ended = finished(runs, place.out)
    print(f"learning rate {lr:g}; {len(ended)} of {len(runs)} runs have ended before", flush=True)
    go_on(runs, ended)
    results_of_all = [*tried.values(), *(ended[run.name] for run in runs if run.name in ended)]
    left_out = [run.name for run in runs if run.name not in ended]
    collect.write(options.figures, collect.Found(found, lr, results_of_all, left_out))
    print(f"{options.figures}: {len(ended)} runs; {len(left_out)} are left out, which the file names")


def seconds(words: str) -> float:
    """`plan.parsed`, with its sentence as argparse shows it."""
    try:
        return plan.parsed(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(prog="python -m benchmarks.cifar10", description=__doc__.splitlines()[0])
    given.add_argument("data", type=Path, help="folders train and test of class folders, or torchvision's folder")
    given.add_argument("--budget", type=seconds, default="10m", help="such as 90s, 10m, 2h; 10m")
    given.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="of the runs, one JSON each")
    given.add_argument("--figures", type=Path, help="default: cifar10_cpu.json or cifar10_cuda.json in --out")
    given.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    given.add_argument("--processes", type=int, help="runs at once; default: one for each core, and 4 on a GPU")
    for name in OF_EFFORT:
        given.add_argument(f"--{name.replace('_', '-')}", type=int, help="of every run, whatever the budget says")
    return given


def main() -> None:
    options = parser().parse_args()
    options.figures = options.figures or options.out / f"cifar10_{options.device}.json"
    processes = options.processes or (4 if options.device == "cuda" else os.cpu_count() or 1)
    try:
        with pool(processes) as workers:
            results(options, Place(options.data, options.out, options.device, processes), workers)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
