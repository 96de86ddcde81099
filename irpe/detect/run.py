"""`irpe detect` from end to end, in every process of a run."""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from ..runs.files import counted, write_json
from ..runs.folder import SAVED, SETTINGS, TRACKERS, Kind, check_names, check_results, is_run, locked
from ..runs.process import MakeFolder, Say, fitted, say_to, signals, start_of, versions, writing
from ..runs.report import CARD, CURVES, RESULT
from ..runs.trackers import check_packages
from ..runs.world import World, started
from . import model as models
from .batches import transform_of
from .data import Coco, named, open_part, turned
from .evaluation import average_precision, predict, words
from .loop import Trainer
from .report import PICTURES, scores, write_report, write_result
from .saved import save
from .scenes import write as write_scenes
from .settings import Settings, is_record, settings_from_dict

RESULTS = "results.json"
_PACKAGES = ("transformers", "torchmetrics", "pycocotools", "scipy")  # whose versions are told
_KEYS = {"settings", "score", "parameters", "versions"}
KIND = Kind(
    "irpe detect",
    files=(SETTINGS, "log.jsonl", TRACKERS, RESULT, PICTURES, CURVES, CARD),
    results=(RESULT, PICTURES, models.FOLDER, models.BEST),
    is_ours=is_record,
    settings_from=settings_from_dict,
    recorded=settings_from_dict,
    folders={models.FOLDER: SAVED, models.BEST: SAVED},
    signed={CARD: "Made with irpe "},
)


def default_name(settings: Settings) -> str:
    """The name of a run's folder: data, model, encoding, seed."""
    model = settings.model if settings.pretrained is None else run_of(settings) or Path(settings.pretrained).stem
    parts = ["detect", Path(settings.data).name, model, settings.rpe]
    parts += ["no-positions" if settings.positions == "none" else None, f"seed{settings.seed}"]
    return "-".join(part for part in parts if part and part != "none")


def run_of(settings: Settings) -> str | None:
    """The name of the run whose weights --pretrained names, such as NAME of runs/NAME/best; None for other weights."""
    place = Path(settings.pretrained or "")
    own = place.name in KIND.folders and is_run(place.resolve().parent, KIND)
    return place.resolve().parent.name if own else None


def train(settings: Settings, make_folder: MakeFolder, resume: str | None, console: Console) -> dict[str, Any]:
    """Trains, measures and writes everything into the run's folder; returns what is in its result.json.

    The folder has the last weights in `model` and the best in `best` (both as `save_pretrained` writes them),
    checkpoints, log.jsonl, result.json, predictions.png, curves.png and README.md.

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
        data, val = _data(settings, say)
        settings = fitted(settings, len(data), world, say)
        start = start_of(resume, settings, KIND)
        model, processor = models.build(settings, data.classes, say), models.processor_of(settings)
        if world.first:
            _say_notes((data, val), model, settings, say)
        trainer = Trainer(settings, data, val, model, processor, world)
        sources = (settings.pretrained, settings.backbone)
        with writing(trainer, KIND, start, make_folder, dataclasses.asdict(settings), say, sources) as folder:
            trainer.run(folder, console, stop)
            progress = trainer.progress
            result = _result(settings, progress.score, model, world)
            result |= {"steps": progress.step, "seconds": progress.seconds, "best_step": progress.best_step}
            if world.first:
                result |= scores(folder, progress.best_step, progress.step)
                save(model, processor, folder / models.FOLDER)
                write_report(folder, result, val, trainer.predictions, settings, say)
                say(f"{words(progress.score)} on {counted(len(val), 'picture', 'pictures')}; {folder}")
    return result


def measure(settings: Settings, make_folder: MakeFolder, console: Console) -> dict[str, Any]:
    """AP of the pretrained model on the part "val", without training; result.json and predictions.png in the folder."""
    with started(settings.device) as world:
        say = say_to(console, world)
        if settings.pretrained is None:
            raise ValueError("--evaluate-only measures a trained model; name it with --pretrained")
        val = open_part(settings, "val", models.known_classes(settings))
        of_data, of_model = _counts(val)
        say(f"{of_data} to evaluate on, {of_model}")
        model, processor = models.build(settings, val.classes, say), models.processor_of(settings)
        if world.first:
            _say_notes((val,), model, settings, say)
        folder = world.from_first(make_folder)
        with ExitStack() as held:
            world.from_first(lambda: held.enter_context(locked(folder)))
            world.from_first(lambda: _check_measured(folder))
            transform = transform_of(settings, processor, training=False)
            predictions = predict(model.to(world.device), val, transform, processor, settings, world)
            score = world.from_first(lambda: average_precision(predictions, val))
            result = _result(settings, score, model, world)
            if world.first:
                write_result(folder, result, val, predictions, settings)
                say(f"{words(score)} on {counted(len(val), 'picture', 'pictures')}; {folder}")
    return result


def _check_measured(folder: Path) -> None:
    """Refuses a folder that --overwrite names and that is not of a measurement: a run's result is of its training."""
    check_names(folder, KIND)
    if (folder / SETTINGS).exists():
        raise ValueError(f"{folder} is the folder of a run, whose result would be replaced; use another --name")
    check_results(folder, RESULT, _KEYS, "irpe detect --evaluate-only")


def compare(
    settings: Settings, sides: Sequence[str], seeds: int, out: Path, resume: str | None, console: Console
) -> dict[str, Any]:
    """Trains every side ("none" or an iRPE) with the seeds 0, 1, ...; mean and deviation of AP in out/results.json.

    With resume="auto" runs that have ended are only measured, and the one that was stopped goes on.
    """
    check_several(out)
    runs = []
    for seed in range(seeds):
        for side in sides:
            own = dataclasses.replace(settings, rpe=side, seed=seed)
            console.print(f"{side}, seed {seed}", soft_wrap=True)
            runs.append(train(own, _folder_of(out, own), resume, console))
    rows = [_row(side, [run for run in runs if run["settings"]["rpe"] == side]) for side in sides]
    result = {"rows": rows, "runs": runs, "command": sys.argv[1:], "versions": versions(*_PACKAGES)}
    write_json(out / RESULTS, result)
    return result


def check_several(out: Path) -> None:
    """Refuses a folder for several runs that has a results.json of something else.

    Raises:
        ValueError: it has one; each run looks at its own folder.
    """
    if (path := out / RESULTS).exists() or path.is_symlink():
        check_results(out, RESULTS, {"rows", "runs", "command", "versions"}, "irpe detect without DATA")


def _folder_of(out: Path, settings: Settings) -> MakeFolder:
    def make() -> Path:
        folder = out / f"{settings.rpe}-seed{settings.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def _row(side: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"side": side, "parameters": runs[0]["parameters"], "seeds": len(runs)}
    for name in ("AP", "AP50", "AP75"):
        values = [run["score"][name] or 0.0 for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
    row["seconds"] = statistics.mean(run["seconds"] for run in runs)
    return row


def make_digits(folder: Path, settings: Settings) -> Path:
    """Writes the built-in scenes as a folder in COCO's layout."""
    counts = {"train": settings.train_scenes, "val": settings.val_scenes}
    return write_scenes(folder, 0, counts, settings.digit_classes)


def _data(settings: Settings, say: Say) -> tuple[Coco, Coco]:
    data = open_part(settings, "train")
    known = models.known_classes(settings)
    if known is not None and set(data.classes) <= set(named(known)):
        data = open_part(settings, "train", known)
    val = open_part(settings, "val", data.classes)
    of_data, of_model = _counts(data)
    more = f"; {of_model}" if len(data.classes) != len(data.ids) else ""
    say(f"{of_data} to train on, {len(val):,} to evaluate on{more}")
    return data, val


def _counts(data: Coco) -> tuple[str, str]:
    """What is in data, and how many classes its model has."""
    categories = counted(len(data.ids), "category", "categories")
    classes = counted(len(data.classes), "class", "classes")
    return f"{categories}, {counted(len(data), 'picture', 'pictures')}", f"{classes} of the model"


def _say_notes(parts: Sequence[Coco], model: Any, settings: Settings, say: Say) -> None:
    """What was found in the data, once, in the first process."""
    most = model.config.num_queries
    for data in parts:
        for note in (*data.notes, *turned(data, settings)):
            say(note)
        if many := sum(int((picture.crowd == 0).sum()) > most for picture in data.pictures):
            say(
                f"{data.name}: {many} of {len(data)} pictures have more boxes than the model has queries ({most}); "
                "those over are neither learned nor found"
            )


def _result(settings: Settings, score: dict[str, Any], model: Any, world: World) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings), "score": score,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "processes": world.size, "device": str(world.device), "command": sys.argv[1:], "versions": versions(*_PACKAGES),
    }  # fmt: skip
