"""Tensors of a map, made once: right under every order of calls, devices, threads and kinds of tracing."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch

# of kind, mapping, size, device: a plain tensor, whatever mode or trace the caller is in
Build = Callable[[str, str, tuple[int, ...], torch.device], Tensor]


def made(build: Build, kind: str, mapping: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """build(kind, mapping, size, device): kept if the kind is "offsets" or "ids", and a constant of compiled graphs.

    size: of numbers, see `numbers_of`.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _kept.get(kind, _made)(build, kind, mapping, size, device)
    name = " ".join(map(str, (build.__module__, kind, mapping, *size, device.type, device.index)))
    for other in " .,-":
        name = name.replace(other, "m" if other == "-" else "_")
    _add_constant(name, build, kind, mapping, size, device)
    return getattr(_add_constant, name)()


def numbers_of(size: Sequence[int]) -> tuple[int, ...] | None:
    """A size as numbers, in a graph that is being compiled; None where one of them varies there."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if not all(has_static_value(n) for n in size):
        return None
    return tuple(operator.index(n) for n in size)  # one that was pinned after tracing had begun is still a symbol


@_torch.constant
def is_exporting() -> bool:
    """Whether a graph is made for others to run; asked itself in a compiled function, torch 2.11 says True always."""
    return torch.compiler.is_exporting()


def _made(build: Build, *key: Any) -> Tensor:
    return _torch.with_sizes_that_vary_in_no_graph(build(*key))


# offsets are small, ids of all pairs of tokens are not
_kept = {"offsets": functools.lru_cache(1024)(_made), "ids": functools.lru_cache(16)(_made)}


@_torch.constant
def _add_constant(name: str, *key: Any) -> None:
    """For torch.compile, which names a constant after the function it comes from: a function for this map alone.

    It stays for good: compiled graphs are thrown away with the function that their constant came from.
    """
    if not hasattr(_add_constant, name):

        def constant() -> Tensor:
            return _kept.get(key[1], _made)(*key)

        constant.__code__ = constant.__code__.replace(co_name=name)
        setattr(_add_constant, name, _torch.constant(constant))
