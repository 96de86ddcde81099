"""What a run of irpe detect leaves for people: curves, predictions drawn on pictures, and README.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runs import report
from ..runs.files import write_json, write_whole
from ..runs.logs import epochs_of, read_log
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
    text = card(result, epochs_of(lines), [path.name for path in pictures])
    for path in (*pictures, write_whole(folder / report.CARD, lambda file: file.write(text.encode()))):
        say(str(path))


def write_result(
    folder: Path, result: dict[str, Any], val: Coco, predictions: Sequence[Prediction], settings: Settings
) -> list[Path]:
    """Writes result.json and, unless --draw is 0, predictions.png; the pictures."""
    write_json(folder / report.RESULT, result)
    return [draw(folder / PICTURES, val, predictions, count=settings.draw)] if settings.draw else []


def card(result: dict[str, Any], epochs: Sequence[dict[str, Any]], pictures: list[str]) -> str:
    """The text of README.md in a run's folder."""
    settings = result["settings"]
    model = settings["pretrained"] or settings["model"]
    facts = {
        "data": f"{settings['data']}, {result['score']['boxes']:,} boxes on {result['score']['images']:,} pictures",
        "model": f"DETR, {model}, {result['parameters']:,} parameters",
        "encoding": settings["rpe"] or "as the pretrained model has it",
        "recipe": f"{settings['recipe']}, {settings['epochs']} epochs, {result['steps']:,} steps",
        "batch": f"{settings['batch_size']} images, {result['processes']} process(es) on {result['device']}",
        "training": report.duration(result["seconds"]),
    }
    best = next((line for line in epochs if line["step"] == result["best_step"]), epochs[-1])
    names = list(FIGURES)
    scores = [f"| weights | step | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for title, step, score in (("best", best["step"], best["val"]), ("last", result["steps"], result["score"])):
        figures = ["-" if score[name] is None else f"{score[name]:.2f}" for name in names]
        scores.append(f"| {title} | {step:,} | {' | '.join(figures)} |")
    titles = {
        report.CURVES: "Loss and average precision over epochs",
        PICTURES: "Boxes found, and those there (dashed)",
    }
    files = (
        "`best` and `model` (the last) hold weights, configuration and image processor, as `save_pretrained` writes",
        "them; `irpe.detect.model.load` reads them with their tables. `log.jsonl` has a line for each measured epoch",
        "and for some steps.",
    )
    return report.card(
        f"DETR on {Path(settings['data']).name}", facts, scores, {name: titles[name] for name in pictures}, files,
        settings, result["versions"], ", `irpe detect OTHER --pretrained THIS_FOLDER/best --evaluate-only`",
    )  # fmt: skip
