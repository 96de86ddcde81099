"""Which classes of transformers are known, and where their attentions are. Names only: nothing is imported here."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn


_PREFIX = "transformers.models."


@dataclasses.dataclass(frozen=True)
class Family:
    """One modeling file of transformers: `parts` hold the attentions of the class `attention` under `layers`."""

    module: str
    parts: tuple[str, ...]
    layers: str
    attention: str
    prefix: Callable[[Any], int]  # number of tokens in front of the map
    swapped: bool = False  # the class of a part has to change, because only its forward knows the map
    hands_on: bool = True  # the attention gives its keyword arguments to the attention function

    @property
    def attention_name(self) -> str:
        return f"{_PREFIX}{self.module}.{self.attention}"


def _with_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


FAMILIES = (
    Family("vit.modeling_vit", ("ViTModel",), "layers", "ViTAttention", lambda config: 1),
    Family("deit.modeling_deit", ("DeiTModel",), "layers", "DeiTAttention", lambda config: 2),
    Family("beit.modeling_beit", ("BeitModel",), "layers", "BeitAttention", lambda config: 1),
    Family(
        "dinov2.modeling_dinov2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", "Dinov2Attention", lambda config: 1
    ),
    Family(
        "dinov2_with_registers.modeling_dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "encoder.layer",
        "Dinov2WithRegistersAttention",
        _with_registers,
    ),
    Family(
        "dinov3_vit.modeling_dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "model.layer",
        "DINOv3ViTAttention",
        _with_registers,
    ),
    Family("clip.modeling_clip", ("CLIPVisionModel",), "encoder.layers", "CLIPAttention", lambda config: 1),
    Family(
        "siglip.modeling_siglip",
        ("SiglipVisionModel",),
        "encoder.layers",
        "SiglipAttention",
        lambda config: 0,
        hands_on=False,
    ),
    Family(
        "detr.modeling_detr", ("DetrModel",), "encoder.layers", "DetrSelfAttention", lambda config: 0, swapped=True
    ),
    Family(
        "detr.modeling_detr",
        ("DetrForSegmentation",),
        "detr.model.encoder.layers",
        "DetrSelfAttention",
        lambda config: 0,
        swapped=True,
    ),
)

_WINDOWS = "its attention runs in windows that move between layers"
_REASONS = {
    "vit_mae.modeling_vit_mae.ViTMAEModel": "it removes and shuffles tokens, so the rest is no full map",
    "swin.modeling_swin.SwinModel": _WINDOWS,
    "swin.modeling_swin.SwinBackbone": _WINDOWS,
    "swinv2.modeling_swinv2.Swinv2Model": f"{_WINDOWS}, and compares by cosine",
    "swinv2.modeling_swinv2.Swinv2Backbone": f"{_WINDOWS}, and compares by cosine",
    "siglip2.modeling_siglip2.Siglip2VisionModel": "it packs images of several shapes into one batch of patches",
    "vitdet.modeling_vitdet.VitDetModel": "its attention runs in windows",
    "vitdet.modeling_vitdet.VitDetBackbone": "its attention runs in windows",
}

_KNOWN: dict[str, Family | str] = {
    _PREFIX + name: reason for name, reason in _REASONS.items()
} | {f"{_PREFIX}{family.module}.{part}": family for family in FAMILIES for part in family.parts}  # fmt: skip


def class_name(cls: type) -> str:
    """The name that a class is known by here."""
    return f"{cls.__module__}.{cls.__name__}"


def lookup(module: nn.Module) -> tuple[str, Family | str] | None:
    """(name of the known class that a module is of, its family or the reason that it is refused), or None."""
    for cls in type(module).__mro__:
        if (name := class_name(cls)) in _KNOWN:
            return name, _KNOWN[name]
    return None


def family_of(part: nn.Module) -> Family:
    """The family of a part that is not refused."""
    found = lookup(part)
    assert found is not None and isinstance(found[1], Family)
    return found[1]
