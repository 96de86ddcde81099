"""The kernels of backend "triton" where there is no GPU: run by Triton's interpreter, and compiled ahead of time.

The interpreter is chosen when kernels are defined, so the tests marked `interpreted` run in processes of their own,
which `test_interpreted` starts. What needs a GPU is in test_rpe_attention_gpu.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import assert_rule_9, make_mask, problem, run, strided
from conftest import ROOT
from fresh import PATIENCE
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from triton_listed import only_listed_kernels  # noqa: F401 (a fixture)

import rpe_ops.rpe_attention_triton as backend
from irpe import build_rpe, get_bucket_ids_2d, get_bucket_map, get_rpe_config
from irpe import rpe_attention as irpe_attention
from rpe_ops import _triton_call, _triton_call_tables
from rpe_ops.rpe_attention import choose, rpe_attention, why_not

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


# it takes arrays of one element for numbers, which numpy no longer does; compiled kernels are another matter
BROKEN = version(triton) < (3, 7) and version(numpy) >= (2, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_interpreted")
outside = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
half, brain, single = torch.float16, torch.bfloat16, torch.float32


@outside
@pytest.mark.skipif(BROKEN, reason="the interpreter of triton 3.6 does not run on numpy 2.4")
@pytest.mark.parametrize(
    "part",
    [
        pytest.param("exact and dropout or exact and pairs", marks=pytest.mark.slow),
        pytest.param("exact and not dropout and not pairs", marks=pytest.mark.slow),
        pytest.param("not exact", marks=pytest.mark.slow),
    ],
)
def test_interpreted(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize(
    ("shape", "buckets", "terms", "dtype", "layout", "mask", "dropout_p"),
    [
        pytest.param((2, 3, 5, 7, 16), 5, (0, 0, 0), single, "contiguous", None, 0.0, id="plain"),
        pytest.param((1, 2, 70, 67, 20), 50, (1, 1, 1), single, "timm", None, 0.0, id="float32"),
        pytest.param((2, 1, 19, 70, 16), 33, (1, 1, 1), half, "detr", "bool", 0.0, id="float16"),
        pytest.param((1, 2, 67, 9, 72), 17, (1, 1, 1), brain, "gaps", "padding", 0.0, id="bfloat16"),
        pytest.param((1, 2, 7, 66, 64), 50, (0, 1, 0), brain, "timm", None, 0.0, id="keys"),
        pytest.param((1, 2, 7, 66, 8), 50, (1, 0, 0), single, "timm", "float", 0.0, id="queries"),
        pytest.param((1, 2, 7, 66, 1), 50, (0, 0, 1), single, "timm", "float", 0.0, id="values"),
        pytest.param((1, 1, 9, 5, 128), 1, (1, 0, 1), single, "contiguous", None, 0.0, id="wide-one-bucket"),
        pytest.param((1, 2, 35, 21, 16), 9, (2, 2, 2), single, "timm", "float", 0.3, id="two-pairs"),
        pytest.param((1, 2, 3, 70, 16), 300, (1, 1, 1), single, "timm", "bool", 0.0, id="many-buckets"),
        pytest.param((2, 2, 18, 67, 16), 16, (1, 1, 1), half, "timm", "padding", 0.3, id="dropout-16-bits"),
        pytest.param((2, 2, 67, 18, 16), 16, (1, 1, 1), single, "gaps", None, 0.5, id="dropout-32-bits"),
    ],
)
def test_exact(shape, buckets, terms, dtype, layout, mask, dropout_p):
    arguments = problem(shape, buckets, terms, dtype, layout)
    options = dict(attn_mask=make_mask(mask, shape[:4]), dropout_p=dropout_p, seed=torch.tensor([-3]))
    assert_rule_9(arguments, dtype, "triton", **options)


@interpreted
@pytest.mark.parametrize("method", ["euc", "product", "cross_rows"])
def test_exact_on_maps_of_images(method):
    place = get_bucket_map(method, (5, 14), 1, 1.9, 3.8, 15.2)
    arguments = problem((1, 1, 71, 71, 16), place.num_buckets, (1, 1, 1), single, "timm", place)
    assert_rule_9(arguments, single, "triton")


@interpreted
@pytest.mark.parametrize(
    ("method", "grid", "terms", "dtype"),
    [
        ("product", (5, 7, 1), (1, 1, 1), single),
        ("product", (4, 6, 0), (1, 0, 1), half),
        ("product", (6, 5, 3), (0, 1, 0), brain),
        ("cross_rows", (5, 7, 2), (1, 1, 1), single),
        ("cross_cols", (3, 6, 0), (1, 1, 0), half),
        ("euc", (4, 5, 1), (1, 1, 1), single),
    ],
)
def test_exact_with_W_on_maps_of_images(method, grid, terms, dtype):
    place = get_bucket_map(method, grid[:2], grid[2], 1.9, 3.8, 15.2)
    tokens = grid[0] * grid[1] + grid[2]
    shape = (2, 2, tokens, tokens, 20)
    assert_rule_9(problem(shape, place.num_buckets, terms, dtype, "timm", place, weights=True), dtype, "triton")


@interpreted
@pytest.mark.parametrize(
    ("buckets", "layout", "head"), [(64, "timm", 16), (50, "detr", 16), (256, "gaps", 20), (7, "timm", 3)]
)
def test_sums_over_tokens(monkeypatch, buckets, layout, head):
    x = strided((3, 2, 131, head), single, layout)
    g = torch.randn(2, 3, 131, buckets).transpose(0, 1)
    exact = 0.3 * torch.einsum("bhld,bhln->hdn", x.double(), g.double())
    for programs in (1, 4, 264):
        monkeypatch.setattr(_triton_call_tables, "PROGRAMS", programs)
        found = _triton_call_tables.table_sums(x, g, 0.3)
        assert found.shape == (2, head, buckets) and found.dtype == single
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)
    assert not _triton_call_tables.table_sums(x[:0], g[:0], 0.3).any()


@interpreted
@pytest.mark.parametrize("shape", [(2, 2, 0, 5, 8), (2, 2, 5, 0, 8), (0, 2, 5, 5, 8)])
def test_empty(shape):
    assert_rule_9(problem(shape, 4, (1, 1, 1), single), single, "triton")


@interpreted
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_a_key_are_zero_and_have_finite_gradients(kind):
    arguments = problem((2, 2, 7, 9, 8), 5, (1, 1, 1), single)
    mask = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    mask[0, :, 3] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    grads = [torch.randn(2, 2, 7, n) for n in (8, 5)]
    (out, sums), gradients = run(rpe_attention, arguments, grads, single, attn_mask=mask, backend="triton")
    assert not out[0, :, 3].any() and not sums[0, :, 3].any() and out[1].ne(0).all()
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][0, :, 3].any()


@interpreted
@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
def test_one_seed_drops_what_the_formula_drops(p):
    # where v is the identity out is the weights themselves, each a product with 1; bucket sums would not do: kernels
    # may get them as differences of a running total, which a GPU adds up as a tree, so that a 0 comes out as 1e-8
    q, k, _, _, _, _ = problem((2, 3, 20, 31, 32), 1, (0, 0, 0), single)
    call = dict(v=torch.eye(31, 32).expand(2, 3, 31, 32), dropout_p=p, seed=torch.tensor([2**40 + 7]))
    ours, formula = (rpe_attention(q, k, **call, backend=name)[0] for name in ("triton", "eager"))
    assert torch.equal(ours == 0, formula == 0) and (ours[..., :31] == 0).any()
    torch.testing.assert_close(ours, formula)


@interpreted
def test_outputs_do_not_depend_on_uninitialised_memory_and_repeat():
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        ids, buckets = get_bucket_ids_2d("euc", 3, 5, 1, 20, 40, 160)
        assert buckets > len(ids.unique())
        arguments = problem((2, 2, 16, 16, 20), buckets, (1, 1, 1), single, "timm", ids)
        assert_rule_9(arguments, single, "triton")
        grads = [torch.randn(2, 2, 16, n) for n in (20, buckets)]
        one, other = (run(rpe_attention, arguments, grads, single, backend="triton") for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
def test_float16_tables_beside_float32_and_tables_that_are_broadcast():
    q, k, v, _, _, _ = problem((2, 2, 5, 6, 8), 4, (0, 0, 0), single)
    lut = torch.randn(1, 2, 1, 4, dtype=half, requires_grad=True)  # one row for all queries: the mode bias
    ids = torch.randint(4, (5, 6))
    loss = [
        rpe_attention(q, k, v, on_k=[(lut.expand(1, 2, 5, 4), ids)], backend=name)[0].sin().sum()
        for name in ("triton", "reference")
    ]
    torch.testing.assert_close(loss[0], loss[1])
    torch.testing.assert_close(*(torch.autograd.grad(x, lut)[0] for x in loss), atol=2e-3, rtol=2e-3)


@interpreted
def test_second_derivatives_are_refused_and_the_gradient_of_a_mask_too():
    q, k, v, on_q, on_k, on_v = problem((1, 1, 4, 5, 4), 3, (1, 1, 1), single)
    q.requires_grad_()
    out, _ = rpe_attention(q, k, v, on_q, on_k, on_v, backend="triton")
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="eager"):
        first.sum().backward()
    mask = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(ValueError, match='backend="triton" has no gradient of attn_mask'):
        rpe_attention(q, k, v, attn_mask=mask, backend="triton")


@interpreted
def test_func_transforms():
    q, k, v, on_q, on_k, on_v = problem((1, 2, 6, 5, 8), 3, (1, 1, 1), single)
    lut = on_k[0][0]

    def loss(q, lut, name):
        out, (sums,) = rpe_attention(q, k, v, on_q, [(lut, on_k[0][1])], on_v, backend=name)
        return out.sin().sum() + sums.cos().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, None))
    many = torch.stack([q, -q])
    torch.testing.assert_close(per_sample(many, lut, "triton"), per_sample(many, lut, "eager"))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: loss(q, lut, "triton"), (q,), (q,))


@interpreted
def test_compile():
    q, k, v, on_q, on_k, on_v = problem((1, 2, 9, 9, 8), 3, (1, 1, 1), single)

    def call(q, k, v):
        out, (sums,) = rpe_attention(q, k, v, on_q, on_k, on_v, backend="triton")
        return out.sum() + sums.sin().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("weights", [True, False])
def test_opcheck(weights):
    """The operators that compiled graphs hold, with W and with side tables."""
    place = get_bucket_map("product", (2, 3), 1, 0.9, 1.8, 7.2)
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    shapes = [(2, 8, 10), (2, 8, 10), (2, 10, 8)] if weights else [(1, 2, 7, 10), (1, 2, 7, 10)]
    tables = [[torch.randn(shape)] for shape in shapes] + [[]] * (not weights)
    numbers = [2, 3, 1, 10, 3]
    rest = (torch.zeros(1, 2, 7, 7), torch.tensor([3]), 0.3, 0.1, False)
    arguments = (q, k, v, *tables, *[[place.offsets]] * 3, *[numbers] * 3, *rest)
    opcheck(torch.ops.rpe_ops.rpe_attention_triton.default, arguments)
    out, lse, sums = torch.ops.rpe_ops.rpe_attention_triton(*arguments)
    grad_sums = [] if weights else sums
    opcheck(torch.ops.rpe_ops.rpe_attention_triton_backward.default, (out, grad_sums, out, lse, sums, *arguments))


@interpreted
def test_ids_outside_the_table_are_refused():
    q, k, v, _, on_k, _ = problem((1, 1, 6, 6, 8), 3, (0, 1, 0), single)
    on_k[0][1][2, 3] = 7
    with pytest.raises(RuntimeError, match=r"outside \[0, N\) with N=3"):
        rpe_attention(q, k, v, on_k=on_k, backend="triton")


@interpreted
def test_autocast():
    q, k, v, on_q, on_k, on_v = problem((1, 2, 9, 9, 8), 3, (1, 1, 1), single)
    with torch.autocast("cpu", dtype=brain):
        out, (sums,) = rpe_attention(q, k, v, on_q, on_k, on_v, backend="triton")
    assert out.dtype == sums.dtype == brain
    exact, _ = rpe_attention(q, k, v, on_q, on_k, backend="reference")
    assert (out - exact).abs().max() < 0.1


@interpreted
@pytest.mark.parametrize(
    ("method", "mode"), [("cross", "ctx"), ("product", "ctx"), ("euc", "ctx"), ("product", "bias")]
)
def test_irpe_takes_it(method, mode):
    rpe = build_rpe(get_rpe_config(1.9, method, mode, False, 1, "qk" if mode == "bias" else "qkv"), 8, 2)
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    for table in tables:
        torch.nn.init.normal_(table)
    q, k, v = (torch.randn(2, 2, 13, 8, requires_grad=True) for _ in range(3))
    results = [irpe_attention(q, k, v, *rpe, height=3, width=4, backend=name) for name in ("triton", "eager")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), [q, k, v, *tables]) for out in results))


class LargeResults(TorchDispatchMode):
    """The operators whose results are as large as a side table, but for views of what is there."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.names = smallest, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.numel() >= self.smallest:
            name = function.overloadpacket.__name__
            if out.untyped_storage().data_ptr() not in given or name.endswith("_"):
                self.names.append(name)
        return out


@outside
@pytest.mark.parametrize(("on", "products"), [("k", (1, 2)), ("qkv", (3, 5))])
def test_side_tables_come_out_of_one_product_each_and_nothing_is_copied(monkeypatch, on, products):
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    monkeypatch.setattr(backend._torch, "is_plain", lambda _: True)  # the modes below are no reason for an operator
    monkeypatch.setattr(_triton_call, "launch", lambda *_: None)
    height, width, heads, B, D = 14, 9, 3, 2, 64
    qkv = torch.randn(B, 127, 3, heads, D, dtype=brain).permute(2, 0, 3, 1, 4)
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(0)]
    rpe = build_rpe(get_rpe_config(1.9, "product", skip=1, rpe_on=on), D, heads, dtype=brain)
    tables = [table for one in rpe if one is not None for table in one.parameters()]
    grad = torch.randn(B, 127, heads, D, dtype=brain).transpose(1, 2)

    def forward():
        return irpe_attention(*leaves, *rpe, height=height, width=width, backend="triton")

    out = forward()
    allowed = {"new_empty", "empty_like", "empty", "zeros", "detach"}  # memory, and autograd's for what has no gradient
    for step, count in zip(
        (forward, lambda: torch.autograd.grad(out, [*leaves, *tables], grad)), products, strict=True
    ):
        with LargeResults(B * heads * 127 * 50) as found:
            step()
        assert [x for x in found.names if x not in allowed] == [x for x in found.names if "baddbmm" in x]
        assert len([x for x in found.names if "baddbmm" in x]) == count


@outside
def test_it_says_why_not():
    q = torch.empty(1, 1, 4, 8)
    assert why_not("triton", q) == "runs on CUDA and ROCm, and q is on cpu"
    with pytest.raises(ValueError, match='backend="triton" runs on CUDA and ROCm, and q is on cpu'):
        rpe_attention(q, q, q, backend="triton")
    assert choose(q, q) in ("cpu", "eager") and choose(q.to("meta"), q) == "eager"


@interpreted
def test_it_says_why_not_here_either(monkeypatch):
    q = torch.empty(1, 1, 4, 8)
    assert why_not("triton", q) is None
    assert "q is torch.float64" in why_not("triton", q.double())
    assert "from 1 to 128, and q has 130" in why_not("triton", torch.empty(1, 1, 4, 130))
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert "Triton, which is not installed" in why_not("triton", q)


@outside
def test_importing_rpe_ops_imports_no_triton_and_needs_none(run_python):
    code = """
import sys
import torch
loaded = "triton" in sys.modules
import rpe_ops
assert ("triton" in sys.modules) == loaded
rpe_ops.rpe_attention.rpe_attention(*torch.randn(3, 1, 1, 4, 8))
"""
    run_python(code, path=[ROOT])
    run_python(code, path=[ROOT], forbid={"triton"})
