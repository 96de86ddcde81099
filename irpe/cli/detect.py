"""`irpe detect`: its options, which are those of `irpe.detect.settings`, and what it prints."""

import dataclasses
import importlib.util
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..detect.settings import DIGITS, RECIPES, RPE, Settings, fetched, settings_from, unused
from .common import OUT, folder_of_run, new_folder
from .options import (
    FOLDER,
    Config,
    Out,
    Overwrite,
    PrintConfig,
    Resume,
    check_recipe,
    given,
    print_settings,
    recipe_option,
    sentences,
    with_settings,
)  # fmt: skip


def _detect(
    data: Annotated[
        str | None,
        typer.Argument(
            help="Folder in COCO's layout: train2017 or train, val2017 or val, annotations/*.json. Without it digits "
            "on photographs, which need no download, with and without iRPE.",
            show_default=False,
        ),
    ] = None,
    write_digits: Annotated[
        Path | None,
        typer.Option(
            help="Write the built-in scenes into this new folder, in COCO's layout, and end.", rich_help_panel="Data"
        ),
    ] = None,
    rpe: Annotated[
        list[str] | None,
        typer.Option(
            help=f"An iRPE such as {RPE} in the encoder, or none; without DATA several. Default: as --pretrained has "
            f"it; none and {RPE} (digits).",
            rich_help_panel="Model",
        ),
    ] = None,
    recipe: Annotated[str | None, recipe_option(RECIPES)] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Without DATA: runs of each side. Default: 3.", rich_help_panel="Recipe")
    ] = None,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Measure --pretrained, train nothing.")
    ] = False,
    out: Out = None,
    name: Annotated[str | None, typer.Option(help="Folder of this one inside --out.", rich_help_panel=FOLDER)] = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    config: Config = None,
    print_config: PrintConfig = False,
    **settings: Any,
) -> None:
    """Train and evaluate DETR with iRPE in its encoder on DATA in COCO's format; without DATA, digits on photographs.

    irpe detect coco --pretrained facebook/detr-resnet-50 --rpe rpe-2.0-product-ctx-1-k. On several GPUs: torchrun
    --nproc-per-node 8 -m irpe detect ... docs/detect.md has more examples.
    """
    ask_for_packages()
    with sentences() as printer:
        from ..detect import run as job
        from ..runs.config import check_fetched, from_files
        from ..runs.folder import locked
        from ..runs.settings import refuse_two_digits

        if data is not None:
            refuse_two_digits(data)
        options = given(settings)
        own = from_files(config, None if data is None and write_digits else resume, job.KIND, Settings)
        several = data is None and "data" not in own and not evaluate_only and write_digits is None
        if rpe and len(rpe) > 1 and not several:
            raise ValueError(f"--rpe was given {len(rpe)} times; a run on DATA has one encoding")
        if seeds is not None and not several:
            raise ValueError("--seeds: only without DATA; a run on DATA has one --seed")
        if several and {"seed", "pretrained"} & set(options):
            raise ValueError(
                "--seed, --pretrained: without DATA small models are trained with several seeds; name DATA (digits)"
            )
        if several and resume not in (None, "auto"):
            raise ValueError(f"--resume {resume}: without DATA only auto, which goes on with all runs of --out/--name")
        if resume is not None and (overwrite or evaluate_only):
            raise ValueError(
                "--resume goes on with training in a folder that exists; leave --overwrite and --evaluate-only out"
            )
        if rpe and not several:
            options["rpe"] = rpe[0]
        check_recipe(recipe, own)
        where = {"data": data or own.get("data", DIGITS)}
        chosen = settings_from(own | options | where, recipe or own.get("recipe"))
        if own:
            check_fetched(chosen, options, fetched(chosen))
        if print_config:
            print_settings(chosen)
            return
        released = chosen.pretrained is not None and Path(chosen.pretrained).is_file()
        if words := unused(options, chosen, released=released):
            raise ValueError("; ".join(words))
        if write_digits is not None:
            printer.print(str(job.make_digits(write_digits, chosen)), soft_wrap=True)
        elif several:
            folder = new_folder(out or OUT, name or "detect-digits", overwrite or resume == "auto")
            sides = tuple(dict.fromkeys(rpe or ("none", RPE)))
            for side in sides:
                dataclasses.replace(chosen, rpe=side)  # refuses what is no encoding, before anything is trained
            again = shlex.join(["--out", str(folder.parent), "--name", folder.name, "--resume", "auto"])
            with locked(folder), _together(f"the same command with {again}"):
                rows = job.compare(chosen, sides, seeds or 3, folder, resume, printer)["rows"]
            printer.print(_table(rows))
            printer.print(str(folder / "results.json"), soft_wrap=True)
        else:
            called = job.default_name(chosen)
            if evaluate_only:  # after the run, where it is one's
                called = f"{job.run_of(chosen) or called}-evaluated"

            def make() -> Path:
                return folder_of_run(out, name, called, overwrite=overwrite, resume=resume, kind=job.KIND)

            if evaluate_only:
                job.measure(chosen, make, printer)
            else:
                job.train(chosen, make, resume, printer)


detect = with_settings(_detect, Settings, RECIPES)


@contextmanager
def _together(command: str) -> Iterator[None]:
    """Runs that go on together: what stopped one of them says how."""
    from ..runs.trainer import Stopped

    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signal, stopped.step, stopped.folder, command) from None


def ask_for_packages() -> None:
    """Ends with one sentence where a package is missing, before anything is read: some would be missed late."""
    packages = ("transformers", "torchvision", "torchmetrics", "pycocotools", "scipy", "sklearn", "matplotlib", "timm")
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        remedy = 'install what irpe detect needs, in the folder of irpe: pip install ".[detect]"'
        raise SystemExit(f"irpe: no module named {', '.join(missing)}; {remedy}")


def _table(rows: list[dict[str, Any]]) -> Table:
    count = rows[0]["seeds"]
    table = Table(
        title="Average precision in percent, " + (f"mean ± deviation of {count} seeds" if count > 1 else "1 seed"),
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("encoder")
    for title in ("AP", "AP50", "AP75", "weights", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        scores = [
            f"{figure['mean']:.1f}" + ("" if figure["std"] is None else f"±{figure['std']:.1f}")
            for figure in (row[key] for key in ("AP", "AP50", "AP75"))
        ]
        side = "without iRPE" if row["side"] == "none" else row["side"]
        table.add_row(side, *scores, f"{row['parameters']:,}", f"{row['seconds']:.0f}")
    return table
