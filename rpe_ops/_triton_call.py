"""What every call of the backend "triton" needs before a kernel: numbers, memory in the kernels' order, the launch."""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (32, 64, 128)  # heads are padded to


class Call(NamedTuple):
    """What the kernels of one call share."""

    B: int
    H: int
    Lq: int
    Lk: int
    D: int
    wide: int
    dtype: torch.dtype
    device: torch.device
    extra: bool
    mask: tuple  # mask, seed and the numbers of both, in the kernels' order
    scale: float
    precision: str
    major: int


def call_of(q: Tensor, k: Tensor, mask: Tensor | None, seed: Tensor | None, scale: float, p: float) -> Call:
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    below = int(p * 2**24 + 0.5)
    extra = mask is not None or below > 0
    rest: tuple = (None, 0, 0, 0, 0, 0, None, 0, 0.0)
    if extra:
        if mask is None:
            mask = q.new_empty(1, dtype=torch.float32)
            rest = (mask, 0, 0, 0, 0, 0)
        else:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
            mask = mask.float().expand(B, H, Lq, Lk)
            rest = (mask, *mask.stride(), 1)
        if seed is None:
            seed = q.new_empty(1, dtype=torch.int64)
        rest += (seed, below, 1 / (1 - p) if p < 1 else 0.0)
    wide = next(x for x in WIDTHS if x >= D)
    return Call(B, H, Lq, Lk, D, wide, q.dtype, q.device, extra, rest, scale, *precision_of(q))


def precision_of(q: Tensor) -> tuple[str, int]:
    """How products of float32 are computed, and the major compute capability."""
    if q.device.type == "cpu":
        return "interpreted", 8
    if torch.version.hip is not None:
        return "ieee", 8
    major = _capability(q.device)
    if q.dtype != torch.float32:
        return "ieee", major
    # three products of tf32 are as exact as float32 and, unlike those, have units of their own
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3", major


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def rows(x: Tensor) -> Tensor:
    """x as kernels read it: head size and strides are multiples of 8, so 16 bytes at a time; 32 bits within a head."""
    L, D = x.shape[2:]
    if D % 8:
        return F.pad(x, (0, 8 - D % 8))
    b, h, l, d = x.stride()  # noqa: E741
    if d != 1 or (b | h | l) % 8 or x.data_ptr() % 16 or L * l >= 2**31 or max(b, h) >= 2**34:
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def strides(x: Tensor) -> tuple[int, int, int]:
    b, h, l, _ = x.stride()  # noqa: E741
    return b // 8, h // 8, l // 8


def empty_heads(x: Tensor, tokens: int, head: int) -> Tensor:
    """(B, H, tokens, head, up to a multiple of 8) of memory in the order (B, tokens, H, D)."""
    return x.new_empty(x.shape[0], tokens, x.shape[1], (head + 7) // 8 * 8).transpose(1, 2)


_HERE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels go to the current device, which is nearly always that of x."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else _HERE


_PLAIN = {int, float, type(None)}
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(module: Any, name: str, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
    """Every kernel goes through here.

    What Triton compiled is kept by all that it depends on, the types of arguments and the constants: Triton itself
    takes longer to find that out in every launch than all the rest of a launch takes.
    """
    types = tuple(map(type, arguments))
    dtypes = [x.dtype for x, its in zip(arguments, types, strict=True) if its not in _PLAIN]
    key = (name, arguments[0].device, types, *dtypes, *constants.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, rest = found
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*arguments, *rest)
        return
    kernel = getattr(module, name)
    compiled = kernel[grid](*arguments, **constants)
    if hasattr(compiled, "launch_metadata"):  # the interpreter compiles nothing
        _compiled[key] = compiled, tuple([constants[word] for word in kernel.arg_names[len(arguments) :]])
