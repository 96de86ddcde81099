"""Calls of the kernels that look buckets up, for maps of any kind: `_triton_lookup`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _triton_call
from ._triton_call import Call

MOST = 128  # buckets of one program


class Term(NamedTuple):
    """A map as kernels that look up read it: bucket of offsets where height > 0, else of rows and columns."""

    ids: Tensor
    num_buckets: int
    height: int
    width: int
    skip: int
    stride: int


def _table(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dtype == dtype else x.to(dtype)
    if (x.stride(3) != 1 and x.shape[3] != 1) or x.shape[2] * x.stride(2) + x.shape[3] >= 2**31:
        x = x.contiguous()
    return x


# buckets are summed on v going forward, on k and q going backward
SUMMED = {"lookup_forward": 2, "lookup_backward_queries": 1, "lookup_backward_keys": 0}


def terms_of(maps: Sequence[Tensor], sizes: Sequence[int]) -> list[Term]:
    step = len(sizes) // max(len(maps), 1)
    return [_term(x, *sizes[step * n : step * n + 4]) for n, x in enumerate(maps)]


def _term(x: Tensor, height: int, width: int, skip: int, num_buckets: int) -> Term:
    if height == 0:
        inside = ((x >= 0) & (x < num_buckets)).all()
        torch._assert_async(inside, f"rpe_attention: an id is outside [0, N) with N={num_buckets}")
        if x.numel() >= 2**31:
            raise ValueError(f'backend="triton" counts in 32 bits, and ids of {tuple(x.shape)} are too large for it')
        return Term(x.to(torch.int32).contiguous(), num_buckets, 0, 1, 0, x.shape[1])
    if x.dim() == 1:
        x = x[: 2 * height - 1, None] + x[2 * height - 1 :]
    return Term(x.to(torch.int32).contiguous(), num_buckets, height, width, skip, 0)


def of_one_geometry(terms: list[Term], rows: int, columns: int) -> list[Term]:
    """Terms whose buckets are summed in one kernel: all of one grid, or all of free ids."""
    if len({term[2:5] for term in terms}) < 2:
        return terms
    return [_free(term, rows, columns) if term.height else term for term in terms]


def _free(term: Term, rows: int, columns: int) -> Term:
    row, column = (torch.arange(n, device=term.ids.device) for n in (rows, columns))
    at_row, at_column = (x.sub(term.skip).clamp(min=0) for x in (row, column))
    r = at_row.unsqueeze(1) // term.width - at_column // term.width + term.height - 1
    c = at_row.unsqueeze(1) % term.width - at_column % term.width + term.width - 1
    outside = (row < term.skip).unsqueeze(1) | (column < term.skip)
    ids = term.ids[r, c].masked_fill_(outside, term.num_buckets - 1)
    return Term(ids, term.num_buckets, 0, 1, 0, columns)


def _geometry(terms: list[Term], columns: int) -> tuple[int, int, int]:
    """Height, width and skip of the tiles of columns."""
    if terms and terms[0].height:
        return terms[0].height, terms[0].width, terms[0].skip
    return (columns + 63) // 64, 64, 0


def _plans(terms: list[Term], rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Of each: slots in the order of their buckets and where each bucket ends, pattern by pattern."""
    from . import _triton_lookup

    plans = []
    for ids, N, h, w, skip, stride in terms:
        if h:
            deep, parts = max(64 // w, 1), (w + 63) // 64
            patterns = (h + ((h + deep - 1) // deep - 1) * deep) * w * parts + 1
        else:
            patterns = rows * ((columns + 63) // 64)
        stride_n = (N + 15) // 16 * 16
        if patterns * max(stride_n, 64) >= 2**31:
            raise ValueError(f'backend="triton" counts in 32 bits, and a map of {rows} tokens is too large for it')
        order = ids.new_empty(max(patterns, 1), 64, dtype=torch.uint8)
        ends = ids.new_empty(max(patterns, 1), stride_n, dtype=torch.uint8)
        each = PLAN["R"] if ids.is_cuda else 64  # the interpreter takes one program after another
        if patterns:
            size = (0, 0) if h else (rows, columns)
            _triton_call.launch(
                _triton_lookup, "plan", ((patterns + each - 1) // each,),
                (ids, order, ends, patterns, N, stride_n, max(h, 1), w, skip, *size, stride), PLAN | {"R": each},
            )  # fmt: skip
        plans.append((order, ends))
    return plans


PLAN = dict(R=4, num_warps=8)


def tables_of(luts: Sequence[Tensor], terms: list[Term], dtype: torch.dtype) -> tuple:
    """The arguments of two tables, absent ones included."""
    if not terms:
        return (None, None, *(0,) * 8) * 2
    both = []
    for lut, term in zip(luts, terms, strict=True):
        lut = _table(lut, dtype)
        both.append((lut, term.ids, *lut.stride()[:3], *term[1:]))
    return (*both[0], *both[-1])


def sums_of(results: Sequence[Tensor], terms: list[Term], rows: int, columns: int) -> tuple:
    if not terms:
        return (None, None, None, 0, 0) * 2 + (0,)
    both = [
        (*plan, result, term.num_buckets, plan[1].shape[1])
        for plan, result, term in zip(_plans(terms, rows, columns), results, terms, strict=True)
    ]
    return (*both[0], *both[-1], int(terms[0].height == 0))


def look_up(
    name: str, call: Call, rows: int, columns: int, arguments: tuple, counts: tuple[int, ...], summed: list[Term]
) -> None:
    from . import _triton_lookup

    most = max([term.num_buckets for term in summed], default=1)
    on = tuple(n > 0 for n in counts)
    constants = constants_of(name, on, call.extra, call.wide, most, call.precision, call.major)
    blocks = (rows + constants["R"] - 1) // constants["R"] * call.B * call.H
    if blocks:
        rest = (*call.mask, *counts, call.H, call.Lq, call.Lk, *_geometry(summed, columns), call.scale, call.D // 8)
        _triton_call.launch(
            _triton_lookup, name, (blocks, max((most + MOST - 1) // MOST, 1)), (*arguments, *rest), constants
        )


@functools.cache
def constants_of(
    name: str, on: tuple[bool, ...], extra: bool, wide: int, most: int, precision: str, major: int
) -> dict[str, Any]:
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    # what sums buckets keeps its registers only where a thread has few of a tile's numbers
    sums = on[SUMMED[name]]
    rows = dict(R=16 if sums else 32, num_warps=4 if not sums and wide < 128 and precision == "ieee" else 8)
    return flags | dict(
        EXTRA=extra, WIDE=wide, NB=64 if most <= 64 else MOST, PRECISION=precision, num_stages=1, **rows
    )
