"""torch's own attention: iRPE in `nn.MultiheadAttention`, wherever it stands, and in torchvision's vision transformer.

An equipped attention is called as before and knows its map without any state: it has the constant `rpe_grid` (equip's
`grid`, a number for each axis), or takes its tokens for a square, with ndim=1 for a sequence. torchvision's
`VisionTransformer` has square images only, and checks them.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..irpe import RPEConfig
from ..multihead_attention import RPEMultiheadAttention, add_encodings, remove_encodings, why_no_encodings
from .axes import why_not_axes


class EquippedMultiheadAttention(RPEMultiheadAttention):
    """The class of an equipped `nn.MultiheadAttention`, whose weights stay where they were."""


_OF_OTHERS = ("timm", "transformers")  # their attentions are their adapters' business


def find(model: nn.Module) -> list[nn.Module]:
    """torchvision's vision transformers, and the model itself where it has attentions beside them."""
    vits = [one for one in model.modules() if _is_vit(one)]
    if _is_vit(model) or not _attentions(model):
        return vits
    # beside a vit, attentions that could have none (a decoder of text) are no reason to refuse the whole
    return [model, *vits] if not vits or attentions(model) or is_equipped(model) else vits


def attentions(part: nn.Module) -> list[nn.Module]:
    """The attentions of a part but those of decoder layers, whose queries may be no map."""
    of_decoders = _inside(part, lambda one: isinstance(one, nn.TransformerDecoderLayer))
    return [one for one in _attentions(part) if id(one) not in of_decoders]


def why_not(
    part: nn.Module, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None
) -> str | None:
    """The reason that these encodings cannot be added to these attentions of a part, or None."""
    if not attentions and not is_equipped(part):
        return (
            "its attentions are those of decoder layers, whose tokens (queries, text) need not be a map; where they "
            "are, equip the one attention, such as layer.self_attn, with grid=(height, width)"
        )
    if _is_vit(part) and (reason := _why_not_vit(part, config, grid)):
        return reason
    if reason := _why_not_grid(part, config, grid):
        return reason
    config = _config_for(part, config)
    names = {id(module): name for name, module in part.named_modules()}
    for one in attentions:
        assert isinstance(one, nn.MultiheadAttention)
        name = names[id(one)] or "the model"
        if type(one) is EquippedMultiheadAttention:
            return "it has iRPE already; call unequip first, or name other blocks"
        if type(one) is not nn.MultiheadAttention:
            return f"{name} is a {type(one).__name__}; expected nn.MultiheadAttention itself"
        if "forward" in vars(one):
            return f"the forward of {name} has been replaced on the object, which would leave iRPE out"
        if reason := why_no_encodings(one, config):
            return f"{name}: {reason}"
    return None


def equip(part: nn.Module, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None) -> None:
    """Adds rpe_q, rpe_k and rpe_v to attentions of a part, which `why_not` has no reason against."""
    for attention in attentions:
        one: Any = attention
        one.__class__ = EquippedMultiheadAttention
        add_encodings(one, _config_for(part, config))
        if grid is not None:
            one.rpe_grid = grid
    for encoder in _encoders(part):
        # nested tensors leave out padding, so the rest is no map
        if encoder.use_nested_tensor and any(_is_equipped(one) for one in encoder.modules()):
            encoder.use_nested_tensor, encoder.rpe_took_nested_tensor = False, True


def is_equipped(part: nn.Module) -> bool:
    """Whether any attention of a part has encodings."""
    return any(_is_equipped(one) for one in _attentions(part))


def unequip(part: nn.Module) -> None:
    """Takes out what `equip` has added: classes, tables, hooks, the map; encoders may use nested tensors again."""
    for attention in _attentions(part):
        if _is_equipped(attention):
            one: Any = attention
            remove_encodings(one)
            vars(one).pop("rpe_grid", None)
            one.__class__ = nn.MultiheadAttention
    for encoder in _encoders(part):
        if vars(encoder).pop("rpe_took_nested_tensor", False):
            encoder.use_nested_tensor = True


def _config_for(part: nn.Module, config: RPEConfig) -> RPEConfig:
    if not _is_vit(part):
        return config
    return RPEConfig(**{name: one and dataclasses.replace(one, skip=1) for name, one in vars(config).items()})


def _why_not_grid(part: nn.Module, config: RPEConfig, grid: tuple[int, ...] | None) -> str | None:
    if _is_vit(part):
        return why_not_axes(config, 2)
    for name, single in vars(config).items():
        if single is None:
            continue
        if grid is not None and len(grid) != single.ndim:
            return f"grid={grid}, but {name} has ndim={single.ndim}; expected as many numbers as axes"
        if grid is None and single.ndim > 2:
            return f"{name} has ndim={single.ndim}, and nothing in the model tells the size of its map: pass grid="
    return None


def _why_not_vit(vit: Any, config: RPEConfig, grid: tuple[int, ...] | None) -> str | None:
    torchvision = sys.modules["torchvision.models.vision_transformer"]
    if type(vit) is not torchvision.VisionTransformer:
        return (
            f"{type(vit).__name__} changes the forward of VisionTransformer; equip its encoder instead, with the "
            "number of its prefix tokens as skip in the configuration, and with grid="
        )
    if grid is not None:
        return f"grid={grid}, but the model knows the size of its map; leave grid out"
    if type(vit.encoder) is not torchvision.Encoder:
        return f"encoder is a {type(vit.encoder).__name__}; expected torchvision's Encoder"
    for name, block in vit.encoder.layers.named_children():
        if type(block) is not torchvision.EncoderBlock:
            return f"encoder.layers.{name} is a {type(block).__name__}; expected torchvision's EncoderBlock"
    for name, module in vit.named_modules():
        if "forward" in vars(module) and isinstance(
            module, (torchvision.VisionTransformer, torchvision.Encoder, torchvision.EncoderBlock)
        ):
            return f"the forward of {name or 'the model'} has been replaced on the object, which may leave iRPE out"
    for name, single in vars(config).items():
        if single is not None and single.skip not in (0, 1):
            return f"{name} has skip={single.skip}, but the model has 1 prefix token; leave skip at 0"
    return None


def _is_vit(module: nn.Module) -> bool:
    torchvision = sys.modules.get("torchvision.models.vision_transformer")  # no model of it exists before that
    return torchvision is not None and isinstance(module, torchvision.VisionTransformer)


def _is_equipped(module: nn.Module) -> bool:
    return isinstance(module, EquippedMultiheadAttention)


def _encoders(part: nn.Module) -> list[Any]:
    return [one for one in part.modules() if isinstance(one, nn.TransformerEncoder)]


def _inside(part: nn.Module, is_one: Callable[[nn.Module], bool]) -> set[int]:
    """The modules inside those modules of a part that are one of these, as ids."""
    return {id(module) for one in part.modules() if is_one(one) for module in one.modules()}


def _attentions(part: nn.Module) -> list[nn.Module]:
    """What is an attention of torch and belongs to this part: not to a vit inside it, nor to another library."""
    others = _inside(part, lambda one: type(one).__module__.split(".")[0] in _OF_OTHERS)
    if not _is_vit(part):
        others |= _inside(part, _is_vit)
    return [one for one in part.modules() if isinstance(one, nn.MultiheadAttention) and id(one) not in others]
