"""irpe train in real processes: two of torchrun beside one, signals, kills in the middle of writing, full disks."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from fresh import PATIENCE
from safetensors.torch import load_file
from train_tiny import SMALL, STILL, command, environment, log, pictures, process

from irpe.runs import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")]
LONG = [*SMALL, "--epochs", "4", "--log-every", "1", "--batch-size", "8", "--save-every", "2", "--lr", "1e-2"]
SLOWLY = """
import sys, time
from irpe.runs import checkpoint
from irpe.__main__ import main
whole = checkpoint.write_whole
def slow(path, write):
    def pieces(file):
        import io
        buffer = io.BytesIO()
        write(buffer)
        data = buffer.getvalue()
        for k in range(0, len(data), max(1, len(data) // 20)):
            file.write(data[k : k + max(1, len(data) // 20)])
            file.flush()
            if path.suffix == ".pt":
                print("writing", path.name, flush=True)
                time.sleep(0.02)
    return whole(path, pieces)
checkpoint.write_whole = slow
sys.argv = ["irpe", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), per_class=15)


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("reference")
    done = process("train", folder, *LONG, "--out", out, "--name", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "run"


def same(a, b):
    for name in ("model.safetensors", "best.safetensors"):
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert log(a, "step") == log(b, "step")
    assert log(a, "epoch") == log(b, "epoch")


EVEN = [*SMALL, *STILL, "--epochs", "3", "--log-every", "1", "--batch-size", "20", "--lr", "5e-3", "--ema", "0.9"]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process, with nothing left to chance but the order of the images."""
    out = tmp_path_factory.mktemp("alone")
    done = process("train", folder, *EVEN, "--out", out, "--name", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "run"


@pytest.mark.parametrize("more", [[], ["--accumulate", "2"], ["--parallel", "fsdp"]], ids=["ddp", "accumulate", "fsdp"])
def test_two_processes_have_the_losses_of_one(alone, folder, tmp_path, more):
    """Also where they go on from their own checkpoint."""
    given = ["train", folder, *EVEN, *more, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    if "--accumulate" not in more:
        assert process(*given, "--max-steps", "4", processes=2).returncode == 0
    done = process(*given, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("goes on after step 4 of 9" in done.stdout) == ("--accumulate" not in more)
    one, two = log(alone, "step"), log(tmp_path / "run", "step")
    assert len(one) == len(two) == 9
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert (a["lr"], a["step"]) == (b["lr"], b["step"])
    a, b = log(alone, "epoch")[-1], log(tmp_path / "run", "epoch")[-1]
    assert b["val"]["images"] == a["val"]["images"] == 60
    assert b["val"]["loss"] == pytest.approx(a["val"]["loss"], abs=1e-4)
    assert b["ema"]["loss"] == pytest.approx(a["ema"]["loss"], abs=1e-4)
    states = [load_file(run / "model.safetensors") for run in (alone, tmp_path / "run")]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] - states[1][name]).abs().max() < 1e-4 for name in states[0])


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_counts_every_image_once_where_they_do_not_divide(reference, folder, tmp_path, count):
    odd = pictures(tmp_path / "odd", per_class=3, classes=4)
    next((odd / "val" / "digit1").iterdir()).unlink()  # 11 images, batches of 4
    done = process("evaluate", reference, "--data", odd, "--eval-batch-size", 4, processes=count)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 11 images" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(reference, folder, tmp_path, number, status):
    arguments = ["train", folder, *LONG, "--save-every", "0", "--out", tmp_path, "--name", "run", "--resume", "auto"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, env=environment()) as running:
        wait_for_lines(tmp_path / "run" / "log.jsonl", 10)  # an epoch has 7 steps
        running.send_signal(number)
        output, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == status, output
    step = int(re.search(r"stopped after step (\d+)", output)[1])
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == f"step-{step:09d}.pt"
    done = process(*arguments)
    assert f"goes on after step {step} of 28" in done.stdout, done.stdout + done.stderr
    same(reference, tmp_path / "run")


def test_a_signal_to_torchrun_saves_once(folder, tmp_path):
    arguments = ["train", folder, *LONG, "--epochs", "200", "--out", tmp_path, "--name", "run", "--resume", "auto"]
    with subprocess.Popen(
        command(*arguments, processes=2), stdout=subprocess.PIPE, text=True, env=environment()
    ) as running:
        wait_for_lines(tmp_path / "run" / "log.jsonl", 3)
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=PATIENCE)
    step = int(re.search(r"stopped after step (\d+)", output)[1])
    assert output.count("stopped after step") == 1
    assert checkpoint.read(checkpoint.checkpoints(tmp_path / "run")[-1])["step"] == step


def wait_for_lines(path, count):
    end = time.monotonic() + PATIENCE
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end, f"{path} has no {count} lines"
        time.sleep(0.05)


def test_a_kill_in_the_middle_of_writing_loses_the_steps_since_the_last_checkpoint_and_no_more(
    reference, folder, tmp_path
):
    arguments = ["train", folder, *LONG, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    last = 0
    for wanted in (35, 50, 20):  # pieces of files of 20 pieces each
        with subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment()
        ) as running:
            pieces = 0
            for line in running.stdout:
                pieces += line.startswith("writing")
                if pieces == wanted:
                    writing = int(re.search(r"step-(\d+)", line)[1])
                    break
            running.kill()
            running.wait()
        torn = list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))
        found = checkpoint.checkpoints(tmp_path / "run")
        if found:
            step = checkpoint.read(found[-1])["step"]  # whole, whatever was being written
            assert last <= step <= writing and writing - step <= 2 + (writing % 7 == 0)
            last = step
        if not torn:
            assert found and step == writing
    done = process(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on after step {last} of 28" in done.stdout
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    same(reference, tmp_path / "run")


def test_kills_at_any_moment(reference, folder, tmp_path):
    arguments = ["train", folder, *LONG, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    for lines in (1, 6, 15):
        with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, env=environment()) as running:
            wait_for_lines(tmp_path / "run" / "log.jsonl", lines)
            running.kill()
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"kind": "st')  # as a kill in the middle of a line leaves it
    done = process(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    same(reference, tmp_path / "run")


def test_a_file_size_limit_is_a_sentence_and_leaves_the_last_checkpoint_whole(folder, tmp_path):
    arguments = ["train", folder, *LONG, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    assert process(*arguments, "--max-steps", "2").returncode == 0
    before = checkpoint.checkpoints(tmp_path / "run")
    done = process(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be written: File too large; what was there before still is" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.checkpoints(tmp_path / "run") == before
    assert checkpoint.read(before[-1])["step"] == 2
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_sentence(folder, tmp_path):
    """Lines of the log go to /dev/full, where every write fails as on a full disk."""
    arguments = ["train", folder, *LONG, "--out", tmp_path, "--name", "run", "--resume", "auto"]
    assert process(*arguments, "--max-steps", "2").returncode == 0
    code = "from irpe.runs import logs; logs.open = lambda path, mode: open('/dev/full', mode);"
    code += "from irpe.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "log.jsonl could not be written: No space left on device; the checkpoints are whole" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.read(checkpoint.checkpoints(tmp_path / "run")[-1])["step"] >= 2
