"""`irpe compare`: a table and a plot over runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .common import check_place, checked, console, write_json


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that irpe train DATA wrote.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("runs/compare.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table there too.")] = None,
) -> None:
    """Put runs side by side: those that differ in the seed alone are one row, with mean and spread."""
    from ..train import compare as job

    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}; expected a file name that ends in .png")
    check_place(out, json_file)
    groups = checked(job.grouped, [checked(job.load, folder) for folder in dict.fromkeys(runs)])
    table = Table(
        title="Right answers in percent (top-1), mean ± deviation over seeds",
        caption="last: at the end of each run. best: at its best epoch, which these very images chose, so it flatters.",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    averages = any("ema" in run.epochs[-1] for group in groups for run in group.runs)
    shown = (
        "last",
        "best",
        *(["average"] if averages else []),
        "loss",
    )  # top-5 and the number of weights are in --json
    table.add_column("run")
    for name in ("seeds", "epochs", *shown):
        table.add_column(name, justify="right", no_wrap=True)
    rows = []
    for group in groups:
        average = all("ema" in run.epochs[-1] for run in group.runs)
        figures = {
            "last": job.spread(group.values("top1", "last")),
            "best": job.spread(group.values("top1", "best")),
            "average": job.spread(group.values("top1", "last", "ema")) if average else None,
            "top-5": job.spread(group.values("top5", "last")),
            "loss": job.spread(group.values("loss", "last")),
        }
        run = group.runs[0]
        done = f"{run.epochs[-1]['epoch']}/{run.settings.epochs}"
        words = [_words(figures[name], 3 if name == "loss" else 2, len(group.runs)) for name in shown]
        table.add_row(group.title, str(len(group.runs)), done, *words)
        rows.append(_plain(group, figures))
    console.print(table)
    console.print(str(checked(job.draw, out, groups)), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, rows)


def _words(pair: tuple[float, float] | None, digits: int, count: int) -> str:
    if pair is None:
        return ""
    return f"{pair[0]:.{digits}f}" + (f"±{pair[1]:.{digits}f}" if count > 1 else "")


def _plain(group: Any, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": group.title, "runs": [str(run.folder) for run in group.runs],
        "seeds": [run.settings.seed for run in group.runs], "parameters": group.runs[0].parameters,
        **{name: None if pair is None else {"mean": pair[0], "std": pair[1]} for name, pair in figures.items()},
    }  # fmt: skip
