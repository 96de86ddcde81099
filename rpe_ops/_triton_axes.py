# ruff: noqa: N803, SIM102 (the outer condition is a constant of a binary)
"""The Triton kernels of `rpe_attention` for maps that factor; what they do with those is in `_triton_places`."""

import triton.language as tl

from ._triton_parts import add_mask, along, dot, drop, head_of, kernel, put_rows, rows_of, tiling
from ._triton_places import (
    add_fading,
    add_fading_lines,
    add_lines,
    add_total,
    blocks_of,
    class_of,
    clear_sums,
    far_table,
    lines_of,
    near_table,
    part_of,
    places_of,
    row_bucket,
    slots_of,
    sums_of,
    tokens_of,
)


@kernel
def axes_forward(
    q, k, v, out, lse, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, q1_up, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8, k1_up,
    v1_ids, v1_n8, v1_up, sums1, s_b, s_h,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of some groups: out, lse = log sum exp(scores), and the bucket sums of the weights."""
    R: tl.constexpr = GROUPS * 16
    blocks = blocks_of(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, i_there, i_skip, row, mine = tokens_of(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    top = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_V:
        at_sums = sums_of(sums1, b * s_b + h * s_h, L, v1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        tops = tl.full((R, PLACES), float("-inf"), tl.float32)  # of each row bucket: what its sums are relative to
        g = tl.arange(0, PLACES)
        clear_sums(at_sums, i, i_there, v1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = part_of(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_K:
            P_k = places_of(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = places_of(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        if ON_Q:
            class_q = class_of(q1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there = slots_of(down, first, step, limit, skip, free, last, SLOTS)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                s += near_table(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_up, k1_ids, i, i_there, i_skip, row, down, deep,
                    last, height, P_k, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                s += far_table(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_up, q1_ids, j, j_there, class_q, line, i_skip,
                    row, down, deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                X = lines_of(p, P_v, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total, tops = add_fading_lines(
                    X, total * fade[:, None], tops, finite, at_sums, v1_n8, v1_up, v1_ids, i, i_there, i_skip, row,
                    down, deep, height, DEEP, PLACES,
                )  # fmt: skip
            top = new
        if ON_V:
            here = row_bucket(v1_ids, row - height + 1, i_skip, v1_n8, v1_up, height, PLACES)
            finite = tl.where(top == float("-inf"), 0.0, top)
            total, tops = add_fading(at_sums, total, tops, finite, i_there, here, i, v1_n8, PLACES)
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
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, q1_up, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8, k1_up,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n8, v1_up, values1, sums1, s_b, s_h,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of some groups: delta, the gradients of q and of the table on keys. v1 is that of the bucket sums.

    delta[i] = sum_j p[i, j] * (gradient of p[i, j]) = <grad_out[i], out[i]> + <grad_sums[i], sums[i]>.
    """
    R: tl.constexpr = GROUPS * 16
    blocks = blocks_of(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i, i_there, i_skip, row, mine = tokens_of(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_k, at_v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows_q = rows_of(head_of(q, b, h, q_b, q_h), q_l, i, i_there, D8, WIDE)
    rows_grad = rows_of(head_of(grad_out, b, h, g_b, g_h), g_l, i, i_there, D8, WIDE)
    rows_out = rows_of(head_of(out, b, h, o_b, o_h), o_l, i, i_there, D8, WIDE)
    row_delta = tl.sum(rows_grad.to(tl.float32) * rows_out.to(tl.float32), 1)
    if ON_V:
        if values1 is not None:  # else out has what they would add
            its = sums_of(values1, head, L, v1_n8)
            row_delta += along(head_of(v1, b, h, v1_b, v1_h), v1_r * 8, its, v1_n8 * 8, i, i_there)
    at_row = head.to(tl.int64) * L + i
    tl.store(delta + at_row, row_delta, mask=i_there)
    row_lse = tl.load(lse + at_row, mask=i_there, other=float("inf"))
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    acc = tl.zeros((R, WIDE), tl.float32)
    if ON_K:
        at_sums = sums_of(sums1, b * s_b + h * s_h, L, k1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        clear_sums(at_sums, i, i_there, k1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = part_of(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_K:
            P_k = places_of(k1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, k1.dtype.element_ty)
        if ON_V:
            P_v = places_of(v1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, v.dtype.element_ty)
        if ON_Q:
            class_q = class_of(q1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            j, j_there = slots_of(down, first, step, limit, skip, free, last, SLOTS)
            rows_k = rows_of(at_k, k_l, j, j_there, D8, WIDE)
            s = dot(rows_q, tl.trans(rows_k), None, PRECISION) * scale
            if ON_K:
                s += near_table(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_up, k1_ids, i, i_there, i_skip, row, down, deep,
                    last, height, P_k, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_Q:
                s += far_table(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_up, q1_ids, j, j_there, class_q, line, i_skip,
                    row, down, deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if masked > 0:
                    there = i_there[:, None] & j_there[None, :]
                    s = add_mask(s, mask, b, h, i[:, None], j[None, :], there, m_b, m_h, m_i, m_j)
            p = tl.exp(tl.where(j_there[None, :], s, float("-inf")) - row_lse[:, None])
            rows_v = rows_of(at_v, v_l, j, j_there, D8, WIDE)
            grad = dot(rows_grad, tl.trans(rows_v), None, PRECISION)
            if ON_V:
                grad += near_table(
                    head_of(v1, b, h, v1_b, v1_h), v1_r, v1_n8, v1_up, v1_ids, i, i_there, i_skip, row, down, deep,
                    last, height, P_v, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if EXTRA:
                if below > 0:
                    grad = drop(grad, seed, below, factor, head, i[:, None], j[None, :])
            grad = p * (grad - row_delta[:, None])
            acc = dot(grad.to(rows_k.dtype), rows_k, acc, PRECISION)
            if ON_K:
                X = lines_of(grad, P_k, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total = add_lines(
                    X, total, at_sums, k1_n8, k1_up, k1_ids, i, i_there, i_skip, row, down, deep, height,
                    DEEP, PLACES,
                )  # fmt: skip
        if ON_K:
            here = row_bucket(k1_ids, row - height + 1, i_skip, k1_n8, k1_up, height, PLACES)
            total = add_total(at_sums, total, i_there, here, i, k1_n8, PLACES)
    stride = H * D8  # grad_q is (B, L, H, D)
    put_rows(head_of(grad_q, b, h, L * stride, D8), acc * scale, stride, i, i_there, D8, WIDE)


@kernel
def axes_backward_keys(
    q, k, v, grad_out, lse, delta, grad_k, grad_v,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    q1, q1_ids, q1_b, q1_h, q1_r, q1_n8, q1_up, k1, k1_ids, k1_b, k1_h, k1_r, k1_n8, k1_up,
    v1, v1_ids, v1_b, v1_h, v1_r, v1_n8, v1_up, sums1, s_b, s_h,
    mask, m_b, m_h, m_i, m_j, masked, seed, below, factor, H, L, height, width, skip, scale, D8,
    ON_Q: tl.constexpr, ON_K: tl.constexpr, ON_V: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of some groups: the gradients of k, v and of the table on queries. Slots of a tile are queries here."""
    R: tl.constexpr = GROUPS * 16
    blocks = blocks_of(height, width, skip, GROUPS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    j, j_there, j_skip, row, mine = tokens_of(tl.program_id(0) % blocks, height, width, skip, L, GROUPS)
    at_q, at_grad = head_of(q, b, h, q_b, q_h), head_of(grad_out, b, h, g_b, g_h)
    rows_k = rows_of(head_of(k, b, h, k_b, k_h), k_l, j, j_there, D8, WIDE)
    rows_v = rows_of(head_of(v, b, h, v_b, v_h), v_l, j, j_there, D8, WIDE)
    wide, deep, parts, free, last, more = tiling(height, width, skip, DEEP, SLOTS)
    acc_k, acc_v = tl.zeros((R, WIDE), tl.float32), tl.zeros((R, WIDE), tl.float32)
    if ON_Q:
        at_sums = sums_of(sums1, b * s_b + h * s_h, L, q1_n8)
        total = tl.zeros((R, PLACES), tl.float32)
        clear_sums(at_sums, j, j_there, q1_n8)
    for part in range(0, parts):
        first, step, limit, line, column, on_map = part_of(part, height, width, skip, wide, deep, free, SLOTS)
        if ON_Q:
            P_q = places_of(q1_ids, mine, line, column, on_map, height, width, DEEP, PLACES, q1.dtype.element_ty)
        if ON_K:
            class_k = class_of(k1_ids, mine, column, on_map, height, width, False, PLACES)
        if ON_V:
            class_v = class_of(v1_ids, mine, column, on_map, height, width, False, PLACES)
        for down in range(0, last + tl.where(part == parts - 1, more, 0)):
            i, i_there = slots_of(down, first, step, limit, skip, free, last, SLOTS)
            rows_q = rows_of(at_q, q_l, i, i_there, D8, WIDE)
            s = dot(rows_k, tl.trans(rows_q), None, PRECISION) * scale
            if ON_Q:
                s += near_table(
                    head_of(q1, b, h, q1_b, q1_h), q1_r, q1_n8, q1_up, q1_ids, j, j_there, j_skip, row, down, deep,
                    last, height, P_q, PRECISION, GROUPS, DEEP, PLACES,
                )  # fmt: skip
            if ON_K:
                s += far_table(
                    head_of(k1, b, h, k1_b, k1_h), k1_r, k1_n8, k1_up, k1_ids, i, i_there, class_k, line, j_skip,
                    row, down, deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                grad += far_table(
                    head_of(v1, b, h, v1_b, v1_h), v1_r, v1_n8, v1_up, v1_ids, i, i_there, class_v, line, j_skip,
                    row, down, deep, last, height, PRECISION, GROUPS, DEEP, PLACES,
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
                X = lines_of(grad, P_q, down >= last, PRECISION, GROUPS, DEEP, PLACES)
                total = add_lines(
                    X, total, at_sums, q1_n8, q1_up, q1_ids, j, j_there, j_skip, row, down, deep, height,
                    DEEP, PLACES,
                )  # fmt: skip
        if ON_Q:
            here = row_bucket(q1_ids, row - height + 1, j_skip, q1_n8, q1_up, height, PLACES)
            total = add_total(at_sums, total, j_there, here, j, q1_n8, PLACES)
    stride = H * D8  # both are (B, L, H, D)
    put_rows(head_of(grad_k, b, h, L * stride, D8), acc_k * scale, stride, j, j_there, D8, WIDE)
    put_rows(head_of(grad_v, b, h, L * stride, D8), acc_v, stride, j, j_there, D8, WIDE)
