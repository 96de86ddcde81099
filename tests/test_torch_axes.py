"""equip on torch's own attention, where maps have other than two axes: sequences and volumes."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from equipped import Equipped, fill, gradients, spread
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import equip, get_bucket_ids, get_rpe_config, unequip

E, HEADS = 12, 2


class Block(nn.Module):
    """As in MONAI's vision transformer, around torch's attention."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VolumeViT(nn.Module):
    """Volumes (B, 1, depth, height, width) in cubes of 2: a class token and depth/2 * height/2 * width/2 others."""

    def __init__(self, cubes):
        super().__init__()
        self.patch = nn.Conv3d(1, E, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, E))
        self.positions = nn.Parameter(torch.zeros(1, 1 + math.prod(cubes), E))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(E)
        self.checkpointing = False

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.norm(x)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, HEADS, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


# model, shape of its input, equip's grid, the map, prefix tokens
FAMILIES = {
    "TransformerEncoder on sequences": (Sequence, (2, 9, E), 9, (9,), 0),
    "vision transformer on volumes": (lambda: VolumeViT((2, 3, 4)), (2, 1, 4, 6, 8), (2, 3, 4), (2, 3, 4), 1),
}


def config_of(family, method="product", shared=False, on="qkv"):
    *_, size, skip = FAMILIES[family]
    return get_rpe_config(1.5, method, "ctx", shared, skip, on, len(size))


def make(family, config=None, *, tables=True):
    torch.manual_seed(0)
    build, shape, grid, *_ = FAMILIES[family]
    model = build().double().eval()
    for one in model.parameters():
        nn.init.normal_(one, std=0.3)
    x = torch.randn(shape, dtype=torch.float64)
    return (fill(equip(model, config or config_of(family), grid=grid)) if tables else model), x


def attentions(model):
    return [one for one in model.modules() if isinstance(one, nn.MultiheadAttention)]


def by_hand(attention, size, skip):
    """A forward of `nn.MultiheadAttention` with a vector for each pair of tokens."""
    cells = torch.tensor([[-1] * len(size)] * skip + list(itertools.product(*map(range, size))))

    def forward(x, *_, **__):
        def vectors(rpe, dim):
            c = rpe.rpe_config
            ids, _ = get_bucket_ids(c.method, cells, cells, skip, c.alpha, c.beta, c.gamma)
            return rpe.lookup_table_weight.movedim(dim, 1)[:, ids]  # (H', L, L, D)

        q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q = q * q.shape[-1] ** -0.5
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        scores = scores + torch.einsum("bihd,hijd->bhij", q, vectors(attention.rpe_k, 2).expand(HEADS, -1, -1, -1))
        scaled = k * k.shape[-1] ** -0.5
        on_q = vectors(attention.rpe_q, 2).expand(HEADS, -1, -1, -1)
        weights = (scores + torch.einsum("bjhd,hjid->bhij", scaled, on_q)).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", weights, v)
        on_v = vectors(attention.rpe_v, 1).expand(HEADS, -1, -1, -1)
        out = out + torch.einsum("bhij,hijd->bihd", weights, on_v)
        return F.linear(out.flatten(2), attention.out_proj.weight, attention.out_proj.bias), None

    return forward


class TestEquipped(Equipped):
    @staticmethod
    def families():
        return FAMILIES

    @staticmethod
    def build(family):
        return make(family, tables=False)[0]

    @staticmethod
    def equip(model, family):
        return equip(model, config_of(family), grid=FAMILIES[family][2])

    @staticmethod
    def run(model, family):
        return model(make(family, tables=False)[1])

    @staticmethod
    def snapshot(model):
        return [
            (name, type(one), sorted(vars(one)), list(one._parameters), list(one._modules), len(one._forward_pre_hooks))
            for name, one in model.named_modules()
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_tables_change_nothing(family):
    model, x = make(family, tables=False)
    before, weights = model(x), copy.deepcopy(model.state_dict())
    assert equip(model, config_of(family), grid=FAMILIES[family][2]) is model
    assert (model(x) - before).abs().max() <= 1e-12
    with torch.no_grad():
        assert (model(x) - before).abs().max() <= 1e-12
    assert all(torch.equal(model.state_dict()[key], one) for key, one in weights.items())
    assert len(model.state_dict()) == len(weights) + 2 * 3
    assert {one.rpe_grid for one in attentions(model)} == {FAMILIES[family][3]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(family, shared):
    model, x = make(family, config_of(family, shared=shared))
    got = model(x)
    found = gradients(model, spread(got))
    for one in attentions(model):
        one.forward = by_hand(one, *FAMILIES[family][3:])
    expected = model(x)
    assert (got - expected).abs().max() <= 1e-11
    wanted = gradients(model, spread(expected))
    for name, one in wanted.items():
        assert (found[name] - one).abs().max() <= 1e-10 * max(1, one.abs().max()), name
    for one in attentions(model):
        del one.forward
    assert (unequip(model)(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["euc", "quant", "cross"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_reaches_every_head(family, method):
    model, x = make(family, config_of(family, method))
    got = gradients(model, spread(model(x)))
    axes = len(FAMILIES[family][3]) if method == "cross" else 1
    tables = [name for name in got if "lookup_table" in name]
    assert len(tables) == 2 * 3 * axes
    assert all(got[name].flatten(1).abs().amax(1).min() > 1e-9 for name in tables)


def test_checkpointing():
    model, x = make("vision transformer on volumes")
    expected = gradients(model, spread(model(x)))
    model.checkpointing = True
    for name, one in gradients(model, spread(model(x))).items():
        torch.testing.assert_close(one, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family):
    model, x = make(family)
    expected = gradients(model, spread(model(x)))
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for name, one in gradients(model, spread(out)).items():
        assert (one - expected[name]).abs().max() <= 1e-10 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_export(family):
    model, x = make(family)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert (program.module()(x) - model(x)).abs().max() <= 1e-11


def test_training_moves_the_tables():
    for family in FAMILIES:
        model, x = make(family, tables=False)
        equip(model, config_of(family), grid=FAMILIES[family][2]).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(8):
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(one.rpe_k.table.abs().max() > 0 for one in attentions(model))


def test_sequences_of_any_length_without_a_grid():
    model, _ = make("TransformerEncoder on sequences", tables=False)
    fill(equip(model, config_of("TransformerEncoder on sequences")))
    for length in (9, 5, 16):
        x = torch.randn(2, length, E, dtype=torch.float64)
        expected = model(x)
        for one in attentions(model):
            one.rpe_grid = (length,)
        assert torch.equal(model(x), expected)
        for one in attentions(model):
            one.rpe_grid = None


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (
            "rpe-1.9-product-ctx-1-k-3d",
            (4, 6),
            r"grid=\(4, 6\), but rpe_k has ndim=3; expected as many numbers as axes",
        ),
        ("rpe-1.9-product-ctx-1-k", (2, 3, 4), r"grid=\(2, 3, 4\), but rpe_k has ndim=2"),
        ("rpe-1.9-product-ctx-1-k", 24, r"grid=\(24,\), but rpe_k has ndim=2"),
        ("rpe-1.9-product-ctx-1-k-3d", None, "rpe_k has ndim=3, and nothing in the model tells .*: pass grid="),
    ],
)
def test_grids_that_do_not_fit(config, grid, message):
    model, x = make("vision transformer on volumes", tables=False)
    before, keys = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        equip(model, config, grid=grid)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


def test_torchvision_has_images():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 8)
    with pytest.raises(ValueError, match="ndim=3, but the maps of the model are images"):
        equip(model, "rpe-1.9-product-ctx-1-k-3d")
