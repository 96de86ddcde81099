"""Trains a small vision transformer on handwritten digits, with and without iRPE: what `irpe train` does.

Every side is the same timm VisionTransformer (patch 2, dim 48, 3 blocks, 3 heads, mean pooling, no class token),
trained at 8x8 by the same recipe (AdamW, one-cycle), and tested at 8x8 and on wider canvases 8x12 and 8x16. Sides
differ in how they know positions, and in the learning rate, which was chosen for each of them from the same grid on
validation images: `irpe train --tune` repeats that, docs/digits.md has its numbers.

Data is `irpe.digits`; below come model, loop, worker processes, and what is computed from the results.
"""

import importlib.metadata
import math
import multiprocessing
import os
import platform
import queue
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import digits
from ._version import __version__
from .encodings import Encodings, learned
from .equip import equip

NONE, ABSOLUTE = "none", "absolute"
RPE = ("rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv")
MODEL: dict[str, Any] = dict(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2.0)
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)  # learning rates that every side was offered
RATES = {NONE: 2e-3, ABSOLUTE: 4e-3, RPE[0]: 4e-3, RPE[1]: 8e-3}  # and what `best_rates` chose
WEIGHT_DECAY = 0.05
TUNE_SEEDS = (100, 101)  # never among the reported ones, which count from 0


@dataclass(frozen=True)
class Run:
    """One training: side "none", "absolute" or the string form of iRPE; lr is the peak; fit_on a part of the digits."""

    side: str
    seed: int
    lr: float
    epochs: int = 60
    batch_size: int = 64
    fit_on: str = "train"
    test_on: str = "test"
    limit: int | None = None  # of images to fit on
    points: int = 12  # how often accuracy is measured, about; always at the end


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
        global_pool="avg", pos_embed="learn" if side == ABSOLUTE else "none", dynamic_img_size=True, **MODEL,
    )  # fmt: skip
    return model if side in (NONE, ABSOLUTE) else equip(model, side)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for the optimizer: weight decay for the matrices; none for iRPE's tables, positions and vectors."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        positional = "lookup_table" in name or "pos_embed" in name
        groups[parameter.ndim > 1 and not positional].append(parameter)
    return [dict(params=groups[True], weight_decay=WEIGHT_DECAY), dict(params=groups[False], weight_decay=0.0)]


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
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=run.lr)
    steps = run.epochs * math.ceil(len(labels) / run.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=steps)
    measured_at: list[int] = []
    accuracies: dict[int, list[float]] = {width: [] for width in tests}
    losses = []
    for epoch in range(1, run.epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(labels), generator=order).split(run.batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(labels))
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


_events: Any = None  # of a worker process: where it tells its progress


def _start_worker(events: Any) -> None:
    global _events
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    torch.set_num_threads(1)  # the operations are tiny, and sums come out the same however many workers there are
    _events = events


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone without having said so (killed): it would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(index: int, run: Run) -> dict[str, Any]:
    return fit(run, on_epoch=lambda epoch: _events.put((index, epoch)))


def fit_all(
    runs: Sequence[Run], workers: int | None = None, on_epoch: Callable[[int, int], None] = lambda index, epoch: None
) -> list[dict[str, Any]]:
    """The results of `fit` for all runs, in their order, from worker processes of one thread each.

    The numbers are the same for every count of workers. An exception in a worker is raised here, and the others are
    ended; so they are on Ctrl-C.

    Args:
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
        futures = [pool.submit(_work, index, run) for index, run in enumerate(runs)]
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

    "accuracy" is {width: {"mean", "std", "min", "max"}} in percent, std that of a sample (0 for one seed);
    "seconds" and "cpu_seconds" are means of one run.
    """
    rows = []
    for side, lr in dict.fromkeys((result["side"], result["lr"]) for result in results):
        group = [result for result in results if (result["side"], result["lr"]) == (side, lr)]
        final = {width: [result["accuracy"][width][-1] for result in group] for width in group[0]["accuracy"]}
        rows.append(
            {
                "side": side,
                "title": title_of(side),
                "lr": lr,
                "seeds": [result["seed"] for result in group],
                "parameters": group[0]["parameters"],
                "accuracy": {width: _spread(values) for width, values in final.items()},
                "seconds": statistics.mean(result["seconds"] for result in group),
                "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in group),
            }
        )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": std, "min": min(values), "max": max(values)}


def best_rates(rows: Sequence[dict[str, Any]], slack: float = 1.0) -> dict[str, float]:
    """{side: lr}: the lowest whose mean accuracy at the training size is at most `slack` points below the side's best.

    A point is about the standard error of two seeds on 300 validation images, so that chance decides less, and the
    unsteady end of the grid is left to sides that gain from it. The wide canvases have no say.
    """
    width = digits.WIDTHS[0]
    best: dict[str, float] = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        means = {row["lr"]: row["accuracy"][width]["mean"] for row in rows if row["side"] == side}
        best[side] = min(lr for lr, mean in means.items() if mean >= max(means.values()) - slack)
    return best


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


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    packages = ("torch", "timm", "scikit-learn", "matplotlib", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    machine = {"platform": platform.platform(), "cpus": str(os.cpu_count())}
    return {"irpe": __version__, "python": platform.python_version(), **found, **machine}
