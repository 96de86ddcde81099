"""The backend "triton" of `rpe_attention`: tiles on a GPU that never hold an (Lq, Lk) tensor, forward and backward."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _triton_launch

Pairs = Sequence[tuple[Tensor, Tensor]]
FORMULA: list[Callable[..., Any]] = []  # called as `attention`: who knows the formula puts it here
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 128
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are defined


def why_not(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why this backend cannot take such a call, as the end of a sentence; None where it can."""
    if not _HAS_TRITON:
        return "needs Triton, which is not installed (torch for CUDA and ROCm comes with it)"
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"runs on CUDA and ROCm, and q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"computes in float16, bfloat16 and float32, and q is {q.dtype}"
    if not 1 <= q.shape[-1] <= _WIDEST:
        return f"takes head sizes from 1 to {_WIDEST}, and q has {q.shape[-1]}"
    if q.device.type == "cuda" and (found := _too_old(q.device.index)):
        return f"needs compute capability 8.0, and {q.device} has {found}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return 'has no gradient of attn_mask: use backend="eager", or detach the mask'
    return None


def _too_old(device: int) -> str:
    """The compute capability of a GPU that these kernels are not for, or ""."""
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}" if major < 8 else ""


# it never changes, so graphs may hold it: torch.compiler.assume_constant_result, which would import torch._dynamo here
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: Sequence[tuple[Tensor, int]], **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """(out, sums) of checked arguments. Settings are scale, attn_mask, dropout_p, seed, and whether second derivatives,
    which `FORMULA` has, are wanted or refused.
    """
    mask, seed = settings["attn_mask"], settings["seed"]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    sizes = [(ids, lut.shape[3]) for lut, ids in (*on_q, *on_k)] + list(on_v)
    numbers = (
        settings["scale"], settings["dropout_p"], len(on_q), len(on_k), settings["second"], tuple(n for _, n in sizes),
    )  # fmt: skip
    ids = [x for x, _ in sizes]
    tables = [lut for lut, _ in (*on_q, *on_k)]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *tables))
    # where nothing is trained torch.compile calls forward with one argument too many
    bare = torch.compiler.is_compiling() and not trains
    call = RPEAttentionFunction.forward if bare else RPEAttentionFunction.apply
    out, _, *sums = call(q, k, v, mask, seed, numbers, *tables, *ids)
    return out, sums


class RPEAttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, seed, (scale, p, len(on_q), len(on_k), second, Ns), *tables, *ids) -> (out, lse, *sums)."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, numbers: tuple, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        arguments = _arguments(mask, seed, numbers, rest)
        out, lse, sums = torch.ops.rpe_ops.rpe_attention_triton(q, k, v, *arguments)
        return out, lse, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        q, k, v, mask, seed, numbers, *rest = inputs
        out, lse, *sums = output
        ctx.numbers = (*numbers, len(sums))
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, mask, seed, *sums, *rest)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, seed, *rest = ctx.saved_tensors
        # a compiled graph has no second derivative that RPEAttentionBackward would have to refuse
        call = RPEAttentionBackward.forward if torch.compiler.is_compiling() else RPEAttentionBackward.apply
        grads = call(grad_out, q, k, v, out, lse, mask, seed, ctx.numbers, *grad_sums, *rest)
        plans = len(rest) - len(grad_sums) - len(grads[3:])
        return *grads[:3], None, None, None, *grads[3:], *[None] * plans

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionFunction, info, in_dims, args)


class RPEAttentionBackward(torch.autograd.Function):
    """(grad_out, q, k, v, out, lse, mask, seed, numbers, *grad_sums, *sums, *tables, *ids) -> gradients.

    They are of q, k, v, *tables.
    """

    @staticmethod
    def forward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        numbers: tuple,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        num_v = numbers[6]
        grad_sums, sums, rest = list(rest[:num_v]), list(rest[num_v : 2 * num_v]), rest[2 * num_v :]
        arguments = _arguments(mask, seed, numbers, rest)
        grads = torch.ops.rpe_ops.rpe_attention_triton_backward(
            grad_out, grad_sums, q, k, v, out, sums, lse, *arguments
        )
        return *grads[:3], *grads[3], *grads[4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        grad_out, q, k, v, _, _, mask, seed, ctx.numbers, *rest = inputs
        num_v = ctx.numbers[6]
        ctx.save_for_backward(grad_out, q, k, v, mask, seed, *rest[:num_v], *rest[2 * num_v :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout_p, num_q, num_k, second_order, sizes, num_v = ctx.numbers
        if not second_order:
            raise NotImplementedError('second derivatives of rpe_attention: call it with backend="eager", or None')
        grad_out, q, k, v, mask, seed, *rest = ctx.saved_tensors
        sums, rest = rest[:num_v], rest[num_v:]
        tables, plans = rest[: num_q + num_k], rest[num_q + num_k :]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v, *tables)]
            outer = [x.detach().requires_grad_() for x in (grad_out, *sums)]
            pairs = list(zip(inputs[3:], plans, strict=False))
            on_v = list(zip(plans, sizes, strict=True))[num_q + num_k :]
            settings = dict(scale=scale, attn_mask=mask, dropout_p=dropout_p, seed=seed)
            out, bucket_sums = FORMULA[0](*inputs[:3], pairs[:num_q], pairs[num_q:], on_v, **settings)
            first = torch.autograd.grad([out, *bucket_sums], inputs, outer, create_graph=True)
            second = torch.autograd.grad(first, [*outer, *inputs], grads, allow_unused=True, materialize_grads=True)
        of_out, *of_sums = second[: 1 + num_v]
        of_q, of_k, of_v, *of_tables = second[1 + num_v :]
        nothing = [None] * 5  # of out, lse, mask, seed and the numbers
        return of_out, of_q, of_k, of_v, *nothing, *of_sums, *[None] * num_v, *of_tables, *[None] * len(plans)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmap(RPEAttentionBackward, info, in_dims, args)


def _arguments(mask: Tensor | None, seed: Tensor | None, numbers: tuple, rest: Sequence[Tensor]) -> tuple:
    """lut_q, lut_k, the maps of q, k, v, their sizes and the settings, as the operators take them."""
    scale, dropout_p, num_q, num_k, _, Ns = numbers[:6]
    tables, ids = rest[: num_q + num_k], rest[num_q + num_k :]
    ends = [0, num_q, num_q + num_k, len(ids)]
    maps = [list(ids[a:b]) for a, b in itertools.pairwise(ends)]
    sizes = [[x for n in Ns[a:b] for x in (0, 0, 0, n)] for a, b in itertools.pairwise(ends)]
    return list(tables[:num_q]), list(tables[num_q:]), *maps, *sizes, mask, seed, scale, dropout_p


def _vmap(function: Any, info: Any, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The mapped dimension becomes part of B, for all that have a B."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point() and x.dtype != torch.bool:  # plans and seeds have no B
            if dim is not None:
                raise NotImplementedError("vmap over the ids or the seed of rpe_attention")
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = function.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lut_q: list[Tensor], lut_k: list[Tensor], maps_q: list[Tensor],
    maps_k: list[Tensor], maps_v: list[Tensor], sizes_q: list[int], sizes_k: list[int], sizes_v: list[int],
    attn_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _triton_launch.forward(
        q, k, v, lut_q, lut_k, maps_q, maps_k, maps_v, sizes_q, sizes_k, sizes_v, attn_mask, seed, scale, dropout_p
    )


def _backward(
    grad_out: Tensor, grad_sums: list[Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: list[Tensor],
    lse: Tensor, lut_q: list[Tensor], lut_k: list[Tensor], maps_q: list[Tensor], maps_k: list[Tensor],
    maps_v: list[Tensor], sizes_q: list[int], sizes_k: list[int], sizes_v: list[int], attn_mask: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    return _triton_launch.backward(
        grad_out, grad_sums, q, k, v, out, sums, lse, lut_q, lut_k, maps_q, maps_k, maps_v, sizes_q, sizes_k, sizes_v,
        attn_mask, seed, scale, dropout_p,
    )  # fmt: skip


if not hasattr(torch.ops.rpe_ops, "rpe_attention_triton"):  # once in a process, however many copies of this there are
    for _name, _function, _its_fake in (
        ("rpe_attention_triton", _forward, _triton_launch.fake_forward),
        ("rpe_attention_triton_backward", _backward, _triton_launch.fake_backward),
    ):
        torch.library.custom_op(f"rpe_ops::{_name}", _function, mutates_args=()).register_fake(_its_fake)
