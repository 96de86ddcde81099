"""The backend "triton" in tensors: `forward` and `backward` read maps, and every kernel that they may launch is in `variants`.

Kernels that multiply small matrices (`_triton_axes`) take calls whose maps factor; those that look buckets up
(`_triton_lookup`) take the rest. Triton is imported when the first kernel is launched.
"""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton_ahead import Variant

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_WIDTHS = (32, 64, 128)  # heads are padded to
_MOST = 128  # buckets of one program that looks up


class Term(NamedTuple):
    """A map as kernels that look up read it: bucket of offsets where height > 0, else of rows and columns."""

    ids: Tensor
    num_buckets: int
    height: int
    width: int
    skip: int
    stride: int


class Call(NamedTuple):
    """What the kernels of one call share."""

    B: int
    H: int
    Lq: int
    Lk: int
    D: int
    wide: int
    dtype: torch.dtype
    device: torch.device
    extra: bool
    mask: tuple  # mask, seed and the numbers of both, in the kernels' order
    scale: float
    precision: str
    major: int


def _call(q: Tensor, k: Tensor, mask: Tensor | None, seed: Tensor | None, scale: float, p: float) -> Call:
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    below = int(p * 2**24 + 0.5)
    extra = mask is not None or below > 0
    rest: tuple = (None, 0, 0, 0, 0, 0, None, 0, 0.0)
    if extra:
        if mask is None:
            mask = q.new_empty(1, dtype=torch.float32)
            rest = (mask, 0, 0, 0, 0, 0)
        else:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
            mask = mask.float().expand(B, H, Lq, Lk)
            rest = (mask, *mask.stride(), 1)
        if seed is None:
            seed = q.new_empty(1, dtype=torch.int64)
        rest += (seed, below, 1 / (1 - p) if p < 1 else 0.0)
    wide = next(x for x in _WIDTHS if x >= D)
    return Call(B, H, Lq, Lk, D, wide, q.dtype, q.device, extra, rest, scale, *_device(q))


def _device(q: Tensor) -> tuple[str, int]:
    """How products of float32 are computed, and the major compute capability."""
    if q.device.type == "cpu":
        return "interpreted", 8
    if torch.version.hip is not None:
        return "ieee", 8
    major = _capability(q.device)
    if q.dtype != torch.float32:
        return "ieee", major
    # three products of tf32 are as exact as float32 and, unlike those, have units of their own
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3", major


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _rows(x: Tensor) -> Tensor:
    """x as kernels read rows: the head size and all strides multiples of 8, 16 bytes at a time, 32 bits within a head."""
    B, H, L, D = x.shape
    if D % 8:
        return F.pad(x, (0, 8 - D % 8))
    b, h, l, d = x.stride()  # noqa: E741
    if d != 1 or (b | h | l) % 8 or x.data_ptr() % 16 or L * l >= 2**31 or max(b, h) >= 2**34:
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _strides(x: Tensor) -> tuple[int, int, int]:
    b, h, l, _ = x.stride()  # noqa: E741
    return b // 8, h // 8, l // 8


def _table(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dtype == dtype else x.to(dtype)
    if (x.stride(3) != 1 and x.shape[3] != 1) or x.shape[2] * x.stride(2) + x.shape[3] >= 2**31:
        x = x.contiguous()
    return x


def _empty_heads(x: Tensor, tokens: int, D: int) -> Tensor:
    """(B, H, tokens, D) of memory in the order (B, tokens, H, D)."""
    return x.new_empty(x.shape[0], tokens, x.shape[1], (D + 7) // 8 * 8).transpose(1, 2)


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(module: Any, name: str, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
    """Every kernel goes through here."""
    getattr(module, name)[grid](*arguments, **constants)


# --- kernels that look up

# buckets are summed on v going forward, on k and q going backward
_LOOKUP = {"lookup_forward": 2, "lookup_backward_queries": 1, "lookup_backward_keys": 0}


def _terms(maps: Sequence[Tensor], sizes: Sequence[int]) -> list[Term]:
    step = len(sizes) // max(len(maps), 1)
    if len(maps) > 2:
        raise ValueError(f'backend="triton" takes at most 2 tables on each of q, k and v, and here are {len(maps)}')
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


def _one_geometry(terms: list[Term], rows: int, columns: int) -> list[Term]:
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
        each = _PLAN["R"] if ids.is_cuda else 64  # the interpreter takes one program after another
        if patterns:
            size = (0, 0) if h else (rows, columns)
            launch(
                _triton_lookup, "plan", ((patterns + each - 1) // each,),
                (ids, order, ends, patterns, N, stride_n, max(h, 1), w, skip, *size, stride), _PLAN | {"R": each},
            )  # fmt: skip
        plans.append((order, ends))
    return plans


_PLAN = dict(R=4, num_warps=8)


def _tables(luts: Sequence[Tensor], terms: list[Term], dtype: torch.dtype) -> tuple:
    """The arguments of two tables, absent ones included."""
    if not terms:
        return (None, None, *(0,) * 8) * 2
    both = []
    for lut, term in zip(luts, terms, strict=True):
        lut = _table(lut, dtype)
        both.append((lut, term.ids, *lut.stride()[:3], *term[1:]))
    return (*both[0], *both[-1])


def _sums(results: Sequence[Tensor], terms: list[Term], rows: int, columns: int) -> tuple:
    if not terms:
        return (None, None, None, 0, 0) * 2 + (0,)
    both = [
        (*plan, result, term.num_buckets, plan[1].shape[1])
        for plan, result, term in zip(_plans(terms, rows, columns), results, terms, strict=True)
    ]
    return (*both[0], *both[-1], int(terms[0].height == 0))


def _look_up(
    name: str, call: Call, rows: int, columns: int, arguments: tuple, counts: tuple[int, ...], summed: list[Term]
) -> None:
    from . import _triton_lookup

    most = max([term.num_buckets for term in summed], default=1)
    on = tuple(n > 0 for n in counts)
    constants = _lookup_constants(name, on, call.extra, call.wide, most, call.precision, call.major)
    blocks = (rows + constants["R"] - 1) // constants["R"] * call.B * call.H
    if blocks:
        rest = (*call.mask, *counts, call.H, call.Lq, call.Lk, *_geometry(summed, columns), call.scale, call.D // 8)
        launch(
            _triton_lookup, name, (blocks, max((most + _MOST - 1) // _MOST, 1)), (*arguments, *rest), constants
        )


def _lookup_constants(
    name: str, on: tuple[bool, ...], extra: bool, wide: int, most: int, precision: str, major: int
) -> dict[str, Any]:
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    # what sums buckets keeps its registers only where a thread has few of a tile's numbers
    sums = on[_LOOKUP[name]]
    rows = dict(R=16 if sums else 32, num_warps=4 if not sums and wide < 128 and precision == "ieee" else 8)
    return flags | dict(EXTRA=extra, WIDE=wide, NB=64 if most <= 64 else _MOST, PRECISION=precision, num_stages=1, **rows)


# --- kernels that multiply small matrices


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


def _axes(call: Call, maps: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> Axes | None:
    """What the kernels read where they can take all terms of a call; elsewhere None."""
    if max(map(len, maps)) != 1:
        return None
    given = [(some[0], *numbers) for some, numbers in zip(maps, sizes, strict=True) if some]
    if any(len(x) < 6 or x[0].dim() != 1 or x[5] < 1 for x in given) or len({x[1:4] for x in given}) > 1:
        return None
    _, height, width, skip = given[0][:4]
    if not call.Lq == call.Lk == skip + height * width:
        return None
    needed = [_needed(N, columns, skip) for _, _, _, _, N, columns in given]
    places = 8 if max(needed) <= 8 else 16
    if max(needed) > places or max(call.Lq * places * places, call.Lq * call.H * call.D) >= 2**31:
        return None
    on: list[tuple[Tensor, Places] | None] = []
    for some, numbers in zip(maps, sizes, strict=True):
        on.append(_in_places(some[0], *numbers[:5], places, call) if some else None)
    return Axes(tuple(on), height, width, skip, places)


def _needed(N: int, columns: int, skip: int) -> int:
    """The fewest PLACES."""
    if columns in (8, 16) and N % columns == 0:
        return max(columns, N // columns)
    rows = (N - (skip > 0) + columns - 1) // columns
    return max(rows, columns) + (skip > 0)


def _in_places(
    axes: Tensor, height: int, width: int, skip: int, N: int, columns: int, places: int, call: Call
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


def _axes_constants(
    on: tuple[bool, ...], extra: bool, wide: int, places: int, precision: str, major: int
) -> dict[str, Any]:
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    shape = dict(GROUPS=4, SLOTS=32, DEEP=2, PLACES=places)
    return flags | dict(EXTRA=extra, WIDE=wide, PRECISION=precision, **shape, num_warps=4, num_stages=2)


def _placed(luts: Sequence[Tensor], term: tuple[Tensor, Places] | None, dtype: torch.dtype) -> tuple:
    """The arguments of one table."""
    if term is None:
        return (None, None, 0, 0, 0, 0)
    lut, (N, turn, _) = luts[0].to(dtype), term[1]
    lut = _rows(lut if turn is None else lut @ turn)
    return (lut, term[0], *_strides(lut), N // 8)


def _results(like: Sequence[Tensor], term: tuple[Tensor, Places] | None) -> Tensor | None:
    """Where kernels put bucket sums in PLACES form."""
    if term is None:
        return None
    return like[0] if term[1].turn is None else like[0].new_empty(*like[0].shape[:3], term[1].num_buckets)


def _turned(like: Sequence[Tensor], placed: Tensor | None, term: tuple[Tensor, Places] | None) -> list[Tensor]:
    """Bucket sums in the buckets of the call; those of a bucket with several places are added up."""
    if term is None or placed is None or term[1].turn is None:
        return list(like)
    return [(placed @ term[1].turn.t()).to(like[0].dtype)]


def _once(sums: Sequence[Tensor], term: tuple[Tensor, Places] | None) -> Tensor | None:
    """Bucket sums in PLACES form, each bucket in one place."""
    if term is None or term[1].once is None or not sums:
        return _first(sums)
    return sums[0].to(term[1].once.dtype) @ term[1].once


def _multiply(name: str, call: Call, axes: Axes, arguments: tuple) -> None:
    from . import _triton_axes

    on = tuple(term is not None for term in axes.on)
    constants = _axes_constants(on, call.extra, call.wide, axes.places, call.precision, call.major)
    up = (axes.height + 15) // 16
    more = (max(axes.skip - (up * 16 - axes.height) * axes.width, 0) + 15) // 16
    blocks = (up * axes.width + more + constants["GROUPS"] - 1) // constants["GROUPS"] * call.B * call.H
    if blocks:
        rest = (*call.mask, call.H, call.Lq, axes.height, axes.width, axes.skip, call.scale, call.D // 8)
        launch(_triton_axes, name, (blocks,), (*arguments, *rest), constants)


# --- the two functions


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut_q: Sequence[Tensor],
    lut_k: Sequence[Tensor],
    maps_q: Sequence[Tensor],
    maps_k: Sequence[Tensor],
    maps_v: Sequence[Tensor],
    sizes_q: Sequence[int],
    sizes_k: Sequence[int],
    sizes_v: Sequence[int],
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, bucket sums of the weights for each map of values)."""
    D = q.shape[3]
    call = _call(q, k, mask, seed, scale, p)
    sums = [q.new_empty(*q.shape[:3], n) for n in _numbers(maps_v, sizes_v)]
    out, lse = _empty_heads(q, call.Lq, D), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = _rows(q), _rows(k), _rows(v)
    call = call._replace(D=q.shape[3])
    strides = (*_strides(q), *_strides(k), *_strides(v))
    axes = _axes(call, (maps_q, maps_k, maps_v), (sizes_q, sizes_k, sizes_v))
    if axes is not None:
        tables = map(_placed, (lut_q, lut_k), axes.on, (q.dtype,) * 2)
        placed = _results(sums, axes.on[2])
        of_v = (None, None, 0) if axes.on[2] is None else (axes.on[2][0], placed, axes.on[2][1].num_buckets // 8)
        with _on(q):
            _multiply("axes_forward", call, axes, (q, k, v, out, lse, *strides, *_chain(tables), *of_v))
        return out[..., :D], lse, _turned(sums, placed, axes.on[2])
    on_q, on_k, on_v = _terms(maps_q, sizes_q), _terms(maps_k, sizes_k), _terms(maps_v, sizes_v)
    on_v = _one_geometry(on_v, call.Lq, call.Lk)
    with _on(q):
        arguments = (
            q, k, v, out, lse, *strides, *_tables(lut_q, on_q, q.dtype),
            *_tables(lut_k, on_k, q.dtype), *_sums(sums, on_v, call.Lq, call.Lk),
        )  # fmt: skip
        counts = (len(on_q), len(on_k), len(on_v))
        _look_up("lookup_forward", call, call.Lq, call.Lk, arguments, counts, on_v)
    return out[..., :D], lse, sums


def backward(
    grad_out: Tensor,
    grad_sums: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Sequence[Tensor],
    lse: Tensor,
    lut_q: Sequence[Tensor],
    lut_k: Sequence[Tensor],
    maps_q: Sequence[Tensor],
    maps_k: Sequence[Tensor],
    maps_v: Sequence[Tensor],
    sizes_q: Sequence[int],
    sizes_k: Sequence[int],
    sizes_v: Sequence[int],
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The gradients of q, k, v and of both lists of side tables.

    out and sums are those of `forward`; or out has the product of the sums with W already, and sums are left out.
    """
    D = q.shape[3]
    call = _call(q, k, mask, seed, scale, p)
    grad_q, grad_k, grad_v = _empty_heads(q, call.Lq, D), _empty_heads(q, call.Lk, D), _empty_heads(q, call.Lk, D)
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    delta = torch.empty_like(lse)
    q, k, v, grad_out, out = _rows(q), _rows(k), _rows(v), _rows(grad_out), _rows(out)
    call = call._replace(D=q.shape[3])
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad_out))
    values = [x.contiguous() for x in sums]
    axes = _axes(call, (maps_q, maps_k, maps_v), (sizes_q, sizes_k, sizes_v))
    if axes is not None:
        tables = tuple(_chain(map(_placed, (lut_q, lut_k, grad_sums), axes.on, (q.dtype,) * 3)))
        of_q, of_k = _results(grads_q, axes.on[0]), _results(grads_k, axes.on[1])
        with _on(q):
            arguments = (q, k, v, grad_out, out, lse, delta, grad_q, *strides, *_strides(out), *tables)
            _multiply("axes_backward_queries", call, axes, (*arguments, _once(values, axes.on[2]), of_k))
            arguments = (q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *tables)
            _multiply("axes_backward_keys", call, axes, (*arguments, of_q))
        grads_q, grads_k = _turned(grads_q, of_q, axes.on[0]), _turned(grads_k, of_k, axes.on[1])
        return grad_q[..., :D], grad_k[..., :D], grad_v[..., :D], grads_q, grads_k
    on_q, on_k, on_v = _terms(maps_q, sizes_q), _terms(maps_k, sizes_k), _terms(maps_v, sizes_v)
    on_q, on_k = _one_geometry(on_q, call.Lk, call.Lq), _one_geometry(on_k, call.Lq, call.Lk)
    with _on(q):
        tables = tuple(_chain(_tables(*x, q.dtype) for x in ((lut_q, on_q), (lut_k, on_k), (grad_sums, on_v))))
        counts = (len(on_q), len(on_k), len(on_v))
        both = (values[0], values[-1]) if values else (None, None)
        arguments = (
            q, k, v, grad_out, out, lse, delta, grad_q, *strides, *_strides(out), *tables, *both,
            *_sums(grads_k, on_k, call.Lq, call.Lk),
        )  # fmt: skip
        _look_up("lookup_backward_queries", call, call.Lq, call.Lk, arguments, counts, on_k)
        arguments = (
            q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *tables, *_sums(grads_q, on_q, call.Lk, call.Lq),
        )  # fmt: skip
        _look_up("lookup_backward_keys", call, call.Lk, call.Lq, arguments, counts, on_q)
    return grad_q[..., :D], grad_k[..., :D], grad_v[..., :D], grads_q, grads_k


_chain = itertools.chain.from_iterable


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _numbers(maps: Sequence[Tensor], sizes: Sequence[int]) -> list[int]:
    step = len(sizes) // max(len(maps), 1)
    return [sizes[step * n + 3] for n in range(len(maps))]


def fake_forward(
    q: Tensor, k: Tensor, v: Tensor, lut_q: list, lut_k: list, maps_q: list, maps_k: list, maps_v: list,
    sizes_q: list, sizes_k: list, sizes_v: list, *_: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The shapes and strides of what `forward` returns."""
    sums = [q.new_empty(*q.shape[:3], n) for n in _numbers(maps_v, sizes_v)]
    D = q.shape[3]
    return _empty_heads(q, q.shape[2], D)[..., :D], q.new_empty(q.shape[:3], dtype=torch.float32), sums


def fake_backward(
    grad_out: Tensor, grad_sums: list, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: list, lse: Tensor,
    lut_q: list, lut_k: list, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    D = q.shape[3]
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    grads = [_empty_heads(q, x.shape[2], D)[..., :D] for x in (q, k, v)]
    return grads[0], grads[1], grads[2], grads_q, grads_k


# --- every binary that these can ask for

_FLAGS = list(itertools.product((False, True), repeat=3))


def variants(target: str) -> Iterator[Variant]:
    """Every kernel that `launch` may be asked for on a target such as "cuda:90"."""
    from . import _triton_axes, _triton_lookup

    major = int(target.split(":")[1]) // 10 if target.startswith("cuda") else 8
    rough = ("tf32x3", "tf32") if target.startswith("cuda") else ("ieee",)
    numbers = [("fp16", "ieee"), ("bf16", "ieee"), *(("fp32", precision) for precision in rough)]
    yield variant(_triton_lookup.plan, "fp32", _PLAN)
    for name, on, extra in itertools.product(_LOOKUP, _FLAGS, (False, True)):
        most_of = (64, _MOST) if on[_LOOKUP[name]] else (1,)
        for (dtype, precision), wide, most in itertools.product(numbers, _WIDTHS, most_of):
            constants = _lookup_constants(name, on, extra, wide, most, precision, major)
            yield from _with_and_without_values(getattr(_triton_lookup, name), dtype, constants)
    for name, on, extra in itertools.product(_AXES, _FLAGS[1:], (False, True)):
        for (dtype, precision), wide, places in itertools.product(numbers, _WIDTHS, (8, 16)):
            constants = _axes_constants(on, extra, wide, places, precision, major)
            yield from _with_and_without_values(getattr(_triton_axes, name), dtype, constants)


def _with_and_without_values(kernel: Any, dtype: str, constants: dict[str, Any]) -> Iterator[Variant]:
    """Where W's product on values is in `out` already, the kernel that finds delta gets no bucket sums."""
    yield variant(kernel, dtype, constants)
    if kernel.fn.__name__.endswith("backward_queries") and constants["ON_V"]:
        yield variant(kernel, dtype, constants, values=False)


_AXES = ("axes_forward", "axes_backward_queries", "axes_backward_keys")


def usual(target: str) -> Iterator[Variant]:
    """Those of 16 bits without mask and dropout, on keys or on queries, keys and values."""
    for one in variants(target):
        known = dict(one.constants)
        some = (known.get("ON_Q"), known.get("ON_K"), known.get("ON_V")) in ((False, True, False), (True, True, True))
        if some and not known["EXTRA"] and known["WIDE"] == 64 and dict(one.types)["q"] != "*fp32":
            yield one


_POINTERS = {"lse": "*fp32", "delta": "*fp32", "mask": "*fp32", "seed": "*i64"}
_TURNED = {"q": "ON_Q", "k": "ON_K", "v": "ON_V"}
_SUMS = dict(forward="ON_V", backward_queries="ON_K", backward_keys="ON_Q")
_DATA = "q k v out grad_out grad_q grad_k grad_v q1 q2 k1 k2 v1 v2 values1 values2 sums1 sums2".split()


def variant(kernel: Any, dtype: str, constants: dict[str, Any], values: bool = True) -> Variant:
    """What Triton compiles where `launch` calls the kernel with these constants; tensors that are absent are None."""
    name = kernel.fn.__name__
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    constants = {key: value for key, value in constants.items() if key not in options}
    types = {}
    for word in inspect.signature(kernel.fn).parameters:
        kind = word.split("_")[-1].rstrip("12")
        flag = None
        if word in constants:
            type_ = "constexpr"
        elif word in _DATA:
            type_ = f"*{dtype}"
            flag = "ON_V" if kind == "values" else _SUMS.get(name.split("_", 1)[-1]) if kind == "sums" else None
            flag = _TURNED[word[0]] if len(word) == 2 else flag
        elif kind == "ids":
            type_, flag = "*i32", _TURNED.get(word[0])
        elif kind in ("order", "ends"):
            type_, flag = "*u8", _SUMS.get(name.split("_", 1)[-1])
        elif word in _POINTERS:
            type_, flag = _POINTERS[word], "EXTRA" if word in ("mask", "seed") else None
        else:
            type_ = "fp32" if word in ("scale", "factor") else "i32"
        if (flag is not None and not constants[flag]) or (kind == "values" and not values):
            type_, constants = "constexpr", constants | {word: None}
        types[word] = type_
    return Variant(name, tuple(types.items()), tuple(constants.items()), tuple(options.items()))
