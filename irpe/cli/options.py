"""Commands whose options are the fields of a settings class, and the sentences they end with."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from ..runs.settings import PANELS
from .common import Terminal, console, sentence, words_of
from .torchrun import failing

FOLDER = "Folder and resuming"
_LESS = "a smaller --batch-size (or --accumulate, which keeps it) and fewer --loader-workers need less"  # of training
Out = Annotated[Path | None, typer.Option(help="Folder of all results. Default: runs.", rich_help_panel=FOLDER)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that exists.", rich_help_panel=FOLDER)
]
Resume = Annotated[
    str | None,
    typer.Option(
        help="auto: go on from the last checkpoint in --out/--name, or begin if there is none. Or the folder of a run, "
        "or a checkpoint: one of a run goes on in its folder with its settings, one that lies elsewhere in a new one.",
        rich_help_panel=FOLDER,
    ),
]

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="File with options, in YAML (batch-size: 64) or the settings.json of a run; the command line comes first.",
        rich_help_panel=FOLDER,
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print all settings as --config takes them, and end.", rich_help_panel=FOLDER),
]


def recipe_option(recipes: Collection[str]) -> Any:
    """--recipe of a command that has these."""
    words = f"Where options that are not given come from: {', '.join(recipes)}."
    return typer.Option(help=words, rich_help_panel="Recipe")


def check_recipe(recipe: str | None, own: Mapping[str, Any]) -> None:
    """Refuses a --recipe beside a file that has another one, whose values it would not change."""
    if recipe is not None and own.get("recipe", recipe) != recipe:
        raise ValueError(f"--recipe {recipe}: the file has recipe {own['recipe']}, and values of its own; leave it out")


def print_settings(settings: Any) -> None:
    """For --print-config, in the first process."""
    from ..runs.config import as_yaml

    if os.environ.get("RANK", "0") == "0":
        typer.echo(as_yaml(settings), nl=False)


def with_settings(
    function: Callable[..., None],
    settings: type[Any],
    recipes: Mapping[str, Mapping[str, Any]],
    without: Collection[str] = (),
) -> Callable[..., None]:
    """The function as typer sees it: its **settings become an option for each field of the class.

    Options that are not given are None. The help of each ends with its defaults.
    """
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    more = []
    options = [field for field in dataclasses.fields(settings) if "help" in field.metadata]
    for field in sorted(options, key=lambda field: PANELS.index(field.metadata["panel"])):
        if field.name in without or field.name in signature.parameters:
            continue
        kind: Any = field.type
        inner = [arg for arg in get_args(kind) if arg not in (type(None), Ellipsis)]
        several = getattr(kind, "__origin__", None) is tuple
        basic = list[inner[0]] if several else inner[0] if inner else kind  # type: ignore[valid-type]
        option = typer.Option(help=_words(field, recipes), show_default=False, rich_help_panel=field.metadata["panel"])
        more.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[basic | None, option]
            )
        )
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own[1:]]
    parameters = [own[0], *keyword, *more]

    def command(*args: Any, **options: Any) -> None:
        function(*args, **options)

    command.__name__, command.__doc__ = function.__name__.removeprefix("_"), function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _words(field: "dataclasses.Field[Any]", recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """The help of an option with its default, and the values of recipes that have another."""
    text: str = field.metadata["help"]
    if isinstance(field.default, bool):
        return text
    usual = _shown(field.default)
    others = {recipe: _shown(values.get(field.name, field.default)) for recipe, values in recipes.items()}
    shown = ", ".join(f"{value} ({recipe})" for recipe, value in others.items() if value != usual)
    return f"{text} Default: {'; '.join(filter(None, (usual, shown)))}." if usual or shown else text


def _shown(value: Any) -> str:
    if value is None or value == "":
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as settings hold them."""
    found = {name: value for name, value in options.items() if value is not None and value != []}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


@contextmanager
def sentences(less: str = _LESS) -> Iterator[Console]:
    """Gives the console of this process, and makes errors and signals what the first process prints, and a status.

    Args:
        less: what needs less memory.
    """
    from ..runs.trainer import Stopped
    from ..runs.workers import RunError

    first = os.environ.get("RANK", "0") == "0"
    printer = console if first else Terminal(quiet=True)
    try:
        yield printer
    except Stopped as stopped:
        printer.print(str(stopped), soft_wrap=True)
        raise typer.Exit(128 + stopped.signal) from None
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        if (words := _words_of(error, less)) is None:
            raise
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, RunError):
            raise typer.BadParameter(sentence(words)) from None
        failing(f"irpe: {sentence(words)}")
        typer.echo(f"irpe: {sentence(words)}", err=True)
        raise typer.Exit(1) from None


def _words_of(error: BaseException, less: str) -> str | None:
    """The sentence for an error; None for one that is a mistake of ours, whose traceback is wanted."""
    words = str(error)
    memory = ("out of memory", "can't allocate memory", "not enough memory", "Unable to allocate")
    if isinstance(error, MemoryError) or any(phrase in words for phrase in memory):
        return f"there is not enough memory for this; {less}: {words or 'MemoryError'}"
    if isinstance(error, OSError):
        return words_of(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" in words:  # told in the middle of a step
        return "a loader process was ended from outside; where memory is short, fewer --loader-workers need less"
    return None if isinstance(error, RuntimeError) and not isinstance(error, ValueError) else words
