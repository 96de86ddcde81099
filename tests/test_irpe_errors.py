"""Bad input gets a sentence, never a wrong number: a test for each row."""

import pytest
import torch

from irpe import (
    RPEConfig,
    SingleRPEConfig,
    build_rpe,
    get_rpe_config,
    get_single_rpe_config,
    iRPE,
    iRPE_Cross,
    rpe_config_from_string,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(method="euclidean"), r"'euclidean'.*euc, quant, product, cross"),
        (dict(method=2), r"unknown method 2"),
        (dict(method=None), r"unknown method None"),
        (dict(mode="context"), r"'context'.*ctx, contextual, bias"),
        (dict(mode=None), r"unknown mode None"),
        (dict(ratio=0), r"ratio=0;.*above 0"),
        (dict(ratio=-1.9), r"ratio=-1.9"),
        (dict(ratio=NAN), r"ratio=nan"),
        (dict(ratio=INF), r"ratio=inf"),
        (dict(ratio="1.9"), r"ratio='1.9'"),
        (dict(skip=-1), r"skip=-1; expected at least 0"),
        (dict(rpe_on=""), r"rpe_on=''.*q, k, v"),
        (dict(rpe_on="kx"), r"rpe_on='kx'"),
        (dict(rpe_on="kk"), r"rpe_on='kk'"),
        (dict(rpe_on=None), r"rpe_on=None"),
        (dict(mode="bias", rpe_on="v"), r"bias.*values.*ctx"),
        (dict(mode="bias", rpe_on="qkv"), r"bias.*values.*ctx"),
    ],
)
def test_configuration(kwargs, match):
    with pytest.raises(ValueError, match=match):
        get_rpe_config(**kwargs)


def test_skip_has_to_be_an_integer():
    for skip in (1.0, True, "1"):
        with pytest.raises(TypeError, match="skip="):
            get_rpe_config(skip=skip)


@pytest.mark.parametrize("piecewise", [(2, 1, 8), (2, 4, 2), (0, 1, 2), (1, INF, 8), (1, 2, NAN)])
def test_piecewise_parameters(piecewise):
    with pytest.raises(ValueError, match="alpha="):
        SingleRPEConfig("product", "ctx", True, 0, *piecewise)


@pytest.mark.parametrize(
    "text",
    ["", "rpe", "rpe-1.9-product-ctx-1", "rpe-1.9-product-ctx-2-k", "rpe-x-product-ctx-1-k", "rpe-1.9-prod-ctx-1-k",
     "rpe--1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-k-", " rpe-1.9-product-ctx-1-k", "rpe-1.9-cross-bias-1-v",
     "rpe-nan-product-ctx-1-k", "rpe-1.9-product-ctx-1-clip", "rpe-0.4-product-ctx-1-k-clip",
     "rpe-1.9-product-ctx-1-k-klip"],
)  # fmt: skip
def test_string_form(text):
    with pytest.raises(ValueError, match="rpe-2.0-product-ctx-1-k"):
        rpe_config_from_string(text)


@pytest.mark.parametrize("name", ["head_dim", "num_heads"])
@pytest.mark.parametrize("make", ["build_rpe", "iRPE"])
def test_sizes_of_the_attention(name, make):
    def call(**kwargs):
        sizes = dict(head_dim=8, num_heads=2) | kwargs
        return build_rpe(get_rpe_config(), **sizes) if make == "build_rpe" else iRPE(**sizes)

    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name}={value}; expected at least 1"):
            call(**{name: value})
    with pytest.raises(TypeError, match=f"{name}=8.0"):
        call(**{name: 8.0})


def test_construction():
    with pytest.raises(ValueError, match=r"bias.*values"):
        iRPE(8, 2, mode="bias", transposed=False)
    with pytest.raises(ValueError, match=r"bias.*values"):
        RPEConfig(rpe_v=get_single_rpe_config(mode="bias"))
    with pytest.raises(ValueError, match=r"num_buckets=7.*49"):
        iRPE(8, 2, num_buckets=7)
    with pytest.raises(ValueError, match="iRPE_Cross"):
        iRPE(8, 2, method="cross")
    with pytest.raises(ValueError, match="use iRPE"):
        iRPE_Cross("product", 8, 2)
    for config in (get_single_rpe_config(), "rpe-1.9-product-ctx-1-k", 3):
        with pytest.raises(TypeError, match="get_rpe_config"):
            build_rpe(config, 8, 2)


def rpe(where="k", shared=False, skip=1):
    (module,) = [
        m for m in build_rpe(get_rpe_config(skip=skip, shared_head=shared, rpe_on=where), 8, 2) if m is not None
    ]
    return module


@pytest.mark.parametrize(
    ("where", "shape", "size", "match"),
    [
        ("k", (2, 13, 8), {}, r"\(2, 13, 8\).*\(B, H, L, D\)"),
        ("k", (13, 8), {}, r"\(13, 8\)"),
        ("k", (1, 2, 3, 13, 8), {}, r"\(1, 2, 3, 13, 8\)"),
        ("k", (1, 2, 13, 9), {}, r"last size 8"),
        ("k", (1, 3, 10, 8), {}, r"3 heads.*tables for 2"),
        ("v", (1, 2, 10, 9), {}, r"\(B, H, L, L\).*last size 10"),
        ("k", (1, 2, 13, 8), {}, r"13 tokens with skip=1 leave 12.*not a square.*height= and width="),
        ("k", (1, 2, 257, 8), dict(height=16), r"height=16, width=None.*both"),
        ("k", (1, 2, 257, 8), dict(width=16), r"height=None, width=16.*both"),
        ("k", (1, 2, 13, 8), dict(height=3, width=3), r"skip=1 \+ height=3 \* width=3 = 10 tokens.*has 13"),
        ("k", (1, 2, 12, 8), dict(height=3, width=4), r"= 13 tokens.*has 12"),
        ("k", (1, 2, 1, 8), dict(height=0, width=4), r"height=0; expected at least 1"),
        ("k", (1, 2, 1, 8), dict(height=2, width=0), r"width=0"),
        ("k", (1, 2, 1, 8), {}, r"1 tokens with skip=1 leave 0"),
        ("k", (1, 2, 0, 8), {}, r"0 tokens with skip=1 leave -1"),
    ],
)
def test_input_shapes(where, shape, size, match):
    with pytest.raises(ValueError, match=match):
        rpe(where)(torch.zeros(shape), **size)


def test_a_shared_table_takes_any_number_of_heads():
    assert rpe(shared=True)(torch.zeros(1, 5, 10, 8)).shape == (1, 5, 10, 10)


@pytest.mark.parametrize("height", [3.0, "3", True, None])
def test_height_is_an_integer(height):
    with pytest.raises((TypeError, ValueError), match=f"height={height!r}"):
        rpe()(torch.zeros(1, 2, 13, 8), height=height, width=4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("where", "kv")
def test_inputs_are_real_and_floating(dtype, where):
    with pytest.raises(TypeError, match=str(dtype)):
        rpe(where)(torch.zeros(1, 2, 10, 10 if where == "v" else 8, dtype=dtype))


def test_inputs_are_tensors():
    with pytest.raises(TypeError, match="list"):
        rpe()([[1.0]])


@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_tables_and_inputs_are_of_one_dtype_and_on_one_device(mode):
    module = build_rpe(get_rpe_config(mode=mode), 8, 2)[1]
    with pytest.raises(TypeError, match=r"torch.float64, the table torch.float32.*autocast"):
        module(torch.zeros(1, 2, 9, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="the input is on meta, the table on cpu"):
        module(torch.zeros(1, 2, 9, 8, device="meta"))


def test_errors_leave_nothing_behind():
    module = rpe()
    x = torch.randn(1, 2, 13, 8)
    with pytest.raises(ValueError, match="13 tokens"):
        module(x)
    assert module(x, height=3, width=4).shape == (1, 2, 13, 13)
