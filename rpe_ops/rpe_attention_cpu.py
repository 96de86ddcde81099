"""The backend "cpu" of `rpe_attention`: tiles in C++ that never hold an (Lq, Lk) tensor, forward and backward."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from . import _native

Pairs = Sequence[tuple[Tensor, Tensor]]
FORMULA: list[Callable[..., Any]] = []  # called as `attention`: who knows the formula puts it here
OnValues = Sequence[tuple[Tensor, int]] | Sequence[tuple[Tensor, Tensor]]


def _in_bfloat16() -> bool:
    if "cpu" not in _native.LOADED:
        return False
    with _disable_current_modes():  # whatever mode imports this
        return torch.ops.rpe_ops.rpe_attention_in_bfloat16(torch.empty(0, dtype=torch.bfloat16, device="cpu"))


IN_BFLOAT16 = _in_bfloat16()  # bfloat16 is multiplied as such, by instructions that this machine has; else as float32


def why_not(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why this backend cannot take such a call, as the end of a sentence; None where it can."""
    if "cpu" not in _native.LOADED:
        return f"needs the C++ operators: {_native.MISSING['cpu']}"
    if q.device.type != "cpu":
        return f"runs on the CPU, and q is on {q.device}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return 'has no gradient of attn_mask: use backend="eager", or detach the mask'
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: OnValues, **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """(out, sums) of checked arguments. Settings are scale, attn_mask, dropout_p, seed, and whether second derivatives,
    which `FORMULA` has, are wanted or refused.

    Tables are side tables (B, H, L, N), or W, (H, D, N), on values (H, N, D): either all of on_v have W, or none has.
    """
    mask, seed = settings["attn_mask"], settings["seed"]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    tables = [table for table, _ in (*on_q, *on_k)] + [W for _, W in on_v if isinstance(W, Tensor)]
    maps = [ids for _, ids in (*on_q, *on_k)] + [ids for ids, _ in on_v]
    buckets = [table.shape[-1] for table, _ in (*on_q, *on_k)]
    buckets += [last.shape[1] if isinstance(last, Tensor) else last for _, last in on_v]
    numbers = (settings["scale"], settings["dropout_p"], len(on_q), len(on_k), len(tables), settings["second"], buckets)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *tables))
    # where nothing is trained torch.compile calls forward with one argument too many
    bare = torch.compiler.is_compiling() and not trains
    call = RPEAttentionFunction.forward if bare else RPEAttentionFunction.apply
    out, _, *sums = call(q, k, v, mask, seed, numbers, *tables, *maps)
    return out, sums


class RPEAttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, seed, (scale, p, len(on_q), len(on_k), len(tables), second, buckets), *tables, *maps)
    -> (out, lse, *sums)."""

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
        return *grads[:3], None, None, None, *grads[3:], *[None] * (len(rest) - ctx.numbers[4])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionFunction, info, in_dims, args)


class RPEAttentionBackward(torch.autograd.Function):
    """(grad_out, q, k, v, lse, mask, seed, numbers, *grad_sums, *tables, *maps) -> grads of q, k, v, *tables."""

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
        sums, rest = list(rest[: numbers[7]]), rest[numbers[7] :]
        arguments = _arguments(mask, seed, numbers, rest)
        grads = torch.ops.rpe_ops.rpe_attention_backward(grad_out, sums, q, k, v, lse, *arguments)
        of_tables = [
            grad.sum(0).to(table.dtype) if table.dim() == 3 else grad  # of W they come for each sample
            for grad, table in zip(itertools.chain(*grads[3:]), rest, strict=False)
        ]
        return *grads[:3], *of_tables

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        grad_out, q, k, v, _, mask, seed, ctx.numbers, *rest = inputs
        ctx.save_for_backward(grad_out, q, k, v, mask, seed, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout_p, num_q, num_k, num_tables, second_order, buckets, num_sums = ctx.numbers
        if not second_order:
            raise NotImplementedError('second derivatives of rpe_attention: call it with backend="eager", or None')
        grad_out, q, k, v, mask, seed, *rest = ctx.saved_tensors
        sums, rest = rest[:num_sums], rest[num_sums:]
        tables, maps = rest[:num_tables], rest[num_tables:]
        ids = list(zip(maps, buckets, strict=True))
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v, *tables)]
            outer = [x.detach().requires_grad_() for x in (grad_out, *sums)]
            pairs = list(zip(inputs[3:], [one for one, _ in ids], strict=False))
            on_q, on_k, on_v = pairs[:num_q], pairs[num_q : num_q + num_k], ids[num_q + num_k :]
            if num_tables > num_q + num_k:
                on_v = [(one, W) for (one, _), W in zip(on_v, inputs[3 + num_q + num_k :], strict=True)]
            settings = dict(scale=scale, attn_mask=mask, dropout_p=dropout_p, seed=seed)
            out, bucket_sums = FORMULA[0](*inputs[:3], on_q, on_k, on_v, **settings)
            first = torch.autograd.grad([out, *bucket_sums], inputs, outer, create_graph=True)
            second = torch.autograd.grad(first, [*outer, *inputs], grads, allow_unused=True, materialize_grads=True)
        of_out, *of_sums = second[: 1 + num_sums]
        of_q, of_k, of_v, *of_tables = second[1 + num_sums :]
        return of_out, of_q, of_k, of_v, None, None, None, None, *of_sums, *of_tables, *[None] * len(maps)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionBackward, info, in_dims, args)


def _arguments(mask: Tensor | None, seed: Tensor | None, numbers: tuple, rest: Sequence[Tensor]) -> tuple:
    scale, dropout_p, num_q, num_k, num_tables = numbers[:5]
    ends = [0, num_q, num_q + num_k, num_tables, num_tables + num_q, num_tables + num_q + num_k, len(rest)]
    lists = [list(rest[a:b]) for a, b in itertools.pairwise(ends)]
    sizes = [
        [n for N in numbers[6][a:b] for n in (0, 0, 0, N)]
        for a, b in ((0, num_q), (num_q, num_q + num_k), (num_q + num_k, None))
    ]
    return *lists, *sizes, mask, seed, scale, dropout_p


def _vmap(function: Any, info: Any, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The mapped dimension becomes part of B, for all that have a B."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point() and x.dtype != torch.bool:  # maps and seeds have no B
            if dim is not None:
                raise NotImplementedError("vmap over the ids or the seed of rpe_attention")
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = function.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)


def _empty_heads(q: Tensor, tokens: int) -> Tensor:
    return q.new_empty(q.shape[0], tokens, q.shape[1], q.shape[3]).transpose(1, 2)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, tables_q: list, tables_k: list, tables_v: list, *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    sums = [] if tables_v else [q.new_empty(*q.shape[:3], N) for N in rest[5][3::4]]
    return _empty_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=_precise(q)), sums


def _precise(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_backward(
    grad_out: Tensor, grad_sums: list, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *tables: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    def gradient(table: Tensor) -> Tensor:
        if table.dim() == 3:
            return table.new_empty(q.shape[0], *table.shape, dtype=_precise(q))
        return table.new_empty(table.shape)

    of_q, of_k, of_v = ([gradient(table) for table in some] for some in tables[:3])
    return _empty_heads(q, q.shape[2]), _empty_heads(q, k.shape[2]), _empty_heads(q, k.shape[2]), of_q, of_k, of_v


if _native.first_time("rpe_attention"):
    torch.library.register_fake("rpe_ops::rpe_attention", _fake)
    torch.library.register_fake("rpe_ops::rpe_attention_backward", _fake_backward)
