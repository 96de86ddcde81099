"""Under torchrun the first process alone tells what is wrong, and its sentence is the last thing that is read."""

import json
import re
import subprocess

import pytest

pytest.importorskip("timm")

from fresh import PATIENCE
from train_tiny import Said, command, environment, irpe

from irpe.cli import detect, torchrun
from irpe.train import run as job


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A process of torchrun, whose waits are written down; gives what it leaves in its error file, or None."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(torchrun.time, "sleep", lambda seconds: told.waits.append(seconds))

    def told():
        return json.loads(file.read_text())["message"] if file.exists() else None

    told.waits = []
    return told


WRONG = [
    (["train", "nothere"], "irpe: Invalid value: nothere does not exist; expected a folder of class folders, a .tar, "),
    (["evaluate", "nothere"], "irpe: Invalid value: nothere has no settings.json; expected the folder of a run"),
    (["train", "digits", "--nonsense"], "irpe: No such option: --nonsense"),
    (["train", "--device", "cpu"], "irpe: Invalid value: --device: the demo has no such option; name the DATA"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG, ids=lambda one: one[-1] if isinstance(one, list) else "")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_wrong_command_leaves_its_sentence(told, arguments, expected, rank, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert irpe(*arguments).exit_code == 2
    assert told()["message"].startswith(expected) and "\n" not in told()["message"]
    assert told()["extraInfo"]["py_callstack"] == told()["message"]  # which is what torchrun prints
    assert int(told()["extraInfo"]["timestamp"]) > 1_700_000_000
    assert told.waits == ([] if rank == "0" else [3.0])


def test_a_run_that_fails_leaves_the_sentence_and_a_mistake_of_ours_its_traceback(told, monkeypatch):
    def fails(error):
        def measure(*args):
            raise error

        monkeypatch.setattr(job, "measure", measure)
        return ["evaluate", "--data", "digits", "--model", "vit_tiny_patch16_224", "--pretrained", "x", "--in-chans", 1]

    assert irpe(*fails(MemoryError())).exit_code == 1
    assert told()["message"].startswith("irpe: there is not enough memory for this; a smaller --batch-size")
    with pytest.raises(RuntimeError, match="ours"):
        irpe(*fails(RuntimeError("ours")))
    assert told()["message"].startswith("Traceback") and told()["message"].endswith("RuntimeError: ours\n")


def test_a_missing_package_leaves_its_sentence(told, monkeypatch):
    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: None if name == "scipy" else name)
    assert irpe("detect", "coco").exit_code == 1
    assert told()["message"].startswith("irpe: no module named scipy; install what irpe detect needs")


def test_help_and_success_leave_nothing(told):
    assert irpe("train", "--help").exit_code == irpe("--version").exit_code == 0
    assert told() is None


def test_without_torchrun_nothing_is_left(told, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    monkeypatch.setenv("RANK", "1")
    assert irpe("train", "nothere").exit_code == 2
    assert told() is None and not told.waits


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "expected"), [WRONG[0], WRONG[2]], ids=["in a command", "of its options"])
def test_the_sentence_ends_what_torchrun_prints(arguments, expected, tmp_path):
    done = subprocess.run(
        command(*arguments, processes=2), capture_output=True, text=True, env=environment(), cwd=tmp_path,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode != 0
    *_, last, line = (done.stdout + done.stderr).strip().split("\n")
    assert set(line) == {"="} and last.split(" : ")[1].startswith(expected), done.stderr
    once = re.split("failed .exitcode", done.stderr)[0]  # before torchrun's own words
    assert Said(once).count("Error") == 1, done.stderr
