"""irpe/runs/folder.py: whose a folder is, who writes there, and that nothing of anybody else is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from safetensors.torch import load_file
from train_tiny import SMALL, STILL, environment, irpe, log, pictures, words

from irpe.runs import checkpoint, folder, tensors

GIVEN = [*SMALL, *STILL, "--epochs", "2", "--log-every", "1", "--batch-size", "20", "--keep", "9", "--save-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), per_class=10)


@pytest.fixture(scope="module")
def ended(data, tmp_path_factory):
    """A run to its end, of four steps and as many checkpoints."""
    out = tmp_path_factory.mktemp("ended")
    result = irpe("train", data, *GIVEN, "--out", out, "--name", "run")
    assert result.exit_code == 0, result.output
    return out / "run"


@pytest.fixture
def run(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "run")


def content(place):
    """Every file below a folder with its bytes, links as what they point to."""
    return {
        str(one.relative_to(place)): os.readlink(one) if one.is_symlink() else one.read_bytes()
        for one in sorted(place.rglob("*"))
        if one.is_symlink() or one.is_file()
    }


def train(data, out, *more, name="run"):
    return irpe("train", data, *GIVEN, "--out", out, "--name", name, *more)


FOREIGN = {
    "texts and weights": {"README.md": "mine", "model.safetensors": "mine"},
    "an editor's settings": {"settings.json": '{"editor.fontSize": 14}', "README.md": "mine"},
    "damaged settings": {"settings.json": '{"settings": {"data"', "best.safetensors": "mine"},
    "settings with the right words": {"settings.json": '{"settings": 1, "classes": 2, "shape": 3}', "log.jsonl": "x"},
    "a list": {"settings.json": "[]", "result.json": "{}"},
    "a run of irpe detect": {
        "settings.json": '{"data": "", "recipe": "", "train_scenes": 1, "digit_classes": 1, "rpe": 1, "queries": 1}',
        "model/config.json": "mine",
    },
    "hidden names": {".mine.1.tmp": "mine", "checkpoints/.step-000000001.pt.backup.tmp": "mine"},
    "checkpoints alone": {"checkpoints/step-000000009.pt": "mine"},
    "sources": {"model/net.py": "mine", "best/a.py": "mine", "tensorboard/notes": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("option", [["--resume", "auto"], ["--overwrite"]], ids=["resume", "overwrite"])
def test_a_folder_of_somebody_else_is_left_as_it_is(data, tmp_path, files, option):
    place = tmp_path / "run"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    before = content(place)
    result = train(data, tmp_path, *option)
    assert result.exit_code == 2, result.output
    assert "is not the folder of a run of irpe train: it holds" in words(result)
    assert content(place) == before


@pytest.mark.parametrize(
    "name", ["log.jsonl", "best.safetensors", "README.md", "settings.json", "checkpoints", "tensorboard"]
)
@pytest.mark.parametrize("option", [["--resume", "auto"], ["--overwrite"]], ids=["resume", "overwrite"])
def test_nothing_is_removed_or_written_through_a_link(data, run, tmp_path, name, option):
    mine = tmp_path / "mine"
    shutil.move(run / name, mine) if (run / name).exists() else mine.mkdir()
    (run / name).symlink_to(mine)
    before = content(tmp_path)
    result = train(data, tmp_path, *option)
    assert result.exit_code == 2 and f"{name} is a link; expected a" in words(result)
    assert content(tmp_path) == before


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(data, run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    result = train(data, tmp_path, "--resume", "auto")
    assert result.exit_code == 2 and "but no checkpoint to go on from. --overwrite begins anew" in words(result)
    assert content(run) == before
    # weights alone are a result too
    for name in before:
        if name not in ("settings.json", "best.safetensors"):
            (run / name).unlink()
    assert "has best.safetensors of a run, but no" in words(train(data, tmp_path, "--resume", "auto"))


def test_overwriting_leaves_what_a_run_did_not_write(data, run, tmp_path):
    mine = [
        "notes.txt",
        "checkpoints/mine.pt",
        "checkpoints/step-1.pt",
        "tensorboard/mine",
        ".mine.1.tmp",
        "sub/log.jsonl",
    ]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / ".log.jsonl.77.tmp").write_text("ours")
    result = train(data, tmp_path, "--overwrite", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert all((run / name).read_text() == "mine" for name in mine)
    assert not (run / ".log.jsonl.77.tmp").exists() and not (run / ".lock").exists()
    assert [one.name for one in checkpoint.checkpoints(run)] == ["step-000000001.pt"]


def test_a_text_of_the_user_in_place_of_the_card_is_not_replaced(data, run, tmp_path):
    (run / "README.md").write_text("mine")
    for option in (["--overwrite"], ["--resume", "auto"], ["--resume", run]):
        result = train(data, tmp_path, *option)
        assert result.exit_code == 2 and "README.md was not written by a run" in words(result)
        assert (run / "README.md").read_text() == "mine"


def test_a_run_does_not_remove_the_weights_that_it_begins_from(data, run, tmp_path):
    before = content(run)
    for source in (run, run / "best.safetensors"):
        result = train(data, tmp_path, "--overwrite", "--pretrained", source)
        assert result.exit_code == 2 and "which would be emptied before the run; use another --name" in words(result)
    assert content(run) == before


def test_an_empty_folder_and_one_of_a_run_that_was_killed_early_are_begun_in(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".settings.json.123.tmp").write_text("torn")
    assert train(data, tmp_path, "--resume", "auto", "--max-steps", 1).exit_code == 0
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(tmp_path / "run" / "settings.json", early)
    (early / "log.jsonl").write_text('{"kind": "step", "step": 1, "epoch": 1}\n')
    result = train(data, tmp_path, "--resume", "auto", "--max-steps", 1, name="early")
    assert result.exit_code == 0 and len(log(early, "step")) == 1


# ---- --resume FILE


def test_a_checkpoint_that_lies_elsewhere_goes_on_in_a_new_folder(data, ended, tmp_path):
    """What lies around it stays, and the weights are those of the run that was not stopped."""
    around = tmp_path / "a" / "b"
    around.mkdir(parents=True)
    for name in ("README.md", "settings.json", ".old.1.tmp", "b/log.jsonl"):
        (tmp_path / "a" / name).write_text("mine")
    shutil.copy(ended / "checkpoints" / "step-000000001.pt", around / "some.pt")
    before = content(tmp_path)
    result = train(data, tmp_path / "out", "--resume", around / "some.pt", name="new")
    assert result.exit_code == 0, result.output
    assert "goes on after step 1 of 4" in result.output
    assert {name: one for name, one in content(tmp_path).items() if not name.startswith("out/")} == before
    new = tmp_path / "out" / "new"
    for name in ("model.safetensors", "best.safetensors"):
        one, other = load_file(new / name), load_file(ended / name)
        assert all(torch.equal(one[key], other[key]) for key in other)
    again = train(data, tmp_path / "out", "--resume", around / "some.pt", name="new")
    assert again.exit_code == 0 and (tmp_path / "out" / "new-2").is_dir()


def test_the_last_checkpoint_of_an_ended_run_in_a_new_folder_is_measured_there(data, ended, tmp_path):
    shutil.copy(ended / "checkpoints" / "step-000000004.pt", tmp_path / "some.pt")
    assert train(data, tmp_path, "--resume", tmp_path / "some.pt", name="new").exit_code == 0
    assert (
        json.loads((tmp_path / "new" / "result.json").read_text())["last"]["val"]["top1"]
        == log(ended, "epoch")[-1]["val"]["top1"]
    )


def test_a_copied_folder_of_checkpoints_is_no_run(data, ended, tmp_path):
    shutil.copytree(ended / "checkpoints", tmp_path / "mine" / "checkpoints")
    (tmp_path / "mine" / "README.md").write_text("mine")
    before = content(tmp_path / "mine")
    result = train(data, tmp_path, "--resume", tmp_path / "mine")
    assert result.exit_code == 2 and "is not the folder of a run of irpe train" in words(result)
    file = tmp_path / "mine" / "checkpoints" / "step-000000004.pt"
    assert train(data, tmp_path, "--resume", file, name="new").exit_code == 0
    assert content(tmp_path / "mine") == before


def test_out_and_name_that_are_not_those_of_the_run_are_refused(data, run, tmp_path):
    given = ["train", data, *GIVEN, "--resume", run]
    for more in (["--name", "other"], ["--out", tmp_path / "other"], ["--out", tmp_path, "--name", "other"]):
        result = irpe(*given, *more)
        assert result.exit_code == 2 and "goes on in the folder of its run" in words(result)
        assert not (tmp_path / "other").exists()
    for more in ([], ["--out", tmp_path], ["--out", tmp_path, "--name", "run"]):
        result = irpe(*given, *more)
        assert result.exit_code == 0, result.output


# ---- branches, locks, damage


def test_going_on_from_an_earlier_checkpoint_leaves_the_other_branch(data, run, tmp_path):
    first = checkpoint.checkpoints(run)[0]
    result = irpe("train", data, *GIVEN, "--resume", first, "--max-steps", 2)
    assert result.exit_code == 0, result.output
    assert [one.name for one in checkpoint.checkpoints(run)] == ["step-000000001.pt", "step-000000002.pt"]
    result = train(data, tmp_path, "--resume", "auto")
    assert "goes on after step 2 of 4" in result.output
    assert [line["step"] for line in log(run, "step")] == [1, 2, 3, 4]


def test_best_weights_of_the_other_branch_do_not_stay_the_best(data, ended, run, tmp_path):
    """They are of a later step than the one that the run goes on from."""
    weights = tensors.read_safetensors(run / "best.safetensors")
    notes = {"epoch": "2", "step": "4", "top1": "99"}
    tensors.write_weights(run / "best.safetensors", {name: one * 0 for name, one in weights.items()}, notes)
    path = run / "checkpoints" / "step-000000002.pt"
    assert checkpoint.read(path)["progress"]["best_epoch"] == 1
    result = irpe("train", data, *GIVEN, "--resume", path, "--max-steps", 3)
    assert result.exit_code == 0, result.output
    assert tensors.notes_of(run / "best.safetensors")["step"] in ("2", "3")


def test_a_kill_between_the_checkpoint_and_the_best_weights_loses_nothing(data, ended, tmp_path):
    given = ["train", data, *GIVEN, "--out", tmp_path, "--name", "run", "--resume", "auto", "--max-steps", 2]
    assert irpe(*given).exit_code == 0
    run = tmp_path / "run"
    before = load_file(run / "best.safetensors")
    (run / "best.safetensors").unlink()
    assert irpe(*given).exit_code == 0
    after = load_file(run / "best.safetensors")
    assert all(torch.equal(one, after[name]) for name, one in before.items())


HOLDING = """
import sys, time
from pathlib import Path
from irpe.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_two_runs_do_not_write_into_one_folder(data, run, tmp_path):
    before = content(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(run)], stdout=subprocess.PIPE, env=environment()
    ) as other:
        assert other.stdout.readline() == b"held\n"
        for option in (["--resume", "auto"], ["--overwrite"], ["--resume", run]):
            result = train(data, tmp_path, *option)
            assert result.exit_code == 2 and "another run writes into" in words(result), result.output
        assert {name: one for name, one in content(run).items() if name != ".lock"} == before
        other.kill()
        other.wait()
    result = train(data, tmp_path, "--resume", "auto")  # a killed run holds nothing
    assert result.exit_code == 0, result.output
    assert not (run / ".lock").exists()


def test_one_process_holds_a_lock_against_itself_too(tmp_path):
    with folder.locked(tmp_path), pytest.raises(ValueError, match="another run writes into"), folder.locked(tmp_path):
        pass
    with folder.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(one, b[name]) for name, one in a.items())
    return a == b


def test_a_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    """Anywhere in the file: it is refused, or nothing of what is read is another one."""
    generator = torch.Generator().manual_seed(0)
    state = {"step": 1, "settings": {"a": 1.5}, "model": {"a": torch.randn(3, 5, generator=generator)}}
    path = checkpoint.save(tmp_path, state, keep=1)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        for bit in (1, 64):
            data = bytearray(whole)
            data[place] ^= bit
            path.write_bytes(data)
            try:
                found = checkpoint.read(path)
            except ValueError:
                refused += 1
            else:
                assert equal(found, state), place
    assert refused > len(whole) // 6


def test_a_flipped_bit_of_weights_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    tensors.write_weights(path, state, {"epoch": "3"})
    assert equal(tensors.read_safetensors(path), state) and tensors.notes_of(path)["epoch"] == "3"
    assert equal(load_file(path), state)  # the library reads it as any other
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        try:
            found = tensors.read_safetensors(path)
        except ValueError:
            continue
        assert equal(found, state), place
    data = bytearray(whole)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="it is damaged: its checksum is another one"):
        tensors.read_safetensors(path)


def test_what_inflates_is_refused_before_it_does(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 200_000_000)
    with pytest.raises(ValueError, match="is a compressed archive, which torch.save does not write"):
        checkpoint.read(tmp_path / "bomb.pt")


# ---- numbers that are none


def spoil(run, value, *names):
    """Puts a number that is none into the last checkpoint."""
    path = checkpoint.checkpoints(run)[-1]
    state = checkpoint.read(path)
    part = state
    for name in names[:-1]:
        part = part[name]
    part[names[-1]].view(-1)[0] = value
    torch.save(state, path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_with_numbers_that_are_none_is_named(data, run, tmp_path, value):
    spoil(run, value, "model", "cls_token")
    result = train(data, tmp_path, "--resume", "auto")
    assert result.exit_code == 2
    assert "step 4 holds numbers that are not finite, in model.cls_token; remove it" in words(result)


@pytest.mark.parametrize("more", [[], ["--ema", "0.9"], ["--clip-grad", "1"], ["--accumulate", "2"]])
def test_a_gradient_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, more):
    """The loss is finite, the gradient of the third step is not: the checkpoint of the second stays the last one."""
    from irpe.train.loop import Trainer

    step = Trainer._step

    def spoiled(self, batches):
        if self.progress.step == 2:
            self.model.norm.bias.register_hook(lambda gradient: gradient * torch.nan)
        return step(self, batches)

    given = ["train", data, *GIVEN, *more, "--out", tmp_path, "--name", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", spoiled)
        result = irpe(*given)
    assert result.exit_code == 1
    assert "irpe: the gradient is not finite at step 3; the last checkpoint is from before" in words(result)
    assert [one.name for one in checkpoint.checkpoints(tmp_path / "run")][-1] == "step-000000002.pt"
    result = irpe(*given, "--resume", "auto")
    assert result.exit_code == 0 and "goes on after step 2 of 4" in result.output


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    from irpe.train.loop import Trainer

    step = Trainer._step

    def spoiled(self, batches):
        norm = step(self, batches)
        if self.progress.step == 3:
            self.model.norm.bias.data[0] = torch.inf
        return norm

    monkeypatch.setattr(Trainer, "_step", spoiled)
    result = train(data, tmp_path)
    assert result.exit_code == 1 and "model.norm.bias is not finite at step 3" in words(result)
    assert [one.name for one in checkpoint.checkpoints(tmp_path / "run")][-1] == "step-000000002.pt"


def test_outputs_that_are_no_numbers_are_no_score(data, run, tmp_path):
    """Neither of irpe evaluate, nor of a run: with the count, and exit code 1."""
    weights = tensors.read_safetensors(run / "best.safetensors")
    weights["head.bias"][1] = torch.nan
    tensors.write_weights(run / "best.safetensors", weights, {})
    result = irpe("evaluate", run, "--json", tmp_path / "a.json")
    assert result.exit_code == 1 and "the outputs are not numbers on 40 of 40 images" in words(result)
    assert "top-1" not in result.output and not (tmp_path / "a.json").exists()


def test_a_measurement_that_is_no_number_ends_the_run(data, tmp_path, monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    forward = VisionTransformer.forward

    def spoiled(self, x):
        return forward(self, x) if self.training else forward(self, x) * torch.nan

    monkeypatch.setattr(VisionTransformer, "forward", spoiled)
    result = train(data, tmp_path)
    assert result.exit_code == 1 and "the outputs are not numbers on 40 of 40 images" in words(result)
    assert "best so far" not in result.output
    assert [one.name for one in checkpoint.checkpoints(tmp_path / "run")] == ["step-000000001.pt"]
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_json_has_null_for_what_is_no_number(tmp_path):
    from irpe.runs import files

    path = files.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.0, (float("inf"),)], "b": {"c": -float("inf")}})

    def refuse(word):
        pytest.fail(f"{word} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": [None, 1.0, [None]], "b": {"c": None}}
