"""`BucketMap`: what the ids of a grid depend on; and what the operators make of it without ids."""

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import TABLES

from irpe import build_rpe, get_bucket_ids, get_bucket_map, get_rpe_config, piecewise_index, rpe_attention
from rpe_ops import _native, maps, reference
from rpe_ops.rpe_attention import rpe_attention as operator
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

NUMBERS = (1.9, 3.8, 15.2)


@settings(max_examples=80, deadline=None)
@given(
    method=st.sampled_from(TABLES),
    height=st.integers(1, 9),
    width=st.integers(1, 11),
    skip=st.integers(0, 5),
    ratio=st.sampled_from([0.4, 1.9, 2.5, 20.0, 33.0]),
)
def test_ids_are_those_of_every_pair(method, height, width, skip, ratio):
    numbers = (ratio, 2 * ratio, 8 * ratio)
    place = get_bucket_map(method, (height, width), skip, *numbers)
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    where = torch.cat([torch.full((skip, 2), -1), cells.view(-1, 2)])
    expected, buckets = get_bucket_ids(method, where, where, skip, *numbers)
    assert place.num_buckets == buckets and place.size == (height, width) and place.skip == skip
    assert torch.equal(place.ids(torch.long), expected)
    assert torch.equal(maps.ids_of(place, torch.long), expected)
    assert place.offsets.dtype == torch.int32 and place.offsets.min() >= 0 and place.grid().max() < buckets


@pytest.mark.parametrize("method", TABLES)
def test_maps_that_factor_keep_their_axes(method):
    place = get_bucket_map(method, (5, 8), 1, *NUMBERS)
    if place.axes():
        assert place.offsets.shape == (2 * 5 - 1 + 2 * 8 - 1,)
        assert place.axes()[1].max() < place.columns and not (place.axes()[0] % place.columns).any()
    else:
        assert place.offsets.shape == (9, 15) and place.columns == 0


@pytest.mark.parametrize(("method", "factors"), [("product", (7, 1)), ("cross_rows", (1, 0)), ("cross_cols", (0, 1))])
def test_axes(method, factors):
    for axis, n, factor in zip(get_bucket_map(method, (5, 8), 1, *NUMBERS).axes(), (5, 8), factors, strict=True):
        assert torch.equal(axis, (piecewise_index(torch.arange(1 - n, n), *NUMBERS, torch.int32) + 3) * factor)


def test_ids_have_the_smallest_dtype_that_holds_them():
    for ratio, dtype in ((1.9, torch.uint8), (10.0, torch.int16), (100.0, torch.int32)):
        place = get_bucket_map("product", (2, 3), 1, ratio, 2 * ratio, 8 * ratio)
        assert place.ids().dtype == maps.ids_of(place).dtype == dtype
        assert place.ids().max() == place.num_buckets - 1


def test_a_map_grows_with_the_sides_not_with_the_tokens():
    assert get_bucket_map("product", (128, 96), 1, *NUMBERS).offsets.nbytes == 4 * (255 + 191)
    assert get_bucket_map("euc", (128, 96), 1, *NUMBERS).offsets.nbytes == 4 * 255 * 191


@pytest.mark.parametrize("method", TABLES)
@pytest.mark.parametrize("skip", [0, 2])
def test_the_plain_pair_in_slices_is_the_law(method, skip, monkeypatch):
    place = get_bucket_map(method, (5, 7), skip, *NUMBERS)
    tokens = skip + 35
    monkeypatch.setattr(maps, "_SLICE_BYTES", 8 * tokens * 7 * 2)  # two image rows
    assert len(list(maps._slices(place))) == 3 + (skip > 0)
    table, x = (torch.randn(2, 3, tokens, n, dtype=torch.float64) for n in (place.num_buckets, tokens))
    ids = place.ids(torch.long)
    torch.testing.assert_close(maps.look_up(table, place), reference.rpe_index(table, ids))
    sums = maps.sum_up(x, place, place.num_buckets)
    torch.testing.assert_close(sums, reference.rpe_bucket_sum(x, ids, place.num_buckets))


@pytest.mark.parametrize("compiled", [True, False])
def test_operators_take_a_map_for_their_index(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(_native, "LOADED", {})
    place = get_bucket_map("quant", (4, 6), 1, *NUMBERS)
    table, x = torch.randn(2, 3, 25, place.num_buckets, requires_grad=True), torch.randn(2, 3, 25, 25)
    expected = reference.rpe_index(table, place.ids())
    torch.testing.assert_close(rpe_index(table, place), expected)
    sums = rpe_bucket_sum(x, place, place.num_buckets)
    torch.testing.assert_close(sums, reference.rpe_bucket_sum(x, place.ids(), place.num_buckets))
    (grad,) = torch.autograd.grad(rpe_index(table, place), table, x)
    torch.testing.assert_close(grad, sums)


BACKENDS = [None, "eager", "reference", *["cpu"] * ("cpu" in _native.LOADED)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [True, False])
def test_attention_takes_maps_of_every_kind_beside_each_other(backend, weights):
    q, k, v = torch.randn(3, 2, 3, 2 + 4 * 5, 8, dtype=torch.float64)
    places = [get_bucket_map(method, (4, 5), 2, *NUMBERS) for method in TABLES]
    free = torch.randint(6, (22, 22))
    tables = [torch.randn(3, 8, p.num_buckets, dtype=torch.float64) for p in places] + [torch.randn(3, 8, 6).double()]
    on_q = [(tables[0], places[0]), (tables[2], places[2])]
    on_k = [(tables[4], places[4]), (tables[-1], free)]
    on_v = [
        (places[1], tables[1].mT.contiguous() if weights else places[1].num_buckets),
        (places[3], tables[3].mT.contiguous() if weights else places[3].num_buckets),
    ]
    as_ids = [[(table, maps.ids_of(place)) for table, place in pairs] for pairs in (on_q, on_k)]
    law = operator(q, k, v, *as_ids, [(maps.ids_of(place), last) for place, last in on_v], backend="reference")
    ours = operator(q, k, v, on_q, on_k, on_v, backend=backend)
    torch.testing.assert_close(ours, law, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(skip=2), ValueError, r"skip=2 \+ 3 \* 4 = 14 tokens; expected \(13, 13\)"),
        (dict(num_buckets=49), ValueError, "the map has 49 buckets, and the table 50"),
        (
            dict(offsets=torch.zeros(11, dtype=torch.int32)),
            ValueError,
            r"shape \(11,\); expected int32 of shape \(12,\)",
        ),
        (dict(offsets=torch.zeros(12)), ValueError, "offsets are torch.float32"),
        (dict(columns=0), ValueError, r"columns=0 beside offsets of shape \(12,\)"),
        (dict(size=(1, 3, 4)), ValueError, r"a grid of size \(1, 3, 4\); operators read two axes"),
    ],
)
def test_maps_that_do_not_fit_are_refused(change, error, match):
    q = torch.randn(1, 2, 13, 8)
    place = get_bucket_map("product", (3, 4), 1, *NUMBERS)._replace(**change)
    with pytest.raises(error, match=match):
        operator(q, q, q, on_k=[(torch.randn(2, 8, 50), place)])
    with pytest.raises(TypeError, match="is no map"):
        operator(q, q, q, on_k=[(torch.randn(2, 8, 50), (3, 4))])


@pytest.mark.parametrize("value", [-1, 50])
def test_a_bucket_outside_the_table_is_named(value):
    if "cpu" not in _native.LOADED:
        pytest.skip(_native.MISSING["cpu"])
    q = torch.randn(1, 2, 13, 8)
    place = get_bucket_map("euc", (3, 4), 1, 20.0, 40.0, 160.0)
    place = place._replace(offsets=place.offsets.clone().fill_(value), num_buckets=50)
    with pytest.raises(RuntimeError, match=rf"{value}.*50"):
        operator(q, q, q, on_k=[(torch.randn(2, 8, 50), place)], backend="cpu")


@pytest.mark.parametrize("method", TABLES)
def test_the_formula_keeps_no_ids_for_its_gradient(method, monkeypatch):
    """Nothing that is saved has an entry for each pair of tokens but the scores; slices give the same bits."""
    kept, place = [], get_bucket_map(method, (4, 5), 2, *NUMBERS)
    q, k, v = torch.randn(3, 2, 3, 22, 8, dtype=torch.float64).requires_grad_()
    table = torch.randn(3, 8, place.num_buckets, dtype=torch.float64, requires_grad=True)
    results = []
    for bytes_of_a_slice in (maps._SLICE_BYTES, 8 * 5 * 22):  # all at once, one image row at a time
        monkeypatch.setattr(maps, "_SLICE_BYTES", bytes_of_a_slice)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            out = operator(q, k, v, [(table, place)], [(table, place)], [(place, table.mT)], backend="eager")[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, table))])
    assert any(x is not None and x.shape == place.offsets.shape for x in kept)
    assert all(x.numel() <= place.offsets.numel() for x in kept if not x.is_floating_point())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["product", "euc"])
def test_the_formula_in_slices_under_transforms(method, monkeypatch):
    monkeypatch.setattr(maps, "_SLICE_BYTES", 8 * 3 * 8)
    place = get_bucket_map(method, (2, 3), 2, 0.9, 1.8, 7.2)
    x = torch.randn(1, 2, 8, place.num_buckets, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    for function, its in (
        (lambda x: maps.look_up(x, place), x),
        (lambda p: maps.sum_up(p, place, place.num_buckets), weights),
    ):
        assert torch.autograd.gradcheck(function, its, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, its)
        several = torch.stack([its, 2 * its]).detach()
        torch.testing.assert_close(torch.vmap(function)(several), torch.stack([function(one) for one in several]))


@pytest.mark.skipif("cpu" not in _native.LOADED, reason="the formula holds attention maps")
def test_no_tensor_of_all_pairs_in_a_call(run_python):
    """64x64 tokens, q, k and v, first call, with backward: an (L, L) map of bytes is 16 MiB, of floats 64."""
    out = run_python(
        """
        import torch
        from irpe import build_rpe, get_rpe_config, rpe_attention
        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        torch.set_num_threads(2)
        for method in ("cross", "euc"):
            rpe = build_rpe(get_rpe_config(method=method, skip=1, rpe_on="qkv"), 8, 2)
            small = torch.randn(3, 1, 2, 1 + 6 * 4, 8, requires_grad=True)
            rpe_attention(*small, *rpe, height=6, width=4).sum().backward()  # code and thread pools are loaded now
            x = torch.randn(3, 1, 2, 1 + 64 * 64, 8, requires_grad=True)  # a head for each thread: no sums of parts
            before = peak()
            rpe_attention(*x, *rpe, height=64, width=64).sum().backward()
            print(peak() - before)
        """,
        path=[ROOT],
    ).stdout
    assert all(float(line) < 16 for line in out.split()), out


def test_hooks_and_classes_of_their_own_take_the_formula():
    """Kernels read tables; what changes an encoding beside its table must not be left out."""
    q, k, v = torch.randn(3, 1, 2, 13, 8)
    _, rpe_k, _ = build_rpe(get_rpe_config(skip=1), 8, 2)
    torch.nn.init.normal_(rpe_k.table)
    plain = rpe_attention(q, k, v, rpe_k=rpe_k, height=3, width=4)
    handle = rpe_k.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = rpe_attention(q, k, v, rpe_k=rpe_k, height=3, width=4)
    with pytest.raises(ValueError, match='backend="reference" reads the tables, without the hooks'):
        rpe_attention(q, k, v, rpe_k=rpe_k, height=3, width=4, backend="reference")
    handle.remove()
    with torch.no_grad():
        rpe_k.table.mul_(2)
    torch.testing.assert_close(doubled, rpe_attention(q, k, v, rpe_k=rpe_k, height=3, width=4))
    assert not torch.allclose(doubled, plain)


@pytest.mark.parametrize("where", ["rpe_k", "rpe_k.rp_cols"])
@pytest.mark.parametrize(
    "put",
    [
        lambda one, call: one.register_forward_hook(lambda module, args, out: call()),
        lambda one, call: one.register_forward_pre_hook(lambda module, args: call()),
        lambda one, call: one.register_full_backward_hook(lambda module, grad_in, grad_out: call()),
        lambda one, call: one.register_full_backward_pre_hook(lambda module, grad_out: call()),
        lambda one, call: setattr(one, "forward", lambda *args, **kw: call() or type(one).forward(one, *args, **kw)),
    ],
    ids=["forward", "before forward", "backward", "before backward", "replaced forward"],
)
def test_hooks_of_every_kind_are_run(where, put):
    q, k, v = torch.randn(3, 1, 2, 13, 8, requires_grad=True)
    holder = torch.nn.Module()
    holder.rpe_k = build_rpe(get_rpe_config(20, "cross", skip=1), 8, 2)[1]
    calls = []
    put(holder.get_submodule(where), lambda: calls.append(where))
    rpe_attention(q, k, v, rpe_k=holder.rpe_k, height=3, width=4).sum().backward()
    assert calls == [where]


def test_pruned_tables_follow_a_state_dict():
    from torch.nn.utils import prune

    q, k, v = torch.randn(3, 1, 2, 13, 8)
    _, rpe_k, _ = build_rpe(get_rpe_config(skip=1), 8, 2)
    prune.random_unstructured(rpe_k, "lookup_table_weight", 0.5)
    state = {name: torch.randn_like(x) if name.endswith("orig") else x for name, x in rpe_k.state_dict().items()}
    rpe_k.load_state_dict(state)
    out = rpe_attention(q, k, v, rpe_k=rpe_k, height=3, width=4)
    _, fresh, _ = build_rpe(get_rpe_config(skip=1), 8, 2)
    with torch.no_grad():
        fresh.table.copy_(state["lookup_table_weight_orig"] * state["lookup_table_weight_mask"])
    torch.testing.assert_close(out, rpe_attention(q, k, v, rpe_k=fresh, height=3, width=4))
    assert fresh.table.count_nonzero() < fresh.table.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on", ["k", "kv"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_mask_of_a_wider_dtype_under_autocast_gives_no_nan(dtype, on, backend):
    rpe = build_rpe(get_rpe_config(skip=1, rpe_on=on), 8, 2)
    q, k, v = torch.randn(3, 1, 2, 13, 8).to(dtype)
    mask = torch.zeros(13, 13)
    mask[:, 5:] = torch.finfo(torch.float32).min
    mask[3] = torch.finfo(torch.float32).min  # no key is left, in a dtype that holds less
    with torch.autocast("cpu", dtype=dtype):
        out = rpe_attention(q, k, v, *rpe, height=3, width=4, attn_mask=mask, backend=backend)
    assert out.isfinite().all() and out[:, :, 0].any()
