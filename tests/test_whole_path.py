"""From a folder of pictures to a model on a hub and back, as one user would walk it."""

import csv
import json
import re

import pytest
from hub_stand_in import hub
from PIL import Image
from test_publish import process
from train_tiny import SMALL, irpe, pictures, words

import irpe as package

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def said(*arguments):
    result = irpe(*arguments)
    assert result.exit_code == 0, result.output
    return words(result)


@pytest.mark.slow
def test_from_pictures_to_a_hub_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", per_class=12)
    assert "4 classes" in said("inspect", "data", "--img-size", "8x12", "--out", "inspect.png", "--json", "data.json")
    written = irpe("train", "data", *SMALL, "--epochs", 40, "--batch-size", 16, "--lr", 0.01, "--print-config")
    (tmp_path / "mine.yaml").write_text(written.stdout)

    said("train", "--config", "mine.yaml", "--name", "mine", "--max-steps", 70)
    assert "goes on after step 70 of 120" in said("train", "--resume", "runs/mine", "--max-steps", 120)
    run = tmp_path / "runs" / "mine"
    measured = json.loads((run / "result.json").read_text())["best"]["val"]["top1"]
    assert measured > 40  # of four digits, on pictures that it was not trained on
    evaluated = said("evaluate", run, "--json", "score.json")
    assert json.loads((tmp_path / "score.json").read_text())["top1"] == measured, evaluated

    said("predict", run, "data/val", "--csv", "found.csv")
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    right = [row["label"] in row["file"] for row in rows if row["rank"] == "1"]
    assert len(right) == 48 and 100 * sum(right) / len(right) == pytest.approx(measured)

    picture = next((tmp_path / "data" / "val").rglob("*.png"))
    said("show", run, "--image", picture, "--query", 1, 4, "--out", "attention.png")
    for name in ("inspect.png", "attention.png"):
        assert min(Image.open(tmp_path / name).size) > 200

    said("export", run, "--out", "mine.onnx")
    best = package.load(run).predict(picture)[0]
    exported = package.load(tmp_path / "mine.onnx").predict(picture)[0]
    assert exported.label == best.label and exported.score == pytest.approx(best.score, abs=1e-4)

    with hub() as (address, repositories):
        process(f"import irpe; irpe.push_to_hub({str(run)!r}, 'user/mine')", address, tmp_path / "home", tmp_path)
        (snippet,) = re.findall(r"```python\n(.*?)```", repositories["user/mine"]["README.md"].decode(), re.DOTALL)
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "picture.jpg").write_bytes(picture.read_bytes())
        # a process in another folder, with nothing in a cache
        found = process(f"{snippet}\nprint(found[0].label)", address, tmp_path / "other", tmp_path / "else")
    assert found.split()[-1] == best.label
