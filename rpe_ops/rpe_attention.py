"""`rpe_attention`: attention with encodings on queries, keys and values, in tensors; the choice of its backends."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch, fused, maps, reference, rpe_attention_eager
from .maps import Map

Pairs = Sequence[tuple[Tensor, Map]]
OnValues = Sequence[tuple[Map, int]] | Sequence[tuple[Map, Tensor]]
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Pairs = (),
    on_k: Pairs = (),
    on_v: OnValues = (),
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
    or_eager: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """p = dropout(softmax(scale q k^T + sum lut_k[i, ids[i, j]] + sum lut_q[j, ids[j, i]] + mask)), out = p v.

    >>> q, k, v = torch.randn(3, 2, 6, 127, 64)
    >>> ids, lut_k = torch.zeros(127, 127, dtype=torch.uint8), torch.randn(2, 6, 127, 50)
    >>> out, (sums,) = rpe_attention(q, k, v, on_k=[(lut_k, ids)], on_v=[(ids, 50)])
    >>> out.shape, sums.shape
    (torch.Size([2, 6, 127, 64]), torch.Size([2, 6, 127, 50]))

    Args:
        q, k, v: (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D) of one dtype and any strides, q not scaled yet.
        on_q: pairs of a side table lut_q, (B or 1, H or 1, Lk, N), and its map (Lk, Lq); cross has two pairs.
        on_k: pairs of a side table lut_k, (B or 1, H or 1, Lq, N), and its map (Lq, Lk).
            In both, W (H or 1, D, N) in place of a side table stands for lut_q = scale k @ W, lut_k = scale q @ W.
        on_v: pairs of a map (Lq, Lk) and N, or of a map and W (H or 1, N, D), which then is in all of them.
            A map is a tensor of ids in [0, N), or for a grid a tuple such as `irpe.BucketMap`: see `maps`.
        scale: D ** -0.5 by default.
        attn_mask: broadcasts to (B, H, Lq, Lk); boolean (True takes part) or floating point (added). A row that is
            masked whole has weights 0.
        dropout_p: probability that a weight is dropped.
        seed: int64 tensor of one element, what the dropped weights depend on; drawn from torch's generator when absent.
            One seed drops the same weights on every backend.
        backend: "cpu" (C++) and "triton" (CUDA and ROCm) never hold an (Lq, Lk) tensor, "eager" is the formula in plain
            torch, "reference" the law. A name is honoured or refused. None takes what `choose` says, or_eager.
        or_eager: what a fused backend cannot (second derivatives, a kernel that this machine cannot compile) is left to
            "eager", the latter with a warning, instead of being refused.

    Returns:
        out (B, H, Lq, D) and a list: for each pair of on_v with N the bucket sums S of p, (B, H, Lq, N), so that the
        caller can add S @ W; with W out has that already, and the list is empty. Under
        autocast q, k, v are cast as `F.scaled_dot_product_attention` does.

    Source: iRPE, arXiv 2107.14222, Eq. 12 to 14; recomputed tiles as in arXiv 2205.14135.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, attn_mask, dropout_p)
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    on_q = [(_table(table, place, "on_q", (B, H, Lk, Lq, D)), place) for table, place in on_q]
    on_k = [(_table(table, place, "on_k", (B, H, Lq, Lk, D)), place) for table, place in on_k]
    on_v = _on_values(on_v, (H, Lq, Lk, D), q.device)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    settings: dict[str, Any] = dict(
        scale=D**-0.5 if scale is None else scale, attn_mask=attn_mask, dropout_p=dropout_p, seed=seed
    )
    if backend is None:
        backend, or_eager = choose(q, k, attn_mask), True
    elif backend in fused.BACKENDS:
        if (reason := fused.BACKENDS[backend].why_not(q, attn_mask)) is not None:
            raise ValueError(f'backend="{backend}" {reason}')
        # here and not in a jvp of the function, with which dynamo would not take it
        if not or_eager and _torch.forward_mode():
            raise NotImplementedError(fused.NO_FORWARD_MODE)
    elif backend not in ("eager", "reference"):
        raise ValueError(f'unknown backend {backend!r}; expected None, "cpu", "cuda", "triton", "eager" or "reference"')
    if backend == "reference":
        on_q, on_k = ([(table, maps.ids_of(place)) for table, place in pairs] for pairs in (on_q, on_k))
        on_v = [(maps.ids_of(place), last) for place, last in on_v]
        return _with_tables(reference.rpe_attention, q, k, v, on_q, on_k, on_v, **settings)
    if backend == "eager":
        return rpe_attention_eager.attention(q, k, v, on_q, on_k, on_v, **settings)

    def attention(*arguments: Any, **settings: Any) -> tuple[Tensor, list[Tensor]]:
        return fused.attention(backend, *arguments, **settings, or_eager=or_eager)

    if _torch.transforms_active():  # vmap folds what it maps into B, which W has not
        return _with_tables(attention, q, k, v, on_q, on_k, on_v, **settings)
    return attention(q, k, v, on_q, on_k, on_v, **settings)


def _with_tables(
    attention: Callable[..., tuple[Tensor, list[Tensor]]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Pairs,
    on_k: Pairs,
    on_v: OnValues,
    **settings: Any,
) -> tuple[Tensor, list[Tensor]]:
    """`attention` for a backend that takes side tables and returns bucket sums: the products with W are done here."""
    scale = settings["scale"]  # of W, which is smaller than q and k
    on_q = [(k @ (table * scale) if table.dim() == 3 else table, ids) for table, ids in on_q]
    on_k = [(q @ (table * scale) if table.dim() == 3 else table, ids) for table, ids in on_k]
    weights = [W for _, W in on_v if isinstance(W, Tensor)]
    sizes = [(ids, W.shape[1] if isinstance(W, Tensor) else W) for ids, W in on_v]
    out, sums = attention(q, k, v, on_q, on_k, sizes, **settings)
    for bucket_sums, W in zip(sums, weights, strict=False):
        out = out + bucket_sums @ W
    return out, [] if weights else sums


def choose(q: Tensor, k: Tensor, attn_mask: Tensor | None = None) -> str:
    """The backend that None means for such a call: "cpu", "cuda" or "triton", by q's device, else "eager".

    "eager" also where a fused backend knows that it is the slower one, see their `is_slow`, and in forward mode; and
    "cuda" leaves calls to "triton" whose encodings it does not take.
    """
    if _torch.forward_mode():
        return "eager"
    for name in ("cpu",) if q.device.type == "cpu" else ("cuda", "triton"):
        backend = fused.BACKENDS[name]
        if not backend.why_not(q, attn_mask) and not backend.is_slow(q, k):
            return name
    return "eager"


def why_not(backend: str, q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why `backend` cannot take a call with this q and mask, as the end of a sentence; None where it can."""
    return fused.BACKENDS[backend].why_not(q, attn_mask) if backend in fused.BACKENDS else None


def _check(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float) -> None:
    if (
        not (q.dim() == k.dim() == v.dim() == 4)
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}; expected (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D)")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise TypeError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one device")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p}; expected a probability, 0 <= dropout_p <= 1")
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask is {attn_mask.dtype}; expected bool (True takes part) or floating point (added)")
    full = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.dim() > 4 or not all(_fits(have, want) for have, want in sizes):
        raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to {full}")
    if attn_mask.device != q.device:
        raise ValueError(f"q is on {q.device}, attn_mask on {attn_mask.device}: move one of them")


def _fits(have: int, want: int) -> bool:
    # one by one: torch 2.11 compiles `in` of symbols wrongly
    return have == 1 or have == want


def _table(table: Tensor, place: Map, name: str, sizes: tuple[int, ...]) -> Tensor:
    """A side table expanded to (B, H, L, N), or W to (H, D, N), checked together with its map (L, L')."""
    B, H, rows, columns, D = sizes
    shape = table.shape
    if table.dim() == 3 and _fits(shape[0], H) and shape[1] == D:
        table = table if shape[0] == H else table.expand(H, -1, -1)
    elif table.dim() == 4 and _fits(shape[0], B) and _fits(shape[1], H) and shape[2] == rows:
        table = table.expand(B, H, -1, -1)
    else:
        expected = f"({B} or 1, {H} or 1, {rows}, N), or W of shape ({H} or 1, {D}, N)"
        raise ValueError(f"{name}: the table has shape {tuple(shape)}; expected {expected}")
    _check_dtype(table, name)
    maps.check(place, name, (rows, columns), shape[-1], table.device)
    return table


def _on_values(on_v: OnValues, sizes: tuple[int, ...], device: torch.device) -> list[Any]:
    """The pairs, checked, each W expanded to (H, N, D)."""
    H, Lq, Lk, D = sizes
    pairs: list[Any] = []
    for place, W in on_v:
        if isinstance(W, Tensor):
            if W.dim() != 3 or not _fits(W.shape[0], H) or W.shape[2] != D:
                raise ValueError(f"on_v: W has shape {tuple(W.shape)}; expected ({H} or 1, N, {D})")
            _check_dtype(W, "on_v")
            pairs.append((place, W if W.shape[0] == H else W.expand(H, -1, -1)))
        else:
            pairs.append((place, W))
        maps.check(place, "on_v", (Lq, Lk), W.shape[1] if isinstance(W, Tensor) else W, device)
    if len({isinstance(W, Tensor) for _, W in pairs}) > 1:
        raise TypeError("on_v: some pairs have W and others N; give the same in all of them")
    return pairs


def _check_dtype(table: Tensor, name: str) -> None:
    if table.dtype not in _FLOATS:
        raise TypeError(f"{name}: the table is {table.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
