"""Models of transformers that equip themselves when they are built: tables that a checkpoint does not have."""

import copy

import pytest
import torch
from torch import nn

from irpe import RPEMultiheadAttention, build_rpe, get_rpe_config, iRPE
from irpe.equip import equip

transformers = pytest.importorskip("transformers", minversion="5.18")

from equipped import tables_of  # noqa: E402
from test_hf_vit import FAMILIES, INTERPOLATE, PATCHES, images  # noqa: E402
from transformers import initialization as init  # noqa: E402

QKV = "rpe-1.9-product-ctx-0-qkv"


@pytest.fixture(autouse=True)
def memory_of_nan():
    """What `torch.empty` returns here is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def equipping(cls, config=QKV, part=""):
    """A class whose models equip themselves, or a part of them, when they are built."""

    class Mine(cls):
        def __init__(self, *args):
            super().__init__(*args)
            equip(self.get_submodule(part), config)

    return Mine


def holding(cls):
    """A model of one's own that has a `cls` inside, and equips it."""

    class Holds(transformers.PreTrainedModel):
        config_class = cls.config_class

        def __init__(self, config):
            super().__init__(config)
            self.inner = equip(cls(config), QKV)
            self.post_init()

    return Holds


def class_and_config(family, **settings):
    name, arguments, *_ = FAMILIES[family]
    cls = getattr(transformers, name)
    return cls, cls.config_class(**{**copy.deepcopy(arguments), **settings})


def assert_zero(model, number=6):
    tables = tables_of(model)
    assert len(tables) == number
    assert not any(table.is_meta or table.any() for table in tables.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_anything(family):
    """transformers' `test_can_init_all_missing_weights`."""
    cls, config = class_and_config(family)
    assert_zero(holding(cls).from_pretrained(None, config=config, state_dict={}))


def test_a_plain_checkpoint(tmp_path):
    cls, config = class_and_config("vit head")
    plain = cls(config).eval()
    plain.save_pretrained(tmp_path)
    model, info = equipping(cls).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == tables_of(model).keys()
    assert_zero(model)
    image = images("vit head", 2, 3, dtype=torch.float32)
    torch.testing.assert_close(model(image, **INTERPOLATE).logits, plain(image, **INTERPOLATE).logits)
    assert_zero(equipping(cls, part="vit").from_pretrained(tmp_path))  # which is no model of its own here


def test_tables_that_are_there_stay(tmp_path):
    cls, config = class_and_config("vit head")
    model = equipping(cls)(config)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    model.init_weights()  # again, as who adds a head to a trained model does
    model.save_pretrained(tmp_path)
    loaded = equipping(cls).from_pretrained(tmp_path)
    for name, table in tables_of(model).items():
        assert table.any() and torch.equal(loaded.get_parameter(name), table)

    class Outer(transformers.PreTrainedModel):
        config_class, _supports_sdpa = cls.config_class, True

        def __init__(self, inner):
            super().__init__(inner.config)
            self.inner = inner
            self.post_init()

    Outer(loaded)
    for name, table in tables_of(model).items():
        assert torch.equal(loaded.get_parameter(name), table)


def test_tables_of_another_size(tmp_path):
    cls, config = class_and_config("vit head")
    model = equipping(cls)(config)
    model.save_pretrained(tmp_path)
    other = equipping(cls, "rpe-3.0-product-ctx-0-qkv")
    assert_zero(other.from_pretrained(tmp_path, ignore_mismatched_sizes=True))


@pytest.mark.parametrize("part", ["", "timm_model"])
def test_timm_inside_transformers(tmp_path, part):
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=dict(img_size=(32, 48), depth=2, embed_dim=24), num_labels=5
    )
    cls = transformers.TimmWrapperForImageClassification
    cls(config).save_pretrained(tmp_path)
    assert_zero(equipping(cls, part=part).from_pretrained(tmp_path))


def own_model(attention):
    """A class of transformers with an attention of torch."""

    class Own(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig

        def __init__(self, config):
            super().__init__(config)
            self.proj, self.attention = nn.Linear(4, 24), attention()
            self.post_init()

        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, iRPE):
                init.zeros_(module.table)  # as docs/migrate.md says

    return Own


@pytest.mark.parametrize(
    "attention",
    [
        lambda: RPEMultiheadAttention(24, 3, rpe_config=QKV),
        lambda: equip(nn.MultiheadAttention(24, 3), QKV),
        lambda: nn.ModuleList(build_rpe(get_rpe_config(rpe_on="qkv"), 8, 3)),
    ],
    ids=["RPEMultiheadAttention", "equip", "build_rpe"],
)
def test_a_class_of_ones_own(attention):
    cls, config = own_model(attention), transformers.ViTConfig(**PATCHES)
    assert_zero(cls.from_pretrained(None, config=config, state_dict={}), 3)
    model = cls(config)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    state = model.state_dict()
    state.pop("attention.in_proj_bias", None)  # so that transformers has the attention initialize itself
    loaded = cls.from_pretrained(None, config=config, state_dict=state)
    for name, table in tables_of(model).items():
        assert table.any() and torch.equal(loaded.get_parameter(name), table)
