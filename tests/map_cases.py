# ruff: noqa: N803 (B, H and D are sizes)
"""Maps of every kind for the kernels of backend "triton", and how exact those have to be on them, on every device."""

import torch
from attention_cases import run, strided

from irpe import get_bucket_ids_2d, piecewise_index
from rpe_ops import _triton_call, _triton_launch
from rpe_ops.rpe_attention import rpe_attention


def axes(kind, height, width, ratio):
    """The axes of a map, and how many column buckets it has."""
    numbers = []
    for n in (height, width):
        x = piecewise_index(torch.arange(1 - n, n), ratio, 2 * ratio, 8 * ratio, torch.long)
        numbers.append((x + int(2 * ratio)).int())
    rows, columns = numbers
    side = 2 * int(2 * ratio) + 1
    if kind == "product":
        return torch.cat([rows * side, columns]), side
    return torch.cat([rows, 0 * columns] if kind == "cross_rows" else [0 * rows, columns]), 1 if kind[
        6
    ] == "r" else side


def offsets(ids, height, width, skip):
    """(2h - 1, 2w - 1) of a map, read off its ids."""
    on_map = ids[skip:, skip:].int().view(height, width, height, width)
    table = torch.empty(2 * height - 1, 2 * width - 1, dtype=torch.int32)
    for r, c in [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]:
        table[r : r + height, c : c + width] = on_map[r, c].flip(0, 1)
    return table


def a_map(kind, grid, shape, ratio):
    """(tensor, its five numbers, ids)."""
    height, width, skip = grid
    if kind == "free":
        ids = torch.randint(17, shape)
        return ids, [0, 0, 0, 17, 0], ids
    ids, buckets = get_bucket_ids_2d(
        kind, height, width, skip, ratio, 2 * ratio, 8 * ratio, device=torch.get_default_device()
    )
    if kind in ("euc", "quant"):
        return offsets(ids, height, width, skip), [height, width, skip, buckets, 0], ids
    tensor, columns = axes(kind, height, width, ratio)
    return tensor, [height, width, skip, buckets, columns], ids


def check(
    grid, on, dtype=torch.float32, B=1, H=2, D=16, ratio=1.9, mask=None, dropout_p=0.0, layout="timm", shape=None
):
    """Rule 9 for outputs and all gradients; `on` has the kinds on q, k and v. Returns the kernels launched."""
    torch.manual_seed(0)
    L = grid[2] + grid[0] * grid[1]
    Lq, Lk = shape or (L, L)
    q = strided((B, H, Lq, D), dtype, layout)
    k, v = (strided((B, H, Lk, D), dtype, layout) for _ in range(2))
    places = ((Lk, Lq), (Lq, Lk), (Lq, Lk))
    maps = [[a_map(kind, grid, place, ratio) for kind in kinds] for kinds, place in zip(on, places, strict=True)]
    if isinstance(mask, str):
        mask = torch.rand(B, 1, Lq, Lk) > 0.3 if mask == "bool" else torch.randn(1, H, Lq, Lk).to(dtype)
    options = dict(attn_mask=mask, dropout_p=dropout_p, seed=torch.tensor([-3]))
    on_q = [(torch.randn(B, H, Lk, numbers[3], dtype=dtype), ids) for _, numbers, ids in maps[0]]
    on_k = [(torch.randn(1, H, Lq, numbers[3], dtype=dtype), ids) for _, numbers, ids in maps[1]]
    on_v = [(ids, numbers[3]) for _, numbers, ids in maps[2]]
    grads = [torch.randn(B, H, Lq, n, dtype=dtype) for n in [D, *(n for _, n in on_v)]]
    exact = run(rpe_attention, (q, k, v, on_q, on_k, on_v), grads, torch.float64, backend="reference", **options)
    formula = run(rpe_attention, (q, k, v, on_q, on_k, on_v), grads, dtype, backend="eager", **options)

    launched, launch = [], _triton_call.launch
    _triton_call.launch = lambda module, name, *rest: (launched.append(name), launch(module, name, *rest))
    try:
        luts = [[lut.expand(B, -1, -1, -1) for lut, _ in pairs] for pairs in (on_q, on_k)]
        rest = *[[x for x, _, _ in some] for some in maps], *[[x for _, n, _ in some for x in n] for some in maps]
        rest = *luts, *rest, mask, options["seed"], D**-0.5, dropout_p
        out, lse, sums = _triton_launch.forward(q, k, v, *rest)
        ours = _triton_launch.backward(grads[0], grads[1:], q, k, v, out, sums, lse, *rest)
    finally:
        _triton_call.launch = launch
    ours = [out, *sums, *ours[:3], *ours[3], *[grad.sum(0, keepdim=True) for grad in ours[4]]]
    for one, other, truth in zip(ours, [*formula[0], *formula[1]], [*exact[0], *exact[1]], strict=True):
        assert one.shape == truth.shape and one.dtype == dtype and one.isfinite().all()
        slack = 16 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + slack
    return launched
