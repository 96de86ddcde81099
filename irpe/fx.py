"""What encodings do is one node to torch.fx: what happens inside depends on sizes, which it does not know."""

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module as every tracer of torch.fx sees it: one call of the module, whatever its list of leaves.

    >>> class Mine(nn.Module):
    ...     forward = one_node(lambda self, x: x.relu() if x.shape[0] > 1 else x)
    >>> [node.op for node in fx.symbolic_trace(nn.Sequential(Mine())).graph.nodes]
    ['placeholder', 'call_module', 'output']

    Where `fused_attn` of the module is False, as timm's attentions have it, it is traced through: weights of attention
    are a node then. A module that is traced by itself is no node of its own, and raises as before.
    """

    @functools.wraps(forward)
    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = _tracer(self, *args, *kwargs.values())
        if tracer is None or not getattr(self, "fused_attn", True):
            return forward(self, *args, **kwargs)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return traced


def one_call(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module, on positional arguments, as one node as well: a call on the module itself."""

    @functools.wraps(method)
    def traced(self: nn.Module, *args: Any) -> Any:
        tracer = _tracer(self, *args)
        if tracer is None:
            return method(self, *args)
        module = tracer.create_proxy("get_attr", tracer.path_of_module(self), (), {})
        return tracer.create_proxy("call_method", method.__name__, (module, *args), {})

    return traced


def _tracer(module: nn.Module, x: Any = None, *rest: Any) -> Any:
    """Who is tracing a module that is called with x, if it is not the module alone that is traced; or None."""
    tracer: Any = x.tracer if isinstance(x, fx.Proxy) else None
    return None if tracer is None or tracer.root is module else tracer
