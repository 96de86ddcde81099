"""The adapter of `equip` for transformers. Nothing of transformers is imported before a model of it is equipped."""

import copy
import dataclasses
import importlib
from typing import Any

from torch import nn

from ...config_io import rpe_config_to_dict
from ...irpe import RPEConfig, build_rpe
from ..axes import why_not_axes
from .families import Family, class_name, family_of, lookup, own_class


def find(model: nn.Module) -> list[Any]:
    """The vision models and DETRs inside a model (itself, or what a head, a detector or a pair of towers holds)."""
    found: list[Any] = []
    inner: set[int] = set()
    for one in model.modules():
        known = lookup(one)
        if known is None or id(one) in inner:
            continue
        found.append(one)
        if known[0].endswith("DetrForSegmentation"):  # runs the pieces of its DetrModel without calling it
            inner.add(id(one.get_submodule("detr.model")))
    return found


def attentions(part: nn.Module) -> list[nn.Module]:
    """The self-attention of every layer; of DETR, of every encoder layer."""
    known = lookup(part)
    if known is None or not isinstance(known[1], Family):
        return []
    layers = part.get_submodule(known[1].layers)
    return [one for one in layers.modules() if class_name(own_class(one)) == known[1].attention_name]


attentions_of = attentions  # for where an argument has the name


def why_not(part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None) -> str | None:
    """The reason that these encodings cannot be added to these attentions of a part, or None."""
    known = lookup(part)
    assert known is not None
    name, family = known
    if isinstance(family, str):
        return family
    if any(has_rpe(attn) for attn in attentions):
        return "it has iRPE already; call unequip first, or name other blocks"
    cls = own_class(part)
    if class_name(cls) != name:
        return f"{cls.__name__} changes {name.rpartition('.')[2]}"
    if grid is not None:
        return f"grid={grid}, but the model knows the size of its map; leave grid out"
    if reason := why_not_axes(config, family.ndim):
        return reason
    layers = part.get_submodule(family.layers)
    if len(attentions_of(part)) != len(layers):
        expected = f"expected one {family.attention} in each, as transformers has it from 5.18 on"
        return f"{family.layers} has {len(layers)} layers; {expected}"
    if family.swapped and "forward" in vars(part):
        return "the forward of the model has been replaced on the object, which would leave iRPE out"
    for number, attn in enumerate(attentions):
        # accelerate puts its own forward on the object too, and calls the one of the class inside
        if "forward" in vars(attn) and not hasattr(attn, "_hf_hook"):
            return f"the forward of attention {number} has been replaced on the object, which would leave iRPE out"
    skip = family.prefix_tokens(part.config)
    for letter, single in vars(config).items():
        if single is not None and single.skip not in (0, skip):
            return f"{letter} has skip={single.skip}, but the model has {skip} prefix tokens; leave skip at 0"
    return None


def equip(part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None) -> None:
    """Adds rpe_q, rpe_k and rpe_v to attentions of a part, which `why_not` has no reason against."""
    from . import attention

    family = family_of(part)
    skip = family.prefix_tokens(part.config)
    config = RPEConfig(**{n: one and dataclasses.replace(one, skip=skip) for n, one in vars(config).items()})
    every, first = attentions_of(part), not is_equipped(part)
    for attn in attentions:
        one: Any = attn
        query = getattr(one, family.query)
        weight = query.weight
        dtype = weight.dtype if weight.is_floating_point() else part.dtype  # of quantized weights
        head_dim = one.head_dim if hasattr(one, "head_dim") else one.attention_head_size
        rpe = build_rpe(config, head_dim, query.out_features // head_dim, device=weight.device, dtype=dtype)
        one.rpe_q, one.rpe_k, one.rpe_v = (rp and rp.train(one.training) for rp in rpe)
        # the name of the attention function is read from the configuration, which all layers share
        one.config_without_irpe, one.config = one.config, copy.copy(one.config)
        one.config._attn_implementation_internal = attention.NAME
        if not family.hands_on:
            one.register_forward_pre_hook(attention.map_beside_mask, with_kwargs=True)
    if first:
        if family.swapped:
            _swapping(family).swap(part)
        else:
            part.register_forward_pre_hook(attention.tell_map, with_kwargs=True)
    entry = {"attentions": [every.index(attn) for attn in attentions], "rpe_config": rpe_config_to_dict(config)}
    part.config.irpe = ([] if first else part.config.irpe) + [entry]


def is_equipped(part: nn.Module) -> bool:
    """Whether any attention of a part has iRPE."""
    return any(has_rpe(attn) for attn in attentions(part))


def has_rpe(attn: nn.Module) -> bool:
    return "config_without_irpe" in vars(attn)


def unequip(part: Any) -> None:
    """Takes out what `equip` has added: tables, hooks, classes, and what is in the configuration."""
    from . import attention

    for attn in attentions(part):
        if has_rpe(attn):
            one: Any = attn
            one.config = one.config_without_irpe
            del one.config_without_irpe, one.rpe_q, one.rpe_k, one.rpe_v
            attention.remove_hook(one, attention.map_beside_mask)
    attention.remove_hook(part, attention.tell_map)
    if family_of(part).swapped:
        _swapping(family_of(part)).swap_back(part)
    if hasattr(part.config, "irpe"):
        del part.config.irpe


def _swapping(family: Family) -> Any:
    return importlib.import_module(f".{family.swapped}", __package__)
