"""irpe detect: whose a folder is, resuming, numbers that are none; as tests/test_train_folder.py for irpe train."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

from PIL import Image
from rich.console import Console
from test_train_folder import content, words
from train_tiny import irpe

from irpe.detect import model as models
from irpe.detect import run as job
from irpe.detect import saved
from irpe.detect.data import open_part
from irpe.detect.loop import Trainer
from irpe.detect.settings import settings_from, settings_from_dict
from irpe.runs import checkpoint, folder, tensors
from irpe.runs.logs import Log, read_log
from irpe.runs.workers import RunError
from irpe.runs.world import World

TINY = [
    *("--train-scenes", 8, "--val-scenes", 4, "--d-model", 16, "--layers", 1, "--queries", 4, "--batch-size", 4),
    *("--epochs", 2, "--device", "cpu", "--draw", 1, "--dropout", 0, "--keep", 9, "--save-every", 1, "--rpe", "none"),
    *("--log-every", 1, "--eval-every", 1),
]


def detect(out, *more, name="run"):
    return irpe("detect", "digits", *TINY, "--out", out, "--name", name, *more)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run to its end, of four steps and as many checkpoints."""
    out = tmp_path_factory.mktemp("ended")
    result = detect(out)
    assert result.exit_code == 0, result.output
    return out / "run"


@pytest.fixture
def run(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "run")


OPTIONS = pytest.mark.parametrize("option", [["--resume", "auto"], ["--overwrite"]], ids=["resume", "overwrite"])
FOREIGN = {
    "sources": {"model/net.py": "mine", "best/weights/a.py": "mine"},
    "model files": {"model/config.json": "mine", "model/model.safetensors": "mine"},
    "an editor's settings": {"settings.json": '{"editor.fontSize": 14}', "result.json": "{}"},
    "a run of irpe train": {
        "settings.json": '{"settings": {"data": "", "model": "", "rpe": ""}, "classes": [], "shape": {}}',
        "best/config.json": "mine",
    },
    "results alone": {"result.json": '{"score": 1}', "predictions.png": "mine"},
}


@OPTIONS
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_somebody_else_is_left_as_it_is(tmp_path, files, option):
    for one, text in files.items():
        (tmp_path / "run" / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / one).write_text(text)
    before = content(tmp_path)
    result = detect(tmp_path, *option)
    assert result.exit_code == 2 and "is not the folder of a run of irpe detect: it holds" in words(result)
    assert content(tmp_path) == before


def test_what_a_run_leaves_for_people(ended, tmp_path):
    lines = read_log(ended)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert [line["train_loss"] for line in epochs] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    card = (ended / "README.md").read_text()
    result = json.loads((ended / "result.json").read_text())
    assert "4 steps" in card and f"| last | 4 | {result['score']['AP']:.2f} |" in card and "Made with irpe" in card
    for name, step in (("best", result["best_step"]), ("last", 4)):
        (line,) = [line for line in epochs if line["step"] == step]
        assert result[name] == {key: line[key] for key in ("step", "epoch", "train_loss", "val")}
        assert f"| {name} | {step} | {line['val']['AP']:.2f} |" in card
    assert result["last"]["val"] == result["score"]
    # how it is used, literally
    use = card.split("## Use")[1].split("## ")[0].replace("THIS_FOLDER", str(ended))
    Image.new("RGB", (50, 40)).save(tmp_path / "picture.jpg")
    lines = [line.strip().replace("picture.jpg", str(tmp_path / "picture.jpg")) for line in use.splitlines()]
    (command,) = [line for line in lines if line.startswith("irpe ")]
    result = irpe(*command.split()[1:], "--device", "cpu", "--out", tmp_path / "drawn")
    assert result.exit_code == 0 and (tmp_path / "drawn" / "picture.png").exists(), result.output
    names = {}
    exec("\n".join(line for line in lines if line.startswith(("import irpe", "found = "))), names)
    assert isinstance(names["found"], list) and "irpe.detect.model" not in card
    for picture in ("curves.png", "predictions.png"):
        assert f"({picture})" in card and (ended / picture).read_bytes().startswith(b"\x89PNG")
    result = detect(tmp_path, "--no-plots", "--no-tensorboard", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "tensorboard").exists()
    shown = words(result)
    assert "epoch 1: train " in shown and ", AP 0.0, AP50 0.0, AP75 0.0" in shown and "the best so far" in shown


def test_a_signal_while_pictures_are_measured_saves_and_measures_again(ended, tmp_path, monkeypatch):
    asked = [0]

    @contextmanager
    def signals():
        yield lambda: asked[0]

    monkeypatch.setattr("irpe.detect.run.signals", signals)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "measuring", lambda *_: asked.__setitem__(0, 15))
        result = detect(tmp_path)
    assert result.exit_code == 143 and "stopped after step 2" in result.output
    run = tmp_path / "run"
    assert not [line for line in read_log(run) if line["kind"] == "epoch"]
    asked[0] = 0
    assert detect(tmp_path, "--resume", "auto").exit_code == 0
    lines = [[line["val"] for line in read_log(folder) if line["kind"] == "epoch"] for folder in (ended, run)]
    assert len(lines[0]) == 2 and lines[0] == lines[1]
    assert saved.saved_at(run / "best") == saved.saved_at(ended / "best")


def test_tensorboard(ended):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ended / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/AP50")] == [2, 4]


def test_a_checkpoint_of_a_version_without_sums_goes_on(ended):
    """Losses since the last line were a tensor in it, and of the best weights the step alone was known."""
    path = ended / "checkpoints" / "step-000000003.pt"
    state = checkpoint.read(path)
    progress = json.loads(state["progress"])
    del progress["sums"], progress["best_epoch"]
    assert progress["best_step"] == 2
    old = state | {"progress": json.dumps(progress), "losses": torch.tensor([2.0, 4.0])}
    chosen = settings_from_dict({name: value for name, value in state["settings"].items() if name != "tensorboard"})
    model, processor = models.build(chosen, ["digit"]), models.processor_of(chosen)
    data, val = (open_part(chosen, part) for part in ("train", "val"))
    trainer = Trainer(chosen, data, val, model, processor, World(0, 1, torch.device("cpu")))
    trainer.load(old)
    assert trainer.progress.best_epoch == 1 and trainer.progress.sums.line_loss / trainer.progress.sums.line_images == 3


@OPTIONS
@pytest.mark.parametrize(
    "part", [*"model best checkpoints log.jsonl result.json predictions.png README.md curves.png".split()]
)
def test_nothing_is_removed_or_written_through_a_link(run, tmp_path, part, option):
    shutil.move(run / part, tmp_path / "mine")
    (run / part).symlink_to(tmp_path / "mine")
    before = content(tmp_path)
    result = detect(tmp_path, *option)
    assert result.exit_code == 2 and f"{part} is a link; expected a" in words(result)
    assert content(tmp_path) == before


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    result = detect(tmp_path, "--resume", "auto")
    assert result.exit_code == 2 and "has result.json, predictions.png, model, best of a run, but no" in words(result)
    assert content(run) == before


def test_what_a_user_has_put_into_the_folders_of_a_run_stays(run, tmp_path):
    mine = ("model/notes.md", "best/more/a.py", "notes.txt", "checkpoints/mine.pt")
    for one in mine:
        (run / one).parent.mkdir(exist_ok=True)
        (run / one).write_text("mine")
    for more in (["--resume", "auto"], ["--overwrite"], ["--overwrite", "--max-steps", 1]):
        result = detect(tmp_path, *more)
        assert result.exit_code == 0, result.output
        assert all((run / one).read_text() == "mine" for one in mine)
    assert not [one for one in run.iterdir() if one.name.startswith(".")]
    assert models.load(run / "model").config.d_model == 16


def test_folders_that_a_kill_left_between_two_renames_come_back(run):
    (run / "model").rename(run / ".model.7.old")
    shutil.copytree(run / "best", run / ".best.8.old")
    (run / ".best.8.old" / "notes.md").write_text("mine")
    shutil.copytree(run / "best", run / ".best.9.tmp")
    (run / ".mine.9.tmp").mkdir()
    folder.clean(run, job.KIND)
    assert (run / "model" / "config.json").exists() and (run / "best" / "notes.md").read_text() == "mine"
    assert [one.name for one in run.iterdir() if one.name.startswith(".")] == [".mine.9.tmp"]


def test_a_checkpoint_that_lies_elsewhere_goes_on_in_a_new_folder(ended, tmp_path):
    around = tmp_path / "a" / "b"
    around.mkdir(parents=True)
    (tmp_path / "a" / "settings.json").write_text("mine")
    shutil.copy(ended / "checkpoints" / "step-000000001.pt", around / "some.pt")
    result = detect(tmp_path / "out", "--resume", around / "some.pt", name="new")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "settings.json").read_text() == "mine" and len(content(tmp_path / "a")) == 2
    new = tmp_path / "out" / "new"
    one, other = (checkpoint.read(path / "checkpoints" / "step-000000004.pt")["model"] for path in (new, ended))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert (new / "best" / "config.json").exists()


def test_branches(run, tmp_path):
    first = checkpoint.checkpoints(run)[0]
    assert irpe("detect", "digits", *TINY, "--resume", first, "--max-steps", 2).exit_code == 0
    assert [one.name for one in checkpoint.checkpoints(run)] == ["step-000000001.pt", "step-000000002.pt"]
    assert saved.saved_at(run / "best") == 2  # in place of that of a later step
    assert "goes on after step 2 of 4" in detect(tmp_path, "--resume", "auto").output


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    with folder.locked(run):
        for option in (["--resume", "auto"], ["--overwrite"], ["--resume", run]):
            assert "another run writes into" in words(irpe("detect", "digits", *TINY, "--resume", run))
            result = detect(tmp_path, *option)
            assert result.exit_code == 2 and "another run writes into" in words(result)


def test_a_measurement_does_not_replace_the_result_of_a_run(run, tmp_path):
    before = content(run)
    given = ["detect", "digits", "--val-scenes", 4, "--pretrained", run / "model", "--evaluate-only", "--device", "cpu"]
    given += ["--size", 0, "--draw", 0, "--out", tmp_path]
    result = irpe(*given, "--name", "run", "--overwrite")
    assert result.exit_code == 2 and "is the folder of a run, whose result would be replaced" in words(result)
    assert content(run) == before
    for more in ([], ["--overwrite"]):
        assert irpe(*given, "--name", "measured", *more).exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").write_text("{}")
    result = irpe(*given, "--name", "mine", "--overwrite")
    assert result.exit_code == 2 and "holds result.json, and no result.json of irpe detect" in words(result)
    assert (tmp_path / "mine" / "result.json").read_text() == "{}"


def test_a_measurement_is_named_after_its_run(run, tmp_path):
    given = ["detect", "digits", "--val-scenes", 2, "--evaluate-only", "--device", "cpu", "--size", 0, "--draw", 0]
    place = shutil.copytree(run, tmp_path / "mine")
    assert irpe(*given, "--pretrained", place / "best", "--out", tmp_path / "out").exit_code == 0
    shutil.copytree(run / "model", tmp_path / "elsewhere" / "model")
    assert irpe(*given, "--pretrained", tmp_path / "elsewhere" / "model", "--out", tmp_path / "out").exit_code == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["detect-digits-model-seed0-evaluated", "mine-evaluated"]
    named = settings_from({"data": "scenes", "pretrained": str(place / "model")})
    assert job.default_name(named) == "detect-scenes-mine-seed0"


def test_several_runs_do_not_replace_a_results_json_of_something_else(tmp_path):
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "results.json").write_text("{}")
    small = [*TINY[:12], "--device", "cpu", "--seeds", 1, "--max-steps", 1]
    result = irpe("detect", *small, "--out", tmp_path, "--name", "several", "--overwrite")
    assert result.exit_code == 2 and "no results.json of irpe detect without DATA" in words(result)
    assert (tmp_path / "several" / "results.json").read_text() == "{}"


def test_a_flipped_bit_of_saved_weights_is_found(run):
    path = run / "model" / "model.safetensors"
    assert tensors.CHECKSUM in tensors.notes_of(path) and tensors.notes_of(path)["format"] == "pt"
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read: it is damaged: its checksum is"):
        models.load(run / "model")


def settings(**options):
    small = dict(train_scenes=8, val_scenes=4, d_model=16, layers=1, queries=4, batch_size=4, epochs=2, draw=0)
    return settings_from({"data": "digits", "device": "cpu", "rpe": "none", **small, **options})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, accumulate):
    step = Trainer._step

    def spoiled(self, batches):
        if self.progress.step == 2:
            self.model.class_labels_classifier.bias.register_hook(lambda gradient: gradient * torch.inf)
        return step(self, batches)

    chosen = settings(save_every=1, accumulate=accumulate)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", spoiled)
        with pytest.raises(RunError, match="the gradient is not finite at step 3; the last checkpoint is from before"):
            job.train(chosen, lambda: tmp_path, None, Console(quiet=True))
    assert [one.name for one in checkpoint.checkpoints(tmp_path)][-1] == "step-000000002.pt"
    assert job.train(chosen, lambda: tmp_path, "auto", Console(quiet=True))["steps"] == 4


@pytest.mark.parametrize("part", ["class_labels_classifier", "bbox_predictor.layers.2"])
def test_outputs_that_are_no_numbers_are_no_ap(tmp_path, part):
    chosen = settings()
    model = models.build(chosen, ["digit"])
    model.get_submodule(part).bias.data[0] = torch.nan
    place = saved.save(model, models.processor_of(chosen), tmp_path / "model")
    given = ["detect", "digits", "--val-scenes", 5, "--pretrained", place, "--evaluate-only", "--device", "cpu"]
    result = irpe(*given, "--size", 0, "--out", tmp_path, "--name", "x")
    assert result.exit_code == 1 and "the outputs are not numbers on 5 of 5 pictures" in words(result)
    assert "AP 0" not in result.output and not (tmp_path / "x" / "result.json").exists()


def test_a_detector_that_becomes_none_in_training_ends_the_run(tmp_path, monkeypatch):
    step = Trainer._step

    def spoiled(self, batches):
        norm = step(self, batches)
        if self.progress.step == 4:
            self.model.class_labels_classifier.bias.data[0] = torch.nan
        return norm

    monkeypatch.setattr(Trainer, "_step", spoiled)
    with pytest.raises(RunError, match="the outputs are not numbers on 4 of 4 pictures"):
        job.train(settings(), lambda: tmp_path, None, Console(quiet=True))
    assert [one.name for one in checkpoint.checkpoints(tmp_path)] == ["step-000000002.pt"]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
