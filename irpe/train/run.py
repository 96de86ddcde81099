"""`irpe train DATA` and `irpe evaluate` from end to end, in every process of a run."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ..runs.files import counted, read_json
from ..runs.folder import SETTINGS, TRACKERS, Kind
from ..runs.process import MakeFolder, Say, fitted, say_to, signals, start_of, versions, writing
from ..runs.report import CARD, CURVES, RESULT
from ..runs.trackers import check_packages
from ..runs.world import World, started
from . import confusion
from . import model as models
from .data import Data, Source, difference, located, open_data
from .evaluation import Score, evaluate
from .loader import Transform, reading_of, unreadable
from .loop import Trainer, images_of
from .pretrained import AVERAGE, BEST, WEIGHTS, find_weights
from .report import ENCODINGS, write_report
from .settings import Settings, settings_from_dict


def _is_record(values: dict[str, Any]) -> bool:
    """Whether these are what `record` makes, of this version or of another one."""
    kinds = {"settings": dict, "classes": list, "shape": dict, "steps_per_epoch": int, "parameters": int}
    if not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        return False
    size = values["shape"].get("size")
    return (
        {"data", "model", "rpe"} <= set(values["settings"])
        and all(isinstance(name, str) for name in values["classes"])
        and isinstance(size, list)
        and len(size) == 2
        and all(isinstance(side, int) and 0 < side < 100_000 for side in size)
    )


def _located(values: dict[str, Any]) -> Settings:
    """The settings in what `record` made; its data is found from everywhere."""
    settings = located(settings_from_dict(values["settings"]), Path(str(values.get("started_in", "."))))
    return dataclasses.replace(settings, download=False)  # what a file names is not fetched


_RESULTS = (RESULT, CARD, BEST, WEIGHTS, AVERAGE, "model.pt2", "model.pt2.json")
KIND = Kind(
    "irpe train",
    files=(SETTINGS, "log.jsonl", TRACKERS, CURVES, ENCODINGS, confusion.FILE, confusion.PICTURE, *_RESULTS),
    results=_RESULTS,
    is_ours=_is_record,
    settings_from=settings_from_dict,
    recorded=_located,
    signed={CARD: "Made with irpe "},
)


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
    check_packages(settings)
    with signals() as stop, started(settings.device) as world:
        say = say_to(console, world)
        data = _open(settings, world, say)
        if settings.verify:
            _verify([data.train, data.val], settings, world, say)
        settings = fitted(settings, images_of(data.train, settings.train_samples), world, say)
        start = start_of(resume, settings, KIND)
        fresh = dataclasses.replace(settings, pretrained=None) if start.path else settings
        trainer = Trainer(settings, data, models.build(fresh, len(data.classes), say), world)
        Transform(
            trainer.shape, settings.interpolation, settings
        )  # refuses what timm cannot make, before there is a folder
        sources = (settings.pretrained,)
        with writing(trainer, KIND, start, make_folder, record(trainer), say, sources) as folder:
            trainer.run(folder, console, stop)
            trainer.export(folder)
            if world.first:
                # the weights of a sharded model are not all here
                whole = trainer.model if settings.parallel == "ddp" else None
                write_report(folder, whole, trainer.data.val, say)
    return folder


def _open(settings: Settings, world: World, say: Say, *, train: bool = True) -> Data:
    """The data, in the first process before the others: it may download, or write an index beside large archives."""
    own: list[Data] = []
    world.from_first(lambda: own.append(open_data(settings, train=train)))
    data = own[0] if own else open_data(settings, train=train)
    counts = [counted(len(data.classes), "class", "classes")]
    for part, words in ((data.train, "to train on"), (data.val, "to evaluate on")):
        if part is not None and hasattr(part, "labels"):
            counts.append(f"{counted(len(part), 'image', 'images')} {words}")
    say(f"{settings.data}: {', '.join(counts)}")
    for note in data.notes:
        say(note)
    return data


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
        "shape": dataclasses.asdict(trainer.shape), "parameters": sum(weight.numel() for weight in model.parameters()),
        "parameter_groups": groups, "steps_per_epoch": trainer.steps_per_epoch, "processes": trainer.world.size,
        "device": str(trainer.world.device), "command": sys.argv[1:], "started_in": os.getcwd(),
        "versions": versions(),
    }  # fmt: skip


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


def _verify(sources: list[Source], settings: Settings, world: World, say: Say) -> None:
    """Reads all images in the first process; says which cannot be read, and stops there unless they are skipped."""

    def look() -> list[str]:
        return [
            words
            for source in sources
            if hasattr(source, "labels")
            for words in unreadable(source, reading_of(settings))
        ]

    bad = world.from_first(look)
    if not bad:
        return
    shown = "; ".join(bad[:5]) + "; ..." * (len(bad) > 5)
    words = f"{counted(len(bad), 'image', 'images')} cannot be read: {shown}"
    if settings.bad_images == "stop":
        raise ValueError(f"{words}; --bad-images skip goes on without them")
    say(words)


def measure(
    settings: Settings, weights: Path | None, classes: list[str] | None, console: Console
) -> tuple[Score, list[str], list[str]]:
    """(score, unreadable images, classes) of a model on the part to evaluate on.

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
        transform = Transform(models.shape_of(settings, model), settings.interpolation)
        score, bad = evaluate(model, data.val, transform, settings, world, num_classes=len(data.classes))
    return score, bad, data.classes


def settings_of(folder: Path) -> tuple[Settings, list[str]]:
    """(settings, classes) of a run, without the weights that it started from; its data is found from everywhere."""
    values = read_record(folder)
    try:
        own = _located(values)
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}") from None
    return dataclasses.replace(own, pretrained=None), values["classes"]  # nor which others are loaded


def weights_of(folder: Path, which: str) -> Path:
    """The file of a run's weights: "best", "last" (at the end), "ema" (their average), or a file as it is.

    Raises:
        ValueError: there is no such file.
    """
    named = {"best": BEST, "last": WEIGHTS, "ema": AVERAGE}
    return find_weights(folder / named[which] if which in named else Path(which))
