# ruff: noqa: N803
"""The Triton kernels of `rpe_attention` for maps that factor: look-ups and bucket sums as small matrix products.

The bucket of an offset is rows[dr] + columns[dc]. Tables are in PLACES form: N is a multiple of PLACES, which is 8 or
16, rows has multiples of PLACES, columns has 0, 1, ..., below PLACES - 1 where there are tokens of skip; all places of
the last row of PLACES, and the last place of each, are those of skip tokens. PLACES numbers are read at a time.

A program has GROUPS groups of 16 tokens, each in one image column; a tile is DEEP image rows at most.

- A table whose rows are the program's tokens ("near"): bias[i, slot] is the sum over (line, c) of A[i, (line, c)]
  P[(line, c), slot] with A[i, (line, c)] = table[i, rows[r_i - r] + c], and P[(line, c), slot] = 1 where the slot is
  in that line of the tile and columns[c_i - c_slot] = c: the same for every tile, and for all tokens of a group.
- A table whose rows are the tile's tokens ("far"): bias[i, slot] is the sum over (line, g) of O[i, (line, g)]
  B[(line, g), slot] with B[(line, g), slot] = table[slot, g PLACES + columns[c_slot - c_i]] in the slot's own line, and
  O[i, (line, g)] = 1 where rows[r - r_i] is g PLACES.
- Bucket sums: X[i, (line, c)] is the sum over slots of x[i, slot] P[(line, c), slot]. They are added up image row by
  image row as long as rows[r_i - r] stays what it is, and then added to their place in memory, which this program
  alone writes: in the order of image rows, without atomics.
"""

import triton
import triton.language as tl

from ._triton_parts import add_mask, along, dot, drop, head_of, kernel, put_rows, rows_of, tiling


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
def _part(part, h, w, skip, wide, deep, free, SLOTS: tl.constexpr):
    """What tiles of a part of image rows have in common: their tokens are first + down step where below limit.

    Also the line and the column of each slot, and whether it is of the map; the others are for tokens of skip.
    """
    s = tl.arange(0, SLOTS)
    line, column = s // wide, part * SLOTS + s % wide
    on_map = (line < deep) & (column < w)
    first = tl.where(line < deep, 1 << 30, s - deep * wide)
    first = tl.where(on_map, skip + line * w + column, first)
    step = tl.where(on_map, deep * w, free)
    return first, step, tl.where(on_map, skip + h * w, skip), tl.where(on_map, line, 0), column, on_map


@triton.jit
def _slots(down, first, step, limit, skip, free, last, SLOTS: tl.constexpr):
    """Token of each slot of a tile, and whether there is one; tiles from `last` on are of skip tokens alone."""
    beyond = last * free + (down - last) * SLOTS
    token = tl.where(down < last, first + down * step, tl.arange(0, SLOTS) + beyond)
    return token, token < tl.where(down < last, limit, skip)


@triton.jit
def _class(axes, mine, column, on_map, h, w, NEAR: tl.constexpr, PLACES: tl.constexpr):
    """(GROUPS, SLOTS) of columns[difference of columns], the last place off the map."""
    difference = mine[:, None] - column[None, :] if NEAR else column[None, :] - mine[:, None]
    at = tl.load(axes + (2 * h - 1 + w - 1) + difference, mask=on_map[None, :], other=PLACES - 1)
    return tl.maximum(tl.minimum(at, PLACES - 1), 0)


@triton.jit
def _places(
    axes, mine, line, column, on_map, h, w, DEEP: tl.constexpr, PLACES: tl.constexpr, LIKE: tl.constexpr
):
    """P of a near table, (GROUPS, DEEP * PLACES, SLOTS)."""
    e = tl.arange(0, DEEP * PLACES)
    of = _class(axes, mine, column, on_map, h, w, True, PLACES) + line[None, :] * PLACES
    return tl.where(of[:, None, :] == e[None, :, None], 1.0, 0.0).to(LIKE)


@triton.jit
def _row_bucket(axes, difference, skipped, N8, h, PLACES: tl.constexpr):
    """rows[difference], where PLACES buckets begin, or the last row's."""
    at = tl.load(axes + tl.minimum(tl.maximum(difference + h - 1, 0), 2 * h - 2))
    return tl.where(skipped, N8 * 8 - PLACES, tl.maximum(tl.minimum(at, N8 * 8 - PLACES), 0)) // 8 * 8


@triton.jit
def _near(
    lut, stride, N8, axes, token, there, is_skip, row, down, deep, last, h, P, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, SLOTS) of table[i, bucket(i, slot)]."""
    lines = down * deep + tl.arange(0, DEEP)
    skipped = (is_skip | (down >= last))[:, None]
    at = _row_bucket(axes, row[:, None] - lines[None, :], skipped, N8, h, PLACES)  # (R, DEEP)
    n = (token * (stride * 8))[:, None] + at
    A = tl.load(lut + (n[:, :, None] + tl.arange(0, PLACES)[None, None, :]), mask=there[:, None, None], other=0.0)
    A = tl.reshape(A, (GROUPS, 16, DEEP * PLACES))
    return tl.reshape(dot(A, P, None, PRECISION), (GROUPS * 16, P.shape[2]))


@triton.jit
def _far(
    lut, stride, N8, axes, token, there, of_column, line, is_skip, row, down, deep, last, h,
    PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, SLOTS) of table[slot, bucket(slot, i)]; of_column is the class of each group and slot."""
    g = tl.arange(0, PLACES)
    lines = down * deep + tl.arange(0, DEEP)
    of_row = _row_bucket(axes, lines[None, :] - row[:, None], is_skip[:, None], N8, h, PLACES)  # (R, DEEP)
    ones = tl.where(of_row[:, :, None] == (g * PLACES)[None, None, :], 1.0, 0.0).to(lut.dtype.element_ty)
    ones = tl.reshape(ones, (GROUPS, 16, DEEP * PLACES))
    n = (token * (stride * 8))[None, :] + tl.where(down < last, of_column, PLACES - 1)  # (GROUPS, SLOTS)
    at = lut + (n[:, None, :] + (g * PLACES)[None, :, None])  # (GROUPS, PLACES, SLOTS)
    B = tl.load(at, mask=there[None, None, :] & (g * PLACES < N8 * 8)[None, :, None], other=0.0)
    own = line[None, :] == tl.arange(0, DEEP)[:, None]  # (DEEP, SLOTS)
    B = tl.where(own[None, :, None, :], B[:, None, :, :], 0.0)
    B = tl.reshape(B, (GROUPS, DEEP * PLACES, token.shape[0]))
    return tl.reshape(dot(ones, B, None, PRECISION), (GROUPS * 16, token.shape[0]))


@triton.jit
def _sums_of(sums, head, length, N8):
    return tl.multiple_of(sums + head.to(tl.int64) * length * (N8 * 8), 16)


@triton.jit
def _clear(sums, token, there, N8):
    """Zero in all buckets of the program's rows; who adds to them comes later."""
    for start in range(0, N8 * 8, 64):
        n = start + tl.arange(0, 64)
        at = sums + ((token * (N8 * 8))[:, None] + n[None, :])
        zeros = tl.zeros((token.shape[0], 64), sums.dtype.element_ty)
        tl.store(at, zeros, mask=there[:, None] & (n < N8 * 8)[None, :])
    tl.debug_barrier()


@triton.jit
def _lines(x, P, extra, PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr):
    """(R, DEEP, PLACES) of the sums of x in the places of every line; all in the last place of one where extra."""
    x = tl.reshape(x, (GROUPS, 16, P.shape[2])).to(P.dtype)
    X = tl.reshape(dot(x, tl.permute(P, (0, 2, 1)), None, PRECISION), (GROUPS * 16, DEEP * PLACES))
    if extra:
        X = tl.where((tl.arange(0, DEEP * PLACES) == PLACES - 1)[None, :], tl.sum(X, 1)[:, None], 0.0)
    return tl.reshape(X, (GROUPS * 16, DEEP, PLACES))


@triton.jit
def _line(X, at, DEEP: tl.constexpr):
    """X[:, at, :] of (R, DEEP, PLACES)."""
    return tl.sum(tl.where((tl.arange(0, DEEP) == at)[None, :, None], X, 0.0), 1)


@triton.jit
def _add(sums, total, put, here, token, N8, PLACES: tl.constexpr):
    """sums[i, here ...] += total[i] where put."""
    at = sums + ((token * (N8 * 8) + here)[:, None] + tl.arange(0, PLACES)[None, :])
    value = tl.load(at, mask=put[:, None], other=0.0).to(tl.float32) + total
    tl.store(at, value.to(sums.dtype.element_ty), mask=put[:, None])
    return tl.where(put[:, None], 0.0, total)


@triton.jit
def _add_lines(
    X, total, sums, N8, axes, token, there, is_skip, row, down, deep, h, DEEP: tl.constexpr, PLACES: tl.constexpr
):
    """Lines of a tile to the running total, which goes to memory wherever the next image row has another bucket."""
    for at in tl.static_range(DEEP):
        r = down * deep + at
        if at < deep:
            total += _line(X, at, DEEP)
            here = _row_bucket(axes, row - r, is_skip, N8, h, PLACES)
            after = _row_bucket(axes, row - r - 1, is_skip, N8, h, PLACES)
            total = _add(sums, total, there & (here != after) & (r < h - 1), here, token, N8, PLACES)
    return total


@triton.jit
def _add_fading(sums, total, tops, top, put, here, token, N8, PLACES: tl.constexpr):
    """`_add` of weights exp(score - top), with a top that may have grown since a bucket was left."""
    own = tl.arange(0, PLACES)[None, :] == (here // PLACES)[:, None]
    before = tl.exp(tl.max(tl.where(own, tops, float("-inf")), 1) - top)
    at = sums + ((token * (N8 * 8) + here)[:, None] + tl.arange(0, PLACES)[None, :])
    value = tl.load(at, mask=put[:, None], other=0.0).to(tl.float32) * before[:, None] + total
    tl.store(at, value.to(sums.dtype.element_ty), mask=put[:, None])
    return tl.where(put[:, None], 0.0, total), tl.where(own & put[:, None], top[:, None], tops)


@triton.jit
def _add_fading_lines(
    X, total, tops, top, sums, N8, axes, token, there, is_skip, row, down, deep, h,
    DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """`_add_lines` of such weights."""
    for at in tl.static_range(DEEP):
        r = down * deep + at
        if at < deep:
            total += _line(X, at, DEEP)
            here = _row_bucket(axes, row - r, is_skip, N8, h, PLACES)
            after = _row_bucket(axes, row - r - 1, is_skip, N8, h, PLACES)
            put = there & (here != after) & (r < h - 1)
            total, tops = _add_fading(sums, total, tops, top, put, here, token, N8, PLACES)
    return total, tops


@kernel
def axes_forward(
    q, k, v, out, lse, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8,
    v1_ids, sums1, v1_n8,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of some groups: out, lse = log sum exp(scores), and the bucket sums of the weights."""
    R: tl.constexpr = GROUPS * 16
    blocks = _blocks(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, i_there, i_skip, row, mine = _tokens(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    top = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_V:
        at_sums = _sums_of(sums1, head, L, v1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        tops = tl.full((R, PLACES), float("-inf"), tl.float32)  # of each row bucket: what its sums are relative to
        g = tl.arange(0, PLACES)
        _clear(at_sums, i, i_there, v1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = _part(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_K:
            P_k = _places(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = _places(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        if ON_Q:
            class_q = _class(q1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there = _slots(down, first, step, limit, skip, free, last, SLOTS)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                s += _near(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_ids, i, i_there, i_skip, row, down, deep, last, height, P_k,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                s += _far(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_ids, j, j_there, class_q, line, i_skip, row, down,
                    deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                X = _lines(p, P_v, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total, tops = _add_fading_lines(
                    X, total * fade[:, None], tops, finite, at_sums, v1_n8, v1_ids, i, i_there, i_skip, row, down,
                    deep, height, DEEP, PLACES,
                )  # fmt: skip
            top = new
        if ON_V:
            here = _row_bucket(v1_ids, row - height + 1, i_skip, v1_n8, height, PLACES)
            finite = tl.where(top == float("-inf"), 0.0, top)
            total, tops = _add_fading(at_sums, total, tops, finite, i_there, here, i, v1_n8, PLACES)
    whole = tl.where(weight == 0, 1.0, weight)
    share = 1.0 / whole
    if ON_V:
        tl.debug_barrier()
        finite = tl.where(top == float("-inf"), 0.0, top)
        for start in range(0, v1_n8 * 8 // PLACES):
            its = tl.max(tl.where((g == start)[None, :], tops, float("-inf")), 1)
            at = at_sums + ((i * (v1_n8 * 8) + start * PLACES)[:, None] + g[None, :])
            value = tl.load(at, mask=i_there[:, None], other=0.0).to(tl.float32)
            value *= (tl.exp(its - finite) * share)[:, None]
            tl.store(at, value.to(sums1.dtype.element_ty), mask=i_there[:, None])
    stride = H * D8  # out is (B, L, H, D)
    put_rows(head_of(out, b, h, L * stride, D8), acc * share[:, None], stride, i, i_there, D8, WIDE)
    value = tl.where(weight == 0, float("inf"), top + tl.log(whole))  # of no key: every exp(s - lse) is 0
    tl.store(lse + head.to(tl.int64) * L + i, value, mask=i_there)


@kernel
def axes_backward_queries(
    q, k, v, grad_out, out, lse, delta, grad_q,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, o_b, o_h, o_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n8, values1, sums1,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
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
        if values1 is not None:  # else out has what they would add
            its = _sums_of(values1, head, L, v1_n8)
            row_delta += along(head_of(v1, b, h, v1_b, v1_h), v1_r * 8, its, v1_n8 * 8, i, i_there)
    at_row = head.to(tl.int64) * L + i
    tl.store(delta + at_row, row_delta, mask=i_there)
    row_lse = tl.load(lse + at_row, mask=i_there, other=float("inf"))
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_K:
        at_sums = _sums_of(sums1, head, L, k1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        _clear(at_sums, i, i_there, k1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = _part(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_K:
            P_k = _places(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = _places(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        if ON_Q:
            class_q = _class(q1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there = _slots(down, first, step, limit, skip, free, last, SLOTS)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                s += _near(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_ids, i, i_there, i_skip, row, down, deep, last, height, P_k,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                s += _far(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_ids, j, j_there, class_q, line, i_skip, row, down,
                    deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if masked > 0:
                    there = i_there[:, None] & j_there[None, :]
                    s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
            p = tl.exp(tl.where(j_there[None, :], s, float("-inf")) - row_lse[:, None])
            rows_v = rows_of(at_v, v_l, j, j_there, D8, WIDE)
            grad = dot(rows_grad, tl.trans(rows_v), None, PRECISION)
            if ON_V:
                grad += _near(
                    head_of(v1, b, h, v1_b, v1_h), v1_r, v1_n8, v1_ids, i, i_there, i_skip, row, down, deep, last, height, P_v,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if below > 0:
                    grad = drop(grad, seed, below, factor, head, i[:, None], j[None, :])
            grad = p * (grad - row_delta[:, None])
            acc = dot(grad.to(rows_k.dtype), rows_k, acc, PRECISION)
            if ON_K:
                X = _lines(grad, P_k, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total = _add_lines(
                    X, total, at_sums, k1_n8, k1_ids, i, i_there, i_skip, row, down, deep, height,
                    DEEP, PLACES,
                )  # fmt: skip
        if ON_K:
            here = _row_bucket(k1_ids, row - height + 1, i_skip, k1_n8, height, PLACES)
            total = _add(at_sums, total, i_there, here, i, k1_n8, PLACES)
    stride = H * D8  # grad_q is (B, L, H, D)
    put_rows(head_of(grad_q, b, h, L * stride, D8), acc * scale, stride, i, i_there, D8, WIDE)


@kernel
def axes_backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n8, sums1,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
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
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    acc_k, acc_v = tl.zeros((R, WIDE), tl.float32), tl.zeros((R, WIDE), tl.float32)
    if ON_Q:
        at_sums = _sums_of(sums1, head, L, q1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        _clear(at_sums, j, j_there, q1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = _part(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_Q:
            P_q = _places(q1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, q1.dtype.element_ty)
        if ON_K:
            class_k = _class(k1_ids, mine, column, on_map, height, width, False, PLACES)
        if ON_V:
            class_v = _class(v1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            i, i_there = _slots(down, first, step, limit, skip, free, last, SLOTS)
            rows_q = rows_of(at_q, q_l, i, i_there, D8, WIDE)
            s = dot(rows_k, tl.trans(rows_q), None, PRECISION) * scale
            if ON_Q:
                s += _near(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_ids, j, j_there, j_skip, row, down, deep, last, height, P_q,
                    PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_K:
                s += _far(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_ids, i, i_there, class_k, line, j_skip, row, down,
                    deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                grad += _far(
                    head_of(v1, b, h, v1_b, v1_h), v1_r, v1_n8, v1_ids, i, i_there, class_v, line, j_skip, row, down,
                    deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                X = _lines(grad, P_q, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total = _add_lines(
                    X, total, at_sums, q1_n8, q1_ids, j, j_there, j_skip, row, down, deep, height,
                    DEEP, PLACES,
                )  # fmt: skip
        if ON_Q:
            here = _row_bucket(q1_ids, row - height + 1, j_skip, q1_n8, height, PLACES)
            total = _add(at_sums, total, j_there, here, j, q1_n8, PLACES)
    stride = H * D8  # both are (B, L, H, D)
    put_rows(head_of(grad_k, b, h, L * stride, D8), acc_k * scale, stride, j, j_there, D8, WIDE)
    put_rows(head_of(grad_v, b, h, L * stride, D8), acc_v, stride, j, j_there, D8, WIDE)
