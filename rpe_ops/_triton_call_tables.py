# ruff: noqa: N803
"""Calls of the kernel that multiplies over all tokens: `_triton_tables`."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _triton_call
from ._triton_call import WIDTHS, on_device, precision_of, rows, strides

PROGRAMS = 264  # two for each multiprocessor of an H100, the same everywhere: sums do not depend on the GPU


def table_sums(x: Tensor, g: Tensor, scale: float) -> Tensor:
    """scale * sum over b and l of x[b, h, l, d] g[b, h, l, n], (H, D, N) in float32.

    cuBLAS takes such a product of few rows and columns as one of few blocks, each of which adds up all tokens.
    """
    from . import _triton_tables

    B, H, L, D = x.shape
    N = g.shape[3]
    x = rows(x)
    wide = x.shape[3]
    even = N % 8 == 0
    g = rows(g) if even else g if g.stride(3) == 1 else g.contiguous()
    total = B * L
    if total == 0 or H == 0:
        return x.new_zeros((H, D, N), dtype=torch.float32)
    each = (total * H + 64 * PROGRAMS - 1) // (64 * PROGRAMS) * 64
    count = (total + each - 1) // each
    parts = x.new_empty((count, H, wide, N), dtype=torch.float32)
    its = strides(g) if even else g.stride()[:3]
    constants = constants_of(wide, even, precision_of(x)[0])
    with on_device(x):
        arguments = (x, g, parts, *strides(x), *its, H, L, total, each, wide // 8, N, scale)
        _triton_call.launch(_triton_tables, "table_sums", (count, H, (N + 63) // 64), arguments, constants)
    sums = parts[0] if count == 1 else parts.sum(0)
    return sums if wide == D else sums[:, :D]


@functools.cache
def constants_of(D: int, even: bool, precision: str) -> dict[str, Any]:
    wide = next(x for x in WIDTHS if x >= D)
    return dict(WIDE=wide, EVEN=even, PRECISION=precision, num_warps=8, num_stages=2 if wide < 128 else 1)
