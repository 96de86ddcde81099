"""Which classes of transformers are known, and where their attentions are. Names only: nothing is imported here."""

import dataclasses
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
    prefix: int  # number of tokens in front of the map, without registers
    registers: bool = False  # whether there are `config.num_register_tokens` more
    swapped: str = ""  # the file here that changes classes of a part, because only their forward knows the map
    hands_on: bool = True  # the attention gives its keyword arguments to the attention function
    ndim: int = 2  # axes of the map

    @property
    def attention_name(self) -> str:
        return f"{_PREFIX}{self.module}.{self.attention}"

    def prefix_tokens(self, config: Any) -> int:
        """Number of tokens in front of the map of a model with this configuration."""
        return self.prefix + (config.num_register_tokens if self.registers else 0)


_REGISTERS = "Dinov2WithRegisters"
_DETR = "detr.modeling_detr"
FAMILIES = (
    Family("vit.modeling_vit", ("ViTModel",), "layers", "ViTAttention", 1),
    Family("deit.modeling_deit", ("DeiTModel",), "layers", "DeiTAttention", 2),
    Family("beit.modeling_beit", ("BeitModel",), "layers", "BeitAttention", 1),
    Family("dinov2.modeling_dinov2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", "Dinov2Attention", 1),
    Family(
        "dinov2_with_registers.modeling_dinov2_with_registers",
        (f"{_REGISTERS}Model", f"{_REGISTERS}Backbone"), "encoder.layer", f"{_REGISTERS}Attention", 1, registers=True,
    ),
    Family(
        "dinov3_vit.modeling_dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"), "model.layer", "DINOv3ViTAttention", 1, registers=True,
    ),
    Family("clip.modeling_clip", ("CLIPVisionModel",), "encoder.layers", "CLIPAttention", 1),
    Family("siglip.modeling_siglip", ("SiglipVisionModel",), "encoder.layers", "SiglipAttention", 0, hands_on=False),
    Family(
        "videomae.modeling_videomae", ("VideoMAEModel",), "encoder.layer", "VideoMAESelfAttention", 0,
        swapped="videomae", ndim=3,
    ),
    Family(
        "vjepa2.modeling_vjepa2", ("VJEPA2Model",), "encoder.layer", "VJEPA2RopeAttention", 0,
        swapped="vjepa2", ndim=3,
    ),
    Family(_DETR, ("DetrModel",), "encoder.layers", "DetrSelfAttention", 0, swapped="detr"),
    Family(_DETR, ("DetrForSegmentation",), "detr.model.encoder.layers", "DetrSelfAttention", 0, swapped="detr"),
)  # fmt: skip

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


def own_class(module: nn.Module) -> type:
    """The class that transformers gave a module, whatever `equip` has made of it."""
    return getattr(type(module), "irpe_original", type(module))


def family_of(part: nn.Module) -> Family:
    """The family of a part that is not refused."""
    found = lookup(part)
    assert found is not None and isinstance(found[1], Family)
    return found[1]
