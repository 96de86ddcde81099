"""Equipped vision transformers of timm: outputs, gradients, checkpointing, threads, compile, export, copies."""

import threading

import families
import pytest
import torch
from equipped import QKV, assert_same, fill, gradients, spread, tables_of
from families import FAMILIES, SHARED, SMALL, images
from family_matrix import Matrix
from methods import METHODS
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import get_rpe_config
from irpe.equip import equip, unequip

timm = pytest.importorskip("timm")

from timm.layers import Attention, set_reentrant_ckpt  # noqa: E402
from timm.models._builder import build_model_with_cfg  # noqa: E402
from timm.models._manipulate import checkpoint_seq  # noqa: E402
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer  # noqa: E402

from irpe.integrations.on_map import blocks_on_map  # noqa: E402


def make(family="dynamic", config=QKV, *, tables=True, dtype=torch.float64, **options):
    """An equipped tiny model in evaluation mode, its tables random; plain if `tables` is false."""
    return families.make(family, config, dtype=dtype, **options) if tables else FAMILIES[family].build(dtype, **options)


def attention_by_hand(attn, x, height, width, mask=None):
    """timm's formula with the terms of the paper, written out again."""
    batch, tokens, _ = x.shape
    q, k, v = attn.qkv(x).view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q) * q.shape[-1] ** -0.5, attn.k_norm(k)
    scores = q @ k.transpose(2, 3)
    scores = scores + attn.rpe_k(q, height=height, width=width)
    scores = scores + attn.rpe_q(k * q.shape[-1] ** -0.5, height=height, width=width).transpose(2, 3)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    out = weights @ v + attn.rpe_v(weights, height=height, width=width)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    return attn.proj(out if attn.gate is None else out * attn.gate(x).sigmoid())


def by_hand(model, image, height, width, mask=None):
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    for block in model.blocks:
        if isinstance(block, ResPostBlock):
            x = x + block.norm1(attention_by_hand(block.attn, x, height, width, mask))
            x = x + block.norm2(block.mlp(x))
        else:
            x = x + block.ls1(attention_by_hand(block.attn, block.norm1(x), height, width, mask))
            x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


class TestViT(Matrix):
    adapter = "timm_vit"
    compiled = ("registers dynamic", "deit3", "deit distilled")
    registered = ("vit_tiny_patch16_224", dict(img_size=(32, 48), embed_dim=24, depth=2, num_heads=3))
    by_hand = staticmethod(by_hand)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_zero_tables_in_float32_stay_within_the_gap_between_sdpa_backends(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(56, 84), patch_size=14, depth=6, num_classes=10).eval()
    image = images(56, 84, dtype=torch.float32)
    backend = torch.nn.attention.SDPBackend
    with torch.no_grad():
        outputs = []
        for one in (backend.MATH, backend.FLASH_ATTENTION):
            with torch.nn.attention.sdpa_kernel(one):
                outputs.append(model(image))
        gap = (outputs[0] - outputs[1]).abs().max()
        before = model(image)
        assert gap > 0
        assert (equip(model, QKV)(image) - before).abs().max() <= 2 * gap


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mode", "shared", "on"), [("ctx", False, "qkv"), ("ctx", True, "v"), ("bias", False, "qk")])
def test_every_encoding_reaches_every_head(method, mode, shared, on):
    model = make(config=get_rpe_config(1.9, method, mode, shared, 0, on))
    image = images(8, 32)
    got = gradients(model, spread(model.forward_features(image)))
    assert len(tables_of(model)) == 2 * len(on) * (2 if method == "cross" else 1)
    for name, table in tables_of(model).items():
        assert table.shape[0] == (1 if shared else 3)
        assert got[name].flatten(1).abs().amax(1).min() > 1e-9, name


def test_gated_attention():
    class Gated(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, gated=True, **kwargs)

    model = VisionTransformer(**SMALL, attn_layer=Gated)
    for block in model.blocks:  # timm has no model argument for it
        block.attn.__class__ = Attention
    model = fill(equip(model.double().eval(), QKV))
    assert all(block.attn.gate is not None for block in model.blocks)
    assert (model(images(8, 12)) - by_hand(model, images(8, 12), 2, 3)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["float", "bool", "causal", "causal beside a mask"])
def test_masks(kind):
    model = make()
    image, tokens = images(8, 32), 1 + 2 * 8
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    keep = (torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)) < 0.7) | torch.eye(tokens).bool()
    added = torch.randn(tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments, mask = {
        "float": (dict(attn_mask=added), added),
        "bool": (dict(attn_mask=keep), torch.zeros_like(added).masked_fill(~keep, -torch.inf)),
        "causal": (dict(is_causal=True), torch.zeros_like(added).masked_fill(~causal, -torch.inf)),
        "causal beside a mask": (
            dict(is_causal=True, attn_mask=added),
            torch.zeros_like(added).masked_fill(~causal, -torch.inf),
        ),
    }[kind]
    expected = by_hand(model, image, 2, 8, mask)
    assert (model(image, **arguments) - expected).abs().max() <= 1e-12
    features, _ = model.forward_intermediates(image, **arguments)
    assert (model.forward_head(features) - expected).abs().max() <= 1e-12
    assert (model(image) - expected).abs().max() > 1e-6


def test_attention_dropout_in_training_only():
    model = make(attn_drop_rate=0.5)
    image = images(8, 32)
    assert torch.equal(model(image), model(image))
    model.train()
    assert (model(image) - model(image)).abs().max() > 1e-6
    torch.manual_seed(3)
    first = model(image)
    torch.manual_seed(3)
    assert torch.equal(model(image), first)
    certain = make(attn_drop_rate=1.0).train()  # every weight dropped, so nothing of the image reaches the class token
    assert torch.equal(certain(image), certain(images(8, 32).flip(0)))


def test_masks_of_a_wrong_size_and_images_of_a_wrong_size_are_errors():
    with pytest.raises(Exception, match="match"):
        make("vit")(images(12, 8))
    with pytest.raises((RuntimeError, ValueError), match="size|broadcast"):
        make()(images(8, 32), attn_mask=torch.zeros(3, 3, dtype=torch.float64))


def test_blocks_by_hand_need_the_map_and_can_have_it():
    model = make()
    image = images(8, 32)
    model(image)
    tokens = model._pos_embed(model.patch_embed(image))
    with pytest.raises(RuntimeError, match="blocks_on_map"):
        model.blocks(tokens)
    blocks = blocks_on_map(model, 2, 8)
    x = tokens
    for block in blocks:
        x = block(x)
    assert torch.equal(model.norm(x), model.forward_features(image))
    assert torch.equal(model.norm(blocks(tokens)), model.forward_features(image))
    with pytest.raises(ValueError, match=r"height=3.*17|17.*height=3"):
        blocks_on_map(model, 3, 8)(tokens)


def test_two_models_take_turns_inside_each_other():
    inner, outer = make(), make("registers", dynamic_img_size=True)
    wide, square = images(8, 32), images(16, 16)
    expected = inner(wide), outer(square)
    seen = []
    outer.blocks[0].register_forward_pre_hook(lambda *_: seen.append(inner(wide)))
    assert torch.equal(outer(square), expected[1])
    assert torch.equal(seen[0], expected[0])


def test_threads_with_different_grids_do_not_disturb_each_other():
    model = make()
    sizes = [(8, 32), (16, 16), (32, 8)]  # 16 tokens each
    expected = {size: model(images(*size)).detach() for size in sizes}
    barrier, wrong = threading.Barrier(len(sizes)), []

    def work(size):
        image = images(*size)
        for _ in range(30):
            barrier.wait()
            if not torch.equal(model(image).detach(), expected[size]):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


def features_of(model, image):
    return model.forward_head(model.forward_intermediates(image)[0])


def whole(model, image):
    return checkpoint(model, image, use_reentrant=False)


def whole_reentrant(model, image):
    return checkpoint(model, image.clone().requires_grad_(), use_reentrant=True)


def offloaded(model, image):
    with torch.autograd.graph.save_on_cpu():
        return model(image)


def every_two(model, image):
    x = model._pos_embed(model.patch_embed(image))
    blocks = blocks_on_map(model, image.shape[-2] // 4, image.shape[-1] // 4)
    return model.forward_head(model.norm(checkpoint_seq(blocks, x, every=2)))


@pytest.mark.parametrize(
    ("thread", "frozen"), [(False, False), (True, True)], ids=["same thread", "other thread, frozen"]
)
@pytest.mark.parametrize(
    ("forward", "inside", "reentrant"),
    [
        (VisionTransformer.__call__, True, False),
        (features_of, True, False),
        (every_two, False, False),
        (whole, False, False),
        (whole, True, False),
        (offloaded, True, False),
        (VisionTransformer.__call__, True, True),
        (features_of, True, True),
        (whole_reentrant, False, False),
    ],
    ids=[
        *("checkpoint_seq", "intermediates", "every two", "whole", "nested", "offloaded"),
        *("reentrant", "reentrant intermediates", "reentrant whole"),
    ],
)
def test_checkpointing_repeats_each_pass_on_its_own_map(forward, inside, reentrant, thread, frozen):
    model = make().train()
    if frozen:
        for name, one in model.named_parameters():
            one.requires_grad_("lookup_table" in name)
    if frozen and reentrant:  # torch's own rule: without a gradient at its input the part has none
        model.patch_embed.requires_grad_(True)

    def loss(forward):
        return sum(n * forward(model, images(*size)).square().sum() for n, size in enumerate(SHARED, 1))

    expected = gradients(model, loss(VisionTransformer.__call__))
    model.set_grad_checkpointing(inside)
    model.zero_grad()
    set_reentrant_ckpt(reentrant)
    try:
        total = loss(forward)
    finally:
        set_reentrant_ckpt(False)
    model(images(8, 12))  # a later pass on another map
    if thread:  # as the backward of a GPU has it
        worker = threading.Thread(target=total.backward)
        worker.start()
        worker.join()
    else:
        total.backward()
    assert_same({name: one.grad for name, one in model.named_parameters() if one.grad is not None}, expected)


def test_second_backward_through_checkpointing():
    model = make()

    def second():
        image = images(8, 32).requires_grad_()
        (first,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        model(images(16, 16))
        return gradients(model, first.square().sum())

    expected = second()
    model.set_grad_checkpointing()
    assert_same(second(), expected)


def test_set_input_size_and_reset_classifier():
    model = make("vit")
    model.set_input_size((16, 8))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 4, 2)).abs().max() <= 1e-12
    model.set_input_size(patch_size=(2, 4))
    assert (model(images(16, 8)) - by_hand(model, images(16, 8), 8, 2)).abs().max() <= 1e-12
    model.reset_classifier(7)
    assert model(images(16, 8)).shape == (2, 7)
    distilled = make("deit distilled")
    distilled.reset_classifier(3)
    distilled.set_distilled_training()
    assert [one.shape for one in distilled.train()(images(8, 12))] == [(2, 3), (2, 3)]


def build(config=QKV, **kwargs):
    model = build_model_with_cfg(
        lambda **kw: fill(equip(VisionTransformer(**kw), config)) if config else VisionTransformer(**kw),
        "vit_tiny_patch16_224",
        False,
        **{**SMALL, "dynamic_img_size": True, **kwargs},
    )
    return model.double().eval()


def test_build_model_with_cfg():
    torch.manual_seed(0)
    model = build(img_size=(16, 8), num_classes=9)
    assert (model(images(8, 32)) - by_hand(model, images(8, 32), 2, 8)).abs().max() <= 1e-12
    assert model(images(8, 32)).shape == (2, 9)
    assert model.default_cfg["architecture"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize("after", [False, True], ids=["equipped first", "wrapper equipped"])
def test_features_only(after):
    torch.manual_seed(0)
    wrapper = build(None if after else QKV, features_only=True, out_indices=(0,), feature_cls="getter")
    if after:
        assert fill(equip(wrapper, QKV)) is wrapper
    image = images(8, 32)
    (got,) = wrapper(image)
    vit = wrapper.model
    assert len(vit.blocks) == 1  # pruned
    x = vit._pos_embed(vit.patch_embed(image))
    x = x + attention_by_hand(vit.blocks[0].attn, vit.blocks[0].norm1(x), 2, 8)
    x = x + vit.blocks[0].mlp(vit.blocks[0].norm2(x))
    assert (got - x[:, 1:].mT.reshape(2, 24, 2, 8)).abs().max() <= 1e-12
    vit.set_grad_checkpointing()
    assert torch.equal(wrapper(image)[0], got)
    assert not tables_of(unequip(wrapper))


def test_intermediate_layers():
    model = make("registers", dynamic_img_size=True)
    image = images(8, 32)
    final, (first, second) = model.forward_intermediates(image)
    assert torch.equal(final, model.forward_features(image))
    assert torch.equal(model.norm(second.flatten(2).mT), final[:, 5:])
    (stopped,) = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped, first)
    assert torch.equal(model.get_intermediate_layers(image, n=2, reshape=True)[0], first)


def test_meta_device_then_materialised():
    with torch.device("meta"):
        model = equip(VisionTransformer(**SMALL, dynamic_img_size=True), QKV)
    assert all(one.is_meta for one in model.parameters())
    assert model(torch.empty(2, 3, 8, 32, device="meta")).shape == (2, 5)
    model.to_empty(device="cpu")
    for table in tables_of(model).values():
        nn.init.constant_(table, torch.nan)
    model.init_weights()
    assert all(torch.equal(one, torch.zeros_like(one)) for one in tables_of(model).values())
    assert model(images(8, 32, dtype=torch.float32)).isfinite().all()


def test_timms_initialisation_leaves_the_tables_zero():
    for mode in ("", "jax", "moco", "reset"):
        model = equip(VisionTransformer(**SMALL), QKV)
        model.init_weights(mode)
        assert all(not one.any() for one in tables_of(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    exact = make()
    model = make(dtype=dtype)
    assert all(one.dtype == dtype for one in tables_of(model).values())
    equipped_after = equip(make(tables=False, dtype=dtype), QKV)
    assert all(one.dtype == dtype for one in tables_of(equipped_after).values())
    got = model(images(8, 32, dtype=dtype))
    exact.load_state_dict(model.state_dict())
    error = (got.double() - exact(images(8, 32, dtype=dtype).double())).abs().max()
    assert error <= 40 * torch.finfo(dtype).eps
    got.float().sum().backward()
    assert all(one.grad.isfinite().all() for one in tables_of(model).values())


def test_autocast():
    model = make(dtype=torch.float32)
    image = images(8, 32, dtype=torch.float32)
    exact = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(image)
        got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 40 * torch.finfo(torch.bfloat16).eps
    assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in tables_of(model).values())


def test_the_tables_follow_the_model_into_training_and_back():
    model = make(tables=False)
    equip(model, QKV)
    assert not any(one.training for one in model.modules())
    assert all(one.training for one in model.train().modules())


def test_inference_mode_then_training():
    model = make()
    with torch.inference_mode():
        expected = model(images(12, 28))
    got = model(images(12, 28))
    got.sum().backward()
    assert torch.equal(got, expected)


def test_functional_call_and_per_sample_gradients():
    model = make()
    image, weights = images(8, 32), dict(model.named_parameters())

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, image)
    for n in range(2):
        expected = gradients(model, model(image[n : n + 1]).square().sum())
        assert_same({name: got[name][n] for name in expected}, expected)


# tracing is what can fail, so most of what follows compiles with aot_eager
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "inside"),
    [(VisionTransformer.__call__, True), (VisionTransformer.__call__, False), (features_of, True)],
    ids=["checkpointed", "plain", "intermediates"],
)
def test_compile_fullgraph_with_image_sizes_in_turns(forward, inside):
    model = make().train()

    def loss(forward):
        return sum(n * forward(model, images(*size)).square().sum() for n, size in enumerate([*SHARED, (8, 32)], 1))

    expected = gradients(model, loss(forward))
    model.set_grad_checkpointing(inside)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, loss(compiled)), expected, 1e-10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inside", [False, True], ids=["plain", "checkpointed"])
def test_compiled_blocks(inside):
    model = make().train()

    def loss():
        return sum(n * model(images(*size)).square().sum() for n, size in enumerate(SHARED, 1))

    expected = gradients(model, loss())
    for block in model.blocks:  # dynamic shapes would make checkpoint compare two different graphs, and refuse
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    model.set_grad_checkpointing(inside)
    assert_same(gradients(model, loss()), expected, 1e-10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("family", ["deit distilled", "dynamic"])
def test_export_with_dynamic_batch(family, strict):
    model = make(family)
    image = images(8, 12)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=strict)
    for n in (2, 5):
        assert (program.module()(images(8, 12, batch=n)) - model(images(8, 12, batch=n))).abs().max() <= 1e-12
    assert set(program.state_dict) == set(model.state_dict())
    model(image).sum().backward()  # tracing left nothing behind


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_with_dynamic_height_and_width():
    model = make()
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    with torch.no_grad():
        program = torch.export.export(
            model, (images(12, 20),), dynamic_shapes=({2: 4 * height, 3: 4 * width},), strict=False
        )
    for size in ((8, 32), (32, 8), (20, 12)):
        assert (program.module()(images(*size)) - model(images(*size))).abs().max() <= 1e-12


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", ["rpe-1.9-product-ctx-1-k", QKV], ids=["k", "qkv"])
def test_jit_trace(config):
    """Its own check records a second graph, without gradients, and wants the same one."""
    model = make("deit distilled", config)
    traced = torch.jit.trace(model, images(8, 12, batch=2))
    for n in (2, 5):
        assert (traced(images(8, 12, batch=n)) - model(images(8, 12, batch=n))).abs().max() <= 1e-12


def test_hooks_of_others_stay():
    model = make(tables=False)
    calls = []
    model.blocks[0].register_forward_hook(lambda module, args, output: calls.append(output.shape))
    model.patch_embed.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    equip(model, QKV)
    model(images(8, 32))
    unequip(model)(images(8, 32))
    assert calls == [(2, 3, 8, 32), (2, 17, 24)] * 2


def test_blocks_are_timms_own():
    assert all(type(block) is Block for block in make().blocks)
