import math
import os
from pathlib import Path

import pytest
import torch
from attention_cases import ISAS, assert_rule_9, make_mask, problem, run, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from methods import METHODS, TABLES

import rpe_ops
import rpe_ops.rpe_attention_cpu as cpu
from irpe import build_rpe, get_bucket_ids_2d, get_rpe_config
from irpe import rpe_attention as irpe_attention
from rpe_ops import _native, reference
from rpe_ops.rpe_attention import choose, rpe_attention, why_not
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

needs_build = pytest.mark.skipif("cpu" not in _native.LOADED, reason=_native.MISSING.get("cpu", ""))
BACKENDS = [pytest.param("cpu", marks=needs_build), "eager", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@needs_build
@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    dim=st.sampled_from([8, 16, 20, 32, 64, 72, 256]),
    buckets=st.sampled_from([1, 5, 16, 17, 33, 50, 82, 300]),
    terms=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    mask=st.sampled_from([None, "padding", "bool", "float"]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "timm", "detr", "gaps"]),
    weights=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_cpu_is_as_exact_as_the_formula(
    batch, heads, queries, keys, dim, buckets, terms, mask, dropout_p, dtype, layout, weights, seed
):
    torch.manual_seed(seed)
    arguments = problem((batch, heads, queries, keys, dim), buckets, terms, dtype, layout, weights=weights)
    options = dict(attn_mask=make_mask(mask, (batch, heads, queries, keys)), dropout_p=dropout_p)
    assert_rule_9(arguments, dtype, **options, seed=torch.tensor([-3]))


@needs_build
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", TABLES)
@pytest.mark.parametrize(("height", "width"), [(6, 9), (13, 17)])
def test_maps_of_images_on_every_instruction_set(isa, method, height, width, monkeypatch):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    ids, buckets = get_bucket_ids_2d(method, height, width, 1, 1.9, 3.8, 15.2)
    tokens = 1 + height * width
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = problem((1, 2, tokens, tokens, 24), buckets, (1, 1, 1), dtype, "timm", ids)
        assert_rule_9(arguments, dtype, seed=torch.tensor([5]), dropout_p=0.2)


@needs_build
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    isa=st.sampled_from([*ISAS[-2:], ISAS[-1]]),
    queries=st.integers(1, 70),
    keys=st.integers(1, 90),
    dim=st.sampled_from([1, 7, 16, 24, 33, 64, 80]),
    buckets=st.sampled_from([1, 7, 17, 50, 300]),
    mask=st.sampled_from([None, "padding", "bool", "float"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    layout=st.sampled_from(["contiguous", "timm", "gaps"]),
    weights=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bfloat16_is_as_exact_as_the_formula(
    monkeypatch, isa, queries, keys, dim, buckets, mask, dropout_p, layout, weights, seed
):
    monkeypatch.setenv("RPE_OPS_ISA", isa)
    torch.manual_seed(seed)
    shape = (1, 2, queries, keys, dim)
    arguments = problem(shape, buckets, (1, 1, 1), torch.bfloat16, layout, weights=weights)
    options = dict(attn_mask=make_mask(mask, shape[:4]), dropout_p=dropout_p, seed=torch.tensor([9]))
    assert_rule_9(arguments, torch.bfloat16, **options)


@needs_build
def test_bfloat16_is_multiplied_as_such_where_the_machine_can(monkeypatch):
    assert (ISAS[-1] == "avx512_bf16") == cpu.IN_BFLOAT16
    arguments = problem((1, 2, 40, 37, 24), 9, (1, 1, 1), torch.bfloat16, weights=True)
    grads = [torch.randn(1, 2, 40, 24, dtype=torch.bfloat16)]
    own = run(rpe_attention, arguments, grads, torch.bfloat16, backend="cpu")
    monkeypatch.setenv("RPE_OPS_ISA", ISAS[-2] if cpu.IN_BFLOAT16 else ISAS[-1])
    widened = run(rpe_attention, arguments, grads, torch.bfloat16, backend="cpu")
    for one, other in zip([*own[0], *own[1]], [*widened[0], *widened[1]], strict=True):
        assert torch.equal(one, other) != cpu.IN_BFLOAT16
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * other.abs().max().item())


@needs_build
def test_the_instruction_set_is_the_machine_s_or_a_lower_one_by_name(monkeypatch):
    for isa in ISAS:
        monkeypatch.setenv("RPE_OPS_ISA", isa)
        assert cpu.isa() == isa and f"with {isa}," in rpe_ops.backends()["cpu"]
    monkeypatch.setenv("RPE_OPS_ISA", "")
    assert cpu.isa() == ISAS[-1]
    for wish in {"neon", "AVX2", *["avx512_bf16"] * (len(ISAS) < 4)}:
        monkeypatch.setenv("RPE_OPS_ISA", wish)
        sentence = f"RPE_OPS_ISA={wish}: this machine has {', '.join(ISAS)}; expected one of these, or nothing"
        assert rpe_ops.backends()["cpu"] == f"not here: {sentence}"
        calls = (
            lambda: rpe_attention(*torch.randn(3, 1, 1, 5, 8)),
            lambda: rpe_index(torch.randn(1, 1, 2, 3), torch.zeros(2, 5, dtype=torch.int64)),
            lambda: rpe_bucket_sum(torch.randn(1, 1, 2, 5), torch.zeros(2, 5, dtype=torch.int64), 3),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match=sentence):
                call()


@needs_build
def test_an_import_does_not_stumble_over_an_unknown_instruction_set(run_python):
    code = "import rpe_ops; print(rpe_ops.backends()['cpu'])"
    done = run_python(code, path=[Path(rpe_ops.__file__).parents[1]], environment=os.environ | {"RPE_OPS_ISA": "sse9"})
    assert done.stdout.startswith("not here: RPE_OPS_ISA=sse9"), done.stdout


@needs_build
def test_a_scale_of_bfloat16_that_is_no_power_of_two_is_not_rounded():
    # scores of about 100: a scale rounded to 8 bits would be wrong by 0.2
    q, k, v = (torch.randn(1, 1, 30, 24).mul(4).bfloat16() for _ in range(3))
    out, _ = rpe_attention(q, k, v, scale=24**0.5 / 3, backend="cpu")
    exact, _ = rpe_attention(*(x.double() for x in (q, k, v)), scale=24**0.5 / 3, backend="reference")
    assert (out - exact).abs().max() < 2**-7 * exact.abs().max()


@needs_build
def test_more_keys_than_a_tile_of_32_queries_has_room_for():
    for dtype in (torch.float32, torch.bfloat16):
        assert_rule_9(problem((1, 1, 40, 2501, 16), 40, (1, 1, 1), dtype, weights=True), dtype)


@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 0, 5, 8), (2, 2, 5, 0, 8), (0, 2, 5, 5, 8), (1, 0, 3, 3, 8)])
def test_empty(shape, dtype):
    assert_rule_9(problem(shape, 4, (1, 1, 1), dtype), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_a_key_are_zero_and_have_finite_gradients(backend, kind):
    arguments = problem((2, 2, 7, 9, 8), 5, (1, 1, 1), torch.float32)
    mask = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    mask[0, :, 3] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    grads = [torch.randn(2, 2, 7, n) for n in (8, 5)]
    (out, sums), gradients = run(rpe_attention, arguments, grads, torch.float32, attn_mask=mask, backend=backend)
    assert not out[0, :, 3].any() and not sums[0, :, 3].any() and out[1].ne(0).all()
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][0, :, 3].any()


@pytest.mark.parametrize("p", [0.25, 0.9, 1.0])
def test_one_seed_drops_the_same_weights_on_every_backend(p):
    arguments = problem((2, 3, 20, 31, 8), 31, (0, 0, 1), torch.float64)
    ids = torch.arange(31).expand(20, 31)
    arguments = (*arguments[:5], [(ids, 31)])  # the sums are the weights themselves
    drawn = []
    for backend in ["eager", "reference", None] + ["cpu"] * ("cpu" in _native.LOADED):
        torch.manual_seed(7)
        _, (weights,) = rpe_attention(*arguments, dropout_p=p, backend=backend)
        drawn.append(weights)
    for weights in drawn[1:]:
        assert torch.equal(weights == 0, drawn[0] == 0)
        torch.testing.assert_close(weights, drawn[0])
    assert abs((drawn[0] == 0).double().mean() - p) < 0.05
    _, (other,) = rpe_attention(*arguments, dropout_p=p)
    assert p == 1 or not torch.equal(other, drawn[0])


def test_dropped_weights_are_independent_of_position():
    dropped = reference.dropout_weights(torch.tensor([11]), (4, 4, 64, 64), 0.5) == 0
    x = dropped.double() * 2 - 1
    shifted = [(x * x.roll(1, d)).mean().abs() for d in range(4)]
    assert max(shifted) < 5 / math.sqrt(x.numel()) and x.mean().abs() < 5 / math.sqrt(x.numel())


@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 50, 61, 16), (1, 1, 197, 197, 32), (1, 2, 320, 33, 8)])
def test_bitwise_equal_for_every_number_of_threads(shape, dtype, weights):
    arguments = problem(shape, 20, (1, 1, 1), dtype, weights=weights)
    grads = [torch.randn(*shape[:3], n, dtype=dtype) for n in [shape[4]] + [20] * (not weights)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            outputs, gradients = run(rpe_attention, arguments, grads, dtype, backend="cpu")
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@needs_build
@pytest.mark.parametrize("tokens", [197, 577, 1025, 4097])
@pytest.mark.parametrize("heads", [6, 12, 24, 96])
def test_the_tiles_of_a_backward_are_shared_by_all_threads(heads, tokens):
    """Those of few heads too: B = 1 and H = 6 on 16 processors."""
    tiles = math.ceil(tokens / (32 if tokens < 2048 else 16))
    for threads in (1, 2, 3, 4, 6, 8, 16):
        shares = torch.ops.rpe_ops.rpe_attention_shares(torch.empty(0), heads, tokens, threads)
        assert shares.numel() == threads and shares.sum() == heads * tiles
        bound = 1.3 if tokens > 197 else 1.6  # of 7 tiles four parts have two and one
        assert shares.min() > 0 and shares.max() <= bound * heads * tiles / threads


@needs_build
def test_shares_of_nothing_are_refused():
    with pytest.raises(RuntimeError, match="heads=6, tokens=197, threads=0; expected at least 1"):
        torch.ops.rpe_ops.rpe_attention_shares(torch.empty(0), 6, 197, 0)


@needs_build
def test_outputs_do_not_depend_on_uninitialised_memory():
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        ids, buckets = get_bucket_ids_2d("euc", 3, 5, 1, 20, 40, 160)
        assert buckets > len(ids.unique())
        assert_rule_9(problem((2, 2, 16, 16, 20), buckets, (1, 1, 1), torch.float32, "timm", ids), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_build
def test_second_derivatives_are_those_of_the_formula_or_refused():
    q, k, v, on_q, on_k, on_v = problem((1, 2, 6, 5, 4), 3, (1, 1, 1), torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, on_q[0][0], on_k[0][0])]

    def call(backend):
        def function(q, k, v, lut_q, lut_k):
            pairs = [(lut_q, on_q[0][1])], [(lut_k, on_k[0][1])]
            seed = torch.tensor([1])
            out, sums = rpe_attention(q, k, v, *pairs, on_v, dropout_p=0.2, seed=seed, backend=backend)
            return out, *sums

        return function

    assert torch.autograd.gradcheck(call("cpu"), leaves)
    assert torch.autograd.gradgradcheck(call(None), leaves)
    (first,) = torch.autograd.grad(call("cpu")(*leaves)[0].sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="eager"):
        first.sum().backward()


@needs_build
def test_a_mask_that_wants_a_gradient_is_the_formula_s():
    arguments = problem((1, 2, 5, 6, 8), 3, (0, 1, 0), torch.float32)
    mask = torch.randn(5, 6, requires_grad=True)
    with pytest.raises(ValueError, match='backend="cpu" has no gradient of attn_mask'):
        rpe_attention(*arguments, attn_mask=mask, backend="cpu")
    out, _ = rpe_attention(*arguments, attn_mask=mask)
    out.sum().backward()
    assert mask.grad.any()
    with torch.no_grad():
        rpe_attention(*arguments, attn_mask=mask, backend="cpu")


@needs_build
def test_func_transforms():
    q, k, v, on_q, on_k, on_v = problem((2, 2, 6, 5, 8), 3, (1, 1, 1), torch.float64)

    def loss(q, lut, backend):
        out, (sums,) = rpe_attention(q, k, v, on_q, [(lut, on_k[0][1])], on_v, backend=backend)
        return out.sin().sum() + sums.cos().sum()

    lut = on_k[0][0]
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss)(q, lut, "cpu"), transform(loss)(q, lut, "eager"))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, None))
    many = torch.stack([q, 2 * q, -q])
    torch.testing.assert_close(per_sample(many, lut, "cpu"), per_sample(many, lut, "eager"))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: loss(q, lut, "cpu"), (q,), (q,))


@needs_build
def test_compile_and_export():
    q, k, v, on_q, on_k, on_v = problem((2, 2, 9, 9, 8), 3, (1, 1, 1), torch.float32)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            out, (sums,) = rpe_attention(q, k, v, on_q, on_k, on_v)
            return out, sums

    expected = Attention()(q, k, v)
    exported = torch.export.export(Attention(), (q, k, v))
    assert "rpe_ops.rpe_attention.default" in str(exported.graph)
    torch.testing.assert_close(exported.module()(q, k, v), expected)
    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, sums = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*leaves)
    actual = torch.autograd.grad(out.sum() + sums.sin().sum(), leaves)
    out, sums = Attention()(*leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(out.sum() + sums.sin().sum(), leaves), rtol=0, atol=0)


@needs_build
@pytest.mark.parametrize("where", ["func.grad", "fake tensors", "inference mode"])
def test_what_was_called_elsewhere_serves_later_calls(where):
    q, k, v, _, on_k, _ = problem((1, 1, 6, 6, 8), 3, (0, 1, 0), torch.float32)

    def call(q):
        return rpe_attention(q, k, v, on_k=on_k, backend="cpu")[0]

    if where == "func.grad":
        torch.func.grad(lambda q: call(q).sum())(q)
    elif where == "fake tensors":
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call(mode.from_tensor(q))
    else:
        with torch.inference_mode():
            call(q)
    expected, _ = rpe_attention(q, k, v, on_k=on_k, backend="reference")
    torch.testing.assert_close(call(q.requires_grad_()), expected)


@needs_build
def test_ids_outside_the_table_are_named():
    q, k, v, _, on_k, _ = problem((1, 1, 6, 6, 8), 3, (0, 1, 0), torch.float32)
    on_k[0][1][2, 3] = 7
    with pytest.raises(RuntimeError, match=r"7 .*N=3"):
        rpe_attention(q, k, v, on_k=on_k, backend="cpu")


@needs_build
def test_under_autocast_a_weight_of_float32_is_rounded_and_its_gradient_is_not():
    q, k, v, on_q, on_k, on_v = problem((1, 2, 13, 11, 24), 5, (1, 1, 1), torch.bfloat16, weights=True)
    q, k, v = (x.float() for x in (q, k, v))
    tables = [x.float().requires_grad_() for x in (on_q[0][0], on_k[0][0], on_v[0][1])]
    arguments = [(tables[0], on_q[0][1])], [(tables[1], on_k[0][1])], [(on_v[0][0], tables[2])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = rpe_attention(q, k, v, *arguments, backend="cpu")
    grads = torch.autograd.grad(out.sum(), tables)
    wide = [x.detach().double().requires_grad_() for x in tables]
    arguments = [(wide[0], on_q[0][1])], [(wide[1], on_k[0][1])], [(on_v[0][0], wide[2])]
    exact, _ = rpe_attention(*(x.double() for x in (q, k, v)), *arguments, backend="reference")
    for one, truth in zip([out, *grads], [exact, *torch.autograd.grad(exact.sum(), wide)], strict=True):
        assert (one - truth).abs().max() < 2**-6 * truth.abs().max()
    assert all(g.dtype == torch.float32 and not torch.equal(g, g.bfloat16().float()) for g in grads)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_autocast(backend):
    q, k, v, on_q, on_k, on_v = problem((2, 2, 9, 9, 8), 3, (1, 1, 1), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, (sums,) = rpe_attention(q, k, v, on_q, on_k, on_v, backend=backend)
    assert out.dtype == sums.dtype == torch.bfloat16
    exact, _ = reference.rpe_attention(q, k, v, on_q, on_k)
    assert (out - exact).abs().max() < 0.1


@needs_build
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_irpe_takes_it(method, mode):
    rpe = build_rpe(get_rpe_config(1.9, method, mode, False, 1, "qk" if mode == "bias" else "qkv"), 8, 2)
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    for table in tables:
        torch.nn.init.normal_(table)
    q, k, v = (strided((2, 2, 13, 8), torch.float32, "timm").requires_grad_() for _ in range(3))
    size = dict(height=3, width=4)
    expected = irpe_attention(q, k, v, *rpe, **size, backend="eager")
    actual = irpe_attention(q, k, v, *rpe, **size)
    assert "RPEAttention" in str(irpe_attention(q, k, v, rpe[0], rpe[1], **size).grad_fn)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out.sin().sum(), [q, k, v, *tables]) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_why_not():
    assert "q is on meta" in str(why_not("cpu", torch.empty(1, 1, 1, 1, device="meta"))) or "cpu" in _native.MISSING
    assert why_not("eager", torch.empty(1, 1, 1, 1)) is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(backend="gpu"), ValueError, "unknown backend 'gpu'"),
        (dict(k=torch.randn(2, 2, 9, 4)), ValueError, r"\(2, 2, 9, 4\)"),
        (dict(v=torch.randn(2, 2, 9, 8).double()), TypeError, "float64"),
        (dict(q=torch.randn(2, 9, 8)), ValueError, "expected"),
        (dict(dropout_p=1.5), ValueError, "dropout_p=1.5"),
        (dict(attn_mask=torch.zeros(3, 3)), ValueError, "broadcast"),
        (dict(attn_mask=torch.zeros(9, 9, dtype=torch.long)), TypeError, "int64"),
        (dict(on_k=[(torch.randn(2, 2, 8, 3), torch.zeros(9, 9, dtype=torch.long))]), ValueError, "on_k"),
        (dict(on_q=[(torch.randn(2, 2, 9, 3), torch.zeros(9, 8, dtype=torch.long))]), ValueError, "on_q"),
        (dict(on_v=[(torch.zeros(9, 9), 3)]), TypeError, "on_v: ids are torch.float32"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, match):
    call = dict(zip("qkv", torch.randn(3, 2, 2, 9, 8), strict=True)) | change
    with pytest.raises(error, match=match):
        rpe_attention(**call)


@needs_build
@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_short_sequences_are_trained_by_the_formula_where_bfloat16_is_widened(in_bfloat16, monkeypatch):
    monkeypatch.setattr(cpu, "IN_BFLOAT16", in_bfloat16)
    for dtype, tokens, train, expected in (
        (torch.bfloat16, 40, True, "cpu" if in_bfloat16 else "eager"),
        (torch.bfloat16, 40, False, "cpu"),
        (torch.bfloat16, 600, True, "cpu"),
        (torch.float32, 40, True, "cpu"),
    ):
        q, k, v = (torch.randn(1, 1, tokens, 8, dtype=dtype, requires_grad=train) for _ in range(3))
        assert choose(q, k) == expected
        with torch.no_grad():
            assert choose(q, k) == "cpu"
        none, named = (rpe_attention(q, k, v, backend=backend)[0] for backend in (None, expected))
        assert torch.equal(none, named)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_do_not_fit_are_refused(backend):
    q, k, v, on_q, on_k, on_v = problem((2, 3, 5, 7, 8), 4, (1, 1, 1), torch.float32, weights=True)
    good = dict(on_q=on_q, on_k=on_k, on_v=on_v)
    for name, bad, reason in (
        ("on_k", [(torch.randn(2, 8, 4), on_k[0][1])], r"on_k: the table has shape \(2, 8, 4\); expected \(2 or 1, 3"),
        ("on_q", [(torch.randn(3, 4, 8), on_q[0][1])], r"or W of shape \(3 or 1, 8, N\)"),
        ("on_v", [(on_v[0][0], torch.randn(3, 8, 4))], r"on_v: W has shape \(3, 8, 4\); expected \(3 or 1, N, 8\)"),
        ("on_v", [on_v[0], (on_v[0][0], 4)], "some pairs have W and others N"),
        ("on_v", [(on_v[0][0], torch.ones(3, 4, 8, dtype=torch.int64))], "on_v: the table is torch.int64"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=reason):
            rpe_attention(q, k, v, **{**good, name: bad}, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen", "trained"])
def test_compiled_whether_or_not_something_is_trained(backend, mode):
    torch._dynamo.reset()  # one graph for each case is above its limit
    q, k, v, on_q, on_k, on_v = problem((1, 2, 7, 7, 8), 5, (1, 1, 1), torch.float32, weights=True)
    q.requires_grad_(mode == "trained")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)

    def call(q, k, v):
        return rpe_attention(q, k, v, on_q, on_k, on_v, backend=backend)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with context():
        for _ in range(2):
            torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    if mode == "trained":
        grads = [torch.autograd.grad(one(q, k, v).sum(), q)[0] for one in (compiled, call)]
        torch.testing.assert_close(*grads)


def test_the_formula_s_dropout_of_float64_is_no_float32():
    q, k, v, *pairs = problem((1, 2, 5, 7, 8), 3, (1, 1, 1), torch.float64)
    of_each = [
        rpe_attention(q, k, v, *pairs, dropout_p=0.3, seed=torch.tensor([1]), backend=name)[0]
        for name in ("eager", "reference")
    ]
    torch.testing.assert_close(*of_each, rtol=1e-13, atol=1e-13)
