# ruff: noqa: N803
"""The Triton kernel of the gradients of W: a product over all tokens, in parts."""

import triton.language as tl

from ._triton_parts import dot, kernel


@kernel
def table_sums(
    x, g, parts, x_b, x_h, x_l, g_b, g_h, g_l, H, L, total, each, D8, N, scale,
    WIDE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[part, h, d, n] = scale * sum of x[t, h, d] g[t, h, n] over the `each` tokens t of a part, b L + l.

    A part's tokens and the parts are added up in their order: the same from run to run. With EVEN the strides of g
    come divided by 8 too, and rows of g are read 16 bytes at a time.
    """
    part, h = tl.program_id(0), tl.program_id(1)
    d, n = tl.arange(0, WIDE), tl.program_id(2) * 64 + tl.arange(0, 64)
    first = part * each
    last = tl.minimum(first + each, total)
    acc = tl.zeros((WIDE, 64), tl.float32)
    for start in range(first, last, 64):
        t = start + tl.arange(0, 64)
        there = t < last
        b, token = (t // L).to(tl.int64), (t % L).to(tl.int64)
        of_x = b * x_b + token * x_l + h.to(tl.int64) * x_h
        of_g = b * g_b + token * g_l + h.to(tl.int64) * g_h
        if EVEN:
            of_g = of_g * 8
        X = tl.load(x + ((of_x * 8)[:, None] + d[None, :]), mask=there[:, None] & (d < D8 * 8)[None, :], other=0.0)
        G = tl.load(g + (of_g[:, None] + n[None, :]), mask=there[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(tl.trans(X), G, acc, PRECISION)
    row = (part.to(tl.int64) * H + h) * (D8 * 8) + d
    tl.store(parts + (row[:, None] * N + n[None, :]), acc * scale, mask=(d < D8 * 8)[:, None] & (n < N)[None, :])
