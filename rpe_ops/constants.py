"""Tensors of a map, made once: right under every order of calls, devices, threads and kinds of tracing."""

import functools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import _torch

Build = Callable[[str, str, tuple[int, ...], torch.device], Tensor]  # of kind, mapping, size, device


def made(build: Build, kind: str, mapping: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """build(kind, mapping, size, device): kept if the kind is "offsets" or "ids", and a constant of compiled graphs.

    size: of numbers, see `numbers_of`.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _kept.get(kind, _build_aside)(build, kind, mapping, size, device)
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


def _build_aside(build: Build, *key: object) -> Tensor:
    """Made in a thread of its own, which no mode of the caller reaches: no FakeTensor and no inference tensor gets into
    the cache, and no trace records how.
    """
    with ThreadPoolExecutor(1) as clean:
        built = clean.submit(build, *key).result()  # type: ignore[arg-type]
    built._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]  # torch.compile: sizes that vary in no graph
    return built


# offsets are small, ids of all pairs of tokens are not
_kept = {"offsets": functools.lru_cache(1024)(_build_aside), "ids": functools.lru_cache(16)(_build_aside)}


@_torch.constant
def _add_constant(name: str, *key: object) -> None:
    """For torch.compile, which names a constant after the function it comes from: a function for this map alone.

    It stays for good: compiled graphs are thrown away with the function that their constant came from.
    """
    if not hasattr(_add_constant, name):

        def constant() -> Tensor:
            return _kept.get(key[1], _build_aside)(*key)  # type: ignore[call-overload]

        constant.__code__ = constant.__code__.replace(co_name=name)
        setattr(_add_constant, name, _torch.constant(constant))
