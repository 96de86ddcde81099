"""A launch of a Triton kernel that `_triton_variants.variants` does not tell of fails the test that makes it."""

import functools

import pytest
import torch

from rpe_ops import _triton_call, _triton_variants

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


TARGET = ["cuda:80"]  # whose constants the launcher takes


@functools.cache
def listed(target):
    return {key(x.kernel, x.types, dict(x.constants) | dict(x.options)) for x in _triton_variants.variants(target)}


def key(name, types, constants):
    # the interpreter takes more rows in a program of `plan`, and multiplies in its own way, on which warps depend
    ignored = ("PRECISION", "num_warps", "R") if name == "plan" else ("PRECISION", "num_warps")
    return name, types, tuple(sorted((k, v) for k, v in constants.items() if k not in ignored and v is not None))


def type_of(x):
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    if x is None:
        return "constexpr"
    assert isinstance(x, float) or -(2**31) <= x < 2**31
    return "fp32" if isinstance(x, float) else "i32"


@pytest.fixture(autouse=True)
def only_listed_kernels(monkeypatch):
    launch = _triton_call.launch

    def checked(module, name, grid, arguments, constants):
        words = getattr(module, name).arg_names
        types = dict(zip(words, map(type_of, arguments), strict=False))
        types |= {word: "constexpr" for word in words if word in constants}
        assert tuple(types) == tuple(words)
        assert key(name, tuple(types.items()), constants) in listed(TARGET[0])
        launch(module, name, grid, arguments, constants)

    monkeypatch.setattr(_triton_call, "launch", checked)
