"""Tokens that are no full grid: pruned, packed, on two grids, between grid points."""

import pytest
import torch
from methods import FORMULAS, TABLES

from irpe import (
    RPEConfig,
    build_rpe,
    get_bucket_ids,
    get_bucket_ids_2d,
    get_bucket_map,
    get_rpe_config,
    get_single_rpe_config,
    piecewise_index,
    rpe_attention,
)
from rpe_ops import _native

NUMBERS = (1.9, 3.8, 15.2)
BACKENDS = ["eager", *["cpu"] * ("cpu" in _native.LOADED), "reference", None]


def grid(height, width, skip=0):
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return torch.cat([torch.full((skip, 2), -1), places])


def modules(on, skip=0, method="product", mode="ctx", shared_head=False, dtype=torch.float64):
    rpe = build_rpe(get_rpe_config(1.9, method, mode, shared_head, skip, on), head_dim=8, num_heads=3, dtype=dtype)
    for one in rpe:
        for table in () if one is None else one.parameters():
            torch.nn.init.normal_(table)
    return rpe


@pytest.mark.parametrize("method", TABLES)
@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_full_grid_has_the_ids_of_the_grid(method, skip, dtype):
    if dtype == torch.uint8 and skip:
        pytest.skip("no number below 0")
    places = grid(4, 7, skip).to(dtype)
    ids, buckets = get_bucket_ids(method, places, places, skip, *NUMBERS)
    expected = get_bucket_ids_2d(method, 4, 7, skip, *NUMBERS)
    assert torch.equal(ids, expected[0]) and buckets == expected[1]


@pytest.mark.parametrize("method", TABLES)
def test_against_a_loop(method):
    rows = torch.rand(2, 5, 2) * 12
    columns = torch.rand(2, 4, 2) * 12
    rows[1, 3] = columns[0, 0] = -1
    ids, buckets = get_bucket_ids(method, rows, columns, 1, *NUMBERS)

    def g(x):
        return int(piecewise_index(torch.tensor(x, dtype=torch.float64), *NUMBERS))

    for n in range(2):
        for i in range(5):
            for j in range(4):
                dr, dc = (rows[n, i].double() - columns[n, j].double()).tolist()
                expected = FORMULAS[method](dr, dc, g, 3)
                skipped = (n, i) == (1, 3) or (n, j) == (0, 0)
                assert ids[n, i, j] == (buckets - 1 if skipped else expected)


@pytest.mark.parametrize("on", ["q", "k", "v"])
@pytest.mark.parametrize("method", ["cross", "product"])
def test_modules_on_kept_tokens_are_rows_and_columns_of_the_full_map(on, method):
    (rpe,) = (one for one in modules(on, skip=1, method=method) if one is not None)
    keep = torch.tensor([0, 1, 4, 9, 13, 15])  # of 1 + 3x5 tokens
    places = grid(3, 5, skip=1)
    if on == "v":
        weights = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
        weights[:, :, keep[:, None], keep] = torch.rand(2, 3, 6, 6, dtype=torch.float64)
        full = rpe(weights, 3, 5)[:, :, keep]
        kept = rpe(weights[:, :, keep[:, None], keep], positions=places[keep])
    else:
        x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
        full = rpe(x, 3, 5)[:, :, keep[:, None], keep]
        kept = rpe(x[:, :, keep], positions=places[keep])
    torch.testing.assert_close(kept, full)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_cross_attention_between_two_grids(backend, mode):
    """Queries on 3x4 and keys on 5x2 are tokens of one 5x4 map, whose attention is masked to these."""
    rpe = modules("qkv" if mode == "ctx" else "qk", mode=mode)
    at_q, at_k = grid(3, 4), grid(5, 2)
    x, y = torch.randn(2, 3, 20, 8, dtype=torch.float64), torch.randn(2, 2, 3, 20, 8, dtype=torch.float64)
    of_q, of_k = (at[:, 0] * 4 + at[:, 1] for at in (at_q, at_k))
    mask = torch.zeros(20, dtype=torch.bool).index_fill(0, of_k, True).expand(20, 20)
    full = rpe_attention(x, y[0], y[1], *rpe, height=5, width=4, attn_mask=mask, backend="eager")[:, :, of_q]
    leaves = [x[:, :, of_q], y[0][:, :, of_k], y[1][:, :, of_k]]
    leaves = [one.requires_grad_() for one in leaves]
    ours = rpe_attention(*leaves, *rpe, positions=(at_q, at_k), backend=backend)
    torch.testing.assert_close(ours, full)
    tables = [t for one in rpe if one is not None for t in one.parameters()]
    grads = torch.autograd.grad(ours.sum(), [*leaves, *tables])
    truth = torch.autograd.grad(full.sum(), tables)
    torch.testing.assert_close(grads[3:], truth)


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
def test_every_sample_has_its_own_places(backend, dropout_p):
    rpe = modules("qkv", skip=1, method="cross")
    q, k, v = torch.randn(3, 2, 3, 6, 8, dtype=torch.float64)
    places = torch.stack([grid(4, 6, 1)[[0, 3, 7, 8, 20, 24]], grid(4, 6, 1)[[0, 1, 2, 11, 12, 13]]])
    together = rpe_attention(q, k, v, *rpe, positions=places, backend=backend, dropout_p=dropout_p)
    for n in range(2):
        one = [x[n : n + 1] for x in (q, k, v)]
        alone = rpe_attention(*one, *rpe, positions=places[n], backend="reference", dropout_p=dropout_p)
        torch.testing.assert_close(together[n : n + 1], alone)
    for wish in ("cpu", "reference"):
        with pytest.raises(ValueError, match="one map for all samples"):
            rpe_attention(q, k, v, *rpe, positions=places, backend=wish)


@pytest.mark.parametrize("shared", [True, False])
def test_biases_for_places_of_each_sample(shared):
    rpe = modules("qk", skip=1, mode="bias", shared_head=shared)
    q, k, v = torch.randn(3, 2, 3, 6, 8, dtype=torch.float64)
    places = torch.stack([grid(4, 6, 1)[[0, 3, 7, 8, 20, 24]], grid(4, 6, 1)[[0, 1, 2, 11, 12, 13]]])
    together = rpe_attention(q, k, v, *rpe, positions=places)
    assert rpe[1](q, positions=places).shape == (2, 1 if shared else 3, 6, 6)
    for n in range(2):
        one = [x[n : n + 1] for x in (q, k, v)]
        torch.testing.assert_close(
            together[n : n + 1], rpe_attention(*one, *rpe, positions=places[n], backend="reference")
        )


def test_images_packed_in_one_sequence():
    """Two images, one after the other, with a mask between them: each as if it were alone."""
    rpe = modules("qkv")
    q, k, v = torch.randn(3, 1, 3, 6 + 8, 8, dtype=torch.float64)
    places = torch.cat([grid(2, 3), grid(4, 2)])
    image = torch.tensor([0] * 6 + [1] * 8)
    packed = rpe_attention(q, k, v, *rpe, positions=places, attn_mask=image[:, None] == image)
    for part, (height, width) in ((slice(0, 6), (2, 3)), (slice(6, 14), (4, 2))):
        alone = rpe_attention(q[:, :, part], k[:, :, part], v[:, :, part], *rpe, height=height, width=width)
        torch.testing.assert_close(packed[:, :, part], alone)


def test_offsets_count_not_places():
    (_, rpe, _) = modules("k")
    x, places = torch.randn(1, 3, 5, 8, dtype=torch.float64), torch.randint(0, 9, (5, 2))
    torch.testing.assert_close(rpe(x, positions=places + 7), rpe(x, positions=places), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(dynamic):
    rpe = modules("qkv", skip=1)

    def call(q, k, v, places):
        return rpe_attention(q, k, v, *rpe, positions=places)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 9):
        q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=torch.float64)
        for places in (torch.randint(-1, 5, (tokens, 2)), torch.randint(-1, 5, (2, tokens, 2))):
            torch.testing.assert_close(compiled(q, k, v, places), call(q, k, v, places))


def test_errors():
    _, rpe_k, rpe_v = modules("kv")
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    places = grid(2, 3)
    with pytest.raises(ValueError, match=r"positions have shape \(5, 2\); expected \(6, 2\) or \(B, 6, 2\)"):
        rpe_k(x, positions=places[:5])
    with pytest.raises(ValueError, match=r"positions have shape \(3, 6, 2\)"):
        rpe_k(x, positions=places.expand(3, 6, 2))
    with pytest.raises(ValueError, match=r"expected \(4, 2\)"):
        rpe_v(torch.rand(2, 3, 6, 4, dtype=torch.float64), positions=places)
    with pytest.raises(ValueError, match="height=2, width=3 and positions: give one or the other"):
        rpe_k(x, 2, 3, positions=places)
    with pytest.raises(ValueError, match="need skip > 0"):
        rpe_k(x, positions=places - 1)
    with pytest.raises(ValueError, match=r"expected \(..., L, 2\)"):
        get_bucket_ids("euc", torch.zeros(4, 3), torch.zeros(4, 2), 0, *NUMBERS)
    with pytest.raises(ValueError, match=r"expected \(..., L, 2\)"):
        get_bucket_ids("euc", torch.zeros(4, 5), torch.zeros(4, 5), 0, *NUMBERS)
    with pytest.raises(ValueError, match="CROSS_ROWS, METHOD.CROSS_COLS"):
        get_bucket_ids("cross", places, places, 0, *NUMBERS)
    with pytest.raises(ValueError, match="6 queries and 4 keys; an encoding expects the same tokens, or positions="):
        rpe_attention(x, x[:, :, :4], x[:, :, :4], rpe_k=rpe_k)
    compiled = torch.compile(lambda x, places: rpe_k(x, positions=places), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, places), rpe_k(x, positions=places))
    with pytest.raises((RuntimeError, IndexError), match=r"out of|outside|range"):
        compiled(x, places - 1)


def test_encodings_of_different_configurations_on_positions():
    config = RPEConfig(rpe_q=get_single_rpe_config(20, "euc", "bias"), rpe_v=get_single_rpe_config(2.0, "cross"))
    rpe = build_rpe(config, head_dim=8, num_heads=3)
    q, k, v = torch.randn(3, 2, 3, 12, 8)
    at = rpe_attention(q, k, v, *rpe, positions=grid(3, 4))
    torch.testing.assert_close(at, rpe_attention(q, k, v, *rpe, height=3, width=4))
    assert get_bucket_map("euc", (3, 4), 0, 20, 40, 160).grid().shape == (5, 7)
