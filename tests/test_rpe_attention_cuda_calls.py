"""Which calls the backend "cuda" takes, and who computes the others. No GPU is needed: its kernels do not run here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from irpe import get_bucket_map
from rpe_ops import _native, fused, rpe_attention_cuda
from rpe_ops import rpe_attention as operators

PLACE = get_bucket_map("product", 3, 4, 1, 1.9, 3.8, 15.2)


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
    given = arguments(get_bucket_map(method, 3, 4, 1, 1.9, 3.8, 15.2))
    with pytest.raises(ValueError, match="takes maps that factor"):
        operators.rpe_attention(*given, backend="cuda")


@pytest.mark.parametrize(("ratio", "skip", "fits"), [(1.9, 1, True), (1.9, 0, True), (2.0, 1, False), (2.0, 0, False)])
def test_as_many_rows_of_buckets_as_there_are_places(chosen, ratio, skip, fits):
    place = get_bucket_map("product", 3, 4, skip, ratio, 2 * ratio, 8 * ratio)
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
    inputs = fused.Inputs(q, q, q, None, None, [], [table], [], [], [q], [])
    reason = rpe_attention_cuda.why_not_call(call, inputs)
    assert reason is None if fits else "takes maps up to 128 x 128" in reason


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
