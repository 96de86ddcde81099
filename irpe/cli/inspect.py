"""`irpe inspect`: what data holds, in tables, and what a model sees of it, in a picture."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..detect import settings as boxes
from ..runs.options import flag
from ..train import settings as pictures
from . import inspect_tables
from .common import OUT, check_place, write_json
from .detect import ask_for_packages
from .options import FOLDER, Config, check_recipe, given, recipe_option, sentences, with_settings

_SHARED = ("seed", "hflip", "loader_workers", "loader_timeout")
_OF_PICTURES = (
    *("data_dir", "download", "train_split", "val_split", "val_share", "split_seed", "num_classes"),
    *("model", "img_size", "in_chans", "mean", "std", "crop_pct"),
    *("mixup", "cutmix", "mixup_prob", "mixup_switch", "auto_augment", "color_jitter", "erase", "crop_scale", "vflip"),
    "interpolation",
)
_OF_BOXES = (
    *("train_json", "val_json", "train_images", "val_images", "orientation", "train_scenes", "val_scenes"),
    *("digit_classes", "size", "max_size", "train_size", "crop"),
)


def _options(cls: type, names: Collection[str], words: str = "") -> list[tuple[str, Any, Any]]:
    """These fields of settings, with `words` before their help."""
    return [
        (field.name, field.type, dataclasses.field(
            default=field.default, metadata={**field.metadata, "help": words + field.metadata["help"]}
        ))
        for field in dataclasses.fields(cls) if field.name in names
    ]  # fmt: skip


_ALL = dataclasses.make_dataclass(
    "Options",
    [*_options(pictures.Settings, (*_SHARED, *_OF_PICTURES)), *_options(boxes.Settings, _OF_BOXES, "Of boxes: ")],
)
_RECIPES = {**pictures.RECIPES, **boxes.RECIPES, "finetune": pictures.RECIPES["finetune"]}


def _inspect(
    data: Annotated[
        str | None,
        typer.Argument(
            help="What irpe train takes, or a folder in COCO's layout, as irpe detect does; or as --config has it.",
            show_default=False,
        ),
    ] = None,
    detect: Annotated[
        bool | None,
        typer.Option(
            "--detect/--no-detect",
            help="Take DATA as boxes, as irpe detect does, or as classes, as irpe train does. Default: as boxes where "
            "annotations lie where irpe detect looks for them, or with --train-json.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str | None, recipe_option(dict.fromkeys((*pictures.RECIPES, *boxes.RECIPES)))] = None,
    config: Config = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Pictures that are drawn.")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read every picture. Without it there are counts alone.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write. Default: runs/inspect-NAME.png.", rich_help_panel=FOLDER)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the facts there.", rich_help_panel=FOLDER)
    ] = None,
    **settings: Any,
) -> None:
    """Show what DATA holds, and what a model sees of it, before anything is trained.

    Counts of each class, sizes, files that cannot be read, pictures that are in train and in val; and a picture of
    some of them as evaluation and as training see them, with their boxes. The options are those of irpe train and
    irpe detect.
    """
    from ..runs.settings import refuse_two_digits

    with sentences() as printer:
        options = given(settings)
        own, kind = ({}, None) if config is None else _of_file(config, detect)
        check_recipe(recipe, own)
        recipe = recipe or own.get("recipe")
        if data is not None:
            refuse_two_digits(data)
            options["data"] = data
        elif (data := own.get("data")) is None:
            raise ValueError("name the DATA to look at: neither the command line nor a file does")
        file = out or OUT / f"inspect-{Path(data).resolve().name}.png"
        if file.suffix.lower() != ".png":
            raise ValueError(f"--out {file}; expected a file name that ends in .png")
        check_place(file, json_file)
        kind = detect if detect is not None else kind
        of_boxes = _has_boxes(data, options) if kind is None else kind
        others = _OF_PICTURES if of_boxes else _OF_BOXES
        if strange := [flag(name) for name in options if name in others]:
            what = ("of boxes", "--no-detect") if of_boxes else ("of classes", "--detect")
            raise ValueError(
                f"{', '.join(strange)}: this data is taken as one {what[0]}; leave it out, or say {what[1]}"
            )
        look = _boxes if of_boxes else _pictures
        facts, columns, rows, title = look(own, options, recipe, samples, verify, printer)
        for table in inspect_tables.tables(facts):
            printer.print(table, soft_wrap=isinstance(table, str))
        if json_file is not None:
            write_json(json_file, facts)
        from ..runs.grid import draw_grid

        printer.print(str(draw_grid(file, columns, rows, title, side=2.2 if of_boxes else 1.5)), soft_wrap=True)


def _of_file(config: Path, detect: bool | None) -> tuple[dict[str, Any], bool | None]:
    """(settings of irpe train or irpe detect in a file, whether they are of boxes; None where they may be of both).

    Weights are not looked at here, and what a file names is not fetched.
    """
    from ..runs.config import read_config

    found: dict[bool, dict[str, Any]] = {}
    errors = []
    for of_boxes in (False, True) if detect is None else (detect,):
        try:
            found[of_boxes] = read_config(config, (boxes if of_boxes else pictures).Settings)
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    own = next(iter(found.values()))
    left = {name: value for name, value in own.items() if name not in ("pretrained", "backbone", "download")}
    return left, next(iter(found)) if len(found) == 1 else None


def _has_boxes(data: str, options: Mapping[str, Any]) -> bool:
    """Whether data is taken as one of boxes: it has annotations in COCO's layout, or they are named."""
    from ..detect.data import is_annotated

    return "train_json" in options or is_annotated(data)


def _pictures(
    own: dict[str, Any], said: dict[str, Any], recipe: str | None, count: int, verify: bool, printer: Console
) -> Any:
    """(facts, columns and rows of the picture, its title) of data with classes."""
    from ..runs.config import check_fetched
    from ..train import survey
    from ..train.data import fetched
    from ..train.model import expected_shape

    chosen = pictures.settings_from(recipe or "deit", own | said)
    if own:
        check_fetched(chosen, said, fetched(chosen))
    shape = expected_shape(chosen)
    data, parts = survey.open_parts(chosen)
    first = next(iter(parts.values()))
    columns, rows = survey.rows_of(chosen, data.classes, first, shape, count)
    with _bar(printer, sum(map(len, parts.values())), verify) as advance:
        facts = survey.survey(chosen, data, parts, advance, verify=verify)
    height, width = shape.size
    facts["images"] = {"height": height, "width": width, "recipe": chosen.recipe}
    title = f"{chosen.data}: images of {height}×{width}, recipe {chosen.recipe}; sizes are height × width"
    return facts, columns, rows, title


def _boxes(
    own: dict[str, Any], said: dict[str, Any], recipe: str | None, count: int, verify: bool, printer: Console
) -> Any:
    """The same of data with boxes."""
    ask_for_packages()
    from ..detect import survey

    options = own | said
    if options.get("loader_workers", -1) < 0:
        options["loader_workers"] = min(8, os.cpu_count() or 1)
    chosen = boxes.settings_from(options, recipe)
    if words := boxes.unused(said, chosen, released=False):
        raise ValueError("; ".join(words))
    parts = survey.open_parts(chosen)
    columns, rows = survey.rows_of(chosen, parts["train"], count)
    with _bar(printer, sum(map(len, parts.values())), verify) as advance:
        facts = survey.survey(chosen, parts, advance, verify=verify)
    sides = list(chosen.train_size) or [chosen.size]
    facts["images"] = {"shorter_side": sides, "longest_side": chosen.max_size, "recipe": chosen.recipe}
    size = f"shorter side {chosen.size}" if chosen.size else "images as they are"
    return facts, columns, rows, f"{chosen.data}: {size}, recipe {chosen.recipe}; sizes are height × width"


@contextmanager
def _bar(printer: Console, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, gone at the end; what it gives is told how many pictures more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not (wanted and printer.is_terminal):
        yield lambda done: None
        return
    columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=printer, transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda done: bar.advance(task, done)


inspect = with_settings(_inspect, _ALL, _RECIPES)
