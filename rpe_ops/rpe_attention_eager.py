"""The backend "eager" of `rpe_attention`: the formula in plain torch, on every device, any derivative."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .maps import NUMBERS, Map, from_numbers, look_up, sum_up

Pairs = Sequence[tuple[Tensor, Map]]
OnValues = Sequence[tuple[Map, int]] | Sequence[tuple[Map, Tensor]]


def about() -> str:
    """What it is, for `rpe_ops.backends()`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device is visible"
    return (
        f"runs on every device through gather and scatter_add of torch {torch.__version__} ({gpu}); on CUDA "
        "scatter_add uses atomics, so bucket sums may differ in their last bits from run to run, unless "
        "torch.use_deterministic_algorithms(True) is set"
    )


def pairs_of(
    tables: Sequence[Sequence[Tensor]], maps: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[int]]
) -> tuple[list[Any], list[Any], list[Any]]:
    """(on_q, on_k, on_v) of what operators are given for q, k and v: tables, and maps as `maps.NUMBERS` says."""
    of_q, of_k, of_v = (
        [from_numbers(x, n[NUMBERS * i : NUMBERS * (i + 1)]) for i, x in enumerate(some)]
        for some, n in zip(maps, numbers, strict=True)
    )
    on_v = zip(of_v, tables[2] or numbers[2][3::NUMBERS], strict=True)
    return list(zip(tables[0], of_q, strict=True)), list(zip(tables[1], of_k, strict=True)), list(on_v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: OnValues, **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """(out, sums) of checked arguments, tables as in `rpe_attention`; settings: scale, attn_mask, dropout_p, seed."""
    out, sums, _ = _attention(q, k, v, on_q, on_k, on_v, **settings)
    return out, [] if any(isinstance(W, Tensor) for _, W in on_v) else sums


def attention_and_lse(*args: Any, **settings: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, sums) as a fused operator returns them: lse = log sum exp(scores), inf where a row has no key."""
    out, sums, of = _attention(*args, **settings)
    lse = of.scores.to(torch.promote_types(out.dtype, torch.float32)).logsumexp(-1)
    return out, lse if of.empty is None else lse.masked_fill(of.empty.squeeze(-1), torch.inf), sums


class _Weights(NamedTuple):
    scores: Tensor  # (B, H, Lq, Lk)
    empty: Tensor | None  # rows without a key, (.., Lq, 1)
    p: Tensor  # before dropout
    keep: Tensor | None  # what dropout multiplies p with


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Pairs,
    on_k: Pairs,
    on_v: OnValues,
    *,
    scale: float,
    attn_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, list[Tensor], _Weights]:
    scaled_q = q * scale
    scores = scaled_q @ k.transpose(-2, -1)
    for table, place in on_k:
        scores = scores + look_up(_side_table(scaled_q, table), place)
    for table, place in on_q:
        scores = scores + look_up(_side_table(k * scale, table), place).transpose(-2, -1)
    empty = keep = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(scores.dtype)  # first: finfo.min of a wider dtype is -inf here
        empty = (attn_mask == -torch.inf).all(-1, keepdim=True)  # such rows stay finite, and are cleared below
        scores = scores + attn_mask.masked_fill(empty, 0.0)
    p = scores.softmax(-1)
    if empty is not None:
        p = p.masked_fill(empty, 0.0)
    if dropout_p > 0:
        assert seed is not None
        keep = _dropout(seed, p.shape, dropout_p, p.dtype)
    dropped = (p if keep is None else p * keep).to(q.dtype)
    out, sums = dropped @ v, []
    for place, last in on_v:
        sums.append(sum_up(dropped, place, last.shape[-2] if isinstance(last, Tensor) else last))
        if isinstance(last, Tensor):
            out = out + sums[-1] @ last.to(q.dtype)
    return out, sums, _Weights(scores, empty, p, keep)


def gradients(grad_out: Tensor, grad_sums: Sequence[Tensor], inputs: tuple, **settings: Any) -> list[Tensor]:
    """Of q, k, v and the tables, without autograd: inside of an operator there is none.

    inputs are the arguments of `attention`; grad_sums are there where on_v has N.
    """
    q, k, v, on_q, on_k, on_v = inputs
    _, sums, (_, _, p, keep) = _attention(*inputs, **settings)
    grad_p = grad_out @ v.transpose(-2, -1)
    of_sums = [grad_out @ W.to(q.dtype).transpose(-2, -1) for _, W in on_v if isinstance(W, Tensor)] or grad_sums
    for (place, _), of_sum in zip(on_v, of_sums, strict=True):
        grad_p = grad_p + look_up(of_sum, place)
    if keep is not None:
        grad_p = grad_p * keep
    grad = (p * (grad_p - (p * grad_p).sum(-1, keepdim=True))).to(q.dtype)  # of the scores
    scale, dropped = settings["scale"], (p if keep is None else p * keep).to(q.dtype)
    grads = [grad @ k * scale, grad.transpose(-2, -1) @ (q * scale), dropped.transpose(-2, -1) @ grad_out]
    for pairs, x, of_x, of_rows in ((on_q, k, 1, grad.transpose(-2, -1)), (on_k, q, 0, grad)):
        for table, place in pairs:
            of_table = sum_up(of_rows, place, table.shape[-1])
            if table.dim() == 3:
                grads[of_x] = grads[of_x] + of_table @ table.to(q.dtype).transpose(-2, -1) * scale
                of_table = ((x * scale).transpose(-2, -1) @ of_table).sum(0)
            grads.append(of_table.to(table.dtype))
    for bucket_sums, (_, W) in zip(sums, on_v, strict=True):
        if isinstance(W, Tensor):
            grads.append((bucket_sums.transpose(-2, -1) @ grad_out).sum(0).to(W.dtype))
    return grads


def _side_table(x: Tensor, table: Tensor) -> Tensor:
    """x @ W, (B, H, L, N), or the side table that is there already."""
    return x @ table.to(x.dtype) if table.dim() == 3 else table


def second_gradients(outer: Sequence[Tensor], grads: Sequence[Tensor], inputs: tuple, **settings: Any) -> list[Tensor]:
    """Of the function (grads of out and sums, q, k, v, tables) -> `gradients`, for gradients of its result: `outer`."""
    q, k, v, on_q, on_k, on_v = inputs
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *_tables(on_q, on_k, on_v))]
        of = [x.detach().requires_grad_() for x in grads]
        pairs = _with_tables(leaves[3:], on_q, on_k, on_v)
        out, sums = attention(leaves[0], leaves[1], leaves[2], *pairs, **settings)
        first = torch.autograd.grad([out, *sums], leaves, of, create_graph=True)
        return list(torch.autograd.grad(first, [*of, *leaves], outer, allow_unused=True, materialize_grads=True))


def _tables(on_q: Pairs, on_k: Pairs, on_v: OnValues) -> list[Tensor]:
    return [table for table, _ in (*on_q, *on_k)] + [W for _, W in on_v if isinstance(W, Tensor)]


def _with_tables(tables: Sequence[Tensor], on_q: Pairs, on_k: Pairs, on_v: OnValues) -> tuple[Any, Any, Any]:
    """The pairs with other tables, in the order of `_tables`."""
    left = iter(tables)
    on_q, on_k = ([(next(left), place) for _, place in pairs] for pairs in (on_q, on_k))
    return on_q, on_k, [(place, next(left) if isinstance(W, Tensor) else W) for place, W in on_v]


def _mix(x: Tensor) -> Tensor:
    # a 32-bit hash; int32 products wrap, and its shifts keep the sign, which the masks remove
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _dropout(seed: Tensor, shape: Sequence[int], dropout_p: float, dtype: torch.dtype) -> Tensor:
    """(B, H, Lq, Lk) of 1 / (1 - p), and 0 where hash(seed, b, h, i, j) is below p * 2^24."""
    B, H, Lq, Lk = shape
    count = [torch.arange(n, dtype=torch.int32, device=seed.device) for n in (B * H, Lq, Lk)]
    seed = seed.reshape(())
    low, high = (seed << 32 >> 32).int(), (seed >> 32).int()
    key = _mix(_mix(low + (0x9E3779B9 - 2**32)) ^ high)
    key = _mix(key ^ count[0].view(B, H, 1, 1))
    key = _mix(key ^ count[1].view(Lq, 1))
    dropped = (_mix(key ^ count[2]) >> 8 & 0xFFFFFF) < int(dropout_p * 2**24 + 0.5)
    # not by torch.where, whose numbers are float32
    return (~dropped).to(dtype) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
