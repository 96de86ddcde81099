"""`make gpu-check` without a GPU: the same script with `--dry`, and what it does when parts fail or take too long."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE

sys.path.insert(0, str(ROOT))
from benchmarks import gpu_check


def run(results, *options):
    command = [sys.executable, "benchmarks/gpu_check.py", "--results", str(results), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    file = results / "gpu_check.json"
    return done, json.loads(file.read_text()) if file.exists() else None


def test_all_parts_take_less_than_five_minutes():
    assert gpu_check.LIMITS.keys() == {"build", *gpu_check.PARTS}
    assert sum(gpu_check.LIMITS.values()) <= 280


def tell(path, *options):
    """A process of pytest with the plugin, over tests that pass, fail and take their time."""
    file = path / "test_some.py"
    file.write_text(
        "import pathlib, time\n"
        "def test_passes(): pass\n"
        "def test_fails():\n    x = 3\n    assert x == 4, 'three is not four'\n"
        "def test_takes_long():\n"
        f"    pathlib.Path({str(path / 'begun')!r}).touch()\n"
        f"    time.sleep({PATIENCE})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    command += ["-p", "benchmarks.tell_tests", "--no-summary", f"--rootdir={path}", str(file), *options]
    return gpu_check.Job("tests", command, path / "log", PATIENCE)


def test_failures_are_in_the_log_as_they_come(tmp_path):
    job = tell(tmp_path)
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
    job.limit = 0
    assert job.finish()["status"] == "stopped after 0 s"
    log = (tmp_path / "log").read_text()
    assert "FAILED test_some.py::test_fails in call: AssertionError: three is not four assert 3 == 4" in log
    assert "assert x == 4, 'three is not four'" in log  # the whole message
    assert " s test_some.py::test_passes" in log and "STOPPED test_some.py::test_takes_long after" in log


def test_a_run_of_tests_that_ends_says_so(tmp_path):
    assert tell(tmp_path, "-k", "passes").finish()["status"] == "passed"
    assert "1 passed, 2 deselected" in (tmp_path / "log").read_text()


def test_libraries_are_built_where_none_is_current(tmp_path, monkeypatch):
    asked = {}
    check = gpu_check.Check(SimpleNamespace(results=tmp_path, dry=False, limit=[]))
    monkeypatch.setattr(check, "job", lambda name, command, limit=None, env=None: asked.update({name: env}))
    monkeypatch.setattr(check, "finish", lambda *_: None)
    library = tmp_path / "library"
    library.touch()
    check.machine = {"capability": "9.0", "CPU operators": "here", "CUDA operators": str(library)}
    check.prepare()
    assert list(asked) == ["kernels"]  # newer than all sources
    os.utime(library, (0, 0))
    check.prepare()
    assert asked.keys() == {"build", "kernels"} and asked["build"]["RPE_OPS_CPU"] == "0"
    assert asked["build"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    check.machine["CPU operators"] = None
    check.prepare()
    assert asked["build cpu"] == {"RPE_OPS_CUDA": "0"}


@pytest.mark.slow
def test_every_part_on_a_cpu(tmp_path):
    pytest.importorskip("timm")
    done, found = run(tmp_path, "--dry", *(f"--limit={name}={PATIENCE}" for name in gpu_check.LIMITS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts passed" in done.stdout
    assert {"device", "torch", "date", "python", "CPU operators"} <= found["machine"].keys()
    assert [name for name in found["parts"] if "model " not in name] == ["build", "tests", "ops", "attention", "model"]
    ops, attention, model = (found["parts"][name]["rows"] for name in ("ops", "attention", "model"))
    assert ops[0]["forward, of copy bandwidth"] > 0
    assert [row["pass"] for row in attention] == ["host", "forward", "forward+backward"]
    names = ["flash", "cuDNN", "k", "qkv", "triton k", "triton qkv", "eager k", "eager qkv"]
    assert all(list(row["graph us"]) == names and not row["failures"] for row in attention[1:])
    assert [(row["model"], row["mode"]) for row in model] == [
        (name, mode) for mode in ("eager", "compiled") for name in ("plain", "k", "qkv")
    ]
    assert all(row["images/s"] > 0 and "time over plain" in row for row in model)
    for line in ("2 passed", "tiny float32 backward", "3x2+1 B=2 H=2 forward+backward, graph", "qkv compiled"):
        assert line in done.stdout.split("part ", 1)[1], done.stdout


@pytest.mark.slow
def test_a_part_that_takes_too_long_ends_and_the_next_follows(tmp_path):
    done, found = run(
        tmp_path,
        "--dry",
        "--only=tests,ops",
        "--limit=tests=0.5",
        f"--limit=ops={PATIENCE}",
        f"--limit=build={PATIENCE}",
    )
    assert done.returncode == 1 and "failed: tests" in done.stdout, done.stdout + done.stderr
    assert found["parts"]["tests"]["status"] == "stopped after 0.5 s"
    assert found["parts"]["ops"]["status"] == "passed" and found["parts"]["ops"]["rows"]
    assert set(found["parts"]) == {"build", "tests", "ops"}


def test_a_job_ends_with_all_that_it_has_started(tmp_path):
    pid = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '{PATIENCE}']); "
    code += f"open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    job = gpu_check.Job("sleeps", [sys.executable, "-c", code], tmp_path / "log", PATIENCE)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.1)
    job.limit = 0
    assert job.finish()["status"] == "stopped after 0 s"
    state = subprocess.run(["ps", "-o", "state=", "-p", pid.read_text()], capture_output=True, text=True).stdout.strip()
    assert state in ("", "Z")


def test_a_job_that_fails_says_how(tmp_path):
    code = "print('on the way'); raise SystemExit('the reason')"
    result = gpu_check.Job("fails", [sys.executable, "-c", code], tmp_path / "log", PATIENCE).finish()
    assert result["status"] == "failed (exit status 1)" and result["tail"] == ["on the way", "the reason"]


def test_figures_of_a_gpu_in_the_table():
    lines = gpu_check.table(
        {
            "kernels": {
                "status": "failed (exit status 1)",
                "seconds": 9,
                "rows": {"forward bf16": 1.5, "other": "E\nbad"},
            },
            "attention": {
                "status": "passed",
                "seconds": 60,
                "rows": [
                    dict(map="14x14+1", B=128, H=6, failures={"cuDNN": "no kernel"}, **{"pass": "forward"})
                    | {"graph us": {"flash": 60.0, "k": 90.0}, "launched us": {"flash": 66.0, "k": 132.0}}
                ],
            },
            "model": {
                "status": "passed",
                "seconds": 60,
                "rows": [{"model": "k", "mode": "eager", "failure": "out of memory"}],
            },
        }
    ).splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert "kernels 1 of 2 kernels compile" in words and "kernels other fails bad" in words
    assert "attention 14x14+1 B=128 H=6 forward, graph flash 60.0 us k 1.50" in words
    assert "attention 14x14+1 B=128 H=6 forward, launched flash 66.0 us k 2.00" in words
    assert "attention 14x14+1 B=128 H=6 forward cuDNN fails no kernel" in words
    assert "model k eager fails out of memory" in words


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done, found = run(tmp_path, "--only=ops")
    assert done.returncode == 1 and "gpu-check: no CUDA device is visible to torch" in done.stderr and found is None


def test_a_part_that_there_is_not(tmp_path):
    done, _ = run(tmp_path, "--only=ops,bench")
    assert (
        done.returncode == 2 and "there is no part bench; expected some of tests, ops, attention, model" in done.stderr
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_hands_on_what_it_is_given():
    command = ["make", "-n", "--no-print-directory", "gpu-check", "ONLY=tests,ops", "RESULTS=here", "PYTHON=python3"]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == 'python3 benchmarks/gpu_check.py --results "here" --only "tests,ops"'
