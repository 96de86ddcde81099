"""VideoMAE: maps of (frames, height, width), and tokens that are left out in pre-training.

`VideoMAEModel` hands nothing down to its encoder but the tokens, so the map goes with them: a pre-hook of the model
puts it beside `bool_masked_pos`, the embeddings take it from there and return it beside the tokens, and a pre-hook of
the encoder makes the keyword argument `irpe_map` of it, which goes to every attention. Attentions and embeddings have
other classes for that. They run transformers' own forward, keep their names, and pickle under those below.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.videomae.modeling_videomae import VideoMAEEmbeddings, VideoMAESelfAttention

from .attention import Map, OnMap, View, remove_hook, wants_attentions


class RPEVideoMAEEmbeddings(VideoMAEEmbeddings):
    """The class of embeddings of an equipped model."""

    irpe_original = VideoMAEEmbeddings

    def forward(self, pixel_values: Tensor, bool_masked_pos: Any) -> Any:
        """Tokens of (B, frames, channels, height, width), and their map beside them if it came with the mask."""
        if not isinstance(bool_masked_pos, OnMap):
            return super().forward(pixel_values, bool_masked_pos)
        mask, place = bool_masked_pos
        tokens = super().forward(pixel_values, mask)
        if mask is not None:
            size: Any = (place.frames, place.height, place.width)
            axes = [torch.arange(n, device=tokens.device) for n in size]
            cells = torch.cartesian_prod(*axes).expand(len(tokens), -1, -1)  # (B, L, 3)
            place = place._replace(positions=cells[~mask].view(len(tokens), -1, 3))
        return OnMap(tokens, place)


class RPEVideoMAESelfAttention(VideoMAESelfAttention):
    """The class of the attentions of an equipped model, with encodings or not."""

    irpe_original = VideoMAESelfAttention

    def forward(self: Any, hidden_states: Tensor, irpe_map: Map | None = None) -> Any:  # type: ignore[override]
        """Attention over (B, L, C), as transformers has it."""
        view: Any = View(self, irpe_map=irpe_map)
        return VideoMAESelfAttention.forward(view, hidden_states)


_EQUIPPED: dict[Any, Any] = {cls.irpe_original: cls for cls in (RPEVideoMAEEmbeddings, RPEVideoMAESelfAttention)}
for _cls in _EQUIPPED.values():
    _cls.__name__ = _cls.irpe_original.__name__


def map_beside_masked(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the model: bool_masked_pos becomes `OnMap(bool_masked_pos, irpe_map)`."""
    names = dict(zip(("pixel_values", "bool_masked_pos"), args, strict=False)) | kwargs
    video = names.get("pixel_values")
    if video is None or video.dim() != 5:
        return None  # the model's own error comes next
    tubelet, (rows, columns) = part.config.tubelet_size, part.embeddings.patch_embeddings.patch_size
    size = (video.shape[3] // rows, video.shape[4] // columns, wants_attentions(part.config, kwargs))
    place = Map(*size, frames=video.shape[1] // tubelet)
    return (), names | dict(bool_masked_pos=OnMap(names.get("bool_masked_pos"), place))


def map_from_tokens(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the encoder: tokens that have come as `OnMap(tokens, irpe_map)` are told apart."""
    if not args or not isinstance(args[0], OnMap):
        return None
    tokens, place = args[0]
    return (tokens, *args[1:]), {**kwargs, "irpe_map": place}


def swap(part: Any) -> None:
    """Gives the pieces of a model the classes and the hooks that bring the map to its attentions."""
    _change(part, _EQUIPPED)
    part.register_forward_pre_hook(map_beside_masked, with_kwargs=True)
    part.encoder.register_forward_pre_hook(map_from_tokens, with_kwargs=True)


def swap_back(part: Any) -> None:
    """Takes out what `swap` has changed."""
    _change(part, {equipped: original for original, equipped in _EQUIPPED.items()})
    remove_hook(part, map_beside_masked)
    remove_hook(part.encoder, map_from_tokens)


def _change(part: Any, classes: dict[type, type]) -> None:
    for module in part.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
