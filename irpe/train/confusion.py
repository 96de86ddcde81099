"""Which classes a classifier takes for which: counts of (class, guess), in JSON, in sentences and in a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..runs.files import as_json, printable, read_json, write_whole
from ..viz import plain_text

FILE, PICTURE = "confusion.json", "confusion.png"
Pairs = Mapping[tuple[int, int], int]  # (number of the class, of the guess): images; those that there are
_SHOWN = 30  # classes of the picture
_NUMBERS = 15  # up to so many have numbers in their cells


class Confusion(NamedTuple):
    """Images of a class that are taken for another one, of all of that class."""

    name: str
    guess: str
    images: int
    of: int

    @property
    def percent(self) -> float:
        return 100 * self.images / self.of


def confusions(pairs: Pairs, classes: Sequence[str], count: int = 5) -> list[Confusion]:
    """The most frequent ones, in images; of equal ones in the order of the classes."""
    whole = _images_of(pairs)
    wrong = sorted((-images, pair) for pair, images in pairs.items() if pair[0] != pair[1])
    return [Confusion(classes[one], classes[guess], -images, whole[one]) for images, (one, guess) in wrong[:count]]


def _images_of(pairs: Pairs) -> Counter[int]:
    """{class: its images}"""
    found = Counter[int]()
    for (one, _), images in pairs.items():
        found[one] += images
    return found


def plain(pairs: Pairs, classes: Sequence[str]) -> dict[str, Any]:
    """For JSON: the classes, and [number of the class, number of the guess, images] where there are any."""
    return {"classes": list(classes), "counts": [[*pair, images] for pair, images in sorted(pairs.items())]}


def write(folder: Path, pairs: Pairs, classes: Sequence[str], step: int) -> None:
    """Writes confusion.json, of the weights after a step."""
    data = as_json(
        {"step": step, **plain(pairs, classes)}
    )  # in a line: of 1,000 classes there may be as many as images
    write_whole(folder / FILE, lambda file: file.write(data))


def read(folder: Path, step: int) -> Pairs | None:
    """What was written of the weights after a step; None where there is no such file, or one of something else."""
    try:
        values = read_json(folder / FILE)
        found = {(int(one), int(guess)): int(images) for one, guess, images in values["counts"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if values.get("step") == step else None


@plain_text()
def draw(path: Path, pairs: Pairs, classes: Sequence[str]) -> Path:
    """Writes a PNG: a row for each class, a column for each guess, in percent of the images of the row's class.

    Of more than 30 classes it shows those that are confused most.
    """
    whole, shown = _images_of(pairs), _most_confused(pairs, len(classes))
    at = {number: k for k, number in enumerate(shown)}
    cells = np.zeros((len(shown), len(shown)))
    for (one, guess), images in pairs.items():
        if one in at and guess in at:
            cells[at[one], at[guess]] = 100 * images / whole[one]
    side = 2.2 + 0.32 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), dpi=130, layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(cells, cmap="Blues", vmin=0, vmax=100)
    names = [printable(classes[number])[:24] for number in shown]
    ax.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    ax.set_yticks(range(len(shown)), names, fontsize=8)
    ax.set_xlabel("guess")
    ax.set_ylabel("class")
    if len(shown) < len(classes):
        ax.set_title(f"the {len(shown)} of {len(classes):,} classes that are confused most", fontsize=10)
    for (row, column), percent in np.ndenumerate(cells) if len(shown) <= _NUMBERS else ():
        if percent:
            color = "white" if percent > 55 else "black"
            ax.text(column, row, f"{percent:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(image, shrink=0.7, label="percent of the images of a class")
    figure.savefig(path)
    return path


def _most_confused(pairs: Pairs, count: int) -> list[int]:
    """Numbers of classes, in their order: all of few, of many those of the most frequent confusions."""
    if count <= _SHOWN:
        return list(range(count))
    found: dict[int, None] = {}
    for _, pair in sorted((-images, pair) for pair, images in pairs.items() if pair[0] != pair[1]):
        if len(found.keys() | set(pair)) <= _SHOWN:
            found |= dict.fromkeys(pair)
    return sorted(found)
