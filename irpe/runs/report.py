"""What a run leaves for people: curves, and the text of README.md."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .. import viz
from .logs import epochs_of

RESULT, CURVES, CARD = "result.json", "curves.png", "README.md"
_GREY, _ORANGE, _BLUE, _PURPLE, _GREEN, _BROWN = viz.COLORS
_OF_LOSS, _OF_FIGURES = (_GREY, _BLUE), (_BLUE, _GREEN, _ORANGE, _PURPLE, _BROWN)


def draw_curves(
    path: Path, lines: Sequence[dict[str, Any]], loss: Mapping[str, str], figures: Mapping[str, str], words: str
) -> Path:
    """Loss (left) and what was measured (right) over epochs, as the lines of a log have them.

    Args:
        loss, figures: title of each curve, and where it is in the line of an epoch: "train_loss", "val/top1". A curve
            that not every epoch has is left out.
        words: at the axis of what was measured.
    """
    epochs = epochs_of(lines)
    numbers = [line["epoch"] for line in epochs]
    panels = []
    for label, places, colors in (("loss", loss, _OF_LOSS), (words, figures, _OF_FIGURES)):
        curves = []
        for (title, place), color in zip(places.items(), cycle(colors), strict=False):
            values = [_at(line, place) for line in epochs]
            if None not in values:
                curves.append(viz.Curve(title, numbers, np.array([values]), color))
        panels.append(viz.Panel(label, curves))
    return viz.draw_panels(path, panels)


def _at(line: dict[str, Any], place: str) -> Any:
    value: Any = line
    for name in place.split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def card(
    title: str,
    facts: Mapping[str, str],
    scores: Sequence[str],
    pictures: Mapping[str, str],
    files: Sequence[str],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    how: str = "",
    use: Sequence[str] = (),
) -> str:
    """The text of README.md: facts and scores (lines of a table), pictures {file: title}, files, settings.

    Args:
        how: an honest figure is measured.
        use: lines on how the model is used.
    """
    return "\n".join(
        [
            f"# {title}", "",
            "| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in facts.items()), "",
            "Measured on the part of the data that was not trained on. `best` was chosen by these very numbers: an",
            f"honest figure for it needs images that had no say{how}.", "",
            *scores, "",
            *(f"![{words}]({name})\n" for name, words in pictures.items()),
            *(["## Use", "", *use, ""] if use else []),
            "## Files", "", *files, "",
            "## Settings", "", *(f"    {name} = {value}" for name, value in settings.items()), "",
            "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", "",
        ]
    )  # fmt: skip
