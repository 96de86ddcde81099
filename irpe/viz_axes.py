"""Pictures of maps of (frames, height, width): one slice for each frame of the keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .irpe import METHOD, get_bucket_map, get_single_rpe_config
from .viz import RATIOS, _bare, _borders, _compass, _fade, _save, _title

_PARTS = (METHOD.CROSS_DEPTH, METHOD.CROSS_ROWS, METHOD.CROSS_COLS)


class VideoMap(NamedTuple):
    """The buckets of one table: which method and ratio, on (frames, height, width) tokens."""

    method: METHOD
    ratio: float
    size: tuple[int, int, int]
    skip: int

    def grid(self) -> Tensor:
        """(2t-1, 2h-1, 2w-1): the bucket of each offset (frame, row, column) of the query from the key."""
        numbers = self.ratio, 2 * self.ratio, 8 * self.ratio
        return get_bucket_map(self.method, self.size, 0, *numbers).grid().long()

    def used(self) -> int:
        """Number of buckets that some pair of tokens falls in, the one of the skip tokens among them."""
        return len(self.grid().unique()) + (self.skip > 0)

    def around(self, query: tuple[int, int, int]) -> Tensor:
        """(t, h, w): the bucket of every key for the query token at (frame, row, column)."""
        windows = self.grid()
        for axis, (at, n) in enumerate(zip(query, self.size, strict=True)):
            windows = windows.narrow(axis, at, n)
        return windows.flip(0, 1, 2)

    def colors(self, ids: Tensor) -> np.ndarray:
        """(..., 3) in [0, 1]: a color for each bucket; by direction in the frame, darker before and paler after it."""
        b, grid = int(2 * self.ratio), self.grid()
        if self.method in (METHOD.EUCLIDEAN, METHOD.QUANT):
            largest = max(1.0, float(grid.max()) - b)
            return _fade((ids.double() - b).numpy() / largest, (ids % 2).numpy())
        steps = self._steps(ids)
        largest = max(1.0, *(float(step.abs().max()) for step in self._steps(grid)))
        frame, row, column = (step.numpy() / largest for step in steps)
        odd = (steps[0] + steps[1] + steps[2]).remainder(2).numpy()
        if self.method == METHOD.CROSS_DEPTH:
            return _compass(frame, frame, odd)
        flat = _compass(row, column, odd)
        amount = 0.5 * np.abs(frame)[..., None]
        return flat * (1 - amount) + amount * np.where(frame < 0, 1.0, 0.0)[..., None]

    def _steps(self, ids: Tensor) -> list[Tensor]:
        """g of the frame, the row and the column."""
        b = int(2 * self.ratio)
        side, zero = 2 * b + 1, torch.zeros_like(ids)
        if self.method == METHOD.PRODUCT:
            return [ids // side**2 - b, ids // side % side - b, ids % side - b]
        return [ids - b if part == self.method else zero for part in _PARTS]


def video_maps(
    method: str, size: tuple[int, int, int], *, ratio: float | None = None, skip: int = 0
) -> tuple[VideoMap, ...]:
    """The tables of a method on a map of size (frames, height, width): one, or three for cross.

    >>> [one.used() for one in video_maps("product", (8, 14, 14))]
    [343]

    Arguments and errors are those of `viz.bucket_maps`.
    """
    ratio = RATIOS.get(method, 1.9) if ratio is None else ratio
    config = get_single_rpe_config(ratio, method, skip=skip, ndim=3)
    tables = _PARTS if config.method == METHOD.CROSS else (config.method,)
    maps = tuple(VideoMap(one, float(ratio), size, config.skip) for one in tables)
    maps[0].grid()  # raises for wrong sizes
    return maps


def draw_slices(path: Path, groups: Sequence[tuple[VideoMap, ...]], query: tuple[int, int, int] | None = None) -> Path:
    """One row for each table and one column for each frame: the buckets of its tokens for one query token.

    Args:
        path: of the PNG to write; its folder is made.
        groups: what `video_maps` returned, for each method; all of one size.
        query: (frame, row, column) of the token, near the middle when absent.
    """
    size = groups[0][0].size
    frames, height, width = size
    query = (frames * 3 // 7, height * 3 // 7, width * 3 // 7) if query is None else query
    if not all(0 <= at < n for at, n in zip(query, size, strict=True)):
        at = "frame {}, row {}, column {}".format(*query)
        raise ValueError(f"the query at {at} is not on the map of {frames}x{height}x{width} tokens")
    rows = [one for group in groups for one in group]
    cell = 1.25  # inches
    tall = cell * min(2.0, max(0.35, height / width))
    figure = Figure(figsize=(cell * frames + 1.2, (tall + 0.25) * len(rows) + 0.5), dpi=110, layout="constrained")
    figure.suptitle(f"Buckets on a map of {frames}×{height}×{width} tokens, by frame, for one query (○)", fontsize=11)
    for line, one in zip(figure.subplots(len(rows), frames, squeeze=False), rows, strict=True):
        around = one.around(query)
        colors = one.colors(around)
        for frame, ax in enumerate(line):
            ax.imshow(colors[frame], interpolation="nearest")
            _borders(ax, around[frame])
            _bare(ax)
            if frame == query[0]:
                ax.plot(query[2], query[1], "o", ms=4, mfc="white", mec="black", mew=1.0)
        line[0].set_ylabel(f"{_title(one.method)},\nratio {one.ratio:g}\n{one.used()} buckets", fontsize=7.5)
    for frame, ax in enumerate(figure.axes[:frames]):
        ax.set_title(f"frame {frame}", fontsize=9)
    return _save(figure, path)
