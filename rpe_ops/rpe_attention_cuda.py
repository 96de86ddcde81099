"""The backend "cuda" of `rpe_attention`: kernels in CUDA C++ for the matrix units of a GPU, forward and backward.

They take what is trained most: float16 and bfloat16, at most one W on each of q, k and v, maps that factor with at most
8 rows and 8 columns of buckets (those of skip tokens counted), no mask, no dropout. Everything else is Triton's.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _native, _torch
from .maps import NUMBERS

KEEPS_OUT = True
_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST, _PLACES = 128, 8
# of a map, and of its pieces of 16 tokens in an image row: a block's shared memory holds what it needs of each
_MOST_HEIGHT, _MOST_WIDTH, _MOST_PIECES = 512, 128, 1024


def why_not(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why this backend cannot take such a call, as the end of a sentence; None where it can."""
    if "cuda" not in _native.LOADED:
        return f"needs the CUDA operators: {_native.MISSING['cuda']}"
    if q.device.type != "cuda":
        return f"runs on CUDA, and q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"computes in float16 and bfloat16, and q is {q.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= _WIDEST:
        return f"takes head sizes that are multiples of 8 up to {_WIDEST}, and q has {q.shape[-1]}"
    if attn_mask is not None:
        return "takes no attn_mask"
    return _why_not_on(q.device.index, q.shape[-1])


@_torch.constant  # it never changes, so graphs may hold it
@functools.cache
def _why_not_on(device: int, head_size: int) -> str | None:
    if torch.version.hip is not None:
        return "is for CUDA"
    found = torch.cuda.get_device_properties(device)
    if found.major < 8:
        return f"needs compute capability 8.0, and cuda:{device} has {found.major}.{found.minor}"
    if head_size > 64 and (found.major, found.minor) in ((8, 6), (8, 9), (12, 0)):
        return f"takes head sizes up to 64 on cuda:{device}, whose blocks have little shared memory"
    return None


def why_not_call(call: Any, q: Tensor, tables: list[Tensor]) -> str | None:
    """The same of the rest of a call: encodings, scale, dropout."""
    if call.dropout_p > 0:
        return "has no dropout"
    if not call.scale > 0:
        return f"takes a positive scale, and here is {call.scale}"
    numbers = [some for some in (call.numbers_q, call.numbers_k, call.numbers_v) if some]
    if not numbers or any(len(some) > NUMBERS for some in numbers):
        return "takes one encoding on each of q, k and v, and at least one in all"
    if len(tables) < len(numbers) or any(table.dim() != 3 for table in tables):
        return "takes W, and neither side tables nor bucket sums"
    if any(table.dtype not in (torch.float32, q.dtype) for table in tables):
        return f"takes W of float32 or {q.dtype}"
    for height, width, skip, num_buckets, columns in numbers:
        if columns == 0 or (height, width, skip) != tuple(numbers[0][:3]):
            return "takes maps that factor, all of one size"
        skips = int(skip > 0)
        if max(columns, (num_buckets - skips + columns - 1) // columns) + skips > _PLACES:
            return f"takes {_PLACES} rows and columns of buckets, those of skip tokens counted"
        pieces = height * ((width + 15) // 16) + (skip + 15) // 16
        if height > _MOST_HEIGHT or width > _MOST_WIDTH or pieces > _MOST_PIECES:
            most = f"{_MOST_HEIGHT} high, {_MOST_WIDTH} wide, and of {16 * _MOST_PIECES} tokens, rows filled up to 16"
            return f"takes maps up to {most}; here is {height} x {width} behind {skip} tokens"
    return None


def is_slow(q: Tensor, k: Tensor) -> bool:
    """It never is."""
    return False


def about() -> str:
    """What it is, for `rpe_ops.backends()`."""
    what = "compiled kernels for CUDA: rpe_index, and attention in 16 bits for maps that factor"
    return _native.about("cuda", what)


def forward(call: Any, inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, sums), see `fused`; sums are in places of the kernels, (B, H, L, 64)."""
    arguments = (*inputs[:3], *_rest(call, inputs), call.trains)
    out, lse, sums = _run(torch.ops.rpe_ops.rpe_attention_cuda, arguments)
    return out, lse, [sums] if call.numbers_v else []


def backward(call: Any, inputs: Any, saved: Any) -> list[Tensor]:
    """Gradients of q, k, v and of each table."""
    sums = saved.sums[0] if saved.sums else saved.lse  # of a call without values nobody reads them
    arguments = (saved.grad_out, *inputs[:3], saved.out, saved.lse, sums, *_rest(call, inputs))
    found = _run(torch.ops.rpe_ops.rpe_attention_cuda_backward, arguments)
    return [*found[:3], *found[3]]


def _run(operator: Any, arguments: tuple) -> Any:
    """operator(*arguments); the stable ABI knows no `torch.OutOfMemoryError`, which callers look for."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if str(error).startswith("CUDA out of memory"):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _rest(call: Any, inputs: Any) -> tuple:
    on = sum(bit for bit, numbers in zip((1, 2, 4), call[3:6], strict=True) if numbers)
    tables = [*inputs.tables_q, *inputs.tables_k, *inputs.tables_v]
    maps = [*inputs.maps_q, *inputs.maps_k, *inputs.maps_v]
    return tables, maps, [*call.numbers_q, *call.numbers_k, *call.numbers_v], on, call.scale


def _empty_heads(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, tables: Any, maps: Any, numbers: Any, on: int, scale: float, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = q.new_empty(*q.shape[:3], _PLACES**2) if on & 4 and keeps else q.new_empty(0)
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32), sums


def _fake_backward(grad_out: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tables = rest[5]
    return _empty_heads(q), _empty_heads(q), _empty_heads(q), [table.new_empty(table.shape) for table in tables]


if _native.first_time("rpe_attention_cuda"):
    torch.library.register_fake("rpe_ops::rpe_attention_cuda", _fake)
    torch.library.register_fake("rpe_ops::rpe_attention_cuda_backward", _fake_backward)
