"""irpe compare: rows of runs that differ in the seed alone."""

import json
import shutil

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import RPE, SMALL, log, pictures
from typer.testing import CliRunner

from irpe.__main__ import app
from irpe.train import compare


def irpe(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return result, " ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in result.output).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = pictures(tmp_path_factory.mktemp("pictures", numbered=False), per_class=10)
    out = tmp_path_factory.mktemp("runs")
    bare = [one for one in SMALL if one not in ("--rpe", RPE)]
    for name, rpe, seed in (("none-0", "none", 0), ("none-1", "none", 1), ("k-0", RPE, 0), ("k-1", RPE, 1)):
        given = ["train", folder, *bare, "--batch-size", 20, "--rpe", rpe, "--seed", seed, "--out", out, "--name", name]
        assert irpe(*given)[0].exit_code == 0
    return out


def test_the_command_of_the_page(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.parent)
    folders = [f"{runs.name}/{name}" for name in ("none-0", "none-1", "k-0", "k-1")]
    result, words = irpe("compare", *folders, "--json", tmp_path / "a.json", "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    none, k = json.loads((tmp_path / "a.json").read_text())
    assert (none["title"], k["title"]) == ("no iRPE", RPE)
    assert none["seeds"] == k["seeds"] == [0, 1]
    assert k["parameters"] > none["parameters"]
    assert "±" in words
    finals = [log(runs / name, "epoch")[-1]["val"]["top1"] for name in ("k-0", "k-1")]
    assert k["last"]["mean"] == pytest.approx(sum(finals) / 2)
    assert k["last"]["std"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
    assert none["average"] is None
    assert "2/2" in words and "no iRPE" in words


def test_a_run_that_ended_within_an_epoch_and_went_on(runs, tmp_path):
    """Its first epoch was measured twice; the other seed's once."""
    for seed, steps in ((0, (1, 0)), (1, (0,))):
        for more in steps:
            given = ["train", runs.parent / "pictures", *SMALL, "--batch-size", 20, "--seed", seed, "--max-steps", more]
            result, _ = irpe(*given, "--out", tmp_path, "--name", seed, "--resume", "auto")
            assert result.exit_code == 0, result.output
    assert len(log(tmp_path / "0", "epoch")) == 3 and len(log(tmp_path / "1", "epoch")) == 2
    result, words = irpe("compare", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").exists() and "2/2" in words
    _, words = irpe("compare", tmp_path / "0", "--out", tmp_path / "a.png")
    assert "±" not in words.replace("mean ± deviation", "")


def test_rows_are_named_by_what_differs(runs):
    groups = compare.grouped([compare.load(runs / name) for name in ("none-0", "none-1")])
    assert [(group.title, len(group.runs)) for group in groups] == [("vit_tiny_patch16_224, no iRPE", 2)]


def test_what_cannot_be_compared(runs, tmp_path):
    shutil.copytree(runs / "k-0", tmp_path / "copy")
    _, words = irpe("compare", runs / "k-0", tmp_path / "copy")
    assert "two runs differ in nothing, not even the seed" in words
    lines = (tmp_path / "copy" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "log.jsonl").write_text("".join(lines[:1]))
    record = json.loads((tmp_path / "copy" / "settings.json").read_text())
    record["settings"]["seed"] = 5
    (tmp_path / "copy" / "settings.json").write_text(json.dumps(record))
    _, words = irpe("compare", runs / "k-0", tmp_path / "copy")
    assert "are of different lengths" in words
    (tmp_path / "copy" / "log.jsonl").write_text("")
    result, words = irpe("compare", tmp_path / "copy")
    assert result.exit_code == 2 and "has no measured epoch yet" in words
    assert "expected the folder of a run" in irpe("compare", tmp_path)[1]
