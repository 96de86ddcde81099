# ruff: noqa: N803, SIM102 (the outer condition is a constant of a binary)
"""The Triton kernels of `rpe_attention` for any map: tables are looked up, buckets are summed by a plan.

A program has R tokens of one head, in their own order, and one chunk of NB buckets. A table is a tuple

    side table, map, strides of batch, head and row of the table, N, height, width, skip, stride of rows of the map

with a map of offsets (2 height - 1, 2 width - 1), or of free ids (rows, columns) and height 0.

The bucket sums of a tile: bring each row into the order of its buckets, add up along the row, and take the totals
where each bucket ends. Order and ends are those of a pattern; `plan` makes them from the map. On a map of offsets a
pattern depends on the image rows between a token and the tile and on the token's column alone.
"""

import triton
import triton.language as tl

from ._triton_parts import add_mask, along, dot, drop, head_of, kernel, put_rows, rows_of, slots, table_of, tiling


@kernel
def plan(ids, order, ends, patterns, N, stride_n, h, w, skip, rows, columns, stride, R: tl.constexpr):
    """Of R patterns: the slots in order of their buckets, and for each n how many have a bucket <= n."""
    pattern = tl.program_id(0) * R + tl.arange(0, R)
    s = tl.arange(0, 64)
    wide, deep, parts, _, down, _ = tiling(h, w, skip, 64, 64)
    if rows > 0:
        tiles = tl.cdiv(columns, 64)
        row, column = pattern // tiles, (pattern % tiles)[:, None] * 64 + s[None, :]
        there = (row < rows)[:, None] & (column < columns)
        at = row[:, None] * stride + column
    else:
        part, c = pattern % parts, pattern // parts % w
        dr = (pattern // parts // w - (down - 1) * deep)[:, None] - (s // wide)[None, :]
        column = part[:, None] * 64 + (s % wide)[None, :]
        there = (s // wide < deep)[None, :] & (column < w) & (dr > -h) & (dr < h) & (pattern < patterns - 1)[:, None]
        at = (dr + h - 1) * (2 * w - 1) + c[:, None] - column + w - 1
    n = tl.load(ids + at, mask=there, other=0)
    n = tl.where(there, tl.minimum(tl.maximum(n, 0), N - 1), N - 1)  # slots of skip tokens have the last bucket
    key = n * 64 + s[None, :]  # distinct
    before = tl.sum((key[:, None, :] < key[:, :, None]).to(tl.int32), 2)  # (R, 64)
    inside = (pattern < patterns)[:, None]
    to = order + (pattern[:, None] * 64 + before)
    tl.store(to, tl.broadcast_to(s[None, :], (R, 64)).to(tl.uint8), mask=inside)
    for start in range(0, N, 16):
        m = start + tl.arange(0, 16)
        count = tl.sum((key[:, None, :] < (m[None, :, None] + 1) * 64).to(tl.int32), 2)  # (R, 16)
        end = ends + (pattern[:, None] * stride_n + m[None, :])
        tl.store(end, count.to(tl.uint8), mask=inside & (m < N)[None, :])


@triton.jit
def _ids(table, row, column, there):
    """The bucket of each pair of a row token and a column token."""
    _, ids, _, _, _, N, height, width, skip, stride = table
    span = 2 * width - 1
    at_row, at_column = tl.maximum(row - skip, 0), tl.maximum(column - skip, 0)
    x = at_row // width * span + at_row % width + (height - 1) * span + width - 1
    y = at_column // width * span + at_column % width
    x = tl.where(height > 0, x, row * stride)
    y = tl.where(height > 0, -y, column)
    n = tl.load(ids + (x[:, None] + y[None, :]), mask=there, other=0)
    n = tl.where((row < skip)[:, None] | (column < skip)[None, :], N - 1, n)
    return tl.minimum(tl.maximum(n, 0), N - 1)


@triton.jit
def _look_up(table, b, h, row, column, there):
    """table[b, h, row, bucket(row, column)]."""
    lut, _, stride_b, stride_h, stride_r, _, _, _, _, _ = table
    n = _ids(table, row, column, there)
    at = table_of(lut, b, h, stride_b, stride_h) + ((row * stride_r)[:, None] + n)
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _near(x, one, two, count, b, h, row, column, there):
    """x + the tables whose rows are the program's tokens."""
    x += _look_up(one, b, h, row, column, there)
    if count > 1:
        x += _look_up(two, b, h, row, column, there)
    return x


@triton.jit
def _far(x, one, two, count, b, h, row, column, there):
    """x + the tables whose rows are the tokens of the tile: looked up along those, then turned."""
    turned = tl.trans(there)
    x += tl.trans(_look_up(one, b, h, column, row, turned))
    if count > 1:
        x += tl.trans(_look_up(two, b, h, column, row, turned))
    return x


@triton.jit
def _tile_sums(x, order, ends, pattern, there, N, stride_n, chunk, NB: tl.constexpr):
    """(R, NB) of the sums over the slots with bucket <= n for the chunk's n, and (R,) of those below the chunk."""
    at_slot = tl.multiple_of(order + (pattern[:, None] * 64 + tl.arange(0, 64)[None, :]), (16, 16))
    slot = tl.load(at_slot, mask=there[:, None], other=0)
    sorted_ = tl.gather(x, slot.to(tl.int32), 1)
    totals = tl.cumsum(sorted_, 1)
    n = chunk * NB + tl.arange(0, NB)
    at = ends + pattern * stride_n
    count = tl.load(at[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0).to(tl.int32)
    sums = tl.where(count > 0, tl.gather(totals, tl.maximum(count, 1) - 1, 1), 0.0)
    before = tl.load(at + (chunk * NB - 1), mask=there & (chunk > 0), other=0).to(tl.int32)
    below = tl.sum(tl.where(tl.arange(0, 64)[None, :] < before[:, None], sorted_, 0.0), 1)
    return sums, below


@triton.jit
def _pattern(token, down, part, last, tiles, t, h, w, skip, deep, parts, PLANNED):
    at = tl.maximum(token - skip, 0)
    top = (last - 1) * deep
    n = ((at // w - down * deep + top) * w + at % w) * parts + part
    n = tl.where((token < skip) | (down >= last), (h + top) * w * parts, n)
    return tl.where(PLANNED > 0, token * tiles + t, n)


@triton.jit
def _put_sums(result, total, below, head, token, there, length, N, chunk, NB: tl.constexpr):
    """Differences of running totals, of a chunk."""
    c = tl.arange(0, NB)
    before = tl.gather(total, tl.broadcast_to(tl.maximum(c - 1, 0)[None, :], total.shape), 1)
    value = total - tl.where((c > 0)[None, :], before, below[:, None])
    n = chunk * NB + c
    at = result + head.to(tl.int64) * length * N + ((token * N)[:, None] + n[None, :])
    tl.store(at, value.to(result.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])


@kernel
def lookup_forward(
    q, k, v, out, lse, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s,
    q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s,
    k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s,
    k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s,
    order1, ends1, sums1, n1, stride_n1, order2, ends2, sums2, n2, stride_n2, planned,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, counts_q, counts_k, counts_v,
    H, Lq, Lk, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R queries: out, lse = log sum exp(scores), and the bucket sums of the weights."""
    blocks = tl.cdiv(Lq, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    i = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    i_there = i < Lq
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, 64, 64)
    tiles = last * parts + more
    top = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, WIDE), tl.float32)
    total1, total2 = tl.zeros((R, NB), tl.float32), tl.zeros((R, NB), tl.float32)
    below1, below2 = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for t in range(0, tiles):
        down = tl.where(t < last * parts, t // parts, last + t - last * parts)
        part = tl.where(t < last * parts, t % parts, 0)
        j, j_there, _, _, _ = slots(down, part, height, width, skip, Lk, wide, deep, free, last, 64)
        there = i_there[:, None] & j_there[None, :]
        rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
        s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
        if ON_K:
            one = (k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s)
            two = (k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s)
            s = _near(s, one, two, counts_k, b, h, i, j, there)
        if ON_Q:
            one = (q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s)
            two = (q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s)
            s = _far(s, one, two, counts_q, b, h, i, j, there)
        if EXTRA:
            if masked > 0:
                s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
        s = tl.where(there, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a row without a key so far
        p = tl.exp(s - finite[:, None])
        fade = tl.exp(top - finite)
        weight = weight * fade + tl.sum(p, 1)
        if EXTRA:
            if below > 0:
                p = drop(p, seed, below, factor, head, i[:, None], j[None, :])
        rows_v = rows_of(at_v, v_l, j, j_there, D8, WIDE)
        acc = dot(p.to(rows_v.dtype), rows_v, acc * fade[:, None], PRECISION)
        if ON_V:
            pattern = _pattern(i, down, part, last, tiles, t, height, width, skip, deep, parts, planned)
            sums, less = _tile_sums(p, order1, ends1, pattern, i_there, n1, stride_n1, chunk, NB)
            total1, below1 = total1 * fade[:, None] + sums, below1 * fade + less
            if counts_v > 1:
                sums, less = _tile_sums(p, order2, ends2, pattern, i_there, n2, stride_n2, chunk, NB)
                total2, below2 = total2 * fade[:, None] + sums, below2 * fade + less
        top = new
    whole = tl.where(weight == 0, 1.0, weight)
    share = 1.0 / whole
    if ON_V:
        _put_sums(sums1, total1 * share[:, None], below1 * share, head, i, i_there, Lq, n1, chunk, NB)
        if counts_v > 1:
            _put_sums(sums2, total2 * share[:, None], below2 * share, head, i, i_there, Lq, n2, chunk, NB)
    if chunk == 0:
        stride = H * D8  # out is (B, Lq, H, D)
        put_rows(head_of(out, b, h, Lq * stride, D8), acc * share[:, None], stride, i, i_there, D8, WIDE)
        value = tl.where(weight == 0, float("inf"), top + tl.log(whole))  # of no key: every exp(s - lse) is 0
        tl.store(lse + head.to(tl.int64) * Lq + i, value, mask=i_there)


@kernel
def lookup_backward_queries(
    q, k, v, grad_out, out, lse, delta, grad_q,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, o_b, o_h, o_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s,
    q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s,
    k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s,
    k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_height, v1_width, v1_skip, v1_s,
    v2, v2_ids, v2_b, v2_h, v2_r, v2_n, v2_height, v2_width, v2_skip, v2_s,
    values1, values2,
    order1, ends1, sums1, n1, stride_n1, order2, ends2, sums2, n2, stride_n2, planned,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, counts_q, counts_k, counts_v,
    H, Lq, Lk, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R queries: delta, the gradients of q and, as bucket sums, of the tables on keys. v1 and v2 are those of sums.

    delta[i] = sum_j p[i, j] * (gradient of p[i, j]) = <grad_out[i], out[i]> + <grad_sums[i], sums[i]>.
    """
    blocks = tl.cdiv(Lq, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    i = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    i_there = i < Lq
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    rows_grad = rows_of(head_of(grad_out, b, h, g_b, g_h), g_l, i, i_there, D8, WIDE)
    rows_out = rows_of(head_of(out, b, h, o_b, o_h), o_l, i, i_there, D8, WIDE)
    row_delta = tl.sum(rows_grad.to(tl.float32) * rows_out.to(tl.float32), 1)
    if ON_V:
        if values1 is not None:  # else out has what they would add
            its = values1 + head.to(tl.int64) * Lq * v1_n
            row_delta += along(table_of(v1, b, h, v1_b, v1_h), v1_r, its, v1_n, i, i_there)
            if counts_v > 1:
                its2 = values2 + head.to(tl.int64) * Lq * v2_n
                row_delta += along(table_of(v2, b, h, v2_b, v2_h), v2_r, its2, v2_n, i, i_there)
    at = head.to(tl.int64) * Lq + i
    if chunk == 0:
        tl.store(delta + at, row_delta, mask=i_there)
    row_lse = tl.load(lse + at, mask=i_there, other=float("inf"))
    wide, deep, parts, free, last, more = tiling(height, width, skip, 64, 64)
    tiles = last * parts + more
    acc = tl.zeros((R, WIDE), tl.float32)
    total1, total2 = tl.zeros((R, NB), tl.float32), tl.zeros((R, NB), tl.float32)
    below1, below2 = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for t in range(0, tiles):
        down = tl.where(t < last * parts, t // parts, last + t - last * parts)
        part = tl.where(t < last * parts, t % parts, 0)
        j, j_there, _, _, _ = slots(down, part, height, width, skip, Lk, wide, deep, free, last, 64)
        there = i_there[:, None] & j_there[None, :]
        rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
        s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
        if ON_K:
            one = (k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s)
            two = (k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s)
            s = _near(s, one, two, counts_k, b, h, i, j, there)
        if ON_Q:
            one = (q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s)
            two = (q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s)
            s = _far(s, one, two, counts_q, b, h, i, j, there)
        if EXTRA:
            if masked > 0:
                s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
        p = tl.exp(tl.where(there, s, float("-inf")) - row_lse[:, None])
        rows_v = rows_of(at_v, v_l, j, j_there, D8, WIDE)
        grad = dot(rows_grad, tl.trans(rows_v), None, PRECISION)
        if ON_V:
            one = (v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_height, v1_width, v1_skip, v1_s)
            two = (v2, v2_ids, v2_b, v2_h, v2_r, v2_n, v2_height, v2_width, v2_skip, v2_s)
            grad = _near(grad, one, two, counts_v, b, h, i, j, there)
        if EXTRA:
            if below > 0:
                grad = drop(grad, seed, below, factor, head, i[:, None], j[None, :])
        grad = p * (grad - row_delta[:, None])
        acc = dot(grad.to(rows_k.dtype), rows_k, acc, PRECISION)
        if ON_K:
            pattern = _pattern(i, down, part, last, tiles, t, height, width, skip, deep, parts, planned)
            sums, less = _tile_sums(grad, order1, ends1, pattern, i_there, n1, stride_n1, chunk, NB)
            total1, below1 = total1 + sums, below1 + less
            if counts_k > 1:
                sums, less = _tile_sums(grad, order2, ends2, pattern, i_there, n2, stride_n2, chunk, NB)
                total2, below2 = total2 + sums, below2 + less
    if ON_K:
        _put_sums(sums1, total1, below1, head, i, i_there, Lq, n1, chunk, NB)
        if counts_k > 1:
            _put_sums(sums2, total2, below2, head, i, i_there, Lq, n2, chunk, NB)
    if chunk == 0:
        stride = H * D8  # grad_q is (B, Lq, H, D)
        put_rows(head_of(grad_q, b, h, Lq * stride, D8), acc * scale, stride, i, i_there, D8, WIDE)


@kernel
def lookup_backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s,
    q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s,
    k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s,
    k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_height, v1_width, v1_skip, v1_s,
    v2, v2_ids, v2_b, v2_h, v2_r, v2_n, v2_height, v2_width, v2_skip, v2_s,
    order1, ends1, sums1, n1, stride_n1, order2, ends2, sums2, n2, stride_n2, planned,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, counts_q, counts_k, counts_v,
    H, Lq, Lk, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R keys: the gradients of k, v and, as bucket sums, of the tables on queries. Rows of a tile are keys here."""
    blocks = tl.cdiv(Lk, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    j = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    j_there = j < Lk
    at_q, at_grad = head_of(q, b, h, q_b, q_h), head_of(grad_out, b, h, g_b, g_h)
    rows_k = rows_of(head_of(k, b, h, k_b, k_h), k_l, j, j_there, D8, WIDE)
    rows_v = rows_of(head_of(v, b, h, v_b, v_h), v_l, j, j_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, 64, 64)
    tiles = last * parts + more
    acc_k, acc_v = tl.zeros((R, WIDE), tl.float32), tl.zeros((R, WIDE), tl.float32)
    total1, total2 = tl.zeros((R, NB), tl.float32), tl.zeros((R, NB), tl.float32)
    below1, below2 = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    for t in range(0, tiles):
        down = tl.where(t < last * parts, t // parts, last + t - last * parts)
        part = tl.where(t < last * parts, t % parts, 0)
        i, i_there, _, _, _ = slots(down, part, height, width, skip, Lq, wide, deep, free, last, 64)
        there = j_there[:, None] & i_there[None, :]
        rows_q = rows_of(at_q, q_l, i, i_there, D8, WIDE)
        s = dot(rows_k, tl.trans(rows_q), None, PRECISION) * scale
        if ON_Q:
            one = (q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_height, q1_width, q1_skip, q1_s)
            two = (q2, q2_ids, q2_b, q2_h, q2_r, q2_n, q2_height, q2_width, q2_skip, q2_s)
            s = _near(s, one, two, counts_q, b, h, j, i, there)
        if ON_K:
            one = (k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_height, k1_width, k1_skip, k1_s)
            two = (k2, k2_ids, k2_b, k2_h, k2_r, k2_n, k2_height, k2_width, k2_skip, k2_s)
            s = _far(s, one, two, counts_k, b, h, j, i, there)
        if EXTRA:
            if masked > 0:
                s = add_mask(s, mask, b, h, i[None, :], j[:, None], there, m_b, m_h, m_i, m_j)
        at = head.to(tl.int64) * Lq + i
        column_lse = tl.load(lse + at, mask=i_there, other=float("inf"))
        p = tl.exp(tl.where(there, s, float("-inf")) - column_lse[None, :])
        rows_grad = rows_of(at_grad, g_l, i, i_there, D8, WIDE)
        grad = dot(rows_v, tl.trans(rows_grad), None, PRECISION)
        if ON_V:
            one = (v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_height, v1_width, v1_skip, v1_s)
            two = (v2, v2_ids, v2_b, v2_h, v2_r, v2_n, v2_height, v2_width, v2_skip, v2_s)
            grad = _far(grad, one, two, counts_v, b, h, j, i, there)
        dropped = p
        if EXTRA:
            if below > 0:
                dropped = drop(p, seed, below, factor, head, i[None, :], j[:, None])
                grad = drop(grad, seed, below, factor, head, i[None, :], j[:, None])
        acc_v = dot(dropped.to(rows_grad.dtype), rows_grad, acc_v, PRECISION)
        grad = p * (grad - tl.load(delta + at, mask=i_there, other=0.0)[None, :])
        acc_k = dot(grad.to(rows_q.dtype), rows_q, acc_k, PRECISION)
        if ON_Q:
            pattern = _pattern(j, down, part, last, tiles, t, height, width, skip, deep, parts, planned)
            sums, less = _tile_sums(grad, order1, ends1, pattern, j_there, n1, stride_n1, chunk, NB)
            total1, below1 = total1 + sums, below1 + less
            if counts_q > 1:
                sums, less = _tile_sums(grad, order2, ends2, pattern, j_there, n2, stride_n2, chunk, NB)
                total2, below2 = total2 + sums, below2 + less
    if ON_Q:
        _put_sums(sums1, total1, below1, head, j, j_there, Lk, n1, chunk, NB)
        if counts_q > 1:
            _put_sums(sums2, total2, below2, head, j, j_there, Lk, n2, chunk, NB)
    if chunk == 0:
        stride = H * D8  # both are (B, Lk, H, D)
        put_rows(head_of(grad_k, b, h, Lk * stride, D8), acc_k * scale, stride, j, j_there, D8, WIDE)
        put_rows(head_of(grad_v, b, h, Lk * stride, D8), acc_v, stride, j, j_there, D8, WIDE)
