"""`rpe_index` and its adjoint `rpe_bucket_sum`: the two linear maps that image relative position encoding rests on."""

from typing import Any

import torch
from torch import Tensor

from . import _native, maps
from .maps import Map


def rpe_index(input: Tensor, index: Map) -> Tensor:
    """Y[b, h, i, j] = input[b, h, i, index[i, j]].

    >>> rpe_index(torch.randn(2, 6, 127, 50), torch.zeros(127, 127, dtype=torch.int32)).shape
    torch.Size([2, 6, 127, 127])

    Compiled kernels run it where there are some (see `rpe_ops.backends()`), torch.gather elsewhere.

    Args:
        input: (B, H, Lq, N), of any dtype and strides.
        index: (Lq, Lk), uint8, int16, int32 or int64, on input's device, values in [0, N); or the map of a grid, such
            as `irpe.BucketMap`, see `maps`.

    Returns:
        (B, H, Lq, Lk). Differentiable in input to any order; the gradient is `rpe_bucket_sum`.

    Raises:
        TypeError, ValueError: dtype, shapes or devices that do not fit.
        RuntimeError: a value outside [0, N), which is named, on a CPU. On a GPU it is a device assert.

    Source: the look-up p[I(i, j)] of iRPE, arXiv 2107.14222, Sec. 3.2.
    """
    if not _native.takes(input):
        _check(input, index)
        return maps.look_up(input, index)
    index = maps.ids_of(index)
    _check(input, index)
    if torch.compiler.is_compiling():
        return torch.ops.rpe_ops.rpe_index.default(input, index)
    return _Index.apply(input, index)


def rpe_bucket_sum(input: Tensor, index: Map, num_buckets: int) -> Tensor:
    """S[b, h, i, n] = sum of input[b, h, i, j] over the j with index[i, j] = n.

    >>> rpe_bucket_sum(torch.ones(2, 6, 127, 127), torch.zeros(127, 127, dtype=torch.int32), 50)[0, 0, 0, :2]
    tensor([127.,   0.])

    Compiled kernels run it where there are some: float16 and bfloat16 are summed in float32, and the bits depend
    neither on the number of threads nor on the run. Elsewhere torch.scatter_add does.

    Args:
        input: (B, H, Lq, Lk), of any dtype and strides.
        index: (Lq, Lk), as `rpe_index` takes it, values in [0, num_buckets).
        num_buckets: N.

    Returns:
        (B, H, Lq, N). Differentiable in input to any order; the gradient is `rpe_index`. No (Lq, Lk) temporary.

    Raises:
        TypeError, ValueError, RuntimeError: as `rpe_index`.
    """
    if num_buckets < 0:
        raise ValueError(f"num_buckets={num_buckets}; expected at least 0")
    takes = _native.takes(input)
    if takes:
        index = maps.ids_of(index)
    _check(input, index)
    columns = index.shape[1] if isinstance(index, Tensor) else input.shape[2]
    if columns != input.shape[3]:
        raise ValueError(f"index has {columns} columns, input {input.shape[3]}; expected the same Lk")
    if not takes:
        return maps.sum_up(input, index, num_buckets)
    if torch.compiler.is_compiling():
        return torch.ops.rpe_ops.rpe_bucket_sum.default(input, index, num_buckets)
    return _BucketSum.apply(input, index, num_buckets)


class RPEIndexFunction:
    """`RPEIndexFunction.apply(input, index)` = `rpe_index(input, index)`: the name that projects outside call."""

    apply = staticmethod(rpe_index)


def _check(input: Tensor, index: Map) -> None:
    if not isinstance(index, Tensor):
        maps.check(index, "index", (input.shape[2], input.shape[2]), index[3], input.device)
        return
    if index.dtype not in maps.ID_DTYPES:
        raise TypeError(f"index is {index.dtype}; expected one of {', '.join(map(str, maps.ID_DTYPES))}")
    if input.dim() != 4 or index.dim() != 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, index {tuple(index.shape)}; expected (B, H, Lq, _) and (Lq, Lk)"
        )
    if index.shape[0] != input.shape[2]:
        raise ValueError(f"index has {index.shape[0]} rows, input {input.shape[2]}; expected the same Lq")
    if index.device != input.device:
        raise ValueError(f"input is on {input.device}, index on {index.device}: move one of them")


def _index_fake(input: Tensor, index: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:3], index.shape[1])


def _bucket_sum_fake(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    return input.new_empty(*input.shape[:3], num_buckets)


def _index_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    input, index = inputs
    ctx.save_for_backward(index)
    ctx.save_for_forward(index)
    ctx.num_buckets = input.shape[3]


def _bucket_sum_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, index, ctx.num_buckets = inputs
    ctx.save_for_backward(index)
    ctx.save_for_forward(index)


def _index_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return rpe_bucket_sum(grad, index, ctx.num_buckets), None


def _bucket_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return rpe_index(grad, index), None, None


def _index_vmap(info: Any, in_dims: tuple, input: Tensor, index: Tensor) -> tuple[Tensor, int]:
    return _vmap(rpe_index, info.batch_size, in_dims, input, index)


def _bucket_sum_vmap(info: Any, in_dims: tuple, input: Tensor, index: Tensor, num_buckets: int) -> tuple[Tensor, int]:
    return _vmap(rpe_bucket_sum, info.batch_size, in_dims, input, index, num_buckets)


def _vmap(operator: Any, size: int, in_dims: tuple, input: Tensor, index: Tensor, *rest: int) -> tuple[Tensor, int]:
    """The mapped dimension joins the batch; an index that is mapped too has to be taken one by one."""
    if in_dims[1] is None:
        mapped = input.movedim(in_dims[0], 0)  # (V, B, H, Lq, _)
        return operator(mapped.flatten(0, 1), index, *rest).unflatten(0, mapped.shape[:2]), 0
    inputs = [input] * size if in_dims[0] is None else input.unbind(in_dims[0])
    if size == 0:
        raise ValueError("a mapped index of size 0; expected at least one")
    return torch.stack([operator(x, i, *rest) for x, i in zip(inputs, index.unbind(in_dims[1]), strict=True)]), 0


class _Index(torch.autograd.Function):
    """The compiled kernel under eager autograd, torch.func and forward mode, none of which reach a schema of C++."""

    setup_context = staticmethod(_index_setup)
    backward = staticmethod(_index_backward)
    vmap = staticmethod(_index_vmap)

    @staticmethod
    def forward(input: Tensor, index: Tensor) -> Tensor:
        return torch.ops.rpe_ops.rpe_index.default(input, index)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return rpe_index(tangent, index)


class _BucketSum(torch.autograd.Function):
    """As `_Index`."""

    setup_context = staticmethod(_bucket_sum_setup)
    backward = staticmethod(_bucket_sum_backward)
    vmap = staticmethod(_bucket_sum_vmap)

    @staticmethod
    def forward(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
        return torch.ops.rpe_ops.rpe_bucket_sum.default(input, index, num_buckets)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return rpe_bucket_sum(tangent, index, ctx.num_buckets)


if _native.first_time("rpe_index"):
    torch.library.register_fake("rpe_ops::rpe_index", _index_fake)
    torch.library.register_fake("rpe_ops::rpe_bucket_sum", _bucket_sum_fake)
    torch.library.register_autograd("rpe_ops::rpe_index", _index_backward, setup_context=_index_setup)
    torch.library.register_autograd("rpe_ops::rpe_bucket_sum", _bucket_sum_backward, setup_context=_bucket_sum_setup)
    torch.library.register_vmap("rpe_ops::rpe_index", _index_vmap)
    torch.library.register_vmap("rpe_ops::rpe_bucket_sum", _bucket_sum_vmap)
