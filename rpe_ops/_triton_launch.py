"""The backend "triton" of `rpe_attention` in tensors: `forward` and `backward`, which read maps.

Kernels that multiply small matrices (`_triton_axes`) take calls whose maps factor; those that look buckets up
(`_triton_lookup`) take the rest. Triton is imported when the first kernel is launched.

`sizes_*` has five numbers for each map, see `maps.NUMBERS`: height, width, skip, N and, where the map factors, the
number of its columns: rows has multiples of it and columns 0, 1, ..., below it. Only such calls go to `_triton_axes`,
with one map of at most 16 buckets a side (skip counted) for each of q, k, v. Tables in PLACES form (see
`_triton_places`) are read as they are, others are brought there by a product with ones. At most two maps are taken on
each of q, k and v.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _triton_call_axes as by_axes
from . import _triton_call_lookup as by_lookup
from ._triton_call import call_of, empty_heads, on_device, rows
from ._triton_call import strides as strides_of
from ._triton_call_axes import axes_of


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut_q: Sequence[Tensor],
    lut_k: Sequence[Tensor],
    maps_q: Sequence[Tensor],
    maps_k: Sequence[Tensor],
    maps_v: Sequence[Tensor],
    sizes_q: Sequence[int],
    sizes_k: Sequence[int],
    sizes_v: Sequence[int],
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    *,
    by_head: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, bucket sums of the weights for each map of values).

    Where `axes_of` finds something, side tables may be in PLACES form; with by_head bucket sums come in that form too,
    and head by head in memory, (H, B, L, size), as products with W want them.
    """
    D = q.shape[3]
    call = call_of(q, k, mask, seed, scale, p)
    out, lse = empty_heads(q, call.Lq, D), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = rows(q), rows(k), rows(v)
    call = call._replace(D=q.shape[3])
    strides = (*strides_of(q), *strides_of(k), *strides_of(v))
    axes = axes_of(q, k, (maps_q, maps_k, maps_v), (sizes_q, sizes_k, sizes_v))
    if axes is not None:
        tables = (
            *by_axes.table_of(lut_q, maps_q, axes, 0, q),
            *by_axes.table_of(lut_k, maps_k, axes, 1, q),
            maps_v[0] if maps_v else None,
            axes.size[2] // 8,
            axes.up[2],
        )
        placed = by_axes.results_of(axes, 2, q, call.Lq, by_head)
        with on_device(q):
            by_axes.multiply("axes_forward", call, axes, (q, k, v, out, lse, *strides, *tables, *placed))
        return out[..., :D], lse, by_axes.turned(placed[0], axes, 2, by_head)
    sums = [q.new_empty(*q.shape[:3], n) for n in _numbers(maps_v, sizes_v)]
    on_q, on_k, on_v = (
        by_lookup.terms_of(maps_q, sizes_q),
        by_lookup.terms_of(maps_k, sizes_k),
        by_lookup.terms_of(maps_v, sizes_v),
    )
    on_v = by_lookup.of_one_geometry(on_v, call.Lq, call.Lk)
    with on_device(q):
        arguments = (
            q, k, v, out, lse, *strides, *by_lookup.tables_of(lut_q, on_q, q.dtype),
            *by_lookup.tables_of(lut_k, on_k, q.dtype), *by_lookup.sums_of(sums, on_v, call.Lq, call.Lk),
        )  # fmt: skip
        counts = (len(on_q), len(on_k), len(on_v))
        by_lookup.look_up("lookup_forward", call, call.Lq, call.Lk, arguments, counts, on_v)
    return out[..., :D], lse, sums


def backward(
    grad_out: Tensor,
    grad_sums: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Sequence[Tensor],
    lse: Tensor,
    lut_q: Sequence[Tensor],
    lut_k: Sequence[Tensor],
    maps_q: Sequence[Tensor],
    maps_k: Sequence[Tensor],
    maps_v: Sequence[Tensor],
    sizes_q: Sequence[int],
    sizes_k: Sequence[int],
    sizes_v: Sequence[int],
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    *,
    by_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The gradients of q, k, v and of both lists of side tables, with by_head as sums are in `forward`.

    out and sums are those of `forward`; or out has the product of the sums with W already, and sums are left out.
    """
    D = q.shape[3]
    call = call_of(q, k, mask, seed, scale, p)
    grad_q, grad_k, grad_v = empty_heads(q, call.Lq, D), empty_heads(q, call.Lk, D), empty_heads(q, call.Lk, D)
    delta = torch.empty_like(lse)
    q, k, v, grad_out, out = rows(q), rows(k), rows(v), rows(grad_out), rows(out)
    call = call._replace(D=q.shape[3])
    strides = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(grad_out))
    axes = axes_of(q, k, (maps_q, maps_k, maps_v), (sizes_q, sizes_k, sizes_v))
    if axes is not None:
        tables = (
            *by_axes.table_of(lut_q, maps_q, axes, 0, q),
            *by_axes.table_of(lut_k, maps_k, axes, 1, q),
            *by_axes.table_of(grad_sums, maps_v, axes, 2, q),
        )
        of_q, of_k = (by_axes.results_of(axes, term, q, call.Lq, by_head) for term in (0, 1))
        with on_device(q):
            arguments = (q, k, v, grad_out, out, lse, delta, grad_q, *strides, *strides_of(out), *tables)
            its = by_axes.once(sums, axes, 2, q)
            by_axes.multiply("axes_backward_queries", call, axes, (*arguments, its, *of_k))
            arguments = (q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *tables)
            by_axes.multiply("axes_backward_keys", call, axes, (*arguments, *of_q))
        grads = by_axes.turned(of_q[0], axes, 0, by_head), by_axes.turned(of_k[0], axes, 1, by_head)
        return grad_q[..., :D], grad_k[..., :D], grad_v[..., :D], *grads
    values = [x.contiguous() for x in sums]
    grads_q, grads_k = ([lut.new_empty(lut.shape) for lut in luts] for luts in (lut_q, lut_k))
    on_q, on_k, on_v = (
        by_lookup.terms_of(maps_q, sizes_q),
        by_lookup.terms_of(maps_k, sizes_k),
        by_lookup.terms_of(maps_v, sizes_v),
    )
    on_q, on_k = by_lookup.of_one_geometry(on_q, call.Lk, call.Lq), by_lookup.of_one_geometry(on_k, call.Lq, call.Lk)
    with on_device(q):
        tables = tuple(
            _chain(by_lookup.tables_of(*x, q.dtype) for x in ((lut_q, on_q), (lut_k, on_k), (grad_sums, on_v)))
        )
        counts = (len(on_q), len(on_k), len(on_v))
        both = (values[0], values[-1]) if values else (None, None)
        arguments = (
            q, k, v, grad_out, out, lse, delta, grad_q, *strides, *strides_of(out), *tables, *both,
            *by_lookup.sums_of(grads_k, on_k, call.Lq, call.Lk),
        )  # fmt: skip
        by_lookup.look_up("lookup_backward_queries", call, call.Lq, call.Lk, arguments, counts, on_k)
        arguments = (
            q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *tables,
            *by_lookup.sums_of(grads_q, on_q, call.Lk, call.Lq),
        )  # fmt: skip
        by_lookup.look_up("lookup_backward_keys", call, call.Lk, call.Lq, arguments, counts, on_q)
    return grad_q[..., :D], grad_k[..., :D], grad_v[..., :D], grads_q, grads_k


_chain = itertools.chain.from_iterable


def _numbers(maps: Sequence[Tensor], sizes: Sequence[int]) -> list[int]:
    step = len(sizes) // max(len(maps), 1)
    return [sizes[step * n + 3] for n in range(len(maps))]
