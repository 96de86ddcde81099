"""irpe export: files that compute what the model computes, in a process that knows neither irpe nor timm."""

import dataclasses
import json

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from safetensors.torch import load_file, save_file
from train_tiny import RPE, SMALL, irpe, pictures, words

from irpe.train import export as job
from irpe.train import model as models
from irpe.train.run import settings_of

LOAD = {
    ".pt2": "import torch; run = torch.export.load('model.pt2').module()",
    ".onnx": "import torch, onnxruntime; session = onnxruntime.InferenceSession('model.onnx')\n"
    "def run(x): return torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0])",
}
CALL = """
import sys
images = torch.load('images.pt')
torch.save([run(images[:count]) for count in (1, 2, 5)], 'logits.pt')
print(sorted({'irpe', 'timm', 'rpe_ops'} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights, those of the tables too, are random numbers."""
    folder = pictures(tmp_path_factory.mktemp("pictures"), per_class=15)
    options = ["rpe-1.9-cross-ctx-0-qkv" if one == RPE else one for one in SMALL]
    options += ["--max-steps", "1", "--device", "cpu"]
    result = irpe("train", folder, *options, "--out", folder, "--name", "run")
    assert result.exit_code == 0, result.output
    for name in ("best.safetensors", "model.safetensors"):
        state = load_file(folder / "run" / name)
        generator = torch.Generator().manual_seed(len(name))
        save_file(
            {key: 0.3 * torch.randn(one.shape, generator=generator) for key, one in state.items()},
            folder / "run" / name,
        )
    return folder / "run"


def model_of(run, which="best", **changes):
    settings, classes = settings_of(run)
    settings = dataclasses.replace(settings, pretrained=str(run / f"{which}.safetensors"), **changes)
    return models.build(settings, len(classes), strict=True).eval()


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_files_compute_what_the_model_computes(run, tmp_path, suffix, run_python, monkeypatch):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    file = tmp_path / f"model{suffix}"
    result = irpe("export", run, "--out", file)
    assert result.exit_code == 0, result.output
    assert "images Bx1x8x12, 4 classes, at most" in words(result)
    images = torch.randn(5, 1, 8, 12, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    assert run_python(LOAD[suffix] + CALL).stdout.strip() == "[]"  # this checkout is not on the path
    with torch.no_grad():
        expected = model_of(run)(images)
    for found, count in zip(torch.load(tmp_path / "logits.pt"), (1, 2, 5), strict=True):
        assert (found - expected[:count]).abs().max() < 1e-5 * expected.abs().max()
    facts = json.loads((tmp_path / f"model{suffix}.json").read_text())
    assert facts["classes"] == ["digit0", "digit1", "digit2", "digit3"]
    assert facts["input"]["shape"] == ["batch", 1, 8, 12] and facts["rpe"] == "rpe-1.9-cross-ctx-0-qkv"
    if suffix == ".pt2":  # what it says is how it is used
        names = {"torch": torch, "images": images}
        monkeypatch.chdir(tmp_path)
        exec(facts["use"], names)
        assert (names["logits"] - expected).abs().max() < 1e-5 * expected.abs().max()
    else:
        assert facts["use"] == "irpe predict model.onnx picture.jpg"
    assert {one.name for one in tmp_path.iterdir()} == {file.name, f"{file.name}.json", "images.pt", "logits.pt"}


def test_other_weights_sizes_and_batches(run, tmp_path):
    result = irpe("export", run, "--weights", "last", "--img-size", "10x8", "--batch", 3, "--out", tmp_path / "a.pt2")
    assert result.exit_code == 0 and "images 3x1x10x8" in words(result)
    module = torch.export.load(tmp_path / "a.pt2").module()
    images = torch.randn(3, 1, 10, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model_of(run, "model", img_size="10x8")(images)
        assert (module(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    result = irpe("export", run)
    assert result.exit_code == 0 and (run / "model.pt2").exists() and (run / "model.pt2.json").exists()


def test_a_file_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    load = torch.export.load

    class Off(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.inner = program.module()

        def module(self):
            return self

        def forward(self, images):
            return self.inner(images) * 1.01

    monkeypatch.setattr(torch.export, "load", lambda path: Off(load(path)))
    with pytest.raises(RuntimeError, match="differs from the model by"):
        irpe("export", run, "--out", tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "a.pth"], "--out a.pth has the suffix .pth; expected .pt2 (torch.export) or .onnx (ONNX)"),
        (["--out", "no/a.pt2"], "no is not a folder"),
        (["--weights", "ema"], "ema.safetensors does not exist"),
        (["--model", "vit_tiny_patch16_224", "--num-classes", "3"], "--model, --num-classes: the run has its own"),
    ],
)
def test_refused(run, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = irpe("export", run, *options)
    assert result.exit_code == 2 and sentence in words(result)


def test_refused_without_a_run(tmp_path, monkeypatch):
    result = irpe("export", "--model", "vit_tiny_patch16_224")
    assert result.exit_code == 2 and "name the folder of a run; or give --model, --pretrained and --out" in words(
        result
    )
    result = irpe("export", tmp_path)
    assert result.exit_code == 2 and "expected the folder of a run" in words(result)
    found = job.importlib.util.find_spec
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    result = irpe("export", tmp_path, "--model", "x", "--out", tmp_path / "a.onnx")
    assert result.exit_code == 2
    with pytest.raises(ValueError, match=r'onnxruntime is not installed, .* pip install "\.\[export\]"'):
        job.check_path(tmp_path / "a.onnx")
