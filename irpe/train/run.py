"""`irpe train DATA` and `irpe evaluate` from end to end, in every process of a run."""

import dataclasses
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from .._version import __version__
from . import checkpoint
from . import model as models
from .data import Data, Source, difference, located, open_data
from .evaluation import Score, evaluate
from .files import read_json
from .folder import SETTINGS, Kind, begin, check_names, clean, empty, lies_in, locked, resumed
from .loader import Transform, unreadable
from .logs import Log
from .loop import Stopped, Trainer
from .options import changed
from .settings import Settings, settings_from_dict
from .world import World, started

RESULT = "result.json"


def _is_record(values: dict[str, Any]) -> bool:
    """Whether these are what `record` makes, of this version or of another one."""
    kinds = {"settings": dict, "classes": list, "shape": dict, "steps_per_epoch": int, "parameters": int}
    if not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        return False
    size = values["shape"].get("size")
    return (
        {"data", "model", "rpe"} <= set(values["settings"])
        and all(isinstance(one, str) for one in values["classes"])
        and isinstance(size, list)
        and len(size) == 2
        and all(isinstance(one, int) and 0 < one < 100_000 for one in size)
    )


_RESULTS = (RESULT, "README.md", "best.safetensors", models.WEIGHTS, "ema.safetensors", "model.pt2", "model.pt2.json")
KIND = Kind(
    "irpe train",
    files=(SETTINGS, "log.jsonl", "curves.png", "encodings.png", *_RESULTS),
    results=_RESULTS,
    is_ours=_is_record,
    signed={"README.md": "Made with irpe "},
)
MakeFolder = Callable[[], Path]


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

    before = {one: signal.signal(one, remember) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: got
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def default_name(settings: Settings) -> str:
    """The name of a run's folder: data, model, encoding, seed."""
    data = Path(settings.data).name if settings.data != "digits" else "digits"
    parts = [data, settings.model.replace("/", "-"), settings.rpe, f"seed{settings.seed}"]
    return "-".join(part for part in parts if part and part != "none")


def train(settings: Settings, make_folder: MakeFolder, resume: str | None, console: Console) -> Path:
    """Trains, measures and writes everything into the run's folder, which is returned.

    Args:
        make_folder: called in the first process, once the data and the model have turned out to be there.
        resume: None, a checkpoint, the folder of a run, or "auto": the last checkpoint of the folder, if it has one.

    Raises:
        Stopped: a signal came, and a checkpoint was written.
        ValueError, TypeError, OSError: the input is wrong, or a file cannot be written, with the reason.
    """
    with signals() as stop, started(settings.device) as world:
        say = say_to(console, world)
        data = _open(settings, world, say)
        if settings.verify:
            _verify([data.train, data.val], settings, world, console)
        start = resumed(resume, KIND) if resume not in (None, "auto") else None
        state = _state(start, settings) if start else None
        fresh = dataclasses.replace(settings, pretrained=None) if start else settings
        model = models.build(fresh, len(data.classes), say)
        trainer = Trainer(settings, data, model, world)
        Transform(settings, trainer.shape, training=True)  # refuses what timm cannot make, before there is a folder
        folder = world.from_first(make_folder)
        with ExitStack() as held:
            world.from_first(lambda: held.enter_context(locked(folder)))
            found = world.from_first(lambda: _begin(folder, settings, resume, start))
            if found is not None and found != start:
                start, state = found, _state(found, settings)
            if start is not None and state is not None:
                trainer.load(state, elsewhere=not lies_in(start, folder, KIND))
                trainer.restore_best(folder)
                say(f"goes on after step {trainer.progress.step} of {trainer.total_steps}, from {start}")
            if world.first:
                clean(folder, KIND)
                if start is None:
                    empty(folder, KIND)
                checkpoint.write_json(folder / SETTINGS, record(trainer))
            _run(trainer, folder, console, stop, say)
    return folder


def _begin(folder: Path, settings: Settings, resume: str | None, start: Path | None) -> Path | None:
    """The checkpoint to go on from, in the first process; see `folder.begin`."""
    if start is not None and lies_in(start, folder, KIND):
        check_names(folder, KIND)
        return start
    return begin(folder, KIND, auto=resume == "auto", sources=(settings.pretrained,)) or start


def _run(trainer: Trainer, folder: Path, console: Console, stop: Callable[[], int], say: Callable[[str], None]) -> None:
    settings, progress, first = trainer.settings, trainer.progress, trainer.world.first
    images, weights = settings.batch_size, sum(one.numel() for one in trainer.model.parameters())
    say(f"{folder}: {trainer.total_steps:,} steps of {images:,} images, {weights:,} weights, on {trainer.world.device}")
    log = Log(
        folder if first else None, console, step=progress.step, measured=progress.measured,
        total_images=(trainer.total_steps - progress.step) * settings.batch_size, tensorboard=settings.tensorboard,
    )  # fmt: skip
    try:
        trainer.run(folder, log, stop)
    finally:
        log.close()
    trainer.export(folder)
    if first:
        from .report import write_report

        write_report(folder, trainer.model if settings.parallel == "ddp" else None, trainer.data.val, console)


def say_to(console: Console, world: World) -> Callable[[str], None]:
    """Prints lines as they are, in the first process."""
    return lambda words: console.print(words, soft_wrap=True) if world.first else None


def _open(settings: Settings, world: World, say: Callable[[str], None], *, train: bool = True) -> Data:
    """The data, in the first process before the others: it may download, or write an index beside large archives."""
    own: list[Data] = []
    world.from_first(lambda: own.append(open_data(settings, train=train)))
    data = own[0] if own else open_data(settings, train=train)
    counts = [f"{len(data.classes):,} classes"]
    for part, words in ((data.train, "to train on"), (data.val, "to evaluate on")):
        if part is not None and hasattr(part, "labels"):
            counts.append(f"{len(part):,} images {words}")
    say(f"{settings.data}: {', '.join(counts)}")
    for note in data.notes:
        say(note)
    return data


def _state(path: Path, settings: Settings) -> dict[str, Any]:
    state = checkpoint.read(path)
    if differences := changed(settings_from_dict(state["settings"]), settings):
        raise ValueError(f"{path} is of a run with other settings: {'; '.join(differences)}")
    return state


def record(trainer: Trainer) -> dict[str, Any]:
    """What somebody needs to build the model of a run again, and to repeat the run."""
    model, settings = trainer.model, trainer.settings
    groups = {
        "tables of iRPE": f"weight decay {settings.rpe_weight_decay:g}, learning rate x {settings.rpe_lr_scale:g}",
        "matrices": f"weight decay {settings.weight_decay:g}",
        "biases, norms, positions, tokens": "no weight decay",
    }
    if settings.rpe == "none":
        del groups["tables of iRPE"]
    return {
        "settings": dataclasses.asdict(settings), "classes": trainer.data.classes,
        "shape": dataclasses.asdict(trainer.shape), "parameters": sum(one.numel() for one in model.parameters()),
        "parameter_groups": groups, "steps_per_epoch": trainer.steps_per_epoch, "processes": trainer.world.size,
        "device": str(trainer.world.device), "command": sys.argv[1:], "started_in": os.getcwd(),
        "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What a run was made with."""
    packages = ("torch", "timm", "torchvision", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"irpe": __version__, "python": platform.python_version(), **found}


def read_record(folder: Path) -> dict[str, Any]:
    """What `record` wrote.

    Raises:
        ValueError: the folder is not that of a run.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise ValueError(f"{folder} has no {SETTINGS}; expected the folder of a run, which irpe train DATA writes")
    values = read_json(path)
    if not isinstance(values, dict) or not KIND.is_ours(values):
        raise ValueError(
            f"{path} is not of a run of irpe train, or it is damaged; expected what irpe train DATA writes"
        )
    return values


def _verify(sources: list[Source], settings: Settings, world: World, console: Console) -> None:
    """Reads all images in the first process; says which cannot be read, and stops there unless they are skipped."""

    def look() -> list[str]:
        return [words for one in sources if hasattr(one, "labels") for words in unreadable(one, settings)]

    bad = world.from_first(look)
    if not bad:
        return
    words = f"{len(bad)} images cannot be read: {'; '.join(bad[:5])}{'; ...' if len(bad) > 5 else ''}"
    if settings.bad_images == "stop":
        raise ValueError(f"{words}; --bad-images skip goes on without them")
    if world.first:
        console.print(words, soft_wrap=True)


def measure(
    settings: Settings, weights: Path | None, classes: list[str] | None, console: Console
) -> tuple[Score, list[str]]:
    """(score, unreadable images) of a model on the part to evaluate on.

    Args:
        weights: what to load in place of `--pretrained`.
        classes: those that the model was trained for, which the data has to have.
    """
    with started(settings.device) as world:
        say = say_to(console, world)
        data = _open(settings, world, say, train=False)
        if classes is not None and data.classes != classes:
            raise ValueError(difference(classes, data.classes))
        if weights is not None:
            settings = dataclasses.replace(settings, pretrained=str(weights))
        model = models.build(settings, len(data.classes), say, strict=True)
        model.to(world.device)
        transform = Transform(settings, models.shape_of(settings, model), training=False)
        return evaluate(model, data.val, transform, settings, world, num_classes=len(data.classes))


def settings_of(folder: Path) -> tuple[Settings, list[str]]:
    """(settings, classes) of a run, without the weights that it started from; its data is found from everywhere."""
    values = read_record(folder)
    try:
        own = settings_from_dict(values["settings"])
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}") from None
    # a file says neither what is fetched nor which others are loaded
    settings = dataclasses.replace(own, pretrained=None, download=False)
    return located(settings, Path(str(values.get("started_in", ".")))), values["classes"]


def weights_of(folder: Path, which: str) -> Path:
    """The file of a run's weights: "best", "last" (at the end), "ema" (their average), or a file as it is.

    Raises:
        ValueError: there is no such file.
    """
    named = {"best": "best.safetensors", "last": models.WEIGHTS, "ema": "ema.safetensors"}
    return models.find_weights(folder / named[which] if which in named else Path(which))


__all__ = ["Stopped", "default_name", "measure", "read_record", "settings_of", "train", "weights_of"]
