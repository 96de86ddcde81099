import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_golden, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS
from torch import nn

from irpe import (
    METHOD,
    RPEConfig,
    build_rpe,
    get_bucket_ids_2d,
    get_rpe_config,
    get_single_rpe_config,
    iRPE,
    iRPE_Cross,
)
from irpe.irpe import _rpe_bucket_sum, _rpe_index, get_bucket_map

MODULES, CASES = load_golden("modules")
HEIGHT, WIDTH, DIM, HEADS = 3, 4, 8, 2


def only(config, head_dim=DIM, num_heads=HEADS, **kwargs):
    """The one module of a configuration with one encoding, its table random."""
    (module,) = [m for m in build_rpe(config, head_dim, num_heads, **kwargs) if m is not None]
    for table in module.parameters():
        nn.init.normal_(table)
    return module


def loop_encoding(module, x, height, width, where):
    """SPEC section 2 by loops over pairs of tokens."""
    if isinstance(module, iRPE_Cross):
        return sum(loop_encoding(one, x, height, width, where) for one in (module.rp_rows, module.rp_cols))
    c = module.rpe_config
    ids, _ = get_bucket_ids_2d(c.method, height, width, c.skip, c.alpha, c.beta, c.gamma)
    batch, heads, tokens, _ = x.shape
    tables = module.table.expand(heads, *module.table.shape[1:])
    if where == "v":
        y = x.new_zeros(batch, heads, tokens, module.head_dim)
    elif module.mode == "bias":
        return torch.stack([t[ids] for t in module.table]).unsqueeze(0)
    else:
        y = x.new_zeros(batch, heads, tokens, tokens)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                for j in range(tokens):
                    n = ids[i, j]
                    if where == "v":
                        y[b, h, i] += x[b, h, i, j] * tables[h, n]
                    else:
                        y[b, h, i, j] = x[b, h, i] @ tables[h, :, n]
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_golden_modules_with_gradients(case, dtype, tolerance):
    c = CASES[case]
    config = get_rpe_config(c["ratio"], c["method"], c["mode"], c["shared_head"], c["skip"], c["rpe_on"])
    module = only(config, c["head_dim"], c["num_heads"], dtype=dtype)
    state = {name: torch.tensor(MODULES[f"{case}/param/{name}"], dtype=dtype) for name in c["params"]}
    module.load_state_dict(state, strict=True)
    x = torch.tensor(MODULES[f"{case}/x"], dtype=dtype, requires_grad=True)
    y = module(x, height=c["height"], width=c["width"])
    y.backward(torch.tensor(MODULES[f"{case}/grad_y"], dtype=dtype))
    assert relative_error(y, MODULES[f"{case}/y"]) < tolerance
    assert (f"{case}/grad_x" in MODULES) == (c["mode"] == "ctx")
    if c["mode"] == "ctx":
        assert relative_error(x.grad, MODULES[f"{case}/grad_x"]) < tolerance
    for name, parameter in module.named_parameters():
        assert relative_error(parameter.grad, MODULES[f"{case}/grad_param/{name}"]) < tolerance


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    mode=st.sampled_from(["ctx", "bias"]),
    shared=st.booleans(),
    where=st.sampled_from("qkv"),
    height=st.integers(1, 4),
    width=st.integers(1, 5),
    skip=st.integers(0, 5),
    ratio=st.sampled_from([0.4, 1.0, 1.9, 2.5, 20.0]),
)
def test_modules_equal_loops(method, mode, shared, where, height, width, skip, ratio):
    if where == "v":
        mode = "ctx"
    module = only(get_rpe_config(ratio, method, mode, shared, skip, where), 3, 2, dtype=torch.float64)
    tokens = skip + height * width
    x = torch.randn(2, 2, tokens, tokens if where == "v" else 3, dtype=torch.float64)
    torch.testing.assert_close(module(x, height, width), loop_encoding(module, x, height, width, where))


@pytest.mark.parametrize("where", "qkv")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_gradcheck_first_and_second_order(method, mode, where):
    if (mode, where) == ("bias", "v"):
        pytest.skip("bias on values does not exist")
    module = only(get_rpe_config(0.9, method, mode, False, 1, where), 2, 2, dtype=torch.float64)  # few buckets: quick
    tokens = 1 + 2 * 3
    x = torch.randn(1, 2, tokens, tokens if where == "v" else 2, dtype=torch.float64, requires_grad=mode == "ctx")
    names, tables = zip(*module.named_parameters(), strict=True)

    def f(x, *tables):
        return torch.func.functional_call(module, dict(zip(names, tables, strict=True)), (x, 2, 3))

    assert torch.autograd.gradcheck(f, (x, *tables))
    assert torch.autograd.gradgradcheck(f, (x, *tables))


@pytest.mark.parametrize("where", "kv")
def test_func_transforms(where):
    module = only(get_rpe_config(skip=1, rpe_on=where), 2, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 7, 7 if where == "v" else 2, dtype=torch.float64)
    tables = dict(module.named_parameters())

    def loss(tables, x):
        return torch.func.functional_call(module, tables, (x[None], 2, 3)).square().sum()

    one_by_one = [torch.func.grad(loss)(tables, one)["lookup_table_weight"] for one in x]
    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(tables, x)["lookup_table_weight"]
    torch.testing.assert_close(batched, torch.stack(one_by_one))
    _, tangent = torch.func.jvp(lambda x: loss(tables, x), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (torch.func.grad(loss, 1)(tables, x[0]) * x[1]).sum())


def test_shapes_and_names_of_the_parameters():
    config = RPEConfig(
        get_single_rpe_config(20, "cross", "bias", False, 1),
        get_single_rpe_config(1.9, "product", "ctx", True, 1),
        get_single_rpe_config(1.9, "product", "ctx", False, 1),
    )
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in build_rpe(config, 64, 6)]
    assert shapes == [
        {"rp_rows.lookup_table_bias": (6, 82), "rp_cols.lookup_table_bias": (6, 82)},
        {"lookup_table_weight": (1, 64, 50)},
        {"lookup_table_weight": (6, 50, 64)},
    ]


@pytest.mark.parametrize("method", ["product", "cross"])
@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_cross_tells_its_sizes_as_the_others_do(method, mode):
    """The release's DETR reads `num_buckets` of what `build_rpe` returns, whatever the method."""
    rpe = build_rpe(get_rpe_config(20, method, mode, shared_head=False, skip=1), 32, 8)[1]
    assert rpe.num_buckets == next(iter(rpe.parameters())).shape[-1] == {"cross": 81, "product": 81 * 81}[method] + 1
    assert (rpe.head_dim, rpe.num_heads, rpe.transposed) == (32, 8, True)
    assert rpe.mode == {"ctx": "contextual", "bias": "bias"}[mode]


def test_state_dicts_hold_tables_and_nothing_else():
    for module in build_rpe(get_rpe_config(method="cross", rpe_on="qkv"), DIM, HEADS):
        module(torch.randn(1, HEADS, 12, DIM if module.transposed else 12), height=HEIGHT, width=WIDTH)
        assert set(module.state_dict()) == {"rp_rows.lookup_table_weight", "rp_cols.lookup_table_weight"}
        assert list(module.buffers()) == []


def test_tables_start_at_zero_also_after_reset_unless_an_initializer_fills_them():
    module = only(get_rpe_config())
    module.reset_parameters()
    assert not module.table.any()
    filled = iRPE(DIM, 1, rpe_config=get_single_rpe_config(), initializer=lambda table: nn.init.constant_(table, 3.0))
    assert (filled.table == 3).all()


def test_device_and_dtype_of_tables():
    modules = build_rpe(get_rpe_config(rpe_on="kv"), DIM, HEADS, device="meta", dtype=torch.bfloat16)
    for module in modules[1:]:
        assert module.table.device.type == "meta" and module.table.dtype == torch.bfloat16
        x = torch.empty(1, HEADS, 12, DIM if module.transposed else 12, device="meta", dtype=torch.bfloat16)
        assert module(x, HEIGHT, WIDTH).device.type == "meta"
        module.to_empty(device="cpu").reset_parameters()
        assert not module.table.any()


def test_construction_by_hand_as_older_code_does_it():
    config = get_single_rpe_config(1.9, "product", skip=1)
    rpe = iRPE(64, 6, mode=config.mode, method=config.method, transposed=False, num_buckets=50, rpe_config=config)
    assert rpe.table.shape == (6, 50, 64)
    assert iRPE(64).table.shape == (8, 64, 49)
    cross = iRPE_Cross(METHOD.CROSS, head_dim=4, num_heads=1, rpe_config=get_single_rpe_config(20, "cross"))
    assert cross.rp_cols.rpe_config.method == METHOD.CROSS_COLS
    assert iRPE_Cross("cross", 4, 1)(torch.randn(1, 1, 9, 4)).shape == (1, 1, 9, 9)


def test_repr_says_what_it_is():
    text = repr(only(get_rpe_config(2.0, skip=1)))
    for part in ("product", "contextual", "keys", "num_buckets=82", "skip=1", "alpha=2"):
        assert part in text


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", ["ctx", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_in_place_addition_works_with_every_mode(method, mode, shared):
    config = get_rpe_config(1.9, method, mode, shared, 1, "qk")
    rpe_q, rpe_k, _ = build_rpe(config, DIM, HEADS)
    q = torch.randn(2, HEADS, 1 + HEIGHT * WIDTH, DIM, requires_grad=True)
    attn = q @ q.transpose(-2, -1)
    attn += rpe_k(q, height=HEIGHT, width=WIDTH)
    attn += rpe_q(q, height=HEIGHT, width=WIDTH).transpose(2, 3)
    attn.sum().backward()
    assert all(table.grad.abs().sum() > 0 for rpe in (rpe_q, rpe_k) for table in rpe.parameters())


def test_square_maps_need_no_size_and_give_the_same():
    module = only(get_rpe_config(skip=2))
    x = torch.randn(2, HEADS, 2 + 16, DIM)
    assert torch.equal(module(x), module(x, height=4, width=4))
    assert not torch.equal(module(x), module(x, height=2, width=8))


def test_transposing_the_map_swaps_rows_and_columns_of_the_encoding():
    module = only(get_rpe_config(20, "cross", "bias", False), dtype=torch.float64)
    x = torch.randn(1, HEADS, 15, DIM, dtype=torch.float64)
    y = module(x, 3, 5).view(HEADS, 3, 5, 3, 5)
    with torch.no_grad():
        rows = module.rp_rows.table.clone()
        module.rp_rows.table.copy_(module.rp_cols.table)
        module.rp_cols.table.copy_(rows)
    torch.testing.assert_close(module(x, 5, 3).view(HEADS, 5, 3, 5, 3), y.permute(0, 2, 1, 4, 3))


def test_shared_tables_are_the_same_for_every_head_and_own_tables_are_not():
    x = torch.randn(1, 1, 12, DIM).expand(1, HEADS, 12, DIM)
    shared, own = only(get_rpe_config()), only(get_rpe_config(shared_head=False))
    y, z = shared(x, HEIGHT, WIDTH), own(x, HEIGHT, WIDTH)
    assert torch.equal(y[:, 0], y[:, 1])
    assert not torch.allclose(z[:, 0], z[:, 1])


@pytest.mark.parametrize("strides", ["permuted", "sliced", "expanded"])
def test_strides_do_not_matter(strides):
    module = only(get_rpe_config(skip=1))
    if strides == "permuted":
        x = torch.randn(2, 13, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)[1]
    elif strides == "sliced":
        x = torch.randn(2, HEADS, 26, 2 * DIM)[:, :, ::2, ::2]
    else:
        x = torch.randn(1, HEADS, 13, DIM).expand(2, -1, -1, -1)
    torch.testing.assert_close(module(x, HEIGHT, WIDTH), module(x.contiguous(), HEIGHT, WIDTH))


@pytest.mark.parametrize("shape", [(0, HEADS, 12, DIM), (2, HEADS, 12, DIM)])
def test_empty_batches_have_empty_encodings(shape):
    assert only(get_rpe_config())(torch.zeros(shape), HEIGHT, WIDTH).shape == (shape[0], HEADS, 12, 12)
    weights = torch.zeros(shape[0], HEADS, 12, 12)
    assert only(get_rpe_config(rpe_on="v"))(weights, HEIGHT, WIDTH).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", "kv")
def test_half_precision_is_close_to_float64(dtype, where):
    module = only(get_rpe_config(skip=1, rpe_on=where))
    x = torch.rand(2, HEADS, 13, 13 if where == "v" else DIM)
    exact = copy.deepcopy(module).to(dtype).double()(x.to(dtype).double(), HEIGHT, WIDTH)
    assert relative_error(module.to(dtype)(x.to(dtype), HEIGHT, WIDTH), exact) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_autocast_takes_float32_tables(method):
    rpe_q, rpe_k, rpe_v = build_rpe(get_rpe_config(1.9, method, skip=1, rpe_on="qkv"), DIM, HEADS)
    q = torch.randn(2, HEADS, 13, DIM, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attn = q @ q.transpose(-2, -1)  # bfloat16
        attn = attn + rpe_k(q.bfloat16(), HEIGHT, WIDTH) + rpe_q(q, HEIGHT, WIDTH).transpose(2, 3)
        out = rpe_v(attn.softmax(-1), HEIGHT, WIDTH)
    out.float().sum().backward()
    tables = [t for m in (rpe_q, rpe_k, rpe_v) for t in m.parameters()]
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tables)


def test_modules_copy_pickle_and_save_without_their_ids():
    module = only(get_rpe_config(method="cross", skip=1))
    x = torch.randn(1, HEADS, 13, DIM)
    y = module(x, HEIGHT, WIDTH)
    assert torch.equal(copy.deepcopy(module)(x, HEIGHT, WIDTH), y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, HEIGHT, WIDTH), y)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    assert file.tell() < 3 * sum(p.nbytes for p in module.parameters()) + 4096
    file.seek(0)
    fresh = build_rpe(get_rpe_config(method="cross", skip=1), DIM, HEADS)[1]
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(x, HEIGHT, WIDTH), y)


def test_the_plain_pair_is_the_law_and_each_other_s_adjoint():
    from rpe_ops import reference

    place = get_bucket_map("product", (HEIGHT, WIDTH), 2, 1.9, 3.8, 15.2)  # 50 buckets
    ids = place.ids(torch.long)
    x, y = torch.randn(2, HEADS, 14, 50, dtype=torch.float64), torch.randn(2, HEADS, 14, 14, dtype=torch.float64)
    for where in (place, ids, ids.expand(2, 1, 14, 14)):
        torch.testing.assert_close(_rpe_index(x, where), reference.rpe_index(x, ids))
        torch.testing.assert_close(_rpe_bucket_sum(y, where, 50), reference.rpe_bucket_sum(y, ids, 50))
        torch.testing.assert_close((_rpe_index(x, where) * y).sum(), (_rpe_bucket_sum(y, where, 50) * x).sum())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_of_values_is_under_three_attention_maps(run_python):
    """Forward and backward at 32x32 tokens, B=1, H=6, D=64, the input counted (the release needs 64 maps)."""
    out = run_python(
        """
        import torch
        from irpe import build_rpe, get_rpe_config
        def peak():
            status = open("/proc/self/status").read()  # ru_maxrss would start with what the parent had
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        torch.set_num_threads(2)
        rpe_v = build_rpe(get_rpe_config(rpe_on="v"), head_dim=64, num_heads=6)[2]
        small = torch.rand(1, 6, 64, 64, requires_grad=True)
        rpe_v(small, 4, 16).sum().backward()  # code and thread pools are loaded now
        before = peak()
        x = torch.rand(1, 6, 1024, 1024, requires_grad=True)
        y = rpe_v(x, 32, 32)
        forward = peak()
        y.sum().backward()
        print((forward - before) / x.nbytes, (peak() - before) / x.nbytes)
        """,
        path=[ROOT],
    ).stdout
    forward, both = map(float, out.split())
    assert 0.9 < forward < 3
    assert forward <= both < 3
