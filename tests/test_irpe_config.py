import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import METHODS

import irpe
from irpe import (
    METHOD,
    RPEConfig,
    get_rpe_config,
    get_single_rpe_config,
    piecewise_index,
    rpe_config_from_dict,
    rpe_config_from_string,
    rpe_config_to_dict,
    rpe_config_to_string,
)


def test_defaults_are_the_paper_s_and_the_signature_is_fixed():
    config = get_rpe_config()
    assert (config.rpe_q, config.rpe_v) == (None, None)
    k = config.rpe_k
    assert (k.method, k.mode, k.shared_head, k.skip) == (METHOD.PRODUCT, "contextual", True, 0)
    assert (k.alpha, k.beta, k.gamma, k.num_buckets) == (1.9, 3.8, 15.2, 49)
    names = "ratio method mode shared_head skip rpe_on".split()
    assert list(inspect.signature(get_rpe_config).parameters) == [*names, "ndim"]
    assert list(inspect.signature(get_single_rpe_config).parameters) == [*names[:-1], "ndim"]
    numbers = dict(EUCLIDEAN=0, QUANT=1, PRODUCT=3, CROSS=4, CROSS_ROWS=41, CROSS_COLS=42)
    numbers |= dict(CROSS_DEPTH=43, CROSS_TIME=44)  # ours, for maps of three and four axes
    assert {name: METHOD[name] for name in numbers} == numbers


@pytest.mark.parametrize(
    ("method", "ratio", "skip", "expected"),
    [("euc", 20, 0, 81), ("euc", 20, 1, 82), ("quant", 33, 1, 134), ("cross", 20, 1, 82), ("product", 1.9, 1, 50)]
    + [("product", ratio, 0, side**2) for ratio, side in [(1.9, 7), (2.0, 9), (2.5, 11), (3.0, 13)]],
)
def test_num_buckets(method, ratio, skip, expected):
    assert get_single_rpe_config(ratio, method, skip=skip).num_buckets == expected


def test_method_and_mode_have_several_spellings():
    assert get_rpe_config(method="product") == get_rpe_config(method=METHOD.PRODUCT) == get_rpe_config(method=3)
    assert get_rpe_config(mode="ctx") == get_rpe_config(mode="contextual")
    assert get_rpe_config(rpe_on="vq").rpe_q == get_rpe_config(rpe_on="qv").rpe_v


def test_configurations_are_frozen_hashable_and_readable():
    config = get_rpe_config(skip=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rpe_k.skip = 2
    assert hash(config) == hash(get_rpe_config(skip=1))
    assert config != get_rpe_config(skip=2)
    assert eval(repr(config), vars(irpe)) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config.rpe_k, skip=0).num_buckets == 49


configs = st.builds(
    get_rpe_config,
    ratio=st.floats(0.3, 50),
    method=st.sampled_from(METHODS),
    mode=st.just("ctx"),
    shared_head=st.booleans(),
    skip=st.integers(0, 5),
    rpe_on=st.sampled_from(["q", "k", "v", "qk", "kv", "qkv"]),
)


@given(configs)
def test_dict_and_string_forms_go_both_ways(config):
    as_json = json.loads(json.dumps(rpe_config_to_dict(config)))
    assert rpe_config_from_dict(as_json) == config
    single = config.rpe_q or config.rpe_k or config.rpe_v
    assert rpe_config_from_string(rpe_config_to_string(config), skip=single.skip) == config


def test_string_form_is_the_documented_one():
    assert rpe_config_to_string(get_rpe_config(2.0, skip=1)) == "rpe-2.0-product-ctx-1-k"
    assert rpe_config_to_string(get_rpe_config(20, "cross", "bias", False, rpe_on="kq")) == "rpe-20.0-cross-bias-0-qk"


@given(configs)
def test_clipped_offsets(config):
    """As many buckets as without, -b to b; the string form goes both ways."""
    single = config.rpe_q or config.rpe_k or config.rpe_v
    if int(single.beta) < 1:
        return
    text = rpe_config_to_string(config) + "-clip"
    clipped = rpe_config_from_string(text, skip=single.skip)
    assert rpe_config_to_string(clipped) == text
    one, b = clipped.rpe_q or clipped.rpe_k or clipped.rpe_v, int(single.beta)
    assert one.num_buckets == single.num_buckets
    assert one == dataclasses.replace(single, alpha=b, beta=b)
    x = torch.linspace(-4 * b, 4 * b, 97, dtype=torch.float64)
    found = piecewise_index(x, one.alpha, one.beta, one.gamma, dtype=torch.long)
    assert torch.equal(found, x.round().clamp(-b, b).long())


def test_bias_configurations_survive_the_dict():
    config = RPEConfig(rpe_q=get_single_rpe_config(20, "cross", "bias", False), rpe_v=get_single_rpe_config(skip=3))
    assert rpe_config_from_dict(rpe_config_to_dict(config)) == config


def test_what_has_no_string_form_says_so():
    different = RPEConfig(rpe_q=get_single_rpe_config(1.9), rpe_k=get_single_rpe_config(2.0))
    with pytest.raises(ValueError, match="different"):
        rpe_config_to_string(different)
    with pytest.raises(ValueError, match="or none"):
        rpe_config_to_string(RPEConfig())
    with pytest.raises(ValueError, match="1 : 2 : 8"):
        rpe_config_to_string(RPEConfig(rpe_k=dataclasses.replace(get_single_rpe_config(), gamma=10.0)))


def test_help_explains_every_argument():
    text = inspect.getdoc(get_rpe_config)
    for name in inspect.signature(get_rpe_config).parameters:
        assert f"\n    {name}: " in text
    for word in [*METHODS, "ctx", "bias", "0"]:
        assert word in text
