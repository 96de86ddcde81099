"""torch.fx on models with encodings: extraction of features by timm and torchvision, and plain symbolic tracing."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import fx, nn

from irpe import RPEMultiheadAttention

timm = pytest.importorskip("timm")
extraction = pytest.importorskip("torchvision.models.feature_extraction")

from equipped import QKV, fill  # noqa: E402
from families import FAMILIES, images  # noqa: E402
from timm.models import _features_fx as timm_extraction  # noqa: E402
from timm.utils import AttentionExtract  # noqa: E402

from irpe.equip import equip  # noqa: E402

CREATE = {"timm": timm_extraction.create_feature_extractor, "torchvision": extraction.create_feature_extractor}


def keep(seen, name, module, args, out):
    seen[name] = out


def extract(create, model, block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nodes that training and evaluation do not share
        return CREATE[create](model, [block, f"{block}.attn"])


TRACED = [("timm", family) for family in FAMILIES]
TRACED += [("torchvision", family) for family in ("vit", "dynamic", "eva02", "grouped queries", "beit", "swin")]


@pytest.mark.parametrize(("create", "family"), TRACED)
def test_features_of_a_block_and_its_attention(create, family):
    """Wherever there are some of the plain model: of most dynamic ones torchvision has none, and of Swin's none."""
    model = fill(equip(FAMILIES[family].build(), QKV))
    block = [name for name, one in model.named_modules() if hasattr(one, "attn")][-1]
    try:
        extractor = extract(create, model, block)
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        assert FAMILIES[family].dynamic or family == "swin dynamic"
        with pytest.raises((fx.proxy.TraceError, TypeError, RuntimeError)):
            extract(create, FAMILIES[family].build(), block)
        return
    for size, _ in FAMILIES[family].sizes:
        seen = {}
        handles = [
            model.get_submodule(name).register_forward_hook(partial(keep, seen, name))
            for name in (block, f"{block}.attn")
        ]
        x = images(*size)
        model(x)
        for handle in handles:
            handle.remove()
        got = extractor(x)
        assert all(torch.equal(got[name], seen[name]) for name in seen) and len(seen) == 2


def unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_by_name(family):
    """timm's AttentionExtract on nodes, by its own names: wherever there are some of the plain model."""
    plain, image = FAMILIES[family].build(), images(*FAMILIES[family].sizes[0][0])
    model = equip(copy.deepcopy(plain), QKV)
    try:
        expected = AttentionExtract(unfused(plain), method="fx")(image)
    except (fx.proxy.TraceError, TypeError) as error:
        assert family in ("deit distilled dynamic", "swin dynamic")
        with pytest.raises(type(error)):
            AttentionExtract(unfused(model), method="fx")
        pytest.skip("the plain model cannot be traced")
    extractor = AttentionExtract(unfused(model), method="fx")
    got = extractor(image)
    assert got.keys() == expected.keys() and len(got) >= 2
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
    drops = [f"{name.rpartition('.')[0]}.attn_drop" for name in got]
    hooked = AttentionExtract(fill(model), names=drops, method="hook")
    extractor = AttentionExtract(model, method="fx")
    for size, _ in FAMILIES[family].sizes:
        x = images(*size)
        assert all(map(torch.equal, extractor(x).values(), hooked(x).values()))
    got = extractor(image)
    assert all((got[name] - expected[name]).abs().max() > 1e-6 for name in got)


def test_training_and_gradients():
    model = fill(equip(FAMILIES["vit"].build(), QKV)).train()
    traced = CREATE["timm"](model, ["head"])
    x = images(8, 12)
    grads = []
    for one in (lambda x: traced(x)["head"], model):
        model.zero_grad()
        one(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], value) for name, value in grads[1].items())
    assert grads[0]["blocks.0.attn.rpe_k.lookup_table_weight"].any()


@pytest.mark.parametrize("named", [False, True])
def test_symbolic_trace(named):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = RPEMultiheadAttention(24, 3, batch_first=True, rpe_config="rpe-1.9-product-ctx-0-qkv")

        def forward(self, x):
            if named:
                out, weights = self.attention(query=x, key=x, value=x, hw=(2, 3))
            else:
                out, weights = self.attention(x, x, x, hw=(2, 3))
            return x + out, weights

    model, x = fill(Block()), torch.randn(2, 6, 24)
    traced = copy.deepcopy(fx.symbolic_trace(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    for got, expected in zip(traced(x), model(x), strict=True):
        assert torch.equal(got, expected)
