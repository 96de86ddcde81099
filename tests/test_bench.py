"""`irpe bench`: rows of attention and of a model, each variant beside the one without encodings."""

import json

import pytest
import torch
from train_tiny import irpe, words

from irpe import bench

pytest.importorskip("timm")
TINY = ["--size", "3x5", "--batch-size", "1", "--heads", "2", "--head-dim", "8", "--seconds", "0", "--device", "cpu"]


def test_a_table_of_attention_and_of_a_model(tmp_path):
    out = tmp_path / "new" / "bench.json"
    result = irpe("bench", *TINY, "--model", "test_vit", "--rpe", "rpe-1.9-cross-ctx-1-qk", "--json", out)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    passes = ["forward", "with backward"]
    assert [(row["what"], row["pass_"]) for row in rows] == [
        *(("3x5", name) for name in passes),
        ("test_vit", "inference"),
        ("test_vit", "with backward"),
    ]
    for row in rows:
        names = ["without", "q, k", "q, k, formula"] if row["what"] == "3x5" else ["without", "q, k"]
        assert list(row["seconds"]) == names and row["ratios"]["without"] == 1
        assert all(spent > 0 for spent in row["seconds"].values())
        assert row["ratios"]["q, k"] == row["seconds"]["q, k"] / row["seconds"]["without"]
    text = words(result)
    assert "q, k, formula" in text and f"{rows[0]['ratios']['q, k']:.2f}" in text


def test_every_run_has_its_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def run(name, spent):
        order.append(name)
        now[0] += spent

    runs = {"without": lambda: run("without", 2.0), "k": lambda: run("k", 3.0)}
    found = bench.in_turns(runs, torch.device("cpu"), 16.0)
    assert order == ["without", "k"] * 5  # one round before the clock, then four of five seconds
    assert found == {"without": 2.0, "k": 3.0}
    assert bench.Row("", "", found).ratios() == {"without": 1.0, "k": 1.5}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--size", "14"], "--size 14; expected HEIGHTxWIDTH in tokens, such as 14x14"),
        (["--size", "0x3"], "--size 0x3; expected HEIGHTxWIDTH"),
        (["--dtype", "int8"], "--dtype int8; expected one of float32, bfloat16, float16"),
        (["--rpe", "product"], "expected rpe-RATIO-METHOD-MODE-SHARED-ON"),
        (["--device", "abacus"], "--device abacus; expected auto, cpu, cuda"),
        (["--model", "nothing_of_timm", "--seconds", "0"], "--model nothing_of_timm: Unknown model"),
    ],
)
def test_what_is_refused(options, sentence):
    result = irpe("bench", *TINY, *options)
    assert result.exit_code == 2 and sentence in words(result), result.output
