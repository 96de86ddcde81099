"""equip on torch's own attention: encoder layers, encoders, modules of one's own, torchvision's vision transformer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from equipped import Equipped, fill, gradients, spread, tables_of
from fresh import PATIENCE
from methods import METHODS
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import RPEMultiheadAttention, equip, get_rpe_config, rpe_parameters, unequip
from irpe.integrations.torch_mha import EquippedMultiheadAttention

E, HEADS, GRID = 24, 2, (2, 8)
TOKENS = 1 + 2 * 8
QKV = get_rpe_config(1.9, "product", "ctx", False, 1, "qkv")


def layer(heads=HEADS, **kwargs):
    options = dict(d_model=E, nhead=heads, dim_feedforward=32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoderLayer(**options | kwargs)


def encoder(**kwargs):
    nested = dict(enable_nested_tensor=kwargs.pop("enable_nested_tensor", False))
    one = layer(**kwargs)
    model = nn.TransformerEncoder(one, 2, norm=nn.LayerNorm(E, dtype=torch.float64), **nested)
    for parameter in model.parameters():  # torch copies the layer, so all would be equal
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


class Mine(nn.Module):
    """Someone's own block around a bare attention, which asks for the weights too."""

    def __init__(self, batch_first=True, **kwargs):
        super().__init__()
        self.before = nn.Linear(E, E, dtype=torch.float64)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, dtype=torch.float64, **kwargs)

    def forward(self, x, mask=None, **kwargs):
        x = self.before(x)
        out, weights = self.attention(x, x, x, attn_mask=mask, **kwargs)
        return x + out if weights is None else x + out * weights.sum(-1, keepdim=True)  # which is 1


class Wrapper(nn.Module):
    def __init__(self, inner, **extra):
        super().__init__()
        self.inner = inner
        for name, one in extra.items():
            setattr(self, name, one)

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs)


class Transposed(Wrapper):
    """Batch first from outside."""

    def forward(self, x, *args, **kwargs):
        return self.inner(x.transpose(0, 1), *args, **kwargs).transpose(0, 1)


def vit(**kwargs):
    torchvision = pytest.importorskip("torchvision")
    options = dict(image_size=16, patch_size=4, num_layers=2, num_heads=HEADS, hidden_dim=E, mlp_dim=32, num_classes=5)
    model = torchvision.models.VisionTransformer(**options | kwargs).double()
    nn.init.normal_(model.heads.head.weight)
    return model


def vit_with_conv_stem():
    from torchvision.models.vision_transformer import ConvStemConfig

    return vit(conv_stem_configs=[ConvStemConfig(8, 3, 2), ConvStemConfig(12, 3, 2)])


def tokens(batch=2, seed=0):
    return torch.randn(batch, TOKENS, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(batch=2, seed=0):
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# what is supported. name: (model, its input, equip's grid, attentions)
FAMILIES = {
    "MultiheadAttention in one's own module": (Mine, tokens, GRID, 1),
    "TransformerEncoderLayer": (layer, tokens, GRID, 1),
    "TransformerEncoderLayer, norm first": (lambda: layer(norm_first=True), tokens, GRID, 1),
    "TransformerEncoderLayer, gelu, odd heads": (lambda: layer(3, activation="gelu"), tokens, GRID, 1),
    "TransformerEncoder": (encoder, tokens, GRID, 2),
    "TransformerEncoder, norm first": (lambda: encoder(norm_first=True), tokens, GRID, 2),
    "TransformerEncoder, nested tensors": (lambda: encoder(enable_nested_tensor=True), tokens, GRID, 2),
    "TransformerEncoder, sequence first": (lambda: Transposed(encoder(batch_first=False)), tokens, GRID, 2),
    "TransformerEncoder, no bias": (lambda: encoder(bias=False), tokens, GRID, 2),
    "TransformerEncoder in a wrapper": (lambda: Wrapper(encoder()), tokens, GRID, 2),
    "torchvision VisionTransformer": (vit, images, None, 2),
    "torchvision VisionTransformer, convolutional stem": (vit_with_conv_stem, images, None, 2),
}
PLAIN = [name for name, (_, _, grid, _) in FAMILIES.items() if grid]


def make(family, config=QKV, *, tables=True, **kwargs):
    """An equipped small model in evaluation mode, its tables random unless `tables` is false, and its input."""
    torch.manual_seed(0)
    build, example, grid, _ = FAMILIES[family]
    model = build().eval()
    return (fill(equip(model, config, grid=grid, **kwargs)) if tables else model), example()


def attentions(model):
    return [one for one in model.modules() if isinstance(one, nn.MultiheadAttention)]


def snapshot(model):
    return [
        (name, type(one), sorted(vars(one)), list(one._parameters), list(one._modules), one.training,
         len(one._forward_pre_hooks), getattr(one, "use_nested_tensor", None))
        for name, one in model.named_modules()
    ]  # fmt: skip


def attend(attention, x, height, width, mask=None):
    """The formula with the terms of the paper, on x (B, L, E)."""
    batch, length, _ = x.shape
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    scale, size = q.shape[-1] ** -0.5, dict(height=height, width=width)
    scores = q * scale @ k.mT + attention.rpe_k(q * scale, **size) + attention.rpe_q(k * scale, **size).mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    out = weights @ v + attention.rpe_v(weights, **size)
    return F.linear(out.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


def by_hand(model, x, mask=None):
    if isinstance(model, Wrapper):
        return by_hand(model.inner, x, mask)
    if isinstance(model, Mine):
        x = model.before(x)
        return x + attend(model.attention, x, *GRID, mask)
    if isinstance(model, nn.TransformerEncoder):
        for one in model.layers:
            x = by_hand(one, x, mask)
        return model.norm(x)
    if isinstance(model, nn.TransformerEncoderLayer):
        if model.norm_first:
            x = x + attend(model.self_attn, model.norm1(x), *GRID, mask)
            return x + model.linear2(model.activation(model.linear1(model.norm2(x))))
        x = model.norm1(x + attend(model.self_attn, x, *GRID, mask))
        return model.norm2(x + model.linear2(model.activation(model.linear1(x))))
    x = model._process_input(x)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    for block in model.encoder.layers:
        x = x + attend(block.self_attention, block.ln_1(x), 4, 4)
        x = x + block.mlp(block.ln_2(x))
    return model.heads(model.encoder.ln(x)[:, 0])


class TestEquipped(Equipped):
    copied = ("TransformerEncoder, nested tensors", "torchvision VisionTransformer")
    snapshot = staticmethod(snapshot)

    @staticmethod
    def families():
        return FAMILIES

    @staticmethod
    def build(family):
        return make(family, tables=False)[0]

    @staticmethod
    def equip(model, family):
        return equip(model, QKV, grid=FAMILIES[family][2])

    @staticmethod
    def run(model, family):
        return model(FAMILIES[family][1]())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_tables_change_nothing(family, training):
    model, x = make(family, tables=False)
    model.train(training)
    with torch.no_grad():
        before, keys, weights = model(x), set(model.state_dict()), copy.deepcopy(model.state_dict())
    names = [name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)]
    assert equip(model, QKV, grid=FAMILIES[family][2]) is model
    with torch.no_grad():
        assert (model(x) - before).abs().max() <= 1e-12 or "stem" in family  # batch norm in training
        assert (
            not training or "stem" not in family or (unequip(copy.deepcopy(model))(x) - model(x)).abs().max() <= 1e-12
        )
    added = model.state_dict().keys() - keys
    assert added == {f"{name}.rpe_{x}.lookup_table_weight" for name in names for x in "qkv"}
    assert all(
        torch.equal(model.state_dict()[key], weights[key])
        for key in keys
        if "running" not in key and "num_batches" not in key
    )
    assert len(names) == FAMILIES[family][3]
    assert all(one.rpe_k.rpe_config.skip == 1 and one.rpe_k.training == training for one in attentions(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_formula(family):
    model, x = make(family)
    expected = by_hand(model, x)
    assert (model(x) - expected).abs().max() <= 1e-11
    assert (unequip(copy.deepcopy(model))(x) - expected).abs().max() > 1e-3  # the tables do something
    wanted = gradients(model, spread(by_hand(model, x)))
    got = gradients(model, spread(model(x)))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    assert got.keys() == dict(model.named_parameters()).keys()
    last = max(tables_of(model)) if "torchvision" in family else ""
    for name in tables_of(model):  # the class token alone is read from the last block, and all its keys share a bucket
        assert got[name].abs().max() > 1e-9 or name.split(".rpe_")[0] == last.split(".rpe_")[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mode", "shared", "on"), [("ctx", False, "qkv"), ("ctx", True, "v"), ("bias", False, "qk")])
def test_every_encoding_reaches_every_head(method, mode, shared, on):
    model, x = make("TransformerEncoder", get_rpe_config(1.9, method, mode, shared, 1, on))
    got = gradients(model, spread(model(x)))
    assert len(tables_of(model)) == 2 * len(on) * (2 if method == "cross" else 1)
    for name, table in tables_of(model).items():
        assert table.shape[0] == (1 if shared else HEADS)
        assert got[name].flatten(1).abs().amax(1).min() > 1e-9, name


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_fused_kernels_of_evaluation_are_not_taken(family, mode, monkeypatch):
    """They take the raw weights and never call the attention, so the encodings would be left out without a word."""
    model, x = make(family)
    expected = by_hand(model, x)
    plain = unequip(copy.deepcopy(model))
    called = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, f=original, **kwargs: called.append(1) or f(*args, **kwargs))
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    for one in (model, plain) if mode == "frozen" else ():
        one.requires_grad_(False)
    with context():
        assert (model(x) - expected).abs().max() <= 1e-11
        assert not called
        plain(x)
    assert bool(called) == (family not in {
        "TransformerEncoderLayer, gelu, odd heads", "TransformerEncoder, sequence first", "TransformerEncoder, no bias",
    })  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masks", ["padding", "mask", "both", "added"])
@pytest.mark.parametrize("family", [name for name in PLAIN if "Encoder" in name])
def test_masks(family, masks, grad):
    """Boolean masks of torch's modules are True where a pair is ignored."""
    model, x = make(family)
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS - 2], [5]])
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    minus = torch.zeros(1, dtype=torch.float64)
    full_padding, full_mask = (minus.masked_fill(one, -torch.inf) for one in (padding[:, None, None], mask))
    name = "mask" if "TransformerEncoder," in family or family.split(" ")[0] == "TransformerEncoder" else "src_mask"
    arguments, added = {
        "padding": (dict(src_key_padding_mask=padding), full_padding),
        "mask": ({name: mask}, full_mask),
        "both": ({name: mask, "src_key_padding_mask": padding}, full_mask + full_padding),
        "added": ({name: full_mask, "src_key_padding_mask": full_padding[:, 0, 0]}, full_mask + full_padding),
    }[masks]
    expected = by_hand(model, x, added)
    with torch.set_grad_enabled(grad):
        got = model(x, **arguments)
    assert (got - expected).abs().max() <= 1e-11


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_come_back():
    model, x = make("TransformerEncoder, nested tensors", tables=False)
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS - 2], [5]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        equip(model, QKV, grid=GRID, blocks=[1])
        assert model.use_nested_tensor is False
        after = model(x, src_key_padding_mask=padding)
        assert (after - before)[~padding].abs().max() <= 1e-12  # torch clears the rest, which nobody reads
        equip(model, QKV, grid=GRID, blocks=[0])
        assert model.use_nested_tensor is False
        assert unequip(model).use_nested_tensor is True
        assert torch.equal(model(x, src_key_padding_mask=padding), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_layer_inside_an_encoder_that_nobody_has_told():
    model, x = make("TransformerEncoder, nested tensors", tables=False)
    equip(model.layers[0], QKV, grid=GRID)
    padding = torch.arange(TOKENS).expand(2, -1) >= 5
    with torch.no_grad(), pytest.raises(ValueError, match="nested tensor, which has no map"):
        model(x, src_key_padding_mask=padding)


def test_encoders_built_from_an_equipped_layer():
    one = fill(equip(layer(), QKV, grid=GRID))
    model = nn.TransformerEncoder(one, 2, nn.LayerNorm(E, dtype=torch.float64), enable_nested_tensor=False).eval()
    with torch.no_grad():
        assert (model(tokens()) - by_hand(model, tokens())).abs().max() <= 1e-11
    assert len({id(table) for table in tables_of(model).values()}) == 6
    assert not tables_of(unequip(model))


def test_without_a_grid_the_map_is_a_square():
    wide, x = make("TransformerEncoder")
    square = fill(equip(make("TransformerEncoder", tables=False)[0], QKV))
    assert not torch.allclose(square(x), wide(x))
    for one in attentions(square):
        one.rpe_grid = GRID
    assert torch.equal(square(x), wide(x))
    with pytest.raises(ValueError, match="16 tokens with skip=1 leave 15 for the map, which is not a square"):
        fill(equip(make("TransformerEncoder", tables=False)[0], QKV))(x[:, 1:])
    with pytest.raises(ValueError, match="skip=1 .* height=2 .* width=8 = 17 tokens, but the input has 16"):
        wide(x[:, 1:])


def test_a_module_of_ones_own_may_say_the_map_in_each_call():
    model, x = make("MultiheadAttention in one's own module")
    expected = model(x)
    assert torch.equal(model(x, hw=GRID), expected)
    assert not torch.allclose(model(x, hw=(4, 4)), expected)
    places = torch.cat([torch.full((1, 2), -1), torch.cartesian_prod(torch.arange(2), torch.arange(8))])
    assert torch.allclose(model(x, positions=places), expected)
    assert torch.allclose(model(x, need_weights=False), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_each_pass_on_its_own_map(reentrant):
    """Two maps of 16 tokens: whoever mixes them up gets no error from the shapes."""
    model = fill(equip(Mine().train(), QKV))

    def loss(run):
        outs = [
            run(lambda x, hw=hw: model(x, hw=hw), tokens(seed=n).requires_grad_())
            for n, hw in enumerate([(2, 8), (4, 4), (8, 2)])
        ]
        return sum(n * out.square().sum() for n, out in enumerate(outs, 1))

    expected = gradients(model, loss(lambda one, x: one(x)))
    got = gradients(model, loss(lambda one, x: checkpoint(one, x, use_reentrant=reentrant)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing(family):
    model, x = make(family)
    expected = gradients(model, spread(model(x)))
    got = gradients(model, spread(checkpoint(model, x, use_reentrant=False)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_hooks_of_others_stay():
    model, x = make("TransformerEncoder", tables=False)
    calls = []
    model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    equip(model, QKV, grid=GRID)
    with torch.no_grad():
        model(x)
        unequip(model)(x)
    assert calls == [(2, TOKENS, E)] * 2


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(slice(0, 1), [0]), ([-1], [1]), (lambda number, name: name.endswith("layers.1.self_attn"), [1]), (None, [0, 1])],
)
def test_some_blocks(blocks, expected):
    model, x = make("TransformerEncoder in a wrapper", tables=False)
    snap, before = snapshot(model), model(x)
    equip(model, QKV, blocks=blocks, grid=GRID)
    assert [n for n, one in enumerate(attentions(model)) if type(one) is EquippedMultiheadAttention] == expected
    assert len(rpe_parameters(model)["params"]) == 3 * len(expected)
    assert (model(x) - before).abs().max() <= 1e-12
    with torch.no_grad():  # the layers that have none may be fused, the others not
        assert (fill(model)(x) - before).abs().max() > 1e-3
    assert snapshot(unequip(model)) == snap


@pytest.mark.parametrize("family", ["TransformerEncoder, nested tensors", "torchvision VisionTransformer"])
def test_different_configurations_for_different_blocks(family):
    model, x = make(family, tables=False)
    snap, grid = snapshot(model), FAMILIES[family][2]
    equip(model, get_rpe_config(1.9, skip=1), blocks=[0], grid=grid)
    with pytest.raises(ValueError, match="has iRPE already; call unequip first, or name other blocks"):
        equip(model, QKV, grid=grid)
    equip(model, get_rpe_config(20, "cross", "bias", False, 1, "q"), blocks=[1], grid=grid and (4, 4))
    first, second = attentions(model)
    assert first.rpe_q is None and first.rpe_k.lookup_table_weight.shape == (1, E // HEADS, 50)
    assert second.rpe_k is None and second.rpe_q.rp_rows.lookup_table_bias.shape == (HEADS, 82)
    assert (first.rpe_grid, second.rpe_grid) == (grid, grid and (4, 4))
    model(x).square().sum().backward()
    assert first.rpe_k.lookup_table_weight.grad is not None
    assert snapshot(unequip(model)) == snap


class Own(nn.MultiheadAttention):
    pass


def refused(model, reason, config=QKV, grid=None, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=reason) as caught:
        equip(model, config, grid=grid)
    assert "nn.MultiheadAttention in nn.TransformerEncoder" in str(caught.value)
    assert snapshot(model) == before


def test_refused_attentions():
    model = encoder()
    model.layers[1].self_attn = Own(E, HEADS)
    refused(model, "layers.1.self_attn is a Own; expected nn.MultiheadAttention itself")
    model.layers[1].self_attn = RPEMultiheadAttention(E, HEADS, rpe_config=QKV)
    refused(model, "layers.1.self_attn is a RPEMultiheadAttention")
    model = encoder()
    attention = model.layers[0].self_attn
    attention.forward = type(attention).forward.__get__(attention)
    refused(model, "the forward of layers.0.self_attn has been replaced on the object")
    for option in ("add_bias_kv", "add_zero_attn"):
        refused(Mine(**{option: True}), "attention: .*has no place.*expected skip > 0", get_rpe_config())
        equip(Mine(**{option: True}), QKV)
    refused(nn.Sequential(nn.Linear(2, 3)), "Sequential is not a model that iRPE can be added to", error=TypeError)


def test_a_refusal_of_one_block_leaves_the_others_to_a_choice():
    model = encoder()
    model.layers[1].self_attn = Own(E, HEADS, batch_first=True, dtype=torch.float64)
    equip(model, QKV, blocks=[0], grid=GRID)
    assert model(tokens()).shape == (2, TOKENS, E)


def decoder_layer():
    return nn.TransformerDecoderLayer(E, HEADS, 32, 0.0, batch_first=True, dtype=torch.float64)


def test_decoders():
    """Their queries may be no map (100 of DETR are no 10x10 image), so only who names an attention gets it."""
    refused(
        nn.TransformerDecoder(decoder_layer(), 2), "attentions are those of decoder layers.*layer.self_attn", grid=GRID
    )
    model = decoder_layer().eval()
    refused(model, "TransformerDecoderLayer: its attentions are those of decoder layers")
    x, memory = tokens(), tokens(seed=1)[:, :5]
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
    run = dict(tgt=x, memory=memory, tgt_mask=mask, tgt_is_causal=True)
    before = model(**run)
    equip(model.self_attn, QKV, grid=GRID)
    assert (model(**run) - before).abs().max() <= 1e-12
    fill(model)
    y = model.norm1(x + attend(model.self_attn, x, *GRID, mask))
    y = model.norm2(y + model.multihead_attn(y, memory, memory)[0])
    y = model.norm3(y + model.linear2(model.linear1(y).relu()))
    with torch.no_grad():
        assert (model(**run) - y).abs().max() <= 1e-11
    assert not tables_of(unequip(model))
    equip(model.multihead_attn, QKV, grid=GRID)
    with pytest.raises(ValueError, match="17 queries and 5 keys; an encoding expects the same tokens, or positions="):
        model(**run)


def test_a_whole_transformer_gets_it_in_its_encoder():
    torch.manual_seed(0)
    model = nn.Transformer(E, HEADS, 2, 1, 32, 0.0, batch_first=True, dtype=torch.float64).eval()
    snap = snapshot(model)
    with torch.no_grad():
        before = model(tokens(), tokens(seed=1)[:, :7])
        equip(model, QKV, grid=GRID)
        assert {name.split(".rpe")[0] for name in tables_of(model)} == {
            f"encoder.layers.{n}.self_attn" for n in range(2)
        }
        assert (model(tokens(), tokens(seed=1)[:, :7]) - before).abs().max() <= 1e-12
        assert (fill(model)(tokens(), tokens(seed=1)[:, :7]) - before).abs().max() > 1e-3
    assert snapshot(unequip(model)) == snap


def test_refused_vision_transformers():
    torchvision = pytest.importorskip("torchvision")

    class Other(torchvision.models.VisionTransformer):
        pass

    model = vit()
    refused(model, r"grid=\(4, 4\), but the model knows the size of its map", grid=(4, 4))
    refused(
        model, "rpe_q has skip=2, but the model has 1 prefix token; leave skip at 0", get_rpe_config(skip=2, rpe_on="q")
    )
    model.encoder.layers[1].forward = model.encoder.layers[1].forward
    refused(model, "the forward of encoder.layers.encoder_layer_1 has been replaced")
    model = vit()
    model.encoder.layers[0] = layer()
    refused(model, "encoder.layers.encoder_layer_0 is a TransformerEncoderLayer; expected torchvision's EncoderBlock")
    model = vit()
    model.encoder = encoder()
    refused(model, "encoder is a TransformerEncoder; expected torchvision's Encoder")
    model = Other(image_size=16, patch_size=4, num_layers=2, num_heads=HEADS, hidden_dim=E, mlp_dim=32).double()
    refused(model, "Other changes the forward of VisionTransformer; equip its encoder instead")
    equip(model.encoder, QKV, grid=(2, 8))
    assert all(one.rpe_grid == (2, 8) for one in attentions(model))
    assert not tables_of(unequip(model))


def test_vision_transformers_have_one_prefix_token():
    for skip in (0, 1):
        model = equip(vit(), get_rpe_config(skip=skip))
        assert all(one.rpe_k.rpe_config.skip == 1 for one in attentions(model))
    with pytest.raises(AssertionError, match="Wrong image height"):  # torchvision's own
        model(images()[..., :12, :])


def test_a_vision_transformer_beside_other_attentions():
    model = Wrapper(vit(), head=Mine())
    equip(model, get_rpe_config(skip=1))
    assert [one.rpe_k.rpe_config.skip for one in attentions(model)] == [1, 1, 1]
    refused(Wrapper(vit(), head=Mine()), "the model knows the size of its map", grid=GRID)
    assert not tables_of(unequip(model))


def test_a_decoder_of_text_beside_a_vision_transformer():
    model = Wrapper(vit(), decoder=nn.TransformerDecoder(decoder_layer(), 1))
    snap = snapshot(model)
    equip(model, QKV, blocks=[0])
    equip(model.decoder.layers[0].self_attn, QKV, grid=GRID)
    equip(model, QKV, blocks=[1])
    assert {name.split(".rpe")[0] for name in tables_of(model)} == {
        *(f"inner.encoder.layers.encoder_layer_{n}.self_attention" for n in range(2)), "decoder.layers.0.self_attn",
    }  # fmt: skip
    assert snapshot(unequip(model)) == snap


def test_torchvisions_builders():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = equip(torchvision.models.vit_b_16(image_size=32), "rpe-1.9-product-ctx-1-k")
    assert len(tables_of(model)) == 12
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 1000)


def test_torchvisions_feature_extraction():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = make("torchvision VisionTransformer")
    taken = extraction.create_feature_extractor(model, ["encoder.ln"])(x)["encoder.ln"]
    assert (model.heads(taken[:, 0]) - by_hand(model, x)).abs().max() <= 1e-11


def test_attentions_of_other_libraries_are_their_adapters_business():
    timm = pytest.importorskip("timm")
    from timm.layers.ml_decoder import MLDecoder

    with pytest.raises(TypeError, match="MLDecoder is not a model that iRPE can be added to"):
        equip(MLDecoder(5, initial_num_features=8, decoder_embedding=8), "rpe-1.9-product-ctx-1-k")
    backbone = timm.models.VisionTransformer(img_size=(8, 12), patch_size=4, embed_dim=24, depth=1, num_heads=2)
    model = equip(Wrapper(backbone, neck=encoder()), "rpe-1.9-product-ctx-1-k")
    assert [name.split(".")[0] for name in tables_of(model)] == ["inner"]
    equip(model.neck, "rpe-1.9-product-ctx-1-k", grid=GRID)
    assert len(tables_of(model)) == 3
    assert not tables_of(unequip(model))


def test_transformers_attention_pooling_is_left_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    from irpe.integrations.torch_mha import ADAPTER

    model = transformers.SiglipVisionModel(config)
    assert attentions(model)
    assert ADAPTER.find(model) == []


def test_the_import_is_cheap(run_python):
    code = """
        import sys, irpe
        assert "irpe.integrations.torch_mha" not in sys.modules
        from torch import nn
        model = irpe.equip(nn.TransformerEncoderLayer(8, 2), "rpe-1.9-product-ctx-1-k")
        assert type(model.self_attn).__name__ == "EquippedMultiheadAttention"
        assert "torchvision" not in sys.modules and "timm" not in sys.modules
    """
    run_python(code, path=[ROOT], forbid=["timm", "torchvision", "transformers"])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "family",
    [
        "TransformerEncoder, nested tensors",
        pytest.param("torchvision VisionTransformer", marks=pytest.mark.slow),
        pytest.param("MultiheadAttention in one's own module", marks=pytest.mark.slow),
    ],
)
def test_compiled(family):
    model, x = make(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(x) - by_hand(model, x)).abs().max() <= 1e-11
    model.train()
    expected = gradients(model, spread(model(x)))
    torch.testing.assert_close(gradients(model, spread(compiled(x))), expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    model, x = make("TransformerEncoder")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert (compiled(x) - by_hand(model, x)).abs().max() <= 1e-10
    expected = gradients(model, spread(model(x)))
    torch.testing.assert_close(gradients(model, spread(compiled(x))), expected, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", ["TransformerEncoder", "torchvision VisionTransformer"])
def test_export_with_dynamic_batch(family, grad, strict):
    model, x = make(family)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    for n in (2, 5):
        x = FAMILIES[family][1](n)
        assert (program.module()(x) - by_hand(model, x)).abs().max() <= 1e-11
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast(family):
    model, x = make(family)
    expected = model(x)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x.float())
    assert (got - expected).abs().max() <= 20 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    gradients(model, got.float().square().sum())
    for name, one in tables_of(model).items():
        assert one.grad.dtype == torch.float32 and one.grad.isfinite().all(), name


def test_a_frozen_model_trains_its_tables():
    model, x = make("TransformerEncoder", tables=False)
    equip(model.train().requires_grad_(False), QKV, grid=GRID)
    assert gradients(model, spread(model(x))).keys() == tables_of(model).keys()


def test_lora_beside_it():
    """peft wraps the attention, and calls it with merged weights in the place of its own."""
    peft = pytest.importorskip("peft")
    model, x = make("TransformerEncoder")
    expected = by_hand(model, x)
    config = peft.LoraConfig(r=2, target_modules=["self_attn"])
    lora = peft.get_peft_model(Wrapper(model), config).eval()
    with torch.no_grad():
        assert (lora(x) - expected).abs().max() <= 1e-11
        for name, one in lora.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(one, std=0.1)
        adapted = lora(x)
        assert (adapted - expected).abs().max() > 1e-3
        merged = lora.merge_and_unload().inner
        assert (merged(x) - adapted).abs().max() <= 1e-6
        assert (by_hand(merged, x) - adapted).abs().max() <= 1e-6


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, StateDictOptions
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from irpe import equip, get_rpe_config, rpe_parameters

how, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)


def make():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2)
    equip(model, get_rpe_config(1.9, "product", "ctx", False, 1, "qkv"), grid=(2, 8))
    for table in rpe_parameters(model)["params"]:
        nn.init.normal_(table)
    return model


def train(model, parts):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for part in parts:  # the gradients of one process, or of both one after the other
            (model(part + step).square().sum(-1).mean() / len(parts)).backward()
        optimizer.step()


batches = torch.randn(2, 3, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
alone = make()
train(alone, batches)
model = make()
if how == "ddp":
    model = DistributedDataParallel(model)
else:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
train(model, [batches[rank]])
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
state = get_model_state_dict(model, options=options)
expected = alone.state_dict()
if rank == 0 or how == "ddp":
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    for name in expected:
        assert (state[name] - expected[name]).abs().max() < 1e-10, name
    start = make().state_dict()
    assert all((expected[name] - start[name]).abs().max() > 1e-9 for name in expected if "lookup_table" in name)
model.eval()
alone.eval()
with torch.no_grad():
    padding = torch.arange(17).expand(3, -1) > 14
    got, wanted = (one(batches[rank], src_key_padding_mask=padding) for one in (model, alone))
    assert (got - wanted).abs().max() < 1e-10
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how, tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), how, str(rank), str(tmp_path / "rendezvous")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [one.communicate(timeout=PATIENCE)[0] for one in workers]
    finally:
        for one in workers:
            one.kill()
    assert [one.returncode for one in workers] == [0, 0], outputs
