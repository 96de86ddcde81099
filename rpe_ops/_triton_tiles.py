# ruff: noqa: N803, RUF005 (Triton unpacks no tuple into another)
"""The Triton kernels of `rpe_attention`: one program for each block of rows of a head, no atomics, one order of sums.

How they read their arguments, which are tuples:

    x (q, k, v, out, grad_out, ...)   pointer, strides of batch, head, token; the last dimension is contiguous
    table                             pointer, strides of batch, head, row, bucket, then the map's small ids
    sums                              where a row lies in order of its buckets, where each bucket ends and the stride
                                      of that, N, the results
    mask                              pointer, strides of batch, head, query, key
    size                              H, queries, keys, padded queries, padded keys

The bucket sums of a tile: bring each row into the order of its buckets, add up along the row, and take the totals
where each bucket ends. Both are known from the map alone, see `plan`.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # columns of a tile; the plans are made for this width


@triton.jit
def plan(
    ids, small, order, ends, rows, columns, padded, stride_n, N, stride_i, stride_j,
    R: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Of R rows and one tile: small ids, the tile's columns in order of their ids, and how many ids are <= n."""
    i = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    tile = tl.program_id(1)
    c = tl.arange(0, TILE)
    j = tile * TILE + c
    there = (i[:, None] < rows) & (j < columns)
    own = tl.load(ids + i[:, None] * stride_i + j.to(tl.int64) * stride_j, mask=there, other=0).to(tl.int32)
    at = i[:, None] * padded + j
    tl.store(small + at, own.to(small.dtype.element_ty), mask=i[:, None] < rows)
    key = tl.where(there, own, N) * TILE + c  # distinct; what is beyond the row comes last
    before = tl.sum((key[:, None, :] < key[:, :, None]).to(tl.int32), 2)  # (R, TILE)
    to = i[:, None] * padded + tile * TILE + before
    tl.store(order + to, tl.broadcast_to(c[None, :], (R, TILE)).to(tl.uint8), mask=i[:, None] < rows)
    for start in range(0, N, NB):
        n = start + tl.arange(0, NB)
        count = tl.sum((key[:, None, :] < (n[None, :, None] + 1) * TILE).to(tl.int32), 2)  # (R, NB)
        end = (i[:, None] * (padded // TILE) + tile) * stride_n + n
        tl.store(ends + end, count.to(tl.uint8), mask=(i[:, None] < rows) & (n < N))


@triton.jit
def _dot(one, other, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(one.to(tl.float32), other.to(tl.float32), acc)
    return tl.dot(one, other, acc, input_precision=PRECISION)


@triton.jit
def _start(x, b, h):
    pointer, stride_b, stride_h, _ = x
    return pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def _rows(x, b, h, i, there, d, D: tl.constexpr):
    """Rows i of x[b, h], zero where there is none; d runs over the padded head."""
    stride = x[3]
    at = _start(x, b, h) + i.to(tl.int64)[:, None] * stride + d
    return tl.load(at, mask=there[:, None] & (d < D), other=0.0)


@triton.jit
def _put(x, value, b, h, i, there, d, D: tl.constexpr):
    stride = x[3]
    at = _start(x, b, h) + i.to(tl.int64)[:, None] * stride + d
    tl.store(at, value.to(at.dtype.element_ty), mask=there[:, None] & (d < D))


@triton.jit
def _look_up(table, b, h, i, there, j, padded):
    """table[b, h, i, ids[i, j]]; columns beyond the map have id 0."""
    pointer, stride_b, stride_h, stride_i, stride_n, ids = table
    n = tl.load(ids + (i[:, None] * padded + j), mask=there[:, None], other=0).to(tl.int32)
    at = pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return tl.load(at + (i[:, None] * stride_i + n * stride_n), mask=there[:, None], other=0.0).to(tl.float32)


@triton.jit
def _add_tables(x, near, far, b, h, i, i_there, j, j_there, near_padded, far_padded):
    """x[i, j] + near[i, ids[i, j]] + far[j, ids[j, i]]: the second is looked up along its own rows, then turned."""
    for t in tl.static_range(len(near)):
        x += _look_up(near[t], b, h, i, i_there, j, near_padded)
    for t in tl.static_range(len(far)):
        x += tl.trans(_look_up(far[t], b, h, j, j_there, i, far_padded))
    return x


@triton.jit
def _add_mask(x, mask, b, h, i, j, there, MASK: tl.constexpr):
    """i and j are queries and keys, in the shapes that broadcast to x."""
    if MASK != "none":
        pointer, stride_b, stride_h, stride_i, stride_j = mask
        at = pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        value = tl.load(at + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, mask=there, other=0)
        x = tl.where(value != 0, x, float("-inf")) if MASK == "bool" else x + value.to(tl.float32)
    return tl.where(there, x, float("-inf"))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _drop(x, dropout, head, i, j):
    """x / (1 - p), and 0 where hash(seed, head, i, j) is below p * 2^24; i and j broadcast to x."""
    seed, below, factor = dropout
    whole = tl.load(seed).to(tl.uint64, bitcast=True)
    low, high = (whole & 0xFFFFFFFF).to(tl.uint32), (whole >> 32).to(tl.uint32)
    key = _mix(_mix(low + tl.full((), 0x9E3779B9, tl.uint32)) ^ high)
    key = _mix(_mix(key ^ head.to(tl.uint32)) ^ i.to(tl.uint32))
    dropped = (_mix(key ^ j.to(tl.uint32)) >> 8).to(tl.int32) < below
    return tl.where(dropped, 0.0, x * factor)


@triton.jit
def _take(totals, count):
    return tl.where(count > 0, tl.gather(totals, tl.maximum(count, 1) - 1, 1), 0.0)


@triton.jit
def _bucket_totals(x, sums, i, there, tile, padded, chunk, NB: tl.constexpr, MANY: tl.constexpr):
    """(R, NB) of the sums over x[i, j] with ids[i, j] <= n, or = n where MANY, for the chunk's n."""
    order, ends, stride_n, N, _ = sums
    i = i[:, None]
    at = order + (i * padded + (tile * TILE + tl.arange(0, TILE)[None, :]))
    column = tl.load(at, mask=there[:, None], other=0)
    totals = tl.cumsum(tl.gather(x, column.to(tl.int32), 1), 1)
    n = chunk * NB + tl.arange(0, NB)[None, :]
    at = ends + ((i * (padded // TILE) + tile) * stride_n + n)
    result = _take(totals, tl.load(at, mask=there[:, None] & (n < N), other=0).to(tl.int32))
    if MANY:
        result -= _take(totals, tl.load(at - 1, mask=there[:, None] & (n > 0) & (n < N), other=0).to(tl.int32))
    return result


@triton.jit
def _put_sums(sums, total, head, i, there, length, chunk, R: tl.constexpr, NB: tl.constexpr, MANY: tl.constexpr):
    _, _, _, N, result = sums
    n = tl.arange(0, NB)[None, :]
    if not MANY:
        left = tl.gather(total, tl.broadcast_to(tl.maximum(n - 1, 0), (R, NB)), 1)
        total -= tl.where(n > 0, left, 0.0)
    n += chunk * NB
    at = result + (head.to(tl.int64) * length + i.to(tl.int64)[:, None]) * N + n
    tl.store(at, total.to(at.dtype.element_ty), mask=there[:, None] & (n < N))


@triton.jit
def _zeros(sums, R: tl.constexpr, NB: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(len(sums)):
        zeros = zeros + (tl.zeros((R, NB), tl.float32),)
    return zeros


@triton.jit
def forward(
    q, k, v, out, lse, on_q, on_k, sums, mask, dropout, size, scale,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, MANY: tl.constexpr,
    MASK: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R queries: out, lse = log sum exp(scores), and the bucket sums of the weights."""
    H, Lq, Lk, padded_q, padded_k = size
    blocks = tl.cdiv(Lq, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    i, d = (tl.program_id(0) % blocks) * R + tl.arange(0, R), tl.arange(0, WIDE)
    i_there = i < Lq
    rows_q = _rows(q, b, h, i, i_there, d, D)
    top = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, WIDE), tl.float32)
    totals = _zeros(sums, R, NB)
    for start in range(0, Lk, TILE):
        j = start + tl.arange(0, TILE)
        j_there = j < Lk
        rows_k = _rows(k, b, h, j, j_there, d, D)
        s = _dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
        s = _add_tables(s, on_k, on_q, b, h, i, i_there, j, j_there, padded_k, padded_q)
        s = _add_mask(s, mask, b, h, i[:, None], j[None, :], i_there[:, None] & j_there, MASK)
        new = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a row without a key so far
        p = tl.exp(s - finite[:, None])
        fade = tl.exp(top - finite)
        weight = weight * fade + tl.sum(p, 1)
        if DROP:
            p = _drop(p, dropout, head, i[:, None], j[None, :])
        rows_v = _rows(v, b, h, j, j_there, d, D)
        acc = _dot(p.to(rows_v.dtype), rows_v, acc * fade[:, None], PRECISION)
        added = ()
        for t in tl.static_range(len(sums)):
            of_tile = _bucket_totals(p, sums[t], i, i_there, start // TILE, padded_k, chunk, NB, MANY)
            added = added + (totals[t] * fade[:, None] + of_tile,)
        totals = added
        top = new
    whole = tl.where(weight == 0, 1.0, weight)
    share = 1.0 / whole
    for t in tl.static_range(len(sums)):
        _put_sums(sums[t], totals[t] * share[:, None], head, i, i_there, Lq, chunk, R, NB, MANY)
    if chunk == 0:
        _put(out, acc * share[:, None], b, h, i, i_there, d, D)
        total = tl.where(weight == 0, float("inf"), top + tl.log(whole))  # of no key: every exp(s - lse) is 0
        tl.store(lse + head.to(tl.int64) * Lq + i, total, mask=i_there)


@triton.jit
def backward_delta(
    grad_out, out, delta, pairs, H, Lq, D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr
):
    """delta[i] = sum_j p[i, j] * (gradient of p[i, j]) = <grad_out[i], out[i]> + <grad_sums[i], sums[i]>.

    pairs are of (grad_sums, its strides of batch, head, row and bucket, sums, N).
    """
    blocks = tl.cdiv(Lq, R)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, d = (tl.program_id(0) % blocks) * R + tl.arange(0, R), tl.arange(0, WIDE)
    there = i < Lq
    one, other = _rows(grad_out, b, h, i, there, d, D), _rows(out, b, h, i, there, d, D)
    acc = tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    for t in tl.static_range(len(pairs)):
        grad, stride_b, stride_h, stride_i, stride_n, sums, N = pairs[t]
        grad += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        row = i.to(tl.int64)[:, None]
        for start in range(0, N, NB):
            n = start + tl.arange(0, NB)
            inside = there[:, None] & (n < N)
            of_sums = tl.load(grad + row * stride_i + n * stride_n, mask=inside, other=0.0).to(tl.float32)
            its_sums = tl.load(sums + (head.to(tl.int64) * Lq + row) * N + n, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(of_sums * its_sums, 1)
    tl.store(delta + head.to(tl.int64) * Lq + i, acc, mask=there)


@triton.jit
def backward_queries(
    q, k, v, grad_out, lse, delta, grad_q, on_q, on_k, on_v, sums, mask, dropout, size, scale,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, MANY: tl.constexpr,
    MASK: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R queries: the gradients of q and, as bucket sums, of the tables on keys. on_v are the gradients of sums."""
    H, Lq, Lk, padded_q, padded_k = size
    blocks = tl.cdiv(Lq, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    i, d = (tl.program_id(0) % blocks) * R + tl.arange(0, R), tl.arange(0, WIDE)
    i_there = i < Lq
    rows_q, rows_grad = _rows(q, b, h, i, i_there, d, D), _rows(grad_out, b, h, i, i_there, d, D)
    at = head.to(tl.int64) * Lq + i
    row_lse = tl.load(lse + at, mask=i_there, other=float("inf"))
    row_delta = tl.load(delta + at, mask=i_there, other=0.0)
    acc = tl.zeros((R, WIDE), tl.float32)
    totals = _zeros(sums, R, NB)
    for start in range(0, Lk, TILE):
        j = start + tl.arange(0, TILE)
        j_there = j < Lk
        rows_k = _rows(k, b, h, j, j_there, d, D)
        s = _dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
        s = _add_tables(s, on_k, on_q, b, h, i, i_there, j, j_there, padded_k, padded_q)
        s = _add_mask(s, mask, b, h, i[:, None], j[None, :], i_there[:, None] & j_there, MASK)
        p = tl.exp(s - row_lse[:, None])
        rows_v = _rows(v, b, h, j, j_there, d, D)
        grad = _dot(rows_grad, tl.trans(rows_v), None, PRECISION)
        grad = _add_tables(grad, on_v, (), b, h, i, i_there, j, j_there, padded_k, padded_q)
        if DROP:
            grad = _drop(grad, dropout, head, i[:, None], j[None, :])
        grad = p * (grad - row_delta[:, None])
        acc = _dot(grad.to(rows_k.dtype), rows_k, acc, PRECISION)
        added = ()
        for t in tl.static_range(len(sums)):
            of_tile = _bucket_totals(grad, sums[t], i, i_there, start // TILE, padded_k, chunk, NB, MANY)
            added = added + (totals[t] + of_tile,)
        totals = added
    for t in tl.static_range(len(sums)):
        _put_sums(sums[t], totals[t], head, i, i_there, Lq, chunk, R, NB, MANY)
    if chunk == 0:
        _put(grad_q, acc * scale, b, h, i, i_there, d, D)


@triton.jit
def backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, on_q, on_k, on_v, sums, mask, dropout, size, scale,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, MANY: tl.constexpr,
    MASK: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R keys: the gradients of k, v and, as bucket sums, of the tables on queries. Rows of a tile are keys here."""
    H, Lq, Lk, padded_q, padded_k = size
    blocks = tl.cdiv(Lk, R)
    head, chunk = tl.program_id(0) // blocks, tl.program_id(1)
    b, h = head // H, head % H
    j, d = (tl.program_id(0) % blocks) * R + tl.arange(0, R), tl.arange(0, WIDE)
    j_there = j < Lk
    rows_k, rows_v = _rows(k, b, h, j, j_there, d, D), _rows(v, b, h, j, j_there, d, D)
    acc_k, acc_v = tl.zeros((R, WIDE), tl.float32), tl.zeros((R, WIDE), tl.float32)
    totals = _zeros(sums, R, NB)
    for start in range(0, Lq, TILE):
        i = start + tl.arange(0, TILE)
        i_there = i < Lq
        rows_q = _rows(q, b, h, i, i_there, d, D)
        s = _dot(rows_k, tl.trans(rows_q), None, PRECISION) * scale
        s = _add_tables(s, on_q, on_k, b, h, j, j_there, i, i_there, padded_q, padded_k)
        s = _add_mask(s, mask, b, h, i[None, :], j[:, None], j_there[:, None] & i_there, MASK)
        at = head.to(tl.int64) * Lq + i
        p = tl.exp(s - tl.load(lse + at, mask=i_there, other=float("inf"))[None, :])
        rows_grad = _rows(grad_out, b, h, i, i_there, d, D)
        grad = _dot(rows_v, tl.trans(rows_grad), None, PRECISION)
        grad = _add_tables(grad, (), on_v, b, h, j, j_there, i, i_there, padded_q, padded_k)
        if DROP:
            dropped = _drop(p, dropout, head, i[None, :], j[:, None])
            grad = _drop(grad, dropout, head, i[None, :], j[:, None])
        else:
            dropped = p
        acc_v = _dot(dropped.to(rows_grad.dtype), rows_grad, acc_v, PRECISION)
        grad = p * (grad - tl.load(delta + at, mask=i_there, other=0.0)[None, :])
        acc_k = _dot(grad.to(rows_q.dtype), rows_q, acc_k, PRECISION)
        added = ()
        for t in tl.static_range(len(sums)):
            of_tile = _bucket_totals(grad, sums[t], j, j_there, start // TILE, padded_q, chunk, NB, MANY)
            added = added + (totals[t] + of_tile,)
        totals = added
    for t in tl.static_range(len(sums)):
        _put_sums(sums[t], totals[t], head, j, j_there, Lk, chunk, R, NB, MANY)
    if chunk == 0:
        _put(grad_k, acc_k * scale, b, h, j, j_there, d, D)
        _put(grad_v, acc_v, b, h, j, j_there, d, D)
