"""The matrix of tests (family x feature) of equipped models; a test file of each adapter runs it on its families."""

import copy
import threading
from typing import ClassVar

import pytest
import timm
import torch
from equipped import QKV, Equipped, assert_same, fill, gradients, spread, tables_of
from families import FAMILIES, SHARED, attention_names, images, make, of
from timm.utils import AttentionExtract
from torch import nn
from torch.utils.checkpoint import checkpoint

from irpe import get_rpe_config, rpe_attention
from irpe.equip import equip, rpe_parameters, unequip
from irpe.integrations import blocks
from rpe_ops import _native


def snapshot(model):
    """Everything that unequip has to give back, but for values of parameters."""
    return [
        (name, type(one), one.training, sorted(vars(one)), list(one._parameters), list(one._modules),
         *(len(hooks) for key, hooks in sorted(vars(one).items()) if "hooks" in key and hooks is not None))
        for name, one in model.named_modules()
    ]  # fmt: skip


def image_of(family, **options):
    return images(*FAMILIES[family].sizes[0][0], **options)


class Matrix(Equipped):
    """Subclasses name their adapter, the families that are compiled and exported, and give the formula by hand."""

    adapter: str
    compiled: tuple
    smaller: ClassVar[dict] = {}  # arguments that leave less for inductor, which takes minutes
    registered: tuple  # a name in timm's registry, and arguments that make it tiny

    @staticmethod
    def by_hand(model, image, height, width):
        raise NotImplementedError

    @classmethod
    def families(cls):
        return of(cls.adapter)

    @staticmethod
    def build(family):
        return FAMILIES[family].build()

    @staticmethod
    def run(model, family):
        return model(image_of(family))

    snapshot = staticmethod(snapshot)

    @classmethod
    def pytest_generate_tests(cls, metafunc):
        super().pytest_generate_tests(metafunc)
        if "dynamic_family" in metafunc.fixturenames:
            metafunc.parametrize("dynamic_family", [name for name, one in of(cls.adapter).items() if one.dynamic])
        if "compiled_family" in metafunc.fixturenames:
            first, *rest = cls.compiled
            metafunc.parametrize(
                "compiled_family", [first, *(pytest.param(one, marks=pytest.mark.slow) for one in rest)]
            )

    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
    def test_zero_tables_change_nothing(self, family, fused):
        model = FAMILIES[family].build()
        for name in attention_names(model):
            model.get_submodule(name).fused_attn = fused
        for size, _ in FAMILIES[family].sizes:
            before, weights = model(images(*size)), copy.deepcopy(model.state_dict())
            assert equip(model, QKV) is model
            assert (model(images(*size)) - before).abs().max() <= 1e-12
            added = model.state_dict().keys() - weights.keys()
            assert added == {f"{one}.rpe_{x}.lookup_table_weight" for one in attention_names(model) for x in "qkv"}
            assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
            prefix = getattr(model, "num_prefix_tokens", 0)
            assert {model.get_submodule(one).rpe_k.rpe_config.skip for one in attention_names(model)} == {prefix}
            unequip(model)

    def test_zero_tables_in_float32_stay_within_the_gap_between_timms_formulas(self, family):
        model = FAMILIES[family].build(torch.float32)
        image = image_of(family, dtype=torch.float32, batch=16)
        outputs = []
        with torch.no_grad():
            for fused in (True, False):
                for name in attention_names(model):
                    model.get_submodule(name).fused_attn = fused
                outputs.append(model(image))
            gap = (outputs[0] - outputs[1]).abs().max()
            assert gap > 0
            equip(model, QKV)
            assert min((model(image) - before).abs().max() for before in outputs) <= 2 * gap

    def test_outputs_and_gradients_are_those_of_the_formula(self, family):
        model = make(family)
        for size, (height, width) in FAMILIES[family].sizes:
            image = images(*size)
            expected = self.by_hand(model, image, height, width)
            assert (model(image) - expected).abs().max() <= 1e-12
            with torch.no_grad():
                assert (model(image) - expected).abs().max() <= 1e-12
            assert (unequip(copy.deepcopy(model))(image) - expected).abs().max() > 1e-6  # the tables do something
            got = gradients(model, model(image).square().sum())
            assert_same(got, gradients(model, self.by_hand(model, image, height, width).square().sum()), 1e-11)
            got = gradients(model, spread(model.forward_features(image)))
            assert all(got[name].abs().max() > 1e-9 for name in tables_of(model))

    @pytest.mark.skipif("cpu" not in _native.LOADED, reason="the operators are not built")
    def test_the_fused_backend_takes_every_call_but_those_that_train_a_bias(self, family, monkeypatch):
        model, image = make(family), image_of(family)
        expected = model(image)
        calls = []

        def fused(*args, **options):
            calls.append(options["attn_mask"])
            return rpe_attention(*args, **options, backend="cpu")

        monkeypatch.setattr(blocks, "rpe_attention", fused)
        with torch.no_grad():
            assert (model(image) - expected).abs().max() <= 1e-12
        assert len(calls) == len(attention_names(model))
        for name, one in model.named_parameters():
            one.requires_grad_("relative_position_bias_table" not in name)
        calls.clear()
        assert (model(image) - expected).abs().max() <= 1e-12
        assert len(calls) == len(attention_names(model))
        if any("relative_position_bias_table" in name for name, _ in model.named_parameters()):
            with pytest.raises(ValueError, match="has no gradient of attn_mask"):
                model.requires_grad_()(image)

    @pytest.mark.parametrize("config", [(20, "cross", "bias", False, 0, "qk"), (33, "quant", "ctx", False, 0, "qkv")])
    def test_every_table_of_every_head_gets_a_gradient(self, family, config):
        model = make(family, get_rpe_config(*config))
        got = gradients(model, spread(model.forward_features(image_of(family))))
        for name in tables_of(model):
            assert got[name].flatten(1).abs().amax(1).min() > 1e-9, name

    @pytest.mark.parametrize(
        ("inside", "outside", "thread"),
        [
            (True, None, False),
            (True, None, True),
            (False, "new", False),
            (True, "new", True),
            (False, "reentrant", True),
        ],
        ids=["blocks", "blocks, other thread", "whole", "nested, other thread", "reentrant whole, other thread"],
    )
    def test_checkpointing_repeats_each_pass_on_its_own_map(self, dynamic_family, inside, outside, thread):
        model = make(dynamic_family).train()

        def loss(forward):
            return sum(n * forward(images(*size)).square().sum() for n, size in enumerate(SHARED, 1))

        def checkpointed(image):
            if not outside:
                return model(image)
            return checkpoint(model, image.requires_grad_(), use_reentrant=outside == "reentrant")

        expected = gradients(model, loss(model))
        model.set_grad_checkpointing(inside)
        model.zero_grad()
        total = loss(checkpointed)
        model(image_of(dynamic_family))  # a later pass on another map
        if thread:  # as the backward of a GPU has it
            worker = threading.Thread(target=total.backward)
            worker.start()
            worker.join()
        else:
            total.backward()
        assert_same({name: one.grad for name, one in model.named_parameters() if one.grad is not None}, expected)

    def test_some_blocks_then_others(self, family):
        model, image = FAMILIES[family].build(), image_of(family)
        before, state = model(image), snapshot(model)
        names = attention_names(model)
        equip(model, "rpe-1.9-product-ctx-1-k", blocks=[1])
        assert tables_of(model).keys() == {f"{names[1]}.rpe_k.lookup_table_weight"}
        assert (model(image) - before).abs().max() <= 1e-12
        features = model.forward_features(image)
        first = fill(model)(image)
        assert (model.forward_features(image) - features).abs().max() > 1e-9
        with pytest.raises(ValueError, match="has iRPE already"):
            equip(model, "rpe-1.9-product-ctx-1-k")
        equip(model, "rpe-20-cross-bias-0-q", blocks=lambda number, name: number != 1)
        assert len(rpe_parameters(model)["params"]) == 1 + 2 * (len(names) - 1)
        assert (model(image) - first).abs().max() <= 1e-12
        got = gradients(model, spread(fill(model).forward_features(image)))
        assert all(got[name].abs().max() > 1e-9 for name in tables_of(model))
        assert snapshot(unequip(model)) == state
        assert (model(image) - before).abs().max() <= 1e-12

    def test_autocast(self, family):
        model, image = make(family, dtype=torch.float32), image_of(family, dtype=torch.float32)
        plain = unequip(copy.deepcopy(model))
        gap = 0.0
        for one in (plain, model):  # as close to float32 as timm's own model is, whose scores are smaller
            exact = one(image)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = one(image)
                got.float().square().sum().backward()
                with torch.no_grad():
                    fused = one(image)
            error = max((got - exact).abs().max().item(), (fused - exact).abs().max().item())
            assert error <= 5 * gap if one is model else error > 0
            gap = max(gap, error)
        tables = tables_of(model).values()
        assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in tables)

    def test_bfloat16(self, family):
        model = make(family, dtype=torch.bfloat16)
        assert all(one.dtype == torch.bfloat16 for one in tables_of(model).values())
        got = model(image_of(family, dtype=torch.bfloat16))
        got.float().square().sum().backward()
        assert all(one.grad.isfinite().all() for one in tables_of(model).values())

    def test_attention_dropout_in_training_only(self, family):
        model, image = make(family, attn_drop_rate=0.5), image_of(family)
        assert torch.equal(model(image), model(image))
        model.train()
        assert (model(image) - model(image)).abs().max() > 1e-6
        torch.manual_seed(3)
        first = model(image)
        torch.manual_seed(3)
        assert torch.equal(model(image), first)

    @pytest.mark.parametrize("hook_type", ["forward", "forward_pre"])
    def test_attention_maps(self, family, hook_type):
        """timm's AttentionExtract on modules, where fused_attn=False lets the weights pass through attn_drop."""

        def maps(model):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
            found = AttentionExtract(model, method="hook", hook_type=hook_type)(image)
            return found, model(image)

        plain, image = FAMILIES[family].build().eval(), image_of(family)
        model = equip(copy.deepcopy(plain), QKV).eval()
        without, _ = maps(plain)
        got, _ = maps(model)
        assert got.keys() == without.keys() and len(got) >= 1
        for name in got:
            torch.testing.assert_close(got[name], without[name], rtol=1e-12, atol=1e-12)
        fused = make(family).eval()
        expected = fused(image)
        got, out = maps(fused)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for name, weights in got.items():  # which the output was made of
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            assert (weights - without[name]).abs().max() > 1e-6

    def test_forward_intermediates(self, family):
        model, image = make(family), image_of(family)
        final, all_of_them = model.forward_intermediates(image)
        assert torch.equal(final, model.forward_features(image))
        (stopped,) = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(stopped, all_of_them[0])
        assert stopped.requires_grad

    def test_a_frozen_model_trains_its_tables(self, family):
        model = equip(FAMILIES[family].build().train().requires_grad_(False), QKV)
        assert {name for name, one in model.named_parameters() if one.requires_grad} == tables_of(model).keys()
        fill(model)
        spread(model.forward_features(image_of(family))).backward()
        assert all(one.grad.abs().max() > 0 for one in tables_of(model).values())
        assert all(one.grad is None for name, one in model.named_parameters() if "lookup_table" not in name)

    def test_inference_mode_then_training(self, family):
        model, image = make(family), image_of(family)
        with torch.inference_mode():
            expected = model(image)
        got = model(image)
        got.sum().backward()
        assert (got - expected).abs().max() <= 1e-12

    def test_meta_device_then_materialised(self, family):
        with torch.device("meta"):
            model = equip(FAMILIES[family].build(torch.float32), QKV)
        assert all(one.is_meta for one in model.parameters())
        image = image_of(family, dtype=torch.float32)
        model.to_empty(device="cpu")
        tables = {id(table) for table in tables_of(model).values()}
        for one in [*model.parameters(), *model.buffers()]:  # timm leaves some of its own as the memory has them
            nn.init.constant_(one, torch.nan if id(one) in tables else 0.25)
        model.init_weights()
        assert all(torch.equal(one, torch.zeros_like(one)) for one in tables_of(model).values())
        plain = unequip(copy.deepcopy(model))
        torch.testing.assert_close(model(image), plain(image))

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize(
        "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "checkpointed"]
    )
    def test_compile_fullgraph(self, compiled_family, checkpointing):
        model = make(compiled_family).train()
        sizes = SHARED if FAMILIES[compiled_family].dynamic else [FAMILIES[compiled_family].sizes[0][0]]

        def loss(forward):
            return sum(n * forward(images(*size)).square().sum() for n, size in enumerate(sizes, 1))

        expected = gradients(model, loss(model))
        model.set_grad_checkpointing(checkpointing)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(gradients(model, loss(compiled)), expected, 1e-10)

    @pytest.mark.slow
    @pytest.mark.usefixtures("fresh_compiler")
    def test_inductor(self):
        family = self.compiled[0]
        model, image = make(family, **self.smaller).train(), image_of(family)
        expected = gradients(model, model(image).square().sum())
        compiled = torch.compile(model, fullgraph=True)
        assert_same(gradients(model, compiled(image).square().sum()), expected, 1e-10)

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"])
    def test_export_with_dynamic_batch(self, compiled_family, strict):
        model, image = make(compiled_family), image_of(compiled_family, batch=3)
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)

        def export(one):
            with torch.no_grad():
                return torch.export.export(one, (image,), dynamic_shapes=shapes, strict=strict)

        try:
            export(unequip(copy.deepcopy(model)))
        except Exception as error:
            assert strict, "the plain model exports without strict"
            pytest.skip(f"the plain model does not export: {type(error).__name__}")
        program = export(model)
        for n in (2, 5):
            other = image_of(compiled_family, batch=n)
            assert (program.module()(other) - model(other)).abs().max() <= 1e-12
        assert set(program.state_dict) == set(model.state_dict())
        model(image).sum().backward()  # tracing left nothing behind

    def test_features_only(self):
        name, options = self.registered
        torch.manual_seed(0)
        model = timm.create_model(name, **options).double().eval()
        wrapper = timm.create_model(name, features_only=True, out_indices=(0, 1), **options).double().eval()
        weights = model.state_dict()
        wrapper.load_state_dict({key: weights[self.plain_key(key)] for key in wrapper.state_dict()})
        image = images(*options["img_size"])
        before = wrapper(image)
        assert fill(equip(wrapper, QKV)) is wrapper
        fill(equip(model, QKV))
        got = wrapper(image)
        expected = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
        for one, other, old in zip(got, expected, before, strict=True):
            one = one.permute(0, 3, 1, 2) if self.adapter == "timm_swin" else one
            old = old.permute(0, 3, 1, 2) if self.adapter == "timm_swin" else old
            assert (one - other).abs().max() <= 1e-12
            assert (one - old).abs().max() > 1e-6
        assert not tables_of(unequip(wrapper))
        assert all(torch.equal(one, old) for one, old in zip(wrapper(image), before, strict=True))

    @staticmethod
    def plain_key(key):
        """The name in the model of what features_only calls `key`."""
        return key.removeprefix("model.")
