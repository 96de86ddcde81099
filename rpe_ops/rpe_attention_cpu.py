"""The backend "cpu" of `rpe_attention`: tiles in C++ that never hold an (Lq, Lk) tensor, forward and backward."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import _native
from .maps import NUMBERS

KEEPS_OUT = False


def why_not(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why this backend cannot take such a call, as the end of a sentence; None where it can."""
    if "cpu" not in _native.LOADED:
        return f"needs the C++ operators: {_native.MISSING['cpu']}"
    if q.device.type != "cpu":
        return f"runs on the CPU, and q is on {q.device}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return 'has no gradient of attn_mask: use backend="eager", or detach the mask'
    return None


def why_not_call(call: Any, q: Tensor, tables: list[Tensor]) -> str | None:
    """It takes every call."""
    return None


def about() -> str:
    """What it is, for `rpe_ops.backends()`."""
    if "cpu" not in _native.LOADED:
        return _native.about("cpu", "compiled kernels for CPUs")
    try:
        return _native.about("cpu", f"compiled kernels for CPUs, with {isa()}")
    except RuntimeError as error:
        return f"not here: {error}"


def is_slow(q: Tensor, k: Tensor) -> bool:
    """Whether the formula is the faster one: short sequences in bfloat16 that are trained, where the processor has no
    products of bfloat16, so that the kernels take those of float32.
    """
    short = q.dtype == torch.bfloat16 and k.shape[2] < 512
    return short and not IN_BFLOAT16 and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)


def forward(call: Any, inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, sums), see `fused`."""
    return torch.ops.rpe_ops.rpe_attention(*inputs[:3], *_rest(call, inputs))


def backward(call: Any, inputs: Any, saved: Any) -> list[Tensor]:
    """Gradients of q, k, v and of each table."""
    before = (saved.grad_out, saved.grad_sums, *inputs[:3], saved.lse)
    found = torch.ops.rpe_ops.rpe_attention_backward(*before, *_rest(call, inputs))
    grad_q, grad_k, grad_v, of_q, of_k, of_v = found
    grads = [grad_q, grad_k, grad_v]
    tables = itertools.chain(inputs.tables_q, inputs.tables_k, inputs.tables_v)
    for grad, table in zip([*of_q, *of_k, *of_v], tables, strict=True):
        grads.append(grad.sum(0).to(table.dtype) if table.dim() == 3 else grad)  # of W they come for each sample
    return grads


def _rest(call: Any, inputs: Any) -> tuple:
    # the kernels see the columns of a map in its offsets, and take four numbers
    numbers = ([n for i, n in enumerate(some) if i % NUMBERS < 4] for some in call[3:6])
    return *inputs[5:], *numbers, inputs.mask, inputs.seed, call.scale, call.dropout_p


def isa() -> str:
    """The instruction set that the kernels take, by name: the machine's, or the lower one that RPE_OPS_ISA names."""
    with ThreadPoolExecutor(1) as clean:  # a thread of its own, which no mode of the caller reaches
        return clean.submit(lambda: torch.ops.rpe_ops.rpe_isa(torch.empty(0, device="cpu"))).result()


def _in_bfloat16() -> bool:
    try:
        return "cpu" in _native.LOADED and isa() == "avx512_bf16"
    except RuntimeError:
        return False  # RPE_OPS_ISA names what the machine lacks: calls say so, an import does not


# bfloat16 is multiplied as such, else as float32; as at the import, though kernels read RPE_OPS_ISA in every call
IN_BFLOAT16 = _in_bfloat16()


def _empty_heads(q: Tensor, tokens: int) -> Tensor:
    return q.new_empty(q.shape[0], tokens, q.shape[1], q.shape[3]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, tables_q: Any, tables_k: Any, tables_v: Any, *rest: Any) -> Any:
    numbers_v = [] if tables_v else rest[5]
    sums = [q.new_empty(*q.shape[:3], num_buckets) for num_buckets in numbers_v[3::4]]
    return _empty_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=_precise(q)), sums


def _precise(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_backward(grad_out: Tensor, grad_sums: Any, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *rest: Any) -> Any:
    def gradient(table: Tensor) -> Tensor:
        if table.dim() == 3:
            return table.new_empty(q.shape[0], *table.shape, dtype=_precise(q))
        return table.new_empty(table.shape)

    of_tables = ([gradient(table) for table in some] for some in rest[:3])
    return _empty_heads(q, q.shape[2]), _empty_heads(q, k.shape[2]), _empty_heads(q, k.shape[2]), *of_tables


if _native.first_time("rpe_attention"):
    torch.library.register_fake("rpe_ops::rpe_attention", _fake)
    torch.library.register_fake("rpe_ops::rpe_attention_backward", _fake_backward)
