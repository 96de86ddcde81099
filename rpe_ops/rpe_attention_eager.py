"""The backend "eager" of `rpe_attention`: the formula in plain torch, on every device, any derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


def attention(
    q: Tensor, k: Tensor, v: Tensor, on_q: Pairs, on_k: Pairs, on_v: Sequence[tuple[Tensor, int]], **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """(out, sums) of checked arguments; settings are scale, attn_mask, dropout_p, seed."""
    scores = (q * settings["scale"]) @ k.transpose(-2, -1)  # (B, H, Lq, Lk)
    for lut, ids in on_k:
        scores = scores + lut.gather(-1, ids.long().expand(*lut.shape[:2], *ids.shape))
    for lut, ids in on_q:
        scores = scores + lut.gather(-1, ids.long().expand(*lut.shape[:2], *ids.shape)).transpose(-2, -1)
    empty = None
    mask = settings["attn_mask"]
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
        empty = (mask == -torch.inf).all(-1, keepdim=True)  # such rows stay finite, and are cleared below
        scores = scores + mask.masked_fill(empty, 0.0)
    p = scores.softmax(-1)
    if empty is not None:
        p = p.masked_fill(empty, 0.0)
    if settings["dropout_p"] > 0:
        p = p * _dropout(settings["seed"], p.shape, settings["dropout_p"]).to(p.dtype)
    p = p.to(q.dtype)
    sums = []
    for ids, num_buckets in on_v:
        zeros = p.new_zeros(*p.shape[:3], num_buckets)
        sums.append(zeros.scatter_add(-1, ids.long().expand(p.shape), p))
    return p @ v, sums


def _mix(x: Tensor) -> Tensor:
    # a 32-bit hash; int32 products wrap, and its shifts keep the sign, which the masks remove
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _dropout(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """(B, H, Lq, Lk) of 1 / (1 - p), and 0 where hash(seed, b, h, i, j) is below p * 2^24."""
    B, H, Lq, Lk = shape
    count = [torch.arange(n, dtype=torch.int32, device=seed.device) for n in (B * H, Lq, Lk)]
    low, high = seed.reshape(1).view(torch.int32)
    key = _mix(_mix(low + (0x9E3779B9 - 2**32)) ^ high)
    key = _mix(key ^ count[0].view(B, H, 1, 1))
    key = _mix(key ^ count[1].view(Lq, 1))
    dropped = (_mix(key ^ count[2]) >> 8 & 0xFFFFFF) < int(dropout_p * 2**24 + 0.5)
    return torch.where(dropped, 0.0, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
