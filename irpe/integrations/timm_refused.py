"""timm's models that look as if they could have iRPE, and the reasons that they cannot."""

from typing import Any

from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn

from .adapter import Adapter

_COSINES = "its scores are cosines of queries and keys, and the encodings are terms of scaled dot products"
_REASONS: dict[type[nn.Module], str] = {
    NaFlexVit: "images of one batch have maps of different sizes, and their tokens are padded and may be dropped",
    SwinTransformerV2: _COSINES,
    SwinTransformerV2Cr: _COSINES,
}


class Refusals(Adapter):
    """Has a reason against all that it finds."""

    def find(self, model: nn.Module) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, tuple(_REASONS))]

    def objection(self, part: Any, attentions: list[Any]) -> str | None:
        return next(reason for cls, reason in _REASONS.items() if isinstance(part, cls))


ADAPTER = Refusals()
