"""What the tests of equipped models of every library share."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from irpe import get_rpe_config
from irpe.equip import equip, unequip

QKV = get_rpe_config(ratio=1.9, method="product", rpe_on="qkv")


def structure(model):
    """All modules of a model, and the names of all that they hold."""
    return [
        (name, type(module), sorted(vars(module)), list(module._parameters), list(module._modules), module.training)
        for name, module in model.named_modules()
    ]


def assert_refused(model, reason, config=QKV, error=ValueError, said="", **options):
    """equip raises `error` with the reason, and with what else is `said`, and leaves the model as it was."""
    before = structure(model)
    with pytest.raises(error, match=reason) as caught:
        equip(model, config, **options)
    assert said in str(caught.value)
    assert structure(model) == before


def fill(model):
    """The model, with random tables."""
    torch.manual_seed(1)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    return model


def tables_of(model):
    return {name: one for name, one in model.named_parameters() if "lookup_table" in name}


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def spread(features):
    """A number that every token has a say in: the class token alone sees one bucket on keys in the last block."""
    return (features * torch.arange(features.numel(), dtype=features.dtype).view_as(features).cos()).sum()


def assert_same(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name in (name for name in expected if expected[name].numel()):  # no register tokens: an empty parameter
        scale = max(1.0, expected[name].abs().max().item())
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale, name


class Equipped:
    """Tests that run whatever the library: a subclass says what its families are, and how one is built and run."""

    copied = None  # the families that are copied, if not all

    @classmethod
    def families(cls):
        raise NotImplementedError

    @staticmethod
    def build(family):
        """The model as it is without iRPE, in evaluation mode and in float64."""
        raise NotImplementedError

    @staticmethod
    def run(model, family):
        """What it makes of an input of two samples."""
        raise NotImplementedError

    @staticmethod
    def snapshot(model):
        """Everything that unequip has to give back, but for values of parameters."""
        raise NotImplementedError

    @classmethod
    def form(cls, model):
        """What of it is the same in a copy."""
        return cls.snapshot(model)

    @staticmethod
    def equip(model, family):
        return equip(model, QKV)

    @classmethod
    def make(cls, family):
        """An equipped model with random tables."""
        return fill(cls.equip(cls.build(family), family))

    @classmethod
    def pytest_generate_tests(cls, metafunc):
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", cls.families())
        if "copied_family" in metafunc.fixturenames:
            metafunc.parametrize("copied_family", cls.copied or cls.families())

    @pytest.mark.parametrize(
        ("how", "ran"), [("deepcopy", False), ("deepcopy", True), ("pickle", True), ("torch.save", True)]
    )
    def test_copies_stand_alone(self, copied_family, how, ran):
        model = self.make(copied_family)
        if ran:
            self.run(model, copied_family).sum().backward()
            model.zero_grad()
        form = self.form(model)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert self.form(other) == form
        expected = self.run(model, copied_family)
        assert torch.equal(self.run(other, copied_family), expected)
        assert {id(one) for one in other.modules()}.isdisjoint({id(one) for one in model.modules()})
        for table in tables_of(other).values():
            nn.init.zeros_(table)
        assert (self.run(other, copied_family) - expected).abs().max() > 1e-9
        assert self.form(unequip(other)) == self.form(self.build(copied_family))
        assert (self.run(other, copied_family) - expected).abs().max() > 1e-9
        assert self.form(model) == form
        assert torch.equal(self.run(model, copied_family), expected)

    def test_state_dicts_load_strictly(self, family, tmp_path):
        model, other = self.make(family), self.build(family)
        plain = copy.deepcopy(other.state_dict())
        self.equip(other, family)
        assert set(other.load_state_dict(plain, strict=False).missing_keys) == tables_of(other).keys()
        assert (self.run(other, family) - self.run(model, family)).abs().max() > 1e-9
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(self.run(other, family), self.run(model, family))

    def test_unequip_gives_the_original_back(self, family):
        model = self.build(family)
        before, state, keys = self.run(model, family), self.snapshot(model), list(model.state_dict())
        with torch.no_grad():
            quiet = self.run(model, family)
        for ran in (False, True):
            fill(self.equip(model, family))
            assert self.snapshot(model) != state
            if ran:
                self.run(model, family).sum().backward()
            assert unequip(model) is model
            assert self.snapshot(model) == state
            assert list(model.state_dict()) == keys
            assert torch.equal(self.run(model, family), before)
            with torch.no_grad():
                assert torch.equal(self.run(model, family), quiet)
            with pytest.raises(ValueError, match="has no iRPE"):
                unequip(model)
        self.equip(model, family)
        assert (self.run(model, family) - before).abs().max() <= 1e-12 * max(1, before.abs().max())
