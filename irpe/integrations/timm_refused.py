"""timm's models that look as if they could have iRPE, and the reasons that they cannot."""

from typing import Any

from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn

from ..irpe import RPEConfig

_COSINES = "its scores are cosines of queries and keys, and the encodings are terms of scaled dot products"
_REASONS: dict[type[nn.Module], str] = {
    NaFlexVit: "images of one batch have maps of different sizes, and their tokens are padded and may be dropped",
    SwinTransformerV2: _COSINES,
    SwinTransformerV2Cr: _COSINES,
}


class _Refusals:
    """An `irpe.equip.Adapter` that has a reason against all that it finds."""

    def find(self, model: nn.Module) -> list[Any]:
        return [one for one in model.modules() if isinstance(one, tuple(_REASONS))]

    def attentions(self, part: Any) -> list[nn.Module]:
        return []

    def why_not(
        self, part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None
    ) -> str | None:
        return next(reason for cls, reason in _REASONS.items() if isinstance(part, cls))

    def equip(self, part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None) -> None:
        raise AssertionError("why_not has a reason against every part")

    def is_equipped(self, part: Any) -> bool:
        return False

    def unequip(self, part: Any) -> None:
        raise AssertionError("no part is ever equipped")


ADAPTER = _Refusals()
