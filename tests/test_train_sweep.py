"""irpe sweep: rows of the paper's tables on tiny pictures."""

import json

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import TINY, irpe, pictures, words
from typer.testing import CliRunner

from irpe import rpe_config_from_string
from irpe.__main__ import app
from irpe.cli import sweep
from irpe.train.sweep import TABLES

ONE_STEP = ["--recipe", "small", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--loader-workers", "0"]


def test_rows_are_those_of_the_paper():
    assert {number: len(rows) for number, rows in TABLES.items()} == {1: 9, 2: 4, 3: 4, 4: 12}
    for rows in TABLES.values():
        assert len({row.name(0) for row in rows}) == len(rows)
        for row in rows:
            assert row.rpe == "none" or rpe_config_from_string(row.rpe)
            assert 77 < row.paper < 82
    assert {row.title: row.paper for row in TABLES[4]}["no positions, none"] == 77.6
    assert {row.title: row.paper for row in TABLES[1]}["cross, contextual"] == 80.8


def test_a_sweep_runs_what_has_not_ended_and_shows_all(tmp_path, monkeypatch):
    data, started = pictures(tmp_path / "pictures", per_class=8), []

    def start(words, processes):
        started.append(words)
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0 and processes == 1, result.output
        return result.exit_code

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "sweep-pictures"
    given = ["sweep", "2", data, *TINY, *ONE_STEP, "--no-plots", "--device", "cpu"]
    result = irpe(*given)
    assert result.exit_code == 0, result.output
    assert len(started) == 4 and all("--resume" in one for one in started)
    for title in ("bias, each head", "bias, shared", "contextual, each head", "contextual, shared", "80.99"):
        assert title in result.output
    assert (out / "table2.png").read_bytes().startswith(b"\x89PNG")
    result = irpe(*given, "--seeds", 2, "--json", tmp_path / "tables" / "table.json")
    assert result.exit_code == 0, result.output
    assert len(started) == 8 and " ± " in result.output
    table = json.loads((tmp_path / "tables" / "table.json").read_text())
    assert [row["paper"] for row in table] == [80.54, 80.05, 80.99, 80.89]
    assert all(len(row["top1"]) == 2 and min(row["top1"]) >= 0 for row in table)

    # what is there is of these data and these settings, or an error
    refused = irpe(*given, "--lr", "0.5")
    assert refused.exit_code == 2 and "is of a run with other settings: --lr was 0.001, is 0.5. Use another --out" in (
        words(refused)
    )
    given[2] = "nope"
    refused = irpe(*given, "--out", out)
    # long paths are broken anywhere
    assert refused.exit_code == 2 and f"DATAwas{data},isnope.Useanother--out" in words(refused).replace(" ", "")
    assert len(started) == 8
    # a run that was ended early goes on
    given[2] = data
    longer = [*given, "--out", tmp_path / "longer", "--epochs", "2"]
    assert irpe(*longer, "--max-steps", 1).exit_code == 0 and len(started) == 12
    assert irpe(*longer).exit_code == 0 and len(started) == 16
    assert irpe(*longer).exit_code == 0 and len(started) == 16


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["5", "digits"], "table 5; expected one of 1, 2, 3, 4"),
        (["1", "digits", "--rpe", "none"], "--rpe: the sweep sets this"),
        (["1", "digits", "--epoks", "3"], "No such option"),
        (["1", "digits", "--epochs", "0"], "--epochs"),
        (["1", "digits", "--recipe", "grand"], "--recipe grand; expected one of"),
    ],
)
def test_refused(words, sentence):
    result = CliRunner().invoke(app, ["sweep", *words])
    assert result.exit_code == 2 and sentence in " ".join(result.output.replace("│", " ").split())


def test_torchrun_starts_the_runs_of_a_sweep_not_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a sweep is one process, which starts the others" in words(irpe("sweep", "2", "digits"))
    monkeypatch.delenv("WORLD_SIZE")
    run = sweep.subprocess.run
    seen = []
    monkeypatch.setattr(sweep.subprocess, "run", lambda words: seen.append(words) or run([words[0], "-c", "exit(3)"]))
    result = irpe("sweep", "2", "digits", "--nproc-per-node", 2, "--out", tmp_path)
    assert result.exit_code == 3
    assert seen[0][1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert seen[0][7:10] == ["irpe", "train", "digits"]


def test_a_run_that_fails_ends_the_sweep(tmp_path):
    result = CliRunner().invoke(app, ["sweep", "2", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
