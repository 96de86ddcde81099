"""torch's older exporter of ONNX (dynamo=False): files compute what the model does, also at sizes that stay open."""

import io

import pytest
import torch
from torch import nn

from irpe import build_rpe, equip, get_rpe_config, rpe_attention
from rpe_ops.rpe_index import rpe_bucket_sum

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
OPEN = {0: "batch", 2: "height", 3: "width"}


class Attention(nn.Module):
    """(B, H * D, h, w) -> (B, H, h * w, D), by the five steps or by rpe_attention."""

    def __init__(self, fused, named=True, **config):
        super().__init__()
        self.fused, self.named = fused, named
        self.rpe = nn.ModuleList(one for one in build_rpe(get_rpe_config(**config), 8, 2) if one is not None)
        self.on = [letter for letter in "qkv" if letter in config["rpe_on"]]
        for table in self.parameters():
            nn.init.normal_(table)

    def forward(self, x):
        size = dict(height=x.shape[2], width=x.shape[3]) if self.named else {}
        q = x.reshape(x.shape[0], 2, 8, -1).transpose(2, 3)
        rpe = dict(zip(self.on, self.rpe, strict=True))
        if self.fused:
            return rpe_attention(q, q, q, *map(rpe.get, "qkv"), **size)
        scores = q @ q.transpose(2, 3)
        scores = scores + rpe["k"](q, **size) if "k" in rpe else scores
        scores = scores + rpe["q"](q, **size).transpose(2, 3) if "q" in rpe else scores
        weights = scores.softmax(-1)
        return weights @ q + rpe["v"](weights, **size) if "v" in rpe else weights @ q


def exported(model, x, opset, dynamic_axes=None):
    file = io.BytesIO()
    torch.onnx.export(
        model.eval(), (x,), file, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": dynamic_axes} if dynamic_axes else None,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(x):
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    run.bytes = len(file.getvalue())
    return run


def assert_same(run, model, *inputs):
    for x in inputs:
        with torch.no_grad():
            expected = model(x)
        # float32 of another library: relative to the largest output
        assert (run(x) - expected).abs().max() <= 1e-5 * expected.abs().max(), tuple(x.shape)


@pytest.mark.parametrize("opset", [13, 15, 16])
@pytest.mark.parametrize("fused", [False, True])
def test_values_are_summed_before_and_after_opset_16(opset, fused):
    torch.manual_seed(0)
    model, x = Attention(fused, rpe_on="v"), torch.randn(2, 16, 4, 5)
    assert_same(exported(model, x, opset), model, x)


@pytest.mark.parametrize("method", ["product", "cross", "euc", "quant"])
@pytest.mark.parametrize("fused", [False, True])
def test_open_sizes(method, fused):
    torch.manual_seed(0)
    # gamma is 4, so that offsets lie beyond it: in its bucket are those of sizes that the export has not seen
    model, x = Attention(fused, method=method, ratio=0.5, rpe_on="qkv"), torch.randn(2, 16, 4, 5)
    run = exported(model, x, 15, OPEN)
    # the first two have as many tokens as the example: one map for all would be taken without a word
    others = [torch.randn(*size) for size in ((3, 16, 5, 4), (1, 16, 2, 10), (2, 16, 9, 3), (1, 16, 1, 1))]
    assert_same(run, model, x, *others)


def test_maps_of_squared_distances_end_where_their_buckets_do():
    """quant reaches gamma = 160 at a distance of 13: offsets of 2 * 15 + 1 rows and columns, not of 2 * 162 + 1."""
    torch.manual_seed(0)
    model, x = Attention(False, method="quant", ratio=20, rpe_on="k"), torch.randn(1, 16, 4, 5)
    run = exported(model, x, 15, OPEN)
    assert_same(run, model, x, torch.randn(1, 16, 17, 15), torch.randn(1, 16, 2, 40))
    tables = sum(table.numel() * table.element_size() for table in model.parameters())
    assert run.bytes - tables < 40_000


@pytest.mark.parametrize("mode", ["ctx", "bias"])
def test_open_squares_whose_size_nobody_names(mode):
    torch.manual_seed(0)
    model, x = Attention(False, named=False, mode=mode, rpe_on="qk"), torch.randn(1, 16, 4, 4)
    assert_same(exported(model, x, 13, OPEN), model, x, torch.randn(2, 16, 7, 7))


def test_skip_tokens_at_open_sizes():
    class WithClass(Attention):
        def forward(self, x):
            q = x.reshape(x.shape[0], 2, 8, -1).transpose(2, 3)
            q = torch.cat([q[:, :, :1], q], 2)
            return self.rpe[0](q, height=x.shape[2], width=x.shape[3])

    torch.manual_seed(0)
    model, x = WithClass(False, skip=1, rpe_on="k"), torch.randn(1, 16, 4, 5)
    assert_same(exported(model, x, 15, OPEN), model, x, torch.randn(2, 16, 5, 4), torch.randn(2, 16, 2, 7))


@pytest.mark.parametrize("ndim", [1, 3])
def test_open_sizes_of_other_numbers_of_axes(ndim):
    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            _, self.rpe, _ = build_rpe(get_rpe_config(0.5, "cross" if ndim == 3 else "product", ndim=ndim), 8, 2)

        def forward(self, x):  # (B, 16, *size)
            return self.rpe(x.reshape(x.shape[0], 2, 8, -1).transpose(2, 3), size=x.shape[2:])

    torch.manual_seed(0)
    model, x, other = Encoding(), torch.randn(1, 16, *(7, 3, 2)[:ndim]), torch.randn(2, 16, *(9, 2, 5)[:ndim])
    for table in model.parameters():
        nn.init.normal_(table)
    assert_same(exported(model, x, 15, {n: f"axis{n}" for n in (0, *range(2, 2 + ndim))}), model, x, other)


def test_a_number_of_samples_that_the_exporter_takes_for_a_constant():
    class Unflattened(Attention):
        def forward(self, x):  # the exporter believes that what comes out of unflatten has the size of the example
            q = x.flatten(2).unflatten(1, (2, 8)).transpose(2, 3)
            return rpe_attention(q, q, q, None, *self.rpe, height=x.shape[2], width=x.shape[3])

    torch.manual_seed(0)
    model, x = Unflattened(True, rpe_on="kv"), torch.randn(1, 16, 4, 5)
    assert_same(exported(model, x, 15, {0: "batch"}), model, x, torch.randn(3, 16, 4, 5))


def test_bucket_sums_of_the_operators():
    class Sums(nn.Module):
        def forward(self, x):
            return rpe_bucket_sum(x, ids, 4)

    torch.manual_seed(0)
    ids, x = torch.randint(0, 4, (3, 5)), torch.randn(2, 2, 3, 5)
    assert_same(exported(Sums(), x, 15), Sums(), x)


FAMILIES = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=(32, 48), depth=1)),
    "vit without positions": ("vit_tiny_patch16_224", dict(img_size=(32, 48), depth=1, pos_embed="none")),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=(32, 48), window_size=(2, 3), depths=(2, 1), num_heads=(2, 2), embed_dim=16),
    ),
    "beit": ("beit_base_patch16_224", dict(img_size=(32, 48), depth=1, embed_dim=32, num_heads=2)),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=(28, 42), depth=1, embed_dim=32, num_heads=2)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_equipped_models_with_open_sizes(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    architecture, options = FAMILIES[name]
    every_size = name == "vit without positions"  # timm's own positions are those of the example in every export
    if every_size:
        options = options | dict(dynamic_img_size=True)
    model = equip(timm.create_model(architecture, num_classes=5, **options), "rpe-1.9-product-ctx-1-qkv")
    for parameter_name, table in model.named_parameters():
        if "lookup_table" in parameter_name:
            nn.init.normal_(table)
    height, width = options["img_size"]
    run = exported(model, torch.randn(1, 3, height, width), 15, OPEN if every_size else {0: "batch"})
    others = [torch.randn(3, 3, height, width)]
    if every_size:
        others += [torch.randn(1, 3, width, height), torch.randn(2, 3, 64, 32)]
    assert_same(run, model, *others)
