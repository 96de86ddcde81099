"""irpe train DATA and irpe evaluate from end to end, in this process."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from safetensors.torch import load_file
from train_tiny import MODEL, RPE, SMALL, STILL, irpe, log, pictures, words

from irpe.runs import checkpoint
from irpe.runs.logs import Log, epochs_of
from irpe.train.settings import RECIPES, settings_from

ALL_ON = [
    *MODEL, "--recipe", "deit", "--epochs", "2", "--warmup-epochs", "1", "--batch-size", "30", "--accumulate",
    "3", "--lr", "1e-2", "--ema", "0.9", "--clip-grad", "1", "--drop-path", "0.3", "--mixup-prob", "0.7",
    "--log-every", "1", "--loader-workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), per_class=15)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run with every stochastic part on, to its end."""
    out = tmp_path_factory.mktemp("whole")
    result = irpe("train", folder, *ALL_ON, "--out", out, "--name", "run")
    assert result.exit_code == 0, result.output
    return out / "run", result.output


def test_a_run_on_a_folder_writes_everything(whole, folder):
    run, output = whole
    names = {one.name for one in run.iterdir()} - {"tensorboard"}  # where its package is installed
    assert names == {
        "README.md", "best.safetensors", "checkpoints", "confusion.json", "confusion.png", "curves.png",
        "ema.safetensors", "encodings.png", "log.jsonl", "model.safetensors", "result.json", "settings.json",
    }  # fmt: skip
    assert [one.name for one in checkpoint.checkpoints(run)] == ["step-000000002.pt", "step-000000004.pt"]
    assert len(log(run, "epoch")) == 2 and len(log(run, "step")) == 4
    assert "epoch 2: train" in output and "top-1" in output
    record = json.loads((run / "settings.json").read_text())
    assert record["classes"] == [f"digit{label}" for label in range(4)]
    assert record["settings"]["rpe"] == RPE and record["shape"]["size"] == [8, 12]
    assert record["parameter_groups"]["tables of iRPE"].startswith("weight decay 0,")
    text = (run / "README.md").read_text()
    for expected in (RPE, "encodings.png", "curves.png", "weight decay 0", "mixup = 0.8", "8x12"):
        assert expected in text
    assert load_file(run / "model.safetensors")["blocks.0.attn.rpe_k.lookup_table_weight"].abs().max() > 0


def test_evaluate_repeats_the_figures_of_the_run(whole, folder, tmp_path):
    run, _ = whole
    last = log(run, "epoch")[-1]
    for weights, part in (("last", "val"), ("ema", "ema")):
        result = irpe("evaluate", run, "--weights", weights, "--json", tmp_path / "one.json", "--eval-batch-size", 7)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "one.json").read_text())
        assert found["images"] == 60
        assert found["top1"] == pytest.approx(last[part]["top1"])
        assert found["loss"] == pytest.approx(last[part]["loss"], rel=1e-5)
    larger = irpe("evaluate", run, "--img-size", "16x20")  # positions are resampled, tables have no size
    assert larger.exit_code == 0, larger.output
    other = irpe("evaluate", run, "--data", folder / "train")
    assert other.exit_code == 0 and "on 60 images" in other.output
    file = irpe("evaluate", "--data", folder, "--pretrained", run / "best.safetensors", *MODEL)
    assert file.exit_code == 0 and "on 60 images" in file.output


def states_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            states_equal(a[name], b[name])
        elif isinstance(a[name], torch.Tensor):
            assert torch.equal(a[name], b[name]), name
        elif name not in ("seconds", "max_steps", "loader_workers"):
            assert a[name] == b[name], name


@pytest.mark.parametrize("steps", [1, 3])
def test_resume_goes_on_bit_for_bit_within_an_epoch_with_every_stochastic_part_on(whole, folder, tmp_path, steps):
    """Steps of 3 accumulated batches, mixup, cutmix, erasing, RandAugment, repeats, stochastic depth, average."""
    common = ["train", folder, *ALL_ON, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    assert irpe(*common, "--max-steps", steps).exit_code == 0
    second = irpe(*common)
    assert second.exit_code == 0, second.output
    assert f"goes on after step {steps} of 4" in second.output
    run, _ = whole
    one, two = (checkpoint.read(checkpoint.checkpoints(path)[-1]) for path in (run, tmp_path / "run"))
    for state in (one, two):
        for name in ("best", "best_epoch", "best_loss", "measured"):  # a run cut short is measured once more
            state["progress"].pop(name)
    states_equal(one, two)
    for name in ("model.safetensors", "ema.safetensors"):
        states_equal(load_file(run / name), load_file(tmp_path / "run" / name))
    assert log(run, "step") == log(tmp_path / "run", "step")
    assert log(run, "epoch") == epochs_of(log(tmp_path / "run", "epoch"))


def test_a_run_that_is_overwritten_leaves_nothing(whole, folder, tmp_path):
    """Its checkpoints have more steps than the new run has, and would be taken for the last ones."""
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    (run / "notes.txt").write_text("the user's own")
    options = [one for one in SMALL if one != "--no-plots"]
    result = irpe("train", folder, *options, "--max-steps", 1, "--out", tmp_path, "--name", "run", "--overwrite")
    assert result.exit_code == 0, result.output
    assert [one.name for one in checkpoint.checkpoints(run)] == ["step-000000001.pt"]
    assert not (run / "ema.safetensors").exists() and (run / "notes.txt").exists()
    assert [line["step"] for line in log(run, "epoch")] == [1]
    result = irpe("train", folder, *options, "--out", tmp_path, "--name", "run", "--resume", "auto")
    assert "goes on after step 1 of 4" in result.output and len(log(run, "epoch")) == 3


def test_the_end_by_a_signal_names_the_folder(whole, folder, tmp_path, monkeypatch):
    """Its own, also where the name was taken."""

    @contextmanager
    def signals():
        yield lambda: 2

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("irpe.train.run.signals", signals)
        result = irpe("train", folder, *SMALL, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 130
    assert f"{tmp_path / 'run-2'}: 4 steps of 30 images" in result.output
    said = result.output.replace("\n", " ")
    command = re.search("stopped after step 1; irpe (train --resume .*) goes on", said)[1]
    assert command == f"train --resume {tmp_path / 'run-2'}"
    result = irpe(*command.split())  # as it is
    assert result.exit_code == 0 and "goes on after step 1 of 4" in result.output


def test_short_runs_warm_up_for_a_quarter_of_them():
    for recipe in RECIPES:
        assert settings_from(recipe, {"data": "x", "epochs": 2}).warmup_epochs == 0.5
        assert settings_from(recipe, {"data": "x", "epochs": 100}).warmup_epochs >= 2
    with pytest.raises(ValueError, match="--warmup-epochs 5; expected fewer than --epochs 5"):
        settings_from("small", {"data": "x", "epochs": 5, "warmup_epochs": 5.0})


def test_a_place_for_json_is_looked_at_first(whole, tmp_path):
    (tmp_path / "file").write_text("")
    result = irpe("evaluate", whole[0], "--json", tmp_path / "file" / "a.json")
    assert result.exit_code == 2 and "is in its way" in words(result) and "top-1" not in words(result)
    result = irpe("evaluate", whole[0], "--json", tmp_path / "new" / "a.json")
    assert result.exit_code == 0 and json.loads((tmp_path / "new" / "a.json").read_text())["images"] == 60


def test_a_signal_while_images_are_measured_saves_and_measures_again(whole, folder, tmp_path, monkeypatch):
    run, _ = whole
    asked = [0]

    @contextmanager
    def signals():
        yield lambda: asked[0]

    monkeypatch.setattr("irpe.train.run.signals", signals)
    common = ["train", folder, *ALL_ON, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Log, "measuring", lambda *_: asked.__setitem__(0, 15))
        result = irpe(*common)
    assert result.exit_code == 143 and "stopped after step 2" in result.output
    assert log(tmp_path / "run", "epoch") == []
    asked[0] = 0
    assert irpe(*common).exit_code == 0
    assert log(run, "step") == log(tmp_path / "run", "step")
    assert log(run, "epoch") == log(tmp_path / "run", "epoch")
    states_equal(load_file(run / "ema.safetensors"), load_file(tmp_path / "run" / "ema.safetensors"))


def test_digits_train_through_the_same_path_and_learn(tmp_path):
    options = "--epochs 4 --lr 1e-2 --batch-size 60 --model-arg global_pool=avg --img-size 8".split()
    result = irpe("train", "digits", *SMALL, *STILL, *options, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 0, result.output
    epochs = log(tmp_path / "run", "epoch")
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] - 0.1
    assert epochs[-1]["val"]["images"] == 300
    test = irpe("evaluate", tmp_path / "run", "--split", "test")
    assert "on 597 images" in test.output


def test_fine_tuning_takes_weights_without_tables_and_with_another_head(whole, folder, tmp_path):
    run, _ = whole
    plain = pictures(tmp_path / "two", classes=2)
    bare = [one if one != RPE else "none" for one in SMALL]
    assert irpe("train", folder, *bare, "--max-steps", 1, "--out", tmp_path, "--name", "bare").exit_code == 0
    result = irpe(
        "train", plain, *SMALL, "--batch-size", 4, "--img-size", "12x8", "--recipe", "finetune", "--max-steps", 1,
        "--pretrained", tmp_path / "bare", "--out", tmp_path, "--name", "fine",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "a new one was made" in result.output and "they start at zero" in result.output
    result = irpe("train", plain, *bare, "--pretrained", run, "--out", tmp_path, "--name", "bad")
    assert result.exit_code == 2
    assert "blocks.0.attn.rpe_k.lookup_table_weight is left over; irpe.convert_tables makes" in words(result)
    other = [one if one != RPE else "rpe-2.9-product-ctx-1-k" for one in SMALL]
    result = irpe("train", folder, *other, "--pretrained", run, "--out", tmp_path, "--name", "bad")
    assert "(1, 8, 50) in the file, (1, 8, 122) in the model; irpe.convert_tables makes the tables" in words(result)
    assert not (tmp_path / "bad").exists()


class Strange:
    """Something that a file of weights should not hold."""


def test_files_that_are_no_weights_are_one_short_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "short.safetensors").write_bytes(b"12345678")
    torch.save({"epoch": Strange()}, tmp_path / "object.pth")
    for name, sentence in (
        ("page.pth", "page.pth is no file of weights; expected safetensors, or what torch.save made of a state dict"),
        ("short.safetensors", "short.safetensors is no file of weights; expected"),
        (
            "object.pth",
            "object.pth holds Python objects besides weights, which are not loaded; save model.state_dict()",
        ),
    ):
        result = irpe("train", folder, *SMALL, "--pretrained", name)
        assert result.exit_code == 2 and sentence in words(result)
        assert "weights_only" not in words(result)


def test_a_size_that_timm_trained_with_is_its_own_matter():
    """SigLIP's 384 pixels in patches of 14 leave 6 out by design."""
    from irpe.train import model as models
    from irpe.train.settings import settings_from

    more = {"data": "", "model": "vit_so400m_patch14_siglip_384", "drop_path": 0.0}
    small = ("depth=1", "embed_dim=16", "num_heads=2")
    for size in (None, "384"):
        models.build(settings_from("small", {**more, "img_size": size, "model_arg": small}), 4)
    with pytest.raises(ValueError, match="385x385 pixels cannot be cut .*--img-size 392x392 or another"):
        models.build(settings_from("small", {**more, "img_size": "385", "model_arg": small}), 4)


@pytest.mark.parametrize("more", [
    ["--amp", "bf16", "--channels-last", "--grad-checkpointing"], ["--amp", "fp16"],
    ["--opt", "sgd", "--sched", "poly"],
    ["--layer-decay", "0.7", "--rpe-lr-scale", "3", "--rpe-weight-decay", "0.1"], ["--rpe", "none"],
    ["--rpe", "rpe-2.0-cross-bias-0-qk"], ["--smoothing", "0"], ["--verify", "--loader-workers", "2"],
])  # fmt: skip
def test_options_of_a_step(folder, tmp_path, more):
    base = [one for one in SMALL if one not in ("--rpe", RPE)] if "--rpe" in more else SMALL
    result = irpe("train", folder, *base, "--max-steps", 1, "--out", tmp_path, "--name", "run", *more)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.slow
def test_compile(folder, tmp_path):
    result = irpe("train", folder, *SMALL, "--max-steps", 1, "--out", tmp_path, "--name", "run", "--compile")
    assert result.exit_code == 0, result.output
    assert "_orig_mod" not in " ".join(load_file(tmp_path / "run" / "model.safetensors"))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["digits", "--seeds", "2"], "--seeds: only the demo"),
    (["--mixup", "0.1"], "--mixup: the demo has no such option"),
    (["digits", "--rpe", RPE, "--rpe", "none"], "a run has one encoding"),
    (["digits", "--rpe", "product"], "it has another form"),
    (["digits", "--recipe", "strong"], "--recipe strong; expected one of deit, finetune, small"),
    (["digits", "--mixup", "-1"], "--mixup -1.0; expected at least 0"),
    (["digits", "--amp", "fp8"], "--amp fp8; expected one of none, bf16, fp16"),
    (["digits", "--img-size", "8by8"], "expected a number such as 224, or HEIGHTxWIDTH"),
    (["digits", "--model-arg", "depth"], "expected name=value"),
    (["digits", "--model", "vit_tiny_patch61"], "timm has none of that name; similar: vit_tiny"),
    (["digits", "--model", "resnet18", "--rpe", RPE], "is not a model that iRPE can be added to"),
    (["digits", "--mean", "0.1"], "--mean has 1 numbers; expected 3"),
    (["digits", *SMALL, "--accumulate", "4"], "expected a multiple of 4"),
    (["digits", *SMALL, "--mixup", "1", "--batch-size", "31"], "mix pairs, but a process has 31 images"),
    (["digits", *SMALL, "--opt", "adamm"], "--opt adamm: Optimizer adamm not found in registry; similar: adam"),
    (["digits", *SMALL, "--sched", "cos"], "--sched cos: Unknown scheduler 'cos'.; expected one of cosine, tanh, step"),
    (["digits", *SMALL, "--parallel", "fsdp"], "start them with torchrun"),
    (["digits", *SMALL, "--parallel", "fsdp", "--amp", "fp16"], "use --amp bf16"),
    (["digits", *SMALL, "--resume", "nowhere"], "--resume nowhere does not exist"),
    (["digits", *SMALL, "--pretrained", "nowhere.pt"], "nowhere.pt does not exist"),
    (["digits", *SMALL, "--model-arg", "deepth=3"], "timm cannot build vit_tiny_patch16_224 with"),
    (["digits", "--warmup-epochs", "9", "--epochs", "3"], "expected fewer than --epochs 3"),
    (["digits", *SMALL, "--auto-augment", "nonsense"], "--auto-augment nonsense: Unknown AA policy nonsense"),
    (["digits", *SMALL, "--auto-augment", "random"], "--auto-augment random: timm does not know it"),
    (["digits", *SMALL, "--auto-augment", "rand-x9"], "--auto-augment rand-x9: Unknown RandAugment config section"),
    (["digits", *SMALL, "--auto-augment", "rand-magic"], "'magic'; expected parts such as m9 or mstd0.5"),
    (["digits", *SMALL, "--img-size", "9x12"], "9x12 pixels cannot be cut into patches of 2x2: 1 rows and 0 columns"),
    (["digits", *SMALL, "--model-arg", "patch_size=5"], "expected --img-size 10x10 or another multiple"),
    (["digits", *SMALL, "--model-arg", "img_size=64"], "write --img-size 64 in its place"),
    (["digits", *SMALL, "--model-arg", "in_chans=3"], "write --in-chans 3 in its place"),
    (["digits", *SMALL, "--model-arg", "num_classes=3"], "write --num-classes 3 in its place"),
    (["digits", *SMALL, "--model-arg", "drop_path_rate=0.3"], "write --drop-path 0.3 in its place"),
    (["digits", *SMALL, "--model-arg", "depth=0"], "has no blocks with"),
    (["digits", "--model", "vit_tiny_patch16_224", "--model-arg", "depth=0"], "expected a depth of at least 1"),
])  # fmt: skip
def test_wrong_input_is_a_sentence_and_leaves_no_folder(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = irpe("train", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in words(result)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_not_for_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the demo is one process" in words(irpe("train"))


def test_a_run_goes_on_with_its_own_settings_only(whole, folder, tmp_path):
    run, _ = whole
    result = irpe("train", folder, *ALL_ON, "--lr", "0.5", "--resume", run)
    assert result.exit_code == 2
    assert "is of a run with other settings: --lr was 0.01, is 0.5" in words(result)
    empty = irpe("train", folder, *ALL_ON, "--resume", tmp_path)
    assert "there is no checkpoint in it" in words(empty)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(folder, tmp_path):
    result = irpe(
        "train", folder, *SMALL, "--lr", "1e30", "--clip-grad", "0", "--epochs", "5", "--out", tmp_path, "--name", "run"
    )
    assert result.exit_code == 1
    assert "irpe: the loss is nan at step" in words(result)
    for path in checkpoint.checkpoints(tmp_path / "run"):
        assert all(one.isfinite().all() for one in checkpoint.read(path)["model"].values())


def test_evaluate_refuses_other_classes_and_other_models(whole, tmp_path):
    run, _ = whole
    two = pictures(tmp_path / "two", classes=2)
    assert "the classes of train (4) and val (2) differ: digit2, digit3 only in train" in words(
        irpe("evaluate", run, "--data", two)
    )
    assert "--rpe: the run has its own" in words(irpe("evaluate", run, "--rpe", "none"))
    assert "expected the folder of a run" in words(irpe("evaluate", two))
    assert "name the folder of a run" in words(irpe("evaluate"))
