"""Every command of docs/train.md, with one step on tiny pictures."""

import re
import shlex

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import MODEL, ONE_STEP, ROOT, TINY, pictures
from typer.testing import CliRunner

from irpe.__main__ import app
from irpe.runs.config import read_config
from irpe.train.settings import Settings

LINES = [
    line
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "train.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
TRAINING = [line for line in LINES if " train " in line]


def of_irpe(line):
    words = shlex.split(line)
    return words[words.index("irpe") + 1 :]


def test_the_page_has_commands_of_every_kind():
    assert len(TRAINING) == 11 and len(LINES) == 19
    assert sum(line.startswith("torchrun --nproc-per-node 8 -m irpe") for line in LINES) == 2


@pytest.mark.parametrize("line", TRAINING)
def test_command_for_one_step(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for name in ("pictures", "imagenet"):
        pictures(tmp_path / name, per_class=16)
    words = of_irpe(line)
    tiny = [*TINY, *ONE_STEP]
    if "torch/cifar10" in words:  # its reader has a test of its own; nothing is fetched here
        words[words.index("torch/cifar10")] = "pictures"
    if "--pretrained" in words:
        bare = runner.invoke(
            app, ["train", "pictures", "--recipe", "small", *tiny, "--name", "bare"], catch_exceptions=False
        )
        assert bare.exit_code == 0, bare.output
        (tmp_path / "runs" / "bare" / "model.safetensors").rename(tmp_path / "weights.safetensors")
        words[words.index("--pretrained") + 1] = "weights.safetensors"
    if "--config" in words:
        given = ["train", "pictures", "--recipe", "small", *tiny, "--name", "NAME"]
        printed = runner.invoke(app, [*given, "--print-config"], catch_exceptions=False)
        (tmp_path / "mine.yaml").write_text(printed.stdout)
        assert runner.invoke(app, given, catch_exceptions=False).exit_code == 0
    if ">" in words:
        place = words.index(">")
        result = runner.invoke(app, words[:place], catch_exceptions=False)
        (tmp_path / words[place + 1]).write_text(result.stdout)
        assert read_config(tmp_path / words[place + 1], Settings)["model"] == words[words.index("--model") + 1]
        return
    result = runner.invoke(app, [*words, *tiny], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "epoch 1: train" in result.output
    assert (tmp_path / "runs" / "run" / "README.md").exists()


def test_commands_of_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", per_class=16)
    runner = CliRunner()
    assert runner.invoke(app, ["train", "pictures", "--recipe", "small", *TINY, *ONE_STEP]).exit_code == 0
    for words in (of_irpe(line) for line in LINES if " evaluate " in line):
        words[1] = "runs/run"
        result = runner.invoke(app, [*words, "--device", "cpu"], catch_exceptions=False)
        assert result.exit_code == 0 and "on 64 images" in result.output


def test_commands_of_inspection(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", per_class=3)
    lines = [line for line in LINES if " inspect " in line]
    assert len(lines) == 2
    for line in lines:
        result = CliRunner().invoke(app, [*of_irpe(line), "--loader-workers", "0"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    for name in ("inspect-pictures.png", "wide.png", "wide.json"):
        assert (tmp_path / "runs" / name).exists()


@pytest.mark.slow
def test_commands_of_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", per_class=16)
    runner = CliRunner()
    assert runner.invoke(app, ["train", "pictures", "--recipe", "small", *MODEL, *ONE_STEP]).exit_code == 0
    (tmp_path / "runs" / "run").rename(tmp_path / "runs" / "NAME")
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "runs/NAME/best.safetensors").read_bytes())
    for words in (of_irpe(line) for line in LINES if " export " in line):
        if "--model" in words:
            words = [*words, *TINY, "--num-classes", "4"]
        result = runner.invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert (tmp_path / words[words.index("--out") + 1]).stat().st_size > 1000


def test_the_folder_that_evaluate_names_is_the_one_that_train_makes():
    from irpe.train.run import default_name
    from irpe.train.settings import Settings

    for line in (one for one in LINES if " evaluate " in one):
        folder = of_irpe(line)[1]
        data = "imagenet" if "imagenet" in folder else "pictures"
        settings = Settings(data, model="deit_small_patch16_224", rpe="rpe-1.9-product-ctx-1-k")
        assert folder == f"runs/{default_name(settings)}"
