"""The attention function of equipped models, and the hooks that bring it the map."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ...irpe import _Encodings, rpe_attention
from .on_disk import guard

NAME = "irpe"
guard()  # every process with an equipped model comes by here, also one that has unpickled it


class Map(NamedTuple):
    """The keyword argument `irpe_map`, which travels from the model to its attentions in every call."""

    height: int
    width: int
    output_attentions: bool
    frames: int | None = None  # of a video, in tokens
    positions: Tensor | None = None  # (B, L, 3): where its tokens are, if some are left out

    def places(self) -> dict[str, Any]:
        """Height, width, size and positions as `rpe_attention` takes them."""
        if self.positions is not None:
            return dict(positions=self.positions)
        if self.frames is not None:
            return dict(size=(self.frames, self.height, self.width), positions=None)
        return dict(height=self.height, width=self.width, positions=None)


class OnMap(NamedTuple):
    """A mask and the map: what the attention function gets as `attention_mask` where nothing else comes through."""

    attention_mask: Tensor | None
    irpe_map: Map


def wants_attentions(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for attention weights, as transformers reads it."""
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def tell_map(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a model: irpe_map = size of the image // size of a patch."""
    image = kwargs.get("pixel_values", args[0] if args else None)
    if image is None:
        return None  # the model's own error comes next
    patch = part.config.patch_size
    rows, columns = patch if isinstance(patch, Iterable) else (patch, patch)
    height, width = image.shape[-2] // rows, image.shape[-1] // columns
    return args, {**kwargs, "irpe_map": Map(height, width, wants_attentions(part.config, kwargs))}


def remove_hook(module: nn.Module, function: Any) -> None:
    """Takes a pre-hook out of a module, if it is there."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is function:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


class View:
    """A module with some attributes replaced, for one call."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def map_beside_mask(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of an attention that hands no keyword arguments on: the mask becomes `OnMap(mask, irpe_map)`."""
    place = kwargs.get("irpe_map")
    if place is None:
        return None
    if len(args) > 1:
        return (args[0], OnMap(args[1], place), *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": OnMap(kwargs.get("attention_mask"), place)}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    irpe_map: Map | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the encodings of `module`, in the form of transformers' attention functions.

    Args:
        query, key, value: (B, H, L, D), rotated where the model has rotary embeddings.
        attention_mask: None, boolean (True takes part) or added, broadcasting to (B, H, L, L).

    Returns the output (B, L, H, D), and the weights (B, H, L, L) where they were asked for, else None.
    """
    if isinstance(attention_mask, OnMap):
        attention_mask, irpe_map = attention_mask
    if irpe_map is None:
        irpe_map = getattr(module, "irpe_map", None)  # of a view of the module, made for this call
    if not hasattr(module, "rpe_k"):
        raise RuntimeError(
            f'{type(module).__name__} has attn_implementation="{NAME}", but no tables: leave the implementation as it '
            "is, and call irpe.equip(model, config)"
        )
    if irpe_map is None:
        raise RuntimeError(
            "this attention does not know the height and width of its map: call the model that was equipped, not its "
            "layers or its forward; or give the layers irpe_map=irpe.integrations.hf_vit.attention.Map(height, width, "
            "False)"
        )
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        shape = getattr(attention_mask, "shape", None)
        raise TypeError(
            f"attention_mask is a {type(attention_mask).__name__} of shape {shape}; expected four dimensions: "
            'choose model.set_attn_implementation("sdpa") or "eager", whose masks iRPE can read'
        )
    if (module.is_causal if is_causal is None else is_causal) and attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    places = irpe_map.places()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rpe = module.rpe_q, module.rpe_k, module.rpe_v
    if irpe_map.output_attentions:
        written_out = _Encodings.of(query, key, *rpe, places)
        query, scaled_key = query * scaling, key * scaling
        bias = written_out.bias(query, scaled_key, attention_mask)
        out, weights = written_out.formula(query, key, value, *bias, lambda weights: F.dropout(weights, dropout))
        return out.transpose(1, 2).contiguous(), weights
    out = rpe_attention(
        query, key, value, *rpe, **places, scale=scaling, attn_mask=attention_mask, dropout_p=dropout
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
# without this a model whose own configuration says "irpe" would run with its masks left out
AttentionMaskInterface.register(NAME, sdpa_mask)
