"""Tables under another configuration: exact where it can say what the old one said, closest elsewhere, or refused."""

import pytest
import torch
from methods import METHODS
from torch import nn

from irpe import (
    METHOD,
    RPEConfig,
    SingleRPEConfig,
    build_rpe,
    convert_tables,
    get_bucket_ids_2d,
    get_rpe_config,
    get_single_rpe_config,
    rpe_attention,
)

HEIGHT, WIDTH, HEADS, DIM = 3, 5, 2, 4
MAP = dict(height=HEIGHT, width=WIDTH)


class Attention(nn.Module):
    """Attentions on random inputs, under the prefixes that models have."""

    def __init__(self, config, heads=HEADS, tables=True):
        super().__init__()
        self.skip = max(one.skip for one in vars(config).values() if one is not None)
        self.norm = nn.LayerNorm(3)
        self.blocks = nn.ModuleList(self.build(config, heads) for _ in range(2))
        self.double()
        for name, table in self.named_parameters():
            if tables and "lookup" in name:
                nn.init.normal_(table)

    def build(self, config, heads):
        block = nn.Module()
        block.attn = nn.Module()
        block.attn.rpe_q, block.attn.rpe_k, block.attn.rpe_v = build_rpe(config, DIM, heads)
        return block

    def forward(self, height=HEIGHT, width=WIDTH):
        generator = torch.Generator().manual_seed(height)
        size = (3, 2, HEADS, self.skip + height * width, DIM)
        q, k, v = torch.randn(size, generator=generator, dtype=torch.float64)
        outs = []
        for block in self.blocks:
            rpe = (block.attn.rpe_q, block.attn.rpe_k, block.attn.rpe_v)
            outs.append(rpe_attention(q, k, v, *rpe, height=height, width=width))
        return torch.stack(outs)


def config(ratio=1.9, method="product", mode="ctx", shared=True, on="qkv", skip=1):
    return get_rpe_config(ratio, method, mode, shared, skip, on)


def converted(model, new, old, **options):
    """The model of the configuration `new`, with the tables of `model` in it; the old state dict is left alone."""
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    result = convert_tables(state, old, new, **options)
    assert list(before) == list(state) and all(torch.equal(before[key], state[key]) for key in state)
    other = Attention(new, tables=False)
    other.load_state_dict(result, strict=True)
    return other


def difference(one, other, **size):
    with torch.no_grad():
        return (one(**size) - other(**size)).abs().max().item()


# exact


@pytest.mark.parametrize("on", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (dict(ratio=1.9), dict(ratio=7.0)),  # on 3 x 5 tokens every offset has a bucket of its own at ratio 7
        (dict(ratio=1.2), dict(ratio=5)),
        (dict(method="euc", ratio=1.5), dict(ratio=7.0)),
        (dict(method="quant", ratio=2.0), dict(ratio=7.0)),
        (dict(method="cross", ratio=1.9), dict(ratio=1.9)),
        (dict(method="cross", ratio=1.9), dict(ratio=9.0)),
        (dict(method="cross", ratio=1.2), dict(method="cross", ratio=5)),
        (dict(method="euc", ratio=1.9), dict(method="quant", ratio=40)),
        (dict(method="cross_rows"), dict(method="cross")),
    ],
)
def test_finer_buckets_change_nothing(old, new, on):
    old, new = config(on=on, **old), config(on=on, **new)
    model = Attention(old)
    assert difference(model, converted(model, new, old, **MAP)) <= 1e-12
    # nor on any smaller map
    assert difference(model, converted(model, new, old, **MAP), height=2, width=4) <= 1e-12


@pytest.mark.parametrize("on", ["q", "k", "qk"])
@pytest.mark.parametrize(
    ("old", "new"),
    [(dict(), dict(ratio=7.0)), (dict(method="cross"), dict(ratio=1.9)), (dict(method="euc"), dict(ratio=7))],
)
def test_biases(old, new, on):
    old, new = config(mode="bias", on=on, **old), config(mode="bias", on=on, **new)
    model = Attention(old)
    assert difference(model, converted(model, new, old, **MAP)) <= 1e-12


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(method, skip):
    """Onto buckets of single offsets and back gives the first tables, but for buckets where no offset falls."""
    old, fine = config(method=method, skip=skip), config(ratio=7.0, skip=skip)
    model = Attention(old)
    back = converted(converted(model, fine, old, **MAP), old, fine, **MAP)
    assert difference(model, back) <= 1e-12
    if method != "cross":  # its two tables may share a constant otherwise
        for key, table in back.state_dict().items():
            if "lookup" in key:
                given = model.state_dict()[key]
                same = (table - given).abs() <= 1e-12
                assert (same | (table == 0)).all() and same.any()


@pytest.mark.parametrize("method", ["euc", "cross", "product"])
@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_shared_to_one_for_each_head(method, mode):
    on = "qk" if mode == "bias" else "qkv"
    old, new = (config(method=method, mode=mode, shared=shared, on=on) for shared in (True, False))
    model = Attention(old)
    each = converted(model, new, old, num_heads=HEADS)
    assert difference(model, each) == 0
    # equal tables become one again
    again = converted(each, old, new)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    # together with another mapping
    fine = config(ratio=7.0, mode=mode, shared=False, on=on)
    assert difference(model, converted(model, fine, old, num_heads=HEADS, **MAP)) <= 1e-12


def test_the_same_mapping_is_copied_whole():
    """Also the buckets of offsets that are not on the map, and without a map."""
    old = config(method="cross")
    model = Attention(old)
    same = convert_tables(model.state_dict(), old, config(method="cross"))
    assert same.keys() == model.state_dict().keys()
    assert all(torch.equal(value, same[key]) for key, value in model.state_dict().items())


def test_strings_take_the_bucket_of_prefix_tokens_from_the_tables():
    for skip in (0, 2):
        model = Attention(config(skip=skip, on="k"))
        state = convert_tables(model.state_dict(), "rpe-1.9-product-ctx-1-k", "rpe-7.0-product-ctx-1-k", **MAP)
        other = Attention(config(7.0, skip=skip, on="k"), tables=False)
        other.load_state_dict(state, strict=True)
        assert difference(model, other) <= 1e-12


# prefix tokens


@pytest.mark.parametrize("method", ["cross", "product"])
def test_prefix_tokens_that_come_have_no_encoding(method):
    old, new = config(method=method, skip=0), config(method=method, skip=2)
    model = Attention(old)
    for name, table in converted(model, new, old).state_dict().items():
        if "lookup" in name:
            given = model.state_dict()[name]
            buckets = 1 if "rpe_v" in name else 2
            assert torch.equal(table.narrow(buckets, 0, given.shape[buckets]), given)
            assert (table.select(buckets, -1) == 0).all() and table.shape[buckets] == given.shape[buckets] + 1


def test_prefix_tokens_that_go_take_their_bucket_along():
    old, new = config(skip=1), config(skip=0)
    model = Attention(old)
    for name, table in converted(model, new, old).state_dict().items():
        if "lookup" in name:
            assert torch.equal(table, model.state_dict()[name].narrow(1 if "rpe_v" in name else 2, 0, 49))


# the closest, against least squares over all pairs of tokens


def pairs_matrix(single):
    """One row for each pair of tokens of the map, one column for each bucket: what the pair's encoding is summed of."""
    methods = [METHOD.CROSS_ROWS, METHOD.CROSS_COLS] if single.method == METHOD.CROSS else [single.method]
    columns = []
    for method in methods:
        ids, count = get_bucket_ids_2d(method, HEIGHT, WIDTH, 0, single.alpha, single.beta, single.gamma)
        columns.append(nn.functional.one_hot(ids.flatten(), count))
    return torch.cat(columns, 1).double()


def table_of(state, single):
    """(buckets, D) of the first attention on keys, without the bucket of prefix tokens."""
    parts = ["rp_rows.", "rp_cols."] if single.method == METHOD.CROSS else [""]
    return torch.cat([state[f"blocks.0.attn.rpe_k.{part}lookup_table_weight"][0, :, :-1].T for part in parts])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (dict(ratio=7.0), dict(ratio=1.2)),
        (dict(ratio=7.0), dict(method="euc", ratio=1.5)),
        (dict(ratio=7.0), dict(method="quant", ratio=2)),
        (dict(ratio=7.0), dict(method="cross", ratio=7)),
        (dict(ratio=7.0), dict(method="cross", ratio=1.2)),
        (dict(method="cross", ratio=7), dict(method="cross", ratio=1.2)),
        (dict(method="quant", ratio=40), dict(method="cross", ratio=1.2)),
        (dict(ratio=7.0), dict(method="cross_cols", ratio=1.2)),
    ],
)
def test_the_closest_of_all_tables(old, new):
    old, new = config(on="k", **old), config(on="k", **new)
    model = Attention(old)
    state = convert_tables(model.state_dict(), old, new, **MAP)
    wanted = pairs_matrix(old.rpe_k) @ table_of(model.state_dict(), old.rpe_k)
    design = pairs_matrix(new.rpe_k)
    ours = table_of(state, new.rpe_k)
    best = design @ torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    assert (design @ ours - best).abs().max() <= 1e-12
    assert (best - wanted).abs().max() > 1e-3  # it could not be exact
    assert (ours[design.sum(0) == 0] == 0).all()  # buckets without a pair


@pytest.mark.parametrize("new", [dict(ratio=2.5), dict(method="cross", ratio=2.5)])
def test_prefix_bucket_survives_another_mapping(new):
    for old in (config(), config(method="cross")):
        model = Attention(old)
        other = converted(model, config(**new), old, **MAP)
        for one, two in zip(model.blocks, other.blocks, strict=True):
            for name in ("rpe_q", "rpe_k"):
                x = torch.randn(1, HEADS, 1 + HEIGHT * WIDTH, DIM, dtype=torch.float64)
                given, made = getattr(one.attn, name)(x, **MAP), getattr(two.attn, name)(x, **MAP)
                assert (given[:, :, 0] - made[:, :, 0]).abs().max() <= 1e-12
                assert (given[:, :, :, 0] - made[:, :, :, 0]).abs().max() <= 1e-12


def test_undirected_is_the_mean_over_directions():
    """Product to euc, by hand: the bucket of distance 1 has the four neighbours, counted as often as they occur."""
    old, new = config(7.0, on="k"), config(20, "euc", on="k")
    model = Attention(old)
    state = convert_tables(model.state_dict(), old, new, **MAP)
    given, made = (table_of(one, c.rpe_k) for one, c in ((model.state_dict(), old), (state, new)))
    side, middle = 2 * 14 + 1, 14
    up, left = (HEIGHT - 1) * WIDTH, HEIGHT * (WIDTH - 1)  # how often two tokens stand so
    total = up * (given[(middle - 1) * side + middle] + given[(middle + 1) * side + middle])
    total = total + left * (given[middle * side + middle - 1] + given[middle * side + middle + 1])
    total = total + (up * (WIDTH - 1) // WIDTH) * sum(  # the diagonals are at distance 1.4, which is rounded to 1
        given[(middle + dr) * side + middle + dc] for dr in (-1, 1) for dc in (-1, 1)
    )
    count = 2 * up + 2 * left + 4 * (HEIGHT - 1) * (WIDTH - 1)
    assert (made[40 + 1] - total / count).abs().max() <= 1e-12
    assert (made[:40] == 0).all()  # never used by euc


# encodings that come and go


def test_an_encoding_that_comes_is_zero():
    old = config(on="k")
    model = Attention(old)
    other = converted(model, config(on="qkv"), old)
    assert difference(model, other) <= 1e-14
    assert all((other.state_dict()[f"blocks.0.attn.rpe_{x}.lookup_table_weight"] == 0).all() for x in "qv")
    for new in (config(shared=False), config(method="cross", shared=False)):
        mixed = RPEConfig(rpe_q=new.rpe_q, rpe_k=old.rpe_k, rpe_v=new.rpe_v)
        assert difference(model, converted(model, mixed, old, num_heads=HEADS)) <= 1e-14
        with pytest.raises(ValueError, match="rpe_q is new, and num_heads is not known: no other table tells it"):
            convert_tables(model.state_dict(), old, mixed)
    biases = config(mode="bias", shared=False, on="k")
    model = Attention(biases)
    mixed = RPEConfig(rpe_k=biases.rpe_k, rpe_v=config(shared=False).rpe_v)
    assert difference(model, converted(model, mixed, biases, head_dim=DIM)) <= 1e-14
    with pytest.raises(ValueError, match="rpe_v is new, and head_dim is not known"):
        convert_tables(model.state_dict(), biases, mixed)
    with pytest.raises(ValueError, match=r"head_dim is not known: the tables and the argument say \[4, 7\]"):
        convert_tables(Attention(old).state_dict(), old, config(on="kv"), head_dim=7)


def test_an_encoding_that_goes_has_to_be_meant():
    old, new = config(on="qkv"), config(on="k")
    model = Attention(old)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.rpe_q.*drop=True"):
        convert_tables(model.state_dict(), old, new)
    other = converted(model, new, old, drop=True)
    for one, two in zip(model.blocks, other.blocks, strict=True):
        assert torch.equal(one.attn.rpe_k.table, two.attn.rpe_k.table) and two.attn.rpe_q is None


# keys, dtypes


def test_other_keys_pass_and_prefixes_are_any():
    model = Attention(config(on="k"))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["rpe_k.lookup_table_weight"] = torch.randn(1, DIM, 50)
    state["my_rpe_k.lookup_table_weight"] = other = torch.randn(3)
    state["rpe_k.scale"] = scale = torch.randn(2)
    result = convert_tables(state, config(on="k"), config(7.0, "cross", on="k"), **MAP)
    assert result["my_rpe_k.lookup_table_weight"] is other and result["rpe_k.scale"] is scale
    assert result["module.norm.weight"] is state["module.norm.weight"]
    tables = {key: value.shape for key, value in result.items() if ".rp_" in key}
    prefixes = ["module.blocks.0.attn.", "module.blocks.1.attn.", ""]
    assert tables == {
        f"{p}rpe_k.{part}.lookup_table_weight": (1, DIM, 30) for p in prefixes for part in ("rp_rows", "rp_cols")
    }
    assert len(result) == len(state) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """A finer mapping repeats the numbers, in any dtype."""
    model = Attention(config(on="v", shared=False)).to(dtype)
    result = convert_tables(model.state_dict(), config(on="v", shared=False), config(7.0, on="v", shared=False), **MAP)
    for name, table in result.items():
        if "lookup" in name:
            assert table.dtype == dtype and table.is_contiguous()
            given = set(model.state_dict()[name].flatten().tolist())
            assert set(table.flatten().tolist()) <= given | {0.0}


# refused


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (dict(mode="bias", on="k"), dict(on="k"), MAP, "is bias and would become contextual, which has no meaning"),
        (dict(on="k"), dict(mode="bias", on="k"), MAP, "is contextual and would become bias"),
        (dict(shared=False), dict(), {}, "different tables for its 2 heads, which cannot become one"),
        (dict(), dict(shared=False), {}, "pass num_heads="),
        (dict(shared=False), dict(shared=False), dict(num_heads=3), "tables for 2 heads, but num_heads=3"),
        (dict(), dict(ratio=2.5), {}, "pass height= and width= of the map"),
        (dict(), dict(ratio=2.5), dict(height=3), "give both or neither"),
        (dict(), dict(ratio=2.5), dict(height=0, width=3), "height=0; expected at least 1"),
    ],
)
def test_refused_conversions(old, new, options, message):
    model = Attention(config(**old))
    with pytest.raises(ValueError, match=message):
        convert_tables(model.state_dict(), config(**old), config(**new), **options)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (dict(ratio=2.0), r"has shape \(1, 4, 50\); old_config has 82 buckets"),
        (dict(skip=0), r"has shape \(1, 4, 50\); old_config has 49 buckets.*skip that it was made with"),
        (dict(shared=False), None),
        (dict(mode="bias"), "lookup_table_weight is not described by old_config"),
        (dict(method="cross"), "other tables than old_config says, which has the method METHOD.CROSS"),
        (dict(on="q"), r"rpe_k\.lookup_table_weight is not described by old_config"),
        (dict(on="qk"), r"an encoding blocks\.0\.attn\.rpe_q, but the state dict has no table of it"),
    ],
)
def test_tables_that_the_old_configuration_does_not_describe(said, message):
    state = Attention(config(on="k")).state_dict()
    said = config(**{"on": "k", **said})
    if message is None:  # a table for each of one head is as good as a shared one
        assert convert_tables(state, said, said).keys() == state.keys()
        return
    with pytest.raises(ValueError, match=message):
        convert_tables(state, said, said)


def test_tables_of_heads_are_not_shared_ones():
    state = Attention(config(on="k", shared=False)).state_dict()
    with pytest.raises(ValueError, match="shared_head=True: name the ratio"):
        convert_tables(state, config(on="k"), config(on="k"))


def test_nothing_to_convert_and_no_configuration():
    with pytest.raises(ValueError, match="no tables of iRPE"):
        convert_tables(nn.Linear(2, 3).state_dict(), config(), config())
    with pytest.raises(TypeError, match="new_config is None; expected what get_rpe_config returns"):
        convert_tables(Attention(config()).state_dict(), config(), None)
    single = get_single_rpe_config()
    assert isinstance(single, SingleRPEConfig)
    with pytest.raises(TypeError, match="old_config is SingleRPEConfig"):
        convert_tables(Attention(config()).state_dict(), single, config())


def test_a_model_of_timm():
    """From one of timm's models into another of its models, strictly, with the same outputs."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    from irpe import equip

    sizes = dict(img_size=(12, 20), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    old, new = "rpe-1.9-cross-ctx-1-qkv", "rpe-1.9-product-ctx-0-qkv"
    model, other = (equip(vit.VisionTransformer(**sizes), one).double().eval() for one in (old, new))
    for name, table in model.named_parameters():
        if "lookup" in name:
            nn.init.normal_(table)
    other.load_state_dict(convert_tables(model.state_dict(), old, new, num_heads=3, **MAP), strict=True)
    image = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    with torch.no_grad():
        assert (model(image) - other(image)).abs().max() <= 1e-12
