"""`irpe sweep`: the rows of a table of the paper on any data."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .common import check_place, checked, console, write_json
from .train import settings_of


def sweep(
    context: typer.Context,
    table: Annotated[int, typer.Argument(help="Of the paper: 1 (methods), 2 (heads), 3 (functions) or 4 (on what).")],
    data: Annotated[str, typer.Argument(help="As irpe train takes it.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row, with seeds 0, 1, ...")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all runs: what has ended there is not run again. Default: runs/sweep-DATA.",
            show_default=False,
        ),
    ] = None,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Processes of each run, which torchrun starts.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table there too.")] = None,
) -> None:
    """Train every row of a table of the paper on DATA, and put what was measured beside the paper's figures.

    All other options go to irpe train: irpe sweep 1 digits --seeds 2 --recipe small --model vit_tiny_patch16_224 ...
    What was interrupted goes on where it was.
    """
    from ..train import compare
    from ..train import sweep as job

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise typer.BadParameter("a sweep is one process, which starts the others: give it --nproc-per-node")
    if table not in job.TABLES:
        raise typer.BadParameter(f"table {table}; expected one of {', '.join(map(str, job.TABLES))}")
    taken = {"--rpe", "--seed", "--name", "--out", "--resume", "--overwrite"} & {
        word.split("=")[0] for word in context.args
    }
    if taken:
        raise typer.BadParameter(f"{', '.join(sorted(taken))}: the sweep sets this for each run")
    check_place(json_file)
    rows, out = job.TABLES[table], out or Path("runs") / f"sweep-{Path(data).name}"

    def words(row: job.Row, seed: int) -> list[str]:
        return [data, *context.args, "--rpe", row.rpe, *row.options, "--seed", str(seed)]

    # the first seed of every row before any second one
    wanted = {(row, seed): checked(settings_of, words(row, seed)) for seed in range(seeds) for row in rows}
    todo = checked(job.unfinished, wanted, out)
    for number, (row, seed) in enumerate(todo, 1):
        console.print(f"{number}/{len(todo)}: {row.title}, seed {seed}")
        own = ["--out", str(out), "--name", row.name(seed), "--resume", "auto"]
        if code := start(["train", *words(row, seed), *own], nproc_per_node):
            raise typer.Exit(code)
    name_of_data = Path(data).name
    means = ", mean ± deviation over seeds" if seeds > 1 else ""
    shown = Table(
        title=f"Table {table} of the paper, and {name_of_data}: right answers in percent",
        caption=f"paper: DeiT-S on ImageNet-1K. {name_of_data}: at the end of each run{means}.",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("row", "encoding", "paper", name_of_data):
        shown.add_column(name, justify="left" if name in ("row", "encoding") else "right", no_wrap=True)
    plain: list[dict[str, Any]] = []
    for row in rows:
        values = job.measured(row, seeds, out)
        mean, deviation = compare.spread(values)
        figure = f"{mean:.1f}" + (f" ± {deviation:.1f}" if seeds > 1 else "")
        shown.add_row(row.title, row.rpe, f"{row.paper:g}", figure)
        plain.append({"row": row.title, "rpe": row.rpe, "options": row.options, "paper": row.paper, "top1": values})
    console.print(shown)
    groups = checked(
        compare.grouped, [checked(compare.load, out / row.name(seed)) for row in rows for seed in range(seeds)]
    )
    console.print(str(checked(compare.draw, out / f"table{table}.png", groups)), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, plain)


def start(words: list[str], processes: int) -> int:
    """Runs `irpe` with these words in processes of its own; their status."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([sys.executable, *(launch if processes > 1 else []), "-m", "irpe", *words]).returncode
