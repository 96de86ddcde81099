"""What the README shows runs literally."""

import importlib.util
import inspect
import re
import sys

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_five_steps_run_literally_and_learn():
    torch = pytest.importorskip("torch")
    names = {"__name__": "readme"}
    steps = [block for block in BLOCKS if "timm" not in block]
    assert len(steps) == 3
    for block in steps:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (2, 197, 384)
    assert names["out"].shape == (2, 6, 127, 64)
    names["y"].square().sum().backward()
    assert names["attention"].rpe_k.lookup_table_weight.grad.abs().sum() > 0
    assert torch.equal(names["attention"].rpe_k.lookup_table_weight, torch.zeros(1, 64, 50))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="equip is shown on a model of timm")
def test_equip_and_saving_run_literally(tmp_path, monkeypatch):
    block, saving = [block for block in BLOCKS if "timm" in block]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    tables = [name for name in names["model"].state_dict() if "rpe_" in name]
    monkeypatch.chdir(tmp_path)
    before = names["model"]
    exec(compile(saving, "README.md", "exec"), names)
    assert names["model"] is not before and repr(names["model"]) == repr(before)
    assert tables == [f"blocks.{i}.attn.rpe_k.lookup_table_weight" for i in range(12)]


def test_the_example_of_rpe_ops_runs_literally():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "rpe_ops" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(block, "rpe_ops/README.md", "exec"), names)
    assert names["sums"].shape == (2, 6, 197, 50)


def test_the_examples_in_docstrings_run():
    import doctest

    import irpe.irpe
    import rpe_ops
    import rpe_ops._backends
    import rpe_ops.rpe_index

    tried = 0
    for module in (irpe.irpe, rpe_ops._backends, rpe_ops.rpe_index):
        globs = vars(module) | {"torch": sys.modules["torch"]}
        result = doctest.testmod(module, globs=globs)
        assert result.failed == 0
        tried += result.attempted
    assert tried >= 20


def test_every_public_function_has_a_docstring():
    import irpe

    for name in irpe.__all__:
        value = getattr(irpe, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_the_files_that_the_readme_links_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link
