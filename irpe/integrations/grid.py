"""Who knows the height and width of the map of tokens that a forward pass is working on."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Grid = tuple[int, int]


class GridTracker:
    """Remembers (height, width) of the map between a model's patch embedding and its attention blocks.

    `on_patch_embed` is a forward hook of the patch embedding, `on_block` a forward pre-hook of every block; attention
    then asks `grid(tokens, skip)`. Each thread has its own grid. What gradient checkpointing recomputes during backward
    takes the grid of the forward pass that it repeats: the input of a block is remembered together with its grid, and
    checkpointing hands out the same tensor again. Where it does not (reentrant checkpointing), a token count that
    several grids share is an error rather than a guess.

    One object serves as the hook and as the attribute of every equipped attention, so deepcopy and pickle keep the
    model in one piece.
    """

    def __init__(self) -> None:
        self._now = threading.local()
        self._grid_of = WeakTensorKeyDictionary()
        self._seen: dict[int, set[Grid]] = {}

    def on_patch_embed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a module that has timm's `dynamic_feat_size`."""
        height, width = module.dynamic_feat_size(args[0].shape[-2:])  # type: ignore[operator]
        self._now.grid = (height, width)
        if not torch.compiler.is_compiling():
            self._seen.setdefault(height * width, set()).add((height, width))

    def on_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a block, whose first argument holds the tokens."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        tokens: Tensor = args[0]
        if _in_backward():
            if tokens in self._grid_of:
                self._now.recomputed = self._grid_of[tokens]
            elif tokens.is_leaf:  # not the output of a block that was just recomputed: nothing is known
                self._now.recomputed = None
            return
        grid = getattr(self._now, "grid", None)
        if grid is not None:
            self._grid_of[tokens] = grid

    def grid(self, tokens: int, skip: int) -> Grid:
        """(height, width) with skip + height * width = tokens, or an error that says why there is none."""
        if not torch.compiler.is_compiling() and _in_backward():
            return self._recomputed_grid(tokens, skip)
        grid = getattr(self._now, "grid", None)
        if grid is None:
            raise RuntimeError(
                "the grid is not known: the blocks ran before the model's patch embedding did in this thread; "
                "call the model, or model.forward_features"
            )
        height, width = grid
        if skip + height * width != tokens:
            raise ValueError(
                f"{tokens} tokens reached attention, but the patch embedding made a map of {height}x{width} with "
                f"{skip} prefix tokens: tokens that are dropped, packed or masked away have no place on the map"
            )
        return grid

    def _recomputed_grid(self, tokens: int, skip: int) -> Grid:
        grid = getattr(self._now, "recomputed", None)
        if grid is not None and skip + grid[0] * grid[1] == tokens:
            return grid
        seen = self._seen.get(tokens - skip, set())
        if len(seen) != 1:
            raise RuntimeError(
                f"gradient checkpointing recomputes {tokens} tokens during backward, and the grids {sorted(seen)} fit: "
                "use non-reentrant checkpointing (use_reentrant=False; timm.layers.set_reentrant_ckpt(False))"
            )
        return next(iter(seen))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # what a forward pass leaves behind belongs to this object alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
