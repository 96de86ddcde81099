"""`irpe detect` from end to end, in every process of a run."""

import dataclasses
import importlib.metadata
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..train import checkpoint
from ..train.options import changed
from ..train.run import say_to, signals, versions
from ..train.world import World, started
from . import model as models
from .batches import transform_of
from .data import Coco, open_part
from .draw import draw
from .evaluation import Prediction, average_precision, predict, words
from .loop import DetectionLog, Trainer
from .scenes import write as write_scenes
from .settings import Settings, settings_from_dict

RESULT, PICTURES = "result.json", "predictions.png"
MakeFolder = Callable[[], Path]


def default_name(settings: Settings) -> str:
    """The name of a run's folder: data, model, encoding, seed."""
    model = settings.model if settings.pretrained is None else Path(settings.pretrained).stem
    parts = ["detect", Path(settings.data).name, model, settings.rpe]
    parts += ["no-positions" if settings.positions == "none" else None, f"seed{settings.seed}"]
    return "-".join(part for part in parts if part and part != "none")


def train(settings: Settings, make_folder: MakeFolder, resume: str | None, console: Console) -> dict[str, Any]:
    """Trains, measures and writes everything into the run's folder; returns what is in its result.json.

    The folder has the last weights in `model` and the best in `best` (both as `save_pretrained` writes them),
    checkpoints, log.jsonl, result.json and predictions.png.

    Args:
        make_folder: called in the first process, once the data and the model have turned out to be there.
        resume: None, a checkpoint, the folder of a run, or "auto": the last checkpoint of the folder, if it has one.

    Raises:
        Stopped: a signal came, and a checkpoint was written.
        ValueError, TypeError, OSError: the input is wrong, or a file cannot be written, with the reason.
    """
    with signals() as stop, started(settings.device) as world:
        say = say_to(console, world)
        data, val = _data(settings, say)
        start = _checkpoint(resume) if resume not in (None, "auto") else None
        model, processor = models.build(settings, data.classes, say), models.processor_of(settings)
        trainer = Trainer(settings, data, val, model, processor, world)
        folder = world.from_first(make_folder)
        if resume == "auto":
            start = world.from_first(lambda: next(reversed(checkpoint.checkpoints(folder)), None))
        if start is not None:
            state = checkpoint.read(start)
            if differences := changed(settings_from_dict(state["settings"]), settings):
                raise ValueError(f"{start} is of a run with other settings: {'; '.join(differences)}")
            trainer.load(state)
            say(f"goes on after step {trainer.step} of {trainer.total_steps}, from {start}")
        if world.first:
            checkpoint.clean(folder)
            if start is None:
                checkpoint.empty(folder, ("log.jsonl", RESULT, PICTURES))
                for name in (models.FOLDER, models.BEST):
                    shutil.rmtree(folder / name, ignore_errors=True)
            checkpoint.write_json(folder / "settings.json", dataclasses.asdict(settings))
        images, weights = settings.batch_size, sum(one.numel() for one in model.parameters())
        say(f"{folder}: {trainer.total_steps:,} steps of {images:,} images, {weights:,} weights, on {world.device}")
        log = DetectionLog(
            folder if world.first else None, console, step=trainer.step, measured=trainer.measured,
            total_images=(trainer.total_steps - trainer.step) * settings.batch_size,
        )  # fmt: skip
        try:
            trainer.run(folder, log, stop)
        finally:
            log.close()
        result = _result(settings, trainer.score, model, world)
        result |= {
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "best": trainer.best,
            "best_step": trainer.best_step,
        }
        if world.first:
            models.save(model, processor, folder / models.FOLDER)
            _write(folder, result, val, trainer.predictions, settings)
            say(f"{words(trainer.score)} on {len(val)} pictures; {folder}")
    return result


def measure(settings: Settings, make_folder: MakeFolder, console: Console) -> dict[str, Any]:
    """AP of the pretrained model on the part "val", without training; result.json and predictions.png in the folder."""
    with started(settings.device) as world:
        say = say_to(console, world)
        if settings.pretrained is None:
            raise ValueError("--evaluate-only measures a trained model; name it with --pretrained")
        ids = open_part(settings, "val").ids
        val = open_part(settings, "val", models.known_classes(settings, ids))
        for note in val.notes:
            say(note)
        model, processor = models.build(settings, val.classes, say), models.processor_of(settings)
        folder = world.from_first(make_folder)
        transform = transform_of(settings, processor, training=False)
        predictions = predict(model.to(world.device), val, transform, processor, settings, world)
        score = world.from_first(lambda: average_precision(predictions, val))
        result = _result(settings, score, model, world)
        if world.first:
            _write(folder, result, val, predictions, settings)
            say(f"{words(score)} on {len(val)} pictures; {folder}")
    return result


def compare(
    settings: Settings, sides: Sequence[str], seeds: int, out: Path, resume: str | None, console: Console
) -> dict[str, Any]:
    """Trains every side ("none" or an iRPE) with the seeds 0, 1, ...; mean and deviation of AP in out/results.json.

    With resume="auto" runs that have ended are only measured, and the one that was stopped goes on.
    """
    runs = []
    for seed in range(seeds):
        for side in sides:
            one = dataclasses.replace(settings, rpe=side, seed=seed)
            console.print(f"{side}, seed {seed}", soft_wrap=True)
            runs.append(train(one, _folder_of(out, one), resume, console))
    rows = [_row(side, [one for one in runs if one["settings"]["rpe"] == side]) for side in sides]
    result = {"rows": rows, "runs": runs, "command": sys.argv[1:], "versions": _versions()}
    checkpoint.write_json(out / "results.json", result)
    return result


def _folder_of(out: Path, settings: Settings) -> MakeFolder:
    def make() -> Path:
        folder = out / f"{settings.rpe}-seed{settings.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def _row(side: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"side": side, "parameters": runs[0]["parameters"], "seeds": len(runs)}
    for name in ("AP", "AP50", "AP75"):
        values = [one["score"][name] or 0.0 for one in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
    row["seconds"] = statistics.mean(one["seconds"] for one in runs)
    return row


def make_digits(folder: Path, settings: Settings) -> Path:
    """Writes the built-in scenes as a folder in COCO's layout."""
    counts = {"train": settings.train_scenes, "val": settings.val_scenes}
    return write_scenes(folder, 0, counts, settings.digit_classes)


def _data(settings: Settings, say: Callable[[str], None]) -> tuple[Coco, Coco]:
    data = open_part(settings, "train")
    known = models.known_classes(settings, data.ids)
    if known is not None and set(data.classes) <= set(known):
        data = open_part(settings, "train", known)
    val = open_part(settings, "val", data.classes)
    for note in (*data.notes, *val.notes):
        say(note)
    return data, val


def _checkpoint(resume: str | None) -> Path:
    path = Path(resume or "")
    if path.is_dir() and (found := checkpoint.checkpoints(path)):
        return found[-1]
    if path.is_file():
        return path
    raise ValueError(f"--resume {path}: expected auto, a checkpoint, or the folder of a run with checkpoints")


def _result(settings: Settings, score: dict[str, Any], model: Any, world: World) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings), "score": score,
        "parameters": sum(one.numel() for one in model.parameters()),
        "processes": world.size, "device": str(world.device), "command": sys.argv[1:], "versions": _versions(),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    packages = ("transformers", "torchmetrics", "pycocotools", "scipy")
    return versions() | {one: importlib.metadata.version(one) for one in packages}


def _write(
    folder: Path, result: dict[str, Any], val: Coco, predictions: Sequence[Prediction], settings: Settings
) -> None:
    checkpoint.write_json(folder / RESULT, result)
    if settings.draw:
        draw(folder / PICTURES, val, predictions, count=settings.draw)


__all__ = ["compare", "default_name", "make_digits", "measure", "train"]
