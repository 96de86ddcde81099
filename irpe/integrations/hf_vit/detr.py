"""DETR: its map is that of the projected feature, whose size only the forward of `DetrModel` knows.

The model runs transformers' own forward on a view of itself, made for this one call, that reads the size off the
feature as it passes and hands it to the encoder. The classes keep their names, which transformers writes into config
files, and pickle under those below.
"""

import functools
import math
from typing import Any

from torch import Tensor
from transformers.models.detr.modeling_detr import DetrForSegmentation, DetrModel

from .attention import Map, View, wants_attentions


class _DetrView(View):
    _size: tuple[int, int] | None = None

    def input_projection(self, feature: Tensor) -> Tensor:
        projected = self._module.input_projection(feature)
        self._size = projected.shape[-2:]
        return projected

    def encoder(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        # features that come from outside are taken for a square, as DetrModel does for its own positions
        height, width = self._size or (math.isqrt(inputs_embeds.shape[1]),) * 2
        wanted = wants_attentions(self._module.config, kwargs)
        return self._module.encoder(inputs_embeds=inputs_embeds, irpe_map=Map(height, width, wanted), **kwargs)


class RPEDetrModel(DetrModel):
    """The class of an equipped `DetrModel`."""

    irpe_original = DetrModel

    @functools.wraps(DetrModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return DetrModel.forward(_DetrView(self), *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return DetrModel._can_set_attn_implementation()  # which looks into the file of its class


class RPEDetrForSegmentation(DetrForSegmentation):
    """The class of an equipped `DetrForSegmentation`."""

    irpe_original = DetrForSegmentation

    @functools.wraps(DetrForSegmentation.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        view = View(self, detr=View(self.detr, model=_DetrView(self.detr.model)))
        return DetrForSegmentation.forward(view, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return DetrForSegmentation._can_set_attn_implementation()


_EQUIPPED = {cls.irpe_original: cls for cls in (RPEDetrModel, RPEDetrForSegmentation)}
for _cls in _EQUIPPED.values():
    _cls.__name__ = _cls.irpe_original.__name__


def swap(part: Any) -> None:
    """Gives a DETR the class that tells its encoder the map."""
    part.__class__ = _EQUIPPED[type(part)]
    if isinstance(part, DetrForSegmentation):
        swap(part.detr.model)


def swap_back(part: Any) -> None:
    """Gives a DETR its own class back."""
    part.__class__ = part.irpe_original
    if isinstance(part, DetrForSegmentation):
        swap_back(part.detr.model)
