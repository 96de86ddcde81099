"""Sides that are trained with the same seeds: worker processes, their results, and the differences of pairs."""

import datetime
import importlib.metadata
import math
import multiprocessing
import os
import platform
import queue
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpe_ops import _native, rpe_attention_cpu

from ._version import __version__

Fit = Callable[..., dict[str, Any]]  # (run, on_epoch=...): trains one model, and tells the number of each epoch done

WEIGHT_DECAY = 0.05

_events: Any = None  # of a worker process: where it tells its progress


@dataclass(frozen=True)
class Run:
    """One training of a side; lr is the peak, fit_on and test_on are parts of the digits."""

    side: str
    seed: int
    lr: float
    epochs: int = 40
    batch_size: int = 64
    fit_on: str = "train"
    test_on: str = "test"
    limit: int | None = None  # of digits to fit on


def train_epoch(
    model: nn.Module, optimizer: Any, schedule: Any, inputs: Tensor, labels: Tensor, batches: Sequence[Tensor]
) -> float:
    """A step of optimizer and schedule on each of the batches, which are indices; returns the mean loss of an input."""
    total = 0.0
    for batch in batches:
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch)
    return total / len(labels)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for the optimizer: weight decay for the matrices; none for iRPE's tables, positions and vectors."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        positional = "lookup_table" in name or "pos_" in name
        groups[parameter.ndim > 1 and not positional].append(parameter)
    return [dict(params=groups[True], weight_decay=WEIGHT_DECAY), dict(params=groups[False], weight_decay=0.0)]


def _start_worker(events: Any) -> None:
    global _events
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    torch.set_num_threads(1)  # the operations are tiny, and sums come out the same however many workers there are
    _events = events


def end_with_parent() -> None:
    """Ends this worker when its parent is gone without having said so (killed): it would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(fit: Fit, index: int, run: Any) -> dict[str, Any]:
    return fit(run, on_epoch=lambda epoch: _events.put((index, epoch)))


def fit_all(
    fit: Fit,
    runs: Sequence[Any],
    workers: int | None = None,
    on_epoch: Callable[[int, int], None] = lambda index, epoch: None,
) -> list[dict[str, Any]]:
    """The results of `fit` for all runs, in their order, from worker processes of one thread each.

    The numbers are the same for every count of workers. An exception in a worker is raised here, and the others are
    ended; so they are on Ctrl-C.

    Args:
        fit: a function at the top of a module: workers import it.
        workers: how many processes, one for each CPU core by default.
        on_epoch: called in this process with (index of the run, epochs done).
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(workers or os.cpu_count() or 1, len(runs)))
    events = context.Queue()
    before = set(multiprocessing.active_children())

    def tell() -> None:
        while True:
            try:
                on_epoch(*events.get_nowait())
            except queue.Empty:
                return

    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(events,))
    try:
        futures = [pool.submit(_work, fit, index, run) for index, run in enumerate(runs)]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            tell()
            for future in done:
                future.result()
        results = [future.result() for future in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    pool.shutdown()
    tell()
    return results


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (side, lr) in order of appearance: mean and spread of the final accuracies over the seeds.

    "accuracy" is {test: {"mean", "std", "min", "max"}} in percent, std that of a sample (0 for one seed);
    "seconds" and "cpu_seconds" are means of one run.
    """
    rows = []
    for side, lr in dict.fromkeys((result["side"], result["lr"]) for result in results):
        group = [result for result in results if (result["side"], result["lr"]) == (side, lr)]
        final = {test: [result["accuracy"][test][-1] for result in group] for test in group[0]["accuracy"]}
        rows.append(
            {
                "side": side,
                "lr": lr,
                "seeds": [result["seed"] for result in group],
                "parameters": group[0]["parameters"],
                "accuracy": {test: _spread(values) for test, values in final.items()},
                "seconds": statistics.mean(result["seconds"] for result in group),
                "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in group),
            }
        )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": std, "min": min(values), "max": max(values)}


def differences(results: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair (side, other): the mean over seeds of the side's final accuracy minus the other's, paired by seed.

    "difference" is {test: {"mean", "error"}} in points, error the standard error of the mean (None for one seed).
    """
    by_side: dict[str, dict[int, dict[Any, list[float]]]] = {}
    for result in results:
        by_side.setdefault(result["side"], {})[result["seed"]] = result["accuracy"]
    rows = []
    for side, other in pairs:
        mine, others = by_side[side], by_side[other]
        if not (seeds := [seed for seed in mine if seed in others]):
            raise ValueError(f"{side!r} and {other!r} have no seed in common: {[*mine]} and {[*others]}")
        row: dict[Any, dict[str, float | None]] = {}
        for test in mine[seeds[0]]:
            gains = [mine[seed][test][-1] - others[seed][test][-1] for seed in seeds]
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
            row[test] = {"mean": statistics.mean(gains), "error": error}
        rows.append({"side": side, "other": other, "seeds": seeds, "difference": row})
    return rows


def best_rates(rows: Sequence[dict[str, Any]], slack: float = 1.0) -> dict[str, float]:
    """{side: lr}: the lowest whose mean accuracy on the first test is at most `slack` points below the side's best.

    A point is about the standard error of two seeds on 300 validation images, so that chance decides less, and the
    unsteady end of the grid is left to sides that gain from it. Other tests than the first have no say.
    """
    best: dict[str, float] = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        means = {row["lr"]: next(iter(row["accuracy"].values()))["mean"] for row in rows if row["side"] == side}
        best[side] = min(lr for lr, mean in means.items() if mean >= max(means.values()) - slack)
    return best


def machine() -> dict[str, Any]:
    """What the numbers were made with: versions, processor, and the instruction sets of torch and of the operators."""
    packages = ("torch", "timm", "scikit-learn", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found | {
        "irpe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "isa": rpe_attention_cpu.isa() if "cpu" in _native.LOADED else None,
        "isa of torch": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
    }
