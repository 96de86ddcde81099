"""`make results`: its data, what all arms share, what fits in a budget, going on, and the tables of its figures."""

import hashlib
import json
import pickle
import re
import sys
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))
from benchmarks.cifar10 import __main__ as command
from benchmarks.cifar10 import arms, collect, data, fit, plan, report, work
from irpe import paired

TINY = fit.Effort(pictures=24, epochs=2, test_pictures=8, batch=8, width=12, heads=3, depth=1)
OPTIONS = [f"--{name.replace('_', '-')}={getattr(TINY, name)}" for name in command.OF_EFFORT]
ALL = list({arm.name: arm for part in arms.PARTS.values() for arm in part}.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """train and test of ten classes, one color each."""
    root = tmp_path_factory.mktemp("cifar10")
    for part, count in (("train", 3), ("test", 2)):
        for label in range(10):
            place = root / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), 20 * label, np.uint8)
                pixels[number, :7] = 255
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def of_torchvision(root, images, labels, monkeypatch):
    """The same as files of torchvision's CIFAR10, one for each part."""
    place = root / data.CIFAR10.base_folder
    place.mkdir(parents=True)

    def put(name, values):
        (place / name).write_bytes(content := pickle.dumps(values))
        return hashlib.md5(content).hexdigest()

    for part in data.PARTS:
        rows = images[part].permute(0, 1, 2, 3).reshape(len(images[part]), -1).numpy()
        md5 = put(part, {"data": rows, "labels": labels[part].tolist()})
        monkeypatch.setattr(data.CIFAR10, f"{part}_list", [[part, md5]])
    names = put("batches.meta", {"label_names": [f"class{label}" for label in range(10)]})
    monkeypatch.setattr(data.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names})


def test_folders_and_what_torchvision_keeps_are_the_same_tensors(folders, tmp_path, monkeypatch):
    found = data.tensors(folders, tmp_path / "one.pt")
    assert found["train"].shape == (30, 3, 32, 32) and found["train"].dtype == torch.uint8
    assert found["test labels"].bincount().tolist() == [2] * 10
    for part in data.PARTS:
        assert torch.equal(found[part][:, 0, -1, -1].long(), 20 * found[f"{part} labels"])
    assert len(set(found["train labels"][:10].tolist())) > 3  # not the first classes alone
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).argsort()
    sides = {"train": order, "test": torch.randperm(20, generator=torch.Generator().manual_seed(0)).argsort()}
    images = {part: found[part][sides[part]] for part in data.PARTS}
    labels = {part: found[f"{part} labels"][sides[part]] for part in data.PARTS}
    of_torchvision(tmp_path / "torchvision", images, labels, monkeypatch)
    other = data.tensors(tmp_path / "torchvision", tmp_path / "two.pt")
    assert all(torch.equal(other[name], found[name]) for name in found)


def test_pictures_are_decoded_once(folders, tmp_path, monkeypatch):
    first = data.tensors(folders, tmp_path / "kept.pt")
    monkeypatch.delattr(data, "pictures")
    assert torch.equal(data.tensors(folders, tmp_path / "kept.pt")["train"], first["train"])


def test_other_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no train; expected train and test .* or cifar-10-batches-py"):
        data.tensors(tmp_path, tmp_path / "kept.pt")
    for part in data.PARTS:
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (40, 24)).save(tmp_path / part / "a" / "0.png")
    with pytest.raises(ValueError, match="have 40x24 pixels; expected 32x32"):
        data.tensors(tmp_path, tmp_path / "kept.pt")
    assert not (tmp_path / "kept.pt").exists()


def test_each_picture_has_a_crop_of_its_own():
    images = torch.randint(256, (6, 3, 5, 7), dtype=torch.uint8)
    moves = torch.tensor([[0, 8, 0], [8, 0, 1], [4, 4, 0], [4, 4, 1], [3, 6, 1], [7, 2, 0]])
    found = data.augmented(images, moves)
    for image, (row, column, mirrored), one in zip(images, moves.tolist(), found, strict=True):
        padded = torch.zeros(3, 5 + 8, 7 + 8, dtype=torch.uint8)
        padded[:, 4:-4, 4:-4] = image
        crop = padded[:, row : row + 5, column : column + 7]
        torch.testing.assert_close(one, data.normalised(crop.flip(-1) if mirrored else crop))
    torch.testing.assert_close(found[2], data.normalised(images[2]))


def test_moves_reach_every_place_and_orders_every_picture():
    order, moves = data.epoch(3000, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(3000))
    assert [sorted(set(one.tolist())) for one in moves.T] == [list(range(9)), list(range(9)), [0, 1]]


def test_pictures_are_stretched():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[..., 16:] = 255
    found = data.resized(images, 24, 40)
    assert found.shape == (1, 3, 24, 40)
    torch.testing.assert_close(found[0, :, 3, [0, -1]], data.normalised(images)[0, :, 0, [0, -1]])


def test_arms_share_weights_and_differ_in_positions():
    """Also a batch of pictures that are not square: before training, arms without other positions are one model."""
    images = torch.randn(2, 3, 24, 40)
    shape = TINY.shape
    plain, first = arms.build(arms.WITHOUT, shape, 0).eval(), None
    other = arms.build(arms.WITHOUT, shape, 1).state_dict()
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], plain.state_dict()["blocks.0.attn.qkv.weight"])
    with torch.no_grad():
        expected = None
        for arm in ALL:
            model = arms.build(arm, shape, 0).eval()
            state = model.state_dict()
            assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())
            more = {name for name in state if name not in plain.state_dict()}
            assert ("pos_embed" in more) == (arm.positions == arms.LEARNED)
            assert any("lookup_table" in name for name in more) == (arm.rpe is not None)
            if arm.positions == arms.LEARNED:
                first = state["pos_embed"] if first is None else first
                assert torch.equal(state["pos_embed"], first) and first.std() > 0.01
            model.blocks[0].attn.qkv.weight *= 30  # so that attention looks at something
            expected = model(images) if expected is None else expected
            same = torch.allclose(model(images), expected, atol=1e-6)
            assert same == (arm.positions == arms.NONE), arm


def test_the_rotary_model_is_the_others_but_for_the_turns(monkeypatch):
    from timm.layers import attention

    images = torch.randn(2, 3, 32, 48)
    plain, rotary = (arms.build(arm, TINY.shape, 0).eval() for arm in (arms.WITHOUT, arms.ROPE))
    name = "apply_rot_embed_cat"
    assert hasattr(attention, name)
    monkeypatch.setattr(attention, name, lambda x, *args, **kwargs: x)
    torch.testing.assert_close(rotary(images), plain(images))


def test_the_table_of_biases_has_a_number_for_each_offset_of_the_training_size():
    """As Swin's has for a window of 8x8 tokens."""
    from irpe import get_bucket_ids_2d, rpe_config_from_string

    one = rpe_config_from_string(arms.SWIN.rpe).rpe_k
    ids, count = get_bucket_ids_2d(one.method, 8, 8, 0, one.alpha, one.beta, one.gamma)
    assert count == 15 * 15 == len(ids.unique()) and not one.shared_head and one.mode == "bias"


def test_buckets_are_as_many_as_their_titles_say():
    from irpe import rpe_config_from_string

    for arm in arms.BUCKETS:
        side = int(arm.title.split("x")[0])
        assert rpe_config_from_string(arm.rpe).rpe_k.num_buckets == side**2


def test_the_papers_figures_are_those_of_its_tables():
    from irpe.train import sweep

    paper = {(row.rpe, bool(row.options)): row.paper for number in (1, 4) for row in sweep.TABLES[number]}
    for arm in (*arms.MAIN, *arms.TABLE1):
        if arm.paper is not None:
            assert arm.paper == paper[arm.rpe or "none", arm.positions == arms.NONE], arm
    heads = {row.rpe: row.paper for row in sweep.TABLES[2]}
    assert {arm.rpe: arm.paper for arm in arms.TABLE2} == heads


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, count in (("train", 32), ("test", 16)):
        found[part] = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        found[f"{part} labels"] = torch.randint(10, (count,), generator=generator)
    return found


def test_arms_see_the_same_batches_and_a_seed_has_others(tensors, monkeypatch):
    seen = []
    step = fit.Training.step

    def record(self, images, labels):
        seen.append((images.clone(), labels))
        return step(self, images, labels)

    monkeypatch.setattr(fit.Training, "step", record)
    batches = {}
    for arm, seed in ((arms.WITHOUT, 0), (arms.MAIN[3], 0), (arms.ROPE, 0), (arms.WITHOUT, 1)):
        seen.clear()
        fit.fit(fit.Run(arm, seed, 1e-3, TINY, False), tensors, "cpu")
        batches[arm.name, seed] = list(seen)
        assert len(seen) == TINY.epochs * TINY.pictures // TINY.batch
    first = batches["none", 0]
    for key, found in batches.items():
        same = all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(found, first, strict=True))
        assert same == (key[1] == 0), key


def test_a_run_again_is_the_same_and_says_what_it_was(tensors):
    run = fit.Run(arms.ABSOLUTE, 0, 1e-2, replace(TINY, epochs=3), False)
    first, second = (fit.fit(run, tensors, "cpu") for _ in range(2))
    for key in ("loss", "curve", "accuracy", "parameters"):
        assert first[key] == second[key], key
    assert set(first["accuracy"]) == {"32x32", "32x48", "24x40", "48x48"} and len(first["curve"]) == 3
    assert first["loss"][-1] < first["loss"][0]
    assert first["settings"]["lr"] == 1e-2 and first["settings"]["effort"]["batch"] == 8
    assert first["machine"]["torch"] == torch.__version__ and first["seconds"] > first["training seconds"] > 0


def test_a_pilot_is_measured_on_pictures_that_no_run_trains_on(tensors, monkeypatch):
    assert all(effort.pictures <= 50_000 - fit.HELD_OUT for effort in plan.EFFORTS)
    measured = []
    monkeypatch.setattr(fit, "HELD_OUT", 8)
    monkeypatch.setattr(fit.Training, "accuracy", lambda self, images, labels, size: measured.append(images) or 0.0)
    found = fit.fit(fit.Run(arms.ABSOLUTE, 100, 1e-3, TINY, False, pilot=True), tensors, "cpu")
    assert list(found["accuracy"]) == ["32x32"]
    assert torch.equal(measured[-1], tensors["train"][-8:])


def test_tables_and_positions_are_not_decayed():
    model = arms.build(next(arm for arm in arms.MAIN if arm.rpe and arm.positions == arms.LEARNED), TINY.shape, 0)
    decayed, free = ({id(one) for one in group["params"]} for group in paired.parameter_groups(model))
    names = {name: id(one) for name, one in model.named_parameters()}
    assert decayed | free == set(names.values())
    assert {name for name, one in names.items() if one in decayed} == {
        *("patch_embed.proj.weight", "head.weight"),
        *(f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }


RATES = plan.Rates({arm.name: 1e-4 for arm in arms.MAIN} | {arms.MAIN[3].name: 2e-4}, 1e-5)


def planned(budget, processes=1, efforts=plan.EFFORTS):
    return plan.plan(lambda shape: RATES, budget, processes, efforts)


def test_the_most_important_comes_first_and_in_pairs():
    runs = plan.ordered(TINY, 1e-3, True)
    names = [run.name for _, run in runs]
    assert len(set(names)) == len(names) == 30 + 3 * (7 + 2 + 4) + 20
    assert [run.arm for _, run in runs[:10]] == list(arms.MAIN) and {run.seed for _, run in runs[:10]} == {0}
    assert [part for part, _ in runs] == (
        ["main"] * 30 + ["table 1"] * 21 + ["table 2"] * 6 + ["buckets"] * 12 + ["main, more seeds"] * 20
    )


def test_a_run_costs_its_steps_and_its_tests():
    run = fit.Run(arms.MAIN[3], 0, 1e-3, TINY, True)
    steps, tests = 24 * 2 * 2e-4, 8 * (1 + 1.5 + 24 * 40 / 1024 + 2.25 + 2 / 4) * 1e-5
    assert plan.seconds_of(run, RATES) == pytest.approx(steps + tests)
    assert plan.seconds_of(replace(run, arm=arms.BUCKETS[0]), RATES) < plan.seconds_of(run, RATES)


def test_more_budget_is_longer_runs_and_main_arms_take_half_of_it():
    budgets = (600, 3_000, 10_000, 30_000)
    found = [planned(seconds) for seconds in budgets]
    lengths = [one.effort.epochs * one.effort.pictures for one in found]
    assert lengths == sorted(set(lengths))
    assert all(one.count >= 30 and one.seconds <= seconds for seconds, one in zip(budgets, found, strict=True))
    for seconds, one in zip(budgets, found, strict=True):
        main = [run for part, run in plan.ordered(one.effort, 1e-3, True) if part == "main"]
        assert sum(plan.seconds_of(run, RATES) for run in main) < seconds / 2
    assert planned(6_000, processes=4).effort == planned(24_000).effort


def test_larger_models_are_measured_where_they_could_fit():
    asked = []

    def rates(shape):
        asked.append(shape)
        return plan.Rates(dict.fromkeys(RATES.train, 1e-4 * shape.width), 1e-5, shape.width < 100)

    small = plan.plan(rates, 600, 1)
    assert small.effort == plan.EFFORTS[0] and small.amp and set(asked) == {plan.EFFORTS[0].shape}
    asked.clear()
    assert plan.plan(rates, 110_000, 1).effort.width == 96 and asked[-1].width == 192
    assert not plan.plan(rates, 1e9, 1).amp


def test_what_does_not_fit_is_named():
    small = plan.EFFORTS[:1]
    whole, half = planned(105.0, efforts=small), planned(52.5, efforts=small)
    assert half.count < 30 < whole.count and "main" not in whole.left_out
    assert sum(half.left_out.values()) + half.count == len(plan.ordered(TINY, 1e-3, True))
    assert half.seconds <= 52.5
    words = half.words()
    assert f"{half.count} runs of 4 epochs on 4,000 pictures" in words and "21 of table 1" in words
    assert planned(1e9, efforts=small).words().endswith("left out: nothing")


def test_budgets_are_read(capsys):
    assert [plan.parsed(words) for words in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    with pytest.raises(ValueError, match=r"budget '10'; expected a number and s, m or h"):
        plan.parsed("10")
    with pytest.raises(SystemExit):
        command.parser().parse_args(["data", "--budget", "10"])
    assert "budget '10'; expected a number and s, m or h, such as 10m" in capsys.readouterr().err
    assert command.parser().parse_args(["data"]).budget == 600


def test_steps_are_measured_side_by_side():
    found = work.measured(TINY.shape, False, "cpu", rounds=1, batch=2)
    assert set(found) == {arm.name for arm in arms.MAIN} | {"test"}
    assert all(one["median"] > 0 and one["cost"] > 0 for one in found.values())


class Here:
    """A pool whose work is done at once, in this process."""

    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, call, *args):
        done = Future()
        done.set_result(call(*args))
        return done


def test_the_command_goes_on_where_it_was_stopped(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "pool", Here)
    monkeypatch.setattr(fit, "HELD_OUT", 6)
    trained = []
    train = work.fit

    def counted(run, *args):
        if len(trained) == stop:
            raise KeyboardInterrupt
        trained.append(run.name)
        return train(run, *args)

    monkeypatch.setattr(work, "fit", counted)
    monkeypatch.setattr(plan, "PARTS", {"main": arms.MAIN[:3], "table 1": (arms.ABSOLUTE, arms.TABLE1[2])})
    monkeypatch.setattr(plan, "MAIN", arms.MAIN)
    monkeypatch.setattr(plan, "SEEDS", range(2))
    monkeypatch.setattr(plan, "MORE_SEEDS", range(2, 3))
    figures = tmp_path / "figures.json"
    words = ["x", str(folders), "--out", str(tmp_path / "out"), "--figures", str(figures), "--device", "cpu"]
    words += ["--processes", "1", "--budget", "1h", *OPTIONS]
    monkeypatch.setattr(sys, "argv", words)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert "in 60 minutes: " in (said := capsys.readouterr().out) and "in half of it: " in said
    assert not figures.exists()
    stop = None
    command.main()
    assert "measuring" not in (said := capsys.readouterr().out) and "2 of 11 runs have ended before" in said
    assert len(trained) == len(set(trained)) == 3 + 6 + 2 + 3
    found = json.loads(figures.read_text())
    assert len(found["runs"]) == 11 and len(found["pilot"]) == 3 and found["left out"] == []
    assert found["settings"] == {"lr": found["settings"]["lr"], "amp": found["settings"]["amp"]} | vars(TINY)
    assert found["settings"]["lr"] in plan.RATES and figures.with_suffix(".png").stat().st_size > 10_000
    # with nothing left to train it only collects, and other settings do not mix in
    before = figures.read_text()
    command.main()
    assert figures.read_text() == before and len(trained) == 14
    monkeypatch.setattr(sys, "argv", [*words, "--epochs", "3"])
    with pytest.raises(SystemExit, match=r"has runs of Effort.*use another --out"):
        command.main()


def test_no_run_is_begun_that_would_not_end_in_time(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "pool", Here)
    figures = {arm.name: {"median": 1e-6, "cost": 1e-6} for arm in arms.MAIN} | {"test": {"median": 1e-6, "cost": 1e-6}}
    monkeypatch.setattr(work, "measured", lambda shape, amp, device, rounds: figures)
    words = ["x", str(folders), "--out", str(tmp_path), "--device", "cpu", "--processes", "1", *OPTIONS]
    monkeypatch.setattr(sys, "argv", [*words, "--budget", "0.0s"])
    with pytest.raises(SystemExit, match="the budget ended before the pilot did: start again to go on"):
        command.main()
    assert [file.name for file in tmp_path.glob("*.json")] == ["plan.json"]


def test_results_of_other_settings_are_not_taken(tensors, tmp_path):
    run = fit.Run(arms.WITHOUT, 0, 1e-3, TINY, False)
    work.write(tmp_path / f"{run.name}.json", fit.fit(run, tensors, "cpu"))
    assert list(work.finished([run, replace(run, seed=1)], tmp_path)) == [run.name]
    with pytest.raises(ValueError, match="is of a run with other settings; use another --out"):
        work.finished([replace(run, lr=2e-3)], tmp_path)


@pytest.mark.slow
def test_processes_leave_the_same_results_as_this_one(folders, tmp_path):
    place = work.Place(folders, tmp_path, "cpu", 2)
    tensors = place.tensors()
    runs = [fit.Run(arm, 0, 1e-3, TINY, False) for arm in (arms.WITHOUT, arms.MAIN[3], arms.ROPE)]
    with work.pool(2) as workers:
        ended = {run.name: result for run, result in work.carry_out(runs, place, workers, time.monotonic() + 1e6)}
        assert list(work.carry_out(runs, place, workers, time.monotonic())) == []
    assert ended == work.finished(runs, tmp_path) and len(ended) == 3
    for run in runs:
        here = fit.fit(run, tensors, "cpu")
        assert ended[run.name]["loss"] == pytest.approx(here["loss"], rel=1e-5)


def figures_of(values):
    """A file of figures with `values` {arm: {seed: right answers at 32x32}}, and ten less at 24x40."""
    runs = [
        {"arm": arm, "seed": seed, "parameters": 1234, "accuracy": {"32x32": value, "24x40": value - 10}}
        for arm, seeds in values.items()
        for seed, value in seeds.items()
    ]
    machine = dict(device="A processor", isa="avx2", torch="2.14.1+cpu", timm="1.0.31", date="2026-11-27")
    parts = {
        part: [dict(arm=arm.name, title=arm.title, rpe=arm.rpe, paper=arm.paper) for arm in members]
        for part, members in arms.PARTS.items()
    }
    step = {arm.name: 100.0 + 10 * number for number, arm in enumerate(arms.MAIN)}
    pilot = [{"lr": 0.001, "accuracy": {"32x32": 31.26}}]
    settings = {"lr": 0.002, "amp": True} | vars(plan.EFFORTS[0])
    return dict(machine=machine, settings=settings, parts=parts, step=step, pilot=pilot, runs=runs)


def test_tables_of_means_and_of_paired_differences(tmp_path):
    on_k, euc = arms.MAIN[2].name, arms.TABLE1[1].name
    values = {"none": {0: 40.0, 1: 44.0, 2: 42.0}, "learned": {0: 45.0, 1: 49.0, 2: 48.0}, on_k: {0: 50.0, 1: 52.0}}
    (tmp_path / "cifar10_cpu.json").write_text(json.dumps(figures_of(values | {euc: {0: 44.5}})))
    made = {name: table(tmp_path) for name, table in report.TABLES.items()}
    assert "| positions | 32x32 | 24x40 | seeds |\n|---|---|---|---|\n" in made["cifar accuracy"]
    # over the seeds that all have
    assert "| learned absolute | 47.0 ± 2.8 | 37.0 ± 2.8 | 2 |" in made["cifar accuracy"]
    assert "rotary" not in made["cifar accuracy"]
    # 5 and 3: their mean, and half of their distance
    assert "| iRPE on k | +4.0 ± 1.0 | +4.0 ± 1.0 | 2 |" in made["cifar over absolute"]
    assert "| none | -5.3 ± 0.3 | -5.3 ± 0.3 | 3 |" in made["cifar over absolute"]
    assert "| iRPE on k | +9.0 ± 1.0 | +9.0 ± 1.0 | 2 |" in made["cifar over none"]
    assert "| Euclidean, bias | 80.1 | 44.5 | -0.5 | 1 |" in made["cifar table 1"]
    assert "| learned absolute | 79.9 | 45.0 | +0.0 | 1 |" in made["cifar table 1"]
    assert made["cifar table 2"] == made["cifar buckets"] == ""
    assert "| none | 1,234 | 100 us | 1.00 |" in made["cifar cost"]
    assert "| iRPE on k | 1,234 | 120 us | 1.20 |" in made["cifar cost"]
    assert "| 0.001 | 31.3 |" in made["cifar pilot"]
    assert re.search(
        r"\n\n4,000 pictures, 4 epochs, .*bfloat16 autocast, avx2, A processor, torch 2.14.1", made["cifar cost"]
    )
    assert all(table(tmp_path / "empty") == "" for table in report.TABLES.values())


def test_figures_of_two_machines_do_not_mix(tensors):
    run = fit.Run(arms.WITHOUT, 0, 1e-3, TINY, False)
    result = fit.fit(run, tensors, "cpu")
    other = result | {"machine": result["machine"] | {"device": "another"}}
    steps = {str(TINY.shape): {"none": {"cost": 1e-4}}}
    found = collect.Found({"effort": vars(TINY), "amp": False, "steps": steps}, 1e-3, [result], ["q-seed0"])
    assert collect.collected(found)["left out"] == ["q-seed0"] and collect.collected(found)["step"] == {"none": 100.0}
    with pytest.raises(ValueError, match="and of another; expected those of one device"):
        collect.collected(replace(found, results=[result, other]))
