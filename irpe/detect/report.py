"""What a run of irpe detect leaves for people: curves, predictions drawn on pictures, and README.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runs import report
from ..runs.files import counted, write_json, write_whole
from ..runs.logs import duration, measured_at, read_log
from .data import Coco
from .draw import draw
from .evaluation import Prediction
from .settings import Settings

PICTURES = "predictions.png"
LOSS = {"training": "train_loss"}
FIGURES = {name: f"val/{name}" for name in ("AP", "AP50", "AP75")}


def write_report(
    folder: Path, result: dict[str, Any], val: Coco, predictions: Sequence[Prediction], settings: Settings,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Writes result.json, predictions.png, curves.png and README.md into a run's folder."""
    pictures = write_result(folder, result, val, predictions, settings)
    lines = read_log(folder)
    if settings.plots:
        curves = report.draw_curves(folder / report.CURVES, lines, LOSS, FIGURES, "average precision in percent")
        pictures.insert(0, curves)
    text = card(result, [path.name for path in pictures])
    for path in (*pictures, write_whole(folder / report.CARD, lambda file: file.write(text.encode()))):
        say(str(path))


def write_result(
    folder: Path, result: dict[str, Any], val: Coco, predictions: Sequence[Prediction], settings: Settings
) -> list[Path]:
    """Writes result.json and, unless --draw is 0, predictions.png; the pictures."""
    write_json(folder / report.RESULT, result)
    return [draw(folder / PICTURES, val, predictions, count=settings.draw)] if settings.draw else []


def scores(folder: Path, best_step: int, step: int) -> dict[str, Any]:
    """What was measured of the best and of the last weights, as the log of a run has it."""
    keep = ("step", "epoch", "train_loss", "val")
    lines = {"best": measured_at(folder, best_step), "last": measured_at(folder, step)}
    return {name: {key: line[key] for key in keep} for name, line in lines.items()}


def card(result: dict[str, Any], pictures: list[str]) -> str:
    """The text of README.md in a run's folder."""
    settings = result["settings"]
    model = settings["pretrained"] or settings["model"]
    facts = {
        "data": f"{settings['data']}, {counted(result['score']['boxes'], 'box', 'boxes')} on "
        + counted(result["score"]["images"], "picture", "pictures"),
        "model": f"DETR, {model}, {result['parameters']:,} parameters",
        "encoding": settings["rpe"] or "as the pretrained model has it",
        "recipe": f"{settings['recipe']}, {counted(settings['epochs'], 'epoch', 'epochs')}, "
        + counted(result["steps"], "step", "steps"),
        "batch": f"{settings['batch_size']} images, {result['processes']} process(es) on {result['device']}",
        "training": duration(result["seconds"]),
    }
    names = list(FIGURES)
    table = [f"| weights | step | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for title in ("best", "last"):
        found = result[title]["val"]
        figures = ["-" if found[name] is None else f"{found[name]:.2f}" for name in names]
        table.append(f"| {title} | {result[title]['step']:,} | {' | '.join(figures)} |")
    titles = {
        report.CURVES: "Loss and average precision over epochs",
        PICTURES: "Boxes found, and those there (dashed)",
    }
    files = (
        "`best` and `model` (the last) hold weights, configuration with the encodings, and image processor.",
        "`log.jsonl` has a line for each measured epoch and for some steps, `result.json` the figures above.",
    )
    use = (
        "    irpe predict THIS_FOLDER picture.jpg", "", "or in Python", "",
        "    import irpe", '    found = irpe.load("THIS_FOLDER").predict("picture.jpg")', "",
        "gives the boxes (x, y, x, y) in pixels of the picture as it is displayed, of the best weights.",
    )  # fmt: skip
    return report.card(
        f"DETR on {Path(settings['data']).name}", facts, table, {name: titles[name] for name in pictures}, files,
        settings, result["versions"], ", `irpe detect OTHER --pretrained THIS_FOLDER/best --evaluate-only`", use,
    )  # fmt: skip
