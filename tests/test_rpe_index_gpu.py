"""The operators on a GPU. Needs pytest and numpy beside torch, nothing else: `make gpu-check` runs it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE

from rpe_ops import _native, reference
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]


def test_the_cuda_library_is_loaded():
    assert "cuda" in _native.LOADED, _native.MISSING


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 7, 6), (3, 11, 127, 127, 50), (1, 1, 3, 5000, 81), (2, 2, 3, 9, 30000)])
def test_both_equal_the_law(dtype, index_dtype, sizes):
    b, h, lq, lk, n = sizes
    index = torch.randint(min(n, torch.iinfo(index_dtype).max), (lk, lq), device="cuda").to(index_dtype).t()
    x = torch.randn(b, h, n, lq, device="cuda").to(dtype).transpose(2, 3)
    y = torch.randn(h, b, lq, lk, device="cuda").to(dtype).transpose(0, 1)
    assert torch.equal(rpe_index(x, index), reference.rpe_index(x, index))
    sums = rpe_bucket_sum(y, index, n)
    exact = torch.zeros(b, h, lq, n, dtype=torch.float64, device="cuda").scatter_add(
        -1, index.long().expand(y.shape), y.double()
    )
    assert (sums.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * max(1, exact.abs().max())
    assert all(torch.equal(rpe_bucket_sum(y, index, n), sums) for _ in range(3))


def test_gradients():
    index = torch.randint(6, (5, 7), device="cuda")
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(rpe_index, (x, index), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rpe_index, (x, index))


def test_empty():
    index = torch.zeros(5, 0, dtype=torch.long, device="cuda")
    assert rpe_index(torch.randn(2, 3, 5, 6, device="cuda"), index).shape == (2, 3, 5, 0)
    assert not rpe_bucket_sum(torch.randn(2, 3, 5, 0, device="cuda"), index, 6).any()


def test_cuda_graph_and_stream():
    index = torch.randint(50, (127, 127), device="cuda")
    x = torch.randn(2, 3, 127, 50, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rpe_bucket_sum(rpe_index(x, index), index, 50)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rpe_bucket_sum(rpe_index(x, index), index, 50)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, rpe_bucket_sum(rpe_index(x, index), index, 50))


def test_compile():
    index = torch.randint(50, (127, 127), device="cuda")
    x = torch.randn(2, 3, 127, 50, device="cuda")

    def both(x):
        return rpe_bucket_sum(rpe_index(x, index), index, 50)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize("value", [-1, 6])
def test_an_index_outside_the_table_is_a_device_assert(value):
    code = f"""
import torch
from rpe_ops.rpe_index import rpe_index
rpe_index(torch.zeros(1, 1, 5, 6, device="cuda"), torch.full((5, 7), {value}, device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0 and "index out of bounds: expected 0 <= index < N" in done.stderr + done.stdout
