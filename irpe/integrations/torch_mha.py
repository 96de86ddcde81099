"""torch's own attention: iRPE in `nn.MultiheadAttention`, wherever it stands, and in torchvision's vision transformer.

An equipped attention is called as before and knows its map without any state: it has the constant `rpe_grid` (equip's
`grid`, a number for each axis), or takes its tokens for a square, with ndim=1 for a sequence. torchvision's
`VisionTransformer` has square images only, and checks them.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..irpe import RPEConfig
from ..multihead_attention import RPEMultiheadAttention, keep_fused_kernels_away, why_no_encodings
from .adapter import Adapter, Grid, Map, replaced


class EquippedMultiheadAttention(RPEMultiheadAttention):
    """The class of an equipped `nn.MultiheadAttention`, whose weights stay where they were."""


class TorchAdapter(Adapter):
    """Of torchvision's vision transformers, and of any model that has attentions of torch beside them."""

    def find(self, model: nn.Module) -> list[Any]:
        """torchvision's vision transformers, and the model itself where it has attentions beside them."""
        vits = [module for module in model.modules() if _is_vit(module)]
        if _is_vit(model) or not _every(model):
            return vits
        # beside a vit, attentions that could have none (a decoder of text) are no reason to refuse the whole
        return (
            [model, *vits]
            if not vits or self.attentions(model) or any(map(self.has_encodings, _every(model)))
            else vits
        )

    def attentions(self, part: nn.Module) -> list[Any]:
        """The attentions of a part but those of decoder layers, whose queries may be no map."""
        of_decoders = _inside(part, lambda module: isinstance(module, nn.TransformerDecoderLayer))
        return [attention for attention in _every(part) if id(attention) not in of_decoders]

    def has_encodings(self, module: nn.Module) -> bool:
        return isinstance(module, EquippedMultiheadAttention)

    def map_of(self, part: nn.Module) -> Map | None:
        return Map(2, 1) if _is_vit(part) else None

    def heads(self, attention: Any) -> tuple[int, int, Tensor]:
        return attention.head_dim, attention.num_heads, attention.out_proj.weight

    def objection(self, part: nn.Module, attentions: list[Any]) -> str | None:
        if not attentions and not self.is_equipped(part):
            return (
                "its attentions are those of decoder layers, whose tokens (queries, text) need not be a map; where "
                "they are, equip the one attention, such as layer.self_attn, with grid=(height, width)"
            )
        if _is_vit(part) and (reason := _why_not_vit(part)):
            return reason
        for name, attention in _named(part, attentions):
            if type(attention) not in (nn.MultiheadAttention, EquippedMultiheadAttention):
                return f"{name} is a {type(attention).__name__}; expected nn.MultiheadAttention itself"
            if "forward" in vars(attention):
                return replaced(name)
        return None

    def why_not(self, part: nn.Module, config: RPEConfig, attentions: list[Any], grid: Grid) -> str | None:
        if reason := super().why_not(part, config, attentions, grid):
            return reason
        config = self.config_for(part, config)
        reasons = ((name, why_no_encodings(attention, config)) for name, attention in _named(part, attentions))
        return next((f"{name}: {reason}" for name, reason in reasons if reason), None)

    def change(self, attention: Any) -> None:
        attention.__class__ = EquippedMultiheadAttention
        attention.register_forward_pre_hook(keep_fused_kernels_away)

    def restore(self, attention: Any) -> None:
        hooks = attention._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if hook is keep_fused_kernels_away]:
            del hooks[number]
        vars(attention).pop("rpe_grid", None)
        attention.__class__ = nn.MultiheadAttention

    def finish(self, part: nn.Module, config: RPEConfig, attentions: list[Any], grid: Grid) -> None:
        """Tells attentions their map, and keeps nested tensors from encoders."""
        if grid is not None:
            for attention in attentions:
                attention.rpe_grid = grid
        for encoder in _encoders(part):
            # nested tensors leave out padding, so the rest is no map
            if encoder.use_nested_tensor and self.is_equipped(encoder):
                encoder.use_nested_tensor, encoder.rpe_took_nested_tensor = False, True

    def undo(self, part: nn.Module) -> None:
        for encoder in _encoders(part):
            if vars(encoder).pop("rpe_took_nested_tensor", False):
                encoder.use_nested_tensor = True


ADAPTER = TorchAdapter()
_OF_OTHERS = ("timm", "transformers")  # their attentions are their adapters' business


def _why_not_vit(vit: Any) -> str | None:
    torchvision = sys.modules["torchvision.models.vision_transformer"]
    if type(vit) is not torchvision.VisionTransformer:
        return (
            f"{type(vit).__name__} changes the forward of VisionTransformer; equip its encoder instead, with the "
            "number of its prefix tokens as skip in the configuration, and with grid="
        )
    if type(vit.encoder) is not torchvision.Encoder:
        return f"encoder is a {type(vit.encoder).__name__}; expected torchvision's Encoder"
    for name, block in vit.encoder.layers.named_children():
        if type(block) is not torchvision.EncoderBlock:
            return f"encoder.layers.{name} is a {type(block).__name__}; expected torchvision's EncoderBlock"
    for name, module in vit.named_modules():
        if "forward" in vars(module) and isinstance(
            module, (torchvision.VisionTransformer, torchvision.Encoder, torchvision.EncoderBlock)
        ):
            return replaced(name)
    return None


def _is_vit(module: nn.Module) -> bool:
    torchvision = sys.modules.get("torchvision.models.vision_transformer")  # no model of it exists before that
    return torchvision is not None and isinstance(module, torchvision.VisionTransformer)


def _encoders(part: nn.Module) -> list[Any]:
    return [module for module in part.modules() if isinstance(module, nn.TransformerEncoder)]


def _inside(part: nn.Module, wanted: Callable[[nn.Module], bool]) -> set[int]:
    """The modules inside those modules of a part that are wanted, as ids."""
    return {id(inner) for module in part.modules() if wanted(module) for inner in module.modules()}


def _every(part: nn.Module) -> list[nn.Module]:
    """What is an attention of torch and belongs to this part: not to a vit inside it, nor to another library."""
    others = _inside(part, lambda module: type(module).__module__.split(".")[0] in _OF_OTHERS)
    if not _is_vit(part):
        others |= _inside(part, _is_vit)
    return [
        module for module in part.modules() if isinstance(module, nn.MultiheadAttention) and id(module) not in others
    ]


def _named(part: nn.Module, attentions: list[Any]) -> list[tuple[str, Any]]:
    """Attentions of a part with their names."""
    names = {id(module): name for name, module in part.named_modules()}
    return [(names[id(attention)] or "the model", attention) for attention in attentions]
