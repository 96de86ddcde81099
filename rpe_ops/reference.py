"""The law: every operator in plain torch, computed in float32 (float64 for float64 inputs). Tests compare with it.

No flags, no cleverness: a term of a formula is a line. Kernels never import this file.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """Y[b, h, i, j] = input[b, h, i, index[i, j]].

    Args:
        input: (B, H, Lq, N).
        index: (Lq, Lk), integers in [0, N).

    Returns:
        (B, H, Lq, Lk), of input's dtype.
    """
    rows = torch.arange(index.shape[0], device=index.device).unsqueeze(1)  # (Lq, 1)
    return input[:, :, rows, index.long()]


def rpe_bucket_sum(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """S[b, h, i, n] = sum of input[b, h, i, j] over the j with index[i, j] = n.

    Args:
        input: (B, H, Lq, Lk).
        index: (Lq, Lk), integers in [0, num_buckets).
        num_buckets: N.

    Returns:
        (B, H, Lq, N), of input's dtype; summed in float32 at least.
    """
    member = _exact(F.one_hot(index.long(), num_buckets).to(input.dtype))  # (Lq, Lk, N)
    return torch.einsum("bhij,ijn->bhin", _exact(input), member).to(input.dtype)


def dropout_weights(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """0 where hash(seed, b, h, i, j) < p * 2^24, else 1 / (1 - p): what dropout multiplies the attention weights with.

    Args:
        seed: int64 tensor of one element.
        shape: (B, H, Lq, Lk).
        dropout_p: p.

    Returns:
        (B, H, Lq, Lk), float64.
    """

    def mix(x: Tensor) -> Tensor:  # 32 bits in int64, whose products wrap where they do not matter
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    B, H, Lq, Lk = shape
    head, i, j = (torch.arange(n, device=seed.device) for n in (B * H, Lq, Lk))
    low, high = seed.reshape(()) & 0xFFFFFFFF, seed.reshape(()) >> 32 & 0xFFFFFFFF
    key = mix(mix(low + 0x9E3779B9 & 0xFFFFFFFF) ^ high)
    key = mix(mix(key ^ head.view(B, H, 1, 1)) ^ i.view(Lq, 1))
    dropped = (mix(key ^ j) >> 8) < int(dropout_p * 2**24 + 0.5)
    return (~dropped).double() * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Sequence[tuple[Tensor, Tensor]] = (),
    on_k: Sequence[tuple[Tensor, Tensor]] = (),
    on_v: Sequence[tuple[Tensor, int]] = (),
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """p = dropout(softmax(scale q k^T + sum lut_k[i, ids[i, j]] + sum lut_q[j, ids[j, i]] + mask)), out = p v.

    Args:
        q, k, v: (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D), q not scaled yet.
        on_q: pairs of a side table lut_q, (B or 1, H or 1, Lk, N), and its ids (Lk, Lq); cross has two pairs.
        on_k: pairs of a side table lut_k, (B or 1, H or 1, Lq, N), and its ids (Lq, Lk).
        on_v: pairs of ids (Lq, Lk) and N.
        scale: D ** -0.5 by default.
        attn_mask: broadcasts to (B, H, Lq, Lk); boolean (True takes part) or additive. A row that is masked whole
            has weights 0.
        dropout_p: probability that a weight is dropped.
        seed: int64 tensor of one element that says which; needed when dropout_p > 0.

    Returns:
        out (B, H, Lq, D) without the encoding on values, and for each pair of on_v the bucket sums of p, (B, H, Lq, N):
        the caller adds S @ W_v.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * _exact(q) @ _exact(k).transpose(-2, -1)  # (B, H, Lq, Lk)
    for lut, ids in on_k:
        scores = scores + rpe_index(_exact(lut), ids)
    for lut, ids in on_q:
        scores = scores + rpe_index(_exact(lut), ids).transpose(-2, -1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        scores = scores + attn_mask
    masked = (scores == -torch.inf).all(-1, keepdim=True)  # (B, H, Lq, 1)
    p = scores.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)
    if dropout_p > 0:
        assert seed is not None
        p = p * dropout_weights(seed, p.shape, dropout_p).to(p.dtype)
    out = p @ _exact(v)
    return out.to(q.dtype), [rpe_bucket_sum(p, ids, num_buckets).to(q.dtype) for ids, num_buckets in on_v]
