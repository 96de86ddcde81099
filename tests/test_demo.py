"""irpe/demo.py, irpe/digits.py, irpe/paired.py: splits, canvases, worker processes, and a quick run from end to end."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import FORK, PATIENCE

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits
from typer.testing import CliRunner

from irpe import demo, digits, paired
from irpe.__main__ import app

ROOT = Path(__file__).parent.parent
TINY = dict(epochs=2, limit=64)


def test_splits_are_disjoint_complete_and_stratified():
    parts = digits.splits()
    rows = {name: set(part.rows.tolist()) for name, part in parts.items()}
    assert [len(rows[name]) for name in ("train", "test", "fit", "valid")] == [1200, 597, 900, 300]
    assert not rows["train"] & rows["test"]
    assert rows["train"] | rows["test"] == set(range(1797))
    assert not rows["fit"] & rows["valid"]
    assert rows["fit"] | rows["valid"] == rows["train"]
    data = load_digits()
    for part in parts.values():
        assert len(part.rows) == len(set(part.rows.tolist()))
        np.testing.assert_array_equal(part.images[:, 0].numpy() * 16, data.images[part.rows.numpy()])
        np.testing.assert_array_equal(part.labels.numpy(), data.target[part.rows.numpy()])
        share = part.labels.bincount(minlength=10) / len(part.labels)
        assert (share - torch.from_numpy(data.target).bincount() / 1797).abs().max() < 0.005


@pytest.mark.parametrize("width", digits.WIDTHS)
def test_canvases_hold_each_digit_at_every_even_column_and_nothing_else(width):
    test = digits.splits()["test"]
    canvases = digits.on_canvas(test, width)
    columns = range(0, width - 7, 2)
    assert canvases.images.shape == (597 * len(columns), 1, 8, width)
    for number, (digit, label, row) in enumerate(zip(*test, strict=True)):
        for place, column in enumerate(columns):
            expected = torch.zeros(1, 8, width)
            expected[:, :, column : column + 8] = digit
            image, same_label, same_row = (part[number * len(columns) + place] for part in canvases)
            assert torch.equal(image, expected) and same_label == label and same_row == row


@pytest.mark.parametrize("width", [6, 9, 0])
def test_canvases_of_wrong_width(width):
    with pytest.raises(ValueError, match=f"width={width}; expected an even number"):
        digits.on_canvas(digits.splits()["test"], width)


@pytest.mark.parametrize("side", [demo.NONE, demo.ABSOLUTE, *demo.RPE, "rpe-2.0-cross-bias-0-qk"])
def test_models_take_every_canvas_and_decay_only_matrices(side):
    model = demo.build_model(side)
    for width in digits.WIDTHS:
        assert model(torch.rand(2, 1, 8, width)).shape == (2, 10)
    decayed, spared = (group["params"] for group in paired.parameter_groups(model))
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim > 1 for parameter in decayed)
    assert not any("lookup_table" in names[parameter] or "pos_embed" in names[parameter] for parameter in decayed)
    assert [group["weight_decay"] for group in paired.parameter_groups(model)] == [paired.WEIGHT_DECAY, 0]


def test_the_rates_are_those_that_were_chosen_on_validation_images():
    results = Path(demo.__file__).resolve().parents[1] / "benchmarks" / "results" / "digits_tune_cpu.json"
    found = json.loads(results.read_text())
    assert found["chosen"] == demo.RATES
    assert found["recipe"]["test_on"] == "valid" and found["recipe"]["epochs"] == demo.Run.epochs
    assert {run["seed"] for run in found["runs"]} == {*demo.TUNE_SEEDS}
    assert {run["lr"] for run in found["runs"]} == {*demo.GRID}


def test_sides_differ_in_positions_alone():
    counts = {side: sum(p.numel() for p in demo.build_model(side).parameters()) for side in (*demo.RATES,)}
    bare = counts[demo.NONE]
    assert counts[demo.ABSOLUTE] - bare == 16 * 48
    assert counts[demo.RPE[0]] - bare == 3 * 16 * 49
    assert counts[demo.RPE[1]] - bare == 3 * 3 * 16 * 49


def test_a_seed_gives_all_sides_the_same_weights_but_for_positions():
    states = {}
    for side in demo.RATES:
        torch.manual_seed(5)
        states[side] = demo.build_model(side).state_dict()
    for name, weight in states[demo.NONE].items():
        assert all(torch.equal(weight, state[name]) for state in states.values()), name
    for side, extra in ((demo.ABSOLUTE, 1), (demo.RPE[0], 3), (demo.RPE[1], 9)):
        assert len(states[side]) == len(states[demo.NONE]) + extra


def test_without_positions_a_model_cannot_tell_where_the_patches_are():
    image = torch.rand(1, 1, 8, 12)
    swapped = torch.cat([image[..., 6:], image[..., :6]], -1)
    for side, same in ((demo.NONE, True), (demo.ABSOLUTE, False), (demo.RPE[0], False)):
        torch.manual_seed(0)
        model = demo.build_model(side).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lookup_table" in name:
                    parameter.normal_()
        assert torch.allclose(model(image), model(swapped), atol=1e-5) is same


def strip(result):
    return {key: value for key, value in result.items() if "seconds" not in key and key != "state"}


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers():
    runs = [demo.Run(side, seed, 4e-3, **TINY) for side, seed in ((demo.RPE[1], 0), (demo.ABSOLUTE, 1), (demo.NONE, 0))]
    told = []
    one = paired.fit_all(demo.fit, runs, 1, lambda index, epoch: told.append((index, epoch)))
    two = paired.fit_all(demo.fit, runs, 2)
    assert sorted(told) == [(index, epoch) for index in range(3) for epoch in (1, 2)]
    for a, b, run in zip(one, two, runs, strict=True):
        assert (a["side"], a["seed"], a["lr"]) == (run.side, run.seed, run.lr)
        assert strip(a) == strip(b)
        assert a["state"].keys() == b["state"].keys()
        assert all(np.array_equal(a["state"][name], b["state"][name]) for name in a["state"])
    assert any(np.abs(one[0]["state"][name]).max() > 0 for name in one[0]["state"] if "lookup_table" in name)


def test_an_exception_in_a_worker_arrives_with_its_reason(monkeypatch):
    # as the command starts a worker is seen in the quick run below
    context = multiprocessing.get_context("fork" if FORK else "spawn")
    monkeypatch.setattr(paired.multiprocessing, "get_context", lambda kind: context)
    with pytest.raises(ValueError, match="it has another form"):
        paired.fit_all(demo.fit, [demo.Run("nonsense", 0, 4e-3, **TINY), demo.Run(demo.NONE, 0, 4e-3, **TINY)], 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        "import multiprocessing\n"
        "from irpe import demo, paired\n"
        "def tell(index, epoch):\n"
        "    print(*[one.pid for one in multiprocessing.active_children()], flush=True)\n"
        "if __name__ == '__main__':\n"
        "    paired.fit_all(demo.fit, [demo.Run('none', 0, 4e-3, epochs=10**7, limit=64)], 1, tell)\n",
        "import os, time\n"
        "from benchmarks.cifar10 import work\n"
        "if __name__ == '__main__':\n"
        "    with work.pool(1) as workers:\n"
        "        print(workers.submit(os.getpid).result(), flush=True)\n"
        "        workers.submit(time.sleep, 10**6).result()\n",
    ],
    ids=["demo", "make results"],
)
def test_workers_end_when_their_parent_is_killed(lines, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(lines)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
        if time.monotonic() > end:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker outlived its parent")
        time.sleep(0.1)


def test_summary_and_choice_of_the_rate():
    def result(side, seed, lr, *final):
        accuracy = {8: [0.0, final[0]], 16: [0.0, final[1]]}
        return dict(side=side, seed=seed, lr=lr, accuracy=accuracy, parameters=7, seconds=2.0, cpu_seconds=1.0)

    rows = paired.summarise(
        [result("none", 0, 1e-3, 70, 9), result("none", 1, 1e-3, 80, 9), result("none", 0, 2e-3, 75, 99),
         result("none", 1, 2e-3, 75, 99), result("absolute", 0, 2e-3, 60, 1)]
    )  # fmt: skip
    assert [(row["side"], row["lr"], row["seeds"]) for row in rows] == [
        ("none", 1e-3, [0, 1]), ("none", 2e-3, [0, 1]), ("absolute", 2e-3, [0])
    ]  # fmt: skip
    assert rows[0]["accuracy"][8] == {"mean": 75, "std": math.sqrt(50), "min": 70, "max": 80}
    assert rows[2]["accuracy"][8]["std"] == 0
    assert paired.best_rates(rows) == {"none": 1e-3, "absolute": 2e-3}  # the wide canvas has no say
    rows[1]["accuracy"][8]["mean"] = 76.0
    assert paired.best_rates(rows)["none"] == 1e-3
    rows[1]["accuracy"][8]["mean"] = 76.1
    assert paired.best_rates(rows)["none"] == 2e-3


def test_differences_are_those_of_pairs_with_the_same_seed():
    def result(side, seed, *final):
        return dict(side=side, seed=seed, accuracy={8: [1.0, final[0]], 16: [99.0, final[1]]})

    results = [result("k", 3, 90, 50), result("none", 4, 60, 40), result("none", 3, 80, 40), result("k", 4, 80, 40)]
    results += [result("k", 5, 0, 0), result("qkv", 4, 70, 41)]  # without a partner in "none", and with one alone
    first, second = paired.differences(results, [("k", "none"), ("qkv", "none")])
    assert (first["side"], first["other"], first["seeds"]) == ("k", "none", [3, 4])
    assert first["difference"][8] == {"mean": 15, "error": pytest.approx(math.sqrt(50) / math.sqrt(2))}
    assert first["difference"][16] == {"mean": 5, "error": pytest.approx(5)}
    assert second["seeds"] == [4] and second["difference"][8] == {"mean": 10, "error": None}
    with pytest.raises(ValueError, match="'qkv' and 'k' have no seed in common"):
        paired.differences([*results[:-1], result("qkv", 9, 1, 1)], [("qkv", "k")])


def test_queries_that_are_drawn_begin_on_ink():
    state = {name: weight.numpy() for name, weight in demo.build_model(demo.RPE[0]).state_dict().items()}
    learned = demo.encodings({"side": demo.RPE[0], "state": state})
    assert learned.mean.shape == (3, 3, 7, 7) and learned.title == "iRPE on k"
    for image, (row, column) in zip(learned.images, learned.at, strict=True):
        assert image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean() > 0.3


def test_sides_without_an_encoding_on_keys_have_no_picture():
    state = {name: one.numpy() for name, one in demo.build_model("rpe-1.9-product-ctx-1-v").state_dict().items()}
    assert demo.encodings({"side": "rpe-1.9-product-ctx-1-v", "state": state}) is None


def test_a_quick_run_writes_everything(tmp_path):
    command = [
        "train",
        "--quick",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--first-seed",
        "3",
        "--workers",
        "1",
        "--out",
        str(tmp_path),
        "--name",
        "one",
    ]
    result = CliRunner().invoke(app, [*command, "--rpe", "rpe-2.0-product-ctx-1-k"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for words in ("none", "learned absolute", "rpe-2.0-product-ctx-1-k", "8×12", "smoke run", "Points ahead"):
        assert words in result.output
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        "accuracy.png", "samples.png", "buckets.png", "irpe.png", "encodings-rpe-2.0-product-ctx-1-k.png",
        "none-seed3.pt", "absolute-seed3.pt", "rpe-2.0-product-ctx-1-k-seed3.pt", "results.json",
    }  # fmt: skip
    assert all(name in result.output.replace("\n", "") for name in names)
    record = json.loads((tmp_path / "one" / "results.json").read_text())
    assert record["quick"] is True
    assert record["machine"]["torch"] in torch.__version__ and record["machine"]["date"].count("-") == 2
    (gain,) = record["differences"]
    assert (gain["side"], gain["other"], gain["seeds"]) == ("rpe-2.0-product-ctx-1-k", "absolute", [3, 4])
    assert [(run["side"], run["seed"]) for run in record["runs"]] == [
        (side, seed) for seed in (3, 4) for side in ("rpe-2.0-product-ctx-1-k", "absolute", "none")
    ]
    assert [row["side"] for row in record["summary"]] == ["none", "absolute", "rpe-2.0-product-ctx-1-k"]
    model = demo.build_model("rpe-2.0-product-ctx-1-k")
    model.load_state_dict(torch.load(tmp_path / "one" / "rpe-2.0-product-ctx-1-k-seed3.pt", weights_only=True))
    best = record["runs"][0]["accuracy"]["8"][-1]
    assert demo.accuracy(model, digits.splits()["test"]) == pytest.approx(best)
