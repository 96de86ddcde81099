"""RPEMultiheadAttention beside nn.MultiheadAttention, the golden DETR layers, and the formula written out."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import load_golden, relative_error
from methods import METHODS
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import RPEConfig, RPEMultiheadAttention, get_bucket_ids_2d, get_rpe_config, get_single_rpe_config

E, HEADS, HEIGHT, WIDTH = 24, 2, 2, 8
TOKENS = HEIGHT * WIDTH
QKV = get_rpe_config(1.9, "product", rpe_on="qkv")


def make(config=QKV, *, dtype=torch.float64, tables=True, **kwargs):
    torch.manual_seed(0)
    attention = RPEMultiheadAttention(E, HEADS, **{"batch_first": True, **kwargs}, rpe_config=config, dtype=dtype)
    for name, one in attention.named_parameters():
        if "bias" in name and "lookup" not in name:
            nn.init.normal_(one)
        if "lookup_table" in name and tables:
            nn.init.normal_(one)
    return attention


def tables_of(module):
    return {name: one for name, one in module.named_parameters() if "lookup_table" in name}


def tokens(*shape, seed=0):
    shape = shape or (2, TOKENS, E)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def causal(length=TOKENS):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def some(*shape, keep=0.3):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < keep
    mask[..., 0] = False  # every row has a key
    return mask


def added(mask):
    return tokens(*mask.shape, seed=5).masked_fill(mask, -torch.inf)


# name: masks of 2 samples, True = ignored
MASKS = {
    "none": {},
    "padding": dict(key_padding_mask=some(2, TOKENS)),
    "padding added": dict(key_padding_mask=added(some(2, TOKENS))),
    "2-D": dict(attn_mask=some(TOKENS, TOKENS)),
    "2-D added": dict(attn_mask=added(some(TOKENS, TOKENS))),
    "3-D": dict(attn_mask=some(2 * HEADS, TOKENS, TOKENS)),
    "3-D added": dict(attn_mask=added(some(2 * HEADS, TOKENS, TOKENS))),
    "both": dict(attn_mask=some(2 * HEADS, TOKENS, TOKENS), key_padding_mask=some(2, TOKENS)),
    "both added": dict(attn_mask=added(some(TOKENS, TOKENS)), key_padding_mask=added(some(2, TOKENS))),
    "mixed": dict(attn_mask=added(some(TOKENS, TOKENS)), key_padding_mask=some(2, TOKENS)),
    "causal": dict(attn_mask=causal(), is_causal=True),
    "causal padded": dict(attn_mask=causal(), is_causal=True, key_padding_mask=some(2, TOKENS)),
    "empty row": dict(attn_mask=causal() | (torch.arange(TOKENS) == 0)),
    "empty sample": dict(key_padding_mask=torch.tensor([[False], [True]]).expand(2, TOKENS)),
}
OPTIONS = {
    "default": {},
    "no bias": dict(bias=False),
    "kdim": dict(kdim=20, vdim=28),
    "sequence first": dict(batch_first=False),
    "added keys": dict(add_bias_kv=True, add_zero_attn=True),
    "added zero": dict(add_zero_attn=True, batch_first=False, kdim=20),
}


def inputs(options, unbatched=False):
    sizes = (E, options.get("kdim", E), options.get("vdim", E))
    shapes = [(TOKENS, size) if unbatched else (2, TOKENS, size) for size in sizes]
    if sizes == (E, E, E):
        return [tokens(*shapes[0])] * 3
    return [tokens(*shape, seed=n) for n, shape in enumerate(shapes)]


def call(attention, qkv, *, sequence_first, **kwargs):
    """Batch first from outside, whatever the module is."""
    if not sequence_first:
        return attention(*qkv, **kwargs)
    same = qkv[0] is qkv[1]
    qkv = [qkv[0].transpose(0, 1)] * 3 if same else [x.transpose(0, 1) for x in qkv]
    out, weights = attention(*qkv, **kwargs)
    return out.transpose(0, 1), weights


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_zero_tables_are_torchs_attention(option, masks, need_weights):
    options, masks = OPTIONS[option], dict(MASKS[masks])
    skip = 3 if "added" in option else 0  # whichever: pairs of the skip bucket are pairs of a zero table too
    config = get_rpe_config(1.9, "product", skip=skip, rpe_on="qkv")
    ours = make(config, tables=False, **options).eval()
    theirs = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options}, dtype=torch.float64).eval()
    own = ours.state_dict()
    theirs.load_state_dict({name: one for name, one in own.items() if "lookup" not in name}, strict=True)
    size = dict(positions=torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)))
    sequence_first = not ours.batch_first
    qkv = inputs(options)
    # to torch, without weights, is_causal says that nobody sees the added keys, whatever attn_mask says of them
    hint = {"is_causal": False} if "added" in option and not need_weights else {}
    expected, weights = call(theirs, qkv, sequence_first=sequence_first, need_weights=need_weights, **masks | hint)
    got, own_weights = call(ours, qkv, sequence_first=sequence_first, need_weights=need_weights, **masks, **size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-12, equal_nan=True)
    if need_weights:
        _, weights = call(theirs, qkv, sequence_first=sequence_first, average_attn_weights=False, **masks)
        _, own_weights = call(ours, qkv, sequence_first=sequence_first, average_attn_weights=False, **masks, **size)
        torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("masks", ["none", "padding", "2-D", "3-D added"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first, need_weights, masks):
    ours = make(tables=False, batch_first=batch_first)
    theirs = nn.MultiheadAttention(E, HEADS, dtype=torch.float64, batch_first=batch_first)
    theirs.load_state_dict({name: one for name, one in ours.state_dict().items() if "lookup" not in name})
    x = tokens(TOKENS, E)
    masks = {
        name: mask[0] if name == "key_padding_mask" else mask if mask.dim() == 2 else mask[:HEADS]
        for name, mask in MASKS[masks].items()
    }
    for average in (True, False):
        rest = dict(need_weights=need_weights, average_attn_weights=average, **masks)
        expected = theirs(x, x, x, **rest)
        got = ours(x, x, x, hw=(HEIGHT, WIDTH), **rest)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["product_k", "product_qkv"])
def test_the_releases_detr_layer(name, batch_first, need_weights, dtype, tolerance):
    arrays, meta = load_golden(f"detr_attention_{name}")
    attention = RPEMultiheadAttention(
        meta["embed_dim"], meta["num_heads"], batch_first=batch_first, dtype=dtype, rpe_config=meta["enc_rpe2d"]
    )
    state = {key.removeprefix("state/"): torch.tensor(a) for key, a in arrays.items() if key.startswith("state/")}
    attention.load_state_dict(state, strict=True)
    x, value = (torch.tensor(arrays[key], dtype=dtype) for key in ("query_key", "value"))
    if batch_first:
        x, value = x.transpose(0, 1), value.transpose(0, 1)
    out, weights = attention(
        x, x, value, torch.tensor(arrays["key_padding_mask"]), need_weights, hw=(meta["height"], meta["width"])
    )
    assert relative_error(out.transpose(0, 1) if batch_first else out, arrays["output"]) < tolerance
    assert (weights is not None) == need_weights
    if need_weights:
        assert relative_error(weights, arrays["attn_weights_mean"]) < tolerance
    out.square().sum().backward()
    gradients = {key.removeprefix("grad/"): a for key, a in arrays.items() if key.startswith("grad/")}
    assert gradients.keys() == dict(attention.named_parameters()).keys()
    for key, one in attention.named_parameters():
        assert relative_error(one.grad, gradients[key]) < tolerance, key


def by_loops(attention, query, key, value, height, width, mask=None):
    """Every pair of tokens on its own; weights (B, H, L, L) and the output."""
    q, k, v = (
        F.linear(x, w, b).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        for x, w, b in zip(
            (query, key, value), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    scale = q.shape[-1] ** -0.5

    def encodings(rpe):
        parts = [rpe] if hasattr(rpe, "rpe_config") else [rpe.rp_rows, rpe.rp_cols]
        for one in parts:
            c = one.rpe_config
            ids, _ = get_bucket_ids_2d(c.method, height, width, c.skip, c.alpha, c.beta, c.gamma)
            yield one.table, ids, one.num_heads

    rows = []
    for b, h, i in itertools.product(range(q.shape[0]), range(HEADS), range(q.shape[2])):
        scores = []
        for j in range(k.shape[2]):
            s = q[b, h, i] @ k[b, h, j] * scale
            for table, ids, tables in encodings(attention.rpe_k):
                s = s + q[b, h, i] * scale @ table[h % tables, :, ids[i, j]]
            for table, ids, tables in encodings(attention.rpe_q):
                s = s + k[b, h, j] * scale @ table[h % tables, :, ids[j, i]]
            scores.append(s)
        scores = torch.stack(scores)
        weights = (scores if mask is None else scores + mask[b, h, i]).softmax(0)
        out = weights @ v[b, h]
        for table, ids, tables in encodings(attention.rpe_v):
            out = out + sum(weights[j] * table[h % tables, ids[i, j]] for j in range(len(weights)))
        rows.append((weights, out))
    weights = torch.stack([one for one, _ in rows]).view(q.shape[0], HEADS, q.shape[2], -1)
    out = torch.stack([one for _, one in rows]).view(q.shape[0], HEADS, q.shape[2], -1).transpose(1, 2).flatten(2)
    return attention.out_proj(out), weights


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_against_loops(method, shared):
    attention = make(get_rpe_config(1.9, method, "ctx", shared, 1, "qkv"))
    query, key, value = (tokens(2, 1 + 2 * 3, E, seed=n) for n in range(3))
    mask = added(some(2 * HEADS, 7, 7))
    expected, expected_weights = by_loops(attention, query, key, value, 2, 3, mask.view(2, HEADS, 7, 7))
    wanted = torch.autograd.grad(expected.cos().sum(), list(attention.parameters()))
    for need_weights in (True, False):
        out, weights = attention(
            query, key, value, None, need_weights, mask, average_attn_weights=False, height=2, width=3
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-11)
        got = torch.autograd.grad(out.cos().sum(), list(attention.parameters()))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
        assert all(
            one.flatten(1).abs().amax(1).min() > 1e-9
            for one, p in zip(got, attention.parameters(), strict=True)
            if any(p is table for table in tables_of(attention).values())
        )


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_with_and_without_weights_are_one_attention(option, masks):
    config = get_rpe_config(1.9, "cross", "ctx", False, 4, "qkv")  # 4 + 2x6 tokens
    attention = make(config, **OPTIONS[option])
    qkv = inputs(OPTIONS[option])
    rest = dict(sequence_first=not attention.batch_first, hw=(2, 6), **MASKS[masks])
    fused, none = call(attention, qkv, need_weights=False, **rest)
    formula, weights = call(attention, qkv, **rest)
    assert none is None
    assert weights.shape == (2, TOKENS, TOKENS + ("add_bias_kv" in OPTIONS[option]) + ("added" in option))
    whole = ~formula.isnan()
    if not masks.startswith("empty"):
        assert whole.all()
    torch.testing.assert_close(fused[whole], formula[whole], rtol=0, atol=1e-12)
    assert not fused.isnan().any()


def test_a_query_without_a_key_is_as_in_torch():
    """NaN where weights are wanted, the bias of the projection where not; and it spoils no gradient there."""
    attention = make()
    x = tokens()
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    mask[3] = True
    out, _ = attention(x, x, x, need_weights=False, attn_mask=mask, hw=(2, 8))
    assert torch.equal(out[:, 3], attention.out_proj.bias.expand(2, -1))
    out.square().sum().backward()
    assert all(one.grad.isfinite().all() for one in attention.parameters())
    out, weights = attention(x, x, x, attn_mask=mask, hw=(2, 8))
    assert out[:, 3].isnan().all() and weights[:, 3].isnan().all()
    assert out[:, :3].isfinite().all()


def test_added_keys_are_tokens_without_a_place():
    """The same as a sequence that holds them, as tokens that only are keys."""
    config = get_rpe_config(1.9, "product", "ctx", False, 1, "qkv")
    attention = make(config, add_bias_kv=True, add_zero_attn=True)
    x = tokens(2, 1 + 2 * 3, E)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    nowhere = torch.full((1, 2), -1)
    longer = make(config)  # keys and values with two more tokens, which its projection makes what was added
    longer.load_state_dict({name: one for name, one in attention.state_dict().items() if name[:5] != "bias_"})
    _, w_k, w_v = attention.in_proj_weight.chunk(3)
    _, b_k, b_v = attention.in_proj_bias.chunk(3)
    keys, values = (
        torch.cat(
            [x, torch.stack([torch.linalg.solve(w, one - b) for one in (bias.flatten(), 0 * b)]).expand(2, 2, E)], 1
        )
        for w, b, bias in ((w_k, b_k, attention.bias_k), (w_v, b_v, attention.bias_v))
    )
    at_q, at_k = torch.cat([nowhere, places]), torch.cat([nowhere, places, nowhere, nowhere])
    expected, weights = longer(x, keys, values, positions=(at_q, at_k))
    for size in (dict(hw=(2, 3)), dict(positions=at_q), dict(positions=at_q.expand(2, -1, -1))):
        for need_weights in (True, False):
            got, own = attention(x, x, x, need_weights=need_weights, **size)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            if need_weights:
                torch.testing.assert_close(own, weights, rtol=0, atol=1e-9)
    unsigned = (at_q[1:] + 1).to(torch.uint8)  # only offsets count; a type that has no number below 0
    signed = attention(x[:, 1:], x[:, 1:], x[:, 1:], positions=places)[0]
    torch.testing.assert_close(attention(x[:, 1:], x[:, 1:], x[:, 1:], positions=unsigned)[0], signed)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("option", ["default", "kdim", "sequence first", "added keys"])
def test_cross_attention_between_two_maps(option, need_weights):
    """Queries on 3x4 and keys on 5x2 are tokens of one 5x4 map, whose attention is masked to these."""
    options = OPTIONS[option]
    attention = make(get_rpe_config(1.9, "cross", skip=1, rpe_on="qkv"), **options)
    at_q, at_k = (torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in ((3, 4), (5, 2)))
    of_q, of_k = (1 + at[:, 0] * 4 + at[:, 1] for at in (at_q, at_k))
    query = tokens(2, 21, E)
    key, value = tokens(2, 21, options.get("kdim", E), seed=1), tokens(2, 21, options.get("vdim", E), seed=2)
    ignored = torch.ones(2, 21, dtype=torch.bool).index_fill(1, of_k, False)
    rest = dict(sequence_first=not attention.batch_first, need_weights=need_weights)
    full, weights = call(attention, [query, key, value], key_padding_mask=ignored, hw=(5, 4), **rest)
    ours, own = call(attention, [query[:, of_q], key[:, of_k], value[:, of_k]], positions=(at_q, at_k), **rest)
    torch.testing.assert_close(ours, full[:, of_q], rtol=0, atol=1e-12)
    if need_weights:
        keep = torch.cat([of_k, torch.arange(21, weights.shape[-1])])
        torch.testing.assert_close(own, weights[:, of_q[:, None], keep], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="12 queries and 10 keys"):
        call(attention, [query[:, of_q], key[:, of_k], value[:, of_k]], **rest)


def test_every_sample_has_its_own_places():
    attention = make()
    x = tokens(2, 5, E)
    places = torch.randint(0, 7, (2, 5, 2))
    together, _ = attention(x, x, x, positions=places)
    for need_weights in (True, False):
        for n in range(2):
            alone, _ = attention(x[n], x[n], x[n], need_weights=need_weights, positions=places[n])
            torch.testing.assert_close(together[n], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_only(need_weights):
    attention = make(dropout=0.5)
    x, size = tokens(), dict(need_weights=need_weights, hw=(2, 8))
    first, weights = attention(x, x, x, **size)
    assert not torch.equal(first, attention(x, x, x, **size)[0])
    torch.manual_seed(3)
    first, weights = attention(x, x, x, average_attn_weights=False, **size)
    torch.manual_seed(3)
    assert torch.equal(first, attention(x, x, x, **size)[0])
    if need_weights:  # what torch returns: after dropout
        assert 0.3 < (weights == 0).double().mean() < 0.7
    attention.eval()
    assert torch.equal(attention(x, x, x, **size)[0], attention(x, x, x, **size)[0])
    certain = make(dropout=1.0)
    assert torch.equal(certain(x, x, x, **size)[0], certain.out_proj.bias.expand(2, TOKENS, -1))


def test_the_mean_over_dropout_is_the_attention():
    attention = make(dropout=0.2)
    x = tokens(1, 2 * 3, E)
    exact = copy.deepcopy(attention).eval()(x, x, x, hw=(2, 3))[0]
    many = x.expand(4000, -1, -1)
    for need_weights in (True, False):
        mean = attention(many, many, many, need_weights=need_weights, hw=(2, 3))[0].mean(0)
        assert (mean - exact[0]).abs().max() < 0.1 * exact.abs().max()


def test_state_dict_keys_and_the_constructors_arguments():
    theirs = nn.MultiheadAttention(E, HEADS, 0.1, True, True, True, 20, 28, True, "meta", torch.float16)
    ours = RPEMultiheadAttention(
        E, HEADS, 0.1, True, True, True, 20, 28, True, "meta", torch.float16, rpe_config=get_rpe_config(skip=1)
    )
    assert ours.state_dict().keys() - theirs.state_dict().keys() == {"rpe_k.lookup_table_weight"}
    assert theirs.state_dict().keys() <= ours.state_dict().keys()
    assert all(one.is_meta and one.dtype == torch.float16 for one in ours.parameters())
    assert (ours.dropout, ours.batch_first, ours.add_zero_attn) == (0.1, True, True)
    plain = RPEMultiheadAttention(E, HEADS)
    assert plain.state_dict().keys() == nn.MultiheadAttention(E, HEADS).state_dict().keys()


def test_without_a_configuration_it_is_torchs_own():
    plain, theirs = RPEMultiheadAttention(E, HEADS), nn.MultiheadAttention(E, HEADS)
    theirs.load_state_dict(plain.state_dict())
    x = torch.randn(5, 2, E)
    for got, expected in zip(plain(x, x, x), theirs(x, x, x), strict=True):
        assert torch.equal(got, expected)
    assert not plain._forward_pre_hooks


def test_one_seed_gives_the_same_weights_as_torch():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, HEADS, add_bias_kv=True)
    torch.manual_seed(3)
    ours = RPEMultiheadAttention(E, HEADS, add_bias_kv=True, rpe_config=get_rpe_config(skip=1))
    assert all(torch.equal(one, ours.state_dict()[name]) for name, one in theirs.state_dict().items())


def test_reset_parameters_clears_the_tables():
    attention = make()
    attention._reset_parameters()
    assert all(not one.any() for one in tables_of(attention).values())
    assert attention.in_proj_weight.any()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("heads", [2, 3])
def test_inside_torchs_encoder_layer(batch_first, norm_first, heads):
    """The fused kernel of evaluation, which leaves the attention out, is never taken."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        E, heads, 32, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64, dropout=0.0
    )
    ours = RPEMultiheadAttention(E, heads, batch_first=batch_first, rpe_config=QKV, dtype=torch.float64)
    for one in tables_of(ours).values():
        nn.init.normal_(one)
    ours.rpe_grid = (HEIGHT, WIDTH)
    layer.self_attn = ours
    x = tokens() if batch_first else tokens().transpose(0, 1)
    expected = layer.train()(x)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        for one in nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), layer.requires_grad_(False):
            torch.testing.assert_close(one(x), expected, rtol=0, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_fused_kernel_that_is_about_to_leave_the_encodings_out_is_an_error():
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True).eval()
    layer.self_attn = RPEMultiheadAttention(E, HEADS, batch_first=True, rpe_config="rpe-1.9-product-ctx-1-k")
    layer.self_attn._forward_pre_hooks.clear()
    with torch.no_grad(), pytest.raises(RuntimeError, match="leave iRPE out.*set_fastpath_enabled"):
        layer(torch.randn(2, 4, E))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True)
    layer.self_attn = RPEMultiheadAttention(E, HEADS, batch_first=True, rpe_config="rpe-1.9-product-ctx-1-k")
    padding = torch.arange(4).expand(2, 4) > torch.tensor([[3], [2]])
    encoder = nn.TransformerEncoder(layer, 2).eval()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="nested tensor, which has no map.*enable_nested_tensor=False"),
    ):
        encoder(torch.randn(2, 4, E), src_key_padding_mask=padding)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in module.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_checkpointing_repeats_each_pass_on_its_own_map(need_weights, reentrant):
    """Two maps of 16 tokens: whoever mixes them up gets no error from the shapes."""
    attention = make()
    maps = [(2, 8), (4, 4)]

    def loss(run):
        outs = []
        for n, hw in enumerate(maps):
            x = tokens(seed=n).requires_grad_()
            outs.append(run(lambda x, hw=hw: attention(x, x, x, need_weights=need_weights, hw=hw)[0], x))
        return sum(n * out.square().sum() for n, out in enumerate(outs, 1))

    expected = gradients(attention, loss(lambda one, x: one(x)))
    got = gradients(attention, loss(lambda one, x: checkpoint(one, x, use_reentrant=reentrant)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    swapped = [(4, 4), (2, 8)]
    maps[:] = swapped
    assert not torch.allclose(
        gradients(attention, loss(lambda one, x: one(x)))["in_proj_weight"], expected["in_proj_weight"]
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "option", ["default", *(pytest.param(one, marks=pytest.mark.slow) for one in ("added keys", "sequence first"))]
)
def test_compiled(option):
    attention = make(get_rpe_config(1.9, "product", skip=4, rpe_on="qkv"), **OPTIONS[option])
    masks = MASKS["both"]

    def run(attention, x, need_weights, hw):
        return call(
            attention, [x, x, x], need_weights=need_weights, hw=hw, sequence_first=not attention.batch_first, **masks
        )[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for need_weights, hw in ((True, (2, 6)), (False, (2, 6)), (False, (3, 4))):
        expected = gradients(attention, run(attention, tokens(), need_weights, hw).square().sum())
        got = gradients(attention, compiled(attention, tokens(), need_weights, hw).square().sum())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    attention = make()
    compiled = torch.compile(attention, fullgraph=True)
    for need_weights in (True, False):
        x = tokens()
        expected = gradients(attention, attention(x, x, x, need_weights=need_weights, hw=(2, 8))[0].square().sum())
        got = gradients(attention, compiled(x, x, x, need_weights=need_weights, hw=(2, 8))[0].square().sum())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_export_with_dynamic_batch(need_weights, strict):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make().eval()

        def forward(self, x, padding):
            return self.attention(x, x, x, padding, need_weights, hw=(2, 8))[0]

    module, batch = Mine(), torch.export.Dim("batch", min=2, max=64)
    example = tokens(), some(2, TOKENS)
    program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    for n in (2, 5):
        x, padding = tokens(n, TOKENS, E), some(n, TOKENS)
        torch.testing.assert_close(program.module()(x, padding), module(x, padding), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone(how):
    attention = make()
    attention.rpe_grid = (2, 8)
    if how == "deepcopy":
        other = copy.deepcopy(attention)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(attention))
    else:
        file = io.BytesIO()
        torch.save(attention, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = tokens()
    expected = attention(x, x, x)[0]
    assert torch.equal(other(x, x, x)[0], expected)
    assert len(other._forward_pre_hooks) == 1
    nn.init.zeros_(other.rpe_k.lookup_table_weight)
    assert not torch.equal(other(x, x, x)[0], expected)
    assert torch.equal(attention(x, x, x)[0], expected)


def test_the_map():
    attention = make(get_rpe_config(skip=1))
    x = tokens(2, 17, E)
    square, _ = attention(x, x, x)
    assert torch.equal(square, attention(x, x, x, hw=(4, 4))[0])
    wide, _ = attention(x, x, x, hw=(2, 8))
    assert not torch.allclose(wide, square)
    assert torch.equal(wide, attention(x, x, x, height=2, width=8)[0])
    attention.rpe_grid = (2, 8)
    assert torch.equal(attention(x, x, x)[0], wide)
    assert torch.equal(attention(x, x, x, hw=(4, 4))[0], square)
    places = torch.cat([torch.full((1, 2), -1), torch.cartesian_prod(torch.arange(4), torch.arange(4))])
    torch.testing.assert_close(attention(x, x, x, positions=places)[0], square)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_precision_and_autocast(dtype, need_weights):
    exact, x, rest = make(), tokens(), dict(need_weights=need_weights, hw=(2, 8), key_padding_mask=some(2, TOKENS))
    expected = exact(x, x, x, **rest)[0]
    half, y = copy.deepcopy(exact).to(dtype), x.to(dtype)
    scale = 30 * torch.finfo(dtype).eps * expected.abs().max()
    assert (half(y, y, y, **rest)[0] - expected).abs().max() < scale
    single, y = copy.deepcopy(exact).float(), x.float()
    for mask in (MASKS["padding"], MASKS["2-D added"]):
        mask = {name: one if one.dtype == torch.bool else one.float() for name, one in mask.items()}
        expected = exact(x, x, x, need_weights=need_weights, hw=(2, 8), **mask)[0]
        with torch.autocast("cpu", dtype=dtype):
            got, _ = single(y, y, y, need_weights=need_weights, hw=(2, 8), **mask)
        assert got.dtype == dtype
        assert (got - expected).abs().max() < scale
        single.zero_grad()
        got.float().square().sum().backward()
        assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in single.parameters())


def test_per_sample_gradients():
    attention = make()
    weights, x = dict(attention.named_parameters()), tokens()

    def loss(weights, one):
        return torch.func.functional_call(attention, weights, (one, one, one), dict(hw=(2, 8)))[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for n in range(2):
        expected = torch.func.grad(loss)(weights, x[n])
        torch.testing.assert_close({name: one[n] for name, one in got.items()}, expected, rtol=0, atol=1e-10)


def test_refusals():
    attention, x = make(), tokens()
    mixed = RPEConfig(rpe_k=get_single_rpe_config(skip=1), rpe_v=get_single_rpe_config(skip=2))
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match="has no place.*expected skip > 0.*'rpe_k': 0"):
            RPEMultiheadAttention(E, HEADS, **{option: True}, rpe_config=get_rpe_config())
        with pytest.raises(ValueError, match="one skip for all encodings"):
            RPEMultiheadAttention(E, HEADS, **{option: True}, rpe_config=mixed)
    with pytest.raises(ValueError, match="14 tokens with skip=0 leave 14 for the map, which is not a square"):
        attention(x[:, :14], x[:, :14], x[:, :14])
    with pytest.raises(ValueError, match="height=3 .* width=5 = 15 tokens, but the input has 16"):
        attention(x, x, x, hw=(3, 5))
    with pytest.raises(ValueError, match=r"hw=\(2, 8\), height=2.*give hw, or height and width"):
        attention(x, x, x, hw=(2, 8), height=2, width=8)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(8))
    with pytest.raises(ValueError, match="give one or the other"):
        attention(x, x, x, hw=(2, 8), positions=places)
    with pytest.raises(ValueError, match="give one or the other"):
        make(get_rpe_config(skip=1), add_zero_attn=True)(x, x, x, hw=(2, 8), positions=places)
    with pytest.raises(ValueError, match="pass the mask too"):
        attention(x, x, x, is_causal=True, hw=(2, 8))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 15\); expected \(2, 16\)"):
        attention(x, x, x, key_padding_mask=some(2, 15), hw=(2, 8))
    with pytest.raises(ValueError, match=r"attn_mask has shape \(2, 16, 16\); expected \(16, 16\) or \(4, 16, 16\)"):
        attention(x, x, x, attn_mask=some(2, 16, 16), hw=(2, 8))
    with pytest.raises(TypeError, match=r"attn_mask is torch.uint8; expected bool \(True is ignored\)"):
        attention(x, x, x, attn_mask=some(16, 16).byte(), hw=(2, 8))
    for wrong in ((x, x, x[:, :4]), (x, x[0], x[0]), (x[..., :20], x, x), (x, x[:1], x[:1]), (x[None],) * 3):
        with pytest.raises(ValueError, match=r"query, key, value have shapes.*expected \(B, L, E\) or \(L, E\)"):
            attention(*wrong)


def test_scripting_is_torchs_where_there_are_no_tables():
    attention, x = make(None), tokens()
    scripted = torch.jit.script(nn.ModuleDict({"of": attention}))["of"]
    for got, expected in zip(scripted(x, x, x), attention(x, x, x), strict=True):
        torch.testing.assert_close(got, expected)
    assert type(attention) is RPEMultiheadAttention


def test_scripting_tables_is_refused_with_the_ways_out():
    config = RPEConfig(rpe_q=get_single_rpe_config(20, "cross"))
    for one in (make(), make(config), nn.Sequential(make()), make().rpe_v, make(config).rpe_q):
        with pytest.raises(TypeError, match=r"use torch.jit.trace, torch.export or torch.onnx.export"):
            torch.jit.script(one)


@pytest.mark.parametrize("own", ["qkv", "one weight", "three weights"])
def test_a_bias_of_another_dtype(own):
    """torch adds one to what is not contiguous, whatever its dtype."""
    sizes = dict(kdim=5, vdim=7) if own == "three weights" else {}
    attention = make(**sizes)
    x, *others = tokens(), tokens(2, TOKENS, 5, seed=1), tokens(2, TOKENS, 7, seed=2)
    inputs = {"qkv": (x, x, x), "one weight": (x, x + 1, x - 1), "three weights": (x, *others)}[own]
    attention.in_proj_bias = nn.Parameter(attention.in_proj_bias.detach().half().double())
    expected = attention(*inputs, hw=(HEIGHT, WIDTH))[0]
    attention.in_proj_bias = nn.Parameter(attention.in_proj_bias.detach().half())
    out = attention(*inputs, hw=(HEIGHT, WIDTH))[0]
    assert torch.equal(out, expected)
    out.sum().backward()
    assert attention.in_proj_bias.grad.dtype == torch.float16 and attention.in_proj_bias.grad.any()
