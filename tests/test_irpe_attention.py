import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS
from torch import nn

from irpe import RPEConfig, build_rpe, get_rpe_config, get_single_rpe_config, rpe_attention
from rpe_ops import _native, reference

NAMED = ["eager", "sdpa", "reference"] + ["cpu"] * ("cpu" in _native.LOADED)
HEIGHT, WIDTH, SKIP, DIM, HEADS = 3, 4, 1, 8, 2
TOKENS = SKIP + HEIGHT * WIDTH
SIZE = dict(height=HEIGHT, width=WIDTH)


def random_rpe(config, head_dim=DIM, num_heads=HEADS, dtype=torch.float64):
    modules = build_rpe(config, head_dim, num_heads, dtype=dtype)
    for module in modules:
        for table in [] if module is None else module.parameters():
            nn.init.normal_(table)
    return modules


def random_qkv(dtype=torch.float64, tokens=TOKENS):
    """As timm and DeiT cut them out of one projection: (B, H, L, D), not contiguous."""
    return torch.randn(2, tokens, 3, HEADS, DIM, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def five_steps(q, k, v, rpe_q, rpe_k, rpe_v, mask=None, height=HEIGHT, width=WIDTH):
    """The body of SPEC's step 4, line by line."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    attn = q @ k.transpose(-2, -1)
    if rpe_k is not None:
        attn += rpe_k(q, height=height, width=width)
    if rpe_q is not None:
        attn += rpe_q(k * scale, height=height, width=width).transpose(2, 3)
    if mask is not None:
        attn = attn.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else attn + mask
    attn = attn.softmax(dim=-1)
    out = attn @ v
    if rpe_v is not None:
        out += rpe_v(attn, height=height, width=width)
    return out


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    mode=st.sampled_from(["ctx", "bias"]),
    shared=st.booleans(),
    rpe_on=st.sampled_from(["q", "k", "v", "qk", "kv", "qv", "qkv"]),
    mask=st.sampled_from([None, "bool", "float", "padding"]),
    backend=st.sampled_from([None, *NAMED]),
    train=st.booleans(),
)
def test_every_backend_equals_the_five_steps(method, mode, shared, rpe_on, mask, backend, train):
    if "v" in rpe_on:
        mode = "ctx"
        backend = "eager" if backend == "sdpa" else backend
    rpe = random_rpe(get_rpe_config(1.9, method, mode, shared, SKIP, rpe_on))
    q, k, v = random_qkv()
    attn_mask = None
    if mask == "padding":
        attn_mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
        attn_mask[0, ..., -3:] = False
    elif mask is not None:
        attn_mask = torch.rand(TOKENS, TOKENS) > 0.3
        attn_mask.fill_diagonal_(True)
        if mask == "float":
            attn_mask = torch.randn(2, 1, TOKENS, TOKENS, dtype=torch.float64).masked_fill(~attn_mask, -torch.inf)
    with torch.set_grad_enabled(train):
        expected = five_steps(q, k, v, *rpe, attn_mask)
        out = rpe_attention(q, k, v, *rpe, **SIZE, attn_mask=attn_mask, backend=backend)
    tolerance = 1e-5 if backend == "reference" else 1e-12
    assert relative_error(out, expected) < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_of_the_five_steps(method):
    rpe = random_rpe(get_rpe_config(1.9, method, "ctx", False, SKIP, "qkv"))
    tables = [t for module in rpe for t in module.parameters()]
    q, k, v = (t.detach().requires_grad_() for t in random_qkv())
    grad = torch.randn(2, HEADS, TOKENS, DIM, dtype=torch.float64)
    expected = torch.autograd.grad(five_steps(q, k, v, *rpe), (q, k, v, *tables), grad)
    for backend in (None, "eager", "reference"):
        actual = torch.autograd.grad(rpe_attention(q, k, v, *rpe, **SIZE, backend=backend), (q, k, v, *tables), grad)
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < 1e-10


def test_different_configurations_on_q_k_and_v():
    config = RPEConfig(
        get_single_rpe_config(20, "cross", "bias", False, SKIP),
        get_single_rpe_config(33, "quant", "ctx", True, SKIP),
        get_single_rpe_config(1.9, "product", "ctx", False, SKIP),
    )
    rpe = random_rpe(config)
    q, k, v = random_qkv()
    expected = five_steps(q, k, v, *rpe)
    for backend in (None, "eager", "reference"):
        assert relative_error(rpe_attention(q, k, v, *rpe, **SIZE, backend=backend), expected) < 1e-10


def test_without_encodings_it_is_sdpa_also_between_other_tokens():
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    for backend in (None, "eager", "sdpa", "reference"):
        torch.testing.assert_close(rpe_attention(q, k, v, backend=backend), expected)
    torch.testing.assert_close(
        rpe_attention(q, k, v, scale=0.3, backend="eager"), F.scaled_dot_product_attention(q, k, v, scale=0.3)
    )


def test_zero_tables_change_nothing():
    q, k, v = random_qkv()
    rpe = build_rpe(get_rpe_config(skip=SKIP, rpe_on="qkv"), DIM, HEADS, dtype=torch.float64)
    out = rpe_attention(q, k, v, *rpe, **SIZE)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [None, "eager", "sdpa", "reference"])
@pytest.mark.parametrize("rpe_on", ["k", "kv"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_a_key_are_zero_and_have_finite_gradients(backend, rpe_on, kind):
    if (backend, rpe_on) == ("sdpa", "kv"):
        pytest.skip("sdpa has no encoding on values")
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[0, :, 5] = False
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    rpe = random_rpe(get_rpe_config(skip=SKIP, rpe_on=rpe_on))
    q, k, v = (t.detach().requires_grad_() for t in random_qkv())
    out = rpe_attention(q, k, v, *rpe, **SIZE, attn_mask=mask, backend=backend)
    assert not out[0, :, 5].any()
    assert out.isfinite().all() and out[1].ne(0).all()
    out.sum().backward()
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    assert all(t.grad.isfinite().all() for t in (q, k, v, *tables))


def test_values_see_the_weights_after_dropout():
    rpe = random_rpe(get_rpe_config(skip=SKIP, rpe_on="kv"))
    q, k, v = random_qkv()
    torch.manual_seed(1)
    out = rpe_attention(q, k, v, *rpe, **SIZE, dropout_p=0.5)
    weights = (q * DIM**-0.5 @ k.transpose(-2, -1) + rpe[1](q * DIM**-0.5, **SIZE)).softmax(-1)
    torch.manual_seed(1)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    weights = weights * reference.dropout_weights(seed, weights.shape, 0.5)
    torch.testing.assert_close(out, weights @ v + rpe[2](weights, **SIZE))
    for backend in ("eager", "reference"):
        torch.manual_seed(1)
        torch.testing.assert_close(rpe_attention(q, k, v, *rpe, **SIZE, dropout_p=0.5, backend=backend), out)


def test_half_precision_keeps_its_dtype_and_is_as_exact_as_sdpa():
    rpe = random_rpe(get_rpe_config(skip=SKIP, rpe_on="qkv"), dtype=torch.bfloat16)
    q, k, v = random_qkv(torch.bfloat16)
    mask = torch.zeros(TOKENS, TOKENS)
    out = rpe_attention(q, k, v, *rpe, **SIZE, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    exact = five_steps(q.double(), k.double(), v.double(), *(m.double() for m in rpe))
    assert relative_error(out, exact) < 32 * torch.finfo(torch.bfloat16).eps


def test_autocast():
    rpe = random_rpe(get_rpe_config(skip=SKIP, rpe_on="qkv"), dtype=torch.float32)
    q, k, v = (t.detach().requires_grad_() for t in random_qkv(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rpe_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *rpe, **SIZE)
    out.float().sum().backward()
    assert all(t.grad is not None for module in rpe for t in module.parameters())


def test_signature_is_fixed():
    kinds = {name: p.kind for name, p in inspect.signature(rpe_attention).parameters.items()}
    assert list(kinds) == (
        "q k v rpe_q rpe_k rpe_v height width size positions scale attn_mask dropout_p backend".split()
    )
    assert all(kinds[name] == inspect.Parameter.KEYWORD_ONLY for name in list(kinds)[6:])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(backend="gpu"), ValueError, "unknown backend 'gpu'"),
        (dict(backend="sdpa"), ValueError, "values"),
        (dict(rpe_k="v"), ValueError, "rpe_k is an encoding for values"),
        (dict(rpe_v="k"), ValueError, "rpe_v is an encoding for keys"),
        (dict(attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.long)), TypeError, "torch.int64"),
        (dict(height=4), ValueError, "height=4"),
        (dict(width=None), ValueError, "both or neither"),
        (dict(k=torch.randn(2, HEADS, 5, DIM, dtype=torch.float64)), ValueError, "13 queries and 5 keys"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, match):
    rpe = dict(zip("qkv", random_rpe(get_rpe_config(skip=SKIP, rpe_on="qkv")), strict=True))
    q, k, v = random_qkv()
    call = dict(q=q, k=k, v=v, rpe_k=rpe["k"], rpe_v=rpe["v"], **SIZE)
    call |= {name: rpe[value] if name.startswith("rpe_") else value for name, value in change.items()}
    with pytest.raises(error, match=match):
        rpe_attention(**call)
