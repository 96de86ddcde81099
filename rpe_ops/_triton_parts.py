# ruff: noqa: N803
"""What the Triton kernels of `rpe_attention` share: rows of a head, tiles of columns, masks, dropout, delta.

A program has some rows of one head, and takes the columns in tiles of 64 slots, or 32. On a map of height x width a
tile is whole image rows, as many as fit (or a part of one, where it is wider), so that what depends on offsets is the
same for every tile; tokens in front of the map (skip) sit in the slots that are left, and then in tiles of their own.
Without a map columns are taken as one of width 64.

Strides of q, k, v and their like come divided by 8, and so does the head size: Triton sees that rows can be read 16
bytes at a time. Offsets within a head are counted in 32 bits.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """A kernel whose binaries depend on the types of its arguments alone, not on their values, and on its constants."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[x.name for x in parameters if x.annotation is not tl.constexpr])


@triton.jit
def dot(one, other, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(one.to(tl.float32), other.to(tl.float32), acc)
    return tl.dot(one, other, acc, input_precision=PRECISION)


@triton.jit
def head_of(x, b, h, stride_b, stride_h):
    """x[b, h], where rows start at multiples of 16 bytes."""
    return tl.multiple_of(x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * 8, 16)


@triton.jit
def table_of(x, b, h, stride_b, stride_h):
    return x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h)


@triton.jit
def rows_of(x, stride, token, there, D8, WIDE: tl.constexpr):
    """Rows of a head, zero where there is none and beyond the head size."""
    d = tl.arange(0, WIDE)
    at = x + ((token * (stride * 8))[:, None] + d[None, :])
    return tl.load(at, mask=there[:, None] & (d < D8 * 8)[None, :], other=0.0)


@triton.jit
def put_rows(x, value, stride, token, there, D8, WIDE: tl.constexpr):
    d = tl.arange(0, WIDE)
    at = x + ((token * (stride * 8))[:, None] + d[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=there[:, None] & (d < D8 * 8)[None, :])


@triton.jit
def tiling(h, w, skip, most, SLOTS: tl.constexpr):
    """Of a map: columns of a tile, its image rows, tiles of an image row, free slots, rows of tiles, more tiles."""
    wide = tl.minimum(w, SLOTS)
    deep = tl.minimum(SLOTS // wide, most)
    parts = tl.cdiv(w, SLOTS)
    # where an image row has several tiles its skip tokens have tiles of their own
    free = tl.where(parts > 1, 0, SLOTS - deep * wide)
    down = tl.cdiv(h, deep)
    more = tl.cdiv(tl.maximum(skip - down * free, 0), SLOTS)
    return wide, deep, parts, free, down, more


@triton.jit
def slots(down, part, h, w, skip, length, wide, deep, free, last, SLOTS: tl.constexpr):
    """Of a tile: token, whether there is one, image row within the tile, column, whether it is of the map."""
    s = tl.arange(0, SLOTS)
    line, column = s // wide, part * SLOTS + s % wide
    row = down * deep + line
    left = (line >= deep) | (down >= last)
    x = tl.where(down < last, down * free + s - deep * wide, last * free + (down - last) * SLOTS + s)
    on_map = (line < deep) & (down < last) & (row < h) & (column < w)
    token = tl.where(on_map, skip + row * w + column, x)
    there = (on_map | (left & (x < skip))) & (token < length)
    return token, there, line, column, on_map


@triton.jit
def add_mask(x, mask, b, h, i, j, there, stride_b, stride_h, stride_i, stride_j):
    """i and j are queries and keys, in the shapes that broadcast to x."""
    at = mask + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h)
    return x + tl.load(at + (i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j), mask=there, other=0.0)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    y = (x ^ (x >> 15)) * 0x846CA68B
    return y ^ (y >> 16)


@triton.jit
def drop(x, seed, below, factor, head, i, j):
    """x / (1 - p), and 0 where hash(seed, head, i, j) is below p * 2^24; i and j broadcast to x."""
    whole = tl.load(seed).to(tl.uint64, bitcast=True)
    low, high = (whole & 0xFFFFFFFF).to(tl.uint32), (whole >> 32).to(tl.uint32)
    start = _mix(_mix(low + tl.full((), 0x9E3779B9, tl.uint32)) ^ high)
    key = _mix(_mix(start ^ head.to(tl.uint32)) ^ i.to(tl.uint32))
    dropped = (_mix(key ^ j.to(tl.uint32)) >> 8).to(tl.int32) < below
    return tl.where(dropped, 0.0, x * factor)


@triton.jit
def along(grad, stride, sums, N, token, there):
    """<grad[i], sums[i]> of the rows of two tensors of bucket sums."""
    total = tl.zeros(token.shape, tl.float32)
    for start in range(0, N, 32):
        n = start + tl.arange(0, 32)
        inside = there[:, None] & (n < N)[None, :]
        one = tl.load(grad + ((token * stride)[:, None] + n[None, :]), mask=inside, other=0.0).to(tl.float32)
        other = tl.load(sums + ((token * N)[:, None] + n[None, :]), mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(one * other, 1)
    return total
