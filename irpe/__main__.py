"""The command `irpe`: `irpe train`, `irpe show`, `irpe info`."""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

REMEDY = 'install what the command `irpe` needs with: pip install "irpe[train]"'
try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"irpe: {error}; {REMEDY}") from None

T = TypeVar("T")

app = typer.Typer(
    name="irpe",
    help="Image relative position encoding (iRPE) for vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error shows Python's own traceback
)
console = Console(highlight=False)


def main() -> None:
    """Runs the command; a missing package is one sentence, wrong input one sentence and exit code 2."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("irpe", "rpe_ops"):
            raise
        raise SystemExit(f"irpe: {error}; {REMEDY}") from None


def _checked(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function returns; its complaints about the user's input become a sentence and exit code 2."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def train(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each side, with seeds 0, 1, ...")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 60,
    rpe: Annotated[
        list[str] | None,
        typer.Option(help="An iRPE such as rpe-1.9-product-ctx-1-k (repeatable), in place of the two default ones."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of every side, in place of the tuned ones.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; by default one for each CPU core.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help='Folder of this one inside --out  [default: "digits"]')] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that exists.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run of seconds: its numbers mean nothing.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Only try the learning rates of the grid, on validation images.")
    ] = False,
) -> None:
    """Train on handwritten digits with and without iRPE, test on the training size and on wider canvases."""
    from . import train as job
    from .config_io import rpe_config_from_string

    for text in rpe or ():
        _checked(rpe_config_from_string, text)
    if lr is not None and not 0 < lr < 1:
        raise typer.BadParameter(f"--lr {lr}; expected a number above 0 and below 1, such as 0.004")
    sides = (job.NONE, job.ABSOLUTE, *dict.fromkeys(rpe or job.RPE))
    rest: dict[str, Any] = dict(epochs=epochs)
    if tune:
        rest.update(fit_on="fit", test_on="valid", points=1)
    if quick:
        rest.update(epochs=min(epochs, 2), limit=256)
    # the dearest sides come first, so that the workers end at about the same time
    runs = [
        job.Run(side, seed, rate, **rest)
        for seed in (job.TUNE_SEEDS if tune else range(min(seeds, 2) if quick else seeds))
        for side in reversed(sides)
        for rate in ([lr] if lr is not None else job.GRID if tune else [job.rate_of(side)])
    ]
    folder = _checked(new_folder, out, name or ("digits-tune" if tune else "digits"), overwrite)
    started = time.perf_counter()
    results = _fit_with_progress(runs, workers)
    wall = time.perf_counter() - started
    order = {side: k for k, side in enumerate(sides)}
    rows = sorted(job.summarise(results), key=lambda row: (order[row["side"]], row["lr"]))
    console.print(_table(rows, tune))
    paths = [] if tune else _pictures(folder, sorted(results, key=lambda one: order[one["side"]]))
    record = {
        "quick": quick,
        "command": sys.argv[1:],
        "versions": job.versions(),
        "model": job.MODEL,
        "recipe": {
            "weight_decay": job.WEIGHT_DECAY,
            "batch_size": runs[0].batch_size,
            "optimizer": "AdamW, one-cycle",
            **rest,
        },
        "wall_seconds": wall,
        "cpu_seconds": sum(one["cpu_seconds"] for one in results),
        "summary": rows,
        "runs": [{key: value for key, value in one.items() if key != "state"} for one in results],
    }
    if tune:
        record["chosen"] = job.best_rates(rows)
        for side, rate in record["chosen"].items():
            console.print(f"chosen for {job.title_of(side)}: lr {rate:g}")
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in (*paths, folder / "results.json"):
        console.print(str(path), soft_wrap=True)
    console.print(f"{len(runs)} runs, {wall:.0f} s, {record['cpu_seconds']:.0f} s of CPU time in the workers")
    if quick:
        console.print("[bold]--quick: this was only a smoke run; its numbers mean nothing.[/bold]")


def new_folder(out: Path, name: str, overwrite: bool) -> Path:
    """Makes and returns out/name; where that exists out/name-2, out/name-3, ..., or the same one when overwriting."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"--name {name!r}; expected the name of one folder, which is made inside --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a folder")
    folder, number = out / name, 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=overwrite)
            return folder
        except FileExistsError:
            if overwrite:
                raise ValueError(f"{folder} is a file; expected a folder") from None
            number += 1
            folder = out / f"{name}-{number}"


def _fit_with_progress(runs: Sequence[Any], workers: int | None) -> list[dict[str, Any]]:
    """`irpe.train.fit_all` under a bar for all epochs of all runs and one for each run under way."""
    from . import train as job

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    total = sum(run.epochs for run in runs)
    ended = 0
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        overall = progress.add_task(f"{len(runs)} runs", total=total)
        bars: dict[int, Any] = {}

        def on_epoch(index: int, epoch: int) -> None:
            nonlocal ended
            run = runs[index]
            if index not in bars:
                bars[index] = progress.add_task(f"{job.title_of(run.side)}, seed {run.seed}", total=run.epochs)
            progress.update(bars[index], completed=epoch)
            progress.advance(overall)
            if epoch == run.epochs:
                ended += 1
                progress.remove_task(bars[index])
                progress.update(overall, description=f"{ended} of {len(runs)} runs")

        return job.fit_all(runs, workers, on_epoch)


def _table(rows: Sequence[dict[str, Any]], tune: bool) -> Table:
    count = len(rows[0]["seeds"])
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    images = "validation images" if tune else "test images"
    table = Table(
        title=f"Right answers on {images} in percent, mean ± deviation of {seeds}",
        caption="weights: their number; lr: peak learning rate; s: seconds of one run. All were trained at 8×8 only; "
        "on 8×12 and 8×16 the digit is at a random even column, the same for all.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("positions")
    for title in (*(f"8×{width}" for width in rows[0]["accuracy"]), "weights", "lr", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        scores = [f"{one['mean']:.1f}±{one['std']:.1f}" for one in row["accuracy"].values()]
        table.add_row(row["title"], *scores, f"{row['parameters']:,}", f"{row['lr']:g}", f"{row['seconds']:.0f}")
    return table


def _pictures(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws and saves what belongs to a training: curves, samples, bucket maps, learned encodings, weights."""
    from . import digits, viz
    from . import train as job

    titled = [one | {"title": job.title_of(one["side"])} for one in results]
    paths = [viz.draw_curves(folder / "accuracy.png", titled, digits.HEIGHT)]
    test = digits.splits()["test"]
    canvases = [(f"{digits.HEIGHT}×{width}", digits.on_canvas(test, width).images[:8, 0]) for width in digits.WIDTHS]
    paths.append(viz.draw_samples(folder / "samples.png", canvases))
    groups = [viz.bucket_maps(method, 14, 14, skip=1) for method in viz.RATIOS]
    paths.append(viz.draw_buckets(folder / "buckets.png", groups))
    overview = True
    for one in (one for one in titled if one["seed"] == 0):
        paths.append(job.save(folder / f"{one['side']}-seed0.pt", one))
        if (learned := job.encodings(one)) is not None:
            encodings = viz.Encodings(**learned)
            paths.append(viz.draw_encodings(folder / f"encodings-{one['side']}.png", encodings))
            if overview:
                paths.append(viz.draw_overview(folder / "irpe.png", encodings))
                overview = False
    return paths


@app.command()
def show(
    method: Annotated[
        list[str] | None, typer.Option(help="euc, quant, cross or product (repeatable); all four by default.")
    ] = None,
    height: Annotated[int, typer.Option(help="Of the map, in tokens.")] = 14,
    width: Annotated[int, typer.Option(help="Of the map, in tokens.")] = 14,
    ratio: Annotated[
        float | None, typer.Option(help="Scale of the piecewise index; by default that of the paper for each method.")
    ] = None,
    skip: Annotated[int, typer.Option(help="Number of tokens in front of the map.")] = 1,
    query: Annotated[
        tuple[int, int] | None, typer.Option(metavar="ROW COLUMN", help="The token to look from, counted from 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs/buckets.png"),
) -> None:
    """Draw which bucket each offset of query and key falls in, and count the buckets that are used."""
    from . import viz

    names = list(dict.fromkeys(method or viz.RATIOS))
    if max(height, width) > 256:
        raise typer.BadParameter(f"{height}x{width} tokens; expected at most 256 along a side")
    groups = [_checked(viz.bucket_maps, one, height, width, ratio=ratio, skip=skip) for one in names]
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}; expected a file name that ends in .png")
    path = _checked(viz.draw_buckets, out, groups, query)
    for one, group in zip(names, groups, strict=True):
        used = " + ".join(str(table.used()) for table in group)
        total = f" = {sum(table.used() for table in group)}" if len(group) > 1 else ""
        console.print(f"{one:8} ratio {group[0].ratio:<5g} {used}{total} buckets in use")
    console.print(str(path), soft_wrap=True)


@app.command()
def info() -> None:
    """Print versions, the device, and which backends run here and why the others do not."""
    import torch

    import rpe_ops

    from . import __version__

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("irpe", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "timm", "torchvision", "transformers", "triton", "scikit-learn", "matplotlib"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "absent")
    cuda = torch.cuda.is_available()
    device = (
        torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads; no CUDA device is visible"
    )
    table.add_row("device", device)
    console.print(table)
    console.print("\nbackends")
    backends = Table(show_header=False, box=None, pad_edge=False)
    for name, words in rpe_ops.backends().items():
        backends.add_row(f"  {name}", words)
    console.print(backends)


if __name__ == "__main__":
    main()
