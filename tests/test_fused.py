"""What every fused backend shares, with kernels that the formula stands in for: autograd, graphs, kernels that fail."""

import gc
import sys
import types
import warnings

import pytest
import torch
from methods import METHODS
from torch import nn
from torch._dynamo.utils import counters
from torch.library import opcheck

import rpe_ops.constants as constants
from irpe import build_rpe, get_bucket_map, get_rpe_config, get_single_rpe_config, rpe_attention
from irpe.irpe import RPEConfig
from rpe_ops import _torch, _triton_launch, fused, rpe_attention_eager
from rpe_ops import rpe_attention as operators
from rpe_ops import rpe_attention_triton as backend
from rpe_ops._triton_call_axes import turn
from rpe_ops.maps import from_numbers

HEADS, DIM, SIZE = 2, 8, dict(height=3, width=4)
TOKENS = 13


def pairs(luts_q, luts_k, *maps):
    places = [
        [from_numbers(x, n[5 * i : 5 * i + 5]) for i, x in enumerate(m)]
        for m, n in zip(maps[:3], maps[3:], strict=True)
    ]
    return (
        list(zip(luts_q, places[0], strict=True)),
        list(zip(luts_k, places[1], strict=True)),
        list(zip(places[2], maps[5][3::5], strict=True)),
    )


def out_of_places(tables, axes, term):
    """Side tables in the form of the formula, of each bucket that of one of its places."""
    placed = axes is not None and [lut.shape[3] for lut in tables] == [axes.size[term]]
    return [lut @ turn(axes, term, lut).once.t() for lut in tables] if placed else tables


def into_places(sums, axes, term, by_head):
    if axes is None or not by_head:
        return [x.contiguous() for x in sums]
    return [(x @ turn(axes, term, x).once).transpose(0, 1).contiguous().transpose(0, 1) for x in sums]


def forward(q, k, v, luts_q, luts_k, *rest, by_head=False):
    settings = dict(zip(("attn_mask", "seed", "scale", "dropout_p"), rest[6:], strict=True))
    axes = _triton_launch.axes_of(q, k, rest[:3], rest[3:6])
    luts = out_of_places(luts_q, axes, 0), out_of_places(luts_k, axes, 1)
    out, lse, sums = rpe_attention_eager.attention_and_lse(q, k, v, *pairs(*luts, *rest[:6]), **settings)
    return backend._heads_inside(q, out), lse, into_places(sums, axes, 2, by_head)


def backward(grad_out, grad_sums, q, k, v, out, sums, lse, luts_q, luts_k, *rest, by_head=False):
    settings = dict(zip(("attn_mask", "seed", "scale", "dropout_p"), rest[6:], strict=True))
    axes = _triton_launch.axes_of(q, k, rest[:3], rest[3:6])
    luts = out_of_places(luts_q, axes, 0), out_of_places(luts_k, axes, 1)
    inputs = (q, k, v, *pairs(*luts, *rest[:6]))
    grads = rpe_attention_eager.gradients(grad_out, out_of_places(grad_sums, axes, 2), inputs, **settings)
    between = 3 + len(luts_q)
    of_q, of_k = grads[3:between], grads[between:]
    of_luts = into_places(of_q, axes, 0, by_head), into_places(of_k, axes, 1, by_head)
    return *(backend._heads_inside(q, x) for x in grads[:3]), *of_luts


def table_sums(x, g, scale):
    return scale * torch.einsum("bhld,bhln->hdn", x.float(), g.float())


@pytest.fixture
def kernels(monkeypatch):
    """The backend "triton" on this CPU: all of it but its kernels."""
    launch = types.SimpleNamespace(forward=forward, backward=backward, axes_of=_triton_launch.axes_of)
    monkeypatch.setattr(backend, "_triton_launch", launch)
    monkeypatch.setattr(backend, "table_sums", table_sums)
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "BROKEN", {})
    torch._dynamo.reset()
    return launch


def encodings(on="qkv", method="product", mode="ctx", shared=False):
    rpe = build_rpe(get_rpe_config(1.9, method, mode, shared, 1, on), DIM, HEADS)
    tables = [table for one in rpe if one is not None for table in one.parameters()]
    for table in tables:
        nn.init.normal_(table)
    return rpe, tables


# every pair of method, mode and sharing that makes another graph: to one, methods of one map differ in a constant
GRAPHS = [
    ("product", "ctx", False), ("euc", "ctx", True), ("quant", "bias", True), ("cross", "ctx", True),
    ("cross", "bias", False),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["ctx", "bias"])
@pytest.mark.parametrize("shared", [True, False])
def test_products_with_tables_are_those_of_the_formula(kernels, method, mode, shared):
    rpe, tables = encodings("qkv" if mode == "ctx" else "qk", method, mode, shared)
    x = torch.randn(2, TOKENS, 3, HEADS, DIM, requires_grad=True)
    mask = torch.rand(TOKENS, TOKENS) > 0.2
    mask[3] = False

    def call(x, name):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return rpe_attention(q, k, v, *rpe, **SIZE, attn_mask=mask, backend=name)

    results = [call(x, name) for name in ("triton", "eager")]
    grads = [torch.autograd.grad(out.sin().sum(), [x, *tables]) for out in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)
    if (method, mode, shared) not in GRAPHS:
        return
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(x, "triton")
    torch.testing.assert_close([out, *torch.autograd.grad(out.sin().sum(), [x, *tables])], [results[0], *grads[0]])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, "triton"), results[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("weights", [True, False])
def test_gradients_of_the_formula_are_those_of_autograd(dropout_p, weights):
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, DIM, dtype=torch.float64).requires_grad_().unbind(0)
    place = get_bucket_map("product", (3, 4), 1, 1.9, 3.8, 15.2)
    other = get_bucket_map("euc", (3, 4), 1, 1.9, 3.8, 15.2)
    shape = (HEADS, DIM) if weights else (2, HEADS, TOKENS)
    on_q = [(torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True), other)]
    on_k = [(torch.randn(*shape, 50, dtype=torch.float64, requires_grad=True), place)]
    on_v = [(place, torch.randn(HEADS, 50, DIM, dtype=torch.float64, requires_grad=True) if weights else 50)]
    mask = torch.randn(TOKENS, TOKENS, dtype=torch.float64)
    mask[3] = -torch.inf
    settings = dict(scale=0.4, attn_mask=mask, dropout_p=dropout_p, seed=torch.tensor([5]))
    leaves = [q, k, v, on_q[0][0], on_k[0][0]] + [W for _, W in on_v if weights]
    inputs = (q, k, v, on_q, on_k, on_v)
    out, sums = rpe_attention_eager.attention(*inputs, **settings)
    of = [torch.randn_like(x) for x in (out, *sums)]
    expected = torch.autograd.grad([out, *sums], leaves, of)
    torch.testing.assert_close(rpe_attention_eager.gradients(of[0], of[1:], inputs, **settings), list(expected))


def test_second_derivatives_are_the_formula_s_or_refused(kernels, monkeypatch):
    rpe, tables = encodings()
    x = torch.randn(3, 2, HEADS, TOKENS, DIM, requires_grad=True)
    monkeypatch.setattr(operators, "choose", lambda *_: "triton")

    def second(name):
        torch.manual_seed(3)
        out = rpe_attention(*x, *rpe, **SIZE, dropout_p=0.3, backend=name)
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *tables])

    torch.testing.assert_close(second(None), second("eager"), rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match='backend="eager"'):
        second("triton")


def test_func_transforms(kernels):
    rpe, _ = encodings()
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, DIM)

    def loss(q, name):
        return rpe_attention(q, k, v, *rpe, **SIZE, backend=name).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))
    torch.testing.assert_close(per_sample(torch.stack([q, -q]), "triton"), per_sample(torch.stack([q, -q]), "eager"))


def test_vmap_drops_what_one_call_after_the_other_drops(kernels):
    rpe, _ = encodings()
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, DIM)
    many = torch.stack([q, q, q])

    def call(q, name="triton"):
        return rpe_attention(q, k, v, *rpe, **SIZE, dropout_p=0.4, backend=name)

    def gradient(q, name="triton"):
        return torch.func.grad(lambda q: call(q, name).sin().sum())(q)

    for function in (call, gradient):
        torch.manual_seed(2)
        same = torch.func.vmap(function, randomness="same")(many)
        torch.manual_seed(2)
        torch.testing.assert_close(same, torch.stack([function(q)] * 3))
        torch.manual_seed(2)
        different = torch.func.vmap(function, randomness="different")(many)
        torch.manual_seed(2)
        formula = torch.func.vmap(lambda q: function(q, "eager"), randomness="different")(many)  # noqa: B023
        torch.testing.assert_close(different, formula)
        assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("on", ["k", "qkv", None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_forward_mode_is_the_formula_s_or_refused(kernels, on, dropout_p):
    rpe = (None, None, None) if on is None else encodings(on)[0]
    q, k, v, towards = torch.randn(4, 2, HEADS, TOKENS, DIM)

    def call(q, name=None):
        torch.manual_seed(3)
        return rpe_attention(q, k, v, *rpe, **SIZE, dropout_p=dropout_p, backend=name).sin()

    chosen = operators.choose(q, k)
    cotangent = torch.randn_like(q)
    expected = torch.autograd.grad(call(leaf := q.clone().requires_grad_(), "eager"), leaf, cotangent)[0].mul(towards)
    _, tangent = torch.func.jvp(call, (q,), (towards,))
    # <jvp, cotangent> = <towards, vjp>: relative to what is summed
    bound = 1e-4 * expected.abs().sum()
    assert ((tangent * cotangent).sum() - expected.sum()).abs() <= bound
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, towards)
        again = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
        assert operators.choose(q, k) == "eager"
    torch.testing.assert_close(again, tangent)
    for refused in {chosen, "triton"} - {"eager"}:
        with pytest.raises(NotImplementedError, match=r'\(jvp\) of rpe_attention: call it with backend="eager"'):
            torch.func.jvp(lambda q: call(q, refused), (q,), (towards,))  # noqa: B023
    assert operators.choose(q, k) == chosen


def test_forward_mode_through_a_backward_is_refused(kernels):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, HEADS, TOKENS, DIM).unbind(0))
    out = rpe_attention(q, k, v, *encodings("k")[0], **SIZE, backend="triton")
    with torch.autograd.forward_ad.dual_level():
        cotangent = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"\(jvp\) of rpe_attention"):
            torch.autograd.grad(out, q, cotangent)


def test_hessian_vector_product_in_forward_over_reverse(kernels):
    rpe, _ = encodings("k")
    q, k, v, towards = torch.randn(4, 1, HEADS, TOKENS, DIM, dtype=torch.float64)
    rpe = [one and one.double() for one in rpe]

    def gradient(q):
        return torch.func.grad(lambda q: rpe_attention(q, k, v, *rpe, **SIZE).sin().sum())(q)

    _, product = torch.func.jvp(gradient, (q,), (towards,))
    step = 1e-5
    near = (gradient(q + step * towards) - gradient(q - step * towards)) / (2 * step)
    assert (product - near).abs().max() <= 1e-6 * near.abs().max()


def test_opcheck(kernels):
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, DIM)
    offsets, numbers = get_bucket_map("product", (3, 4), 1, 1.9, 3.8, 15.2).offsets, [3, 4, 1, 50, 7]
    tables = [torch.randn(HEADS, DIM, 50)], [torch.randn(HEADS, DIM, 50)], [torch.randn(HEADS, 50, DIM)]
    rest = (torch.zeros(2, HEADS, TOKENS, TOKENS), torch.tensor([3]), 0.3, 0.1, False)
    arguments = (q, k, v, *tables, *[[offsets]] * 3, *[numbers] * 3, *rest)
    opcheck(torch.ops.rpe_ops.rpe_attention_triton.default, arguments)
    out, lse, sums = torch.ops.rpe_ops.rpe_attention_triton(*arguments)
    opcheck(torch.ops.rpe_ops.rpe_attention_triton_backward.default, (out, [], out, lse, sums, *arguments))


def saved_bytes(call):
    """What a backward keeps, storages counted once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(kept.values())


@pytest.mark.parametrize(("on", "bound"), [("k", 1.01), ("q", 1.01), ("qkv", 1.26)])
def test_what_is_kept_for_the_backward_is_what_plain_attention_keeps(kernels, on, bound):
    """q, k, v are views of one projection: nothing is copied. No side table is kept; of values the bucket sums are."""
    rpe = build_rpe(get_rpe_config(skip=1, rpe_on=on), 64, 6)
    x = torch.randn(4, 1 + 14 * 9, 3 * 6 * 64, requires_grad=True) * 1.0

    def call():
        q, k, v = x.unflatten(-1, (3, 6, 64)).permute(2, 0, 3, 1, 4)
        return rpe_attention(q, k, v, *rpe, height=14, width=9, backend="triton")

    plain = 4 * (x.numel() + 4 * 6 * 127 * 64 + 4 * 6 * 127)  # q, k and v; out; lse
    tables = sum(table.nbytes for one in rpe if one is not None for table in one.parameters())
    assert (
        saved_bytes(call) - tables <= bound * plain
    )  # sums have the 64 places in which kernels leave them, for 50 buckets


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(config, DIM, HEADS)

    def forward(self, x):
        return rpe_attention(*x, self.rpe_q, self.rpe_k, self.rpe_v, **SIZE)


K, QKV = get_rpe_config(skip=1), get_rpe_config(skip=1, rpe_on="qkv")
SEVERAL = RPEConfig(get_single_rpe_config(20, "cross", skip=1), get_single_rpe_config(skip=1), None)


@pytest.mark.parametrize(
    ("name", "configs"),
    [
        *(("triton", some) for some in [(K, QKV), (QKV, K), (K, SEVERAL), (SEVERAL, QKV), (K, K), (K, QKV, SEVERAL)]),
        *(("eager", some) for some in [(K, K), (SEVERAL, QKV)]),
    ],
)
def test_compiled_models_with_one_map_leave_each_other_s_graphs_alone(kernels, monkeypatch, name, configs):
    """Teacher and student, a model and its average: what dynamo guards on must live as long as any of them."""
    monkeypatch.setattr(operators, "choose", lambda *_: name)
    made = []
    models = [Attention(config) for config in configs]
    compiled = [torch.compile(one, fullgraph=True, backend=lambda g, _: made.append(g) or g.forward) for one in models]
    x = torch.randn(3, 2, HEADS, TOKENS, DIM, requires_grad=True)
    counters.clear()
    for _ in range(3):
        for one in compiled:
            one(x).sum().backward()
    assert len(made) == counters["stats"]["unique_graphs"] == len(configs)
    del models[0], compiled[0]
    gc.collect()
    constants._kept["offsets"].cache_clear()
    for _ in range(3):
        for one in compiled:
            one(x).sum().backward()
    third = torch.compile(Attention(K), fullgraph=True, backend=lambda g, _: made.append(g) or g.forward)
    before = len(made)
    for _ in range(3):
        for one in [*compiled, third]:
            one(x)
    assert before == len(configs) and len(made) <= before + 1


class BrokenError(Exception):
    """Of a compiler."""


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_that_fails_is_told_once_and_the_formula_goes_on(kernels, monkeypatch, where, compiled):
    def fail(*_, **__):
        raise BrokenError("cannot  compile\nthis")

    monkeypatch.setattr(kernels, where, fail)
    rpe, tables = encodings("qkv")
    x = torch.randn(3, 2, HEADS, TOKENS, DIM, requires_grad=True)

    def step(x, **options):
        return rpe_attention(*x, *rpe, **SIZE, **options)

    torch.manual_seed(1)
    expected = step(x, backend="eager", dropout_p=0.2)
    expected = [expected, *torch.autograd.grad(expected.sin().sum(), [x, *tables])]
    monkeypatch.setattr(operators, "choose", lambda *_: "triton")  # at first
    call = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.manual_seed(1)
            out = call(x, dropout_p=0.2)
            actual = [out, *torch.autograd.grad(out.sin().sum(), [x, *tables])]
            torch.testing.assert_close(actual, expected)
    (warning,) = [str(one.message) for one in told if one.category is RuntimeWarning]
    assert "for cpu, torch.float32, head size 8" in warning and "(BrokenError: cannot compile this)" in warning
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(backend, "BROKEN", {"cpu, torch.float32, head size 8": "Broken"})
        assert backend.is_slow(x[0], x[0]) and not backend.is_slow(x[0].double(), x[0])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_backend_that_was_asked_for_raises(kernels, monkeypatch, where):
    def fail(*_, **__):
        raise BrokenError

    monkeypatch.setattr(kernels, where, fail)
    rpe, _ = encodings("k")
    x = torch.randn(3, 2, HEADS, TOKENS, DIM, requires_grad=True)
    with pytest.raises(BrokenError):
        rpe_attention(*x, *rpe, **SIZE, backend="triton").sum().backward()
    assert not backend.BROKEN


def test_no_memory_is_no_fault_of_a_kernel(kernels, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("of the GPU")

    monkeypatch.setattr(kernels, "forward", fail)
    monkeypatch.setattr(operators, "choose", lambda *_: "triton")
    with pytest.raises(torch.OutOfMemoryError):
        rpe_attention(*torch.randn(3, 2, HEADS, TOKENS, DIM), *encodings("k")[0], **SIZE)


@pytest.mark.parametrize("name", ["_transforms_active", "_modes", "_has_kernel", "_assert_async"])
def test_private_names_of_torch_may_be_gone(kernels, monkeypatch, name):
    monkeypatch.setattr(_torch, name, None)
    rpe, tables = encodings()
    x = torch.randn(3, 2, HEADS, TOKENS, DIM, requires_grad=True)
    for wish in ("triton", None):
        out = rpe_attention(*x, *rpe, **SIZE, backend=wish)
        torch.testing.assert_close(out, rpe_attention(*x, *rpe, **SIZE, backend="eager"))
        assert torch.autograd.grad(out.sum(), tables)[0].any()


def test_import_survives_a_torch_without_them(run_python):
    from conftest import ROOT

    run_python(
        """
        import torch
        gone = torch._C._are_functorch_transforms_active, torch._assert_async
        del torch._C._are_functorch_transforms_active, torch._assert_async
        import irpe, rpe_ops
        sentence = rpe_ops.backends()["torch"]
        assert "lacks torch._C._are_functorch_transforms_active: compiled graphs take plain torch" in sentence, sentence
        torch._C._are_functorch_transforms_active, torch._assert_async = gone  # torch's own autograd asks them too
        rpe = irpe.build_rpe(irpe.get_rpe_config(skip=1, rpe_on="qkv"), 8, 2)
        irpe.rpe_attention(*torch.randn(3, 1, 2, 13, 8), *rpe, height=3, width=4)
        """,
        path=[ROOT],
    )


def test_every_backend_has_what_fused_asks_of_it():
    for name, one in fused.BACKENDS.items():
        assert all(callable(getattr(one, part)) for part in ("why_not", "about", "is_slow", "forward", "backward")), (
            name
        )
        assert isinstance(one.KEEPS_OUT, bool) and one.about().startswith(("runs: ", "not here: "))


def python_calls(function):
    """How many functions of Python a call enters, its own frame among them."""
    count = 0

    def profile(_, event, __):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_calls_without_a_derivative_to_come_pass_autograd_by(kernels, monkeypatch):
    rpe, tables = encodings()
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, DIM)

    def attention(q):
        return rpe_attention(q, k, v, *rpe, **SIZE, backend="triton")

    expected = attention(q).detach()

    def asked(*_):
        raise RuntimeError("autograd was asked")

    monkeypatch.setattr(fused.RPEAttention, "apply", asked)
    with torch.no_grad():
        torch.testing.assert_close(attention(q), expected)
    with torch.inference_mode():
        torch.testing.assert_close(attention(q), expected)
    with pytest.raises(RuntimeError, match="autograd was asked"):
        attention(q)
    for table in tables:
        table.requires_grad_(False)
    torch.testing.assert_close(attention(q), expected)
    with pytest.raises(RuntimeError, match="autograd was asked"):
        attention(q.clone().requires_grad_())


@pytest.mark.parametrize(("on", "forward_bound", "backward_bound"), [("k", 130, 135), ("qkv", 190, 155)])
def test_host_work_of_a_call_is_bounded(kernels, monkeypatch, on, forward_bound, backward_bound):
    """What a GPU waits for where its kernels are short; counted with kernels that do nothing."""
    rpe, _ = encodings(on)
    x = torch.randn(3, 2, HEADS, TOKENS, DIM).unbind(0)
    q, k, v = (one.clone().requires_grad_() for one in x)
    out, lse, _ = forward(q.detach(), k.detach(), v.detach(), [], [], [], [], [], [], [], [], None, None, 0.3, 0.0)
    table = torch.zeros(HEADS, 2, TOKENS, 64).transpose(0, 1)  # as kernels leave it
    monkeypatch.setattr(kernels, "forward", lambda *args, **_: (out, lse, [table] * len(args[7])))
    monkeypatch.setattr(kernels, "backward", lambda *a, **_: (out, out, out, [table] * len(a[8]), [table] * len(a[9])))
    monkeypatch.setattr(operators, "choose", lambda *_: "triton")

    def call():
        return rpe_attention(q, k, v, *rpe, **SIZE)

    def back():
        return torch.autograd.grad(result, (q, k, v), torch.ones_like(result), retain_graph=True)

    result = call()
    back()  # what a first call imports is not counted
    assert python_calls(call) <= forward_bound
    assert python_calls(back) <= backward_bound
