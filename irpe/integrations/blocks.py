"""What the adapters of timm share: attentions with encodings, and the adapter of models that are made of blocks."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..irpe import RPEConfig, RPEModule, _Encodings, build_rpe, rpe_attention
from .axes import why_not_axes


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
        if is_causal:  # as in timm's own formula, a mask that is given beside it is not used
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        rpe = (self.rpe_q, self.rpe_k, self.rpe_v)
        places: dict[str, Any] = dict(height=height, width=width)
        watched = self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks
        if getattr(self, "fused_attn", True) or not watched:
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = rpe_attention(q, k, v, *rpe, **places, scale=self.scale, attn_mask=mask, dropout_p=dropout_p)
        else:  # as in timm's own formula, weights pass through attn_drop, where hooks look at them
            written_out = _Encodings.of(q, k, *rpe, places | dict(positions=None))
            bias, empty = written_out.bias(q * self.scale, k * self.scale, mask)
            x, _ = written_out.formula(q * self.scale, k, v, bias, empty, self.attn_drop)
        return x.transpose(1, 2).flatten(2)


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


class BlockFamily:
    """The `irpe.equip.Adapter` of models that have `blocks`, each with an attention `attn`.

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
        return [one for one in model.modules() if isinstance(one, tuple(self._models))]

    def attentions(self, part: Any) -> list[nn.Module]:
        """The attention of every block that has one."""
        found = [getattr(block, "attn", None) for block in part.blocks]
        return [attn for attn in found if isinstance(attn, nn.Module)]

    def why_not(
        self, part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None
    ) -> str | None:
        """The reason that these encodings cannot be added to these attentions of a model, or None."""
        equipped = self.is_equipped(part)
        if type(part) not in self._models and not equipped:
            changed = [cls.__name__ for cls in self._models if isinstance(part, cls)]
            return f"{type(part).__name__} changes the forward of {changed[0]}"
        if type(getattr(part, "patch_drop", None)) not in (type(None), nn.Identity):
            return "patch dropout removes tokens, so the rest is no full map; build the model with patch_drop_rate=0"
        if hasattr(part, "patch_embed") and not hasattr(part.patch_embed, "dynamic_feat_size"):
            return f"its patch embedding {type(part.patch_embed).__name__} does not tell the size of its map"
        for name, block in part.blocks.named_children():
            if type(block) not in self._blocks:
                return f"blocks.{name} is a {type(block).__name__}; expected {_or(self._blocks)}"
            known = type(block.attn) in self._attentions or (equipped and type(block.attn) in self._original)
            if not known:
                return f"blocks.{name}.attn is a {type(block.attn).__name__}; expected {_or(self._attentions)}"
        for name, module in part.named_modules():
            mirrored = isinstance(module, (*self._models, *self._blocks, *self._attentions))
            if mirrored and "forward" in vars(module):
                return (
                    f"the forward of {name or 'the model'} has been replaced on the object, which would leave iRPE out"
                )
        if any(isinstance(attn, EncodedAttention) for attn in attentions):
            return "it has iRPE already; call unequip first, or name other blocks"
        if grid is not None:
            return f"grid={grid}, but the model knows the size of its map; leave grid out"
        if reason := why_not_axes(config, 2):
            return reason
        for name, single in vars(config).items():
            if single is not None and single.skip not in (0, _skip(part)):
                return f"{name} has skip={single.skip}, but the model has {_skip(part)} prefix tokens; leave skip at 0"
        return None

    def equip(self, part: Any, config: RPEConfig, attentions: list[nn.Module], grid: tuple[int, ...] | None) -> None:
        """Adds rpe_q, rpe_k and rpe_v to attentions of a model, which `why_not` has no reason against."""
        config = RPEConfig(**{n: one and dataclasses.replace(one, skip=_skip(part)) for n, one in vars(config).items()})
        for attention in attentions:
            one: Any = attention
            weight, head_dim = one.proj.weight, one.proj.in_features // one.num_heads
            tables = build_rpe(config, head_dim, one.num_heads, device=weight.device, dtype=weight.dtype)
            one.__class__ = self._attentions[type(one)]
            one.rpe_q, one.rpe_k, one.rpe_v = (rpe and rpe.train(one.training) for rpe in tables)
        part.__class__ = self._models.get(type(part), type(part))

    def is_equipped(self, part: Any) -> bool:
        """Whether it has iRPE."""
        if type(part) not in self._models:
            return type(part) in self._original
        return type(part) in self._original and any(isinstance(a, EncodedAttention) for a in self.attentions(part))

    def unequip(self, part: Any) -> None:
        """Takes out what `equip` has added: classes and tables."""
        for attention in self.attentions(part):
            if isinstance(attention, EncodedAttention):
                one: Any = attention
                one.__class__ = self._original[type(one)]
                del one.rpe_q, one.rpe_k, one.rpe_v
        part.__class__ = self._original[type(part)]


def _skip(part: Any) -> int:
    """Tokens in front of the map; windows have none."""
    return getattr(part, "num_prefix_tokens", 0)


def _or(classes: Iterable[type]) -> str:
    # with the module: timm has several classes Attention and Block
    return " or ".join(f"{one.__module__}.{one.__name__}" for one in classes)
