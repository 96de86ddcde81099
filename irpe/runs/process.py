"""A run in one of its processes: signals, what it says, and the folder that it writes into, begun or gone on with."""

import importlib.metadata
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console

from .._version import __version__
from . import checkpoint
from .files import counted, write_json
from .folder import SETTINGS, Kind, begin, check_names, clean, empty, lies_in, locked, resumed
from .options import changed
from .settings import RunSettings
from .trainer import Trainer
from .world import World

MakeFolder = Callable[[], Path]
Say = Callable[[str], None]
S = TypeVar("S", bound=RunSettings)


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """SIGTERM and SIGINT are remembered, for a run to ask after; the second one ends the process at once."""
    got = 0

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal got
        if got:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        got = number

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_to(console: Console, world: World) -> Say:
    """Prints lines as they are, in the first process."""
    return lambda words: console.print(words, soft_wrap=True) if world.first else None


def versions(*more: str) -> dict[str, str]:
    """What a run was made with: irpe, Python, and packages."""
    packages = ("torch", "timm", "torchvision", "numpy", "pillow", *more)
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"irpe": __version__, "python": platform.python_version(), **found}


def fitted(settings: S, images: int, world: World, say: Say) -> S:
    """The settings, with as large a batch as there are images for where it would be larger."""
    parts = world.size * settings.accumulate
    # mixup wants an even number in the batch of a process
    most = images // (2 * parts) * 2 * parts or images // parts * parts
    if settings.batch_size <= images or not most:
        return settings
    say(f"--batch-size {settings.batch_size}: there are {images} images to train on, so it is {most}")
    return replace(settings, batch_size=most)


@dataclass(frozen=True)
class Start:
    """Where a run begins: what --resume says, the checkpoint that it means, and what is in that; None for the start."""

    resume: str | None
    path: Path | None = None
    state: dict[str, Any] | None = None


def start_of(resume: str | None, settings: RunSettings, kind: Kind) -> Start:
    """Where a run begins, as far as that is known before there is a folder.

    Args:
        resume: None, a checkpoint, the folder of a run, or "auto": the last checkpoint of the folder, if it has one.

    Raises:
        ValueError: there is no such checkpoint, or it is of a run with other settings.
    """
    if resume in (None, "auto"):
        return Start(resume)
    path = resumed(str(resume), kind)
    return Start(resume, path, _state(path, settings, kind))


def _state(path: Path, settings: RunSettings, kind: Kind) -> dict[str, Any]:
    state = checkpoint.read(path)
    if differences := changed(kind.settings_from(state["settings"]), settings):
        raise ValueError(f"{path} is of a run with other settings: {'; '.join(differences)}")
    return state


@contextmanager
def writing(
    trainer: Trainer, kind: Kind, start: Start, make_folder: MakeFolder, record: Mapping[str, Any], say: Say,
    sources: tuple[str | None, ...] = (),
) -> Iterator[Path]:  # fmt: skip
    """The folder of a run, which no other run writes into while the block runs; the trainer is where it goes on.

    Args:
        make_folder: called in the first process.
        record: what becomes settings.json.
        sources: files that the run begins from, which must not lie among what beginning anew removes.
    """
    world = trainer.world
    folder = world.from_first(make_folder)
    with ExitStack() as held:
        world.from_first(lambda: held.enter_context(locked(folder)))
        path, state = world.from_first(lambda: _begin(folder, kind, start, sources)), start.state
        if path is not None and path != start.path:
            state = _state(path, trainer.settings, kind)
        if path is not None and state is not None:
            trainer.load(state, elsewhere=not lies_in(path, folder, kind))
            trainer.restore_best(folder)
            say(f"goes on after step {trainer.progress.step} of {trainer.total_steps}, from {path}")
        if world.first:
            clean(folder, kind)
            if path is None:
                empty(folder, kind)
            write_json(folder / SETTINGS, record)
        images, weights = trainer.settings.batch_size, sum(weight.numel() for weight in trainer.model.parameters())
        steps = counted(trainer.total_steps, "step", "steps")
        say(f"{folder}: {steps} of {counted(images, 'image', 'images')}, {weights:,} weights, on {world.device}")
        yield folder


def _begin(folder: Path, kind: Kind, start: Start, sources: tuple[str | None, ...]) -> Path | None:
    """The checkpoint to go on from, in the first process."""
    if start.path is not None and lies_in(start.path, folder, kind):
        check_names(folder, kind)
        return start.path
    return begin(folder, kind, auto=start.resume == "auto", sources=sources) or start.path
