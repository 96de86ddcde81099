"""What the commands share: the console, sentences for wrong input, folders for results."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from ..runs.files import as_json, printable, reason_of, write_whole

T = TypeVar("T")
# typer has brought click along, and holds a copy of its own since 0.29: what its errors are derived from
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
OUT = Path("runs")  # the folder of all results, where none is named


class Terminal(Console):
    """A console that shows strings as they are: no markup, no emoji, and control characters as \\x1b.

    Names of files, of classes and of encodings come from anywhere.
    """

    def __init__(self, **options: Any) -> None:
        self._forced = bool(options.get("force_terminal"))
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    @property
    def is_terminal(self) -> bool:
        """Whether lines can be drawn over. FORCE_COLOR, which notebooks and CI set, makes no terminal of a pipe."""
        return super().is_terminal and (self._forced or self.file.isatty())

    def render_str(self, text: str, **options: Any) -> Text:
        """The string, in lines of text, cells of tables, titles and captions alike."""
        return super().render_str(printable(text), **options)


console = Terminal()


def sentence(error: BaseException | str) -> str:
    """What an error says, in one line that a terminal may print."""
    return printable(" ".join(str(error).split("\n")))


def checked(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function returns; its complaints about the user's input become a sentence and exit code 2."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(sentence(error)) from None
    except OSError as error:
        raise typer.BadParameter(sentence(words_of(error))) from None


@contextmanager
def checked_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, or says that one is there."""
    from ..runs.folder import locked

    stack = ExitStack()
    checked(stack.enter_context, locked(folder))
    with stack:
        yield


def words_of(error: OSError) -> str:
    """What went wrong with which file."""
    return f"{error.filename}: {reason_of(error)}" if error.filename and error.strerror else str(error)


def check_place(*files: Path | None) -> None:
    """Refuses files that could not be written, before there is anything to write."""
    for file in files:
        if file is None:
            continue
        try:
            folder = next(place for place in (file.parent, *file.parent.parents) if place.exists())
            in_the_way = file if file.is_dir() else None if folder.is_dir() else folder
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise typer.BadParameter(sentence(f"{file} cannot be a file: {reason_of(error)}")) from None
        if in_the_way is not None:
            raise typer.BadParameter(sentence(f"{file} cannot be a file: {in_the_way} is in its way"))
        if not os.access(folder, os.W_OK):
            raise typer.BadParameter(sentence(f"{file} cannot be written: {folder} may not be written into"))


def write(file: Path, data: bytes) -> None:
    """Writes a file, whole or not at all, and makes its folder where there is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda handle: handle.write(data))
    except OSError as error:
        raise typer.BadParameter(sentence(words_of(error))) from None


def write_json(file: Path, values: Any) -> None:
    """Writes plain values; see `write`."""
    write(file, as_json(values, indent=1))


def new_folder(out: Path, name: str, overwrite: bool) -> Path:
    """Makes and returns out/name; where that exists out/name-2, out/name-3, ..., or the same one when overwriting."""
    if name in ("", ".", "..") or Path(name).name != name or printable(name) != name:
        raise ValueError(f"--name {name!r}; expected the name of one folder, which is made inside --out")
    try:
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
    except OSError as error:
        raise ValueError(
            f"{out / name} cannot be made: {error.strerror}; --out and --name say where else to write"
        ) from None


def folder_of_run(
    out: Path | None, name: str | None, usual: str, *, overwrite: bool, resume: str | None, kind: Any
) -> Path:
    """The folder that a run writes into: that of the run that goes on, or one for --out and --name.

    Args:
        usual: the name where none was given.
        kind: what the command writes there, an `irpe.runs.folder.Kind`.
    """
    if resume not in (None, "auto"):
        from ..runs.folder import resumed, run_of

        own = run_of(resumed(resume, kind), kind)
        if own is not None:
            other = (name is not None and name != own.resolve().name) or (
                out is not None and out.resolve() != own.resolve().parent
            )
            if other:
                raise ValueError(
                    f"--resume {resume} goes on in the folder of its run, {own}: leave --out and --name out, or copy "
                    "the checkpoint elsewhere to go on in another folder"
                )
            return own
    return new_folder(out or OUT, name or usual, overwrite or resume == "auto")
