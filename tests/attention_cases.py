"""Problems for `rpe_attention`, and how exact a backend has to be: for the tests of every backend, on every device."""

import math

import numpy as np
import torch

from rpe_ops import reference
from rpe_ops.rpe_attention import rpe_attention


def strided(shape, dtype, layout):
    """Unit-normal (B, H, L, D): contiguous, cut out of one projection as timm has it, heads last, or with gaps."""
    B, H, L, D = shape
    if layout == "timm":
        return torch.randn(B, L, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    if layout == "detr":
        return torch.randn(L, B * H, D, dtype=dtype).transpose(0, 1).unflatten(0, (B, H))
    if layout == "gaps":
        return torch.randn(B, H, L, 2 * D, dtype=dtype)[..., ::2]
    return torch.randn(shape, dtype=dtype)


def make_mask(kind, shape):
    B, H, Lq, Lk = shape
    if kind == "padding":
        mask = torch.ones(B, 1, 1, Lk, dtype=torch.bool)
        mask[..., Lk - Lk // 3 :] = False
        return mask
    if kind == "bool":
        mask = torch.rand(Lq, Lk) > 0.3
        mask[:1] = False  # a row without a key
        return mask
    if kind == "float":
        return torch.randn(1, H, Lq, Lk).masked_fill(torch.rand(1, H, Lq, Lk) > 0.8, -math.inf)
    return None


def problem(shape, buckets, terms, dtype, layout="contiguous", maps=None):
    """q, k, v, on_q, on_k, on_v; terms are the numbers of pairs on q, k, v."""
    B, H, Lq, Lk, D = shape
    q = strided((B, H, Lq, D), dtype, layout)
    k, v = (strided((B, H, Lk, D), dtype, layout) for _ in range(2))

    def ids(rows, columns):
        return maps if maps is not None else torch.randint(buckets, (rows, columns))

    on_q = [(torch.randn(B, 1, Lk, buckets, dtype=dtype), ids(Lk, Lq)) for _ in range(terms[0])]
    on_k = [(torch.randn(1, H, Lq, buckets, dtype=dtype), ids(Lq, Lk)) for _ in range(terms[1])]
    on_v = [(ids(Lq, Lk), buckets) for _ in range(terms[2])]
    return q, k, v, on_q, on_k, on_v


def run(function, arguments, grads, dtype, **options):
    """(outputs, gradients of q, k, v and all tables), computed in `dtype`."""
    q, k, v, on_q, on_k, on_v = arguments
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, *(lut for lut, _ in (*on_q, *on_k)))]
    pairs = [(lut, ids) for lut, (_, ids) in zip(leaves[3:], (*on_q, *on_k), strict=True)]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.to(dtype)
    out, sums = function(*leaves[:3], pairs[: len(on_q)], pairs[len(on_q) :], on_v, **options)
    outputs = [out, *sums]
    return outputs, torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])


def law_in_80_bits(arguments, grads, attn_mask=None, dropout_p=0.0, seed=None):
    """What `run` returns, computed by numpy in the longest floats of the machine, rounded to float64 at the end."""
    q, k, v, *luts = (
        np.asarray(x.double(), np.longdouble)
        for x in (*arguments[:3], *(lut for lut, _ in (*arguments[3], *arguments[4])))
    )
    on_q, on_k, on_v = arguments[3:]
    B, H, Lq, D = q.shape
    full, scale = (B, H, Lq, k.shape[2]), np.longdouble(D**-0.5)

    def look_up(lut, ids):
        return np.take_along_axis(lut, np.broadcast_to(ids, lut.shape[:2] + ids.shape), -1)

    def bucket_sums(x, ids, buckets):
        sums = np.zeros((*x.shape[:3], buckets), np.longdouble)
        for i, j in np.ndindex(*ids.shape):
            sums[:, :, i, ids[i, j]] += x[:, :, i, j]
        return sums

    scores = scale * q @ k.swapaxes(-2, -1)
    tables = [np.broadcast_to(lut, (B, H, *lut.shape[2:])) for lut in luts]
    ids_q, ids_k = ([ids.numpy() for _, ids in pairs] for pairs in (on_q, on_k))
    ids_v = [ids.numpy() for ids, _ in on_v]
    for lut, ids in zip(tables, ids_q, strict=False):
        scores = scores + look_up(lut, ids).swapaxes(-2, -1)
    for lut, ids in zip(tables[len(on_q) :], ids_k, strict=True):
        scores = scores + look_up(lut, ids)
    if attn_mask is not None:
        added = torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype == torch.bool else attn_mask.double()
        scores = scores + np.asarray(added, np.longdouble)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    keep = np.longdouble(1) if dropout_p == 0 else reference.dropout_weights(seed, full, dropout_p).numpy()
    dropped = weights * keep
    outputs = [dropped @ v] + [bucket_sums(dropped, ids, n) for ids, (_, n) in zip(ids_v, on_v, strict=True)]

    grad_out, *grad_sums = (np.asarray(g.double(), np.longdouble) for g in grads)
    grad = grad_out @ v.swapaxes(-2, -1)
    for grad_sum, ids in zip(grad_sums, ids_v, strict=True):
        grad = grad + look_up(grad_sum, ids)
    grad = grad * keep
    grad = weights * (grad - (weights * grad).sum(-1, keepdims=True))
    of_tables = [bucket_sums(grad.swapaxes(-2, -1), ids, lut.shape[3]) for lut, ids in zip(tables, ids_q, strict=False)]
    of_tables += [bucket_sums(grad, ids, lut.shape[3]) for lut, ids in zip(tables[len(on_q) :], ids_k, strict=True)]
    for n, lut in enumerate(luts):
        shared = tuple(d for d in (0, 1) if lut.shape[d] == 1)
        of_tables[n] = of_tables[n].sum(shared, keepdims=True)
    grads = [scale * grad @ k, scale * grad.swapaxes(-2, -1) @ q, dropped.swapaxes(-2, -1) @ grad_out, *of_tables]
    return tuple([torch.from_numpy(x.astype(np.float64)) for x in some] for some in (outputs, grads))


def assert_rule_9(arguments, dtype, backend="cpu", **options):
    """The error is at most twice the formula's, and 16 eps of what is exact: float64, or 80 bits for float64 itself."""
    B, H, Lq, D = arguments[0].shape
    on_v = arguments[5]
    grads = [torch.randn(B, H, Lq, n, dtype=dtype) for n in [D] + [n for _, n in on_v]]
    if dtype == torch.float64:
        exact = law_in_80_bits(arguments, grads, **options)
    else:
        exact = run(reference.rpe_attention, arguments, grads, torch.float64, **options)
    formula = run(rpe_attention, arguments, grads, dtype, backend="eager", **options)
    ours = run(rpe_attention, arguments, grads, dtype, backend=backend, **options)
    for one, other, truth in zip([*ours[0], *ours[1]], [*formula[0], *formula[1]], [*exact[0], *exact[1]], strict=True):
        assert one.shape == truth.shape and one.dtype == dtype and one.isfinite().all()
        if truth.numel():
            slack = 16 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
            bound = 2 * (other - truth).abs().max() + slack
            assert (one - truth).abs().max() <= bound
