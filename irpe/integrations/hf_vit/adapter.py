"""The adapter of `equip` for transformers. Nothing of transformers is imported before a model of it is equipped."""

import copy
import importlib
from typing import Any

from torch import Tensor, nn

from ...config_io import rpe_config_to_dict
from ...irpe import RPEConfig
from ..adapter import Adapter, Grid, Map, replaced
from .families import Family, class_name, family_of, lookup, own_class


class TransformersAdapter(Adapter):
    """Of vision models and DETRs, with the self-attention of every layer; of DETR, of every encoder layer."""

    def find(self, model: nn.Module) -> list[Any]:
        """The vision models and DETRs inside a model (itself, or what a head, a detector or a pair of towers holds)."""
        found: list[Any] = []
        inner: set[int] = set()
        for part in model.modules():
            known = lookup(part)
            if known is None or id(part) in inner:
                continue
            found.append(part)
            if known[0].endswith("DetrForSegmentation"):  # runs the pieces of its DetrModel without calling it
                inner.add(id(part.get_submodule("detr.model")))
        return found

    def attentions(self, part: nn.Module) -> list[Any]:
        known = lookup(part)
        if known is None or not isinstance(known[1], Family):
            return []
        layers = part.get_submodule(known[1].layers)
        return [module for module in layers.modules() if class_name(own_class(module)) == known[1].attention_name]

    def has_encodings(self, module: nn.Module) -> bool:
        return "config_without_irpe" in vars(module)

    def map_of(self, part: Any) -> Map:
        family = family_of(part)
        return Map(family.ndim, family.prefix_tokens(part.config))

    def heads(self, attention: Any) -> tuple[int, int, Tensor]:
        query = attention.q_proj if hasattr(attention, "q_proj") else attention.query
        dim = attention.head_dim if hasattr(attention, "head_dim") else attention.attention_head_size
        return dim, query.out_features // dim, query.weight

    def objection(self, part: Any, attentions: list[Any]) -> str | None:
        known = lookup(part)
        assert known is not None
        name, family = known
        if isinstance(family, str):
            return family
        cls = own_class(part)
        if class_name(cls) != name:
            return f"{cls.__name__} changes {name.rpartition('.')[2]}"
        layers = part.get_submodule(family.layers)
        if len(self.attentions(part)) != len(layers):
            expected = f"expected one {family.attention} in each, as transformers has it from 5.18 on"
            return f"{family.layers} has {len(layers)} layers; {expected}"
        if family.swapped and "forward" in vars(part):
            return replaced("")
        for number, attention in enumerate(attentions):
            # accelerate puts its own forward on the object too, and calls the one of the class inside
            if "forward" in vars(attention) and not hasattr(attention, "_hf_hook"):
                return replaced(f"attention {number}")
        return None

    def change(self, attention: Any) -> None:
        from .attention import NAME

        # the name of the attention function is read from the configuration, which all layers share
        attention.config_without_irpe, attention.config = attention.config, copy.copy(attention.config)
        attention.config._attn_implementation_internal = NAME

    def restore(self, attention: Any) -> None:
        from .attention import map_beside_mask, remove_hook

        attention.config = attention.config_without_irpe
        del attention.config_without_irpe
        remove_hook(attention, map_beside_mask)

    def finish(self, part: Any, config: RPEConfig, attentions: list[Any], grid: Grid) -> None:
        """Brings the map to the attentions, and writes into the configuration which of them have what."""
        from .attention import map_beside_mask, tell_map

        family, every = family_of(part), self.attentions(part)
        first = sum(map(self.has_encodings, every)) == len(attentions)
        if not family.hands_on:
            for attention in attentions:
                attention.register_forward_pre_hook(map_beside_mask, with_kwargs=True)
        if first and family.swapped:
            _swapping(family).swap(part)
        elif first:
            part.register_forward_pre_hook(tell_map, with_kwargs=True)
        numbers = [every.index(attention) for attention in attentions]
        entry = {"attentions": numbers, "rpe_config": rpe_config_to_dict(config)}
        part.config.irpe = ([] if first else part.config.irpe) + [entry]

    def undo(self, part: Any) -> None:
        from .attention import remove_hook, tell_map

        remove_hook(part, tell_map)
        if family_of(part).swapped:
            _swapping(family_of(part)).swap_back(part)
        if hasattr(part.config, "irpe"):
            del part.config.irpe


ADAPTER = TransformersAdapter()


def _swapping(family: Family) -> Any:
    return importlib.import_module(f".{family.swapped}", __package__)
