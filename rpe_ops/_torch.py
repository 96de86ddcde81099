"""The private names of torch that this directory uses, each with its reason. None has to be there.

`MISSING` says which are not, and what happens then; `rpe_ops.backends()` shows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MISSING: dict[str, str] = {}  # name -> what is done without it


def _find(name: str, without: str) -> Any:
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        MISSING[f"torch.{name}"] = without
    return found


_transforms_active = _find("_C._are_functorch_transforms_active", "compiled graphs take plain torch")
_modes = _find("_C._len_torch_dispatch_stack", "every launch goes through the dispatcher, which costs time")
_has_kernel = _find("_C._dispatch_has_kernel_for_dispatch_key", "a library is trusted to hold what its name says")
_assert_async = _find("_assert_async", "ids on a GPU are not checked")


def transforms_active() -> bool:
    """Whether torch.func transforms what is being computed: C++ schemas have no rules for that in a compiled graph."""
    return _transforms_active is None or _transforms_active()


def is_plain(x: Tensor) -> bool:
    """Whether nothing watches what is computed on x (fake tensors, tracing, a mode): kernels may be called directly."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or _modes is None:
        return False
    return _modes() == 0 and not transforms_active()


def forward_mode() -> bool:
    """Whether derivatives are computed in forward mode: torch.func.jvp, jacfwd, dual numbers.

    Without the private name the fused kernels say that they have none, where the formula would have been taken.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def has_kernel(operator: str, key: str) -> bool:
    """Whether a library that was loaded has registered an operator for a dispatch key."""
    return _has_kernel is None or _has_kernel(operator, key)


def schema(operator: str) -> str | None:
    """The schema that an operator of `torch.ops.rpe_ops` has: another library may have registered the name."""
    found = getattr(getattr(torch.ops.rpe_ops, operator).default, "_schema", None)
    return None if found is None else str(found)


def assert_soon(condition: Tensor, message: str) -> None:
    """An assert that does not wait for a GPU."""
    if _assert_async is not None:
        _assert_async(condition, message)


def to_onnx() -> bool:
    """Whether torch's older exporter of ONNX records a trace."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def with_sizes_that_vary_in_no_graph(x: Tensor) -> Tensor:
    """x, marked for torch.compile, which without the mark makes a second graph when another size comes."""
    x._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
    return x


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does: that would import the whole compiler here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
