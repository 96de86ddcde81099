# ruff: noqa: N803
"""The Triton kernels of `rpe_attention` for maps that factor: look-ups and bucket sums as small matrix products.

The bucket of an offset is rows[dr] + columns[dc], where columns has COLUMNS values 0, 1, ... and rows multiples of
that number. A program has GROUPS groups of 16 tokens, each in one image column; a tile is DEEP image rows at most.

- A table whose rows are the program's tokens ("near"): bias[i, slot] = sum over (line, c) of A[i, (line, c)] P[(line, c), slot]
  with A[i, (line, c)] = table[i, rows[r_i - r] + c], c numbers side by side, and P[(line, c), slot] = 1 where the slot is in that
  line of the tile and columns[c_i - c_slot] = c: the same for every tile, and for all tokens of a group.
- A table whose rows are the tile's tokens ("far"): bias[i, slot] = sum over (line, g) of O[i, (line, g)] B[(line, g), slot] with
  B[(line, g), slot] = table[slot, (g, columns[c_slot - c_i])] in the slot's own line, and O[i, (line, g)] = 1 where
  rows[r - r_i] is g.
- Bucket sums: X[i, (line, c)] = sum over slots of x[i, slot] P[(line, c), slot]. They are added up image row by image row as long as
  rows[r_i - r] stays what it is, and then added to their place in memory, which this program alone writes: in the order of
  image rows, without atomics.
- The last bucket, of skip tokens, has place PLACES - 1 in every line: P and A have it there for slots of skip tokens, and
  a token that is one has it in all places.
"""

import triton
import triton.language as tl

from ._triton_parts import add_mask, along, dot, drop, head_of, kernel, put_rows, rows_of, slots, table_of, tiling


@triton.jit
def _blocks(h, w, skip, GROUPS: tl.constexpr):
    """Programs of a head."""
    up = tl.cdiv(h, 16)
    return tl.cdiv(up * w + tl.cdiv(tl.maximum(skip - (up * 16 - h) * w, 0), 16), GROUPS)


@triton.jit
def _tokens(block, h, w, skip, length, GROUPS: tl.constexpr):
    """Of a program: token, whether there is one, whether it is of skip, image row; and the column of each group."""
    u = tl.arange(0, GROUPS * 16)
    up = tl.cdiv(h, 16)  # groups of an image column
    free, columns = up * 16 - h, up * w
    group = block * GROUPS + u // 16
    row = group % up * 16 + u % 16
    beyond = group >= columns
    x = tl.where(beyond, w * free + (group - columns) * 16 + u % 16, group // up * free + row - h)
    on_map = (row < h) & (group < columns)
    is_skip = (x < skip) & (on_map == 0)
    token = tl.where(on_map, skip + row * w + group // up, x)
    column = tl.minimum((block * GROUPS + tl.arange(0, GROUPS)) // up, w - 1)
    return token, (on_map | is_skip) & (token < length), is_skip, tl.minimum(row, h - 1), column


@triton.jit
def _class(axes, mine, column, on_map, h, w, NEAR: tl.constexpr):
    """(GROUPS, TILE) of columns[difference of columns], 0 off the map."""
    difference = mine[:, None] - column[None, :] if NEAR else column[None, :] - mine[:, None]
    return tl.load(axes + (2 * h - 1 + w - 1) + difference, mask=on_map[None, :], other=0)


@triton.jit
def _places(axes, mine, line, column, on_map, h, w, DEEP: tl.constexpr, PLACES: tl.constexpr, LIKE: tl.constexpr):
    """P of a near table, (GROUPS, DEEP * PLACES, TILE)."""
    e = tl.arange(0, DEEP * PLACES)
    of = _class(axes, mine, column, on_map, h, w, True)
    of = tl.where(on_map[None, :], of, PLACES - 1) + tl.where(on_map, line, 0)[None, :] * PLACES
    return tl.where(of[:, None, :] == e[None, :, None], 1.0, 0.0).to(LIKE)


@triton.jit
def _rows_at(axes, row, down, deep, h, DEEP: tl.constexpr, NEAR: tl.constexpr):
    """(R, DEEP) of rows[difference of image rows] for the lines of a tile."""
    difference = row[:, None] - (down * deep + tl.arange(0, DEEP))[None, :]
    difference = difference if NEAR else -difference
    return tl.load(axes + tl.minimum(tl.maximum(difference + h - 1, 0), 2 * h - 2))


@triton.jit
def _near(
    lut, stride, N, COLUMNS, axes, token, there, is_skip, row, down, deep, last, h, skip, P, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, TILE) of table[i, bucket(i, slot)]; whose places have no bucket are not read."""
    c = tl.arange(0, PLACES)[None, None, :]
    at = _rows_at(axes, row, down, deep, h, DEEP, True)
    of_skip = (is_skip | (down >= last))[:, None, None] | ((c == PLACES - 1) & (skip > 0))
    n = tl.where(of_skip, N - 1, at[:, :, None] + c)  # (R, DEEP, PLACES)
    inside = there[:, None, None] & (of_skip | (c < COLUMNS)) & (n >= 0) & (n < N)
    A = tl.load(lut + ((token * stride)[:, None, None] + n), mask=inside, other=0.0)
    A = tl.reshape(A, (GROUPS, 16, DEEP * PLACES))
    return tl.reshape(dot(A, P, None, PRECISION), (GROUPS * 16, P.shape[2]))


@triton.jit
def _far(
    lut, stride, N, COLUMNS, axes, token, there, line, column, on_map, mine, is_skip, row, down, deep, h, w, skip,
    PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, TILE) of table[slot, bucket(slot, i)]."""
    g = tl.arange(0, PLACES)
    of_row = _rows_at(axes, row, down, deep, h, DEEP, False) // COLUMNS
    of_row = tl.where(is_skip[:, None], PLACES - 1, of_row)  # (R, DEEP)
    ones = tl.where(of_row[:, :, None] == g[None, None, :], 1.0, 0.0).to(lut.dtype.element_ty)
    ones = tl.reshape(ones, (GROUPS, 16, DEEP * PLACES))
    of_column = _class(axes, mine, column, on_map, h, w, False)
    of_skip = (on_map == 0)[None, None, :] | ((g == PLACES - 1) & (skip > 0))[None, :, None]
    n = tl.where(of_skip, N - 1, (g * COLUMNS)[None, :, None] + of_column[:, None, :])  # (GROUPS, PLACES, TILE)
    B = tl.load(lut + ((token * stride)[None, None, :] + n), mask=there[None, None, :] & (n >= 0) & (n < N), other=0.0)
    if DEEP > 1:
        own = tl.where(on_map, line, 0)[None, :] == tl.arange(0, DEEP)[:, None]  # (DEEP, TILE)
        B = tl.where(own[None, :, None, :], B[:, None, :, :], 0.0)
        B = tl.reshape(B, (GROUPS, DEEP * PLACES, token.shape[0]))
    return tl.reshape(dot(ones, B, None, PRECISION), (GROUPS * 16, token.shape[0]))


@triton.jit
def _clear(sums, token, there, N):
    """Zero in all buckets of the rows of `sums`; who adds to them comes later."""
    for start in range(0, N, 64):
        n = start + tl.arange(0, 64)
        at = sums + ((token * N)[:, None] + n[None, :])
        tl.store(at, tl.zeros((token.shape[0], 64), sums.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])
    tl.debug_barrier()


@triton.jit
def _line(X, at, DEEP: tl.constexpr):
    """X[:, at, :] of (R, DEEP, PLACES)."""
    return tl.sum(tl.where((tl.arange(0, DEEP) == at)[None, :, None], X, 0.0), 1)


@triton.jit
def _lines(x, P, PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr):
    """(R, DEEP, PLACES) of the sums of x in the places of every line."""
    x = tl.reshape(x, (GROUPS, 16, P.shape[2])).to(P.dtype)
    return tl.reshape(dot(x, tl.permute(P, (0, 2, 1)), None, PRECISION), (GROUPS * 16, DEEP, PLACES))


@triton.jit
def _add_lines(
    X, total, of_skip, sums, N, COLUMNS, axes, token, there, is_skip, row, down, deep, last, h, skip,
    DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Lines of a tile to the running total, which goes to memory wherever the next image row has another bucket."""
    c = tl.arange(0, PLACES)
    whole = is_skip | (down >= last)
    for at in tl.static_range(DEEP):
        x = _line(X, at, DEEP)
        r = down * deep + at
        inside = (at < deep) & (r < h)
        rest = tl.where((c == PLACES - 1)[None, :] & (skip > 0), x, 0.0)
        of_skip += tl.sum(tl.where(whole[:, None], x, rest), 1)
        total += tl.where(whole[:, None], 0.0, x)
        here = tl.load(axes + tl.minimum(tl.maximum(row - r + h - 1, 0), 2 * h - 2))
        after = tl.load(axes + tl.minimum(tl.maximum(row - r + h - 2, 0), 2 * h - 2))
        ends = inside & there & (whole == 0) & ((here != after) | (r == h - 1))
        n = here[:, None] + c[None, :]
        put = ends[:, None] & (c < COLUMNS)[None, :] & (n >= 0) & (n < N)
        place = sums + ((token * N)[:, None] + n)
        tl.store(place, (tl.load(place, mask=put, other=0.0) + total).to(sums.dtype.element_ty), mask=put)
        total = tl.where(ends[:, None], 0.0, total)
    return total, of_skip


@triton.jit
def _put_skip(sums, of_skip, N, token, there, skip):
    at = sums + (token * N + N - 1)
    tl.store(at, of_skip.to(sums.dtype.element_ty), mask=there & (skip > 0))


@kernel
def axes_forward(
    q, k, v, out, lse, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_columns, k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_columns,
    v1_ids, sums1, v1_n, v1_columns,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of some groups: out, lse = log sum exp(scores), and the bucket sums of the weights."""
    R: tl.constexpr = GROUPS * 16
    blocks = _blocks(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, i_there, i_skip, row, mine = _tokens(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP)
    top = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_V:
        at_sums = sums1 + head.to(tl.int64) * L * v1_n
        total, of_skip = tl.zeros((R, PLACES), tl.float32), tl.zeros((R,), tl.float32)
        tops = tl.full((R, PLACES), float("-inf"), tl.float32)  # of each row bucket: what its sums are relative to
        g = tl.arange(0, PLACES)
        _clear(at_sums, i, i_there, v1_n)
    for part in range(0, parts):
        _, _, line, column, on_map = slots(0, part, 1 << 30, width, skip, L, wide, deep, free, last)
        if ON_K:
            P_k = _places(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = _places(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there, line, column, on_map = slots(down, part, height, width, skip, L, wide, deep, free, last)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                at = table_of(k1, b, h, k1_b, k1_h)
                s += _near(
                    at, k1_r, k1_n, k1_columns, k1_ids, i, i_there, i_skip, row, down, deep, last, height, skip, P_k,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                at = table_of(q1, b, h, q1_b, q1_h)
                s += _far(
                    at, q1_r, q1_n, q1_columns, q1_ids, j, j_there, line, column, on_map, mine, i_skip, row, down,
                    deep, height, width, skip, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if masked > 0:
                    there = i_there[:, None] & j_there[None, :]
                    s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
            s = tl.where(j_there[None, :], s, float("-inf"))
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
                X = _lines(p, P_v, PRECISION, GROUPS, DEEP, PLACES)
                total, of_skip, tops = _add_fading_lines(
                    X, total * fade[:, None], of_skip * fade, tops, finite, at_sums, v1_n, v1_columns, v1_ids, i,
                    i_there, i_skip, row, down, deep, last, height, skip, DEEP, PLACES,
                )  # fmt: skip
            top = new
    whole = tl.where(weight == 0, 1.0, weight)
    share = 1.0 / whole
    if ON_V:
        tl.debug_barrier()
        finite = tl.where(top == float("-inf"), 0.0, top)
        for start in range(0, tl.cdiv(v1_n, v1_columns)):
            its = tl.max(tl.where((g == start)[None, :], tops, float("-inf")), 1)
            n = start * v1_columns + g
            put = i_there[:, None] & ((g < v1_columns) & (n < v1_n))[None, :]
            place = at_sums + ((i * v1_n)[:, None] + n[None, :])
            value = tl.load(place, mask=put, other=0.0).to(tl.float32) * (tl.exp(its - finite) * share)[:, None]
            tl.store(place, value.to(sums1.dtype.element_ty), mask=put)
        tl.debug_barrier()
        _put_skip(at_sums, of_skip * share, v1_n, i, i_there, skip)
    stride = H * D8  # out is (B, L, H, D)
    put_rows(head_of(out, b, h, L * stride, D8), acc * share[:, None], stride, i, i_there, D8, WIDE)
    value = tl.where(weight == 0, float("inf"), top + tl.log(whole))  # of no key: every exp(s - lse) is 0
    tl.store(lse + head.to(tl.int64) * L + i, value, mask=i_there)


@triton.jit
def _add_fading_lines(
    X, total, of_skip, tops, top, sums, N, COLUMNS, axes, token, there, is_skip, row, down, deep, last, h, skip,
    DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """`_add_lines` of weights that are exp(score - top), with a top that may have grown since a bucket was left."""
    c = tl.arange(0, PLACES)
    whole = is_skip | (down >= last)
    for at in tl.static_range(DEEP):
        x = _line(X, at, DEEP)
        r = down * deep + at
        inside = (at < deep) & (r < h)
        rest = tl.where((c == PLACES - 1)[None, :] & (skip > 0), x, 0.0)
        of_skip += tl.sum(tl.where(whole[:, None], x, rest), 1)
        total += tl.where(whole[:, None], 0.0, x)
        here = tl.load(axes + tl.minimum(tl.maximum(row - r + h - 1, 0), 2 * h - 2))
        after = tl.load(axes + tl.minimum(tl.maximum(row - r + h - 2, 0), 2 * h - 2))
        ends = inside & there & (whole == 0) & ((here != after) | (r == h - 1))
        n = here[:, None] + c[None, :]
        put = ends[:, None] & (c < COLUMNS)[None, :] & (n >= 0) & (n < N)
        place = sums + ((token * N)[:, None] + n)
        own = c[None, :] == (here // COLUMNS)[:, None]
        before = tl.exp(tl.max(tl.where(own, tops, float("-inf")), 1) - top)
        value = tl.load(place, mask=put, other=0.0).to(tl.float32) * before[:, None] + total
        tl.store(place, value.to(sums.dtype.element_ty), mask=put)
        tops = tl.where(own & ends[:, None], top[:, None], tops)
        total = tl.where(ends[:, None], 0.0, total)
    return total, of_skip, tops


@kernel
def axes_backward_queries(
    q, k, v, grad_out, out, lse, delta, grad_q,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, o_b, o_h, o_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_columns, k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_columns,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_columns, values1, sums1,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of some groups: delta, the gradients of q and of the table on keys. v1 is that of the bucket sums.

    delta[i] = sum_j p[i, j] * (gradient of p[i, j]) = <grad_out[i], out[i]> + <grad_sums[i], sums[i]>.
    """
    R: tl.constexpr = GROUPS * 16
    blocks = _blocks(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, i_there, i_skip, row, mine = _tokens(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    rows_grad = rows_of(head_of(grad_out, b, h, g_b, g_h), g_l, i, i_there, D8, WIDE)
    rows_out = rows_of(head_of(out, b, h, o_b, o_h), o_l, i, i_there, D8, WIDE)
    row_delta = tl.sum(rows_grad.to(tl.float32) * rows_out.to(tl.float32), 1)
    if ON_V:
        row_delta += along(v1, v1_b, v1_h, v1_r, values1, v1_n, b, h, head, L, i, i_there)
    at_row = head.to(tl.int64) * L + i
    tl.store(delta + at_row, row_delta, mask=i_there)
    row_lse = tl.load(lse + at_row, mask=i_there, other=float("inf"))
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_K:
        at_sums = sums1 + head.to(tl.int64) * L * k1_n
        total, of_skip = tl.zeros((R, PLACES), tl.float32), tl.zeros((R,), tl.float32)
        _clear(at_sums, i, i_there, k1_n)
    for part in range(0, parts):
        _, _, line, column, on_map = slots(0, part, 1 << 30, width, skip, L, wide, deep, free, last)
        if ON_K:
            P_k = _places(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = _places(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there, line, column, on_map = slots(down, part, height, width, skip, L, wide, deep, free, last)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                at = table_of(k1, b, h, k1_b, k1_h)
                s += _near(
                    at, k1_r, k1_n, k1_columns, k1_ids, i, i_there, i_skip, row, down, deep, last, height, skip, P_k,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                at = table_of(q1, b, h, q1_b, q1_h)
                s += _far(
                    at, q1_r, q1_n, q1_columns, q1_ids, j, j_there, line, column, on_map, mine, i_skip, row, down,
                    deep, height, width, skip, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if masked > 0:
                    there = i_there[:, None] & j_there[None, :]
                    s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
            p = tl.exp(tl.where(j_there[None, :], s, float("-inf")) - row_lse[:, None])
            rows_v = rows_of(at_v, v_l, j, j_there, D8, WIDE)
            grad = dot(rows_grad, tl.trans(rows_v), None, PRECISION)
            if ON_V:
                at = table_of(v1, b, h, v1_b, v1_h)
                grad += _near(
                    at, v1_r, v1_n, v1_columns, v1_ids, i, i_there, i_skip, row, down, deep, last, height, skip, P_v,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if below > 0:
                    grad = drop(grad, seed, below, factor, head, i[:, None], j[None, :])
            grad = p * (grad - row_delta[:, None])
            acc = dot(grad.to(rows_k.dtype), rows_k, acc, PRECISION)
            if ON_K:
                X = _lines(grad, P_k, PRECISION, GROUPS, DEEP, PLACES)
                total, of_skip = _add_lines(
                    X, total, of_skip, at_sums, k1_n, k1_columns, k1_ids, i, i_there, i_skip, row, down, deep, last,
                    height, skip, DEEP, PLACES,
                )  # fmt: skip
    if ON_K:
        _put_skip(at_sums, of_skip, k1_n, i, i_there, skip)
    stride = H * D8  # grad_q is (B, L, H, D)
    put_rows(head_of(grad_q, b, h, L * stride, D8), acc * scale, stride, i, i_there, D8, WIDE)


@kernel
def axes_backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n, q1_columns, k1, k1_ids, k1_b, k1_h, k1_r, k1_n, k1_columns,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n, v1_columns, sums1,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of some groups: the gradients of k, v and of the table on queries. Slots of a tile are queries here."""
    R: tl.constexpr = GROUPS * 16
    blocks = _blocks(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    j, j_there, j_skip, row, mine = _tokens(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_q, at_grad = head_of(q, b, h, q_b, q_h), head_of(grad_out, b, h, g_b, g_h)
    rows_k = rows_of(head_of(k, b, h, k_b, k_h), k_l, j, j_there, D8, WIDE)
    rows_v = rows_of(head_of(v, b, h, v_b, v_h), v_l, j, j_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP)
    acc_k, acc_v = tl.zeros((R, WIDE), tl.float32), tl.zeros((R, WIDE), tl.float32)
    if ON_Q:
        at_sums = sums1 + head.to(tl.int64) * L * q1_n
        total, of_skip = tl.zeros((R, PLACES), tl.float32), tl.zeros((R,), tl.float32)
        _clear(at_sums, j, j_there, q1_n)
    for part in range(0, parts):
        _, _, line, column, on_map = slots(0, part, 1 << 30, width, skip, L, wide, deep, free, last)
        if ON_Q:
            P_q = _places(q1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, q1.dtype.element_ty)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            i, i_there, line, column, on_map = slots(down, part, height, width, skip, L, wide, deep, free, last)
            rows_q = rows_of(at_q, q_l, i, i_there, D8, WIDE)
            s = dot(rows_k, tl.trans(rows_q), None, PRECISION) * scale
            if ON_Q:
                at = table_of(q1, b, h, q1_b, q1_h)
                s += _near(
                    at, q1_r, q1_n, q1_columns, q1_ids, j, j_there, j_skip, row, down, deep, last, height, skip, P_q,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_K:
                at = table_of(k1, b, h, k1_b, k1_h)
                s += _far(
                    at, k1_r, k1_n, k1_columns, k1_ids, i, i_there, line, column, on_map, mine, j_skip, row, down,
                    deep, height, width, skip, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            there = j_there[:, None] & i_there[None, :]
            if EXTRA:
                if masked > 0:
                    s = add_mask(s, mask, b, h, i[None, :], j[:, None], there, m_b, m_h, m_i, m_j)
            at_column = head.to(tl.int64) * L + i
            column_lse = tl.load(lse + at_column, mask=i_there, other=float("inf"))
            p = tl.exp(tl.where(there, s, float("-inf")) - column_lse[None, :])
            rows_grad = rows_of(at_grad, g_l, i, i_there, D8, WIDE)
            grad = dot(rows_v, tl.trans(rows_grad), None, PRECISION)
            if ON_V:
                at = table_of(v1, b, h, v1_b, v1_h)
                grad += _far(
                    at, v1_r, v1_n, v1_columns, v1_ids, i, i_there, line, column, on_map, mine, j_skip, row, down,
                    deep, height, width, skip, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            dropped = p
            if EXTRA:
                if below > 0:
                    dropped = drop(p, seed, below, factor, head, i[None, :], j[:, None])
                    grad = drop(grad, seed, below, factor, head, i[None, :], j[:, None])
            acc_v = dot(dropped.to(rows_grad.dtype), rows_grad, acc_v, PRECISION)
            grad = p * (grad - tl.load(delta + at_column, mask=i_there, other=0.0)[None, :])
            acc_k = dot(grad.to(rows_q.dtype), rows_q, acc_k, PRECISION)
            if ON_Q:
                X = _lines(grad, P_q, PRECISION, GROUPS, DEEP, PLACES)
                total, of_skip = _add_lines(
                    X, total, of_skip, at_sums, q1_n, q1_columns, q1_ids, j, j_there, j_skip, row, down, deep, last,
                    height, skip, DEEP, PLACES,
                )  # fmt: skip
    if ON_Q:
        _put_skip(at_sums, of_skip, q1_n, j, j_there, skip)
    stride = H * D8  # both are (B, L, H, D)
    put_rows(head_of(grad_k, b, h, L * stride, D8), acc_k * scale, stride, j, j_there, D8, WIDE)
    put_rows(head_of(grad_v, b, h, L * stride, D8), acc_v, stride, j, j_there, D8, WIDE)
