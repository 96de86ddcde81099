"""The backend "triton" in tensors: `forward` and `backward` read maps, and every kernel that they may launch is in `variants`.

Kernels that multiply small matrices (`_triton_axes`) take calls whose maps factor; those that look buckets up
(`_triton_lookup`) take the rest. Triton is imported when the first kernel is launched.
"""

import contextlib
import functools
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
    constants = lookup_constants(name, call.wide, call.dtype.itemsize, tuple(n > 0 for n in counts), most, call)
    blocks = (rows + constants["R"] - 1) // constants["R"] * call.B * call.H
    if blocks:
        rest = (*call.mask, *counts, call.H, call.Lq, call.Lk, *_geometry(summed, columns), call.scale, call.D // 8)
        launch(
            _triton_lookup, name, (blocks, max((most + _MOST - 1) // _MOST, 1)), (*arguments, *rest), constants
        )


def lookup_constants(
    name: str, wide: int, itemsize: int, on: tuple[bool, ...], most: int, call: Any
) -> dict[str, Any]:
    flags = dict(zip(("ON_Q", "ON_K", "ON_V"), on, strict=True))
    rows = dict(R=32, num_warps=4, num_stages=1)
    return flags | dict(
        EXTRA=call.extra, WIDE=wide, NB=64 if most <= 64 else _MOST, PRECISION=call.precision, **rows
    )


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
    on_q, on_k, on_v = _terms(maps_q, sizes_q), _terms(maps_k, sizes_k), _terms(maps_v, sizes_v)
    on_v = _one_geometry(on_v, call.Lq, call.Lk)
    with _on(q):
        arguments = (
            q, k, v, out, lse, *_strides(q), *_strides(k), *_strides(v), *_tables(lut_q, on_q, q.dtype),
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
    """The gradients of q, k, v and of both lists of side tables."""
    D = q.shape[3]
    call = _call(q, k, mask, seed, scale, p)
    grad_q, grad_k, grad_v = _empty_heads(q, call.Lq, D), _empty_heads(q, call.Lk, D), _empty_heads(q, call.Lk, D)
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    delta = torch.empty_like(lse)
    q, k, v, grad_out, out = _rows(q), _rows(k), _rows(v), _rows(grad_out), _rows(out)
    call = call._replace(D=q.shape[3])
    on_q, on_k, on_v = _terms(maps_q, sizes_q), _terms(maps_k, sizes_k), _terms(maps_v, sizes_v)
    on_q, on_k = _one_geometry(on_q, call.Lk, call.Lq), _one_geometry(on_k, call.Lq, call.Lk)
    values = [x.contiguous() for x in sums]
    with _on(q):
        strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad_out))
        tables = [_tables(*x, q.dtype) for x in ((lut_q, on_q), (lut_k, on_k), (grad_sums, on_v))]
        tables = tuple(itertools.chain(*tables))
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
