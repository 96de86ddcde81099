"""The functions of rpe_ops/csrc/cuda/warp.h as `on_host/warp.h` emulates them, each against its definition."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="no C++ compiler, or no fibers that are known"
)
TYPES = {torch.float16: b"h", torch.bfloat16: b"b"}
ORDERS = RISING, AT_ONCE, SHUFFLED = range(3)
LANE = torch.arange(32)
GROUP, T = LANE // 4, LANE % 4


def build(library):
    flags = os.environ.get("RPE_OPS_CXXFLAGS", "-O2").split()
    if "-fsanitize=address" in flags:  # fibers have stacks of their own
        flags += ["--param", "asan-stack=0"]
    command = [COMPILER, "-std=c++17", *flags, "-Wall", "-shared", "-fPIC", f"-I{ROOT / 'tests'}"]
    subprocess.run([*command, ROOT / "tests" / "on_host" / "warp.cpp", "-o", library], check=True)


@pytest.fixture(scope="module")
def library(made_once):
    return made_once("warp_on_host.so", build)


@pytest.fixture(scope="module")
def warp(library):
    loaded = ctypes.CDLL(str(library))
    loaded.power.restype, loaded.one.restype = ctypes.c_float, ctypes.c_uint32
    return loaded


def at(tensor):
    assert tensor.is_contiguous()
    pointer = ctypes.c_void_p(tensor.data_ptr())
    pointer.keeps = tensor
    return pointer


def pairs(matrix, rows, columns, turned=False):
    """What lanes hold of a matrix: entry (row, column) in the low half, the next of the row, or column, in the high."""
    high = (rows + 1, columns) if turned else (rows, columns + 1)
    return torch.stack([matrix[rows, columns], matrix[high]], dim=-1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("depth", [16, 8])
def test_products(warp, dtype, depth, order):
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    row, column = GROUP, 2 * T
    left = [pairs(a, row + i % 2 * 8, column + i // 2 * 8) for i in range(depth // 4)]
    right = [pairs(b, 2 * T + i * 8, GROUP, turned=True) for i in range(depth // 8)]
    zeros = torch.zeros(32, 2, dtype=dtype)
    left = torch.stack((left + [zeros] * 4)[:4], dim=1).contiguous()
    right = torch.stack((right + [zeros] * 2)[:2], dim=1).contiguous()
    lanes = torch.cat([pairs(c, row, column), pairs(c, row + 8, column)], dim=1).contiguous()
    warp.multiplied(ctypes.c_char(TYPES[dtype]), depth, at(left), at(right), at(lanes), order)
    expected = a.double() @ b.double() + c
    expected = torch.cat([pairs(expected, row, column), pairs(expected, row + 8, column)], dim=1)
    torch.testing.assert_close(lanes.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_by_way_of_shared_memory(warp, dtype, order):
    a, b, result = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), torch.nan)
    warp.multiplied_from_shared(ctypes.c_char(TYPES[dtype]), at(a), at(b), at(result), order)
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("matrices", "turned"), [(4, False), (2, False), (4, True)])
def test_matrices_from_shared_memory(warp, matrices, turned, order):
    memory = torch.randint(2**15, (512,)).short()
    offset = torch.randperm(64)[:32] * 16
    if matrices == 2:
        offset[16:] = -1  # not read
    result = torch.zeros(32, matrices, 2, dtype=torch.short)
    warp.loaded(matrices, int(turned), at(memory), 1024, at(offset), at(result), order)
    for m in range(matrices):
        matrix = torch.stack([memory[o // 2 : o // 2 + 8] for o in offset[8 * m : 8 * m + 8].tolist()])
        expected = pairs(matrix.t() if turned else matrix, GROUP, 2 * T)
        assert torch.equal(result[:, m], expected), m


def test_copies_arrive_as_late_as_they_may_at_once_or_either_way(warp):
    memory = torch.arange(1, 49, dtype=torch.uint8)
    late = [[1, 255, 255], [1, 255, 255], [1, 0, 255], [1, 0, 33]]
    soon = [[1, 0, 33]] * 4

    def seen(order, there=1):
        result = torch.zeros(4, 3, dtype=torch.uint8)
        warp.copied(at(memory), ctypes.c_int64(0), there, at(result), order)
        return result.tolist()

    assert seen(RISING) == late and seen(AT_ONCE) == soon
    assert seen(SHUFFLED)[3] == soon[3] and seen(SHUFFLED) not in (late, soon)
    assert [row[0] for row in seen(RISING, there=0)] == [0] * 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 96])
def test_lanes_talk_within_their_warp(warp, order, threads):
    for mask in (1, 2, 4, 8, 16, 21, 31):
        x, other, some = torch.randn(threads), torch.zeros(threads), torch.zeros(threads, dtype=torch.int32)
        bound = x.view(-1, 32).amax(dim=1).sort().values[-2].item() if threads > 32 else 9.0
        warp.talked(ctypes.c_int64(threads), at(x), mask, ctypes.c_float(bound), at(other), at(some), order)
        assert torch.equal(other, x[torch.arange(threads) ^ mask])
        assert torch.equal(some.bool(), (x > bound).view(-1, 32).any(dim=1).repeat_interleave(32))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_of_16_bits(warp, dtype):
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    finite = every[every.isfinite()].float().unique()
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    infinity = torch.tensor(torch.inf)
    x = torch.cat([
        every.float(), middles, middles.nextafter(infinity), middles.nextafter(-infinity),
        torch.randn(50000), torch.randn(50000) * 2.0 ** torch.randint(-149, 127, (50000,)),
        torch.tensor([65519.996, 65520.0, -65520.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38, torch.inf, torch.nan]),
    ])  # fmt: skip
    x = torch.stack([x, x.flip(0)], dim=1)
    both, again = torch.zeros(x.shape, dtype=dtype), torch.zeros_like(x)
    warp.packed(ctypes.c_char(TYPES[dtype]), ctypes.c_int64(len(x)), at(x), at(both), at(again))
    expected = x.to(dtype)
    number = ~x.isnan()
    assert torch.equal(both[number].view(torch.short), expected[number].view(torch.short))
    assert (both[~number].view(torch.short) == 0x7FFF).all() and again[~number].isnan().all()
    assert torch.equal(again[number].view(torch.int32), expected[number].float().view(torch.int32))
    assert warp.one(ctypes.c_char(TYPES[dtype])) == torch.ones(1, dtype=dtype).view(torch.short).item()


def test_powers_of_2_have_no_subnormal_numbers(warp):
    values = {0.0: 1.0, 3.0: 8.0, -126.0: 2.0**-126, -126.5: 0.0, -140.0: 0.0, 128.0: torch.inf, -torch.inf: 0.0}
    for x, y in values.items():
        assert warp.power(ctypes.c_float(x)) == y
    assert warp.power(ctypes.c_float(0.3)) == pytest.approx(2**0.3, rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_copies_of_4_bytes(warp, order):
    memory, result = torch.randint(255, (12,), dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    warp.copied4(at(memory[4:]), ctypes.c_int64(44), at(result), order)
    assert torch.equal(result, memory[4:8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("loaded(4, 0, memory, c_int64(512), offsets(8), memory, 0)", "of 4: not at a multiple of 16"),
        ("loaded(4, 1, memory, c_int64(512), offsets(512), memory, 0)", "turned: not in shared memory"),
        ("loaded(2, 0, memory, c_int64(512), offsets(-16), memory, 0)", "of 2: not in shared memory"),
        ("copied(c_void_p(memory.value + 4), c_int64(0), 1, memory, 0)", "copy16: not at a multiple of 16"),
        ("copied(memory, c_int64(8), 1, memory, 0)", "copy16: not at a multiple of 16"),
        ("copied(memory, c_int64(48), 1, memory, 0)", "copy16: not in shared memory"),
        ("copied4(memory, c_int64(2), memory, 0)", "copy4: not at a multiple of 4"),
        ("copied4(memory, c_int64(48), memory, 0)", "copy4: not in shared memory"),
        ("talked(c_int64(32), memory, 32, c_float(0), memory, memory, 0)", "exchanged: a lane beyond 31"),
        ("apart()", "other lanes are in another function"),
        ("gone()", "waits for ever"),
    ],
)
def test_what_stops_a_program(library, call, message):
    code = f"""
from ctypes import *
block = create_string_buffer(8192)
memory = c_void_p((addressof(block) + 63) // 64 * 64)
def offsets(ninth):
    return (c_int64 * 32)(*[ninth if lane == 9 else 16 * lane for lane in range(32)])
CDLL({str(library)!r}).{call}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0 and message in done.stderr, done.stderr
