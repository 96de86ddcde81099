"""What pictures of bucket maps show: the buckets around a token, how many are used, and a color for each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .irpe import METHOD, get_bucket_map, get_single_rpe_config
from .irpe import BucketMap as OffsetMap

RATIOS = {"euc": 20.0, "quant": 33.0, "cross": 20.0, "product": 1.9}  # the paper's, at 14x14 tokens; of others 1.9
_TITLES = {
    METHOD.QUANT: "Quantization",
    METHOD.CROSS_ROWS: "Cross: rows",
    METHOD.CROSS_COLS: "Cross: columns",
    METHOD.CROSS_DEPTH: "Cross: frames",
}
_CROSS = METHOD.CROSS_DEPTH, METHOD.CROSS_ROWS, METHOD.CROSS_COLS


class BucketMap(NamedTuple):
    """The buckets of one table: which method and ratio, on (height, width) or (frames, height, width) tokens."""

    method: METHOD
    ratio: float
    size: tuple[int, ...]
    skip: int

    @property
    def piecewise(self) -> tuple[float, float, float]:
        """alpha, beta, gamma."""
        return self.ratio, 2 * self.ratio, 8 * self.ratio

    @property
    def title(self) -> str:
        """What people call the method."""
        return _TITLES.get(self.method, self.method.name.capitalize())

    def used(self) -> int:
        """Number of buckets that some pair of tokens falls in, the one of the skip tokens among them."""
        return len(self.offsets().unique()) + (self.skip > 0)

    def around(self, query: tuple[int, ...]) -> Tensor:
        """(h, w) or (t, h, w): the bucket of every key for the query token at this place."""
        window = self.offsets()
        for axis, (at, n) in enumerate(zip(query, self.size, strict=True)):
            window = window.narrow(axis, n - 1 - at, n)
        return window

    def offsets(self) -> Tensor:
        """(2h-1, 2w-1) or (2t-1, 2h-1, 2w-1): the bucket of the key at this offset from the query, 0 in the middle."""
        return self._map().grid().long().flip(*range(len(self.size)))

    def _map(self) -> OffsetMap:
        return get_bucket_map(self.method, self.size, self.skip, *self.piecewise)

    def colors(self, ids: Tensor) -> np.ndarray:
        """(*ids.shape, 3) in [0, 1]: a color for each bucket, by its direction; darker before a frame, paler after it.

        Where the mapping does not factor, by its distance from the bucket of the query itself.
        """
        if not self._map().axes():
            every = self.offsets()
            center = every[tuple(n - 1 for n in self.size)]
            far, farthest = (ids - center).abs(), (every - center).abs().max()
            return _fade(far.numpy() / max(1, int(farthest)), (ids % 2).numpy())
        steps = self._steps()
        frame, row, column = (step[ids].numpy() / max(1, int(steps.abs().max())) for step in steps)
        odd = (steps.sum(0)[ids] % 2).numpy()
        if not steps[1:].any():  # the frame alone counts
            return _compass(frame, frame, odd)
        amount = 0.5 * np.abs(frame)[..., None]
        return _compass(row, column, odd) * (1 - amount) + amount * np.where(frame < 0, 1.0, 0.0)[..., None]

    def _steps(self) -> Tensor:
        """(3, buckets): how many values a bucket lies from that of the query itself, along frames, rows and columns."""
        grid, axes = self._map().grid().long(), self._map().axes()
        steps = grid.new_zeros(3, int(grid.max()) + 1)
        for axis, part in enumerate(axes, -len(axes)):  # of two axes the first line stays 0
            value = part.unique(return_inverse=True)[1]
            steps[axis, grid] = (value - value[len(value) // 2]).view(-1, *[1] * (-1 - axis)).expand_as(grid)
        return steps


def bucket_maps(
    method: str, size: tuple[int, ...], *, ratio: float | None = None, skip: int = 0
) -> tuple[BucketMap, ...]:
    """The tables of a method on a map of size (height, width) or (frames, height, width): for cross one for each axis.

    >>> sum(table.used() for table in bucket_maps("cross", (14, 14), skip=1))
    56

    Args:
        ratio: the paper's for 14x14 when absent (`RATIOS`).

    Raises:
        ValueError, TypeError: unknown method, a size below 1, a ratio that is not positive, a negative skip.
    """
    if len(size) not in (2, 3):
        raise ValueError(f"size={size}; pictures are of (height, width) or (frames, height, width)")
    ratio = RATIOS.get(method, 1.9) if ratio is None else ratio
    config = get_single_rpe_config(ratio, method, skip=skip, ndim=len(size))
    tables = _CROSS[-len(size) :] if config.method == METHOD.CROSS else (config.method,)
    maps = tuple(BucketMap(table, float(ratio), size, config.skip) for table in tables)
    maps[0].offsets()  # raises for wrong sizes
    return maps


def query_on(size: tuple[int, ...], query: Sequence[int] | None = None) -> tuple[int, ...]:
    """The place to look from on a map of `size`: `query`, the last numbers of one, and near the middle for the others.

    Raises:
        ValueError: it is not on the map.
    """
    given = tuple(query or ())
    place = (*(n * 3 // 7 for n in size[: len(size) - len(given)]), *given)
    if not all(0 <= at < n for at, n in zip(place, size, strict=True)):
        words = ", ".join(
            f"{axis} {at}" for axis, at in zip(("frame", "row", "column")[-len(size) :], place, strict=True)
        )
        raise ValueError(f"the query at {words} is not on the map of {'x'.join(map(str, size))} tokens")
    return place


def _oklab(lightness: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sRGB of the perceptual color space Oklab (Ottosson 2020), clipped to what a screen can show."""
    cone = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        -1,
    )
    matrix = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cone**3 @ matrix.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _compass(row: np.ndarray, column: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Hue by direction, strength by distance, both in -1..1; odd buckets a little darker than their neighbours."""
    distance = np.minimum(1.0, np.hypot(row, column))
    squeeze = distance / np.maximum(np.hypot(row, column), 1e-9)  # the corners keep the chroma of the edges
    lightness = 0.95 - 0.30 * distance - 0.05 * odd
    return _oklab(lightness, 0.17 * column * squeeze, -0.17 * row * squeeze)


def _fade(far: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """From pale yellow at 0 over green to dark blue at 1; odd buckets are turned in hue from their neighbours."""
    angle = np.deg2rad(96 + 160 * far + 18 * odd)
    chroma = 0.07 + 0.08 * np.sin(np.pi * np.clip(far, 0, 1))
    return _oklab(0.97 - 0.66 * far, chroma * np.cos(angle), chroma * np.sin(angle))
