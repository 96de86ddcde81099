"""Every binary that calls of the backend "triton" can ask Triton for; imports Triton."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from . import _triton_axes, _triton_call_axes, _triton_call_lookup, _triton_call_tables, _triton_lookup, _triton_tables
from ._triton_ahead import Variant
from ._triton_call import WIDTHS
from ._triton_call_lookup import MOST, PLAN, SUMMED

_FLAGS = list(itertools.product((False, True), repeat=3))


def variants(target: str) -> Iterator[Variant]:
    """Every kernel that `launch` may be asked for on a target such as "cuda:90"."""
    major = int(target.split(":")[1]) // 10 if target.startswith("cuda") else 8
    rough = ("tf32x3", "tf32") if target.startswith("cuda") else ("ieee",)
    numbers = [("fp16", "ieee"), ("bf16", "ieee"), *(("fp32", precision) for precision in rough)]
    yield variant(_triton_lookup.plan, "fp32", PLAN)
    for (dtype, precision), wide, even in itertools.product(numbers, WIDTHS, (True, False)):
        yield variant(_triton_tables.table_sums, dtype, _triton_call_tables.constants_of(wide, even, precision))
    for name, on, extra in itertools.product(SUMMED, _FLAGS, (False, True)):
        most_of = (64, MOST) if on[SUMMED[name]] else (1,)
        for (dtype, precision), wide, most in itertools.product(numbers, WIDTHS, most_of):
            constants = _triton_call_lookup.constants_of(name, on, extra, wide, most, precision, major)
            yield from _with_and_without_values(getattr(_triton_lookup, name), dtype, constants)
    for name, on, extra in itertools.product(_AXES, _FLAGS[1:], (False, True)):
        for (dtype, precision), wide, places in itertools.product(numbers, WIDTHS, (8, 16)):
            constants = _triton_call_axes.constants_of(name, on, extra, wide, places, precision, major)
            yield from _with_and_without_values(getattr(_triton_axes, name), dtype, constants)


def _with_and_without_values(kernel: Any, dtype: str, constants: dict[str, Any]) -> Iterator[Variant]:
    """Where W's product on values is in `out` already, the kernel that finds delta gets no bucket sums."""
    yield variant(kernel, dtype, constants)
    if kernel.fn.__name__.endswith("backward_queries") and constants["ON_V"]:
        yield variant(kernel, dtype, constants, values=False)


_AXES = ("axes_forward", "axes_backward_queries", "axes_backward_keys")


def usual(target: str) -> Iterator[Variant]:
    """Those of 16 bits without mask and dropout, on keys or on queries, keys and values."""
    for variant in variants(target):
        known = dict(variant.constants)
        if variant.kernel == "table_sums":
            if known["WIDE"] == 64 and dict(variant.types)["x"] != "*fp32":
                yield variant
            continue
        some = (known.get("ON_Q"), known.get("ON_K"), known.get("ON_V")) in ((False, True, False), (True, True, True))
        if some and not known["EXTRA"] and known["WIDE"] == 64 and dict(variant.types)["q"] != "*fp32":
            yield variant


_POINTERS = {"parts": "*fp32", "lse": "*fp32", "delta": "*fp32", "mask": "*fp32", "seed": "*i64"}
_TURNED = {"q": "ON_Q", "k": "ON_K", "v": "ON_V"}
_SUMS = dict(forward="ON_V", backward_queries="ON_K", backward_keys="ON_Q")
_DATA = "x g q k v out grad_out grad_q grad_k grad_v q1 q2 k1 k2 v1 v2 values1 values2 sums1 sums2".split()


def variant(kernel: Any, dtype: str, constants: dict[str, Any], values: bool = True) -> Variant:
    """What Triton compiles where `launch` calls the kernel with these constants; tensors that are absent are None."""
    name = kernel.fn.__name__
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    constants = {key: value for key, value in constants.items() if key not in options}
    types = {}
    for word in inspect.signature(kernel.fn).parameters:
        kind = word.split("_")[-1].rstrip("12")
        flag = None
        if word in constants:
            type_ = "constexpr"
        elif word in _DATA:
            type_ = f"*{dtype}"
            flag = "ON_V" if kind == "values" else _SUMS.get(name.split("_", 1)[-1]) if kind == "sums" else None
            flag = _TURNED[word[0]] if len(word) == 2 else flag
        elif kind == "ids":
            type_, flag = "*i32", _TURNED.get(word[0])
        elif kind in ("order", "ends"):
            type_, flag = "*u8", _SUMS.get(name.split("_", 1)[-1])
        elif word in _POINTERS:
            type_, flag = _POINTERS[word], "EXTRA" if word in ("mask", "seed") else None
        else:
            type_ = "fp32" if word in ("scale", "factor") else "i32"
        if (flag is not None and not constants[flag]) or (kind == "values" and not values):
            type_, constants = "constexpr", constants | {word: None}
        types[word] = type_
    return Variant(name, tuple(types.items()), tuple(constants.items()), tuple(options.items()))
