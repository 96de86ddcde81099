"""Problems for `rpe_attention`, and how exact a backend has to be: for the tests of every backend, on every device."""

import math
import os
from unittest import mock

import numpy as np
import torch

from rpe_ops import _native, reference, rpe_attention_cpu
from rpe_ops.rpe_attention import rpe_attention

ISAS = ["plain", "avx2", "avx512", "avx512_bf16"]  # of the compiled kernels, those that run here
if "cpu" in _native.LOADED:
    with mock.patch.dict(os.environ, RPE_OPS_ISA=""):
        ISAS = ISAS[: ISAS.index(rpe_attention_cpu.isa()) + 1]


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


def problem(shape, buckets, terms, dtype, layout="contiguous", maps=None, weights=False):
    """q, k, v, on_q, on_k, on_v; terms are the numbers of pairs on q, k, v; with side tables, or with W."""
    B, H, Lq, Lk, D = shape
    q = strided((B, H, Lq, D), dtype, layout)
    k, v = (strided((B, H, Lk, D), dtype, layout) for _ in range(2))

    def ids(rows, columns):
        return maps if maps is not None else torch.randint(buckets, (rows, columns))

    shapes = [(1, D, buckets), (H, D, buckets)] if weights else [(B, 1, Lk, buckets), (1, H, Lq, buckets)]
    on_q = [(torch.randn(shapes[0], dtype=dtype), ids(Lk, Lq)) for _ in range(terms[0])]
    on_k = [(torch.randn(shapes[1], dtype=dtype), ids(Lq, Lk)) for _ in range(terms[1])]
    on_v = [(ids(Lq, Lk), torch.randn(H, buckets, D, dtype=dtype) if weights else buckets) for _ in range(terms[2])]
    return q, k, v, on_q, on_k, on_v


def run(function, arguments, grads, dtype, **options):
    """(outputs, gradients of q, k, v and all tables), computed in `dtype`."""
    q, k, v, on_q, on_k, on_v = arguments
    tables = [table for table, _ in (*on_q, *on_k)] + [W for _, W in on_v if isinstance(W, torch.Tensor)]
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, *tables)]
    of = iter(leaves[3:])
    on_q, on_k = ([(next(of), ids) for _, ids in pairs] for pairs in (on_q, on_k))
    on_v = [(ids, next(of) if isinstance(W, torch.Tensor) else W) for ids, W in on_v]
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.to(dtype)
    out, sums = function(*leaves[:3], on_q, on_k, on_v, **options)
    outputs = [out, *sums]
    return outputs, torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])


def law_in_80_bits(arguments, grads, attn_mask=None, dropout_p=0.0, seed=None):
    """What `run` returns, computed by numpy in the longest floats of the machine, rounded to float64 at the end."""

    def long(x):
        return np.asarray(x.double(), np.longdouble)

    q, k, v = (long(x) for x in arguments[:3])
    on_q, on_k = ([(long(table), ids.numpy()) for table, ids in pairs] for pairs in arguments[3:5])
    on_v = [(ids.numpy(), long(W) if isinstance(W, torch.Tensor) else W) for ids, W in arguments[5]]
    B, H, Lq, D = q.shape
    full, scale = (B, H, Lq, k.shape[2]), np.longdouble(D**-0.5)

    def side_table(x, table):
        return np.broadcast_to(scale * x @ table if table.ndim == 3 else table, (*x.shape[:3], table.shape[-1]))

    def look_up(table, ids):
        return np.take_along_axis(table, np.broadcast_to(ids, table.shape[:2] + ids.shape), -1)

    def bucket_sums(x, ids, buckets):
        sums = np.zeros((*x.shape[:3], buckets), np.longdouble)
        for i, j in np.ndindex(*ids.shape):
            sums[:, :, i, ids[i, j]] += x[:, :, i, j]
        return sums

    scores = scale * q @ k.swapaxes(-2, -1)
    for table, ids in on_q:
        scores = scores + look_up(side_table(k, table), ids).swapaxes(-2, -1)
    for table, ids in on_k:
        scores = scores + look_up(side_table(q, table), ids)
    if attn_mask is not None:
        added = torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype == torch.bool else attn_mask
        scores = scores + long(added)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    keep = np.longdouble(1) if dropout_p == 0 else reference.dropout_weights(seed, full, dropout_p).numpy()
    dropped = weights * keep
    sums = [bucket_sums(dropped, ids, W if isinstance(W, int) else W.shape[1]) for ids, W in on_v]
    with_weights = bool(on_v) and not isinstance(on_v[0][1], int)
    out = dropped @ v + (sum(S @ W for S, (_, W) in zip(sums, on_v, strict=True)) if with_weights else 0)

    grad_out, *grad_sums = (long(g) for g in grads)
    of_w = [(S.swapaxes(-2, -1) @ grad_out).sum(0) for S in sums] if with_weights else []
    if with_weights:
        grad_sums = [grad_out @ W.swapaxes(-2, -1) for _, W in on_v]
    grad = grad_out @ v.swapaxes(-2, -1)
    for grad_sum, (ids, _) in zip(grad_sums, on_v, strict=True):
        grad = grad + look_up(grad_sum, ids)
    grad = grad * keep
    grad = weights * (grad - (weights * grad).sum(-1, keepdims=True))
    of_q, of_k = scale * grad @ k, scale * grad.swapaxes(-2, -1) @ q
    of_tables = []
    for pairs, x, of_x, of_scores in ((on_q, k, of_k, grad.swapaxes(-2, -1)), (on_k, q, of_q, grad)):
        for table, ids in pairs:
            of_table = bucket_sums(of_scores, ids, table.shape[-1])
            if table.ndim == 3:
                of_x += scale * of_table @ table.swapaxes(-2, -1)
                of_table = (scale * x.swapaxes(-2, -1) @ of_table).sum(0)
            ones = tuple(d for d in range(table.ndim - 2) if table.shape[d] == 1)
            of_tables.append(of_table.sum(ones, keepdims=True))
    outputs = [out] if with_weights else [out, *sums]
    grads = [of_q, of_k, dropped.swapaxes(-2, -1) @ grad_out, *of_tables, *of_w]
    return tuple([torch.from_numpy(x.astype(np.float64)) for x in some] for some in (outputs, grads))


def assert_rule_9(arguments, dtype, backend="cpu", **options):
    """The error is at most twice the formula's, and 16 eps of what is exact: float64, or 80 bits for float64 itself."""
    B, H, Lq, D = arguments[0].shape
    sizes = [n for _, n in arguments[5] if isinstance(n, int)]
    grads = [torch.randn(B, H, Lq, n, dtype=dtype) for n in [D, *sizes]]
    if dtype == torch.float64:
        exact = law_in_80_bits(arguments, grads, **options)
    else:
        exact = run(rpe_attention, arguments, grads, torch.float64, backend="reference", **options)
    formula = run(rpe_attention, arguments, grads, dtype, backend="eager", **options)
    ours = run(rpe_attention, arguments, grads, dtype, backend=backend, **options)
    for one, other, truth in zip([*ours[0], *ours[1]], [*formula[0], *formula[1]], [*exact[0], *exact[1]], strict=True):
        assert one.shape == truth.shape and one.dtype == dtype and one.isfinite().all()
        if truth.numel():
            slack = 16 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
            bound = 2 * (other - truth).abs().max() + slack
            assert (one - truth).abs().max() <= bound
