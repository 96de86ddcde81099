"""The backend "triton" of `rpe_attention`: tiles on a GPU that never hold an (Lq, Lk) tensor, forward and backward."""

import importlib.util
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

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
    plans = [x for ids, num_buckets in sizes for x in (ids, *_plan(ids, num_buckets))]
    numbers = (settings["scale"], settings["dropout_p"], len(on_q), len(on_k), settings["second"])
    tables = [lut for lut, _ in (*on_q, *on_k)]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *tables))
    # where nothing is trained torch.compile calls forward with one argument too many
    bare = torch.compiler.is_compiling() and not trains
    call = RPEAttentionFunction.forward if bare else RPEAttentionFunction.apply
    out, _, *sums = call(q, k, v, mask, seed, numbers, *tables, *plans)
    return out, sums


_plans: dict[tuple, tuple[Any, int, tuple[Tensor, Tensor, Tensor]]] = {}
_plans_lock = threading.Lock()


def _plan(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read instead of ids: small ids, rows in order of their buckets, their ends. Kept with ids."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch.compiler.is_compiling():
        return torch.ops.rpe_ops.rpe_attention_triton_plan_of_graph(ids, num_buckets)
    if type(ids) is not Tensor or ids.is_inference() or is_wrapped(ids):
        return torch.ops.rpe_ops.rpe_attention_triton_plan(ids, num_buckets)
    key = (id(ids), num_buckets)
    with _plans_lock:
        known = _plans.get(key)
    if known is not None and known[0]() is ids and known[1] == ids._version:
        return known[2]
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():  # it would hold nothing until the graph runs
        return torch.ops.rpe_ops.rpe_attention_triton_plan(ids, num_buckets)
    # a plan that is kept must be of plain tensors, whatever transform or tracing mode it is made in
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.inference_mode(False):
        plan = torch.ops.rpe_ops.rpe_attention_triton_plan(ids, num_buckets)
    if ids.is_cuda:
        torch.cuda.current_stream(ids.device).synchronize()  # other streams may read it from now on
    alive = weakref.ref(ids, lambda _: _plans.pop(key, None))
    with _plans_lock:
        _plans[key] = (alive, ids._version, plan)
    return plan


def _plan_of_graph(ids: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    # a compiled graph calls this each time it runs; what it gets is its own, and may be overwritten
    small, order, ends = _plan(ids, num_buckets)
    own = torch.empty_strided(ends.shape, ends.stride(), dtype=ends.dtype, device=ends.device)
    return small.clone(), order.clone(), own.copy_(ends)


class RPEAttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, seed, (scale, p, len(on_q), len(on_k), second), *tables, *plans) -> (out, lse, *sums).

    A plan is ids and the three tensors that `_plan` makes of them.
    """

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
    """(grad_out, q, k, v, out, lse, mask, seed, numbers, *grad_sums, *sums, *tables, *plans) -> gradients.

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
        num_v = numbers[5]
        grad_sums, sums, rest = list(rest[:num_v]), list(rest[num_v : 2 * num_v]), rest[2 * num_v :]
        arguments = _arguments(mask, seed, numbers, rest)
        grads = torch.ops.rpe_ops.rpe_attention_triton_backward(
            grad_out, grad_sums, q, k, v, out, sums, lse, *arguments
        )
        return *grads[:3], *grads[3], *grads[4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        grad_out, q, k, v, _, _, mask, seed, ctx.numbers, *rest = inputs
        num_v = ctx.numbers[5]
        ctx.save_for_backward(grad_out, q, k, v, mask, seed, *rest[:num_v], *rest[2 * num_v :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout_p, num_q, num_k, second_order, num_v = ctx.numbers
        if not second_order:
            raise NotImplementedError('second derivatives of rpe_attention: call it with backend="eager", or None')
        grad_out, q, k, v, mask, seed, *rest = ctx.saved_tensors
        sums, rest = rest[:num_v], rest[num_v:]
        tables, plans = rest[: num_q + num_k], rest[num_q + num_k :]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v, *tables)]
            outer = [x.detach().requires_grad_() for x in (grad_out, *sums)]
            pairs = list(zip(inputs[3:], plans[::4], strict=False))
            on_v = [(ids, ends.shape[2]) for ids, ends in zip(plans[::4], plans[3::4], strict=True)][num_q + num_k :]
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
    """lut_q, lut_k, plan_q, plan_k, plan_v and the settings, as the operators take them: without the ids themselves."""
    scale, dropout_p, num_q, num_k = numbers[:4]
    tables, plans = rest[: num_q + num_k], rest[num_q + num_k :]
    small = [x for n, x in enumerate(plans) if n % 4 > 0]
    ends = [0, 3 * num_q, 3 * (num_q + num_k), len(small)]
    parts = [small[a:b] for a, b in itertools.pairwise(ends)]
    return list(tables[:num_q]), list(tables[num_q:]), *parts, mask, seed, scale, dropout_p


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


if not hasattr(torch.ops.rpe_ops, "rpe_attention_triton_plan_of_graph"):
    name = "rpe_ops::rpe_attention_triton_plan_of_graph"
    torch.library.custom_op(name, _plan_of_graph, mutates_args=()).register_fake(_triton_launch.empty_plan)
