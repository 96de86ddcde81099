"""The compiled kernels: every path of theirs against plain torch, and what they promise beyond it."""

from pathlib import Path

import pytest
import torch
from attention_cases import ISAS

from rpe_ops import _native
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

pytestmark = pytest.mark.skipif("cpu" not in _native.LOADED, reason=_native.MISSING.get("cpu", ""))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What the kernels do not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each instruction set of this machine in turn."""
    monkeypatch.setenv("RPE_OPS_ISA", request.param)


def plain_index(x, index):
    return x.gather(-1, index.long().expand(*x.shape[:2], *index.shape))


def plain_sum(y, index, n):
    return y.new_zeros(*y.shape[:3], n).scatter_add(-1, index.long().expand(y.shape), y)


def check_sum(y, index, n):
    exact = plain_sum(y.double(), index, n)
    sums = rpe_bucket_sum(y, index, n)
    assert sums.dtype == y.dtype and sums.is_contiguous()
    same_dtype = (plain_sum(y, index, n).double() - exact).abs().max()
    slack = 16 * torch.finfo(y.dtype).eps * max(1.0, exact.abs().max().item())
    assert (sums.double() - exact).abs().max() <= 2 * same_dtype + slack


# buckets around every number of registers that a table may fill, keys around every length of a tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 33, 50, 64, 65, 81, 128, 129, 256, 257, 1000])
def test_every_table_size(dtype, n, isa):
    for maps, keys in ((1, 37), (3, 5), (8, 64), (11, 197)):
        index = torch.randint(n, (4, keys))
        index[0] = n - 1
        x = torch.randn(1, maps, 4, n).to(dtype)
        assert torch.equal(rpe_index(x, index), plain_index(x, index))
        check_sum(torch.randn(1, maps, 4, keys).to(dtype), index, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100])
def test_every_row_length(dtype, keys, isa):
    for maps in (1, 2, 4, 7, 9, 16):
        index = torch.randint(50, (3, keys), dtype=torch.uint8)
        x = torch.randn(maps, 1, 3, 50).to(dtype)
        assert torch.equal(rpe_index(x, index), plain_index(x, index))
        check_sum(torch.randn(maps, 1, 3, keys).to(dtype), index, 50)


def test_a_table_that_needs_wide_ids():
    index = torch.randint(70000, (3, 40))
    x = torch.randn(2, 5, 3, 70000)
    assert torch.equal(rpe_index(x, index), plain_index(x, index))
    check_sum(torch.randn(2, 5, 3, 40), index, 70000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, isa):
    index = torch.randint(50, (33, 9), dtype=torch.int32).t()
    x = torch.randn(9, 50, 2, 6).to(dtype).permute(2, 3, 0, 1)
    assert torch.equal(rpe_index(x, index), plain_index(x, index))
    broadcast = torch.randn(1, 6, 1, 50).to(dtype).expand(2, -1, 9, -1)
    assert torch.equal(rpe_index(broadcast, index), plain_index(broadcast, index))
    y = torch.randn(2, 6, 33, 9).to(dtype).transpose(2, 3)
    check_sum(y, index, 50)
    check_sum(torch.randn(6, 2, 9, 40).to(dtype).transpose(0, 1)[..., 3:36], index, 50)
    check_sum(torch.ones(1, 1, 1, 1, dtype=dtype).expand(2, 6, 9, 33), index, 50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, isa):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2])
    x = x.to(dtype).expand(8, 1, 1, 7)
    index = torch.arange(7).expand(1, 7)
    for y in (rpe_index(x, index), rpe_bucket_sum(x, index, 7)):
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(rpe_index(x, index)[0, 0, 0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_the_run(dtype):
    index = torch.randint(50, (197, 197))
    y = torch.randn(3, 5, 197, 197).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [(rpe_bucket_sum(y, index, 50), rpe_index(y[..., :50], index))]
    finally:
        torch.set_num_threads(threads)
    for sums, maps in results:
        assert torch.equal(sums, results[0][0]) and torch.equal(maps, results[0][1])


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, 6, 255, 2**40])
@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 8, 5, 197)])
def test_an_index_outside_the_table_is_named(index_dtype, value, shape):
    if value > torch.iinfo(index_dtype).max or value < torch.iinfo(index_dtype).min:
        pytest.skip("the dtype cannot hold it")
    index = torch.randint(6, (5, shape[-1])).to(index_dtype)
    index[4, -1] = value
    match = f"index {value} is out of bounds for a table of N=6 buckets; expected 0 <= index < 6"
    for operators in ((rpe_index, rpe_bucket_sum), (torch.ops.rpe_ops.rpe_index, torch.ops.rpe_ops.rpe_bucket_sum)):
        with pytest.raises(RuntimeError, match=match):
            operators[0](torch.randn(*shape[:3], 6), index)
        with pytest.raises(RuntimeError, match=match):
            operators[1](torch.randn(shape), index, 6)


def test_direct_calls_are_checked_too():
    ops = torch.ops.rpe_ops
    x, index = torch.randn(2, 3, 5, 6), torch.randint(6, (5, 7))
    for call, match in (
        (lambda: ops.rpe_index(x, index[:3]), r"\(2, 3, 5, 6\), index \(3, 7\)"),
        (lambda: ops.rpe_index(x[0], index), r"\(3, 5, 6\)"),
        (lambda: ops.rpe_index(x.int(), index), "neither float64"),
        (lambda: ops.rpe_index(x, index.float()), "neither uint8"),
        (lambda: ops.rpe_bucket_sum(x, index, 6), "7 columns, input 6"),
        (lambda: ops.rpe_bucket_sum(x, index[:, :6], -1), "num_buckets=-1"),
        (lambda: ops.rpe_bucket_sum(x, index[:, :6], 0), "N=0"),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_compile(grad):
    index = torch.randint(6, (5, 7), dtype=torch.int32)
    x, y = torch.randn(2, 3, 5, 6, requires_grad=grad), torch.randn(2, 3, 5, 7, requires_grad=grad)
    torch.library.opcheck(torch.ops.rpe_ops.rpe_index.default, (x, index))
    torch.library.opcheck(torch.ops.rpe_ops.rpe_bucket_sum.default, (y, index, 6))


@pytest.mark.parametrize("strict", [False, True])
def test_a_direct_call_exports_under_its_name_compile(strict):
    class Both(torch.nn.Module):
        def forward(self, x, index):
            return rpe_bucket_sum(rpe_index(x, index), index, 6)

    x, index = torch.randn(2, 3, 5, 6), torch.randint(6, (5, 7))
    program = torch.export.export(Both(), (x, index), strict=strict, dynamic_shapes=({0: torch.export.Dim("b")}, None))
    names = [str(node.target) for node in program.graph.nodes]
    assert "rpe_ops.rpe_index.default" in names and "rpe_ops.rpe_bucket_sum.default" in names
    x = torch.randn(5, 3, 5, 6)
    torch.testing.assert_close(program.module()(x, index), Both()(x, index))


def test_transforms_inside_a_compiled_graph():
    index = torch.randint(6, (5, 7))
    x = torch.randn(4, 3, 5, 6)

    def per_sample(x):
        return torch.func.vmap(torch.func.grad(lambda x: rpe_index(x[None], index).pow(3).sum()))(x)

    torch.testing.assert_close(torch.compile(per_sample, fullgraph=True, backend="aot_eager")(x), per_sample(x))


def test_vmap_over_the_index():
    index = torch.randint(6, (3, 5, 7))
    x = torch.randn(2, 3, 5, 6)
    expected = torch.stack([rpe_index(x, one) for one in index])
    assert torch.equal(torch.func.vmap(rpe_index, (None, 0))(x, index), expected)
    many = torch.randn(3, 2, 3, 5, 6)
    expected = torch.stack([rpe_index(one, i) for one, i in zip(many, index, strict=True)])
    assert torch.equal(torch.func.vmap(rpe_index)(many, index), expected)


def test_autocast_passes_the_dtype_through():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in DTYPES:
            assert rpe_index(torch.randn(1, 1, 5, 6, dtype=dtype), torch.zeros(5, 7, dtype=torch.int32)).dtype == dtype


def test_other_dtypes_and_devices_run_on_plain_torch():
    index = torch.randint(6, (5, 7))
    assert rpe_index(torch.ones(1, 1, 5, 6, dtype=torch.int64), index).dtype == torch.int64
    assert rpe_bucket_sum(torch.ones(1, 1, 5, 7, dtype=torch.complex64), index, 6).dtype == torch.complex64
    assert rpe_index(torch.ones(1, 1, 5, 6, device="meta"), index.to("meta")).device.type == "meta"


@pytest.mark.slow
def test_inductor_and_aot_inductor_compile(tmp_path):
    class Both(torch.nn.Module):
        def forward(self, x, index):
            return rpe_bucket_sum(rpe_index(x, index), index, 6) * 2

    x, index = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randint(6, (5, 7))
    module = torch.compile(Both(), fullgraph=True)
    (compiled,) = torch.autograd.grad(module(x, index).pow(2).sum(), x)
    (eager,) = torch.autograd.grad(Both()(x, index).pow(2).sum(), x)
    torch.testing.assert_close(compiled, eager)
    with torch.no_grad():
        program = torch.export.export(Both(), (x.detach(), index))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "both.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(x.detach(), index), Both()(x, index))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    facts = Path("/proc/meminfo")
    if not facts.exists():
        pytest.skip("nothing says how much memory is free")
    available = next(int(line.split()[1]) for line in facts.read_text().splitlines() if "MemAvailable" in line)
    if available < 12 * 2**20:
        pytest.skip("needs 12 GiB of memory")
    torch.use_deterministic_algorithms(False)
    length = 46400  # squared: 2^31 + 5.5 million
    index = torch.zeros(length, length, dtype=torch.uint8)
    index[-1] = 1
    x = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).expand(1, 1, length, 2)
    y = rpe_index(x, index)
    assert y.numel() > 2**31
    assert y[0, 0, 0, 0] == 1 and y[0, 0, -2, -1] == 1 and (y[0, 0, -1] == 2).all()
    sums = rpe_bucket_sum(y, index, 2)
    assert sums[0, 0, -1].tolist() == [0, torch.tensor(2.0 * length).bfloat16().item()]
