"""What docs/use.md shows runs literally."""

import inspect
import re
import shlex

import pytest
from PIL import Image
from train_tiny import ROOT, SMALL, irpe, pictures

import irpe as package

pytest.importorskip("timm")

TEXT = (ROOT / "docs" / "use.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run, pictures, and a detector, of the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    result = irpe("train", pictures(tmp_path / "data", per_class=8), *SMALL, "--device", "cpu", "--name", "NAME")
    assert result.exit_code == 0, result.output
    (tmp_path / "holidays").mkdir()
    for name in ("cat.jpg", "holidays/1.png", "holidays/2.webp"):
        Image.new("RGB", (30, 20), "#336699").save(tmp_path / name)
    return tmp_path


def test_python(place, monkeypatch):
    names, pushed = {}, []
    signature = inspect.signature(package.push_to_hub)
    monkeypatch.setattr(package, "push_to_hub", lambda *args, **more: pushed.append(signature.bind(*args, **more)))
    assert len(PYTHON) == 3
    for block in PYTHON:
        exec(compile(block, "use.md", "exec"), names)
    assert package.load("my-model").predict.classes == ["cat", "dog", "fox"]
    assert len(names["guesses"]) == 4 and [len(one) for one in names["several"]] == [1, 1]
    assert pushed[0].arguments["name"] == "user/name"
    for name in ("size", "crop_pct", "interpolation", "mean", "std"):
        assert hasattr(names["model"].predict.preprocessing, name) and f"`{name}" in TEXT


@pytest.mark.slow
def test_commands(place):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("pycocotools")
    small = "--train-scenes 6 --val-scenes 4 --d-model 16 --layers 1 --batch-size 3 --epochs 1 --seeds 1 --device cpu"
    result = irpe("detect", *small.split(), "--rpe", "rpe-2.0-product-ctx-1-k", "--name", "digits")
    assert result.exit_code == 0, result.output
    (run,) = [one for one in (place / "runs" / "digits").iterdir() if one.is_dir()]
    run.rename(place / "runs" / "detect-NAME")
    assert irpe("export", "runs/NAME", "--out", "model.onnx").exit_code == 0
    assert len(LINES) == 4
    for line in LINES:
        words = shlex.split(line)
        assert words[0] == "irpe"
        result = irpe(*words[1:], "--device", "cpu")
        assert result.exit_code == 0, result.output
    assert len(list((place / "drawn").iterdir())) == 2
