"""Which calls the backend "cuda" takes, and who computes the others. No GPU is needed: its kernels do not run here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from irpe import get_bucket_map
from rpe_ops import _native, fused, rpe_attention_cuda, rpe_attention_eager, rpe_attention_triton
from rpe_ops import rpe_attention as operators

PLACE = get_bucket_map("product", (3, 4), 1, 1.9, 3.8, 15.2)


def arguments(place=PLACE, dtype=torch.bfloat16, tables=(1, 1, 1)):
    tokens, D, N = 13, 16, place.num_buckets if isinstance(place, tuple) else 50
    q, k, v = torch.randn(3, 2, 3, tokens, D, dtype=dtype)
    on_q, on_k = ([(torch.randn(3, D, N, dtype=dtype), place)] * count for count in tables[:2])
    return q, k, v, on_q, on_k, [(place, torch.randn(3, N, D, dtype=dtype))] * tables[2]


@pytest.fixture
def chosen(monkeypatch):
    """The backend "cuda" takes q wherever it is; a call of its operator is told by an error."""
    monkeypatch.setattr(rpe_attention_cuda, "why_not", lambda q, attn_mask=None: None)
    monkeypatch.setattr(operators, "choose", lambda *_: "cuda")

    def forward(call, inputs):
        raise ZeroDivisionError(call.backend)

    monkeypatch.setattr(rpe_attention_cuda, "forward", forward)


def with_side_tables(q, k, v, on_q, on_k, on_v):
    return q, k, v, [], [(torch.randn(1, 1, 13, PLACE.num_buckets), PLACE)], []


def with_float64_tables(q, k, v, on_q, on_k, on_v):
    return q, k, v, on_q, [(table.double(), place) for table, place in on_k], on_v


LEFT = {
    "dropout": (lambda *a: a, dict(dropout_p=0.5), "has no dropout"),
    "scale": (lambda *a: a, dict(scale=-1.0), "takes a positive scale, and here is -1.0"),
    "two tables": (lambda *a: (*a[:4], a[4] * 2, a[5]), {}, "takes one encoding on each of q, k and v"),
    "nothing": (lambda *a: (*a[:3], [], [], []), {}, "at least one in all"),
    "side tables": (with_side_tables, {}, "takes W, and neither side tables nor bucket sums"),
    "sums": (lambda *a: (*a[:5], [(PLACE, PLACE.num_buckets)]), {}, "takes W, and neither side tables nor bucket sums"),
    "float64": (with_float64_tables, {}, "takes W of float32 or torch.bfloat16"),
    "ids": (lambda *a: (*a[:4], [(a[4][0][0], PLACE.ids())], a[5]), {}, "takes maps that factor, all of one size"),
}


@pytest.mark.parametrize("name", LEFT)
def test_calls_that_it_leaves_to_others(chosen, name):
    change, options, words = LEFT[name]
    given = change(*arguments())
    ours = operators.rpe_attention(*given, **options, seed=torch.tensor([1]))
    formula = operators.rpe_attention(*given, **options, seed=torch.tensor([1]), backend="eager")
    torch.testing.assert_close(ours, formula, atol=0, rtol=0)
    with pytest.raises(ValueError, match=words):
        operators.rpe_attention(*given, **options, seed=torch.tensor([1]), backend="cuda")


@pytest.mark.parametrize("method", ["euc", "quant"])
def test_maps_that_do_not_factor(chosen, method):
    given = arguments(get_bucket_map(method, (3, 4), 1, 1.9, 3.8, 15.2))
    with pytest.raises(ValueError, match="takes maps that factor"):
        operators.rpe_attention(*given, backend="cuda")


@pytest.mark.parametrize(("ratio", "skip", "fits"), [(1.9, 1, True), (1.9, 0, True), (2.0, 1, False), (2.0, 0, False)])
def test_as_many_rows_of_buckets_as_there_are_places(chosen, ratio, skip, fits):
    place = get_bucket_map("product", (3, 4), skip, ratio, 2 * ratio, 8 * ratio)
    given = arguments(place)
    given = (*(x[:, :, : 12 + skip] for x in given[:3]), *given[3:])
    with pytest.raises(ZeroDivisionError if fits else ValueError, match="cuda" if fits else "8 rows and columns"):
        operators.rpe_attention(*given, backend="cuda")


@pytest.mark.parametrize(
    ("size", "skip", "fits"),
    [
        ((128, 128), 0, True),
        ((512, 32), 0, True),
        ((513, 2), 0, False),
        ((2, 129), 0, False),
        ((128, 128), 1, False),
        ((3, 4), 20000, False),
    ],
)
def test_maps_that_shared_memory_holds(size, skip, fits):
    numbers = (*size, skip, 50, 7)
    call = fused.Call("cuda", 1.0, 0.0, (), numbers, (), False, False, True)
    q, table = torch.empty(1, 1, 1, 64, dtype=torch.half), torch.empty(1, 64, 50)
    reason = rpe_attention_cuda.why_not_call(call, q, [table])
    assert reason is None if fits else "takes maps up to 512 high, 128 wide" in reason


@pytest.mark.parametrize("tables", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)])
def test_calls_that_it_takes(chosen, tables):
    with pytest.raises(ZeroDivisionError, match="cuda"):
        operators.rpe_attention(*arguments(tables=tables))


def test_q_that_it_does_not_take(monkeypatch):
    q = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16)
    monkeypatch.setitem(_native.LOADED, "cuda", "here")
    assert rpe_attention_cuda.why_not(q) == "runs on CUDA, and q is on cpu"
    monkeypatch.delitem(_native.LOADED, "cuda")
    monkeypatch.setitem(_native.MISSING, "cuda", "nowhere")
    assert rpe_attention_cuda.why_not(q) == "needs the CUDA operators: nowhere"
    assert list(fused.BACKENDS) == ["cpu", "cuda", "triton"]


@pytest.mark.skipif("cpu" not in _native.LOADED, reason="the operators are not built")
@pytest.mark.parametrize(("on", "keeps"), [(2, True), (7, True), (7, False)])
def test_shapes_for_compilers(on, keeps):
    operator = torch.ops.rpe_ops
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 3, 65, 16, dtype=torch.float16, device="cuda")
        count = bin(on).count("1")
        tables = [
            torch.empty(3, 50, 16, device="cuda") if on == 7 and n == 2 else torch.empty(3, 16, 50, device="cuda")
            for n in range(count)
        ]
        maps = [torch.empty(34, dtype=torch.int32, device="cuda")] * count
        rest = (tables, maps, [5, 13, 0, 49, 7] * count, on, 0.25)
        out, lse, sums = operator.rpe_attention_cuda(q, k, v, *rest, keeps)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
        assert sums.shape == ((2, 3, 65, 64) if on == 7 and keeps else (0,))
        found = operator.rpe_attention_cuda_backward(out, q, k, v, out, lse, sums, *rest)
        assert [x.shape for x in found[:3]] == [q.shape] * 3 and [x.shape for x in found[3]] == [
            x.shape for x in tables
        ]


class OnCPU:
    """Stands in for the CUDA kernels: the operators by the formula, and what they were asked to keep."""

    def __init__(self):
        self.kept, self.fails = [], False

    @staticmethod
    def arguments(q, k, v, tables, maps, numbers, on, scale):
        of = [[], [], []], [[], [], []], [[], [], []]
        for n, place in enumerate(place for place in range(3) if on >> place & 1):
            of[0][place], of[1][place] = [tables[n]], [maps[n]]
            of[2][place] = numbers[5 * n : 5 * n + 5]
        settings = dict(scale=scale, attn_mask=None, dropout_p=0.0, seed=None)
        return (q, k, v, *rpe_attention_eager.pairs_of(*of)), settings

    def forward(self, q, k, v, tables, maps, numbers, on, scale, keeps):
        if self.fails:
            raise RuntimeError("CUDA out of memory in rpe_attention")
        self.kept.append(keeps)
        arguments, settings = self.arguments(q, k, v, tables, maps, numbers, on, scale)
        out, lse, _ = rpe_attention_eager.attention_and_lse(*arguments, **settings)
        sums = q.new_ones(*q.shape[:3], 64) if on & 4 and keeps else q.new_empty(0)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse, sums

    def backward(self, grad_out, q, k, v, out, lse, sums, tables, maps, numbers, on, scale):
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert not on & 4 or ((sums == 1).all() and sums.shape[3] == 64)
        arguments, settings = self.arguments(q, k, v, tables, maps, numbers, on, scale)
        grads = rpe_attention_eager.gradients(grad_out, [], arguments, **settings)
        inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads[:3]]
        return *inside, [x.contiguous() for x in grads[3:]]


@pytest.fixture
def computed(monkeypatch):
    if "cpu" not in _native.LOADED:
        pytest.skip("the operators are not built")
    monkeypatch.setattr(rpe_attention_cuda, "why_not", lambda q, attn_mask=None: None)
    monkeypatch.setattr(operators, "choose", lambda *_: "cuda")
    stand_in = OnCPU()
    library = torch.library.Library("rpe_ops", "IMPL")
    library.impl("rpe_attention_cuda", stand_in.forward, "CPU")
    library.impl("rpe_attention_cuda_backward", stand_in.backward, "CPU")
    yield stand_in
    library._destroy()


def leaves_of(tables):
    q, k, v, on_q, on_k, on_v = arguments(dtype=torch.float32, tables=tables)
    leaves = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
    leaves += [x.requires_grad_() for x in (*(t for t, _ in (*on_q, *on_k)), *(W for _, W in on_v))]

    def call(backend, q, k, v, *weights):
        of = iter(weights)
        on_q, on_k = ([(next(of), PLACE) for _ in range(count)] for count in tables[:2])
        on_v = [(PLACE, W) for W in of]
        return operators.rpe_attention(q, k, v, on_q, on_k, on_v, backend=backend)[0]

    return leaves, call


@pytest.mark.parametrize("tables", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)])
def test_results_and_both_derivatives_reach_the_caller(computed, tables):
    leaves, call = leaves_of(tables)
    firsts, seconds = [], []
    for backend in (None, "eager"):
        out = call(backend, *leaves)
        firsts.append([out, *torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)])
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in firsts[-1][1:]), leaves))
    assert computed.kept == [True]
    torch.testing.assert_close(*firsts)
    torch.testing.assert_close(*seconds, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(call(None, *leaves), firsts[1][0].detach())
    assert computed.kept == [True, False]


def test_a_compiled_graph_holds_it(computed):
    leaves, call = leaves_of((1, 1, 1))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(None, *leaves) for f in (compiled, call)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), leaves) for out in results))
    assert len(computed.kept) == 2


def test_more_tables_than_triton_takes(monkeypatch):
    monkeypatch.setattr(rpe_attention_triton, "why_not", lambda q, attn_mask=None: None)
    monkeypatch.setattr(operators, "choose", lambda *_: "triton")
    q, k, v, on_q, on_k, on_v = arguments()
    formula = operators.rpe_attention(q, k, v, on_q, on_k * 3, on_v, backend="eager")
    torch.testing.assert_close(operators.rpe_attention(q, k, v, on_q, on_k * 3, on_v), formula, atol=0, rtol=0)
    assert not rpe_attention_triton.BROKEN
    with pytest.raises(ValueError, match='backend="triton" takes at most 2 tables .* here are 3'):
        operators.rpe_attention(q, k, v, on_q, on_k * 3, on_v, backend="triton")


def test_memory_that_is_not_there_is_torchs_error(computed):
    computed.fails = True
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory in rpe_attention"):
        operators.rpe_attention(*arguments())
