import math

import pytest
import torch
from conftest import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import FORMULAS, TABLES

from irpe import METHOD, get_bucket_ids_2d, get_bucket_map, get_num_buckets, piecewise_index


def g(x, alpha, beta, gamma):
    """SPEC section 1, in Python floats."""
    if abs(x) <= alpha:
        return round(x)
    far = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(int(min(beta, far)), x))


def loop_id(method, query, key, width, skip, ratio):
    """Bucket of one pair of tokens, straight from the definition."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    b = int(beta)
    if query < skip or key < skip:
        return (2 * b + 1) ** 2 if method == "product" else 2 * b + 1
    dr = (query - skip) // width - (key - skip) // width
    dc = (query - skip) % width - (key - skip) % width
    return FORMULAS[method](dr, dc, lambda x: g(x, alpha, beta, gamma), b)


def ids_of(method, height, width, skip, ratio, **kwargs):
    return get_bucket_ids_2d(method, height, width, skip, ratio, 2 * ratio, 8 * ratio, **kwargs)


def test_all_golden_ids_exactly():
    arrays, _ = load_golden("bucket_ids")
    assert len(arrays) == 540
    for key, expected in arrays.items():
        method, ratio, size, skip = key.split("|")
        height, width = map(int, size.split("x"))
        ids, num_buckets = ids_of(method, height, width, int(skip[4:]), float(ratio))
        assert num_buckets == expected[0], key
        assert ids.flatten().tolist() == expected[1:].tolist(), key


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(TABLES),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    skip=st.integers(0, 5),
    ratio=st.one_of(st.sampled_from([0.4, 1.0, 1.9, 2.0, 2.5, 3.0, 20, 33]), st.floats(0.2, 40)),
)
def test_ids_equal_brute_force(method, height, width, skip, ratio):
    ids, num_buckets = ids_of(method, height, width, skip, ratio)
    tokens = range(skip + height * width)
    assert ids.tolist() == [[loop_id(method, i, j, width, skip, ratio) for j in tokens] for i in tokens]
    assert num_buckets == get_num_buckets(method, ratio, 2 * ratio, 8 * ratio) + (skip > 0)
    assert ids.min() >= 0 and ids.max() < num_buckets


@pytest.mark.parametrize(("method", "ratio", "used"), [("euc", 20, 20), ("quant", 33, 51), ("product", 1.9, 50)])
def test_used_ids_are_the_counts_of_the_paper_s_table_1(method, ratio, used):
    assert len(ids_of(method, 14, 14, 1, ratio)[0].unique()) == used


def test_used_ids_of_cross_are_the_count_of_the_paper_s_table_1():
    counts = [len(ids_of(method, 14, 14, 1, 20)[0].unique()) for method in ("cross_rows", "cross_cols")]
    assert counts == [28, 28]


@pytest.mark.parametrize("method", TABLES)
def test_offset_map_holds_the_ids_of_every_pair(method):
    height, width = 4, 7
    offsets = get_bucket_map(method, (height, width), 0, 1.9, 3.8, 15.2).grid()
    ids = ids_of(method, height, width, 0, 1.9)[0]
    assert offsets.shape == (2 * height - 1, 2 * width - 1)
    for i in range(height * width):
        for j in range(height * width):
            dr, dc = i // width - j // width, i % width - j % width
            assert offsets[height - 1 + dr, width - 1 + dc] == ids[i, j]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_have_the_dtype_that_was_asked_for(dtype):
    ids = ids_of("product", 5, 9, 2, 3.0, dtype=dtype)[0]
    assert ids.dtype == dtype
    assert torch.equal(ids.long(), ids_of("product", 5, 9, 2, 3.0)[0])


@given(st.integers(-3000, 3000), st.floats(0.3, 40))
def test_piecewise_index_is_the_scalar_formula_odd_and_bounded(x, ratio):
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    y = piecewise_index(torch.tensor([x, -x]), alpha, beta, gamma, torch.int32)
    assert y.tolist() == [g(x, alpha, beta, gamma), -g(x, alpha, beta, gamma)]
    assert y.dtype == torch.int32 and y.abs().max() <= max(int(beta), round(alpha))


def test_piecewise_index_leaves_its_input_alone():
    x = torch.arange(-5, 6)
    before = x.clone()
    piecewise_index(x, 1.9, 3.8, 15.2, torch.long)
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", [METHOD.CROSS, "cross"])
def test_cross_has_no_single_map(method):
    with pytest.raises(ValueError, match="CROSS_ROWS"):
        ids_of(method, 3, 4, 0, 20)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (dict(height=0), ValueError, "height=0"),
        (dict(width=-2), ValueError, "width=-2"),
        (dict(height=2.0), TypeError, "height=2.0"),
        (dict(width=True), TypeError, "width=True"),
        (dict(skip=-1), ValueError, "skip=-1"),
        (dict(method="euclid"), ValueError, "euclid"),
        (dict(method=7), ValueError, "7"),
        (dict(ratio=float("nan")), ValueError, "nan"),
        (dict(ratio=0.0), ValueError, "alpha"),
    ],
)
def test_bad_input_gets_a_sentence(kwargs, error, match):
    with pytest.raises(error, match=match):
        ids_of(**(dict(method="product", height=3, width=4, skip=1, ratio=1.9) | kwargs))
