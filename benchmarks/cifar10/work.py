"""Processes: in each of them steps are measured, or one run after the other is trained."""

import functools
import json
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from irpe import paired

from . import data, plan
from .arms import MAIN, Shape
from .fit import Effort, Run, Training, fit


@dataclass(frozen=True)
class Place:
    """Where runs find and leave what they need: the data, its cache, the folder of results, the device."""

    data: Path
    out: Path
    device: str
    processes: int

    def tensors(self) -> dict[str, torch.Tensor]:
        return data.tensors(self.data, self.out / "cifar10.pt")


def write(file: Path, values: Any) -> None:
    """JSON, whole or not there."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    unfinished.replace(file)


def _start_worker() -> None:
    threading.Thread(target=paired.end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # sums come out the same however many workers there are


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which start when there is work for them."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)


def measured(shape: Shape, amp: bool, device: str, rounds: int, batch: int = 64) -> dict[str, Any]:
    """Of a training step of each main arm, and of a test, side by side: seconds for a picture.

    "median" is what to expect, "cost" the lowest; on a CPU that of the thread, which waits for nobody.
    """
    images = torch.zeros(batch, 3, 32, 32, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    effort = Effort(width=shape.width, heads=shape.heads, depth=shape.depth)
    calls: dict[str, Callable[[], Any]] = {}
    for arm in MAIN:
        training = Training(Run(arm, 0, 1e-6, effort, amp), device)
        calls[arm.name] = lambda training=training: training.step(images, labels)
    tested = images.to(torch.uint8)
    calls["test"] = lambda: training.accuracy(tested, labels, (32, 32))
    lowest = dict.fromkeys(calls, math.inf)

    def timed(name: str) -> None:
        start = time.process_time()
        calls[name]()
        lowest[name] = min(lowest[name], time.process_time() - start)

    timers = {name: functools.partial(timed, name) for name in calls} if device == "cpu" else calls
    times = common.side_by_side(timers, rounds=rounds, device=device, repeats=3)
    return {
        name: {"median": one["median"] / batch, "cost": (lowest[name] if device == "cpu" else one["best"]) / batch}
        for name, one in times.items()
    }


class Calibration:
    """Measures models, each once, with as many processes at work as there will be."""

    def __init__(self, place: Place, workers: Executor) -> None:
        self.place, self.workers = place, workers
        self.steps: dict[Shape, dict[str, Any]] = {}  # with bfloat16 autocast where that is faster
        self._rates: dict[Shape, plan.Rates] = {}

    def rates(self, shape: Shape) -> plan.Rates:
        """Of a model, as a plan takes them."""
        if shape not in self._rates:
            both = {amp: self._measured(shape, amp) for amp in (True, False)}
            amp = _whole(both[True]) <= _whole(both[False])
            self.steps[shape], self._rates[shape] = both[amp], rates_of(both[amp], amp)
        return self._rates[shape]

    def _measured(self, shape: Shape, amp: bool) -> dict[str, Any]:
        device = self.place.device
        rounds = 3 if device == "cpu" else 10
        jobs = [self.workers.submit(measured, shape, amp, device, rounds) for _ in range(self.place.processes)]
        return [job.result() for job in jobs][-1]


def _whole(steps: dict[str, Any]) -> float:
    return sum(one["median"] for one in steps.values())


def rates_of(steps: dict[str, Any], amp: bool) -> plan.Rates:
    """What `measured` gives, as a plan takes it."""
    train = {name: one["median"] for name, one in steps.items() if name != "test"}
    return plan.Rates(train, steps["test"]["median"], amp)


def _work(run: Run, place: Place) -> dict[str, Any]:
    result = fit(run, place.tensors(), place.device)
    write(place.out / f"{run.name}.json", result)
    return result


def finished(runs: list[Run], out: Path) -> dict[str, dict[str, Any]]:
    """The results of those that have ended, by name.

    Raises:
        ValueError: a file is of a run with other settings.
    """
    found = {}
    for run in runs:
        file = out / f"{run.name}.json"
        if file.exists():
            found[run.name] = json.loads(file.read_text())
            if found[run.name]["settings"] != json.loads(json.dumps(run.settings())):
                raise ValueError(f"{file} is of a run with other settings; use another --out")
    return found


def carry_out(runs: list[Run], place: Place, workers: Executor, until: float) -> Iterator[tuple[Run, dict[str, Any]]]:
    """(run, result) as they end. None is begun at `until` or later, in seconds of time.monotonic()."""
    waiting = list(runs)
    jobs: dict[Future[dict[str, Any]], Run] = {}
    while True:
        while waiting and len(jobs) < place.processes and time.monotonic() < until:
            run = waiting.pop(0)
            jobs[workers.submit(_work, run, place)] = run
        if not jobs:
            return
        for job in wait(jobs, return_when=FIRST_COMPLETED).done:
            yield jobs.pop(job), job.result()
