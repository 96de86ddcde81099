"""Settings in files: --config, --print-config, and --resume of a run that knows its own."""

import json
import shutil
from contextlib import contextmanager

import pytest
import yaml
from safetensors.torch import load_file
from train_tiny import RPE, SMALL, irpe, log, pictures, words

from irpe.detect import settings as detection
from irpe.runs.config import as_yaml, read_config
from irpe.train import settings as training
from irpe.train.evaluation import Score
from irpe.train.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures") / "data", per_class=15)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = irpe("train", folder, *SMALL, "--out", out, "--name", "run")
    assert result.exit_code == 0, result.output
    return out / "run"


def written(path, text):
    path.write_text(text)
    return path


def test_options_are_read_as_the_command_line_reads_them(tmp_path):
    text = """
        batch-size: 64
        base_lr: 1e-4
        img-size: 224
        epochs: 7
        smoothing: 0
        compile: true
        model-arg: [depth=6, patch_size=8]
        mean: 0.5
        pretrained: null
        auto-augment: none
    """
    found = read_config(written(tmp_path / "mine.yaml", text), Settings)
    assert found == dict(
        batch_size=64, base_lr=1e-4, img_size="224", epochs=7, smoothing=0, compile=True,
        model_arg=("depth=6", "patch_size=8"), mean=(0.5,), pretrained=None, auto_augment="none",
    )  # fmt: skip
    assert read_config(written(tmp_path / "mine.json", '{"batch-size": 64, "lr": 1e-05}'), Settings) == dict(
        batch_size=64, lr=1e-5
    )


@pytest.mark.parametrize("module", [training, detection], ids=["train", "detect"])
def test_what_is_printed_is_read_again(module, tmp_path):
    for recipe in module.RECIPES:
        options = {"data": "päckchen/no", "epochs": 3, "lr": 1e-7, "batch_size": 12}
        more = dict(mean=(0.5, 0.25, 0.125), model_arg=("depth=6",), img_size="224", auto_augment="none")
        if module is training:
            settings = module.settings_from(recipe, options | more)
        else:
            settings = module.settings_from(options, recipe)
        found = read_config(written(tmp_path / "some.yaml", as_yaml(settings)), module.Settings)
        assert module.Settings(**found) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sizes: 64", "unknown settings batch_sizes: of another version, or misspelt; did you mean batch_size?"),
        ("epochs: many", "--epochs is 'many' in the file; expected a whole number"),
        ("epochs: 1.5", "--epochs is 1.5 in the file; expected a whole number"),
        ("hflip: no", "--hflip is False in the file; expected a number"),
        ("mean: [a, b]", "--mean is ('a', 'b') in the file; expected a list, each a number"),
        ("img-size: [224, 320]", "expected text or null"),
        ("mixup: {alpha: 0.8}", "mixup is nested; expected a value"),
        ("- epochs", "holds no options; expected lines such as batch-size: 64"),
        ("", "holds no options"),
        ("epochs: [1", "is neither YAML nor JSON"),
        ("epochs: !!python/object/apply:os.mkdir [made]", "is neither YAML nor JSON"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nepochs: [*c, *c]", "b is nested"),
        ("[" * 5000, "is neither YAML nor JSON"),
    ],
)
def test_files_that_are_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = irpe("train", "digits", "--config", written(tmp_path / "mine.yaml", text))
    assert result.exit_code == 2 and message in words(result), result.output
    assert [one.name for one in tmp_path.iterdir()] == ["mine.yaml"]


def test_files_that_are_none(tmp_path, whole):
    assert "none.yaml cannot be read: No such file" in words(
        irpe("train", "digits", "--config", tmp_path / "none.yaml")
    )
    assert "unknown settings" in words(irpe("detect", "--config", whole / "settings.json"))
    assert "name the DATA" in words(irpe("train", "--config", written(tmp_path / "some.yaml", "epochs: 3")))


def test_the_command_line_comes_first(tmp_path):
    file = written(tmp_path / "mine.yaml", "data: digits\nrecipe: small\nbatch-size: 32\nepochs: 9\nrpe: none")

    def printed(*more):
        result = irpe("train", "--config", file, *more, "--print-config")
        assert result.exit_code == 0, result.output
        return yaml.safe_load(result.stdout)

    found = printed()
    assert (found["data"], found["recipe"], found["batch_size"], found["epochs"]) == ("digits", "small", 32, 9)
    assert found["clip_grad"] == 1.0 and found["warmup_epochs"] == 2.25  # of the recipe, for these epochs
    found = printed("--epochs", 4, "--rpe", RPE, "--batch-size", 16)
    assert (found["epochs"], found["rpe"], found["batch_size"], found["warmup_epochs"]) == (4, RPE, 16, 1.0)
    assert "the file has recipe small" in words(irpe("train", "--config", file, "--recipe", "deit"))
    result = irpe("detect", "--config", written(tmp_path / "two.yaml", "recipe: digits\nqueries: 7"), "--print-config")
    assert yaml.safe_load(result.stdout)["queries"] == 7, result.output
    assert "the demo has no such option" in words(irpe("train", "--print-config"))


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("train", "data: hfds/somebody/pictures", ["hfds/somebody/pictures"]),
        ("train", "data: digits\npretrained: hub", ["--pretrained", "hub"]),
        ("train", "data: torch/cifar10\ndata-dir: .\ndownload: true", ["--download"]),
        ("train", "data: digits\nmodel: hf-hub:somebody/model", ["--model", "hf-hub:somebody/model"]),
        ("detect", "data: coco\npretrained: somebody/detr", ["--pretrained", "somebody/detr"]),
        ("detect", "data: coco\nmodel: r50\nbackbone: hub", ["--backbone", "hub"]),
    ],
)
def test_what_a_file_names_is_not_fetched(command, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "mine.yaml", text)
    result = irpe(command, "--config", file, "--print-config")
    assert result.exit_code == 2
    assert f"say {' '.join(said)} on the command line too" in words(result)
    result = irpe(command, *said, "--config", file, "--print-config")
    assert result.exit_code == 0, result.output


def test_a_run_goes_on_by_itself(whole, folder, tmp_path, monkeypatch):
    """From another folder, and with nothing said but its name, to the very weights of a run without a stop."""
    monkeypatch.chdir(folder.parent)
    result = irpe("train", folder.name, *SMALL, "--out", tmp_path, "--name", "run", "--max-steps", 3)
    assert result.exit_code == 0, result.output
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    result = irpe("train", "--resume", "../run", "--max-steps", 4)
    assert result.exit_code == 0 and "goes on after step 3 of 4" in result.output, result.output
    one, other = load_file(whole / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all((one[name] == other[name]).all() for name in one)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    own = json.loads((whole / "settings.json").read_text())["settings"]
    assert settings["data"] == str(folder)
    assert settings | {"data": 0, "max_steps": 0} == own | {"data": 0, "max_steps": 0}
    said = words(irpe("train", "--resume", "../run", "--config", whole / "settings.json"))
    assert "the run of --resume ../run has its settings" in said
    assert "--lr was 0.001, is 0.5" in words(irpe("train", "--resume", "../run", "--lr", 0.5))
    shutil.copy(tmp_path / "run" / "checkpoints" / "step-000000004.pt", "some.pt")
    assert "name the DATA" in words(irpe("train", "--resume", "some.pt"))
    assert "does not exist" in words(irpe("train", "--resume", "nowhere"))


def test_settings_of_a_run_are_a_configuration(whole, tmp_path):
    given = ["train", "--config", whole / "settings.json", "--seed", 3, "--out", tmp_path, "--name", "run"]
    result = irpe(*given, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    old, new = (json.loads((one / "settings.json").read_text())["settings"] for one in (whole, tmp_path / "run"))
    assert new == old | {"seed": 3, "max_steps": 1}


def test_a_batch_is_at_most_the_data(folder, tmp_path):
    given = ["train", folder, *SMALL, "--mixup", 0.8, "--out", tmp_path, "--name", "run", "--max-steps", 1]
    result = irpe(*given, "--batch-size", 1000, "--accumulate", 7)
    assert "--batch-size 1000: there are 60 images to train on, so it is 56" in words(result)
    assert result.exit_code == 0 and "1 step of 56 images" in words(result)
    again = irpe(*given[:-1], 2, "--batch-size", 1000, "--accumulate", 7, "--resume", "auto")
    assert again.exit_code == 0 and "goes on after step 1 of 2" in words(again), again.output


@pytest.mark.parametrize(("losses", "best"), [((0.9, 0.4, 0.5), 2), ((0.4, 0.9, 0.9), 1)])
def test_of_equal_accuracies_the_lower_loss_is_the_best(folder, tmp_path, monkeypatch, losses, best):
    waiting = list(losses)

    def evaluate(*_, num_classes, **__):
        return Score(waiting.pop(0), 25.0, 75.0, 60, 0, (25.0,) * num_classes), []

    monkeypatch.setattr("irpe.train.loop.evaluate", evaluate)
    options = [*SMALL, "--epochs", 3, "--ema", 0, "--out", tmp_path, "--name", "run"]
    result = irpe("train", folder, *options)
    assert result.exit_code == 0, result.output
    assert [line["epoch"] for line in log(tmp_path / "run", "epoch")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"]["val"]["loss"] == losses[best - 1]
    with open(tmp_path / "run" / "best.safetensors", "rb") as file:
        assert f'"epoch":"{best}"'.encode() in file.read(4096)


DETECT = [
    *("--train-scenes", 8, "--val-scenes", 4, "--d-model", 16, "--layers", 1, "--queries", 4, "--batch-size", 4),
    *("--epochs", 1, "--device", "cpu", "--draw", 0, "--dropout", 0, "--no-plots"),
]


def test_a_detector_goes_on_by_itself(tmp_path):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    given = [*DETECT, "--rpe", "none", "--out", tmp_path, "--name"]
    assert irpe("detect", "digits", *given, "run", "--max-steps", 1).exit_code == 0
    result = irpe("detect", "--resume", tmp_path / "run", "--max-steps", 2)
    assert result.exit_code == 0 and "goes on after step 1 of 2" in words(result), result.output
    result = irpe("detect", "--config", tmp_path / "run" / "settings.json", "--out", tmp_path, "--name", "other")
    assert result.exit_code == 0 and "2 steps of 4 images" in words(result), result.output


def test_detectors_that_were_stopped_say_how_all_go_on(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")

    @contextmanager
    def signals():
        yield lambda: 2

    given = [*DETECT, "--rpe", "none", "--rpe", RPE, "--seeds", 1, "--out", tmp_path, "--name", "all"]
    with monkeypatch.context() as patch:
        patch.setattr("irpe.detect.run.signals", signals)
        result = irpe("detect", *given)
    assert result.exit_code == 130
    assert f"the same command with --out {tmp_path} --name all --resume auto goes on" in words(result)
    result = irpe("detect", *given, "--resume", "auto")
    assert result.exit_code == 0 and "goes on after step 1 of 2" in words(result), result.output
