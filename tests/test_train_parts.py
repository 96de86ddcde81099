"""Which part of the data is trained on and which is measured: splits, --val-share, folders called digits, paths."""

import json
import shutil

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import SMALL, pictures
from typer.testing import CliRunner

from irpe.__main__ import app
from irpe.train import data
from irpe.train.run import settings_of
from irpe.train.settings import settings_from, settings_from_dict


def irpe(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return result, " ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in result.output).split())


def settings(where, **more):
    return settings_from("small", {"data": str(where), "in_chans": 1, **more})


def names(source):
    return {source.name(k) for k in range(len(source))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and two runs: `both` on train and val, `share` on train, of which a third was held out."""
    place = tmp_path_factory.mktemp("parts")
    folder = pictures(place / "pictures")
    shutil.copytree(folder / "train", place / "alone")
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    common = [*SMALL, "--epochs", 1, "--batch-size", 8, "--no-tensorboard"]
    for words in (["pictures", "--name", "both"], ["alone", "--val-share", 0.3, "--name", "share", "--seed", 3]):
        result, _ = irpe("train", *words, *common)
        assert result.exit_code == 0, result.output
    patch.undo()
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def test_a_share_is_measured_again_by_evaluate(here):
    for where in ([], ["--data", "alone"], ["--data", "./alone/"], ["--data", here / "alone"]):
        result, words = irpe("evaluate", "runs/share", *where)
        assert result.exit_code == 0 and "on 8 images" in words, words


@pytest.mark.parametrize("split", ["test", "typo", "val", "train"])
@pytest.mark.parametrize("more", [[], ["--data", "alone"], ["--data", "pictures/train"]])
def test_a_split_that_is_not_there_is_not_the_whole(here, split, more):
    result, words = irpe("evaluate", "runs/share", "--split", split, *more)
    assert result.exit_code == 2
    folder = "pictures/train" if "pictures/train" in more else here / "alone"
    # long paths are broken into lines
    sentence = f"has no {split}: expected {folder}/{split} or {folder}/{split}.tar"
    assert sentence.replace(" ", "") in words.replace(" ", "")


def test_the_split_that_was_asked_for_is_named(here):
    result, words = irpe("evaluate", "runs/both", "--split", "test")
    assert result.exit_code == 2 and "has no test: expected" in words and "has no val" not in words
    result, words = irpe("evaluate", "runs/both", "--split", "train")
    assert result.exit_code == 0 and "on 24 images" in words
    result, words = irpe("train", "pictures", *SMALL, "--train-split", "first", "--batch-size", 8)
    assert result.exit_code == 2 and "pictures has no first: expected pictures/first or pictures/first.tar" in words
    result, words = irpe("train", "alone", *SMALL, "--train-split", "first", "--val-share", 0.3)
    assert result.exit_code == 2 and "alone has no first: expected alone/first" in words


def test_evaluate_holds_out_what_the_run_has_held_out(here):
    for option in (["--val-share", 0.5], ["--split-seed", 1]):
        result, words = irpe("evaluate", "runs/share", *option)
        assert result.exit_code == 2 and f"{option[0]}: the run has its own; leave it out" in words
    result, words = irpe("evaluate", "runs/share", "--data", "pictures/train", "--val-share", 0.3)
    assert result.exit_code == 0 and "on 8 images" in words


def test_other_data_has_its_own_parts(here):
    result, words = irpe("evaluate", "runs/share", "--data", "pictures")
    assert result.exit_code == 0 and "on 24 images" in words
    result, words = irpe("evaluate", "runs/share", "--data", "pictures/val")
    assert result.exit_code == 0 and "on 24 images" in words


def test_what_is_held_out_does_not_depend_on_the_seed(here):
    parts = [data.open_data(settings("alone", val_share=0.3, seed=seed)) for seed in range(3)]
    assert len({frozenset(names(one.val)) for one in parts}) == 1
    other = data.open_data(settings("alone", val_share=0.3, split_seed=1))
    assert names(other.val) != names(parts[0].val)
    record = json.loads((here / "runs" / "share" / "settings.json").read_text())
    assert (record["settings"]["seed"], record["settings"]["split_seed"]) == (3, 0)


def test_the_division_stays_in_a_resumed_run(here):
    again = ["train", "alone", *SMALL, "--epochs", 1, "--batch-size", 8, "--val-share", 0.3, "--seed", 3]
    result, words = irpe(*again, "--split-seed", 1, "--resume", "runs/share")
    assert result.exit_code == 2 and "--split-seed was 0, is 1" in words


def test_runs_of_before_split_seed_keep_what_they_held_out():
    old = {"data": "alone", "val_share": 0.3, "seed": 3}
    assert settings_from_dict(old).split_seed == 3
    assert settings_from_dict({**old, "val_share": 0.0}).split_seed == 0
    assert settings_from_dict({**old, "split_seed": 0}).split_seed == 0


def test_a_share_where_there_is_something_to_evaluate_on(here, tmp_path):
    result, words = irpe("train", "pictures", *SMALL, "--val-share", 0.3)
    assert result.exit_code == 2
    assert "pictures/val is there to evaluate on: leave --val-share out, or name pictures/train as DATA" in words
    result, words = irpe("train", "pictures", *SMALL, "--val-share", 0.3, "--val-split", "val")
    assert result.exit_code == 2 and "both say what to evaluate on" in words
    result, words = irpe("train", "digits", *SMALL, "--val-share", 0.3)
    assert result.exit_code == 2 and "digits has a part to evaluate on" in words
    shutil.copytree("pictures", tmp_path / "three")
    (tmp_path / "three" / "val").rename(tmp_path / "three" / "test")  # kept for the end
    parts = data.open_data(settings(tmp_path / "three", val_share=0.3))
    assert (len(parts.train), len(parts.val)) == (16, 8)
    last = data.open_data(settings(tmp_path / "three", val_split="test"), train=False)
    assert len(last.val) == 24


def test_splits_of_torchvision_that_timm_would_take_for_others(here, tmp_path):
    with pytest.raises(ValueError, match="has no typo: expected .*pictures/typo"):
        data.open_data(settings("torch/image_folder", data_dir="pictures", val_split="typo"))
    shutil.copytree("alone", tmp_path / "alone")
    with pytest.raises(ValueError, match="has no train: expected .*alone/train"):
        data.open_data(settings("torch/image_folder", data_dir=str(tmp_path / "alone")))
    held = data.open_data(settings("torch/image_folder", data_dir=str(tmp_path / "alone"), val_share=0.3))
    assert (len(held.train), len(held.val)) == (16, 8)


def test_a_folder_called_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = [*SMALL, "--epochs", 1, "--batch-size", 24, "--max-steps", 1, "--no-tensorboard"]
    result, _ = irpe("train", "digits", *common, "--name", "built-in")
    assert result.exit_code == 0, result.output
    pictures(tmp_path / "digits")
    sentence = "digits: there is a folder of this name here; write ./digits for the folder"
    for words in (["train", "digits"], ["evaluate", "runs/built-in", "--data", "digits"], ["detect", "digits"]):
        result, said = irpe(*words)
        assert result.exit_code == 2 and sentence in said, said
    result, words = irpe("train", "./digits", *common, "--name", "folder")
    assert result.exit_code == 0, result.output
    result, words = irpe("evaluate", "runs/folder")
    assert result.exit_code == 0 and "on 24 images" in words
    result, words = irpe("evaluate", "runs/built-in")  # its data was the built-in one
    assert result.exit_code == 0 and "on 300 images" in words


def test_evaluate_finds_the_data_from_another_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("both", "share"):
        result, words = irpe("evaluate", place / "runs" / run)
        assert result.exit_code == 0 and "images" in words
    result, words = irpe("evaluate", place / "runs" / "share", "--data", place / "alone")
    assert result.exit_code == 0 and "on 8 images" in words
    copy = shutil.copytree(place / "runs" / "both", tmp_path / "copy")
    record = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps(record | {"started_in": str(tmp_path / "gone")}))
    result, words = irpe("evaluate", copy)
    assert result.exit_code == 2 and "pictures does not exist" in words and "--data says where it lies now" in words


def test_names_that_are_no_paths_stay(place, tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "shards").mkdir()
    for given, data_dir, found, found_dir in (
        ("digits", None, "digits", None),
        ("torch/cifar10", "shards", "torch/cifar10", str(tmp_path / "shards")),
        ("wds/shards", None, f"wds/{tmp_path / 'shards'}", None),
        ("hfds/cifar10x", "/absent", "hfds/cifar10x", "/absent"),
    ):
        there = data.located(settings(given, data_dir=data_dir), tmp_path)
        assert (there.data, there.data_dir) == (found, found_dir)
    assert settings_of(place / "runs" / "both")[0].data == str(place / "pictures")


def test_one_is_counted_in_the_singular():
    from irpe.runs.files import counted

    assert [counted(n, "category", "categories") for n in (0, 1, 2, 1200)] == [
        "0 categories", "1 category", "2 categories", "1,200 categories",
    ]  # fmt: skip
