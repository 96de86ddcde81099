"""`irpe train` and `irpe evaluate`: their options, which are those of `irpe.train.settings`, and what they print."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..runs.options import flag
from ..train.settings import RECIPES, Settings, settings_from, settings_from_dict
from . import demo
from .common import OUT, ClickException, check_place, folder_of_run, write_json
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

if TYPE_CHECKING:
    from ..train.confusion import Confusion

DEMO = "Demo on handwritten digits (without DATA)"
Data = Annotated[
    str | None,
    typer.Argument(
        help="Folder with train and val (folders of class folders, or .tar), a folder of class folders or a .tar with "
        "--val-share, torch/cifar10 and the like, hfds/NAME, wds/FOLDER, or digits. Without it the demo runs.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Folder of this one inside --out. Default: data, model, encoding, seed.", rich_help_panel=FOLDER),
]


def _train(
    data: Data = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Epochs of each run. Default: 40 (demo), 300 (deit), 30 (finetune), 100 (small).",
            rich_help_panel="Recipe",
        ),
    ] = None,
    rpe: Annotated[
        list[str] | None,
        typer.Option(
            help="An iRPE such as rpe-1.9-product-ctx-1-k, or none; the demo takes several in place of its own two.",
            rich_help_panel="Model",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; by default --base-lr x batch size / 512, in the demo the tuned ones.",
            rich_help_panel="Recipe",
        ),
    ] = None,
    recipe: Annotated[str | None, recipe_option(RECIPES)] = None,
    out: Out = None,
    name: Name = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    config: Config = None,
    print_config: PrintConfig = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs of each side, with seeds that follow each other. Default: 5.", rich_help_panel=DEMO
        ),
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="The first of these seeds. Default: 0.", rich_help_panel=DEMO)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes; by default one for each CPU core.", rich_help_panel=DEMO),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of seconds: its numbers mean nothing.", rich_help_panel=DEMO)
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Only try the learning rates of the grid, on validation images.", rich_help_panel=DEMO
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Train an image classifier with iRPE on DATA; without DATA, a demo on handwritten digits.

    The demo trains with and without iRPE, and tests on the training size and on wider canvases.

    With DATA: irpe train pictures --model deit_small_patch16_224 --rpe rpe-1.9-product-ctx-1-k. On several GPUs:
    torchrun --nproc-per-node 8 -m irpe train ... docs/train.md has more examples.
    """
    only_demo = {
        "seeds": seeds,
        "first_seed": first_seed,
        "workers": workers,
        "quick": quick or None,
        "tune": tune or None,
    }
    if data is None and config is None and resume in (None, "auto"):
        others = {"recipe": recipe, "resume": resume, "print_config": print_config or None}
        if strange := [flag(name) for name in given(settings | others)]:
            raise typer.BadParameter(f"{', '.join(strange)}: the demo has no such option; name the DATA to train on")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise typer.BadParameter("the demo is one process with workers of its own; name the DATA to train on")
        place = out or OUT
        counts = (seeds or 5, first_seed or 0, epochs or 40)
        demo.run(demo.Options(*counts, rpe or [], lr, workers, place, name, overwrite, quick, tune))
        return
    if strange := [flag(name) for name in given(only_demo)]:
        raise typer.BadParameter(f"{', '.join(strange)}: only the demo, without DATA, has this option")
    if rpe and len(rpe) > 1:
        raise typer.BadParameter(f"--rpe was given {len(rpe)} times; a run has one encoding")
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on in a folder that exists; leave --overwrite out")
    from ..train import run as job

    with sentences() as printer:
        chosen = _chosen(data, recipe, {**settings, "epochs": epochs, "lr": lr}, rpe, config, resume)
        if print_config:
            print_settings(chosen)
            return

        def make() -> Path:
            usual = job.default_name(chosen)
            return folder_of_run(out, name, usual, overwrite=overwrite, resume=resume, kind=job.KIND)

        job.train(chosen, make, resume, printer)


def _chosen(
    data: str | None, recipe: str | None, options: dict[str, Any], rpe: list[str] | None, config: Path | None,
    resume: str | None = None,
) -> Settings:  # fmt: skip
    """The settings that these options ask for, above those of --config or of the run that goes on."""
    from ..runs.config import check_fetched, from_files
    from ..train.data import fetched
    from ..train.run import KIND

    said = given({**options, "rpe": rpe[0] if rpe else None, "data": data})
    own = from_files(config, resume, KIND, Settings)
    if data is None and "data" not in own:
        raise ValueError("name the DATA to train on: neither the command line nor a file does")
    check_recipe(recipe, own)
    chosen = settings_from(recipe or own.get("recipe", "deit"), own | said)
    if own:
        check_fetched(chosen, said, fetched(chosen, goes_on=config is None))
    if chosen.rpe != "none":
        from ..config_io import rpe_config_from_string

        rpe_config_from_string(chosen.rpe)
    return chosen


def settings_of(words: list[str]) -> Settings:
    """The settings that `irpe train` would have with this command line: DATA and options.

    Raises:
        ValueError: something in it is wrong.
    """
    app = typer.Typer()
    app.command()(train)
    command = typer.main.get_command(app)
    try:
        values = command.make_context("irpe train", list(words)).params
    except ClickException as error:
        raise ValueError(error.format_message()) from None
    own = ("data", "recipe", "rpe", "out", "name", "overwrite", "resume", "seeds", "workers", "quick", "tune")
    options = {name: value for name, value in values.items() if name not in (*own, "config", "print_config")}
    if values["print_config"]:
        raise ValueError("--print-config: of irpe train; a sweep has several runs")
    return _chosen(values["data"], values["recipe"], options, values["rpe"], values["config"])


def _evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder that irpe train DATA wrote; or give --data and --model.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Other data than that of the run: see irpe train.", rich_help_panel="Data")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which part of the data, such as test; val by default.", rich_help_panel="Data")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Which of the run's: best, last, ema, or a file.", rich_help_panel="Model")
    ] = "best",
    rpe: Annotated[
        str | None, typer.Option(help="An iRPE such as rpe-1.9-product-ctx-1-k, or none.", rich_help_panel="Model")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures there, with those of each class.", rich_help_panel=FOLDER),
    ] = None,
    **settings: Any,
) -> None:
    """Measure a classifier: loss, top-1 and top-5, every image exactly once, also with torchrun.

    irpe evaluate runs/RUN, or irpe evaluate --model NAME --pretrained FILE --data DATA.
    """
    from ..runs.settings import refuse_two_digits
    from ..train import run as job
    from ..train.confusion import confusions, plain
    from ..train.data import elsewhere, same_data

    options = given(settings | {"data": data, "val_split": split, "rpe": rpe})
    with sentences() as printer:
        if data is not None:
            refuse_two_digits(data)
        if run is None:
            if data is None or "model" not in options or "pretrained" not in options:
                raise ValueError("name the folder of a run; or give --data, --model and --pretrained")
            chosen, classes, path = settings_from("deit", options), None, None
        else:
            old, classes = job.settings_of(run)
            fixed = ["model", "rpe", "pretrained", "in_chans", "num_classes"]
            other = data is not None and not same_data(data, old.data)
            if not other:
                fixed += ["val_share", "split_seed"]  # others would hold pictures out that the run was trained on
                options["data"] = old.data
            if taken := [flag(name) for name in fixed if name in options]:
                raise ValueError(f"{', '.join(taken)}: the run has its own; leave it out")
            if other:
                options = {"val_share": 0.0, "val_split": None, "train_split": None, **options}
            elif elsewhere(old.data) and data is None:
                raise ValueError(
                    f"{run} was trained on {old.data}, which is no folder here; what a file names is not fetched: say "
                    f"--data {old.data} if you trust it, or name a folder"
                )
            if split is not None:
                options["val_share"] = 0.0
            chosen = settings_from_dict({**dataclasses.asdict(old), **options})
            path = job.weights_of(run, weights)
        check_place(json_file)
        score, bad, names = job.measure(chosen, path, classes, printer)
        for name in bad[:5]:
            printer.print(f"unreadable: {name}", soft_wrap=True)
        printer.print(score.words(), soft_wrap=True)
        found = confusions(score.pairs, names)
        if found:
            printer.print(_confused(found))
        if json_file is not None and os.environ.get("RANK", "0") == "0":
            values = score.plain() | {
                "unreadable": bad,
                "classes": classes,
                "data": chosen.data,
                "split": chosen.val_split,
                "confusion": plain(score.pairs, names),
            }
            write_json(json_file, values)


def _confused(found: Sequence["Confusion"]) -> Table:
    """The most frequent confusions."""
    table = Table(title="Taken for another class most often", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("class", "taken for"):
        table.add_column(name, overflow="fold")
    for name in ("images", "of", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        table.add_row(one.name, one.guess, f"{one.images:,}", f"{one.of:,}", f"{one.percent:.1f}")
    return table


# what evaluation has no use for
_TRAINING = tuple(
    field.name
    for field in dataclasses.fields(Settings)
    if field.metadata.get("panel") in ("Recipe", "Augmentation", "Checkpoints and logs")
    and field.name not in ("batch_size",)
)
train = with_settings(_train, Settings, RECIPES)
evaluate = with_settings(
    _evaluate,
    Settings,
    RECIPES,
    (*_TRAINING, "val_split", "train_split", "train_samples", "drop_path", "verify", "compile"),
)
