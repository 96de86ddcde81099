"""`rpe_index` and its adjoint `rpe_bucket_sum`: the two linear maps that image relative position encoding rests on."""

from typing import Any

import torch
from torch import Tensor

_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """Y[b, h, i, j] = input[b, h, i, index[i, j]].

    >>> rpe_index(torch.randn(2, 6, 127, 50), torch.zeros(127, 127, dtype=torch.int32)).shape
    torch.Size([2, 6, 127, 127])

    Args:
        input: (B, H, Lq, N), of any dtype.
        index: (Lq, Lk), uint8, int16, int32 or int64, on input's device, values in [0, N).

    Returns:
        (B, H, Lq, Lk). Differentiable in input to any order; the gradient is `rpe_bucket_sum`.

    Raises:
        TypeError, ValueError: dtype, shapes or devices that do not fit. A value outside [0, N) is torch.gather's error:
        a RuntimeError that names it on a CPU, a device assert on a GPU.

    Source: the look-up p[I(i, j)] of iRPE, arXiv 2107.14222, Sec. 3.2.
    """
    _check(input, index)
    return input.gather(-1, index.long().expand(*input.shape[:2], *index.shape))


def rpe_bucket_sum(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """S[b, h, i, n] = sum of input[b, h, i, j] over the j with index[i, j] = n.

    >>> rpe_bucket_sum(torch.ones(2, 6, 127, 127), torch.zeros(127, 127, dtype=torch.int32), 50)[0, 0, 0, :2]
    tensor([127.,   0.])

    Args:
        input: (B, H, Lq, Lk), of any dtype.
        index: (Lq, Lk), uint8, int16, int32 or int64, on input's device, values in [0, num_buckets).
        num_buckets: N.

    Returns:
        (B, H, Lq, N). Differentiable in input to any order; the gradient is `rpe_index`. No (Lq, Lk) temporary.

    Raises:
        TypeError, ValueError: as `rpe_index`.
    """
    _check(input, index)
    if index.shape[1] != input.shape[3]:
        raise ValueError(f"index has {index.shape[1]} columns, input {input.shape[3]}; expected the same Lk")
    zeros = input.new_zeros(*input.shape[:3], num_buckets)
    return zeros.scatter_add(-1, index.long().expand(input.shape), input)


class RPEIndexFunction(torch.autograd.Function):
    """`RPEIndexFunction.apply(input, index)` = `rpe_index(input, index)`: the name that projects outside call.

    Works under torch.func.grad, vmap and jacrev; its gradient is differentiable again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, index: Tensor) -> Tensor:
        return rpe_index(input, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        input, index = inputs
        ctx.save_for_backward(index)
        ctx.num_buckets = input.shape[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return rpe_bucket_sum(grad, index, ctx.num_buckets), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        raise NotImplementedError("forward mode: call rpe_index, which supports it")


def _check(input: Tensor, index: Tensor) -> None:
    if index.dtype not in _INDEX_DTYPES:
        raise TypeError(f"index is {index.dtype}; expected one of {', '.join(map(str, _INDEX_DTYPES))}")
    if input.dim() != 4 or index.dim() != 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, index {tuple(index.shape)}; expected (B, H, Lq, _) and (Lq, Lk)"
        )
    if index.shape[0] != input.shape[2]:
        raise ValueError(f"index has {index.shape[0]} rows, input {input.shape[2]}; expected the same Lq")
    if index.device != input.device:
        raise ValueError(f"input is on {input.device}, index on {index.device}: move one of them")
