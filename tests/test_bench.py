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
    assert [(row["what"], row["pass"]) for row in rows] == [
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


def test_encodings_at_one_place_are_told_apart():
    first, second, other = "rpe-1.9-product-ctx-1-k", "rpe-20-cross-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"
    assert list(bench.named([first, other, first])) == ["k", "q, k, v"]
    assert list(bench.named([first, second, other])) == [first, second, other]
    shape = dict(batch=1, device=torch.device("cpu"), seconds=0.0)
    rows = list(bench.attention([(3, 5)], [first, second], heads=1, head_dim=8, dtype=torch.float32, **shape))
    rows += bench.model("test_vit", [first, second], **shape)
    for row in rows:
        assert [name for name in row.seconds if "formula" not in name] == ["without", first, second]


def test_rows_that_were_measured_are_kept(tmp_path, monkeypatch):
    """The fourth one needs more memory than there is."""
    left, in_turns = [1, 2, 3], bench.in_turns

    def short(*arguments):
        if not left:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        left.pop()
        return in_turns(*arguments)

    monkeypatch.setattr(bench, "in_turns", short)
    out = tmp_path / "bench.json"
    result = irpe("bench", *TINY, "--size", "4x2", "--model", "test_vit", "--json", out)
    assert result.exit_code == 1, result.output
    rows = [(row["what"], row["pass"]) for row in json.loads(out.read_text())]
    assert rows == [("3x5", "forward"), ("3x5", "with backward"), ("4x2", "forward")]
    text = words(result)
    assert "4x2forward" in text and "there is not enough memory for this; a smaller --batch-size or --size" in text
    lines = [line for line in result.output.splitlines() if line.startswith(("3x5", "4x2", "   "))]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1  # columns


def test_what_an_accelerator_still_does_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("mps", "cpu", "cuda:0"):
        bench.in_turns({"without": lambda: None}, torch.device(name), 0.0)
    assert [device.type for device in waited] == ["mps"] * 6 + ["cuda"] * 6  # before and after each of three rounds


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
