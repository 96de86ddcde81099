"""`irpe train` without data: the demo on handwritten digits."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .common import checked, checked_lock, console, new_folder, write_json

CAPTION = (
    "weights: their number; lr: peak learning rate; s: seconds of one run. All were trained at 8×8 only; on 8×12 and "
    "8×16 each digit is at every even column once."
)


@dataclass(frozen=True)
class Options:
    """Of the demo, as the command gives them."""

    seeds: int
    first_seed: int
    epochs: int
    rpe: list[str]
    lr: float | None
    workers: int | None
    out: Path
    name: str | None
    overwrite: bool
    quick: bool
    tune: bool


def run(options: Options) -> None:
    """Trains every side with every seed, prints the tables, and writes pictures and results.json."""
    from .. import demo as job
    from ..config_io import rpe_config_from_string

    for text in options.rpe:
        checked(rpe_config_from_string, text)
    lr, tune, quick = options.lr, options.tune, options.quick
    if lr is not None and not 0 < lr < 1:
        raise typer.BadParameter(f"--lr {lr}; expected a number above 0 and below 1, such as 0.004")
    sides = (job.NONE, job.ABSOLUTE, *dict.fromkeys(options.rpe or job.RPE))
    rest: dict[str, Any] = dict(epochs=options.epochs)
    if tune:
        rest.update(fit_on="fit", test_on="valid", points=1)
    if quick:
        rest.update(epochs=min(options.epochs, 2), limit=256)
    count = min(options.seeds, 2) if quick else options.seeds
    # the dearest sides come first, so that the workers end at about the same time
    runs = [
        job.Run(side, seed, rate, **rest)
        for seed in (job.TUNE_SEEDS if tune else range(options.first_seed, options.first_seed + count))
        for side in reversed(sides)
        for rate in ([lr] if lr is not None else job.GRID if tune else [job.rate_of(side)])
    ]
    folder = checked(new_folder, options.out, options.name or ("digits-tune" if tune else "digits"), options.overwrite)
    from ..runs.folder import check_results

    checked(check_results, folder, "results.json", {"quick", "model", "recipe", "summary"}, "the demo")
    with checked_lock(folder):
        _run(folder, runs, options, sides, rest)


def _run(folder: Path, runs: list[Any], options: Options, sides: Sequence[str], rest: dict[str, Any]) -> None:
    from .. import demo as job
    from .. import paired

    tune, quick = options.tune, options.quick
    started = time.perf_counter()
    results = fit_with_progress(job.fit, runs, job.title_of, options.workers)
    wall = time.perf_counter() - started
    order = {side: k for k, side in enumerate(sides)}
    rows = sorted(paired.summarise(results), key=lambda row: (order[row["side"]], row["lr"]))
    gains = [] if tune else paired.differences(results, _pairs(sides))
    tests = {width: f"{job.digits.HEIGHT}x{width}" for width in rows[0]["accuracy"]}
    console.print(scores(rows, tests, job.title_of, "validation images" if tune else "test images", CAPTION))
    if gains and len(gains[0]["seeds"]) > 1:
        console.print(gained(gains, tests, job.title_of))
    paths = [] if tune else checked(_pictures, folder, sorted(results, key=lambda result: order[result["side"]]))
    record = {
        "quick": quick,
        "command": sys.argv[1:],
        "machine": paired.machine(),
        "tests": tests,
        "model": job.MODEL,
        "recipe": {
            "weight_decay": paired.WEIGHT_DECAY,
            "batch_size": runs[0].batch_size,
            "optimizer": "AdamW, one-cycle",
            **rest,
        },
        "wall_seconds": wall,
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "summary": [row | {"title": job.title_of(row["side"])} for row in rows],
        "differences": gains,
        "runs": [{key: value for key, value in result.items() if key != "state"} for result in results],
    }
    if tune:
        record["chosen"] = paired.best_rates(rows)
        for side, rate in record["chosen"].items():
            console.print(f"chosen for {job.title_of(side)}: lr {rate:g}")
    write_json(folder / "results.json", record)
    for path in (*paths, folder / "results.json"):
        console.print(str(path), soft_wrap=True)
    console.print(f"{len(runs)} runs, {wall:.0f} s, {record['cpu_seconds']:.0f} s of CPU time in the workers")
    if quick:
        console.print("--quick: this was only a smoke run; its numbers mean nothing.", style="bold")


def _pairs(sides: Sequence[str]) -> list[tuple[str, str]]:
    """Every encoding beside learned absolute positions, and beside the first encoding."""
    from .. import demo as job

    encodings = [side for side in sides if side not in (job.NONE, job.ABSOLUTE)]
    return [*((side, job.ABSOLUTE) for side in encodings), *((side, encodings[0]) for side in encodings[1:])]


def fit_with_progress(
    fit: Callable[..., dict[str, Any]], runs: Sequence[Any], title_of: Callable[[str], str], workers: int | None
) -> list[dict[str, Any]]:
    """`irpe.paired.fit_all` under a bar for all epochs of all runs and one for each run under way."""
    from .. import paired
    from ..runs.logs import Pace

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    total = sum(run.epochs for run in runs)
    done = ended = 0
    pace = Pace()
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        overall = progress.add_task(f"{len(runs)} runs", total=total)
        bars: dict[int, Any] = {}

        def on_epoch(index: int, epoch: int) -> None:
            nonlocal done, ended
            run = runs[index]
            if index not in bars:
                bars[index] = progress.add_task(f"{title_of(run.side)}, seed {run.seed}", total=run.epochs)
            progress.update(bars[index], completed=epoch)
            progress.advance(overall)
            done += 1
            if not console.is_terminal and pace.is_due():
                console.print(f"{done} of {total} epochs, {ended} of {len(runs)} runs")
            if epoch == run.epochs:
                ended += 1
                progress.remove_task(bars[index])
                progress.update(overall, description=f"{ended} of {len(runs)} runs")

        return paired.fit_all(fit, runs, workers, on_epoch)


def scores(
    rows: Sequence[dict[str, Any]], tests: dict[Any, str], title_of: Callable[[str], str], images: str, caption: str
) -> Table:
    """What `irpe.paired.summarise` gives, a row for each side and rate."""
    count = len(rows[0]["seeds"])
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    table = _table_of(f"Right answers on {images} in percent, " + "mean ± deviation of " * (count > 1) + seeds)
    table.caption = caption
    for title in ("positions", *tests.values(), "weights", "lr", "s"):
        first = title == "positions"
        table.add_column(
            title, justify="left" if first else "right", no_wrap=not first, min_width=12 if first else None
        )
    for row in rows:
        figures = [row["accuracy"][test] for test in tests]
        cells = [f"{figure['mean']:.1f}" + f"±{figure['std']:.1f}" * (count > 1) for figure in figures]
        table.add_row(
            title_of(row["side"]), *cells, f"{row['parameters']:,}", f"{row['lr']:g}", f"{row['seconds']:.0f}"
        )
    return table


def gained(gains: Sequence[dict[str, Any]], tests: dict[Any, str], title_of: Callable[[str], str]) -> Table:
    """What `irpe.paired.differences` gives, a row for each pair."""
    table = _table_of("Points ahead, mean ± standard error of the differences of pairs with the same seed")
    for title in ("", *tests.values()):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    for row in gains:
        figures = [row["difference"][test] for test in tests]
        cells = [f"{figure['mean']:+.1f}±{figure['error']:.1f}" for figure in figures]
        table.add_row(f"{title_of(row['side'])}, to {title_of(row['other'])}", *cells)
    return table


def _table_of(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)


def _one_place_each(test: Any, width: int, count: int = 8) -> Any:
    """(count, 8, width): the first digits, each at the place after that of the one before."""
    from .. import digits

    canvases = digits.on_canvas(test, width).images[:, 0]
    places = len(canvases) // len(test.images)
    return canvases[[number * places + number % places for number in range(count)]]


def _pictures(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws and saves what belongs to a training: curves, samples, bucket maps, learned encodings, weights."""
    from .. import demo as job
    from .. import digits, viz, viz_maps

    titled = [result | {"title": job.title_of(result["side"])} for result in results]
    paths = [viz.draw_accuracy(folder / "accuracy.png", titled, digits.HEIGHT)]
    test = digits.splits()["test"]
    canvases = [(f"{digits.HEIGHT}×{width}", _one_place_each(test, width)) for width in digits.WIDTHS]
    paths.append(viz.draw_samples(folder / "samples.png", canvases))
    groups = [viz_maps.bucket_maps(method, (14, 14), skip=1) for method in viz_maps.RATIOS]
    paths.append(viz.draw_buckets(folder / "buckets.png", groups))
    overview = True
    for result in (result for result in titled if result["seed"] == results[0]["seed"]):
        paths.append(job.save(folder / f"{result['side']}-seed{result['seed']}.pt", result))
        if (encodings := job.encodings(result)) is not None:
            paths.append(viz.draw_encodings(folder / f"encodings-{result['side']}.png", encodings))
            if overview:
                paths.append(viz.draw_overview(folder / "irpe.png", encodings))
                overview = False
    return paths
