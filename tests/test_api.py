"""docs/api.md and the public names: each has the other."""

import importlib
import inspect

import pytest
from api import MODULES, PAGE, page, public

pytest.importorskip("timm")
pytest.importorskip("transformers")
CORE = ["irpe.irpe", "irpe.multihead_attention", "irpe.convert", "irpe.config_io", "irpe.equip"]


def test_the_page_has_every_public_name_with_its_line():
    assert PAGE.read_text(encoding="utf-8") == page(), "`python tests/api.py` writes it"


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_exports_is_on_the_page(name):
    module = importlib.import_module(name)
    if hasattr(module, "__all__") and MODULES[name][1] is None:
        assert set(public(name)) == set(module.__all__)
    assert all(inspect.getdoc(found) for found in public(name).values())


def own(name):
    """The functions and classes that a module defines, but for those with an underscore."""
    found = vars(importlib.import_module(name)).items()
    defined = {key for key, one in found if inspect.isclass(one) or inspect.isfunction(one) if one.__module__ == name}
    return {key for key in defined if key[0] != "_"}


@pytest.mark.parametrize("name", CORE)
def test_functions_and_classes_of_the_core_are_public_or_have_an_underscore(name):
    """Beside what modules of the package share."""
    shared = {"keep_fused_kernels_away", "why_no_encodings"}
    assert own(name) - set(public("irpe")) <= shared


@pytest.mark.parametrize("name", ["rpe_ops.rpe_index", "rpe_ops.rpe_attention", "rpe_ops.reference"])
def test_the_copied_operators_have_no_other_public_functions(name):
    assert own(name) == set(public(name))
