"""What the adapters of timm share: attentions with encodings, and the adapter of models that are made of blocks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..fx import one_call
from ..irpe import RPEConfig, RPEModule, _Encodings, rpe_attention
from .adapter import Adapter, Grid, Map, replaced


class EncodedAttention:
    """The part of an equipped attention's class that holds the encodings; the rest of it is timm's."""

    rpe_q: RPEModule | None
    rpe_k: RPEModule | None
    rpe_v: RPEModule | None

    def attend(
        self: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        height: int,
        width: int,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention with the encodings, its heads side by side: (B, H, L, D) each -> (B, L, H * D)."""
        watched = self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks or isinstance(q, fx.Proxy)
        if getattr(self, "fused_attn", True) or not watched:
            rpe = (self.rpe_q, self.rpe_k, self.rpe_v)
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = rpe_attention(
                q,
                k,
                v,
                *rpe,
                height=height,
                width=width,
                scale=self.scale,
                attn_mask=_mask(q, mask, is_causal),
                dropout_p=dropout_p,
            )
        else:  # as in timm's own formula, weights pass through attn_drop, where hooks and torch.fx look at them
            scores, empty = self.scores(q, k, height, width, mask, is_causal)
            weights = self.cleared(scores.softmax(-1), empty)
            x = self.values(self.attn_drop(weights), v, height, width)
        return x.transpose(1, 2).flatten(2)

    @one_call
    def scores(
        self: Any, q: Tensor, k: Tensor, height: int, width: int, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """scale q k^T with all that is added to it, (B, H, L, L), and which rows have no key, (.., L, 1)."""
        encodings = _Encodings.of(
            q, k, self.rpe_q, self.rpe_k, self.rpe_v, dict(height=height, width=width, positions=None)
        )
        q = q * self.scale
        bias, empty = encodings.bias(q, k * self.scale, _mask(q, mask, is_causal))
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias), empty

    @one_call
    def cleared(self, weights: Tensor, empty: Tensor | None) -> Tensor:
        """Weights of 0 in the rows that have no key."""
        return weights if empty is None else weights.masked_fill(empty, 0.0)

    @one_call
    def values(self: Any, weights: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """weights v and the encodings of values: (B, H, L, D)."""
        out = weights @ v
        return out if self.rpe_v is None else out + self.rpe_v(weights, height=height, width=width)


def _mask(q: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """As in timm's own formula, a mask that is given beside is_causal is not used."""
    if not is_causal:
        return mask
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


def qkv_without_bias_on_keys(attn: Any, x: Tensor) -> Tensor:
    """The projections of x, side by side: of attentions whose keys have no bias, which EVA took over from BEiT."""
    if attn.q_bias is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        qkv = attn.qkv(x)
        qkv += bias  # in place, so that it keeps the dtype of the product under autocast
        return qkv
    return F.linear(x, attn.qkv.weight, bias)


class BlockFamily(Adapter):
    """The adapter of models that have `blocks`, each with an attention `attn`.

    Objects are equipped by a change of class, and their weights stay where they were.

    Args:
        models: timm's class of a model -> the class of an equipped one; the same where nothing has to change.
        blocks: the classes that a block may have.
        attentions: timm's class of an attention -> the class of an equipped one, an `EncodedAttention`.
    """

    def __init__(
        self,
        models: dict[type[nn.Module], type[nn.Module]],
        blocks: tuple[type[nn.Module], ...],
        attentions: dict[type[nn.Module], type[nn.Module]],
    ) -> None:
        self._models, self._blocks, self._attentions = models, blocks, attentions
        self._original = {equipped: original for original, equipped in (models | attentions).items()}

    def find(self, model: nn.Module) -> list[Any]:
        """The models of the family inside a model: itself, or what a wrapper such as timm's features_only holds."""
        return [module for module in model.modules() if isinstance(module, tuple(self._models))]

    def attentions(self, part: Any) -> list[Any]:
        """The attention of every block that has one."""
        found = [getattr(block, "attn", None) for block in part.blocks]
        return [attn for attn in found if isinstance(attn, nn.Module)]

    def has_encodings(self, module: nn.Module) -> bool:
        return isinstance(module, EncodedAttention)

    def map_of(self, part: Any) -> Map:
        return Map(2, getattr(part, "num_prefix_tokens", 0))  # windows have none

    def heads(self, attention: Any) -> tuple[int, int, Tensor]:
        return attention.proj.in_features // attention.num_heads, attention.num_heads, attention.proj.weight

    def objection(self, part: Any, attentions: list[Any]) -> str | None:
        if type(part) not in self._models and type(part) not in self._original:
            changed = [cls.__name__ for cls in self._models if isinstance(part, cls)]
            return f"{type(part).__name__} changes the forward of {changed[0]}"
        if type(getattr(part, "patch_drop", None)) not in (type(None), nn.Identity):
            return "patch dropout removes tokens, so the rest is no full map; build the model with patch_drop_rate=0"
        if hasattr(part, "patch_embed") and not hasattr(part.patch_embed, "dynamic_feat_size"):
            return f"its patch embedding {type(part.patch_embed).__name__} does not tell the size of its map"
        known = (*self._attentions, *(self._original if type(part) in self._original else ()))
        for name, block in part.blocks.named_children():
            if type(block) not in self._blocks:
                return f"blocks.{name} is a {type(block).__name__}; expected {_or(self._blocks)}"
            if type(block.attn) not in known:
                return f"blocks.{name}.attn is a {type(block.attn).__name__}; expected {_or(self._attentions)}"
        for name, module in part.named_modules():
            mirrored = isinstance(module, (*self._models, *self._blocks, *self._attentions))
            if mirrored and "forward" in vars(module):
                return replaced(name)
        return None

    def change(self, attention: Any) -> None:
        attention.__class__ = self._attentions[type(attention)]

    def restore(self, attention: Any) -> None:
        attention.__class__ = self._original[type(attention)]

    def finish(self, part: Any, config: RPEConfig, attentions: list[Any], grid: Grid) -> None:
        part.__class__ = self._models.get(type(part), type(part))

    def undo(self, part: Any) -> None:
        part.__class__ = self._original[type(part)]


def _or(classes: Iterable[type]) -> str:
    # with the module: timm has several classes Attention and Block
    return " or ".join(f"{cls.__module__}.{cls.__name__}" for cls in classes)
