"""RPEMultiheadAttention: torch's nn.MultiheadAttention with image relative position encoding."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_io import rpe_config_from_string
from .fx import one_node
from .irpe import Axes, Places, RPEConfig, RPEModule, Size, _cells, _Encodings, _size, build_rpe, iRPE, rpe_attention


class RPEMultiheadAttention(nn.MultiheadAttention):
    """softmax(scale q k^T + rpe_k(scale q) + rpe_q(scale k)^T + mask) v + rpe_v(weights), between its projections.

    >>> attention = RPEMultiheadAttention(64, 4, batch_first=True, rpe_config="rpe-1.9-product-ctx-1-k")
    >>> x = torch.randn(2, 14 * 9, 64)
    >>> attention(x, x, x, need_weights=False, hw=(14, 9))[0].shape
    torch.Size([2, 126, 64])

    A drop-in for `nn.MultiheadAttention`: its arguments, masks, outputs and state-dict keys, and beside them the tables
    rpe_q, rpe_k, rpe_v. Tables start at zero and change nothing then; without `rpe_config` there are none. Inside an
    `nn.TransformerEncoderLayer` it is always called: torch's fused kernel for evaluation, which would take the weights
    and leave the encodings out, is kept away.

    Args:
        embed_dim to dtype: as in `nn.MultiheadAttention`. The keys that add_bias_kv and add_zero_attn add have no
            place, so their pairs have the skip bucket: they need skip > 0.
        rpe_config: from `get_rpe_config`, or its string form (skip is 0 then), or None.

    Attributes:
        rpe_grid: size of the map where a call does not say it, (height, width), or None, which takes it for a square.
            For an attention whose caller cannot hand it through, such as `nn.TransformerEncoderLayer`.

    Raises:
        ValueError: added keys without skip, or what `nn.MultiheadAttention` and `get_rpe_config` refuse.
    """

    rpe_q: RPEModule | None
    rpe_k: RPEModule | None
    rpe_v: RPEModule | None
    rpe_grid: tuple[int, ...] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rpe_config: RPEConfig | str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        config = rpe_config_from_string(rpe_config) if isinstance(rpe_config, str) else rpe_config
        if config is not None and (reason := why_no_encodings(self, config)):
            raise ValueError(reason)
        rpe = build_rpe(config, self.head_dim, num_heads, device=device, dtype=dtype)
        self.rpe_q, self.rpe_k, self.rpe_v = rpe
        if config is not None:
            self.register_forward_pre_hook(keep_fused_kernels_away)

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        height: Size = None,
        width: Size = None,
        hw: tuple[int, int] | None = None,
        size: Axes = None,
        positions: Places = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights), as `nn.MultiheadAttention` has them; weights are those after dropout, or None.

        Args:
            query to is_causal: as there. Boolean masks are True where a pair is ignored. With need_weights=False the
                attention is fused where it can be, and a query without any key gets output 0 before the projection;
                with weights it gets NaN, as in torch.
            height, width: of the map in tokens, or both as the pair hw; without them the map is `rpe_grid`, else a
                square.
            size: instead, one number for each axis, such as (frames, height, width).
            positions: instead, where the tokens are, (L, 2) or (B, L, 2), see `get_bucket_ids`; a pair of such tensors
                for queries and keys. Cross attention between different numbers of tokens needs it.
        """
        if self.rpe_q is None and self.rpe_k is None and self.rpe_v is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if hw is not None:
            if (height, width, size) != (None, None, None):
                given = f"height={height}, width={width}" if size is None else f"size={size}"
                raise ValueError(f"hw={hw}, {given}: give hw, or height and width, or size")
            size = hw
        elif self.rpe_grid is not None and (height, width, size) == (None, None, None) and positions is None:
            size = self.rpe_grid
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True only says that attn_mask is causal: pass the mask too")
        self._check(query, key, value)
        q, k, v = (self._by_head(x) for x in self._project(query, key, value))  # (B, H, L, D)
        mask = _merge_masks(q, k, key_padding_mask, attn_mask, unbatched=query.dim() == 2)
        added = (self.bias_k is not None) + self.add_zero_attn
        if added:
            positions = self._with_added(positions, q, k, added, height=height, width=width, size=size)
            height = width = size = None
            k, v = self._add_keys(k, self.bias_k), self._add_keys(v, self.bias_v)
            mask = mask if mask is None else F.pad(mask, (0, added), value=mask.dtype == torch.bool)
        dropout_p = self.dropout if self.training else 0.0
        places: dict[str, Any] = dict(height=height, width=width, size=size, positions=positions)
        weights = None
        if need_weights:
            out, weights = self._formula(q, k, v, mask, dropout_p, **places)
        else:
            rpe = (self.rpe_q, self.rpe_k, self.rpe_v)
            out = rpe_attention(q, k, v, *rpe, **places, attn_mask=mask, dropout_p=dropout_p)
        out = out.transpose(1, 2).flatten(2)  # (B, Lq, E)
        if query.dim() == 2:
            out, weights = out.squeeze(0), weights if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        # the weight and not the module, as in torch: adapters such as LoRA put their sum there while they call
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        return out, weights.mean(-3) if weights is not None and average_attn_weights else weights

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """torch's helper, which only its fused kernels ask for: an error where these would leave the encodings out."""
        if self.rpe_q is None and self.rpe_k is None and self.rpe_v is None:
            return super().merge_masks(attn_mask, key_padding_mask, query)
        raise RuntimeError(
            "a fused kernel of torch is about to take the weights of this attention and leave iRPE out, because the "
            "pre-hook that keeps it away was removed: call torch.backends.mha.set_fastpath_enabled(False)"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script reads in its place: without tables that is `nn.MultiheadAttention`."""
        if not (self.rpe_q is None and self.rpe_k is None and self.rpe_v is None):
            return self  # its tables have a word to say
        plain = copy.copy(self)
        plain.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
        return plain

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        for module in self.modules():  # none yet where the constructor of nn.MultiheadAttention calls this
            # transformers calls this for what it has loaded, too, and marks the weights that there were
            if isinstance(module, iRPE) and not getattr(module.table, "_is_hf_initialized", False):
                module.reset_parameters()

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "the input is a nested tensor, which has no map: pass a padded one, and build nn.TransformerEncoder "
                "with enable_nested_tensor=False (equip sees to that where it gets the whole encoder)"
            )
        batch, layout = (0, "(B, L, E)") if self.batch_first else (1, "(L, B, E)")
        sizes = self.embed_dim, self.kdim, self.vdim
        if not (
            query.dim() == key.dim() == value.dim() in (2, 3)
            and key.shape[:-1] == value.shape[:-1]
            and (query.dim() == 2 or query.shape[batch] == key.shape[batch])
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == sizes
        ):
            raise ValueError(
                f"query, key, value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
                f"expected {layout} or (L, E), with E {sizes}, and key and value of one length"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        packed = self.in_proj_weight is not None
        weights: Any = self.in_proj_weight if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias: Any = self.in_proj_bias
        if bias is not None:  # torch takes one of any dtype, where its input is not contiguous
            bias = bias.to((weights if packed else weights[0]).dtype)
        if packed and query is key and key is value:
            return list(F.linear(query, weights, bias).chunk(3, -1))
        weights = weights.chunk(3) if packed else weights
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, L, E), (L, B, E) or (L, E) -> (B, H, L, D)."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _add_keys(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [x]
        if bias is not None:
            parts.append(bias.to(x.dtype).view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(*x.shape[:2], 1, x.shape[3]))
        return torch.cat(parts, 2)

    def _with_added(self, positions: Places, q: Tensor, k: Tensor, added: int, **size: Any) -> Any:
        """positions of queries and keys, the added keys last and without a place."""
        if positions is None:
            if q.shape[2] != k.shape[2]:
                raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys: an encoding needs positions= here")
            single = next(module.rpe_config for module in self.modules() if isinstance(module, iRPE))
            cells = torch.stack(_cells(_size(q.shape[2], single, **size), q.device), -1)
            positions = F.pad(cells, (0, 0, single.skip, 0), value=-1)
        elif any(n is not None for n in size.values()):
            given = ", ".join(f"{name}={n}" for name, n in size.items())
            raise ValueError(f"{given} and positions: give one or the other")
        of_q, of_k = positions if isinstance(positions, tuple) else (positions, positions)
        nowhere = torch.full((*of_k.shape[:-2], added, of_k.shape[-1]), -1, device=of_k.device)
        return of_q, torch.cat([of_k, nowhere], -2)

    def _formula(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, *, positions: Places, **size: Any
    ) -> tuple[Tensor, Tensor]:
        """(output by head, weights by head): `rpe_attention` written out, where the weights are wanted too."""
        rpe = _Encodings.of(q, k, self.rpe_q, self.rpe_k, self.rpe_v, size | dict(positions=positions))
        q, k_scaled = q * self.head_dim**-0.5, k * self.head_dim**-0.5
        bias, empty = rpe.bias(q, k_scaled, mask)
        out, weights = rpe.formula(q, k, v, bias, empty, lambda weights: F.dropout(weights, dropout_p))
        if empty is not None:  # a query without a key is NaN in torch
            out, weights = out.masked_fill(empty, torch.nan), weights.masked_fill(empty, torch.nan)
        return out, weights


def why_no_encodings(attention: nn.MultiheadAttention, config: RPEConfig) -> str | None:
    """The reason that an attention cannot have these encodings, or None."""
    skips = {name: single.skip for name, single in vars(config).items() if single is not None}
    if (attention.bias_k is not None or attention.add_zero_attn) and (min(skips.values(), default=1) < 1):
        return (
            "add_bias_kv and add_zero_attn add a key that has no place, and its pairs need the skip bucket: expected "
            f"skip > 0 in the configuration, got {skips}"
        )
    if (attention.bias_k is not None or attention.add_zero_attn) and len(set(skips.values())) > 1:
        return f"add_bias_kv and add_zero_attn need one skip for all encodings, got {skips}"
    return None


def keep_fused_kernels_away(attention: nn.Module, args: Any) -> None:
    """Does nothing: `nn.TransformerEncoderLayer` calls an attention that has a hook, and fuses one that has none."""


def _merge_masks(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, *, unbatched: bool
) -> Tensor | None:
    """Both masks of `nn.MultiheadAttention` as one of `rpe_attention`, where True takes part."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    masks = []
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(keys,) if unbatched else (batch, keys)])
        masks.append(key_padding_mask.reshape(batch, 1, 1, keys))
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, [(queries, keys), (batch * heads, queries, keys)])
        masks.append(attn_mask.view(-1, heads if attn_mask.dim() == 3 else 1, queries, keys))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] | masks[-1])
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0])


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} is {mask.dtype}; expected bool (True is ignored) or floating point (added)")
    if mask.shape not in shapes:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected {' or '.join(map(str, shapes))}")
