"""irpe sweep: rows of the paper's tables on tiny pictures."""

import json

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import MODEL, pictures
from typer.testing import CliRunner

from irpe import rpe_config_from_string
from irpe.__main__ import app
from irpe.cli import sweep
from irpe.train.sweep import TABLES

TINY = [one for one in MODEL if one not in ("--rpe", MODEL[-1])]
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
    data, runner, started = pictures(tmp_path / "pictures", per_class=8), CliRunner(), []

    def start(words):
        started.append(words)
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.exit_code

    monkeypatch.setattr(sweep, "start", start)
    out = tmp_path / "sweep"
    words = ["sweep", "2", str(data), "--out", str(out), *TINY, *ONE_STEP, "--no-plots", "--device", "cpu"]
    result = runner.invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(started) == 4 and all("--resume" in one for one in started)
    for title in ("bias, each head", "bias, shared", "contextual, each head", "contextual, shared", "80.99"):
        assert title in result.output
    assert (out / "table2.png").read_bytes().startswith(b"\x89PNG")
    result = runner.invoke(
        app, [*words, "--seeds", "2", "--json", str(tmp_path / "table.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert len(started) == 8 and " ± " in result.output
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["paper"] for row in table] == [80.54, 80.05, 80.99, 80.89]
    assert all(len(row["top1"]) == 2 and min(row["top1"]) >= 0 for row in table)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["5", "digits"], "table 5; expected one of 1, 2, 3, 4"),
        (["1", "digits", "--rpe", "none"], "--rpe: the sweep sets this"),
    ],
)
def test_refused(words, sentence):
    result = CliRunner().invoke(app, ["sweep", *words])
    assert result.exit_code == 2 and sentence in " ".join(result.output.replace("│", " ").split())


def test_a_run_that_fails_ends_the_sweep(tmp_path):
    result = CliRunner().invoke(app, ["sweep", "2", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
