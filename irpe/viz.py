"""Pictures: bucket maps, learned encodings, accuracy curves. Without matplotlib's global state."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from .encodings import Encodings
from .viz_maps import RATIOS, BucketMap, bucket_maps, query_on

_SKIP_COLOR = (0.62, 0.62, 0.62)
COLORS = ("#7f7f7f", "#d95f02", "#1b6ca8", "#6a3d9a", "#1b9e77", "#a6761d")  # of curves


@contextmanager
def plain_text() -> Iterator[None]:
    """While the block runs, `$` in a text is a dollar, and letters that the font lacks are no warning.

    Names of classes and of runs are no mathematics.
    """
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _borders(ax: Axes, ids: Tensor) -> None:
    """A thin line wherever two neighbouring cells are in different buckets."""
    rows, columns = np.nonzero((ids[1:] != ids[:-1]).numpy())
    lines = [[(c - 0.5, r + 0.5), (c + 0.5, r + 0.5)] for r, c in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero((ids[:, 1:] != ids[:, :-1]).numpy())
    lines += [[(c + 0.5, r - 0.5), (c + 0.5, r + 0.5)] for r, c in zip(rows, columns, strict=True)]
    ax.add_collection(LineCollection(lines, colors="white", linewidths=0.7, capstyle="projecting"))


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_bucket_map(ax: Axes, table: BucketMap, query: tuple[int, ...] | None) -> None:
    """The buckets of all keys for one query (row, column), marked by a ring; of all offsets for None."""
    height, width = table.size
    ids = table.offsets() if query is None else table.around(query)
    center = (height - 1, width - 1) if query is None else query
    ax.imshow(table.colors(ids), interpolation="nearest")
    _borders(ax, ids)
    size = min(ax.get_window_extent().width / ids.shape[1], ax.get_window_extent().height / ids.shape[0])
    ax.plot(center[1], center[0], "o", ms=max(2.5, 0.3 * size), mfc="white", mec="black", mew=1.2)
    _bare(ax)
    if query is not None and table.skip:
        shown = min(table.skip, width)
        for k in range(shown):
            ax.add_patch(Rectangle((k - 0.5, -2.1), 0.94, 1.0, color=_SKIP_COLOR, lw=0))
        words = "skip token" if table.skip == 1 else f"{table.skip} skip tokens"
        ax.text(shown - 0.2, -1.6, f"{words}: one bucket", va="center", ha="left", fontsize=8, color="0.35")
        ax.set_ylim(height - 0.5, -2.3)


def draw_buckets(path: Path, groups: Sequence[tuple[BucketMap, ...]], query: tuple[int, int] | None = None) -> Path:
    """One column for each table: above the map around one query token, below the map of all offsets.

    Args:
        path: of the PNG to write; its folder is made.
        groups: what `bucket_maps` returned, for each method; all of one size.
        query: (row, column) of the token, near the middle when absent.
    """
    height, width = groups[0][0].size
    row, column = at = query_on((height, width), query)
    columns = [(table, group) for group in groups for table in group]
    cell = 2.7  # inches
    tall = cell * min(2.0, max(0.35, height / width))
    figure = Figure(figsize=(cell * max(2, len(columns)) + 0.4, 2 * tall + 1.5), dpi=150, layout="constrained")
    figure.suptitle(f"Buckets of image relative position encoding on a map of {height}×{width} tokens", fontsize=13)
    axes = figure.subplots(2, len(columns), squeeze=False)
    for k, (table, group) in enumerate(columns):
        draw_bucket_map(axes[0, k], table, at)
        draw_bucket_map(axes[1, k], table, None)
        axes[0, k].set_title(_heading(table, group), fontsize=10.5)
    axes[0, 0].set_ylabel(f"one query (○), at\nrow {row}, column {column}", fontsize=9.5)
    axes[1, 0].set_ylabel(f"all offsets,\n{2 * height - 1}×{2 * width - 1}", fontsize=9.5)
    return _save(figure, path)


def _heading(table: BucketMap, group: tuple[BucketMap, ...]) -> str:
    total = sum(each.used() for each in group)
    count = f"{table.used()} buckets" if len(group) == 1 else f"{table.used()} of {total} buckets"
    return f"{table.title}, ratio {table.ratio:g}\n{count}"


def draw_slices(path: Path, groups: Sequence[tuple[BucketMap, ...]], query: tuple[int, ...] | None = None) -> Path:
    """One row for each table and one column for each frame: the buckets of its tokens for one query token.

    Args:
        path: of the PNG to write; its folder is made.
        groups: what `bucket_maps` returned, for each method; all of one size.
        query: (frame, row, column) of the token, or (row, column) in the middle frame; near the middle when absent.
    """
    frames, height, width = groups[0][0].size
    at = query_on((frames, height, width), query)
    rows = [table for group in groups for table in group]
    cell = 1.25  # inches
    tall = cell * min(2.0, max(0.35, height / width))
    figure = Figure(figsize=(cell * frames + 1.2, (tall + 0.25) * len(rows) + 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"Buckets on a map of {frames}×{height}×{width} tokens, by frame, for one query (○)", fontsize=11)
    for line, table in zip(figure.subplots(len(rows), frames, squeeze=False), rows, strict=True):
        around = table.around(at)
        colors = table.colors(around)
        for frame, ax in enumerate(line):
            ax.imshow(colors[frame], interpolation="nearest")
            _borders(ax, around[frame])
            _bare(ax)
            if frame == at[0]:
                ax.plot(at[2], at[1], "o", ms=4, mfc="white", mec="black", mew=1.0)
        line[0].set_ylabel(f"{table.title},\nratio {table.ratio:g}\n{table.used()} buckets", fontsize=7.5)
    for frame, ax in enumerate(figure.axes[:frames]):
        ax.set_title(f"frame {frame}", fontsize=9)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


class Curve(NamedTuple):
    """A line over epochs: the mean of `values` (runs, points), whose range is a band where there are several runs."""

    title: str
    epochs: Sequence[int]
    values: np.ndarray
    color: str


class Panel(NamedTuple):
    """Curves in one frame; `label` stands at the vertical axis, `title` above."""

    label: str
    curves: Sequence[Curve]
    title: str = ""
    limits: tuple[float, float] | None = None


@plain_text()
def draw_panels(path: Path, panels: Sequence[Panel]) -> Path:
    """Panels side by side, with a legend in each whose curves have other titles than those before it."""
    figure = Figure(figsize=(4.6 * len(panels), 4.2), dpi=130, layout="constrained")
    told: list[str] = []
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            marker = "o" if len(curve.epochs) < 25 else None
            style: dict[str, Any] = dict(color=curve.color, label=curve.title, lw=1.8, marker=marker, ms=3)
            ax.plot(curve.epochs, curve.values.mean(0), **style)
            if len(curve.values) > 1:
                low, high = curve.values.min(0), curve.values.max(0)
                ax.fill_between(curve.epochs, low, high, color=curve.color, alpha=0.18, lw=0)
        ax.set_title(panel.title, fontsize=11)
        ax.set_xlabel("epoch")
        ax.set_ylabel(panel.label)
        ax.set_ylim(panel.limits)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if told != (told := [curve.title for curve in panel.curves]):
            ax.legend(fontsize=9, frameon=False)
    return _save(figure, path)


def draw_accuracy(path: Path, results: Sequence[dict[str, Any]], height: int) -> Path:
    """Test accuracy over epochs, one panel for each width: mean of the seeds as a line, their range as a band.

    Args:
        results: those of `irpe.demo.fit_all`, with a "title" each; one line for each title.
        height: of the canvases, in pixels, for the titles.
    """
    panels = []
    for number, width in enumerate(results[0]["accuracy"]):
        curves = []
        for color, title in zip(cycle(COLORS), dict.fromkeys(result["title"] for result in results), strict=False):
            group = [result for result in results if result["title"] == title]
            values = np.array([result["accuracy"][width] for result in group])  # (seeds, points)
            curves.append(Curve(title, group[0]["measured_at"], values, color))
        words = f"tested on {height}×{width}" + (" (the training size)" if number == 0 else "")
        panels.append(Panel("" if number else "test accuracy in percent", curves, words, (0, 100)))
    return draw_panels(path, panels)


def draw_samples(path: Path, rows: Sequence[tuple[str, Tensor]]) -> Path:
    """Sample images, one labelled row for each canvas.

    Args:
        rows: (label, images (N, height, width)), all with the same N and height.
    """
    count = len(rows[0][1])
    height, widest = rows[0][1].shape[1], max(images.shape[2] for _, images in rows)
    scale = 0.085  # inches for a pixel, the same in all rows
    size = (scale * (widest + 2) * count + 0.8, scale * (height + 2.5) * len(rows))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            border = Rectangle((-0.5, -0.5), image.shape[1], height, fill=False, ec="0.6", lw=0.8, clip_on=False)
            ax.add_patch(border)
            ax.set_xlim(-0.5, widest - 0.5)
            _bare(ax)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    return _save(figure, path)


def _draw_response(ax: Axes, values: np.ndarray, limit: float) -> Any:
    picture = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.plot((values.shape[1] - 1) / 2, (values.shape[0] - 1) / 2, "o", ms=3.5, mfc="white", mec="black", mew=0.9)
    _bare(ax)
    return picture


def _draw_query(ax: Axes, learned: Encodings, k: int) -> None:
    """The image of example k with a box around the token that asks."""
    ax.imshow(learned.images[k], cmap="gray_r", vmin=0, vmax=1)
    row, column = (place * learned.patch for place in learned.at[k])
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), learned.patch, learned.patch, fill=False, ec="#d95f02", lw=2.2))
    ax.set_xlim(-1, learned.images[k].shape[1])
    ax.set_ylim(learned.images[k].shape[0], -1)
    _bare(ax)


def draw_encodings(path: Path, learned: Encodings) -> Path:
    """Left: every block and head, for the mean query. Right: single queries of real images and what they ask for."""
    blocks, heads = learned.mean.shape[:2]
    count = len(learned.images)
    widths = [1.6 * heads + 0.9, 1.6 * count + 0.9]
    figure = Figure(
        figsize=(sum(widths), 1.6 * max(blocks, 1 + len(learned.shown)) + 0.8), dpi=130, layout="constrained"
    )
    figure.suptitle(f"{learned.title}: added to the attention score of a key, by its place around the query (○)")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)[0]
    _draw_mean(left, learned)
    right.suptitle("single queries of test images, in the two heads where they differ most", fontsize=10)
    axes = right.subplots(1 + len(learned.shown), count, squeeze=False)
    limit = float(np.abs(learned.single).max()) or 1.0
    for k in range(count):
        _draw_query(axes[0, k], learned, k)
        for line in range(len(learned.shown)):
            picture = _draw_response(axes[1 + line, k], learned.single[line, k], limit)
    axes[0, 0].set_ylabel("query (□)", fontsize=9)
    for line, (block, head) in enumerate(learned.shown):
        axes[1 + line, 0].set_ylabel(f"block {block + 1}, head {head + 1}", fontsize=9)
    right.colorbar(picture, ax=axes[1:].ravel().tolist(), fraction=0.03)
    return _save(figure, path)


def _draw_mean(figure: Figure | SubFigure, learned: Encodings) -> None:
    blocks, heads = learned.mean.shape[:2]
    figure.suptitle("mean query of the test images", fontsize=10)
    axes = figure.subplots(blocks, heads, squeeze=False)
    limit = float(np.abs(learned.mean).max()) or 1.0
    for b in range(blocks):
        for h in range(heads):
            picture = _draw_response(axes[b, h], learned.mean[b, h], limit)
            if b == 0:
                axes[b, h].set_title(f"head {h + 1}", fontsize=9)
        axes[b, 0].set_ylabel(f"block {b + 1}", fontsize=9)
    figure.colorbar(picture, ax=axes.ravel().tolist(), fraction=0.04)


def draw_overview(path: Path, learned: Encodings, size: int = 14) -> Path:
    """The picture at the top of the README: bucket maps around one token, and encodings learned from digits."""
    maps = [table for method in RATIOS for table in bucket_maps(method, (size, size))]
    figure = Figure(figsize=(11.5, 4.8), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.5, 1])[:, 0]
    top.suptitle("Which bucket the offset of query (○) and key falls in", fontsize=12)
    for ax, table in zip(top.subplots(1, len(maps)), maps, strict=True):
        draw_bucket_map(ax, table, query_on((size, size)))
        ax.set_title(table.title, fontsize=11)
    count = min(4, len(learned.images))
    block, head = learned.shown[0]
    bottom.suptitle(
        f"What {learned.title} learned from digits: added to the score of a key at that place, for the query in the "
        f"box (block {block + 1}, head {head + 1})"
    )
    axes = bottom.subplots(1, 2 * count)
    limit = float(np.abs(learned.single[0, :count]).max()) or 1.0
    for k in range(count):
        _draw_query(axes[2 * k], learned, k)
        picture = _draw_response(axes[2 * k + 1], learned.single[0, k], limit)
    bottom.colorbar(picture, ax=axes.tolist(), fraction=0.02)
    return _save(figure, path)
