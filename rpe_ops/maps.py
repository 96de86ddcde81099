"""What the operators take for a map: ids of pairs of tokens, or for a grid the few numbers that these depend on.

A map is a tensor of ids, (Lq, Lk), uint8, int16, int32 or int64. Or it is a tuple (offsets, size, skip, num_buckets,
columns), such as `irpe.BucketMap`, of `skip` tokens and a grid of size (height, width) behind them, where the bucket of
tokens i and j is `num_buckets - 1` if one of them is a skip token, and else depends on the offset (dr, dc) of i from j:

    offsets (2h-1 + 2w-1,), int32     rows[h-1+dr] + columns[w-1+dc], the two one after the other: the map factors; the
                                      second part has values from 0 to `columns` - 1, the first multiples of `columns`
    offsets (2h-1, 2w-1), int32       offsets[h-1+dr, w-1+dc], and `columns` is 0
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _torch

GridMap = tuple[Tensor, Sequence[int], int, int, int]
NUMBERS = 5  # of a map, beside its tensor: height, width, skip, num_buckets, columns
Map = Tensor | GridMap
ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
_SLICE_BYTES = 64 * 2**20  # of int64 ids at a time


def check(place: Any, name: str, shape: tuple[int, int], num_buckets: int, device: torch.device) -> None:
    """Raises where a map is not one of `shape` tokens for a table of `num_buckets` columns."""
    if isinstance(place, Tensor):
        if place.dtype not in ID_DTYPES:
            raise TypeError(f"{name}: ids are {place.dtype}; expected one of {', '.join(map(str, ID_DTYPES))}")
        if place.shape != shape:
            raise ValueError(f"{name}: ids have shape {tuple(place.shape)}; expected {shape}")
        on = place.device
    else:
        if not isinstance(place, tuple) or len(place) != 5 or not isinstance(place[0], Tensor):
            raise TypeError(f"{name}: {place!r} is no map: expected ids or (offsets, size, skip, num_buckets, columns)")
        offsets, size, skip, its, columns = place
        if len(size) != 2:
            raise ValueError(f"{name}: a grid of size {tuple(size)}; operators read two axes: pass its ids, map.ids()")
        height, width = size
        if its != num_buckets:
            raise ValueError(f"{name}: the map has {its} buckets, and the table {num_buckets}; expected the same")
        tokens = skip + height * width
        if shape != (tokens, tokens):
            raise ValueError(f"{name}: skip={skip} + {height} * {width} = {tokens} tokens; expected {shape}")
        factors, whole = (2 * height + 2 * width - 2,), (2 * height - 1, 2 * width - 1)
        if offsets.dtype != torch.int32 or tuple(offsets.shape) not in (factors, whole):
            got = f"{offsets.dtype} of shape {tuple(offsets.shape)}"
            raise ValueError(f"{name}: offsets are {got}; expected int32 of shape {factors} or {whole}")
        if (columns > 0) != (offsets.dim() == 1):
            raise ValueError(f"{name}: columns={columns} beside offsets of shape {tuple(offsets.shape)}")
        on = offsets.device
    if on != device:
        raise ValueError(f"{name}: q is on {device}, ids on {on}: move one of them")


def tensor_and_numbers(place: Map, num_buckets: int) -> tuple[Tensor, tuple[int, ...]]:
    """What operators of C++ and Triton read: (offsets, (h, w, skip, N, columns)), or (ids, (0, 0, 0, N, 0))."""
    if isinstance(place, Tensor):
        return place, (0, 0, 0, num_buckets, 0)
    offsets, (height, width), skip, _, columns = place
    return offsets, (height, width, skip, num_buckets, columns)


def from_numbers(tensor: Tensor, numbers: Sequence[int]) -> Map:
    """The map of `tensor_and_numbers`."""
    height, width, skip, num_buckets, columns = numbers
    return tensor if height == 0 else (tensor, (height, width), skip, num_buckets, columns)


def ids_of(place: Map, dtype: torch.dtype | None = None) -> Tensor:
    """(Lq, Lk), of the smallest dtype that holds them unless told; ids that were given stay as they are."""
    if isinstance(place, Tensor):
        return place if dtype is None else place.to(dtype)
    num_buckets = place[3]
    if dtype is None:
        dtype = torch.uint8 if num_buckets <= 2**8 else torch.int16 if num_buckets <= 2**15 else torch.int32
    return _rows(place, dtype, 0, place[1][0], with_skip=True)


def look_up(table: Tensor, place: Map) -> Tensor:
    """Y[b, h, i, j] = table[b, h, i, ids[i, j]] by torch.gather, which wants int64 ids: a slice of rows at a time."""
    if isinstance(place, Tensor):
        return table.gather(-1, place.long().expand(*table.shape[:2], *place.shape))
    return (_look_up if torch.compiler.is_compiling() else _LookUp.apply)(table, *tensor_and_numbers(place, place[3]))


def sum_up(x: Tensor, place: Map, num_buckets: int) -> Tensor:
    """S[b, h, i, n] = sum of x[b, h, i, j] over ids[i, j] = n by torch.scatter_add, in the same slices."""
    if _torch.to_onnx():  # whose scatter_add keeps the last one alone before opset 16
        member = ids_of(place).unsqueeze(-1) == torch.arange(num_buckets, device=x.device)  # (Lq, Lk, N)
        return (x.unsqueeze(-2) @ member.to(x.dtype)).squeeze(-2)
    if isinstance(place, Tensor):
        zeros = x.new_zeros(*x.shape[:3], num_buckets)
        return zeros.scatter_add(-1, place.long().expand(x.shape), x)
    return (_sum_up if torch.compiler.is_compiling() else _SumUp.apply)(x, *tensor_and_numbers(place, num_buckets))


# plain, for torch.compile, which refuses functions that have forward derivatives
def _look_up(table: Tensor, offsets: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return _joined(table, offsets, numbers, look_up)


def _sum_up(x: Tensor, offsets: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return _joined(x, offsets, numbers, lambda some, ids: sum_up(some, ids, numbers[3]))


def _joined(
    x: Tensor, offsets: Tensor, numbers: tuple[int, ...], of_slice: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    height, width, skip, num_buckets, columns = numbers
    place = (offsets, (height, width), skip, num_buckets, columns)
    parts = [of_slice(x[:, :, rows], ids) for rows, ids in _slices(place)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class _LookUp(torch.autograd.Function):
    """`look_up` on a grid, which keeps no ids for its gradient: they are built again, a slice at a time."""

    generate_vmap_rule = True
    forward = staticmethod(_look_up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, offsets, ctx.numbers = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumUp.apply(grad, *ctx.saved_tensors, ctx.numbers), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _LookUp.apply(tangent, *ctx.saved_tensors, ctx.numbers)


class _SumUp(torch.autograd.Function):
    """`sum_up` on a grid, the adjoint of `_LookUp`."""

    generate_vmap_rule = True
    setup_context = staticmethod(_LookUp.setup_context)
    forward = staticmethod(_sum_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _LookUp.apply(grad, *ctx.saved_tensors, ctx.numbers), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _SumUp.apply(tangent, *ctx.saved_tensors, ctx.numbers)


def _slices(place: GridMap) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their int64 ids): together all."""
    _, (height, width), skip, num_buckets, _ = place
    tokens = skip + height * width
    each = max(1, _SLICE_BYTES // (8 * width * tokens))  # image rows
    if each >= height:
        yield slice(None), ids_of(place, torch.long)
        return
    if skip:
        yield slice(0, skip), torch.full((skip, tokens), num_buckets - 1, device=place[0].device)
    for first in range(0, height, each):
        last = min(first + each, height)
        yield slice(skip + first * width, skip + last * width), _rows(place, torch.long, first, last)


def _rows(place: GridMap, dtype: torch.dtype, first: int, last: int, with_skip: bool = False) -> Tensor:
    """Ids of the tokens of image rows first to last, and of the skip tokens before them."""
    offsets, (height, width), skip, num_buckets, _ = place
    if offsets.dim() == 1:
        rows, columns = offsets.split([2 * height - 1, 2 * width - 1])
        offsets = rows.unsqueeze(1) + columns
    windows = (
        offsets.to(dtype).flip(0, 1).unfold(0, height, 1).unfold(1, width, 1)
    )  # (h, w, h, w), rows from last to first
    windows = windows[height - last : height - first].flip(0, 1)
    ids = windows.reshape((last - first) * width, height * width)
    return F.pad(ids, (skip, 0, skip if with_skip else 0, 0), value=num_buckets - 1) if skip else ids
