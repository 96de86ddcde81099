"""The operators behind the backend "triton": shapes, sizes of tiles, launches. The kernels are in `_triton_tiles`.

Triton is imported when the first kernel is launched.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton_ahead import Variant

_PADDED = 128  # rows of ids are padded to a multiple of it; as in _triton_tiles
_TILE = 64
_MOST_BUCKETS = 128  # of one program


def _padded(columns: int) -> int:
    return (columns + _PADDED - 1) // _PADDED * _PADDED


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def tiles(kernel: str, head: int, bytes_each: int, sums: bool, major: int) -> dict[str, int]:
    """Rows of a program, warps and pipeline stages: what the registers of compute capability `major` hold."""
    if bytes_each == 4:
        return dict(R=32, num_warps=8, num_stages=1)
    heavy = sums or kernel != "forward"
    if major < 9:
        return dict(R=32 if heavy else 64, num_warps=4, num_stages=2)
    return dict(R=64, num_warps=8 if heavy else 4, num_stages=2)


_KERNELS = ("forward", "backward_queries", "backward_keys")
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_SIZES = dict(H="i32", Lq="i32")


def variants(target: str) -> Iterator[Variant]:
    """Kernels for a target such as "cuda:90": every number of tables, mask, dtype, head size and number of buckets."""
    major = _major(target)
    for kernel, dtype, wide in itertools.product(_KERNELS, _TYPES.values(), (16, 32, 64, 128)):
        for on, mask, dropout in itertools.product(_PLACES, ("none", "bool", "added"), (False, True)):
            for buckets in (16, 64, 300):
                yield _variant(major, kernel, dtype, wide, on, mask, dropout, buckets)
    for dtype, wide, terms in itertools.product(_TYPES.values(), (16, 32, 64, 128), range(3)):
        data = f"*{dtype}"
        pairs = ((data, *["i32"] * 4, data, "i32"),) * terms
        types = dict(grad_out=_x(data), out=_x(data), delta="*fp32", pairs=pairs, **_SIZES)
        yield _finished("backward_delta", types, dict(D=wide, WIDE=wide, R=32, NB=64), {})
    for ids, small in itertools.product(("u8", "i16", "i32", "i64"), ("u8", "i16", "i32")):
        types = dict(ids=f"*{ids}", small=f"*{small}", order="*u8", ends="*u8")
        types |= dict.fromkeys(("rows", "columns", "padded", "stride_n", "N", "stride_i", "stride_j"), "i32")
        yield _finished("plan", types, dict(R=4, NB=16), dict(num_warps=8))


def usual(target: str) -> list[Variant]:
    """Those of 16 bits and head size 64, with encodings on keys, or on queries, keys and values, by product."""
    settings = itertools.product(_KERNELS, ("fp16", "bf16"), ("k", "qkv"))
    return [_variant(_major(target), kernel, dtype, 64, on, "none", False, 64) for kernel, dtype, on in settings]


def _major(target: str) -> int:
    return int(target.split(":")[1]) // 10 if target.startswith("cuda") else 8


_PLACES = ["".join(c * n for c in on) for n in (1, 2) for on in ("q", "k", "v", "qk", "qv", "kv", "qkv")] + [""]


def _x(data: str) -> tuple[str, ...]:
    return (data, *["i32"] * 3)


def _variant(
    major: int, kernel: str, dtype: str, wide: int, on: str, mask: str, dropout: bool, buckets: int
) -> Variant:
    data = f"*{dtype}"
    x, table, sums = _x(data), (data, *["i32"] * 4, "*u8"), ("*u8", "*u8", "i32", "i32", data)
    tables: dict[str, Any] = {f"on_{c}": (table,) * on.count(c) for c in "qkv"}
    types: dict[str, Any] = dict(q=x, k=x, v=x)
    if kernel == "forward":
        types |= dict(out=x, lse="*fp32", on_q=tables["on_q"], on_k=tables["on_k"], sums=(sums,) * on.count("v"))
    else:
        outputs, own = (["grad_q"], "k") if kernel == "backward_queries" else (["grad_k", "grad_v"], "q")
        types |= dict(grad_out=x, lse="*fp32", delta="*fp32") | dict.fromkeys(outputs, x) | tables
        types["sums"] = (sums,) * on.count(own)
    types["mask"] = () if mask == "none" else ("*u8" if mask == "bool" else data, *["i32"] * 4)
    types |= dict(dropout=("*i64", "i32", "fp32") if dropout else (), size=("i32",) * 5, scale="fp32")
    options = tiles(kernel, wide, 4 if dtype == "fp32" else 2, len(types["sums"]) > 0, major)
    constants: dict[str, Any] = dict(
        D=wide, WIDE=wide, R=options.pop("R"), NB=min(buckets, _MOST_BUCKETS), MANY=buckets > _MOST_BUCKETS
    )
    constants |= dict(MASK=mask, DROP=dropout, PRECISION="tf32x3" if dtype == "fp32" else "ieee")
    return _finished(kernel, types, constants, options)


def _finished(kernel: str, types: dict[str, Any], constants: dict[str, Any], options: dict[str, int]) -> Variant:
    types |= dict.fromkeys(constants, "constexpr")
    return Variant(kernel, *(tuple(x.items()) for x in (types, constants, options)))


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
    ) -> None:
        from . import _triton_tiles

        self.kernels = _triton_tiles
        B, self.H, self.Lq, self.D = q.shape
        self.heads, self.Lk, self.dtype = B * self.H, k.shape[2], q.dtype
        self.wide = _power_of_two(self.D)
        self.mask: tuple = ()
        if mask is not None:
            self.mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *mask.stride())
        self.dropout: tuple = ()
        if dropout_p > 0:
            self.dropout = (seed, int(dropout_p * 2**24 + 0.5), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
        self.scale = scale
        self.settings = dict(
            MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "added", DROP=dropout_p > 0
        )
        self.major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
        self.settings["PRECISION"] = "ieee"
        if q.device.type == "cpu":
            self.settings["PRECISION"] = "interpreted"
        elif torch.version.hip is None:
            # three products of tf32 are as exact as float32 and, unlike those, have units of their own
            is_rough = torch.backends.cuda.matmul.fp32_precision == "tf32"
            self.settings["PRECISION"] = "tf32" if is_rough else "tf32x3"

    def launch(self, name: str, rows: int, sums: Sequence[tuple], *arguments: Any) -> None:
        """The kernel `name` for `rows` rows of every head; sums are the last of its tuples before mask."""
        size = (self.H, self.Lq, self.Lk, _padded(self.Lq), _padded(self.Lk))
        most = max([N for _, _, _, N, _ in sums], default=1)
        chunks = (most + _MOST_BUCKETS - 1) // _MOST_BUCKETS
        options = tiles(name, self.wide, self.dtype.itemsize, len(sums) > 0, self.major)
        blocks = (rows + options["R"] - 1) // options["R"]
        if blocks * self.heads == 0:
            return
        getattr(self.kernels, name)[blocks * self.heads, max(chunks, 1)](
            *arguments, tuple(sums), self.mask, self.dropout, size, self.scale, D=self.D, WIDE=self.wide,
            NB=_power_of_two(min(most, _MOST_BUCKETS)), MANY=chunks > 1, **self.settings, **options,
        )  # fmt: skip


def _rows(x: Tensor) -> tuple:
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()  # a program reads whole rows of a head
    return x, *x.stride()[:3]


def _tables(luts: Sequence[Tensor], plans: Sequence[Tensor]) -> tuple:
    # within a head the kernels count in 32 bits
    spans = [lut.shape[2] * lut.stride(2) + lut.shape[3] * lut.stride(3) for lut in luts]
    luts = [lut if span < 2**31 else lut.contiguous() for lut, span in zip(luts, spans, strict=True)]
    return tuple((lut, *lut.stride(), small) for lut, small in zip(luts, plans[::3], strict=True))


def _sums(plans: Sequence[Tensor], results: Sequence[Tensor]) -> tuple:
    orders, ends = plans[1::3], plans[2::3]
    return tuple((o, e, e.stride(1), e.shape[2], result) for o, e, result in zip(orders, ends, results, strict=True))


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _empty_heads(q: Tensor, tokens: int) -> Tensor:
    return q.new_empty(q.shape[0], tokens, q.shape[1], q.shape[3]).transpose(1, 2)


def empty_plan(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, padded = ids.shape[0], _padded(ids.shape[1])
    dtype = torch.uint8 if num_buckets <= 2**8 else torch.int16 if num_buckets <= 2**15 else torch.int32
    order = ids.new_empty(rows, padded, dtype=torch.uint8)
    # 16 bytes at a time can be read where every row starts at a multiple of 16
    ends = order.new_empty(rows, padded // _TILE, (num_buckets + 15) // 16 * 16)[..., :num_buckets]
    return ids.new_empty(rows, padded, dtype=dtype), order, ends


def _plan(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    from . import _triton_tiles

    torch._assert_async(
        ((ids >= 0) & (ids < num_buckets)).all(), f"rpe_attention: an id is outside [0, N) with N={num_buckets}"
    )
    small, order, ends = empty_plan(ids, num_buckets)
    rows, padded = small.shape
    if max(rows * padded, rows * padded // _TILE * ends.stride(1)) >= 2**31:
        raise ValueError(f'backend="triton" counts in 32 bits, and a map of {tuple(ids.shape)} is too large for it')
    each = 4 if ids.is_cuda else 64  # the interpreter takes one program after another
    if rows * padded > 0:
        with _on(ids):
            _triton_tiles.plan[(rows + each - 1) // each, padded // _TILE](
                ids, small, order, ends, rows, ids.shape[1], padded, ends.stride(1), num_buckets, *ids.stride(),
                R=each, NB=16, num_warps=8,
            )  # fmt: skip
    return small, order, ends


def _fake(
    q: Tensor, k: Tensor, v: Tensor, lut_q: list, lut_k: list, plan_q: list, plan_k: list, plan_v: list, *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    sums = [q.new_empty(*q.shape[:3], ends.shape[2]) for ends in plan_v[2::3]]
    return _empty_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32), sums


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut_q: list[Tensor],
    lut_k: list[Tensor],
    plan_q: list[Tensor],
    plan_k: list[Tensor],
    plan_v: list[Tensor],
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    out, lse, sums = _fake(q, k, v, lut_q, lut_k, plan_q, plan_k, plan_v)
    call = _Call(q, k, attn_mask, seed, scale, dropout_p)
    with _on(q):
        call.launch(
            "forward", call.Lq, _sums(plan_v, sums), _rows(q), _rows(k), _rows(v), _rows(out), lse,
            _tables(lut_q, plan_q), _tables(lut_k, plan_k),
        )  # fmt: skip
    return out, lse, sums


def _fake_backward(
    grad_out: Tensor, grad_sums: list, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: list, lse: Tensor,
    lut_q: list, lut_k: list, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    return _empty_heads(q, q.shape[2]), _empty_heads(q, k.shape[2]), _empty_heads(q, k.shape[2]), grads_q, grads_k


def _attention_backward(
    grad_out: Tensor,
    grad_sums: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: list[Tensor],
    lse: Tensor,
    lut_q: list[Tensor],
    lut_k: list[Tensor],
    plan_q: list[Tensor],
    plan_k: list[Tensor],
    plan_v: list[Tensor],
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    grads = _fake_backward(grad_out, grad_sums, q, k, v, out, sums, lse, lut_q, lut_k)
    grad_q, grad_k, grad_v, grads_lut_q, grads_lut_k = grads
    call = _Call(q, k, attn_mask, seed, scale, dropout_p)
    delta = torch.empty_like(lse)
    pairs = tuple((grad, *grad.stride(), s.contiguous(), s.shape[3]) for grad, s in zip(grad_sums, sums, strict=True))
    blocks = (call.Lq + 31) // 32
    of_out = _rows(grad_out)
    common = (_rows(q), _rows(k), _rows(v), of_out, lse, delta)
    tables = _tables(lut_q, plan_q), _tables(lut_k, plan_k), _tables(grad_sums, plan_v)
    with _on(q):
        if blocks * call.heads > 0:
            call.kernels.backward_delta[(blocks * call.heads,)](
                of_out, _rows(out), delta, pairs, call.H, call.Lq, D=call.D, WIDE=call.wide, R=32, NB=64
            )
        call.launch("backward_queries", call.Lq, _sums(plan_k, grads_lut_k), *common, _rows(grad_q), *tables)
        call.launch(
            "backward_keys", call.Lk, _sums(plan_q, grads_lut_q), *common, _rows(grad_k), _rows(grad_v), *tables
        )
    return grads


if not hasattr(torch.ops.rpe_ops, "rpe_attention_triton"):  # once in a process, however many copies of this there are
    for _name, _function, _its_fake in (
        ("rpe_attention_triton_plan", _plan, empty_plan),
        ("rpe_attention_triton", _attention, _fake),
        ("rpe_attention_triton_backward", _attention_backward, _fake_backward),
    ):
        torch.library.custom_op(f"rpe_ops::{_name}", _function, mutates_args=()).register_fake(_its_fake)
