"""Attention by the backend "triton" on a GPU. Needs pytest and numpy beside torch: `make gpu-check` runs it."""

import math

import pytest
import torch
from attention_cases import assert_rule_9, make_mask, problem, run, strided
from map_cases import check
from methods import TABLES

from irpe import build_rpe, get_bucket_ids_2d, get_bucket_map, get_rpe_config
from irpe import rpe_attention as irpe_attention
from rpe_ops import _triton_call_axes
from rpe_ops._triton_call_tables import table_sums
from rpe_ops.rpe_attention import choose, rpe_attention, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]
half, brain, single = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield


def small(dtype=brain, shape=(2, 3, 197, 197, 64), method="product", terms=(1, 1, 1)):
    ids, buckets = get_bucket_ids_2d(method, 14, 14, 1, 1.9, 3.8, 15.2, device="cuda")
    return problem(shape, buckets, terms, dtype, "timm", ids), buckets


def test_it_is_chosen():
    q = torch.empty(1, 1, 4, 64)
    assert why_not("triton", q) is None and choose(q, q) == "triton"
    assert why_not("cuda", q.half()) is None and choose(q.half(), q.half()) == "cuda"
    assert "float32" in why_not("cuda", q) and choose(q.half(), q.half(), torch.ones(4, 4)) == "triton"
    assert choose(q.double(), q.double()) == "eager" and "float64" in why_not("triton", q.double())
    assert "q is on cpu" in why_not("triton", q.cpu())


@pytest.mark.parametrize(
    ("shape", "buckets", "terms", "dtype", "layout", "mask", "dropout_p"),
    [
        ((2, 3, 5, 7, 16), 5, (0, 0, 0), single, "contiguous", None, 0.0),
        ((2, 3, 170, 167, 64), 50, (1, 1, 1), single, "timm", "float", 0.3),
        ((2, 3, 131, 259, 32), 81, (0, 1, 0), brain, "timm", None, 0.0),
        ((2, 3, 131, 259, 128), 50, (1, 1, 1), brain, "gaps", "bool", 0.0),
        ((2, 3, 67, 9, 72), 17, (1, 1, 1), half, "detr", "padding", 0.3),
        ((1, 2, 197, 199, 64), 33, (2, 2, 2), brain, "timm", None, 0.1),
        ((1, 2, 70, 300, 64), 300, (1, 1, 1), half, "contiguous", "bool", 0.0),
        ((1, 2, 200, 31, 8), 16, (1, 0, 0), single, "timm", "padding", 0.0),
        ((1, 2, 3, 1100, 20), 50, (0, 0, 1), half, "timm", None, 0.0),
        ((1, 1, 1, 1, 64), 1, (1, 1, 1), brain, "contiguous", None, 0.0),
    ],
)
def test_exact(shape, buckets, terms, dtype, layout, mask, dropout_p):
    arguments = problem(shape, buckets, terms, dtype, layout)
    options = dict(attn_mask=make_mask(mask, shape[:4]), dropout_p=dropout_p, seed=torch.tensor([-3]))
    assert_rule_9(arguments, dtype, "triton", **options)


@pytest.mark.parametrize("method", TABLES)
def test_exact_on_maps_of_images(method):
    with torch.device("cpu"):
        place = get_bucket_map(method, (9, 14), 1, 1.9, 3.8, 15.2)
    place = place._replace(offsets=place.offsets.cuda())
    for where in (place, place.ids()):
        arguments = problem((2, 2, 127, 127, 64), place.num_buckets, (1, 1, 1), brain, "timm", where)
        assert_rule_9(arguments, brain, "triton")


@pytest.mark.parametrize("dtype", [single, half, brain])
@pytest.mark.parametrize(
    ("method", "terms", "head"), [("product", (1, 1, 1), 64), ("product", (0, 1, 0), 64), ("euc", (1, 1, 1), 32)]
)
def test_exact_with_W_on_maps_of_images(method, terms, head, dtype):
    with torch.device("cpu"):
        place = get_bucket_map(method, (14, 9), 1, 1.9, 3.8, 15.2)
    place = place._replace(offsets=place.offsets.cuda())
    arguments = problem((5, 3, 127, 127, head), place.num_buckets, terms, dtype, "timm", place, weights=True)
    assert_rule_9(arguments, dtype, "triton")


@pytest.mark.parametrize("dtype", [single, half, brain])
@pytest.mark.parametrize(("buckets", "head"), [(64, 64), (50, 64), (256, 128), (7, 20)])
def test_sums_over_tokens(dtype, buckets, head):
    x, g = strided((37, 3, 197, head), dtype, "timm"), torch.randn(3, 37, 197, buckets, dtype=dtype).transpose(0, 1)
    exact = 0.125 * torch.einsum("bhld,bhln->hdn", x.double(), g.double())
    found = table_sums(x, g, 0.125)
    assert found.shape == exact.shape and found.dtype == single
    assert (found - exact).abs().max() < 1e-3  # products are exact in float32, their sums nearly
    assert all(torch.equal(table_sums(x, g, 0.125), found) for _ in range(3))


@pytest.mark.parametrize("shape", [(2, 2, 0, 5, 64), (2, 2, 5, 0, 64), (0, 2, 5, 5, 64)])
def test_empty(shape):
    assert_rule_9(problem(shape, 50, (1, 1, 1), brain), brain, "triton")


def test_tf32_is_as_rough_as_torch_allows():
    arguments = problem((2, 3, 170, 167, 64), 50, (1, 1, 1), single)
    exact = rpe_attention(*arguments, backend="reference")[0]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rough = rpe_attention(*arguments, backend="triton")[0]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert 1e-5 < (rough - exact).abs().max() < 2e-2


def test_rows_without_a_key_are_zero_and_have_finite_gradients():
    arguments, buckets = small()
    mask = torch.ones(2, 1, 197, 197, dtype=torch.bool)
    mask[0, :, 3] = False
    for added in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        grads = [torch.randn(2, 3, 197, n) for n in (64, buckets)]
        (out, sums), gradients = run(rpe_attention, arguments, grads, brain, attn_mask=added, backend="triton")
        assert not out[0, :, 3].any() and not sums[0, :, 3].any()
        assert all(g.isfinite().all() for g in gradients) and not gradients[0][0, :, 3].any()


@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
def test_one_seed_drops_what_the_formula_drops(p):
    # where v is the identity out is the weights themselves, each a product with 1; bucket sums would not do: kernels
    # may get them as differences of a running total, which a GPU adds up as a tree, so that a 0 comes out as 1e-8
    q, k, _, _, _, _ = problem((2, 3, 20, 31, 32), 1, (0, 0, 0), single)
    call = dict(v=torch.eye(31, 32).expand(2, 3, 31, 32), dropout_p=p, seed=torch.tensor([2**40 + 7]))
    ours, formula = (rpe_attention(q, k, **call, backend=name)[0] for name in ("triton", "eager"))
    assert torch.equal(ours == 0, formula == 0) and (ours[..., :31] == 0).any()


def test_bitwise_equal_from_run_to_run_and_of_uninitialised_memory():
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        for dtype in (brain, single):
            arguments, buckets = small(dtype)
            grads = [torch.randn(2, 3, 197, n) for n in (64, buckets)]
            seed = torch.tensor([3])
            results = []
            for _ in range(5):
                outputs, gradients = run(
                    rpe_attention, arguments, grads, dtype, backend="triton", dropout_p=0.1, seed=seed
                )
                results.append([*outputs, *gradients])
            assert all(x.isfinite().all() for x in results[0])
            for result in results[1:]:
                assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph_and_streams(warm):
    (q, k, v, on_q, on_k, on_v), _ = small()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out, (sums,) = rpe_attention(*leaves, on_q, on_k, on_v, backend="triton")
        return out, *torch.autograd.grad(out.square().sum() + sums.square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    if not warm:  # what a capture makes holds nothing before the graph runs, and must not be kept for others
        _triton_call_axes._turns.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    expected = step()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    fresh = step()
    assert not torch.equal(fresh[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(captured, fresh, strict=True))


def test_compile_fullgraph_and_autocast():
    (q, k, v, on_q, on_k, on_v), _ = small(single)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        with torch.autocast("cuda", dtype=brain):
            out, (sums,) = rpe_attention(q, k, v, on_q, on_k, on_v)
        assert out.dtype == sums.dtype == brain
        return out.float().sum() + sums.float().sin().sum()

    compiled = torch.compile(call, fullgraph=True)
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call))
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("method", ["product", "euc"])
def test_no_matrix_of_all_pairs_is_allocated(method):
    height, width, heads = 80, 64, 2
    tokens = height * width  # ids of all pairs, as free ids have them, would be 100 MiB, and weights of a head 50
    with torch.device("cpu"):
        place = get_bucket_map(method, (height, width), 0, 1.9, 3.8, 15.2)
    place = place._replace(offsets=place.offsets.cuda())
    shape = (1, heads, tokens, tokens, 64)
    q, k, v, on_q, on_k, on_v = problem(shape, place.num_buckets, (1, 1, 1), brain, maps=place)
    leaves = [x.requires_grad_() for x in (q, k, v, on_q[0][0], on_k[0][0])]

    def step():
        out, (sums,) = rpe_attention(*leaves[:3], [(leaves[3], place)], [(leaves[4], place)], on_v, backend="triton")
        torch.autograd.grad(out.sum() + sums.sum(), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < tokens * tokens * 2  # bytes of the weights of one head


@pytest.mark.parametrize("dtype", [single, half, brain])
@pytest.mark.parametrize(
    ("grid", "on", "options"),
    [
        ((14, 14, 1), ([], ["product"], []), {}),
        ((14, 9, 1), (["product"],) * 3, dict(B=2, D=64)),
        ((17, 20, 0), (["product"],) * 3, dict(D=32, ratio=2.5)),
        ((9, 70, 3), (["product"],) * 3, dict(D=80)),
        ((16, 32, 40), (["product"],) * 3, dict(D=64, ratio=3.0, mask="bool", dropout_p=0.1)),
        ((14, 9, 1), (["product"], [], ["product"]), dict(D=128, mask="float", layout="gaps")),
        ((14, 9, 1), (["euc"], ["quant"], ["euc"]), dict(B=2, D=64)),
        ((9, 70, 3), (["cross_rows", "cross_cols"],) * 3, dict(D=64, dropout_p=0.3)),
        ((14, 9, 5), (["quant"], ["product"], ["euc"]), dict(D=20, mask="bool")),
        ((14, 9, 1), (["free"], ["free"], ["free"]), dict(D=64, shape=(70, 300))),
    ],
    ids=str,
)
def test_exact_on_maps(dtype, grid, on, options):
    check(grid, on, dtype, **options)


def test_ids_of_every_dtype_and_stride_give_the_same():
    (q, k, v, on_q, on_k, on_v), _ = small()
    ids = on_k[0][1]
    expected, _ = rpe_attention(q, k, v, on_q, on_k, on_v, backend="triton")
    for other in (ids.to(torch.uint8), ids.short(), ids.int(), ids.t().contiguous().t()):
        out, _ = rpe_attention(q, k, v, on_q, [(on_k[0][0], other)], on_v, backend="triton")
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("method", "mode"), [("product", "ctx"), ("cross", "ctx"), ("euc", "bias")])
def test_irpe_takes_it(method, mode):
    on = "qk" if mode == "bias" else "qkv"
    rpe = build_rpe(get_rpe_config(1.9, method, mode, False, 1, on), 64, 3, device="cuda")
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    for table in tables:
        torch.nn.init.normal_(table, std=0.1)
    q, k, v = (torch.randn(2, 3, 64, 64, requires_grad=True) for _ in range(3))
    size = dict(height=9, width=7)
    results = [irpe_attention(q, k, v, *rpe, **size, backend=name) for name in (None, "eager")]
    assert "RPEAttentionBackward" in _names(results[0].grad_fn)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(out.sin().sum(), [q, k, v, *tables]) for out in results]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def _names(node):
    """The names of all functions behind a result."""
    waiting, names = [node], set()
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    return names


def fitting(dtype, grid, shape, terms, method="product", shared=False, layout="timm"):
    """A call that backend "cuda" takes: (arguments of `rpe_attention`, its tokens)."""
    height, width, skip = grid
    B, H, D = shape
    with torch.device("cpu"):
        place = get_bucket_map(method, (height, width), skip, 1.9, 3.8, 15.2)
    place = place._replace(offsets=place.offsets.cuda())
    tokens = skip + height * width
    q, k, v, *on = problem((B, H, tokens, tokens, D), place.num_buckets, terms, dtype, layout, place, weights=True)
    if shared:
        on[1] = [(table[:1].expand(H, -1, -1), where) for table, where in on[1]]
    return q, k, v, *on


@pytest.mark.parametrize("dtype", [half, brain])
@pytest.mark.parametrize(
    ("grid", "shape", "terms", "options"),
    [
        ((14, 13, 1), (3, 4, 64), (0, 1, 0), {}),
        ((14, 13, 1), (50, 6, 64), (1, 1, 1), dict(shared=True)),  # several samples for a block
        ((5, 7, 0), (2, 3, 32), (1, 0, 1), dict(layout="detr")),
        ((24, 17, 5), (2, 2, 64), (1, 1, 0), dict(layout="contiguous")),
        ((9, 40, 0), (1, 2, 128), (1, 1, 1), {}),
        ((16, 16, 1), (2, 2, 80), (0, 0, 1), dict(layout="gaps")),
        ((3, 33, 40), (2, 2, 96), (1, 1, 1), {}),
        ((32, 32, 0), (1, 3, 64), (0, 1, 0), dict(method="cross_rows")),
        ((20, 70, 1), (1, 2, 40), (1, 1, 1), dict(method="cross_cols")),
    ],
    ids=str,
)
def test_cuda_is_exact(dtype, grid, shape, terms, options):
    assert_rule_9(fitting(dtype, grid, shape, terms, **options), dtype, "cuda")


@pytest.mark.parametrize("terms", [(0, 1, 0), (1, 1, 1)])
def test_cuda_is_bitwise_equal_from_run_to_run_and_of_uninitialised_memory(terms):
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        arguments = fitting(brain, (14, 13, 1), (40, 6, 64), terms)
        results = []
        for _ in range(5):
            outputs, gradients = run(rpe_attention, arguments, [torch.ones(40, 6, 183, 64)], brain, backend="cuda")
            results.append([*outputs, *gradients])
        assert all(x.isfinite().all() for x in results[0])
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_cuda_leaves_to_triton():
    arguments = fitting(brain, (14, 13, 1), (2, 3, 64), (0, 1, 0))
    options = dict(dropout_p=0.3, seed=torch.tensor([5]))
    with pytest.raises(ValueError, match='backend="cuda" has no dropout'):
        rpe_attention(*arguments, backend="cuda", **options)
    ours, theirs = (rpe_attention(*arguments, backend=name, **options)[0] for name in (None, "triton"))
    assert torch.equal(ours, theirs)


def test_cuda_in_a_graph_and_compiled():
    q, k, v, on_q, on_k, on_v = fitting(brain, (14, 13, 1), (8, 3, 64), (1, 1, 1))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step(q, k, v):
        out = rpe_attention(q, k, v, on_q, on_k, on_v, backend="cuda")[0]
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(q))
    graph.replay()
    fresh = step(*leaves)
    assert all(torch.equal(one, other) for one, other in zip(captured, fresh, strict=True))

    def loss(q, k, v):
        return rpe_attention(q, k, v, on_q, on_k, on_v)[0].float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


def test_cuda_keeps_and_takes_little_memory():
    q, k, v, on_q, on_k, on_v = fitting(brain, (64, 64, 0), (1, 6, 64), (1, 1, 1))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step():
        torch.autograd.grad(rpe_attention(*leaves, on_q, on_k, on_v, backend="cuda")[0].sum(), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    one = q.numel() * 2  # bytes of q
    assert torch.cuda.max_memory_allocated() - before < 14 * one
