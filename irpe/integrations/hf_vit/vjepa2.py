"""V-JEPA 2: maps of (frames, height, width) in its encoder. The predictor, which sees some tokens only, stays as it is.

The model hands keyword arguments down to its layers, and those their attentions the position mask alone: a pre-hook of
each layer puts the map beside it. Attentions have another class, which takes it from there and runs transformers' own
forward, rotary positions included; it keeps its name, and pickles under the one below.
"""

from typing import Any

from torch import Tensor
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from .attention import Map, OnMap, View, map_beside_mask, remove_hook, wants_attentions


class RPEVJEPA2RopeAttention(VJEPA2RopeAttention):
    """The class of the attentions in an equipped encoder, with encodings or not."""

    irpe_original = VJEPA2RopeAttention

    def forward(self, hidden_states: Tensor, position_mask: Any = None) -> Any:
        """Attention over (B, L, C), as transformers has it."""
        mask, place = position_mask if isinstance(position_mask, OnMap) else (position_mask, None)
        view: Any = View(self, irpe_map=place)
        return VJEPA2RopeAttention.forward(view, hidden_states, mask)


RPEVJEPA2RopeAttention.__name__ = VJEPA2RopeAttention.__name__


def tell_map(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the model: irpe_map = frames // frames of a tube, size of the image // size of a patch."""
    video = kwargs.get("pixel_values_videos", args[0] if args else None)
    if video is None or video.dim() != 5:
        return None  # the model's own error comes next
    frames, tubelet, patch = video.shape[1], part.config.tubelet_size, part.config.patch_size
    if frames >= tubelet:  # fewer are repeated, each once for every frame of a tube
        frames = frames // tubelet
    size = (video.shape[3] // patch, video.shape[4] // patch, wants_attentions(part.config, kwargs))
    return args, {**kwargs, "irpe_map": Map(*size, frames=frames)}


def swap(part: Any) -> None:
    """Gives the pieces of a model the classes and the hooks that bring the map to its attentions."""
    part.register_forward_pre_hook(tell_map, with_kwargs=True)
    for layer in part.encoder.layer:
        layer.register_forward_pre_hook(map_beside_mask, with_kwargs=True)
        layer.attention.__class__ = RPEVJEPA2RopeAttention


def swap_back(part: Any) -> None:
    """Takes out what `swap` has changed."""
    remove_hook(part, tell_map)
    for layer in part.encoder.layer:
        remove_hook(layer, map_beside_mask)
        layer.attention.__class__ = VJEPA2RopeAttention
