"""The backend "triton" of `rpe_attention`: tiles on a GPU that never hold an (Lq, Lk) tensor, forward and backward.

The kernels read side tables: `W` is multiplied here, once more in the backward, so that no side table is kept from one
to the other. Products take all heads at once, in the layout that projections have, so nothing is copied for them. W
comes first to the form in which kernels read tables (`_triton_call_axes.in_places`): it is small, side tables are not.
"""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch, _triton_call, _triton_launch, rpe_attention_eager
from ._triton_call_axes import Axes, in_places, out_of_places, turn
from ._triton_call_tables import table_sums
from .maps import NUMBERS

KEEPS_OUT = True
BROKEN: dict[str, str] = {}  # device, dtype and head size -> why the kernels do not run there
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 128
_MOST_MAPS = 2
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are defined


def why_not(q: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why this backend cannot take such a call, as the end of a sentence; None where it can."""
    if not _HAS_TRITON:
        return "needs Triton, which is not installed (torch for CUDA and ROCm comes with it)"
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"runs on CUDA and ROCm, and q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"computes in float16, bfloat16 and float32, and q is {q.dtype}"
    if not 1 <= q.shape[-1] <= _WIDEST:
        return f"takes head sizes from 1 to {_WIDEST}, and q has {q.shape[-1]}"
    if q.device.type == "cuda" and (found := _too_old(q.device.index)):
        return f"needs compute capability 8.0, and {q.device} has {found}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return 'has no gradient of attn_mask: use backend="eager", or detach the mask'
    return None


def why_not_call(call: Any, q: Tensor, tables: list[Tensor]) -> str | None:
    """The same of the maps: a kernel has arguments for two on each of q, k and v."""
    most = max(len(call.numbers_q), len(call.numbers_k), len(call.numbers_v)) // NUMBERS
    if most > _MOST_MAPS:
        return f"takes at most {_MOST_MAPS} tables on each of q, k and v, and here are {most}"
    return None


@_torch.constant  # it never changes, so graphs may hold it
def _too_old(device: int) -> str:
    """The compute capability of a GPU that these kernels are not for, or ""."""
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}" if major < 8 else ""


def is_slow(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels have failed on such a q, so that the formula is all there is."""
    return bool(BROKEN) and _key(q) in BROKEN


def about() -> str:
    """What it is, for `rpe_ops.backends()`."""
    what = "attention on a GPU in Triton, forward and backward"
    if not torch.cuda.is_available():
        return f"not here: {what}; no CUDA device is visible"
    if reason := why_not(torch.empty(0, 1, device="cuda")):
        return f"not here: {what}; {reason}"
    failed = "".join(f"; not for {key}, which the formula computes: {reason}" for key, reason in BROKEN.items())
    return f"runs: {what}, deterministic, float16 to float32, head sizes up to {_WIDEST}{failed}"


def forward(call: Any, inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, sums), see `fused`."""
    function = _forward if _torch.is_plain(inputs.q) else torch.ops.rpe_ops.rpe_attention_triton
    return function(*_flat(call, inputs))


def backward(call: Any, inputs: Any, saved: Any) -> list[Tensor]:
    """Gradients of q, k, v and of each table."""
    function = _backward if _torch.is_plain(inputs.q) else torch.ops.rpe_ops.rpe_attention_triton_backward
    return function(saved.grad_out, saved.grad_sums, saved.out, saved.lse, saved.sums, *_flat(call, inputs))


def _flat(call: Any, inputs: Any) -> tuple:
    numbers = (list(call.numbers_q), list(call.numbers_k), list(call.numbers_v))
    return *inputs[:3], *inputs[5:], *numbers, inputs.mask, inputs.seed, call.scale, call.dropout_p, call.or_eager


# what both operators are given of a call, in this order
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor[] tables_q, Tensor[] tables_k, Tensor[] tables_v, Tensor[] maps_q, "
    "Tensor[] maps_k, Tensor[] maps_v, SymInt[] numbers_q, SymInt[] numbers_k, SymInt[] numbers_v, "
    "Tensor? attn_mask, Tensor? seed, float scale, float dropout_p, bool or_eager"
)


def _forward(*flat: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    q, k, v, tables_q, tables_k, tables_v, *maps = flat[:12]
    rest, scale = flat[12:16], flat[14]
    axes = _triton_launch.axes_of(q, k, maps[:3], maps[3:])
    try:
        luts = (
            [_side_table(k, _placed(table, axes, 0, k), scale) for table in tables_q],
            [_side_table(q, _placed(table, axes, 1, q), scale) for table in tables_k],
        )
        out, lse, sums = _triton_launch.forward(q, k, v, *luts, *maps, *rest, by_head=bool(tables_v))
        for bucket_sums, W in zip(sums, tables_v, strict=False):
            its = in_places(W.transpose(1, 2), axes, 2, q).transpose(1, 2)
            _by_head(out).baddbmm_(_by_head(bucket_sums), its)
    except Exception as error:
        _give_up(q, error, or_eager=flat[16])
        pairs, settings = _formula_of(flat)
        out, lse, sums = rpe_attention_eager.attention_and_lse(*pairs, **settings)
        sums = [_kept(x, axes) if tables_v else x.contiguous() for x in sums]
        return _heads_inside(q, out), lse, sums
    return out, lse, sums


def _backward(
    grad_out: Tensor, grad_sums: list[Tensor], out: Tensor, lse: Tensor, sums: list[Tensor], *flat: Any
) -> list[Tensor]:
    q, k, v, tables_q, tables_k, tables_v, *maps = flat[:12]
    rest, scale = flat[12:16], flat[14]
    axes = _triton_launch.axes_of(q, k, maps[:3], maps[3:])
    by_head = any(table.dim() == 3 for table in (*tables_q, *tables_k))
    try:
        placed_q = [_placed(table, axes, 0, k) for table in tables_q]
        placed_k = [_placed(table, axes, 1, q) for table in tables_k]
        luts = [_side_table(k, W, scale) for W in placed_q], [_side_table(q, W, scale) for W in placed_k]
        if tables_v:  # out has S W, so <grad_out, out> has what the sums would add to delta
            of_sums = [_side_table(grad_out, in_places(W.transpose(1, 2), axes, 2, q), 1.0) for W in tables_v]
            of_delta: list[Tensor] = []
        else:
            of_sums, of_delta = grad_sums, sums
        before = (grad_out, of_sums, q, k, v, out, of_delta, lse)
        found = _triton_launch.backward(*before, *luts, *maps, *rest, by_head=by_head)
        grad_q, grad_k, grad_v, of_q, of_k = found
        grads = [grad_q, grad_k, grad_v]
        for term, x, of_x, tables, placed, of_tables in (
            (0, k, grad_k, tables_q, placed_q, of_q),
            (1, q, grad_q, tables_k, placed_k, of_k),
        ):
            for table, W, of_table in zip(tables, placed, of_tables, strict=True):
                if table.dim() == 3:
                    _by_head(of_x).baddbmm_(_by_head(of_table), W.transpose(1, 2), alpha=scale)
                    of_table = table_sums(x, of_table, scale)
                if by_head:
                    of_table = out_of_places(of_table, axes, term)
                grads.append(of_table.contiguous().to(table.dtype))
        for bucket_sums, W in zip(sums, tables_v, strict=False):
            of_W = out_of_places(table_sums(grad_out, bucket_sums, 1.0), axes, 2)
            grads.append(of_W.transpose(1, 2).contiguous().to(W.dtype))
    except Exception as error:
        _give_up(q, error, or_eager=flat[16])
        pairs, settings = _formula_of(flat)
        grads = rpe_attention_eager.gradients(grad_out, grad_sums, pairs, **settings)
        return [_heads_inside(q, x) for x in grads[:3]] + [x.contiguous() for x in grads[3:]]
    return grads


def _by_head(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (H, B * L, D), where it can a view."""
    return x.transpose(0, 1).flatten(1, 2)


def _heads_inside(q: Tensor, x: Tensor) -> Tensor:
    """x in memory as the kernels leave it."""
    return _empty_heads(q, x.shape[2]).copy_(x)


def _placed(table: Tensor, axes: Axes | None, term: int, x: Tensor) -> Tensor:
    """W as kernels want it; or the side table that is there already."""
    return in_places(table, axes, term, x) if table.dim() == 3 else table


def _kept(sums: Tensor, axes: Axes | None) -> Tensor:
    """Bucket sums beside W, of the formula, as kernels would have left them."""
    found = None if axes is None else turn(axes, 2, sums)
    if axes is None:
        return sums.contiguous()
    placed = sums if found is None else sums @ found.once
    return placed.transpose(0, 1).contiguous().transpose(0, 1)


def _side_table(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """scale x @ W, (B, H, L, N), in memory (H, B, L, N); or the side table that is there already."""
    W = table if table.dtype == x.dtype else table.to(x.dtype)
    if W.dim() == 4:
        return W
    product = torch.baddbmm(W[:, :1], _by_head(x), W, beta=0, alpha=scale)
    return product.view(x.shape[1], x.shape[0], x.shape[2], -1).transpose(0, 1)


def _formula_of(flat: Sequence[Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the formula: (q, k, v, on_q, on_k, on_v) and the settings."""
    attn_mask, seed, scale, dropout_p = flat[12:16]
    settings = dict(attn_mask=attn_mask, seed=seed, scale=scale, dropout_p=dropout_p)
    return (*flat[:3], *rpe_attention_eager.pairs_of(flat[3:6], flat[6:9], flat[9:12])), settings


def _key(q: Tensor) -> str:
    return f"{q.device}, {q.dtype}, head size {q.shape[-1]}"


def _give_up(q: Tensor, error: Exception, or_eager: bool) -> None:
    """Raises again what is no fault of the kernels or of this machine; else says once that the formula goes on."""
    if not or_eager or isinstance(error, torch.OutOfMemoryError):
        raise error
    key = _key(q)
    if key not in BROKEN:
        BROKEN[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        warnings.warn(
            f"rpe_attention: the Triton kernels cannot be compiled or run here for {key}, so the formula in plain "
            f'torch goes on, which is slower and takes more memory ({BROKEN[key]}); backend="triton" raises instead',
            RuntimeWarning,
            stacklevel=3,
        )


def _empty_heads(q: Tensor, tokens: int) -> Tensor:
    return _triton_call.empty_heads(q, tokens, q.shape[3])[..., : q.shape[3]]


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    B, H, Lq, _ = q.shape
    axes = _triton_launch.axes_of(q, k, rest[3:6], rest[6:9]) if rest[2] else None
    if axes is None:
        sums = [q.new_empty(B, H, Lq, num_buckets) for num_buckets in rest[8][3::NUMBERS]]
    else:
        sums = [q.new_empty(H, B, Lq, axes.size[2]).transpose(0, 1)]
    return _empty_heads(q, Lq), q.new_empty(q.shape[:3], dtype=torch.float32), sums


def _fake_backward(
    grad_out: Tensor, grad_sums: Any, out: Tensor, lse: Tensor, sums: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> list[Tensor]:
    tables = [table for some in rest[:3] for table in some]
    grads = [_empty_heads(q, x.shape[2]) for x in (q, k, k)]
    return grads + [table.new_empty(table.shape) for table in tables]


if not hasattr(torch.ops.rpe_ops, "rpe_attention_triton"):  # once in a process, however many copies of this there are
    _BEFORE = "Tensor grad_out, Tensor[] grad_sums, Tensor out, Tensor lse, Tensor[] sums"
    for _name, _function, _its_fake, _schema in (
        ("rpe_attention_triton", _forward, _fake, f"({_GIVEN}) -> (Tensor, Tensor, Tensor[])"),
        ("rpe_attention_triton_backward", _backward, _fake_backward, f"({_BEFORE}, {_GIVEN}) -> Tensor[]"),
    ):
        _operator = torch.library.custom_op(f"rpe_ops::{_name}", _function, mutates_args=(), schema=_schema)
        _operator.register_fake(_its_fake)
