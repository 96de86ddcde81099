"""The picture of `irpe show RUN --image`: on a picture, attention without and with encodings, and what they add."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .attention_maps import AttentionMaps, Row
from .viz import _bare, _save, plain_text

_MARK = "#ff2fa0"  # around the query: in neither color scale
_CELL = 2.15  # inches
_ROUNDING = 1e-5  # smaller ones are nothing


class _Panel(NamedTuple):
    """A column: its title, what it shows of a row, (L,), and the words of its color bar, which equal ones share."""

    title: str
    values: Callable[[Row], np.ndarray | None]
    bar: str


_ATTENTION, _CHANGE = "attention in %", "change in points of %"
_SCORES, _VALUES = "added to the score, mean 0", "attention in % x length"
_PANELS = (
    _Panel("attention without iRPE", lambda row: 100 * row.without, _ATTENTION),
    _Panel("attention with iRPE", lambda row: 100 * row.weights, _ATTENTION),
    _Panel("change", lambda row: 100 * (row.weights - row.without), _CHANGE),
    _Panel("added on keys", lambda row: row.on_keys, _SCORES),
    _Panel("added on queries", lambda row: row.on_queries, _SCORES),
    _Panel("added on values", lambda row: None if row.on_values is None else 100 * row.on_values, _VALUES),
)
Drawn = tuple[Axes, _Panel, np.ndarray]


@plain_text()
def draw_attention(path: Path, maps: AttentionMaps, pixels: np.ndarray, title: str) -> Path:
    """A row for the query and one for the class token; a column for the picture, and for each panel that there is.

    Args:
        path: of the PNG to write; its folder is made.
        maps: of `attention_maps`.
        pixels: (height, width, 3) in [0, 1], what the model saw, in colors.
    """
    rows = [maps.query, *([] if maps.class_token is None else [maps.class_token])]
    panels = [panel for panel in _PANELS if panel.values(maps.query) is not None]
    tall = _CELL * min(2.0, max(0.4, pixels.shape[0] / pixels.shape[1]))
    size = (_CELL * (1 + len(panels)) + 0.5, (tall + 1.05) * len(rows) + (0.75 if maps.note else 0.4))
    figure = Figure(figsize=size, dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.03, hspace=0.0))
    figure.suptitle(f"{title}: block {maps.block} of {maps.blocks}, head {maps.head} of {maps.heads}", fontsize=12)
    grid = figure.add_gridspec(2 * len(rows), 1 + len(panels), height_ratios=[tall, 0.09] * len(rows))
    for number, row in enumerate(rows):
        asks = row is maps.query
        first, *axes = (figure.add_subplot(grid[2 * number, column]) for column in range(1 + len(panels)))
        first.imshow(pixels, extent=_extent(pixels))
        _bare(first)
        first.set_title(f"query: row {maps.at[0]}, column {maps.at[1]}" if asks else "class token", fontsize=10)
        first.set_xlabel(f"{100 * row.moved:.1f} % goes to other keys", fontsize=8.5)
        for ax in (first, *axes) if asks else ():
            _mark(ax, maps, pixels)
        drawn = [(ax, panel, _on_map(panel, row, maps)) for ax, panel in zip(axes, panels, strict=True)]
        for bar in dict.fromkeys(panel.bar for panel in panels):
            group = [part for part in drawn if part[1].bar == bar]
            at = [1 + panels.index(panel) for _, panel, _ in group]
            _draw_group(figure, group, row, maps, pixels, grid[2 * number + 1, at[0] : at[-1] + 1])
    if maps.note:
        figure.supxlabel(fill(maps.note, int(13 * size[0])), fontsize=9.5)
    return _save(figure, path)


def _on_map(panel: _Panel, row: Row, maps: AttentionMaps) -> np.ndarray:
    """(h, w): what a panel shows; of what is added to scores the difference from its mean, which softmax sees."""
    values = panel.values(row)
    assert values is not None
    shown = maps.map(values)
    return shown - np.nanmean(shown) if panel.bar == _SCORES else shown


def _draw_group(
    figure: Figure, group: list[Drawn], row: Row, maps: AttentionMaps, pixels: np.ndarray, place: Any
) -> None:
    """Panels of one color bar, and the bar below them where there is anything to see."""
    bar = group[0][1].bar
    least = 50 * _ROUNDING if bar == _CHANGE else _ROUNDING
    largest = max(float(np.nanmax(np.abs(values))) for _, _, values in group)
    limit, signed = largest if largest > least else 1.0, bar in (_SCORES, _CHANGE)
    shades = ScalarMappable(Normalize(-limit if signed else 0.0, limit), "RdBu_r" if signed else "viridis")
    for ax, panel, values in group:
        _overlay(ax, pixels, shades, values / limit, signed)
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel(_below(panel, row, maps), fontsize=8.5)
        if np.nanmax(np.abs(values)) <= least:
            raw = panel.values(row)
            same = bar == _SCORES and raw is not None and np.nanmax(np.abs(maps.map(raw))) > _ROUNDING
            ax.text(
                0.5, 0.1, "the same for all keys" if same else "nothing", transform=ax.transAxes, ha="center",
                va="center", fontsize=8.5, color="0.2", bbox=dict(boxstyle="round", fc="white", ec="none", alpha=0.85),
            )  # fmt: skip
    if largest > least:
        legend = figure.colorbar(
            shades, cax=figure.add_subplot(place), orientation="horizontal", ticks=MaxNLocator(3 + len(group))
        )
        legend.set_label(bar, fontsize=8.5)
        legend.ax.tick_params(labelsize=7.5)
        legend.outline.set_visible(False)


def _below(panel: _Panel, row: Row, maps: AttentionMaps) -> str:
    """What a panel cannot show: the tokens in front of the map, and the length of all that is added to values."""
    if panel.bar == _VALUES:
        return f"together {100 * row.share:.1f} % of the values"
    values = panel.values(row)
    if panel.bar != _ATTENTION or not maps.skip or values is None:
        return ""
    return f"{'class token' if maps.skip == 1 else f'{maps.skip} tokens in front'}: {values[: maps.skip].sum():.1f} %"


def _extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    return 0.0, float(pixels.shape[1]), float(pixels.shape[0]), 0.0


def _overlay(ax: Axes, pixels: np.ndarray, shades: ScalarMappable, values: np.ndarray, signed: bool) -> None:
    """The map, -1 to 1 or 0 to 1, on the picture in pale colors, which is seen where values are small or nan."""
    ax.imshow(0.35 + 0.65 * (0.5 * pixels + 0.5 * pixels.mean(-1, keepdims=True)), extent=_extent(pixels))
    colors = colormaps["RdBu_r" if signed else "viridis"]((values + 1) / 2 if signed else values)
    colors[..., 3] = np.where(np.isnan(values), 0.0, 0.2 + 0.6 * np.sqrt(np.abs(values)))
    ax.imshow(colors, extent=_extent(pixels), interpolation="nearest")
    _bare(ax)


def _mark(ax: Axes, maps: AttentionMaps, pixels: np.ndarray) -> None:
    """A box around the token that asks."""
    high, wide = pixels.shape[0] / maps.size[0], pixels.shape[1] / maps.size[1]
    for color, width in (("white", 3.2), (_MARK, 1.7)):
        place = (maps.at[1] * wide, maps.at[0] * high)
        ax.add_patch(Rectangle(place, wide, high, fill=False, ec=color, lw=width, clip_on=False, zorder=5))


__all__ = ["draw_attention"]
