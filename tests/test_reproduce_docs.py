"""Every command of docs/reproduce.md, with one step on tiny data; its encodings have the sizes that the paper names."""

import json
import re
import shlex

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from conftest import ROOT
from safetensors.torch import load_file
from train_tiny import ONE_STEP, TINY, pictures
from typer.testing import CliRunner

from irpe import get_num_buckets, rpe_config_from_string
from irpe.__main__ import app

ROWS = re.findall(r"^\| (.+?) \| (.+?) \| `(.+)` \|$", (ROOT / "docs" / "reproduce.md").read_text(), re.MULTILINE)
COMMANDS = list(dict.fromkeys(command for _, _, command in ROWS))
TRAIN = [command for command in COMMANDS if " train " in command]
DETECT = [command for command in COMMANDS if " detect " in command]


def of_irpe(command):
    words = shlex.split(command)
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "irpe"]
    return words[5:]


def rpe_of(command):
    words = shlex.split(command)
    return words[words.index("--rpe") + 1]


def test_every_row_has_its_encoding():
    assert (len(ROWS), len(TRAIN), len(DETECT)) == (9 + 4 + 4 + 12 + 8 + 9, 27, 9)
    sizes = {"rpe-2.0-product-ctx-1-k": 81, "rpe-3.5-product-ctx-1-k": 225, "rpe-1.9-product-ctx-1-k": 49}
    for text, size in sizes.items():
        one = rpe_config_from_string(text).rpe_k
        assert get_num_buckets(one.method, one.alpha, one.beta, one.gamma) == size
        assert any(rpe_of(command) == text for command in COMMANDS)
    for row, _, command in ROWS:
        assert ("no positions" in row) == ("--positions none" in command)
        assert ("clip" in row) == rpe_of(command).endswith("-clip")
        assert ("300 epochs" in row) == ("--epochs 300 --lr-drop 200" in command)
        assert (
            "without" in row
            or row.startswith(("DeiT", "sinusoid, 1", "sinusoid, 3", "no positions, 1"))
            or ", none" in row
        ) == (rpe_of(command) == "none")
        assert ("no absolute" in row) == ("pos_embed=none" in command)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "imagenet", per_class=16)


@pytest.mark.parametrize(
    "command", TRAIN, ids=lambda command: " ".join(re.findall(r"deit_[a-z]+|rpe-\S+|none", command))
)
def test_training_for_one_step(command, imagenet, tmp_path):
    words = of_irpe(command)
    words[words.index("imagenet")] = str(imagenet)
    words[words.index("--amp") + 1] = "none"
    result = CliRunner().invoke(app, [*words, *TINY, *ONE_STEP, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "epoch 1: train" in result.output
    rpe = rpe_of(command)
    assert rpe == "none" or rpe in (tmp_path / "run" / "README.md").read_text()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert ("pos_embed" in weights) == ("pos_embed=none" not in command)
    tables = {key.split(".")[3] for key in weights if "lookup_table" in key}
    assert tables == set() if rpe == "none" else {f"rpe_{one}" for one in rpe.split("-")[5]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", DETECT, ids=lambda command: re.search("--rpe (.+) --amp", command)[1].replace(" ", "")
)
def test_detection_for_one_step(command, tmp_path):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("transformers")
    runner = CliRunner()
    coco = str(tmp_path / "coco")
    written = runner.invoke(app, ["detect", "--write-digits", coco, "--train-scenes", "2", "--val-scenes", "2"])
    assert written.exit_code == 0, written.output
    words = of_irpe(command)
    words[words.index("coco")] = coco
    at = words.index("--backbone")
    del words[at : at + 2]  # its weights are fetched
    words[words.index("--amp") + 1] = "none"
    tiny = ["--batch-size", "2", "--size", "32", "--max-size", "48", "--train-size", "32", "--max-steps", "1"]
    tiny += ["--device", "cpu", "--out", str(tmp_path), "--name", "run", "--draw", "0"]
    result = runner.invoke(app, [*words, *tiny], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]
    assert (run["recipe"], run["model"], run["crop"]) == ("detr", "r50", 0.5)
    assert (run["epochs"], run["lr_drop"]) in ((150, 100), (300, 200))
