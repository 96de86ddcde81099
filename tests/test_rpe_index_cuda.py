"""The CUDA kernels of rpe_index and rpe_bucket_sum, compiled for the host: `on_host/cuda.h` emulates a block's threads.

On a GPU test_rpe_index_gpu.py runs them. Here every result is NaN beforehand, as is what shared memory holds.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from irpe import get_bucket_ids_2d
from rpe_ops import reference

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="no C++ compiler, or no fibers that are known"
)
DTYPES = {torch.float64: b"d", torch.float32: b"f", torch.float16: b"h", torch.bfloat16: b"b"}
RISING, FALLING, SHUFFLED = range(3)  # in which order the threads of a block take turns
INT = ctypes.c_int64


class Rows(ctypes.Structure):
    _fields_ = [(name, INT) for name in ("heads", "queries", "stride_b", "stride_h", "stride_i")]


class Index(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int), ("stride_i", INT), ("stride_j", INT)]


class Problem(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("rows", Rows),
        *((name, INT) for name in ("maps", "buckets", "keys")),
        ("index", Index),
        ("result", ctypes.c_void_p),
    ]


class Options(ctypes.Structure):
    _fields_ = [(name, INT) for name in ("multiprocessors", "first_block", "order")]


def build(library):
    flags = os.environ.get("RPE_OPS_CXXFLAGS", "-O1").split()
    if "-fsanitize=address" in flags:  # fibers have stacks of their own
        flags += ["--param", "asan-stack=0"]
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "tests" / "on_host" / "rpe_index.cpp"
    command = [COMPILER, "-std=c++17", *flags, "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{include}", source, "-o", library], check=True)


@pytest.fixture(scope="module")
def library(made_once):
    return made_once("rpe_index_on_host.so", build)


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


class Kernels:
    """The two operators as `rpe_index.cu` calls them.

    `blocks` is how many the last call took, 0 where the slow kernels ran; `sorts_again` is true where the order of a
    row's keys was not kept from one group of maps to the next.
    """

    def __init__(self, library):
        loaded = ctypes.CDLL(str(library))
        self._index, self._sum = loaded.rpe_index_on_host, loaded.rpe_bucket_sum_on_host
        self._index.restype = self._sum.restype = INT

    def index(self, x, index, order=SHUFFLED, multiprocessors=2, first_block=0, out=None):
        if out is None:
            out = torch.full((*x.shape[:3], index.shape[1]), torch.nan, dtype=x.dtype)
        options = Options(multiprocessors, first_block, order)
        problem = self._problem(x, index, x.shape[3], out)
        self.blocks = self._index(ctypes.byref(problem), ctypes.byref(options), x.element_size())
        return out

    def sum(self, y, index, buckets, order=SHUFFLED, multiprocessors=2):
        out = torch.full((*y.shape[:3], buckets), torch.nan, dtype=y.dtype)
        options = Options(multiprocessors, 0, order)
        problem = self._problem(y, index, buckets, out)
        result = self._sum(ctypes.byref(problem), ctypes.byref(options), ctypes.c_char(DTYPES[y.dtype]))
        self.blocks, self.sorts_again = result // 2, result % 2 == 1
        return out

    @staticmethod
    def _problem(x, index, buckets, out):
        b, h, queries, _ = x.shape
        heads = b * h if x.stride(0) == h * x.stride(1) else h
        rows = Rows(heads, queries, *x.stride()[:3])
        ids = Index(index.data_ptr(), index.element_size(), *index.stride())
        return Problem(x.data_ptr(), rows, b * h, buckets, index.shape[1], ids, out.data_ptr())


def check_index(kernels, x, index, **options):
    assert torch.equal(kernels.index(x, index, **options), reference.rpe_index(x, index))


def check_sum(kernels, y, index, buckets, **options):
    exact = reference.rpe_bucket_sum(y.double(), index, buckets)
    error = (kernels.sum(y, index, buckets, **options).double() - exact).abs().max()
    assert error <= 16 * torch.finfo(y.dtype).eps * max(1, exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "index_dtype", "kind"),
    [
        ((2, 3, 5, 7, 6), torch.uint8, "usual"),
        ((2, 3, 5, 7, 6), torch.int16, "usual"),
        ((3, 11, 13, 127, 50), torch.int32, "usual"),
        ((1, 70, 4, 197, 50), torch.int64, "usual"),
        ((1, 66, 3, 700, 96), torch.uint8, "usual"),
        ((1, 2, 67, 1, 3), torch.int16, "usual"),  # rows of one key
        ((1, 1, 1, 1, 1), torch.int32, "usual"),
        ((1, 3, 2, 5000, 81), torch.int64, "usual"),  # rows longer than a chunk
        ((1, 2, 2, 9, 11000), torch.int32, "too large"),
        ((1, 2, 2, 225, 320), torch.int64, "usual"),
        ((1, 2, 2, 40, 3000), torch.int16, "too large"),
    ],
)
def test_both_equal_the_law(kernels, dtype, sizes, index_dtype, kind):
    b, h, lq, lk, n = sizes
    index = torch.randint(min(n, torch.iinfo(index_dtype).max), (lk, lq)).to(index_dtype).t()
    check_index(kernels, torch.randn(b, h, lq, n).to(dtype), index)
    assert (kernels.blocks > 0) == (kind == "usual")
    check_sum(kernels, torch.randn(h, b, lq, lk).to(dtype).transpose(0, 1), index, n)
    assert (kernels.blocks > 0) == (kind == "usual" and not (n == 320 and dtype == torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lk", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 223, 224, 225, 449])
def test_every_alignment_of_rows(kernels, dtype, lk):
    for maps, lq in ((1, 5), (9, 3), (33, 2)):
        index = torch.randint(50, (lq, lk))
        check_index(kernels, torch.randn(1, maps, lq, 50).to(dtype), index)
        check_sum(kernels, torch.randn(1, maps, lq, lk).to(dtype), index, 50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kernels, dtype):
    index = torch.randint(50, (33, 9), dtype=torch.int32).t()
    rows = torch.randn(9, 2, 6, 53).to(dtype).permute(1, 2, 0, 3)
    for first in range(4):  # where a row begins within four, or eight, bytes
        check_index(kernels, rows[..., first : first + 50], index)
        check_index(kernels, rows[..., first : first + 49], index.clamp(max=48))
    check_index(kernels, torch.randn(1, 6, 1, 50).to(dtype).expand(2, -1, 9, -1), index)  # a table of biases
    y = torch.randn(6, 2, 9, 40).to(dtype).transpose(0, 1)
    for first in range(4):
        check_sum(kernels, y[..., first : first + 33], index, 50)
    check_sum(kernels, torch.ones(1, 1, 1, 33, dtype=dtype).expand(2, 6, 9, 33), index, 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width", "skip"), [(14, 9, 1), (3, 29, 2)])
def test_neither_order_nor_multiprocessors_change_a_bit(kernels, dtype, height, width, skip):
    index, n = get_bucket_ids_2d("product", height, width, skip, 1.9, 3.8, 15.2)
    x, y = (torch.randn(5, 14, index.shape[0], keys).to(dtype) for keys in (n, index.shape[1]))
    check_sum(kernels, y, index, n)
    sums, maps = kernels.sum(y, index, n), reference.rpe_index(x, index)
    for order in (RISING, FALLING, SHUFFLED):
        for multiprocessors in (1, 132):
            options = dict(order=order, multiprocessors=multiprocessors)
            assert torch.equal(kernels.index(x, index, **options), maps)
            assert torch.equal(kernels.sum(y, index, n, **options), sums)


def test_a_row_is_sorted_again_where_its_order_takes_too_much_memory(kernels):
    for keys, again in ((197, False), (4097, False), (12000, True)):
        index = torch.randint(50, (1, keys), dtype=torch.uint8)
        check_sum(kernels, torch.randn(1, 70, 1, keys), index, 50, multiprocessors=1)
        assert kernels.sorts_again == again


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kernels, dtype):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2])
    x = x.to(dtype).expand(8, 1, 1, 7)
    index = torch.arange(7).expand(1, 7)
    for y in (kernels.index(x, index), kernels.sum(x, index, 7)):
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(kernels.index(x, index)[0, 0, 0, 1])


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    ("call", "buckets"),
    [("index(x, index)", 6), ("sum(y, index, n)", 6), ("index(x, index)", 40000), ("sum(y, index, n)", 2000)],
)
def test_an_index_outside_the_table_is_a_device_assert(library, run_python, beyond, call, buckets):
    code = f"""
import torch
from test_rpe_index_cuda import Kernels
n = {buckets}
x, y, index = torch.zeros(1, 1, 5, n), torch.zeros(1, 1, 5, 7), torch.zeros(5, 7, dtype=torch.long)
index[4, 6] = {buckets if beyond else -1}
Kernels({str(library)!r}).{call}
"""
    done = run_python(code, path=[ROOT / "tests", ROOT], check=False)
    assert done.returncode != 0 and "index out of bounds: expected 0 <= index < N" in done.stderr, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_to_the_31_entries(kernels, dtype):
    """The last blocks of a map whose memory is never touched elsewhere."""
    length = 46400  # squared: 2^31 + 5.5 million
    index = torch.from_numpy(np.zeros((length, length), np.uint8))
    index[-1, -5:] = torch.arange(1, 6, dtype=torch.uint8)
    x = torch.arange(6.0, dtype=dtype).expand(1, 1, length, 6)
    out = torch.from_numpy(np.zeros((1, 1, length, length * dtype.itemsize), np.uint8)).view(dtype)
    kernels.index(x, index, first_block=-2, out=out)
    assert out.numel() > 2**31 and kernels.blocks > 2**31 // 2048
    assert out[0, 0, -1, -6:].tolist() == [0, 1, 2, 3, 4, 5]
    last = out.flatten()[-2048 - 5 :]
    last[:-5] -= 1  # zeros were written there
    assert (last[:-5] == -1).all()
