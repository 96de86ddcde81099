"""`rpe_attention`: attention with encodings on queries, keys and values, in tensors; the choice of its backends."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

Pairs = Sequence[tuple[Tensor, Tensor]]
_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Pairs = (),
    on_k: Pairs = (),
    on_v: Sequence[tuple[Tensor, int]] = (),
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """p = dropout(softmax(scale q k^T + sum lut_k[i, ids[i, j]] + sum lut_q[j, ids[j, i]] + mask)), out = p v.

    >>> q, k, v = torch.randn(3, 2, 6, 127, 64)
    >>> ids, lut_k = torch.zeros(127, 127, dtype=torch.uint8), torch.randn(2, 6, 127, 50)
    >>> out, (sums,) = rpe_attention(q, k, v, on_k=[(lut_k, ids)], on_v=[(ids, 50)])
    >>> out.shape, sums.shape
    (torch.Size([2, 6, 127, 64]), torch.Size([2, 6, 127, 50]))

    Args:
        q, k, v: (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D) of one dtype and any strides, q not scaled yet.
        on_q: pairs of a side table lut_q, (B or 1, H or 1, Lk, N), and its ids (Lk, Lq); cross has two pairs.
        on_k: pairs of a side table lut_k, (B or 1, H or 1, Lq, N), and its ids (Lq, Lk).
        on_v: pairs of ids (Lq, Lk) and N. Ids are uint8, int16, int32 or int64 in [0, N).
        scale: D ** -0.5 by default.
        attn_mask: broadcasts to (B, H, Lq, Lk); boolean (True takes part) or floating point (added). A row that is
            masked whole has weights 0.
        dropout_p: probability that a weight is dropped.
        seed: int64 tensor of one element, what the dropped weights depend on; drawn from torch's generator when absent.
            One seed drops the same weights on every backend.
        backend: "cpu" is C++ that never holds an (Lq, Lk) tensor, "eager" the formula in plain torch, "reference" the
            law. A name is honoured or refused. None takes "cpu" where it runs and "eager" elsewhere. "cpu" has no
            second derivatives and no gradient of attn_mask: "eager" has.

    Returns:
        out (B, H, Lq, D) without the encoding on values, and for each pair of on_v the bucket sums of p, (B, H, Lq, N):
        the caller adds S @ W_v. Under autocast q, k, v are cast as `F.scaled_dot_product_attention` does.

    Source: iRPE, arXiv 2107.14222, Eq. 12 to 14; recomputed tiles as in arXiv 2205.14135.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, attn_mask, dropout_p)
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    on_q = [(_table(lut, ids, "on_q", (B, H, Lk, Lq)), ids) for lut, ids in on_q]
    on_k = [(_table(lut, ids, "on_k", (B, H, Lq, Lk)), ids) for lut, ids in on_k]
    for ids, _ in on_v:
        _check_ids(ids, "on_v", (Lq, Lk), q.device)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    settings = dict(scale=D**-0.5 if scale is None else scale, attn_mask=attn_mask, dropout_p=dropout_p, seed=seed)
    if backend == "reference":
        return reference.rpe_attention(q, k, v, on_q, on_k, on_v, **settings)
    if backend not in (None, "eager", "cpu"):
        raise ValueError(f'unknown backend {backend!r}; expected None, "cpu", "eager" or "reference"')
    why_not = None if backend == "eager" else why_not_cpu(q, attn_mask)
    if backend == "cpu" and why_not is not None:
        raise ValueError(f'backend="cpu" {why_not}')
    if backend == "eager" or why_not is not None:
        return _eager(q, k, v, on_q, on_k, on_v, **settings)
    return _fused(q, k, v, on_q, on_k, on_v, **settings)


def why_not_cpu(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why the C++ backend cannot take such a call, as the end of a sentence; None where it can."""
    if not hasattr(torch.ops.rpe_ops, "rpe_attention"):
        return "needs the C++ operators, which are not built: cd rpe_ops && python setup.py install --user"
    if q.device.type != "cpu":
        return f"runs on the CPU, and q is on {q.device}"
    if q.dtype not in _FLOATS:
        return f"takes {', '.join(map(str, _FLOATS))}, and q is {q.dtype}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return 'has no gradient of attn_mask: use backend="eager", or detach the mask'
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> None:
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"{shapes}; expected (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D)")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}; expected (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D)")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise TypeError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one device")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p}; expected a probability, 0 <= dropout_p <= 1")
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask is {attn_mask.dtype}; expected bool (True takes part) or floating point (added)")
    full = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.dim() > 4 or any(have not in (1, want) for have, want in sizes):
        raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to {full}")
    if attn_mask.device != q.device:
        raise ValueError(f"q is on {q.device}, attn_mask on {attn_mask.device}: move one of them")


def _check_ids(ids: Tensor, name: str, shape: tuple[int, int], device: torch.device) -> None:
    if ids.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name}: ids are {ids.dtype}; expected one of {', '.join(map(str, _INDEX_DTYPES))}")
    if ids.shape != shape:
        raise ValueError(f"{name}: ids have shape {tuple(ids.shape)}; expected {shape}")
    if ids.device != device:
        raise ValueError(f"{name}: q is on {device}, ids on {ids.device}: move one of them")


def _table(lut: Tensor, ids: Tensor, name: str, sizes: tuple[int, int, int, int]) -> Tensor:
    """lut expanded to (B, H, L, N), checked together with its ids (L, L')."""
    B, H, rows, columns = sizes
    fits = lut.dim() == 4 and lut.shape[0] in (1, B) and lut.shape[1] in (1, H) and lut.shape[2] == rows
    if not fits:
        raise ValueError(f"{name}: the table has shape {tuple(lut.shape)}; expected ({B} or 1, {H} or 1, {rows}, N)")
    if lut.dtype not in _FLOATS:
        raise TypeError(f"{name}: the table is {lut.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
    _check_ids(ids, name, (rows, columns), lut.device)
    return lut.expand(B, H, -1, -1)


# The formula in plain torch.


def _eager(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: Sequence[tuple[Tensor, int]], **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    scores = (q * settings["scale"]) @ k.transpose(-2, -1)  # (B, H, Lq, Lk)
    for lut, ids in on_k:
        scores = scores + lut.gather(-1, ids.long().expand(*lut.shape[:2], *ids.shape))
    for lut, ids in on_q:
        scores = scores + lut.gather(-1, ids.long().expand(*lut.shape[:2], *ids.shape)).transpose(-2, -1)
    empty = None
    mask = settings["attn_mask"]
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
        empty = (mask == -torch.inf).all(-1, keepdim=True)  # such rows stay finite, and are cleared below
        scores = scores + mask.masked_fill(empty, 0.0)
    p = scores.softmax(-1)
    if empty is not None:
        p = p.masked_fill(empty, 0.0)
    if settings["dropout_p"] > 0:
        p = p * _dropout(settings["seed"], p.shape, settings["dropout_p"]).to(p.dtype)
    p = p.to(q.dtype)
    sums = []
    for ids, num_buckets in on_v:
        zeros = p.new_zeros(*p.shape[:3], num_buckets)
        sums.append(zeros.scatter_add(-1, ids.long().expand(p.shape), p))
    return p @ v, sums


def _mix(x: Tensor) -> Tensor:
    # a 32-bit hash; int32 products wrap, and its shifts keep the sign, which the masks remove
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _dropout(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """(B, H, Lq, Lk) of 1 / (1 - p), and 0 where hash(seed, b, h, i, j) is below p * 2^24."""
    B, H, Lq, Lk = shape
    count = [torch.arange(n, dtype=torch.int32, device=seed.device) for n in (B * H, Lq, Lk)]
    low, high = seed.reshape(1).view(torch.int32)
    key = _mix(_mix(low + (0x9E3779B9 - 2**32)) ^ high)
    key = _mix(key ^ count[0].view(B, H, 1, 1))
    key = _mix(key ^ count[1].view(Lq, 1))
    dropped = (_mix(key ^ count[2]) >> 8 & 0xFFFFFF) < int(dropout_p * 2**24 + 0.5)
    return torch.where(dropped, 0.0, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


# The operators in C++.


def _fused(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: Sequence[tuple[Tensor, int]], **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    mask, seed = settings["attn_mask"], settings["seed"]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    plans = [plan for lut, ids in (*on_q, *on_k) for plan in _plan(ids, lut.shape[3])]
    plans += [plan for ids, num_buckets in on_v for plan in _plan(ids, num_buckets)]
    numbers = (settings["scale"], settings["dropout_p"], len(on_q), len(on_k))
    tables = [lut for lut, _ in (*on_q, *on_k)]
    out, _, *sums = RPEAttentionFunction.apply(q, k, v, mask, seed, numbers, *tables, *plans)
    return out, sums


_plans: dict[tuple, tuple[Any, int, tuple[Tensor, Tensor]]] = {}
_plans_lock = threading.Lock()


def _plan(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """What the kernels read instead of ids: small ids of the columns that occur, and which these are. Kept with ids."""
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.is_inference():
        return torch.ops.rpe_ops.rpe_attention_plan(ids, num_buckets)
    key = (id(ids), num_buckets)
    with _plans_lock:
        known = _plans.get(key)
    if known is not None and known[0]() is ids and known[1] == ids._version:
        return known[2]
    plan = torch.ops.rpe_ops.rpe_attention_plan(ids, num_buckets)
    alive = weakref.ref(ids, lambda _: _plans.pop(key, None))
    with _plans_lock:
        _plans[key] = (alive, ids._version, plan)
    return plan


class RPEAttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, seed, (scale, p, number of on_q, of on_k), *tables, *plans) -> (out, lse, *sums)."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, numbers: tuple, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        out, lse, sums = torch.ops.rpe_ops.rpe_attention(q, k, v, *_arguments(mask, seed, numbers, rest))
        return out, lse, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        q, k, v, mask, seed, ctx.numbers, *rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, output[1], mask, seed, *rest)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, mask, seed, *rest = ctx.saved_tensors
        numbers = (*ctx.numbers, len(grad_sums))
        # a compiled graph has no second derivative that RPEAttentionBackward would have to refuse
        call = RPEAttentionBackward.forward if torch.compiler.is_compiling() else RPEAttentionBackward.apply
        grads = call(grad_out, q, k, v, lse, mask, seed, numbers, *grad_sums, *rest)
        tables = ctx.numbers[2] + ctx.numbers[3]
        return *grads[:3], None, None, None, *grads[3:], *[None] * (len(rest) - tables)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionFunction, info, in_dims, args)


class RPEAttentionBackward(torch.autograd.Function):
    """(grad_out, q, k, v, lse, mask, seed, numbers, *grad_sums, *tables, *plans) -> (grad_q, grad_k, grad_v, *grads)."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        numbers: tuple,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        sums, rest = list(rest[: numbers[4]]), rest[numbers[4] :]
        arguments = _arguments(mask, seed, numbers[:4], rest)
        grads = torch.ops.rpe_ops.rpe_attention_backward(grad_out, sums, q, k, v, lse, *arguments)
        return *grads[:3], *grads[3], *grads[4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError('second derivatives of rpe_attention: call it with backend="eager"')

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionBackward, info, in_dims, args)


def _arguments(mask: Tensor | None, seed: Tensor | None, numbers: tuple, rest: Sequence[Tensor]) -> tuple:
    scale, dropout_p, num_q, num_k = numbers
    ends = [0, num_q, num_q + num_k, 3 * num_q + num_k, 3 * num_q + 3 * num_k, len(rest)]
    return *(list(rest[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)), mask, seed, scale, dropout_p


def _vmap(function: Any, info: Any, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The mapped dimension becomes part of B, for all that have a B: tensors of three dimensions or more."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor) or (dim is None and x.dim() < 3):
            return x
        if x.dim() - (dim is not None) < 3:
            raise NotImplementedError("vmap over ids or seeds of rpe_attention")
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = function.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)


def _fake_plan(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    dtype = torch.uint8 if num_buckets <= 256 else torch.int32
    compact = ids.new_empty(ids.shape[0], (ids.shape[1] + 15) // 16 * 16, dtype=dtype)
    return compact, ids.new_empty(num_buckets + 1, dtype=torch.int32)


def _empty_heads(q: Tensor, tokens: int) -> Tensor:
    return q.new_empty(q.shape[0], tokens, q.shape[1], q.shape[3]).transpose(1, 2)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, lut_q: list, lut_k: list, plan_q: list, plan_k: list, plan_v: list, *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = [q.new_empty(*q.shape[:3], columns.shape[0] - 1) for columns in plan_v[1::2]]
    return _empty_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=precise), sums


def _fake_backward(
    grad_out: Tensor, grad_sums: list, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lut_q: list, lut_k: list, *_: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    return _empty_heads(q, q.shape[2]), _empty_heads(q, k.shape[2]), _empty_heads(q, k.shape[2]), grads_q, grads_k


def _register() -> None:
    if hasattr(torch.ops.rpe_ops, "rpe_attention"):
        torch.library.register_fake("rpe_ops::rpe_attention_plan", _fake_plan)
        torch.library.register_fake("rpe_ops::rpe_attention", _fake)
        torch.library.register_fake("rpe_ops::rpe_attention_backward", _fake_backward)


_register()
