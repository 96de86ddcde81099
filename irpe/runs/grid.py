"""A grid of pictures with their boxes: data as a model will see it. Without matplotlib's global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..viz import plain_text
from .picture import CLASS_COLORS

_LETTERS = 70  # of a row's title that are shown
_CROWD = "0.35"


class Box(NamedTuple):
    """left, top, right, bottom as shares of width and height; the number of the class gives the colour."""

    corners: tuple[float, float, float, float]
    label: str
    number: int
    crowd: bool = False


class Panel(NamedTuple):
    """A picture (height, width) or (height, width, 3) with numbers of 0 to 1, what is drawn on it and written above."""

    image: np.ndarray
    boxes: Sequence[Box] = ()
    title: str = ""


class Row(NamedTuple):
    """The panels of one picture, and what stands above the first of them."""

    title: str
    panels: Sequence[Panel]


def short(words: str, letters: int) -> str:
    """The words, or so many letters of them."""
    return words if len(words) <= letters else f"{words[: letters - 1]}…"


@plain_text()
def draw_grid(path: Path, columns: Sequence[str], rows: Sequence[Row], title: str, *, side: float = 1.5) -> Path:
    """Writes a PNG with a row of panels for each picture, under the names of the columns.

    Args:
        side: height of a panel, in inches.
    """
    shapes = [panel.image.shape[:2] for row in rows for panel in row.panels]
    form = float(np.clip(np.median([width / height for height, width in shapes]), 0.6, 1.8))
    size = (side * form * len(columns) + 0.3, (side + 0.3) * len(rows) + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=9.5, x=0.012, ha="left", color="0.25")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax in line:
            ax.set_axis_off()
            ax.set_anchor("N")  # titles and panels of a row begin at one height, whatever their shapes
        for ax, panel in zip(line, row.panels, strict=False):
            _draw_panel(ax, panel)
        line[0].set_anchor("NW")
        line[0].set_title(short(row.title, _LETTERS), fontsize=8, loc="left", pad=3, fontweight="bold")
    for ax, words in zip(axes[0], columns, strict=True):
        ax.annotate(
            words, (0.5, 1), (0, 17), xycoords="axes fraction", textcoords="offset points", ha="center", va="bottom",
            fontsize=9, color="0.25",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_panel(ax: Axes, panel: Panel) -> None:
    height, width = panel.image.shape[:2]
    how: dict[str, Any] = dict(interpolation="nearest" if max(height, width) < 64 else "antialiased")
    ax.imshow(panel.image, cmap="gray", vmin=0, vmax=1, **how)
    if panel.title:
        ax.set_title(panel.title, fontsize=6.5, pad=3, color="0.25")
    for box in panel.boxes:
        color = _CROWD if box.crowd else CLASS_COLORS[box.number % len(CLASS_COLORS)]
        left, right = (box.corners[k] * width - 0.5 for k in (0, 2))
        top, bottom = (box.corners[k] * height - 0.5 for k in (1, 3))
        style = "--" if box.crowd else "-"
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, lw=1.4, ls=style))
        frame = dict(facecolor=color, edgecolor="none", pad=0.8)
        words = short(box.label, 16)
        ax.text(left, top, words, color="white", fontsize=6.5, va="top", bbox=frame, clip_on=True)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
