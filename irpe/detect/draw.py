"""Predictions drawn on pictures. Without matplotlib's global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..runs.files import printable
from ..runs.picture import CLASS_COLORS
from ..viz import plain_text
from .data import Coco
from .evaluation import Prediction


@plain_text()
def draw(path: Path, data: Coco, predictions: Sequence[Prediction], *, count: int = 8, threshold: float = 0.5) -> Path:
    """Writes a PNG with the first `count` pictures: what is there dashed, what was found in the colour of its class.

    Args:
        threshold: least score of a prediction that is drawn.
    """
    count = min(count, len(data))
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for number in range(count):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(data.image(number))
        axes.set_axis_off()
        picture, found = data.pictures[number], predictions[number]
        for x, y, right, bottom in picture.boxes.tolist():
            outline: dict[str, Any] = dict(fill=False, edgecolor="white", linewidth=1.0, linestyle="--")
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), right - x, bottom - y, **outline))
        for box, score, label in zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        ):
            if score < threshold:
                continue
            x, y, right, bottom = box
            color = CLASS_COLORS[label % len(CLASS_COLORS)]
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), right - x, bottom - y, fill=False, edgecolor=color, linewidth=1.8)
            )
            words = f"{printable(data.classes[label])} {score:.2f}"
            axes.text(x, max(0, y - 1), words, color="white", fontsize=7, backgroundcolor=color, va="bottom")
        if not (found["scores"] >= threshold).any():
            axes.text(
                2, 2, f"nothing found over {threshold:g}", color="white", fontsize=8, backgroundcolor="0.3", va="top"
            )
        axes.set_xlim(-0.5, picture.width - 0.5)
        axes.set_ylim(picture.height - 0.5, -0.5)
    figure.savefig(path, dpi=120)
    return path
