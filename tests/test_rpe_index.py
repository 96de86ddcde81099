import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rpe_ops.rpe_index as module
from rpe_ops import reference
from rpe_ops.rpe_index import RPEIndexFunction, rpe_bucket_sum, rpe_index

INDEX_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def loop_index(x, index):
    y = x.new_empty(*x.shape[:2], *index.shape)
    for i in range(index.shape[0]):
        for j in range(index.shape[1]):
            y[:, :, i, j] = x[:, :, i, index[i, j]]
    return y


def loop_bucket_sum(x, index, n):
    s = x.new_zeros(*x.shape[:3], n)
    for i in range(index.shape[0]):
        for j in range(index.shape[1]):
            s[:, :, i, index[i, j]] += x[:, :, i, j]
    return s


def inputs(batch=2, heads=3, lq=5, lk=7, n=6, dtype=torch.float64, index_dtype=torch.int64):
    index = torch.randint(n, (lq, lk)).to(index_dtype)
    return torch.randn(batch, heads, lq, n).to(dtype), torch.randn(batch, heads, lq, lk).to(dtype), index


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(0, 4) for _ in range(4)), st.integers(1, 9)),
    index_dtype=st.sampled_from(INDEX_DTYPES),
)
def test_both_equal_loops_and_the_law(sizes, index_dtype):
    x, y, index = inputs(*sizes, index_dtype=index_dtype)
    assert torch.equal(rpe_index(x, index), loop_index(x, index.long()))
    assert torch.equal(reference.rpe_index(x, index), loop_index(x, index.long()))
    torch.testing.assert_close(rpe_bucket_sum(y, index, sizes[-1]), loop_bucket_sum(y, index.long(), sizes[-1]))
    torch.testing.assert_close(
        reference.rpe_bucket_sum(y, index, sizes[-1]), loop_bucket_sum(y, index.long(), sizes[-1])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_stay_and_sums_are_close_to_the_law(dtype):
    x, y, index = inputs(dtype=dtype)
    assert torch.equal(rpe_index(x, index), reference.rpe_index(x, index))
    sums = rpe_bucket_sum(y, index, 6)
    assert sums.dtype == dtype
    exact = reference.rpe_bucket_sum(y.double(), index, 6)
    assert (sums.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_they_are_adjoint():
    x, y, index = inputs()
    torch.testing.assert_close((rpe_index(x, index) * y).sum(), (x * rpe_bucket_sum(y, index, 6)).sum())


@pytest.mark.parametrize("function", [rpe_index, RPEIndexFunction.apply])
def test_gradcheck_of_the_index(function):
    x, _, index = inputs()
    x.requires_grad_()
    assert torch.autograd.gradcheck(function, (x, index))
    assert torch.autograd.gradgradcheck(function, (x, index))


def test_gradcheck_of_the_bucket_sum():
    _, y, index = inputs()
    y.requires_grad_()
    assert torch.autograd.gradcheck(rpe_bucket_sum, (y, index, 6), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rpe_bucket_sum, (y, index, 6))


@pytest.mark.parametrize("function", [rpe_index, RPEIndexFunction.apply])
def test_func_transforms(function):
    x, _, index = inputs(batch=4)

    def loss(x):
        return function(x, index).pow(3).sum()

    expected = torch.stack([torch.func.grad(loss)(one[None])[0] for one in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(x), expected)
    jacobian = torch.func.jacrev(lambda x: function(x, index))(x[:1])
    torch.testing.assert_close(
        jacobian.sum(dim=(0, 1, 2, 3)), reference.rpe_bucket_sum(torch.ones(1, 3, 5, 7).double(), index, 6)
    )


@pytest.mark.parametrize("function", [rpe_index, RPEIndexFunction.apply])
def test_forward_mode(function):
    x, y, index = inputs()
    _, tangent = torch.func.jvp(lambda x: function(x, index), (x,), (2 * x,))
    torch.testing.assert_close(tangent, 2 * rpe_index(x, index))
    _, tangent = torch.func.jvp(lambda y: rpe_bucket_sum(y, index, 6), (y,), (2 * y,))
    torch.testing.assert_close(tangent, 2 * rpe_bucket_sum(y, index, 6))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph_and_export(dynamic):
    def both(x, index):
        return rpe_bucket_sum(RPEIndexFunction.apply(x, index), index, 6)

    x, _, index = inputs(dtype=torch.float32, index_dtype=torch.int32)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(x, index), both(x, index))

    class Both(torch.nn.Module):
        def forward(self, x, index):
            return both(x, index)

    program = torch.export.export(Both(), (x, index))
    torch.testing.assert_close(program.module()(x, index), both(x, index))


def test_strides_do_not_matter():
    x = torch.randn(5, 6, 2, 3).permute(2, 3, 0, 1)
    index = torch.randint(6, (7, 5)).t()
    assert torch.equal(rpe_index(x, index), rpe_index(x.contiguous(), index.contiguous()))


@pytest.mark.parametrize("value", [-1, 6])
def test_an_index_outside_the_table_is_an_error_on_a_cpu(value):
    x, y, index = inputs()
    index[2, 3] = value
    for call in (lambda: rpe_index(x, index), lambda: rpe_bucket_sum(y, index, 6)):
        with pytest.raises(RuntimeError, match=f"index {value} is out of bounds"):
            call()


@pytest.mark.parametrize(
    ("x", "index", "error", "match"),
    [
        ((2, 3, 5, 6), torch.zeros(5, 7), TypeError, "torch.float32; expected one of torch.uint8"),
        ((3, 5, 6), torch.zeros(5, 7, dtype=torch.long), ValueError, r"\(3, 5, 6\)"),
        ((2, 3, 5, 6), torch.zeros(1, 5, 7, dtype=torch.long), ValueError, r"\(1, 5, 7\)"),
        ((2, 3, 5, 6), torch.zeros(4, 7, dtype=torch.long), ValueError, "4 rows, input 5"),
        ((2, 3, 5, 6), torch.zeros(5, 7, dtype=torch.long, device="meta"), ValueError, "cpu, index on meta"),
    ],
)
def test_bad_input_gets_a_sentence(x, index, error, match):
    with pytest.raises(error, match=match):
        rpe_index(torch.zeros(x), index)
    with pytest.raises(error, match=match):
        rpe_bucket_sum(torch.zeros(x), index, 6)


def test_bucket_sum_checks_the_columns():
    _, y, index = inputs()
    with pytest.raises(ValueError, match="index has 6 columns, input 7"):
        rpe_bucket_sum(y, index[:, :6], 6)


def test_the_module_keeps_its_name():
    assert module.rpe_index is rpe_index
