# ruff: noqa: N803 (N is the number of buckets everywhere)
"""Calls of the kernels that multiply small matrices, for maps that factor: `_triton_axes`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _triton_call
from ._triton_call import Call, rows, strides


class Places(NamedTuple):
    """N, a multiple of 8 or 16, and what brings a table there: ones (N before, N); None where it is there already."""

    num_buckets: int
    turn: Tensor | None  # the skip bucket goes to all its places
    once: Tensor | None  # to one of them


class Axes(NamedTuple):
    """Maps that factor, of one grid, in PLACES form: for each of q, k, v its map and its table's, or None."""

    on: tuple[tuple[Tensor, Places] | None, ...]
    height: int
    width: int
    skip: int
    places: int


def axes_of(call: Call, maps: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> Axes | None:
    """What the kernels read where they can take all terms of a call; elsewhere None."""
    if max(map(len, maps)) != 1:
        return None
    given = [numbers for some, numbers in zip(maps, sizes, strict=True) if some]
    one_dim = all(some[0].dim() == 1 for some in maps if some)
    if not one_dim or any(len(x) < 5 or x[4] < 1 for x in given) or len({tuple(x[:3]) for x in given}) > 1:
        return None
    height, width, skip = given[0][:3]
    if not call.Lq == call.Lk == skip + height * width:
        return None
    needed = [_needed(x[3], x[4], skip) for x in given]
    places = 8 if max(needed) <= 8 else 16
    if max(needed) > places or max(call.Lq * places * places, call.Lq * call.H * call.D) >= 2**31:
        return None
    on: list[tuple[Tensor, Places] | None] = []
    for some, numbers in zip(maps, sizes, strict=True):
        on.append(_in_places(some[0], height, skip, numbers[3], numbers[4], places, call) if some else None)
    return Axes(tuple(on), height, width, skip, places)


def _needed(N: int, columns: int, skip: int) -> int:
    """The fewest PLACES."""
    if columns in (8, 16) and N % columns == 0:
        return max(columns, N // columns)
    rows = (N - (skip > 0) + columns - 1) // columns
    return max(rows, columns) + (skip > 0)


def _in_places(
    axes: Tensor, height: int, skip: int, N: int, columns: int, places: int, call: Call
) -> tuple[Tensor, Places]:
    axes = axes.to(torch.int32)
    if columns == places and N % places == 0:
        return axes, Places(N, None, None)
    rows = 2 * height - 1
    axes = torch.cat((axes[:rows] // columns * places, axes[rows:]))
    return axes, Places(*_turn(N, columns, skip > 0, places, call.dtype, call.device))


_turns: dict[tuple, tuple[int, Tensor, Tensor]] = {}


def _turn(
    N: int, columns: int, skips: bool, places: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, Tensor, Tensor]:
    rows = (N - skips + columns - 1) // columns
    new = (rows + skips) * places
    key = (N, columns, skips, places, dtype, device)
    if key not in _turns:
        place = torch.arange(new, device=device)
        row, column = place // places, place % places
        on_map = (row < rows) & (column < columns) & (row * columns + column < N - skips)
        bucket = torch.where(on_map, row * columns + column, N - 1 if skips else N)
        ones = (bucket == torch.arange(N, device=device).unsqueeze(1)).to(dtype)
        once = ones.where(on_map | (place == new - 1), 0)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # holds nothing before the graph runs
            return new, ones, once
        _turns[key] = new, ones, once
    return _turns[key]


def constants_of(
    on: tuple[bool, ...], extra: bool, wide: int, places: int, precision: str, major: int
) -> dict[str, Any]:
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    shape = dict(GROUPS=4, SLOTS=32, DEEP=2, PLACES=places)
    return flags | dict(EXTRA=extra, WIDE=wide, PRECISION=precision, **shape, num_warps=4, num_stages=2)


def placed(luts: Sequence[Tensor], term: tuple[Tensor, Places] | None, dtype: torch.dtype) -> tuple:
    """The arguments of one table."""
    if term is None:
        return (None, None, 0, 0, 0, 0)
    lut, (N, turn, _) = luts[0].to(dtype), term[1]
    lut = rows(lut if turn is None else lut @ turn)
    return (lut, term[0], *strides(lut), N // 8)


def results_of(like: Sequence[Tensor], term: tuple[Tensor, Places] | None) -> Tensor | None:
    """Where kernels put bucket sums in PLACES form."""
    if term is None:
        return None
    return like[0] if term[1].turn is None else like[0].new_empty(*like[0].shape[:3], term[1].num_buckets)


def turned(like: Sequence[Tensor], placed: Tensor | None, term: tuple[Tensor, Places] | None) -> list[Tensor]:
    """Bucket sums in the buckets of the call; those of a bucket with several places are added up."""
    if term is None or placed is None or term[1].turn is None:
        return list(like)
    return [(placed @ term[1].turn.t()).to(like[0].dtype)]


def once(sums: Sequence[Tensor], term: tuple[Tensor, Places] | None) -> Tensor | None:
    """Bucket sums in PLACES form, each bucket in one place."""
    if term is None or term[1].once is None or not sums:
        return sums[0] if sums else None
    return sums[0].to(term[1].once.dtype) @ term[1].once


def multiply(name: str, call: Call, axes: Axes, arguments: tuple) -> None:
    from . import _triton_axes

    on = tuple(term is not None for term in axes.on)
    constants = constants_of(on, call.extra, call.wide, axes.places, call.precision, call.major)
    up = (axes.height + 15) // 16
    more = (max(axes.skip - (up * 16 - axes.height) * axes.width, 0) + 15) // 16
    blocks = (up * axes.width + more + constants["GROUPS"] - 1) // constants["GROUPS"] * call.B * call.H
    if blocks:
        rest = (*call.mask, call.H, call.Lq, axes.height, axes.width, axes.skip, call.scale, call.D // 8)
        _triton_call.launch(_triton_axes, name, (blocks,), (*arguments, *rest), constants)
