"""The form of every adapter of `irpe.equip`: what its library's models are, and how one attention of them is changed.

Refusing, setting `skip`, building the tables and putting them in place are the same for all, and stand here.
"""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..irpe import RPEConfig, SingleRPEConfig, build_rpe

Grid = tuple[int, ...] | None
_MAPS = {1: "sequences", 2: "images, (height, width)", 3: "videos, (frames, height, width)"}


class Map(NamedTuple):
    """What a model knows of its maps: the number of axes, and of tokens in front."""

    ndim: int
    prefix: int


class Adapter:
    """Finds the parts of models, each a model or a piece of one, and knows what is special about them."""

    def find(self, model: nn.Module) -> list[Any]:
        """The parts inside a model, itself included; also those that `objection` has a reason against."""
        raise NotImplementedError

    def attentions(self, part: Any) -> list[Any]:
        """All attentions of a part that could have encodings, in the order of the forward pass."""
        return []

    def has_encodings(self, module: nn.Module) -> bool:
        """Whether a module is an attention that `change` has changed."""
        return False

    def map_of(self, part: Any) -> Map | None:
        """What a part knows of its maps; None where the configuration and `grid` tell it."""
        return None

    def heads(self, attention: Any) -> tuple[int, int, Tensor]:
        """(D, H, a weight on whose device and of whose dtype the tables are) of an attention."""
        raise NotImplementedError

    def objection(self, part: Any, attentions: list[Any]) -> str | None:
        """The reason that no encodings at all can be added to these attentions of a part, or None."""
        return None

    def change(self, attention: Any) -> None:
        """Makes an attention read its rpe_q, rpe_k and rpe_v, which follow."""

    def restore(self, attention: Any) -> None:
        """Takes back what `change` has done; the tables are gone then."""

    def finish(self, part: Any, config: RPEConfig, attentions: list[Any], grid: Grid) -> None:
        """Does what a part needs itself, when its attentions have their tables."""

    def undo(self, part: Any) -> None:
        """Takes back what `finish` has done, after all attentions."""

    # what follows is the same for all

    def why_not(self, part: Any, config: RPEConfig, attentions: list[Any], grid: Grid) -> str | None:
        """The reason that these encodings cannot be added to these attentions of a part, or None."""
        if reason := self.objection(part, attentions):
            return reason
        if any(self.has_encodings(attention) for attention in attentions):
            return "it has iRPE already; call unequip first, or name other blocks"
        known = self.map_of(part)
        if known is not None and grid is not None:
            return f"grid={grid}, but the model knows the size of its map; leave grid out"
        check = _why_not_grid if known is None else _why_not_map
        reasons = (check(name, single, known or grid) for name, single in vars(config).items() if single is not None)
        return next(filter(None, reasons), None)

    def config_for(self, part: Any, config: RPEConfig) -> RPEConfig:
        """The configuration with the `skip` of a part, where that knows it."""
        if (known := self.map_of(part)) is None:
            return config
        singles = vars(config).items()
        return RPEConfig(
            **{name: single and dataclasses.replace(single, skip=known.prefix) for name, single in singles}
        )

    def equip(self, part: Any, config: RPEConfig, attentions: list[Any], grid: Grid) -> None:
        """Adds rpe_q, rpe_k and rpe_v to attentions of a part, where `why_not` has no reason against it."""
        config = self.config_for(part, config)
        for attention in attentions:
            self.change(attention)
            dim, number, weight = self.heads(attention)
            weights = (weight, *part.parameters())  # where they are quantized, the dtype is that of the others
            dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
            rpe = build_rpe(config, dim, number, device=weight.device, dtype=dtype)
            attention.rpe_q, attention.rpe_k, attention.rpe_v = (rp and rp.train(attention.training) for rp in rpe)
        self.finish(part, config, attentions, grid)

    def is_equipped(self, part: nn.Module) -> bool:
        """Whether any attention of a part has encodings."""
        return any(map(self.has_encodings, part.modules()))

    def unequip(self, part: Any) -> None:
        """Takes out all that `equip` has added."""
        for attention in filter(self.has_encodings, list(part.modules())):
            del attention.rpe_q, attention.rpe_k, attention.rpe_v
            self.restore(attention)
        self.undo(part)


def replaced(name: str) -> str:
    """The reason where a module of this name has a forward of its own."""
    return f"the forward of {name or 'the model'} has been replaced on the object, which would leave iRPE out"


def _why_not_map(name: str, single: SingleRPEConfig, known: Any) -> str | None:
    """The reason that an encoding does not fit the maps of a model that knows them, or None."""
    ndim, prefix = known
    if single.ndim != ndim:
        form = "" if ndim == 2 else f", in string form -{ndim}d"
        maps = f"the maps of the model are {_MAPS[ndim]}; expected ndim={ndim} in the configuration{form}"
        return f"{name} has ndim={single.ndim}, but {maps}"
    if single.skip not in (0, prefix):
        tokens = f"{prefix} prefix token{'' if prefix == 1 else 's'}"
        return f"{name} has skip={single.skip}, but the model has {tokens}; leave skip at 0"
    return None


def _why_not_grid(name: str, single: SingleRPEConfig, grid: Any) -> str | None:
    """The reason that an encoding does not fit `grid`, or None."""
    if grid is not None and len(grid) != single.ndim:
        return f"grid={grid}, but {name} has ndim={single.ndim}; expected as many numbers as axes"
    if grid is None and single.ndim > 2:
        return f"{name} has ndim={single.ndim}, and nothing in the model tells the size of its map: pass grid="
    return None
