"""Fused attention as a function of autograd, whichever backend computes it.

A backend is a module with

    why_not(q, attn_mask)         why it cannot take such a q and mask, as the end of a sentence, or None
    why_not_call(call, q, tables) the same of all the rest; the next backend that can then takes the call
    about()                       what it is, as a sentence
    is_slow(q, k)                 whether the formula is the faster one for such a call
    forward(call, inputs)         (out, lse, sums): lse (B, H, Lq), bucket sums (B, H, Lq, N) for each map on values.
                                  Tables on values that are W are in `out`, and sums what the backend likes to keep
    backward(call, inputs, saved) gradients of q, k, v and of each table, as one list
    KEEPS_OUT                     whether its backward reads out and sums

and a name in `BACKENDS`. Tables are side tables (B, H, L, N) or W: (H, D, N), on values (H, N, D).
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _torch, rpe_attention_cpu, rpe_attention_cuda, rpe_attention_eager, rpe_attention_triton
from .maps import NUMBERS, tensor_and_numbers

# where several take a call, the first is chosen
BACKENDS: dict[str, Any] = {"cpu": rpe_attention_cpu, "cuda": rpe_attention_cuda, "triton": rpe_attention_triton}


NO_FORWARD_MODE = 'forward mode (jvp) of rpe_attention: call it with backend="eager", or None'


class Call(NamedTuple):
    """What is no tensor. numbers are those of each map, one map after the other, see `maps.NUMBERS`."""

    backend: str
    scale: float
    dropout_p: float
    numbers_q: tuple[int, ...]
    numbers_k: tuple[int, ...]
    numbers_v: tuple[int, ...]
    weights_v: bool  # the tables on values are W
    or_eager: bool  # what the backend cannot (second derivatives, a kernel that fails) is left to the formula
    trains: bool  # a backward may follow


class Inputs(NamedTuple):
    """The tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: Tensor | None
    tables_q: list[Tensor]
    tables_k: list[Tensor]
    tables_v: list[Tensor]
    maps_q: list[Tensor]
    maps_k: list[Tensor]
    maps_v: list[Tensor]


class Saved(NamedTuple):
    """What the backward has beside the inputs; out and sums are there where the backend keeps them."""

    grad_out: Tensor
    grad_sums: list[Tensor]
    out: Tensor | None
    lse: Tensor
    sums: list[Tensor]


def attention(
    backend: str, q: Tensor, k: Tensor, v: Tensor, on_q: Any, on_k: Any, on_v: Any, *, or_eager: bool, **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """(out, sums) of checked arguments, as `rpe_attention` takes and returns them."""
    mask, seed = settings["attn_mask"], settings["seed"]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    tables = [table for table, _ in (*on_q, *on_k)] + [W for _, W in on_v if isinstance(W, Tensor)]
    maps: list[Tensor] = []
    numbers: list[tuple[int, ...]] = []
    for pairs in (
        [(place, table.shape[-1]) for table, place in on_q],
        [(place, t.shape[-1]) for t, place in on_k],
        on_v,
    ):
        some: tuple[int, ...] = ()
        for place, last in pairs:
            tensor, its = tensor_and_numbers(place, last.shape[-2] if isinstance(last, Tensor) else last)
            maps.append(tensor)
            some += its
        numbers.append(some)
    weights_v = len(tables) > len(on_q) + len(on_k)
    of_q, of_k, of_v = numbers
    trains = torch.is_grad_enabled() and True in [x.requires_grad for x in (q, k, v, *tables)]
    call = Call(backend, settings["scale"], settings["dropout_p"], of_q, of_k, of_v, weights_v, or_eager, trains)
    while reason := BACKENDS[call.backend].why_not_call(call, q, tables):
        if not or_eager:
            raise ValueError(f'backend="{call.backend}" {reason}')
        later = list(BACKENDS)[list(BACKENDS).index(call.backend) + 1 :]
        takers = [x for x in later if not BACKENDS[x].why_not(q, mask) and not BACKENDS[x].is_slow(q, k)]
        if not takers:
            return rpe_attention_eager.attention(q, k, v, on_q, on_k, on_v, **settings)
        call = call._replace(backend=takers[0])
    compiling = torch.compiler.is_compiling()
    if compiling:  # one tensor twice, a map of q and k or q that is k, is more than torch.compile takes
        k, v, maps = k.view_as(k), v.view_as(v), [x.view_as(x) for x in maps]
    # without a derivative to come autograd is a third of a small call, and torch.compile adds an argument to forward
    plain = not trains and (compiling or not (_torch.transforms_active() or _torch.forward_mode()))
    function = RPEAttention.forward if plain else RPEAttention.apply
    out, _, *sums = function(call, q, k, v, mask, seed, *tables, *maps)
    return out, [] if weights_v else sums


def _inputs(call: Call, first: Sequence[Any], rest: Sequence[Tensor]) -> Inputs:
    counts = [len(some) // NUMBERS for some in (call.numbers_q, call.numbers_k, call.numbers_v)]
    ends = list(itertools.accumulate([0, *counts[:2], counts[2] if call.weights_v else 0, *counts]))
    return Inputs(*first, *(list(rest[a:b]) for a, b in itertools.pairwise(ends)))


class RPEAttention(torch.autograd.Function):
    """(call, q, k, v, mask, seed, *tables, *maps) -> (out, lse, *sums)."""

    @staticmethod
    def forward(call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        out, lse, sums = BACKENDS[call.backend].forward(call, _inputs(call, tensors[:5], tensors[5:]))
        return out, lse, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        out, lse, *sums = output
        ctx.mark_non_differentiable(lse, *(sums if ctx.call.weights_v else ()))
        kept = (out, *sums) if BACKENDS[ctx.call.backend].KEEPS_OUT else ()
        ctx.save_for_backward(lse, *tensors, *kept)
        if not torch.compiler.is_compiling():  # zeros for lse and sums would be made at every step, and never read
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any, *grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        call, (lse, q, *rest) = ctx.call, ctx.saved_tensors
        grad_out = torch.zeros_like(q) if grad_out is None else grad_out
        its = () if call.weights_v else zip(grad_sums, call.numbers_v[3::NUMBERS], strict=True)
        of_sums = [q.new_zeros(*q.shape[:3], n) if x is None else x for x, n in its]
        # where no other derivative can follow, none has to be prepared; a compiled graph has none
        follows = torch.is_grad_enabled() or _torch.transforms_active() or _torch.forward_mode()
        plain = torch.compiler.is_compiling() or not follows
        function = RPEAttentionBackward.forward if plain else RPEAttentionBackward.apply
        grads = function(call, grad_out, lse, q, *rest, *of_sums)
        maps = (len(ctx.call.numbers_q) + len(ctx.call.numbers_k) + len(ctx.call.numbers_v)) // NUMBERS
        return None, *grads[:3], None, None, *grads[3:], *[None] * maps

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttention, info, in_dims, args)


class RPEAttentionBackward(torch.autograd.Function):
    """(call, grad_out, lse, q, k, v, mask, seed, *tables, *maps, out and *sums if kept, *grad_sums) -> gradients.

    They are of q, k, v, *tables.
    """

    @staticmethod
    def forward(call: Call, grad_out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        inputs, kept, grad_sums = _parts(call, rest)
        out, sums = (kept[0], kept[1:]) if kept else (None, [])
        return tuple(BACKENDS[call.backend].backward(call, inputs, Saved(grad_out, grad_sums, out, lse, sums)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.call, grad_out, _, *rest = inputs
        its, kept, grad_sums = _parts(ctx.call, rest)
        ctx.count_kept = len(kept)
        flat = itertools.chain(*its[5:])
        ctx.save_for_backward(grad_out, *its[:5], *flat, *grad_sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if not call.or_eager:
            raise NotImplementedError('second derivatives of rpe_attention: call it with backend="eager", or None')
        grad_out, *rest = ctx.saved_tensors
        inputs, _, grad_sums = _parts(call, rest, kept=False)
        pairs, settings = _formula_of(call, inputs)
        second = rpe_attention_eager.second_gradients(grads, (grad_out, *grad_sums), pairs, **settings)
        of_out, *of_sums = second[: 1 + len(grad_sums)]
        of_q, of_k, of_v, *of_tables = second[1 + len(grad_sums) :]
        maps = sum(map(len, inputs[8:]))
        nothing = [None] * (maps + ctx.count_kept)
        return None, of_out, None, of_q, of_k, of_v, None, None, *of_tables, *nothing, *of_sums

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionBackward, info, in_dims, args)


_forwards: list[Any] = [RPEAttention.forward, RPEAttentionBackward.forward]
for _forward in _forwards:
    # `apply` asks for it in every call, and working it out takes longer than all the rest of `apply`
    _forward.__signature__ = inspect.signature(_forward)


def _parts(call: Call, rest: Sequence[Any], kept: bool = True) -> tuple[Inputs, list[Tensor], list[Tensor]]:
    """(inputs, out and sums where they are kept, grad_sums)."""
    values = len(call.numbers_v) // NUMBERS
    maps = (len(call.numbers_q) + len(call.numbers_k)) // NUMBERS + values
    end = 5 + 2 * maps - (0 if call.weights_v else values)
    kept_end = end + (1 + values if kept and BACKENDS[call.backend].KEEPS_OUT else 0)
    return _inputs(call, rest[:5], rest[5:end]), list(rest[end:kept_end]), list(rest[kept_end:])


def _formula_of(call: Call, inputs: Inputs) -> tuple[tuple, dict[str, Any]]:
    """A call as the formula takes it: (q, k, v, on_q, on_k, on_v) and the settings."""
    pairs = rpe_attention_eager.pairs_of(inputs[5:8], inputs[8:11], call[3:6])
    settings = dict(scale=call.scale, attn_mask=inputs.mask, dropout_p=call.dropout_p, seed=inputs.seed)
    return (*inputs[:3], *pairs), settings


def _vmap(function: Any, info: Any, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The mapped dimension becomes part of B, for all that have a B."""
    if args[0].dropout_p > 0:  # which weights are dropped depends on the place in B, and seeds may differ
        dims = (None, *in_dims[1:])
        each = [
            function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point() and x.dtype != torch.bool:  # maps and seeds have no B
            if dim is not None:
                raise NotImplementedError("vmap over the ids or the seed of rpe_attention")
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    in_dims = (None, *in_dims[1:])  # of the call, a tuple of its own
    outputs = function.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)
