"""The operator of the backend "cpu" by maps: axes and offsets of grids, and free ids, against the formula by ids."""

import itertools
import math

import pytest
import torch
from attention_cases import ISAS, make_mask, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from methods import TABLES
from torch.library import opcheck

from irpe import get_bucket_ids_2d, get_bucket_map
from rpe_ops import _native, reference

pytestmark = pytest.mark.skipif("cpu" not in _native.LOADED, reason=_native.MISSING.get("cpu", ""))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def piecewise(ratio):
    return ratio, 2 * ratio, 8 * ratio


def grid(method, height, width, skip, ratio=1.9, kind=None):
    """(map, sizes, ids) of a grid; ids are what the map stands for."""
    ids, buckets = get_bucket_ids_2d(method, height, width, skip, *piecewise(ratio))
    if kind == "free":
        return ids, [0, 0, 0, buckets], ids
    place = get_bucket_map(method, (height, width), skip, *piecewise(ratio))
    return place.grid() if kind == "offsets" else place.offsets, [height, width, skip, buckets], ids


def free(rows, columns, buckets, dtype=torch.int64):
    ids = torch.randint(buckets, (rows, columns)).to(dtype)
    return ids, [0, 0, 0, buckets], ids


class ByMaps(torch.autograd.Function):
    """The operator and its backward as they are; `maps` are three lists of (map, sizes, ids)."""

    @staticmethod
    def forward(ctx, maps, options, q, k, v, *tables):
        of_q, of_k = len(maps[0]), len(maps[1])
        lists = [list(tables[:of_q]), list(tables[of_q : of_q + of_k]), list(tables[of_q + of_k :])]
        lists += [[one for one, _, _ in some] for some in maps]
        lists += [[n for _, sizes, _ in some for n in sizes] for some in maps]
        ctx.rest = *lists, options["attn_mask"], options["seed"], q.shape[-1] ** -0.5, options["dropout_p"]
        out, lse, sums = torch.ops.rpe_ops.rpe_attention(q, k, v, *ctx.rest)
        ctx.save_for_backward(q, k, v, lse)
        return out, *sums

    @staticmethod
    def backward(ctx, grad_out, *grad_sums):
        q, k, v, lse = ctx.saved_tensors
        grads = torch.ops.rpe_ops.rpe_attention_backward(grad_out, list(grad_sums), q, k, v, lse, *ctx.rest)
        of_tables = [
            grad.sum(0).to(table.dtype) if table.dim() == 3 else grad
            for grad, table in zip(itertools.chain(*grads[3:]), itertools.chain(*ctx.rest[:3]), strict=True)
        ]
        return None, None, *grads[:3], *of_tables


def by_ids(maps, options, q, k, v, *tables):
    """The same by the law."""
    tables, scale = iter(tables), q.shape[-1] ** -0.5

    def pairs(some, x):
        for (*_, ids), table in zip(some, itertools.islice(tables, len(some)), strict=True):
            yield (scale * x) @ table if table.dim() == 3 else table, ids

    on_q, on_k = list(pairs(maps[0], k)), list(pairs(maps[1], q))
    on_v = [(ids, sizes[3]) for _, sizes, ids in maps[2]]
    out, sums = reference.rpe_attention(q, k, v, on_q, on_k, on_v, scale=scale, **options)
    weights = list(tables)
    for one, W in zip(sums, weights, strict=False):
        out = out + one @ W
    return (out,) if weights else (out, *sums)


def problem(shape, maps, dtype, weights, layout="timm"):
    B, H, Lq, Lk, D = shape
    inputs = [strided((B, H, length, D), dtype, layout) for length in (Lq, Lk, Lk)]
    for some, rows in ((maps[0], Lk), (maps[1], Lq)):
        for _, sizes, _ in some:
            inputs.append(torch.randn((H, D, sizes[3]) if weights else (B, H, rows, sizes[3]), dtype=dtype))
    if weights:
        inputs += [torch.randn(H, sizes[3], D, dtype=dtype) for _, sizes, _ in maps[2]]
    return inputs


def run(function, maps, inputs, grads, dtype, options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(maps, options, *leaves)
    grads = [g.to(dtype) for g in grads[: len(outputs)]]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def assert_right(maps, shape, dtype, weights=True, layout="timm", mask=None, dropout_p=0.0):
    """Rule 9, where the formula's own error is judged by its dtype's eps on what is added up."""
    B, H, Lq, Lk, D = shape
    inputs = problem(shape, maps, dtype, weights, layout)
    options = dict(attn_mask=make_mask(mask, shape[:4]), dropout_p=dropout_p, seed=torch.tensor([-3]))
    grads = [torch.randn(B, H, Lq, D, dtype=dtype)]
    grads += [torch.randn(B, H, Lq, sizes[3], dtype=dtype) for _, sizes, _ in maps[2]]
    of_ours = dict(options)
    if mask is not None:
        of_ours["attn_mask"] = options["attn_mask"].expand(B, H, Lq, Lk)
    ours = run(lambda *a: ByMaps.apply(*a), maps, inputs, grads, dtype, of_ours)
    exact = run(by_ids, maps, inputs, grads, torch.float64, options)
    assert len(ours) == len(exact)
    for one, truth in zip(ours, exact, strict=True):
        assert one.shape == truth.shape and one.dtype == dtype and one.isfinite().all()
        if truth.numel():
            bound = 48 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
            assert (one - truth).abs().max() <= bound, (one - truth).abs().max() / bound
    return ours


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", TABLES)
@pytest.mark.parametrize(("height", "width", "skip"), [(6, 9, 1), (9, 14, 0), (2, 33, 5), (40, 1, 1), (3, 2, 0)])
def test_maps_of_images_on_every_instruction_set(isa, method, height, width, skip, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    maps = [[grid(method, height, width, skip)] for _ in range(3)]
    tokens = skip + height * width
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_right(maps, (1, 2, tokens, tokens, 24), dtype, weights=True, dropout_p=0.2)
        assert_right(maps, (1, 2, tokens, tokens, 8), dtype, weights=False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", range(1, 41))
def test_every_width(isa, width, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    height, skip = 7 if width < 15 else 3 if width < 30 else 2, width % 3
    tokens = skip + height * width
    for method in ("product", "euc"):
        maps = [[grid(method, height, width, skip)] for _ in range(3)]
        assert_right(maps, (1, 1, tokens, tokens, 8), torch.float32)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    isa=st.sampled_from(ISAS),
    size=st.tuples(st.integers(1, 9), st.integers(1, 11), st.sampled_from([0, 1, 5])),
    terms=st.tuples(*[st.lists(st.tuples(st.sampled_from(TABLES), st.sampled_from([1.9, 3.0, 20.0])), max_size=2)] * 3),
    kind=st.sampled_from([None, None, "offsets", "free"]),
    dim=st.sampled_from([1, 8, 24, 64, 72]),
    mask=st.sampled_from([None, "padding", "bool", "float"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "timm", "detr", "gaps"]),
    weights=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_terms_of_different_maps(
    monkeypatch, isa, size, terms, kind, dim, mask, dropout_p, dtype, layout, weights, seed
):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    torch.manual_seed(seed)
    tokens = size[2] + size[0] * size[1]
    maps = [[grid(method, *size, ratio, kind) for method, ratio in some] for some in terms]
    assert_right(maps, (2, 2, tokens, tokens, dim), dtype, weights, layout, mask, dropout_p)


@pytest.mark.parametrize("isa", ISAS)
def test_grids_of_one_length_may_differ(isa, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    sizes = (4, 6, 1), (6, 4, 1), (3, 8, 1), (2, 12, 1), (5, 5, 0), (1, 22, 3)
    grids = [grid(method, *size) for method, size in zip(["product", "euc", "cross_rows"] * 2, sizes, strict=True)]
    grids.append(free(25, 25, 9))
    for first in range(len(grids)):
        maps = [[grids[(first + n + m) % len(grids)] for m in range(2)] for n in range(3)]
        assert_right(maps, (1, 2, 25, 25, 16), torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", ["product", "euc"])
@pytest.mark.parametrize("kind", [None, "offsets", "free"])
def test_more_than_256_buckets(isa, method, kind, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    maps = [[grid(method, 13, 9, 1, ratio=150.0 if method == "euc" else 8.0, kind=kind)] for _ in range(3)]
    assert maps[0][0][1][3] > 256
    assert_right(maps, (1, 1, 118, 118, 8), torch.float32)
    assert_right(maps, (1, 1, 118, 118, 8), torch.float64, weights=False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("queries", "keys"), [(37, 21), (16, 70), (1, 1), (0, 3), (3, 0)])
def test_free_ids_of_every_dtype_and_stride(isa, dtype, queries, keys, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    for buckets, lowest in ((7, 3), (50, 0), (120, 60)):

        def strange(rows, columns, buckets=buckets, lowest=lowest):
            ids = torch.randint(lowest, buckets, (columns, 2 * rows)).to(dtype)[:, ::2].t()
            return ids, [0, 0, 0, buckets], ids

        maps = [strange(keys, queries)], [strange(queries, keys)], [strange(queries, keys)]
        assert_right(maps, (1, 2, queries, keys, 8), torch.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_axes_that_are_no_product_of_slots(isa, monkeypatch):
    """Values that come back, sums that meet, a bucket that is also that of the skip tokens, strided axes."""
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    height, width = 5, 6
    for rows, cols, skip in (
        ([4, 0, 4, 0, 4, 0, 4, 0, 4], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3], 0),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 2),
        ([0] * 4 + [7] * 5, [-1] * 5 + [12] * 6, 1),
    ):
        cols = [c + 1 if min(rows) + min(cols) < 0 else c for c in cols]
        one = torch.tensor(rows + cols, dtype=torch.int32).repeat_interleave(2)[::2]
        row, col = torch.arange(height * width) // width, torch.arange(height * width) % width
        dr, dc = row.unsqueeze(1) - row + height - 1, col.unsqueeze(1) - col + width - 1
        ids = torch.tensor(rows)[dr] + torch.tensor(cols)[dc]
        buckets = max(rows) + max(cols) + 1
        ids = torch.nn.functional.pad(ids, (skip, 0, skip, 0), value=buckets - 1)
        maps = [[(one, [height, width, skip, buckets], ids)]] * 3
        for weights in (True, False):
            tokens = skip + height * width
            assert_right(maps, (1, 2, tokens, tokens, 8), torch.float32, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["product", "euc", "cross_rows"])
def test_bitwise_equal_for_every_number_of_threads(dtype, method):
    maps, threads, results = [[grid(method, 9, 14, 1)] for _ in range(3)], torch.get_num_threads(), []
    inputs = problem((2, 3, 127, 127, 16), maps, dtype, True)
    grads, options = [torch.randn(2, 3, 127, 16, dtype=dtype)], dict(attn_mask=None, dropout_p=0.0, seed=None)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(lambda *a: ByMaps.apply(*a), maps, inputs, grads, dtype, options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_outputs_do_not_depend_on_uninitialised_memory(isa, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        for method in TABLES:
            maps = [[grid(method, 3, 5, 1, ratio=20.0)] for _ in range(3)]
            for weights in (True, False):
                assert_right(maps, (2, 2, 16, 16, 20), torch.float32, weights)
    finally:
        torch.use_deterministic_algorithms(False)


NANS = [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FC007A2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", ["q", "k", "mask", "table of k", "table of q"])
def test_nan_stays_nan_whatever_its_bits(isa, where, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    maps = [[grid("product", 4, 5, 1)] for _ in range(2)] + [[]]
    for bits in NANS:
        nan = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32)[0]
        q, k, v, *tables = problem((1, 1, 21, 21, 8), maps, torch.float32, False, "contiguous")
        mask = torch.zeros(1, 1, 21, 21)
        if where == "mask":
            mask[0, 0, 3, 7] = nan
        elif where == "table of k":
            tables[1][0, 0, 3] = nan
        elif where == "table of q":
            tables[0][0, 0, 7] = nan
        else:
            dict(q=q, k=k)[where][0, 0, 3, 2] = nan
        options = dict(attn_mask=mask, dropout_p=0.0, seed=None)
        grads = [torch.randn(1, 1, 21, 8)]
        ours = run(lambda *a: ByMaps.apply(*a), maps, [q, k, v, *tables], grads, torch.float32, options)
        exact = run(by_ids, maps, [q, k, v, *tables], grads, torch.float64, options)
        assert ours[0].isnan().any()
        for one, truth in zip(ours, exact, strict=True):
            assert torch.equal(one.isnan(), truth.isnan())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_as_the_formula_has_them(isa, dtype, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    maps = [[grid("product", 4, 5, 1)] for _ in range(3)]
    for value in (math.inf, -math.inf, math.nan):
        for keys in (slice(7, 8), slice(None)):
            inputs = problem((1, 1, 21, 21, 8), maps, dtype, True, "contiguous")
            mask = torch.zeros(1, 1, 21, 21, dtype=dtype)
            mask[0, 0, 3] = -math.inf
            mask[0, 0, 3, keys] = value
            options = dict(attn_mask=mask, dropout_p=0.0, seed=None)
            grads = [torch.randn(1, 1, 21, 8, dtype=dtype)]
            ours = run(lambda *a: ByMaps.apply(*a), maps, inputs, grads, dtype, options)
            exact = run(by_ids, maps, inputs, grads, torch.float64, options)
            for one, truth in zip(ours[:4], exact[:4], strict=True):  # the law's tables spread NaN to every bucket
                assert torch.equal(one.isnan(), truth.isnan())


def call(one, sizes, tokens=13, buckets=50):
    q, k, v = (torch.randn(1, 1, tokens, 8) for _ in range(3))
    return torch.ops.rpe_ops.rpe_attention(
        q, k, v, [], [torch.randn(1, 8, buckets)], [], [], [one], [], [], sizes, [], None, None, 1.0, 0.0
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(sizes=[3, 4, 2, 50]), r"height=3, width=4, skip=2 for 13 x 13 tokens"),
        (dict(sizes=[4, 4, -3, 50]), "skip=-3"),
        (dict(sizes=[-3, -4, 1, 50]), "height=-3"),
        (dict(sizes=[2**62, 4, 1, 50]), "tokens; expected"),
        (dict(sizes=[0, 4, 1, 50]), "height=0"),
        (dict(sizes=[3, 4, 1]), "four sizes for each map"),
        (dict(sizes=[3, 4, 1, 50, 0]), "four sizes for each map"),
        (dict(sizes=[3, 4, 1, -1]), "num_buckets=-1"),
        (dict(sizes=[3, 4, 1, 49]), r"encoding on k has shape \(1, 8, 50\); expected \(1, 8, 49\)"),
        (dict(sizes=[4, 3, 1, 50], one=torch.zeros(11, dtype=torch.int32)), "11 numbers; expected 12"),
        (dict(one=torch.zeros(12)), "int32"),
        (dict(one=torch.zeros(12, dtype=torch.int64)), "int32"),
        (dict(one=torch.zeros(7, 5, dtype=torch.int32)), r"offsets have shape \(7, 5\); expected \(5, 7\)"),
        (dict(one=torch.zeros(1, 5, 7, dtype=torch.int32)), "1 dimension .axes. or 2"),
        (dict(one=torch.full((12,), 25, dtype=torch.int32)), "50 is out of bounds for a table of N=50"),
        (dict(one=torch.full((12,), -1, dtype=torch.int32)), "-2 is out of bounds for a table of N=50"),
        (dict(one=torch.full((5, 7), 77, dtype=torch.int32)), "77 is out of bounds for a table of N=50"),
        (dict(one=torch.full((12,), 2**31 - 1, dtype=torch.int32)), "4294967294 is out of bounds"),
        (dict(sizes=[0, 0, 0, 50], one=torch.zeros(13, 12, dtype=torch.int32)), r"\(13, 12\); expected \(13, 13\)"),
        (dict(sizes=[0, 0, 0, 50], one=torch.zeros(13, 13)), "neither uint8"),
        (dict(sizes=[0, 0, 0, 50], one=torch.full((13, 13), 50)), "50 is out of bounds"),
        (dict(sizes=[0, 0, 0, 50], one=torch.full((13, 13), -(2**40))), "out of bounds"),
    ],
)
def test_malformed_maps_are_refused(change, reason):
    good = dict(one=grid("product", 3, 4, 1)[0], sizes=[3, 4, 1, 50])
    call(**good)
    with pytest.raises(RuntimeError, match=reason):
        call(**{**good, **change})


def test_opcheck():
    size, maps = (3, 5, 1), [[grid("product", 3, 5, 1)], [grid("euc", 3, 5, 1)], [grid("cross_cols", 3, 5, 1)]]
    tokens = size[2] + size[0] * size[1]
    for weights in (True, False):
        q, k, v, *tables = problem((2, 2, tokens, tokens, 8), maps, torch.float32, weights)
        rest = [[tables[0]], [tables[1]], tables[2:], *[[some[0][0]] for some in maps], *[some[0][1] for some in maps]]
        rest += [torch.zeros(2, 2, tokens, tokens), torch.tensor([3]), 0.3, 0.1]
        opcheck(torch.ops.rpe_ops.rpe_attention.default, (q, k, v, *rest))
        out, lse, sums = torch.ops.rpe_ops.rpe_attention(q, k, v, *rest)
        opcheck(torch.ops.rpe_ops.rpe_attention_backward.default, (out, sums, q, k, v, lse, *rest))


BLOCKS = {  # height, width, skip, methods on q, k and v
    "product": ((71, 60, 2), [["product"]] * 3),
    "cross": ((60, 71, 0), [["cross_rows", "cross_cols"]] * 3),
    "keys": ((65, 66, 1), [[], ["product"], []]),
    "rows longer than a block": ((2, 2100, 3), [["product"]] * 3),
    "none": ((4300, 1, 0), [[], [], []]),
    "distances": ((71, 60, 2), [[], ["euc"], ["product"]]),  # whole, as all that is no sum of two axes
}


def some_rows(rows, maps, mask, keep, q, k, v, *tables):
    """(B, H, rows, D) of the law: tables are W, in the order of the maps."""
    tables, scale = iter(tables), q.shape[-1] ** -0.5
    scores = scale * q[:, :, rows] @ k.mT
    for _, _, ids in maps[0]:
        scores = scores + (scale * k @ next(tables)).gather(-1, ids[:, rows].expand(*k.shape[:3], -1)).mT
    for _, _, ids in maps[1]:
        scores = scores + (scale * q[:, :, rows] @ next(tables)).gather(-1, ids[rows].expand(*scores.shape))
    if mask is not None:
        scores = scores + mask[rows]
    weights = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    weights = weights if keep is None else weights * keep[:, :, rows]
    out = weights @ v
    for _, sizes, ids in maps[2]:
        sums = torch.zeros(*weights.shape[:3], sizes[3], dtype=v.dtype)
        out = out + sums.scatter_add(-1, ids[rows].expand(*weights.shape), weights) @ next(tables)
    return out


@pytest.mark.parametrize(
    ("case", "isa"), [(case, isa) for case in BLOCKS for isa in ISAS if isa != "plain" or case == "product"]
)
def test_long_sequences_take_keys_in_blocks(case, isa, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    (height, width, skip), methods = BLOCKS[case]
    dtypes = {"plain": torch.float64, "avx512_bf16": torch.bfloat16}
    dtype, L = dtypes.get(isa, torch.float32), skip + height * width
    maps = [[grid(method, height, width, skip) for method in some] for some in methods]
    inputs = problem((1, 1, L, L, 12), maps, dtype, weights=True)
    late = torch.zeros(L).index_fill(0, torch.arange(L // 2 + 5), -math.inf)  # blocks without a key come first
    holes = torch.randn(2 * L).masked_fill(torch.rand(2 * L) > 0.7, -math.inf).as_strided((L, L), (1, 1))
    rows = torch.cat([torch.arange(9), torch.randint(L, (30,)), torch.arange(L - 9, L)])
    for mask, dropout_p in ((None, 0.0), (late.expand(L, L), 0.0), (holes, 0.2 if case == "product" else 0.0)):
        seed = torch.tensor([7])
        options = dict(attn_mask=None if mask is None else mask.expand(1, 1, L, L), dropout_p=dropout_p, seed=seed)
        ours = ByMaps.apply(maps, options, *inputs)[0]
        keep = reference.dropout_weights(seed, (1, 1, L, L), dropout_p) if dropout_p else None
        truth = some_rows(rows, maps, mask, keep, *(x.double() for x in inputs))
        bound = 48 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
        assert (ours[:, :, rows] - truth).abs().max() <= bound


def test_blocks_keep_what_is_not_a_number():
    """A NaN in a value of the last block is in every row, one in a key as well, however the blocks before ended."""
    height, width, skip = 70, 62, 1
    maps = [[grid("product", height, width, skip)] for _ in range(3)]
    L = skip + height * width
    inputs = problem((1, 1, L, L, 16), maps, torch.float32, weights=True)
    mask = torch.zeros(L).index_fill(0, torch.arange(L - 40), -math.inf)
    for which in (1, 2):
        broken = [x.clone() for x in inputs]
        broken[which][0, 0, L - 3, 5] = math.nan
        for options in (None, mask.expand(1, 1, L, L)):
            out = ByMaps.apply(maps, dict(attn_mask=options, dropout_p=0.0, seed=None), *broken)[0]
            assert out[..., 5].isnan().all()
    raised = [x.clone() for x in inputs]
    raised[0] *= 1e4  # scores whose maximum rises by thousands from block to block
    assert ByMaps.apply(maps, dict(attn_mask=None, dropout_p=0.0, seed=None), *raised)[0].isfinite().all()
