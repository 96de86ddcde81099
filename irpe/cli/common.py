"""What the commands share: the console, sentences for wrong input, folders for results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

T = TypeVar("T")

console = Console(highlight=False)


def checked(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function returns; its complaints about the user's input become a sentence and exit code 2."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None


def check_place(*files: Path | None) -> None:
    """Refuses files that could not be written, before there is anything to write."""
    for file in files:
        if file is None:
            continue
        folder = next(one for one in (file.parent, *file.parent.parents) if one.exists())
        if not folder.is_dir() or file.is_dir():
            raise typer.BadParameter(f"{file} cannot be a file: {file if file.is_dir() else folder} is in its way")


def write_json(file: Path, values: Any) -> None:
    """Writes plain values, and makes the folder where there is none."""
    from ..train import checkpoint

    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(file, values)


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
