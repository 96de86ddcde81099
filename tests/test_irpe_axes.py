"""Maps of one, three and four axes: loops over all pairs of tokens, modules, attention, compiled and saved graphs."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from irpe import (
    METHOD,
    RPEMultiheadAttention,
    build_rpe,
    get_bucket_ids,
    get_bucket_map,
    get_num_buckets,
    get_rpe_config,
    get_single_rpe_config,
    piecewise_index,
    rpe_attention,
    rpe_config_from_dict,
    rpe_config_from_string,
    rpe_config_to_dict,
    rpe_config_to_string,
)
from rpe_ops import _native

AXES = {METHOD.CROSS_TIME: -4, METHOD.CROSS_DEPTH: -3, METHOD.CROSS_ROWS: -2, METHOD.CROSS_COLS: -1}
SIZES = [(7,), (2, 3, 4), (2, 3, 1, 4)]
SINGLE = [method for method in METHOD if method != METHOD.CROSS]


def g(x, ratio):
    return int(piecewise_index(torch.tensor([float(x)]), ratio, 2 * ratio, 8 * ratio)) + int(2 * ratio)


def bucket(method, offset, ratios):
    """The definition, written out for one pair of tokens."""
    if method == METHOD.EUCLIDEAN:
        return g(round(math.sqrt(sum(d * d for d in offset))), ratios[0])
    if method == METHOD.QUANT:
        return g(sum(d * d for d in offset), ratios[0])
    if method != METHOD.PRODUCT:
        return g(offset[AXES[method]], ratios[AXES[method]])
    number = 0
    for d, ratio in zip(offset, ratios, strict=True):
        number = number * (2 * int(2 * ratio) + 1) + g(d, ratio)
    return number


def loop_ids(method, size, skip, ratios):
    cells = list(itertools.product(*map(range, size)))
    buckets = [[bucket(method, [a - b for a, b in zip(i, j, strict=True)], ratios) for j in cells] for i in cells]
    ids = torch.tensor(buckets)
    sides = [2 * int(2 * ratio) + 1 for ratio in ratios]
    last = math.prod(sides) if method == METHOD.PRODUCT else sides[AXES.get(method, 0)]
    return nn.functional.pad(ids, (skip, 0, skip, 0), value=last)


def numbers(ratios):
    """alpha, beta, gamma."""
    same = len(set(ratios)) == 1
    return tuple(ratios[0] * n if same else tuple(ratio * n for ratio in ratios) for n in (1, 2, 8))


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", SINGLE)
def test_ids_are_those_of_a_loop(method, size, skip):
    if -AXES.get(method, 0) > len(size):
        with pytest.raises(ValueError, match=f"sees axis {AXES[method]}, but the map has {len(size)}"):
            get_bucket_map(method, size, skip, *numbers([1.9] * len(size)))
        return
    ratios = [1.9] * len(size)
    place = get_bucket_map(method, size, skip, *numbers(ratios))
    assert torch.equal(place.ids(torch.long), loop_ids(method, size, skip, ratios))
    assert place.num_buckets == get_num_buckets(method, *numbers(ratios), len(size)) + (skip > 0)
    cells = torch.tensor([[-1] * len(size)] * skip + list(itertools.product(*map(range, size))))
    ids, num_buckets = get_bucket_ids(method, cells, cells, skip, *numbers(ratios))
    assert torch.equal(ids, place.ids(torch.long)) and num_buckets == place.num_buckets


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from([METHOD.PRODUCT, METHOD.CROSS_ROWS, METHOD.CROSS_COLS]),
    size=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    ratios=st.lists(st.floats(0.3, 5), min_size=4, max_size=4),
    skip=st.integers(0, 2),
)
def test_a_ratio_for_each_axis(method, size, ratios, skip):
    ratios = ratios[: len(size)]
    place = get_bucket_map(method, size, skip, *numbers(ratios))
    assert torch.equal(place.ids(torch.long), loop_ids(method, tuple(size), skip, ratios))


def test_numbers_of_buckets():
    assert get_num_buckets("product", 1.9, 3.8, 15.2, 1) == 7
    assert get_num_buckets("product", 1.9, 3.8, 15.2, 3) == 343
    assert get_num_buckets("euc", 20, 40, 160, 3) == get_num_buckets("cross", 20, 40, 160, 4) == 81
    assert get_single_rpe_config((1.0, 1.9, 2.5), "product", skip=1, ndim=3).num_buckets == 5 * 7 * 11 + 1
    assert get_rpe_config(ndim=2) == get_rpe_config() and get_rpe_config(ndim=3) != get_rpe_config()
    with pytest.raises(ValueError, match="cross has tables of different sizes"):
        get_single_rpe_config((1.0, 1.9, 2.5), "cross", ndim=3).num_buckets  # noqa: B018


def filled(config, dtype=torch.float64, heads=2, dim=8):
    rpe = build_rpe(config, dim, heads, dtype=dtype)
    for module in rpe:
        for table in module.parameters() if module is not None else ():
            nn.init.normal_(table)
    return rpe


def by_ids(module, x, size):
    """What an encoding adds, by indexing with freshly built ids."""
    parts = module.parts() if hasattr(module, "parts") else [module]
    added = 0
    for part in parts:
        c = part.rpe_config
        ids = get_bucket_map(c.method, size, c.skip, c.alpha, c.beta, c.gamma).ids(torch.long)
        if part.transposed:
            table = part.table[None, :, None].expand(1, -1, len(ids), -1) if part.mode == "bias" else x @ part.table
            added = added + table[:, :, torch.arange(len(ids)).unsqueeze(1), ids]
        else:
            one_hot = nn.functional.one_hot(ids, part.num_buckets).to(x.dtype)
            added = added + torch.einsum("bhij,ijn->bhin", x, one_hot) @ part.table
    return added


@pytest.mark.parametrize("mode", ["ctx", "bias"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", ["euc", "quant", "cross", "product"])
def test_attention_of_every_backend_is_the_five_steps(method, size, shared, mode):
    skip, ndim = 1, len(size)
    config = get_rpe_config(1.5, method, mode, shared, skip, "qkv" if mode == "ctx" else "qk", ndim)
    rpe_q, rpe_k, rpe_v = rpe = filled(config)
    tokens = skip + math.prod(size)
    q, k, v = torch.randn(3, 2, 2, tokens, 8, dtype=torch.float64).requires_grad_()
    scaled = q * 8**-0.5
    scores = scaled @ k.transpose(-2, -1) + by_ids(rpe_k, scaled, size)
    p = (scores + by_ids(rpe_q, k * 8**-0.5, size).transpose(-2, -1)).softmax(-1)
    expected = p @ v + (by_ids(rpe_v, p, size) if rpe_v is not None else 0)
    tables = [table for module in rpe if module is not None for table in module.parameters()]
    inputs = [q, k, v, *tables]
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), inputs)
    # a sequence needs no size; other maps cannot be guessed
    where = {} if ndim == 1 else {"size": size}
    for backend in (None, "eager", *(["cpu"] if "cpu" in _native.LOADED else [])):
        out = rpe_attention(q, k, v, *rpe, **where, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for got, want in zip(torch.autograd.grad((out * weight).sum(), inputs), grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_cross_has_a_table_for_each_axis():
    for ndim, names in ((1, ["rp_cols"]), (3, ["rp_depth", "rp_rows", "rp_cols"])):
        (_, rpe_k, _) = build_rpe(get_rpe_config(1.9, "cross", ndim=ndim), 8, 2)
        assert [name for name, _ in rpe_k.named_children()] == names
    (_, rpe_k, _) = build_rpe(get_rpe_config((1.0, 1.9, 2.5), "cross", skip=1, ndim=3), 8, 2)
    assert [part.num_buckets for part in rpe_k.parts()] == [6, 8, 12]


@pytest.mark.parametrize("method", ["cross", "product"])
def test_places_are_those_of_the_grid(method):
    size, config = (2, 3, 4), get_rpe_config(1.9, method, skip=1, rpe_on="qkv", ndim=3)
    rpe = filled(config)
    q, k, v = torch.randn(3, 1, 2, 25, 8, dtype=torch.float64)
    places = torch.tensor([[-1, -1, -1], *itertools.product(*map(range, size))])
    expected = rpe_attention(q, k, v, *rpe, size=size)
    torch.testing.assert_close(rpe_attention(q, k, v, *rpe, positions=places), expected, rtol=1e-12, atol=1e-12)
    some = torch.tensor([0, 3, 4, 9, 17, 24])  # tokens that were kept
    q, k, v = (x[:, :, some] for x in (q, k, v))
    kept = rpe_attention(q, k, v, *rpe, positions=places[some])
    assert kept.shape == (1, 2, 6, 8) and kept.isfinite().all()
    with pytest.raises(ValueError, match=r"positions have shape \(6, 2\); expected \(6, 3\) or \(B, 6, 3\)"):
        rpe_attention(q, k, v, *rpe, positions=places[some, :2])


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_takes_a_size(batch_first):
    size, config = (2, 3, 4), get_rpe_config(1.9, "product", skip=1, rpe_on="qkv", ndim=3)
    attention = RPEMultiheadAttention(16, 2, batch_first=batch_first, dtype=torch.float64, rpe_config=config)
    for module in (attention.rpe_q, attention.rpe_k, attention.rpe_v):
        nn.init.normal_(module.table)
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    fused, _ = attention(x, x, x, need_weights=False, size=size)
    written_out, weights = attention(x, x, x, size=size)
    torch.testing.assert_close(fused, written_out, rtol=1e-12, atol=1e-12)
    assert weights.shape == (2, 25, 25)
    attention.rpe_grid = size
    assert torch.equal(attention(x, x, x, need_weights=False)[0], fused)
    with pytest.raises(ValueError, match=r"size=\(4, 6\), but the configuration has ndim=3"):
        attention(x, x, x, size=(4, 6))


def test_added_keys_have_no_place():
    config = get_rpe_config(1.9, "product", skip=1, ndim=3)
    attention = RPEMultiheadAttention(16, 2, add_zero_attn=True, batch_first=True, rpe_config=config)
    nn.init.normal_(attention.rpe_k.table)
    x = torch.randn(2, 25, 16)
    fused, _ = attention(x, x, x, need_weights=False, size=(2, 3, 4))
    torch.testing.assert_close(fused, attention(x, x, x, size=(2, 3, 4))[0])


class Attention(nn.Module):
    def __init__(self, ndim):
        super().__init__()
        config = get_rpe_config(1.5, "product", skip=1, rpe_on="qkv", ndim=ndim)
        self.rpe_q, self.rpe_k, self.rpe_v = filled(config, torch.float32)

    def forward(self, q, k, v, size):
        return rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, size=size)


@pytest.mark.parametrize("size", [(7,), (2, 3, 4)], ids=str)
def test_compiled_without_a_break(size):
    torch._dynamo.reset()
    attention = Attention(len(size))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 2, 1 + math.prod(size), 8).requires_grad_()
    out, expected = compiled(q, k, v, size), attention(q, k, v, size)
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("size", [(7,), (2, 3, 4)], ids=str)
def test_saved_for_others(size, strict):
    attention = Attention(len(size))
    q, k, v = torch.randn(3, 2, 2, 1 + math.prod(size), 8)
    program = torch.export.export(attention, (q, k, v, size), strict=strict)
    assert not [node for node in program.graph.nodes if "rpe_ops" in str(node.target)]
    torch.testing.assert_close(program.module()(q, k, v, size), attention(q, k, v, size))


class Sequences(Attention):
    """By all the ways a sequence may say how long it is."""

    def forward(self, q, k, v):
        for size in (None, q.shape[2] - 1, (q.shape[2] - 1,)):
            v = v + super().forward(q, k, v, size)
        return v


def test_sequences_of_any_length_are_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention, graphs = Sequences(1).eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    tokens = torch.export.Dim("tokens", min=3, max=512)
    for strict in (True, False):
        program = torch.export.export(attention, (q, k, v), dynamic_shapes=[{2: tokens}] * 3, strict=strict).module()
        for length in (9, 12, 40):
            q, k, v = torch.randn(3, 2, 2, length, 8)
            with torch.no_grad():
                expected = attention(q, k, v)
                torch.testing.assert_close(program(q, k, v), expected)
                torch.testing.assert_close(compiled(q, k, v), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(size=(2, 3, 5)),
            r"skip=1 \+ size\[0\]=2 \* size\[1\]=3 \* size\[2\]=5 = 31 tokens, but the input has 25",
        ),
        (dict(), "25 tokens with skip=1 leave 24 for the map, .* pass size="),
        (dict(size=24), r"size=\(24,\), but the configuration has ndim=3; expected 3 numbers"),
        (dict(height=4, width=6), r"size=\(4, 6\), but the configuration has ndim=3"),
        (dict(height=4, width=6, size=(2, 3, 4)), "give one or the other"),
        (dict(size=(2, 0, 12)), r"size\[1\]=0; expected at least 1"),
        (dict(size=()), r"size=\(\), but the configuration has ndim=3; expected 3 numbers"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    (_, rpe_k, _) = build_rpe(get_rpe_config(skip=1, ndim=3), 8, 2)
    with pytest.raises(ValueError, match=message):
        rpe_k(torch.randn(1, 2, 25, 8), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ndim=0), "ndim=0; expected at least 1"),
        (dict(ndim=5), "ndim=5; expected 1 to 4 axes"),
        (dict(ratio=()), r"ratio=\(\); expected a finite number above 0"),
        (dict(ratio=(1.9, 1.9, 1.9)), "expected one number, or for product and cross one for each of 2 axes"),
        (dict(ratio=(1.9, 1.9), method="euc"), "expected one number"),
        (dict(ratio=(1.9, -1)), "expected a finite number above 0"),
    ],
)
def test_configurations_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_rpe_config(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("product", (1.9, 2.9), (3.8, 5.8), (15.2, 23.2), 3), r"alpha=\(1.9, 2.9\) .* one for each of 3 axes"),
        (("product", 1.9, 3.8, (15.2, 23.2, 15.2), 2), "gamma=.* one for each of 2 axes"),
        (("quant", (1.9, 1.9), 3.8, 15.2, 2), "alpha=.* expected one number"),
        (("product", 1.9, 3.8, 15.2, 0), "ndim=0; expected at least 1"),
        (("product", 1.9, 3.8, 15.2, 5), "ndim=5; expected 1 to 4 axes"),
    ],
)
def test_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_num_buckets(*arguments)


def test_cross_whose_axes_differ_has_no_one_number_of_buckets():
    *_, rpe_v = build_rpe(get_rpe_config((1.0, 1.9, 2.9), "cross", skip=1, rpe_on="v", ndim=3), 8, 2)
    assert rpe_v.num_buckets is None and [one.num_buckets for one in rpe_v.parts()] == [6, 8, 12]
    *_, rpe_v = build_rpe(get_rpe_config(1.9, "cross", skip=1, rpe_on="v", ndim=3), 8, 2)
    assert rpe_v.num_buckets == 8
    rpe_v.own = nn.Linear(1, 1)  # what somebody adds is no encoding
    assert [one.num_buckets for one in rpe_v.parts()] == [8, 8, 8]


@pytest.mark.parametrize(
    ("config", "printed"),
    [
        (get_rpe_config((1.0, 1.9, 2.9), skip=1, ndim=3), "num_buckets=386, skip=1, alpha=1x1.9x2.9, ndim=3)"),
        (get_rpe_config(2, ndim=1), "num_buckets=9, skip=0, alpha=2, ndim=1)"),
        (get_rpe_config((1.9, 2.0)), "num_buckets=63, skip=0, alpha=1.9x2)"),
    ],
)
def test_print_says_the_axes(config, printed):
    _, rpe_k, _ = build_rpe(config, 8, 2)
    assert repr(nn.Sequential(rpe_k)).splitlines()[1].endswith(printed), rpe_k


@given(
    ratios=st.lists(st.floats(0.6, 50), min_size=1, max_size=4),
    method=st.sampled_from(["product", "cross"]),
    ndim=st.integers(1, 4),
    skip=st.integers(0, 2),
    clip=st.booleans(),
)
def test_dict_and_string_forms_go_both_ways(ratios, method, ndim, skip, clip):
    ratio = tuple(ratios) if len(ratios) == ndim > 1 else ratios[0]
    text = rpe_config_to_string(get_rpe_config(ratio, method, "ctx", False, skip, "qk", ndim)) + "-clip" * clip
    config = rpe_config_from_string(text, skip=skip)
    assert config.rpe_k.ndim == ndim and (
        clip or config == get_rpe_config(ratio, method, "ctx", False, skip, "qk", ndim)
    )
    assert rpe_config_to_string(config) == text
    assert rpe_config_from_dict(json.loads(json.dumps(rpe_config_to_dict(config)))) == config


def test_string_forms_are_the_documented_ones():
    for text, config in (
        ("rpe-1.9-product-ctx-1-k-3d", get_rpe_config(ndim=3)),
        ("rpe-20.0-euc-ctx-1-k-1d", get_rpe_config(20, "euc", ndim=1)),
        ("rpe-1.0x1.9x1.9-product-ctx-1-k-3d", get_rpe_config((1.0, 1.9, 1.9), ndim=3)),
        ("rpe-1.9x2.5-product-ctx-1-k", get_rpe_config((1.9, 2.5))),
    ):
        assert rpe_config_from_string(text) == config and rpe_config_to_string(config) == text
    clipped = rpe_config_from_string("rpe-1.0x1.9-product-ctx-1-k-clip").rpe_k
    assert (clipped.alpha, clipped.beta, clipped.gamma) == ((2.0, 3.0), (2.0, 3.0), (8.0, 15.2))
    old = rpe_config_to_dict(get_rpe_config())
    del old["rpe_k"]["ndim"]  # written before there were other maps than images
    assert rpe_config_from_dict(old) == get_rpe_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rpe-1.0x1.9x1.9-product-ctx-1-k", "one for each of 2 axes"),
        ("rpe-1.0x1.9x1.9-euc-ctx-1-k-3d", "expected one number"),
        ("rpe-1.9-product-ctx-1-k-7d", "expected 1 to 4 axes"),
        ("rpe-1.9-product-ctx-1-k-clip-3d", "another form.*-clip at its end"),
        ("rpe-1.9x-product-ctx-1-k-2d", "could not convert"),
    ],
)
def test_strings_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        rpe_config_from_string(text)
