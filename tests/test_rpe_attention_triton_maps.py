"""The kernels of backend "triton" on maps of every kind, run by Triton's interpreter, against the law."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE
from map_cases import a_map, check
from triton_listed import only_listed_kernels  # noqa: F401 (a fixture)

from rpe_ops import _triton_call, _triton_call_axes, _triton_launch

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")

# it takes arrays of one element for numbers, which numpy no longer does
BROKEN = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and int(numpy.__version__.split(".")[0]) >= 2
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_interpreted")
half, brain = torch.float16, torch.bfloat16


@pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
@pytest.mark.skipif(BROKEN, reason="the interpreter of triton 3.6 does not run on numpy 2.4")
@pytest.mark.slow
@pytest.mark.parametrize("part", ["factor and qkv", "factor and not qkv", "not factor"])
def test_interpreted(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


P = ["product"]


@interpreted
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((5, 7, 1), {}),
        ((5, 7, 0), dict(B=2)),
        ((1, 1, 0), {}),
        ((2, 34, 5), dict(H=1)),
        ((1, 67, 3), dict(H=1)),
        ((17, 3, 1), dict(H=1, layout="gaps")),
        ((2, 3, 70), dict(D=40)),
        ((16, 4, 20), dict(H=1, D=20)),
        ((4, 16, 3), dict(ratio=3.0, H=1)),
        ((6, 7, 1), dict(dtype=brain)),
        ((6, 9, 1), dict(dtype=half, layout="detr", B=2)),
        ((5, 7, 1), dict(mask="bool")),
        ((5, 6, 1), dict(mask="float", dropout_p=0.3, dtype=brain)),
        ((4, 5, 0), dict(dropout_p=0.5)),
    ],
    ids=str,
)
def test_maps_that_factor_on_qkv(grid, options):
    kernels = check(grid, (P, P, P), **options)
    assert kernels == ["axes_forward", "axes_backward_queries", "axes_backward_keys"]


@interpreted
@pytest.mark.parametrize("on", ["q", "k", "v", "qk", "kv"])
@pytest.mark.parametrize("grid", [(6, 5, 1), (3, 4, 0)], ids=str)
def test_maps_that_factor_on_some(grid, on):
    kernels = check(grid, tuple(P if c in on else [] for c in "qkv"))
    assert kernels[0] == "axes_forward"


@interpreted
def test_maps_that_factor_and_differ():
    assert check((5, 6, 1), (["cross_rows"], ["cross_cols"], P))[0] == "axes_forward"


@interpreted
@pytest.mark.parametrize(
    ("grid", "on", "options"),
    [
        ((5, 7, 1), ([], [], []), {}),
        ((5, 7, 1), (["euc"], ["quant"], ["euc"]), {}),
        ((5, 7, 0), (["cross_rows", "cross_cols"],) * 3, dict(dtype=brain)),
        ((3, 40, 5), (P, ["euc"], ["quant"]), dict(H=1)),
        ((1, 70, 3), (["quant"], P, ["euc"]), dict(H=1, D=20)),
        ((4, 5, 2), (["free", "euc"], ["euc", "free"], ["euc", "free"]), {}),
        ((4, 5, 2), (["free"], ["free"], ["free"]), dict(shape=(70, 9), mask="float", dropout_p=0.3)),
        ((5, 6, 1), (["quant"], ["quant"], ["quant"]), dict(ratio=33.0, mask="bool", dtype=half)),
        ((5, 6, 1), (P, P, P), dict(ratio=8.0)),
        ((9, 2, 70), ([], ["euc"], ["euc"]), dict(H=1)),
    ],
    ids=str,
)
def test_maps_of_every_other_kind(grid, on, options):
    assert check(grid, on, **options)[-1] == "lookup_backward_keys"


@interpreted
@pytest.mark.parametrize("kind", ["product", "euc", "free"])
def test_uninitialised_memory_does_not_matter_and_results_repeat(kind):
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        check((5, 7, 1), ([kind],) * 3)
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
@pytest.mark.parametrize("kind", ["product", "euc"])
def test_a_map_with_wrong_numbers_is_read_and_written_within_bounds(kind):
    q = torch.randn(1, 1, 36, 16)
    tensor, numbers, _ = a_map(kind, (5, 7, 1), (36, 36), 1.9)
    lut = torch.randn(1, 1, 38, numbers[3])[:, :, 1:37]
    for wrong in (-(10**6), 10**6):
        broken = torch.full_like(tensor, wrong)
        rest = [lut], [lut], *[[broken]] * 3, *[numbers] * 3, None, None, 0.25, 0.0
        out, lse, sums = _triton_launch.forward(q, q, q, *rest)
        grads = _triton_launch.backward(out, sums, q, q, q, out, sums, lse, *rest)
        assert all(x.isfinite().all() for x in (out, *sums, *grads[:3], *grads[3], *grads[4]))


@interpreted
def test_tables_in_places_need_no_products_of_the_launcher(monkeypatch):
    height, width, skip = 5, 7, 1
    tensor, numbers, _ = a_map("product", (height, width, skip), None, 1.9)
    q, lut = torch.randn(2, 1, 36, 16), torch.randn(2, 1, 36, numbers[3])
    maps, sizes = [[tensor]] * 3, [numbers] * 3
    rest = *maps, *sizes, None, None, 0.25, 0.0
    before = _triton_launch.forward(q, q, q, [lut], [lut], *rest)
    axes = _triton_call_axes.axes_of(q, q, maps, sizes)
    bucket, ones, once = _triton_call_axes.turn(axes, 0, lut)
    assert axes.size == (64,) * 3 and ones.shape == (50, 64) and once.sum(1).tolist() == [1.0] * 50
    assert torch.equal(lut.index_select(-1, bucket), lut @ ones)
    monkeypatch.setattr(_triton_call_axes, "turn", None)
    out, _, (sums,) = _triton_launch.forward(q, q, q, [lut @ ones], [lut @ ones], *rest, by_head=True)
    torch.testing.assert_close(out, before[0])
    torch.testing.assert_close(sums @ ones.t(), before[2][0])
    assert sums.transpose(0, 1).is_contiguous()


@interpreted
def test_constants_of_an_h100(monkeypatch):
    monkeypatch.setattr(_triton_call, "precision_of", lambda _: ("interpreted", 9))
    monkeypatch.setattr("triton_listed.TARGET", ["cuda:90"])
    assert check((9, 7, 1), ([], P, []), brain, D=64)[0] == "axes_forward"
    assert check((3, 4, 1), (P, P, P), half, D=64, H=1)[0] == "axes_forward"


def test_a_row_bucket_is_multiplied_exactly():
    for places in (8, 16):
        for columns in range(1, places + 1):
            factor = -(-places * 2**16 // columns)
            assert all(columns * g * factor >> 16 == places * g for g in range(17))
            assert 16 * columns * factor < 2**31
