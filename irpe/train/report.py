"""What a run of irpe train leaves for people: curves, pictures of the encodings, and README.md."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from .. import viz
from ..encodings import Encodings, learned
from ..runs import report
from ..runs.files import counted, read_json, write_json, write_whole
from ..runs.folder import SETTINGS
from ..runs.logs import duration, read_log
from . import confusion
from .loader import Shape, Transform
from .settings import Settings, settings_from_dict

ENCODINGS = "encodings.png"
LOSS = {"training": "train_loss", "evaluation": "val/loss"}
FIGURES = {"top-1": "val/top1", "top-5": "val/top5", "top-1 of the average": "ema/top1"}


def write_report(folder: Path, model: nn.Module | None, val: Any, say: Callable[[str], None]) -> None:
    """Writes curves.png, confusion.png, encodings.png of encodings on keys, result.json and README.md of a run."""
    record = read_json(folder / SETTINGS)
    lines = read_log(folder)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    best = max(epochs, key=lambda line: (line["val"]["top1"], -line["val"]["loss"]))
    result = {
        "epochs": epochs[-1]["epoch"], "step": epochs[-1]["step"], "last": _scores(epochs[-1]), "best": _scores(best),
        "seconds": epochs[-1]["seconds"],
    }  # fmt: skip
    write_json(folder / report.RESULT, result)
    paths = []
    if record["settings"]["plots"]:
        paths.append(report.draw_curves(folder / report.CURVES, lines, LOSS, FIGURES, "right answers in percent"))
        if model is not None and not isinstance(val, IterableDataset):
            found = encodings(model, settings_from_dict(record["settings"]), Shape(**record["shape"]), val)
            if found is not None:
                paths.append(viz.draw_encodings(folder / ENCODINGS, found))
        pairs = confusion.read(folder, result["step"])
        if pairs is not None:
            paths.insert(1, confusion.draw(folder / confusion.PICTURE, pairs, record["classes"]))
    text = card(record, result, [path.name for path in paths])
    paths.append(write_whole(folder / report.CARD, lambda file: file.write(text.encode())))
    for path in paths:
        say(str(path))


def _scores(line: dict[str, Any]) -> dict[str, Any]:
    keep = ("loss", "top1", "top5", "images", "bad")
    parts: dict[str, Any] = {name: {key: line[name][key] for key in keep} for name in ("val", "ema") if name in line}
    return {"epoch": line["epoch"], "train_loss": line["train_loss"], **parts}


def encodings(
    model: nn.Module, settings: Settings, shape: Shape, source: Any, examples: int = 5, count: int = 32
) -> Encodings | None:
    """What the encodings on keys have learned, by `count` images of a source, of which some are shown; or None."""
    transform = Transform(shape, settings.interpolation)
    images = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            images.append(transform(source[int(index)][0]))
        except Exception:  # unreadable ones were named when the model was measured
            continue
    if not images:
        return None
    batch = torch.stack(images)
    grey = batch.mean(1)  # (B, height, width)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    drawn = 1 - (grey - low) / (high - low).clamp(min=1e-6)  # on white, which is 0
    shown = np.linspace(0, len(images) - 1, min(examples, len(images))).astype(int).tolist()
    return learned(model, batch, drawn, shown, settings.rpe)


def card(record: dict[str, Any], result: dict[str, Any], pictures: list[str]) -> str:
    """The text of README.md in a run's folder."""
    settings, shape, last, best = record["settings"], record["shape"], result["last"], result["best"]
    height, width = shape["size"]
    facts = {
        "data": f"{settings['data']}, {counted(len(record['classes']), 'class', 'classes')}",
        "model": f"{settings['model']}, {record['parameters']:,} parameters, images of {height}x{width}",
        "encoding": settings["rpe"],
        "started from": settings["pretrained"] or "random weights",
        "recipe": f"{settings['recipe']}, {result['epochs']} of "
        + f"{counted(settings['epochs'], 'epoch', 'epochs')}, {counted(result['step'], 'step', 'steps')}",
        "batch": f"{settings['batch_size']} images, {record['processes']} process(es) on {record['device']}",
        **{f"optimizer: {name}": words for name, words in record["parameter_groups"].items()},
        "training": duration(result["seconds"]),
    }

    def line(name: str, epoch: dict[str, Any], part: str) -> str:
        score = epoch[part]
        bad = f", {score['bad']} unreadable left out" if score["bad"] else ""
        figures = (epoch["epoch"], f"{score['loss']:.4f}", f"{score['top1']:.2f}", f"{score['top5']:.2f}")
        return f"| {name} | {' | '.join(map(str, figures))} | {score['images']:,}{bad} |"

    scores = ["| weights | epoch | loss | top-1 | top-5 | images |", "|---|---|---|---|---|---|"]
    scores += [line("best", best, "val"), line("last", last, "val")]
    if "ema" in last:
        scores.append(line("last, moving average", last, "ema"))
    titles = {
        report.CURVES: "Loss and accuracy over epochs",
        confusion.PICTURE: "What each class is taken for, by the last weights",
        ENCODINGS: "What the learned encodings add to attention scores",
    }
    files = (
        "`best.safetensors`, `model.safetensors` (the last) and `ema.safetensors` (the average, if there is one)",
        "are state dicts; `settings.json` has all that builds the model; `log.jsonl` has a line for each epoch",
        "and for some steps; `confusion.json` counts the images of each class and guess, by the last weights.",
    )
    use = (
        "    irpe predict THIS_FOLDER picture.jpg", "", "or in Python", "",
        "    import irpe", '    found = irpe.load("THIS_FOLDER").predict("picture.jpg")', "",
        f"A picture is resized to cover {_covered(shape)}, the middle of {height}x{width} pixels is cut out",
        f"(crop_pct {shape['crop_pct']:g}), and the model sees (pixels in [0, 1] - mean) / std of settings.json.",
    )  # fmt: skip
    return report.card(
        f"{settings['model']} on {Path(settings['data']).name}", facts, scores,
        {name: titles[name] for name in pictures}, files, settings, record["versions"],
        ", `irpe evaluate THIS_FOLDER --data OTHER`", use,
    )  # fmt: skip


def _covered(shape: dict[str, Any]) -> str:
    """height x width that a picture covers before the middle is cut out."""
    return "x".join(str(math.floor(side / shape["crop_pct"])) for side in shape["size"])
