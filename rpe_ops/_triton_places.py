# ruff: noqa: N803
"""What the Triton kernels for maps that factor do: look-ups and bucket sums as small matrix products.

The bucket of an offset is rows[dr] + columns[dc]. Tables are in PLACES form: N is a multiple of PLACES, which is 8 or
16; columns has 0, 1, ..., below PLACES - 1 where there are tokens of skip, and rows, whose numbers are multiples of the
number of columns, has multiples of PLACES once they are multiplied by `up` / 2^16; all places of the last row of
PLACES, and the last place of each, are those of skip tokens. PLACES numbers are read at a time.

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

from ._triton_parts import dot


@triton.jit
def blocks_of(h, w, skip, GROUPS: tl.constexpr):
    """Programs of a head."""
    up = tl.cdiv(h, 16)
    return tl.cdiv(up * w + tl.cdiv(tl.maximum(skip - (up * 16 - h) * w, 0), 16), GROUPS)


@triton.jit
def tokens_of(block, h, w, skip, length, GROUPS: tl.constexpr):
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
def part_of(part, h, w, skip, wide, deep, free, SLOTS: tl.constexpr):
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
def slots_of(down, first, step, limit, skip, free, last, SLOTS: tl.constexpr):
    """Token of each slot of a tile, and whether there is one; tiles from `last` on are of skip tokens alone."""
    beyond = last * free + (down - last) * SLOTS
    token = tl.where(down < last, first + down * step, tl.arange(0, SLOTS) + beyond)
    return token, token < tl.where(down < last, limit, skip)


@triton.jit
def class_of(axes, mine, column, on_map, h, w, NEAR: tl.constexpr, PLACES: tl.constexpr):
    """(GROUPS, SLOTS) of columns[difference of columns], the last place off the map."""
    difference = mine[:, None] - column[None, :] if NEAR else column[None, :] - mine[:, None]
    at = tl.load(axes + (2 * h - 1 + w - 1) + difference, mask=on_map[None, :], other=PLACES - 1)
    return tl.maximum(tl.minimum(at, PLACES - 1), 0)


@triton.jit
def places_of(axes, mine, line, column, on_map, h, w, DEEP: tl.constexpr, PLACES: tl.constexpr, LIKE: tl.constexpr):
    """P of a near table, (GROUPS, DEEP * PLACES, SLOTS)."""
    e = tl.arange(0, DEEP * PLACES)
    of = class_of(axes, mine, column, on_map, h, w, True, PLACES) + line[None, :] * PLACES
    return tl.where(of[:, None, :] == e[None, :, None], 1.0, 0.0).to(LIKE)


@triton.jit
def row_bucket(axes, difference, skipped, N8, up, h, PLACES: tl.constexpr):
    """rows[difference] up / 2^16, where PLACES buckets begin, or the last row's."""
    at = tl.load(axes + tl.minimum(tl.maximum(difference + h - 1, 0), 2 * h - 2)) * up >> 16
    return tl.where(skipped, N8 * 8 - PLACES, tl.maximum(tl.minimum(at, N8 * 8 - PLACES), 0)) // 8 * 8


@triton.jit
def near_table(
    lut, stride, N8, up, axes, token, there, is_skip, row, down, deep, last, h, P, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, SLOTS) of table[i, bucket(i, slot)]."""
    lines = down * deep + tl.arange(0, DEEP)
    skipped = (is_skip | (down >= last))[:, None]
    at = row_bucket(axes, row[:, None] - lines[None, :], skipped, N8, up, h, PLACES)  # (R, DEEP)
    n = (token * (stride * 8))[:, None] + at
    A = tl.load(lut + (n[:, :, None] + tl.arange(0, PLACES)[None, None, :]), mask=there[:, None, None], other=0.0)
    A = tl.reshape(A, (GROUPS, 16, DEEP * PLACES))
    return tl.reshape(dot(A, P, None, PRECISION), (GROUPS * 16, P.shape[2]))


@triton.jit
def far_table(
    lut, stride, N8, up, axes, token, there, of_column, line, is_skip, row, down, deep, last, h,
    PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(R, SLOTS) of table[slot, bucket(slot, i)]; of_column is the class of each group and slot."""
    g = tl.arange(0, PLACES)
    lines = down * deep + tl.arange(0, DEEP)
    of_row = row_bucket(axes, lines[None, :] - row[:, None], is_skip[:, None], N8, up, h, PLACES)  # (R, DEEP)
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
def sums_of(sums, head, length, N8):
    return tl.multiple_of(sums + head.to(tl.int64) * length * (N8 * 8), 16)


@triton.jit
def clear_sums(sums, token, there, N8):
    """Zero in all buckets of the program's rows; who adds to them comes later."""
    for start in range(0, N8 * 8, 64):
        n = start + tl.arange(0, 64)
        at = sums + ((token * (N8 * 8))[:, None] + n[None, :])
        zeros = tl.zeros((token.shape[0], 64), sums.dtype.element_ty)
        tl.store(at, zeros, mask=there[:, None] & (n < N8 * 8)[None, :])
    tl.debug_barrier()


@triton.jit
def lines_of(x, P, extra, PRECISION: tl.constexpr, GROUPS: tl.constexpr, DEEP: tl.constexpr, PLACES: tl.constexpr):
    """(R, DEEP, PLACES) of the sums of x in the places of every line; all in the last place of one where extra."""
    x = tl.reshape(x, (GROUPS, 16, P.shape[2])).to(P.dtype)
    X = tl.reshape(dot(x, tl.permute(P, (0, 2, 1)), None, PRECISION), (GROUPS * 16, DEEP * PLACES))
    if extra:
        X = tl.where((tl.arange(0, DEEP * PLACES) == PLACES - 1)[None, :], tl.sum(X, 1)[:, None], 0.0)
    return tl.reshape(X, (GROUPS * 16, DEEP, PLACES))


@triton.jit
def line_of(X, at, DEEP: tl.constexpr):
    """X[:, at, :] of (R, DEEP, PLACES)."""
    return tl.sum(tl.where((tl.arange(0, DEEP) == at)[None, :, None], X, 0.0), 1)


@triton.jit
def add_total(sums, total, put, here, token, N8, PLACES: tl.constexpr):
    """sums[i, here ...] += total[i] where put."""
    at = sums + ((token * (N8 * 8) + here)[:, None] + tl.arange(0, PLACES)[None, :])
    value = tl.load(at, mask=put[:, None], other=0.0).to(tl.float32) + total
    tl.store(at, value.to(sums.dtype.element_ty), mask=put[:, None])
    return tl.where(put[:, None], 0.0, total)


@triton.jit
def add_lines(
    X, total, sums, N8, up, axes, token, there, is_skip, row, down, deep, h, DEEP: tl.constexpr, PLACES: tl.constexpr
):
    """Lines of a tile to the running total, which goes to memory wherever the next image row has another bucket."""
    for at in tl.static_range(DEEP):
        r = down * deep + at
        if at < deep:
            total += line_of(X, at, DEEP)
            here = row_bucket(axes, row - r, is_skip, N8, up, h, PLACES)
            after = row_bucket(axes, row - r - 1, is_skip, N8, up, h, PLACES)
            total = add_total(sums, total, there & (here != after) & (r < h - 1), here, token, N8, PLACES)
    return total


@triton.jit
def add_fading(sums, total, tops, top, put, here, token, N8, PLACES: tl.constexpr):
    """`add_total` of weights exp(score - top), with a top that may have grown since a bucket was left."""
    own = tl.arange(0, PLACES)[None, :] == (here // PLACES)[:, None]
    before = tl.exp(tl.max(tl.where(own, tops, float("-inf")), 1) - top)
    at = sums + ((token * (N8 * 8) + here)[:, None] + tl.arange(0, PLACES)[None, :])
    value = tl.load(at, mask=put[:, None], other=0.0).to(tl.float32) * before[:, None] + total
    tl.store(at, value.to(sums.dtype.element_ty), mask=put[:, None])
    return tl.where(put[:, None], 0.0, total), tl.where(own & put[:, None], top[:, None], tops)


@triton.jit
def add_fading_lines(
    X, total, tops, top, sums, N8, up, axes, token, there, is_skip, row, down, deep, h,
    DEEP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """`add_lines` of such weights."""
    for at in tl.static_range(DEEP):
        r = down * deep + at
        if at < deep:
            total += line_of(X, at, DEEP)
            here = row_bucket(axes, row - r, is_skip, N8, up, h, PLACES)
            after = row_bucket(axes, row - r - 1, is_skip, N8, up, h, PLACES)
            put = there & (here != after) & (r < h - 1)
            total, tops = add_fading(sums, total, tops, top, put, here, token, N8, PLACES)
    return total, tops
