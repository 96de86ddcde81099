"""An attention with encodings is one node to torch.fx: what happens inside depends on sizes, which it does not know."""

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

    A module that is traced by itself is no node of its own, and raises as before.
    """

    @functools.wraps(forward)
    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        tracer: Any = x.tracer if isinstance(x, fx.Proxy) else None
        if tracer is not None and tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return traced
