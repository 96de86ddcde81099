"""irpe/train/confusion.py: what is taken for what, counted, told, and drawn."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import Image
from train_tiny import SMALL, irpe, log, pictures, process, words

from irpe.runs.world import World
from irpe.train import confusion, run
from irpe.train.data import open_data
from irpe.train.evaluation import evaluate
from irpe.train.loader import Transform
from irpe.train.model import build, shape_of
from irpe.train.settings import settings_from

PAIRS = {(0, 0): 5, (0, 2): 3, (1, 1): 1, (1, 0): 3, (2, 2): 4, (2, 1): 9}
NAMES = ["cat", "dog", "fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), per_class=9)


@pytest.fixture(scope="module")
def ended(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ended")
    assert irpe("train", folder, *SMALL, "--epochs", 2, "--plots", "--out", out, "--name", "run").exit_code == 0
    return out / "run"


def test_the_most_frequent_come_first_and_equal_ones_in_the_order_of_classes():
    found = confusion.confusions(PAIRS, NAMES)
    assert [(one.name, one.guess, one.images, one.of) for one in found] == [
        ("fox", "dog", 9, 13), ("cat", "fox", 3, 8), ("dog", "cat", 3, 4),
    ]  # fmt: skip
    assert found[2].percent == 75.0
    assert len(confusion.confusions(PAIRS, NAMES, 2)) == 2 and confusion.confusions({(0, 0): 2}, NAMES) == []


def test_pairs_are_those_of_each_image(folder):
    """Beside a loop over the images; and the other figures of the score follow from them."""
    options = dict(
        data=str(folder), model="vit_tiny_patch16_224", img_size="8x12", in_chans=1, loader_workers=0, batch_size=7,
        model_arg=("patch_size=2", "embed_dim=24", "depth=1", "num_heads=3"),
    )  # fmt: skip
    settings = settings_from("small", options)
    data = open_data(settings)
    transform = Transform(shape_of(settings, build(settings, 4)), settings.interpolation)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 12, 4, bias=False))
    score, _ = evaluate(model, data.val, transform, settings, World(0, 1, torch.device("cpu")), num_classes=4)
    expected = Counter()
    for image, label in (data.val[k] for k in range(len(data.val))):
        with torch.no_grad():
            expected[label, int(model(transform(image)[None]).argmax())] += 1
    assert score.pairs == expected and len(expected) > 4
    right = sum(images for (one, guess), images in expected.items() if one == guess)
    assert score.images == 36 and score.top1 == pytest.approx(100 * right / 36)
    assert score.per_class == pytest.approx([100 * expected[k, k] / 9 for k in range(4)])
    assert "pairs" not in score.plain()


def test_a_run_leaves_them_of_its_last_weights(ended):
    values = json.loads((ended / "confusion.json").read_text())
    last = log(ended, "epoch")[-1]
    assert values["step"] == last["step"] and values["classes"] == [f"digit{k}" for k in range(4)]
    of_class = [sum(n for one, _, n in values["counts"] if one == k) for k in range(4)]
    right = [sum(n for one, guess, n in values["counts"] if one == guess == k) for k in range(4)]
    assert of_class == [9] * 4 and [100 * one / 9 for one in right] == pytest.approx(last["val"]["per_class"])
    assert "(confusion.png)" in (ended / "README.md").read_text()
    assert Image.open(ended / "confusion.png").size[0] > 200


def test_evaluate_names_the_most_frequent(ended, tmp_path):
    result = irpe("evaluate", ended, "--weights", "last", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())["confusion"]
    own = json.loads((ended / "confusion.json").read_text())
    assert found == {name: own[name] for name in ("classes", "counts")}
    pairs = {(a, b): n for a, b, n in found["counts"]}
    first = confusion.confusions(pairs, found["classes"])[0]
    assert "Taken for another class most often" in words(result)
    assert f"{first.name} {first.guess} {first.images} {first.of} {first.percent:.1f}" in words(result)


@pytest.mark.slow
def test_two_processes_count_together(ended, tmp_path):
    done = process("evaluate", ended, "--weights", "last", "--json", tmp_path / "found.json", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    own = json.loads((ended / "confusion.json").read_text())
    assert json.loads((tmp_path / "found.json").read_text())["confusion"]["counts"] == own["counts"]
    assert done.stdout.count("Taken for another class") == 1


def test_a_file_of_another_step_or_of_something_else_is_not_taken(tmp_path):
    assert confusion.read(tmp_path, 4) is None
    confusion.write(tmp_path, PAIRS, NAMES, 4)
    assert confusion.read(tmp_path, 4) == PAIRS and confusion.read(tmp_path, 5) is None
    for text in ("[]", '{"step": 4}', '{"step": 4, "counts": [[1]]}', '{"step": 4, "counts": 1}', "no JSON"):
        (tmp_path / "confusion.json").write_text(text)
        assert confusion.read(tmp_path, 4) is None


def test_cells_are_percent_of_the_class_in_its_row(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", _keeping(seen))
    confusion.draw(tmp_path / "a.png", PAIRS, ["$cat$", "dog\x1b", "fox"])
    for row, expected in zip(seen[0].tolist(), [[62.5, 0, 37.5], [75, 25, 0], [0, 900 / 13, 400 / 13]], strict=True):
        assert row == pytest.approx(expected)


def test_of_many_classes_those_that_are_confused_most_are_drawn(tmp_path, monkeypatch):
    pairs = {(k, k): 5 for k in range(100)} | {(k, k + 1): k for k in range(60, 99)} | {(3, 70): 1000}
    seen = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", _keeping(seen))
    confusion.draw(tmp_path / "a.png", pairs, [str(k) for k in range(100)])
    assert seen[0].shape == (30, 30)
    assert confusion._most_confused(pairs, 100) == [3, 70, *range(72, 100)]
    assert seen[0][0, 1] == pytest.approx(100 * 1000 / 1005)


def _keeping(seen):
    from matplotlib.axes import Axes

    own = Axes.imshow

    def imshow(self, values, *args, **options):
        seen.append(values)
        return own(self, values, *args, **options)

    return imshow


def test_its_files_are_of_a_run():
    assert {"confusion.json", "confusion.png"} <= set(run.KIND.files)
