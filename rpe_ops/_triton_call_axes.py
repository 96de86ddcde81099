# ruff: noqa: N803 (N is the number of buckets everywhere)
"""Calls of the kernels that multiply small matrices, for maps that factor: `_triton_axes`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _triton_call
from ._triton_call import Call, rows, strides
from .maps import NUMBERS


class Axes(NamedTuple):
    """Maps that factor, of one grid, in PLACES form; for each of q, k, v: is there one, N there, up, N and columns."""

    on: tuple[bool, ...]
    size: tuple[int, ...]  # a multiple of places
    up: tuple[int, ...]  # rows of the map, multiples of its columns, become multiples of places by it, over 2^16
    of: tuple[tuple[int, int], ...]
    height: int
    width: int
    skip: int
    places: int


def axes_of(q: Tensor, k: Tensor, maps: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> Axes | None:
    """What the kernels read where they can take all terms of a call; elsewhere None.

    sizes has five numbers for each map.
    """
    for some in maps:
        for x in some:
            if x.dim() != 1:
                return None
    on_q, on_k, on_v = sizes
    numbers = (*q.shape[1:], k.shape[2], tuple(on_q), tuple(on_k), tuple(on_v))
    try:
        return _axes_of(*numbers)
    except TypeError:  # symbols of torch.compile, which are not hashed
        return _axes_of.__wrapped__(*numbers)


@functools.lru_cache(maxsize=256)
def _axes_of(H: int, Lq: int, D: int, Lk: int, *sizes: tuple[int, ...]) -> Axes | None:
    given = [x for x in sizes if x]
    if not given or any(len(x) != NUMBERS or x[4] < 1 or x[:3] != given[0][:3] for x in given):
        return None
    height, width, skip = given[0][:3]
    if not Lq == Lk == skip + height * width:
        return None
    needed = max([_needed(x[3], x[4], skip) for x in given])
    places = 8 if needed <= 8 else 16
    if needed > places or max(Lq * places * places, Lq * H * D) >= 2**31:
        return None
    counts = tuple(places_of(x[3], x[4], skip > 0, places) if x else 0 for x in sizes)
    factors = [2**16 if not x or x[3] == N else -(-places * 2**16 // x[4]) for x, N in zip(sizes, counts, strict=True)]
    of = tuple((x[3], x[4]) if x else (0, 0) for x in sizes)
    return Axes(tuple(map(bool, sizes)), counts, tuple(factors), of, height, width, skip, places)


def _needed(N: int, columns: int, skip: int) -> int:
    """The fewest PLACES."""
    if columns in (8, 16) and N % columns == 0:
        return max(columns, N // columns)
    rows = (N - (skip > 0) + columns - 1) // columns
    return max(rows, columns) + (skip > 0)


def places_of(N: int, columns: int, skips: bool, places: int) -> int:
    """How many buckets a table has in PLACES form."""
    if columns == places and N % places == 0:
        return N
    return ((N - skips + columns - 1) // columns + skips) * places


class Turn(NamedTuple):
    """What brings a table to PLACES form."""

    bucket: Tensor  # (size,) of each place; places of no bucket have some
    all: Tensor  # (N, size) of ones, the skip bucket in all its places
    once: Tensor  # and in one of them


_turns: dict[tuple, Turn] = {}
_MOST_TURNS = 64


def turn(axes: Axes, term: int, like: Tensor) -> Turn | None:
    """None where a table is in PLACES form already."""
    N, columns = axes.of[term]
    size, places, skips = axes.size[term], axes.places, axes.skip > 0
    if size == N:
        return None
    key = (N, columns, skips, places, like.dtype, like.device)
    found = _turns.get(key)
    if found is None:
        rows = size // places - skips
        place = torch.arange(size, device=like.device)
        row, column = place // places, place % places
        on_map = (row < rows) & (column < columns) & (row * columns + column < N - skips)
        bucket = torch.where(on_map, row * columns + column, N - 1 if skips else N)
        ones = (bucket == torch.arange(N, device=like.device).unsqueeze(1)).to(like.dtype)
        found = Turn(bucket.clamp(max=N - 1), ones, ones.where(on_map | (place == size - 1), 0))
        if like.is_cuda and torch.cuda.is_current_stream_capturing():  # holds nothing before the graph runs
            return found
        if len(_turns) >= _MOST_TURNS:
            _turns.clear()
        _turns[key] = found
    return found


def in_places(W: Tensor, axes: Axes | None, term: int, like: Tensor) -> Tensor:
    """W (H, D, N), of any kernel, as they want it: for these (H, D, size)."""
    W = W if W.dtype == like.dtype else W.to(like.dtype)
    found = None if axes is None else turn(axes, term, like)
    return W if found is None else W.index_select(-1, found.bucket)


def out_of_places(grad: Tensor, axes: Axes | None, term: int) -> Tensor:
    """The adjoint of `in_places`: (..., size) -> (..., N)."""
    found = None if axes is None else turn(axes, term, grad)
    return grad if found is None else grad @ found.all.t()


_USUAL = (4, 32, 2, 4, 2)  # GROUPS, SLOTS, DEEP, num_warps, num_stages
_ON_K, _ON_ALL = (False, True, False), (True, True, True)
# what was measured on an architecture, in 16 bits with heads of 64 and neither mask nor dropout: the fastest by the sum
# of ratios on maps of 14x14, 32x32 and 64x64
_BEST: dict[int, dict[tuple[str, tuple[bool, ...]], tuple[int, ...]]] = {
    9: {  # H100
        ("axes_forward", _ON_K): (8, 32, 2, 4, 2),  # 0.77 of the usual one's time
        ("axes_backward_queries", _ON_K): (8, 32, 2, 4, 2),  # 0.90
        ("axes_backward_keys", _ON_K): (4, 32, 2, 4, 3),  # 0.96
        ("axes_forward", _ON_ALL): (4, 32, 2, 4, 3),  # 0.98
    }
}


@functools.cache
def constants_of(
    name: str, on: tuple[bool, ...], extra: bool, wide: int, places: int, precision: str, major: int
) -> dict[str, Any]:
    measured = wide == 64 and places == 8 and not extra and precision in ("ieee", "interpreted")
    best = _BEST.get(major, {}) if measured else {}
    groups, slots, deep, warps, stages = best.get((name, on), _USUAL)
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    shape = dict(GROUPS=groups, SLOTS=slots, DEEP=deep, PLACES=places)
    return flags | dict(EXTRA=extra, WIDE=wide, PRECISION=precision, **shape, num_warps=warps, num_stages=stages)


def table_of(luts: Sequence[Tensor], maps: Sequence[Tensor], axes: Axes, term: int, like: Tensor) -> tuple:
    """The arguments of one side table, which may be in PLACES form already."""
    if not axes.on[term]:
        return (None, None, 0, 0, 0, 0, 0)
    lut = luts[0]
    lut = rows(in_places(lut, axes if lut.shape[3] == axes.of[term][0] else None, term, like))
    return (lut, maps[0], *strides(lut), axes.size[term] // 8, axes.up[term])


def results_of(axes: Axes, term: int, like: Tensor, tokens: int, by_head: bool) -> tuple:
    """Where kernels put bucket sums in PLACES form, (B, H, tokens, size), and how heads lie there."""
    B, H = like.shape[:2]
    if not axes.on[term]:
        return (None, 0, 0)
    if by_head:
        return (like.new_empty(H, B, tokens, axes.size[term]).transpose(0, 1), 1, B)
    return (like.new_empty(B, H, tokens, axes.size[term]), H, 1)


def turned(placed: Tensor | None, axes: Axes, term: int, by_head: bool) -> list[Tensor]:
    """Bucket sums in the buckets of the call, unless they are wanted as they are."""
    if placed is None:
        return []
    return [placed if by_head else out_of_places(placed, axes, term)]


def once(sums: Sequence[Tensor], axes: Axes, term: int, like: Tensor) -> Tensor | None:
    """Bucket sums in PLACES form, each bucket in one place."""
    if not axes.on[term] or not sums:
        return None
    found = turn(axes, term, like)
    return (sums[0] if found is None else sums[0].to(like.dtype) @ found.once).contiguous()


def multiply(name: str, call: Call, axes: Axes, arguments: tuple) -> None:
    from . import _triton_axes

    constants = constants_of(name, axes.on, call.extra, call.wide, axes.places, call.precision, call.major)
    up = (axes.height + 15) // 16
    more = (max(axes.skip - (up * 16 - axes.height) * axes.width, 0) + 15) // 16
    blocks = (up * axes.width + more + constants["GROUPS"] - 1) // constants["GROUPS"] * call.B * call.H
    if blocks:
        rest = (*call.mask, call.H, call.Lq, axes.height, axes.width, axes.skip, call.scale, call.D // 8)
        _triton_call.launch(_triton_axes, name, (blocks,), (*arguments, *rest), constants)
