"""Builds for the GPU that is here, tests and measures on it, in under five minutes: one table, one JSON.

    make gpu-check                        # or python benchmarks/gpu_check.py --results gpu-check
    make gpu-check ONLY=tests,model       # some of: tests, ops, attention, model

Needs torch with CUDA, pytest for the tests and timm for the model, and installs nothing. Every part has a time limit of
its own; what fails or takes too long is reported and the next part follows. Exit status 1 when a part has failed.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "ops", "attention", "model")
# seconds; below 280 together, which leaves ten for what is between the parts. The libraries and the Triton kernels are
# built side by side, models are compiled while the tests run
LIMITS = {"build": 70, "tests": 65, "ops": 18, "attention": 62, "model": 63}

FACTS = """
import json, sys
import torch
from benchmarks import common
from rpe_ops import _native
dry = sys.argv[1] == "dry"
if not dry and not torch.cuda.is_available():
    sys.exit(f"no CUDA device is visible to torch {torch.__version__} of {sys.executable}")
facts = common.machine("cpu" if dry else "cuda")
facts["capability"] = "dry" if dry else ".".join(map(str, torch.cuda.get_device_capability()))
facts["CPU operators"] = _native.LOADED.get("cpu")
print(json.dumps(facts))
"""

KERNELS = """
import json, os, sys
from pathlib import Path
from rpe_ops import _triton_ahead
found = _triton_ahead.compile_here(processes=os.cpu_count() or 1)
Path(sys.argv[1]).write_text(json.dumps(found))
failed = [name for name, seconds in found.items() if isinstance(seconds, str)]
sys.exit(f"{len(failed)} of {len(found)} kernels do not compile" if failed else 0)
"""


class Job:
    """A command in a process group of its own, with its output in a file, that `finish` ends at its time limit."""

    def __init__(
        self, name: str, command: list[str], log: Path, limit: float, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.log, self.limit, self.start = name, log, limit, time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends the command and whatever it has started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
            except (ProcessLookupError, PermissionError):
                break
            time.sleep(0.5)
        self.process.wait()

    def finish(self) -> dict[str, Any]:
        try:
            self.process.wait(max(0.0, self.start + self.limit - time.monotonic()))
            status = "passed" if self.process.returncode == 0 else f"failed (exit status {self.process.returncode})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {self.limit:g} s"
        seconds = time.monotonic() - self.start
        self.stop()
        tail = [] if status == "passed" else self.log.read_text(errors="replace").splitlines()[-15:]
        return {"status": status, "seconds": round(seconds, 1)} | ({"tail": tail} if tail else {})


class Check:
    def __init__(self, options: argparse.Namespace) -> None:
        self.results: Path = options.results
        self.dry: bool = options.dry
        self.device = "dry" if self.dry else "cuda"
        self.limits = LIMITS | {name: float(limit) for name, limit in (pair.split("=") for pair in options.limit)}
        self.parts: dict[str, dict[str, Any]] = {}
        self.jobs: list[Job] = []
        self.machine: dict[str, Any] = {}

    def job(self, name: str, command: list[str], limit: str | None = None, env: dict[str, str] | None = None) -> Job:
        print(f"[{time.strftime('%H:%M:%S')}] {name}", flush=True)
        job = Job(name, [sys.executable, *command], self.results / f"{name}.log", self.limits[limit or name], env)
        self.jobs.append(job)
        return job

    def finish(self, *jobs: Job) -> None:
        for job in jobs:
            part = self.parts[job.name] = job.finish()
            print(f"[{time.strftime('%H:%M:%S')}] {job.name} {part['status']} ({part['seconds']} s)", flush=True)
            self.write()

    def write(self) -> None:
        file = self.results / "gpu_check.json"
        file.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")

    def find_machine(self) -> str | None:
        """None, or why there is nothing to check here."""
        command = [sys.executable, "-c", FACTS, self.device]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return "torch was not imported within 60 s"
        if done.returncode != 0:
            return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        self.machine = json.loads(done.stdout.splitlines()[-1])
        print(self.machine, flush=True)
        return None

    def prepare(self) -> None:
        """The library for CUDA, the one for the CPU where none loads, and the Triton kernels, all at once."""
        found = self.results / "kernels.json"
        found.unlink(missing_ok=True)
        if self.dry:
            self.finish(self.job("build", ["rpe_ops/setup.py", "--version"], env={"RPE_OPS_CUDA": "0"}))
            return
        build = ["rpe_ops/setup.py", "build_ext", "--inplace", "--build-temp"]
        cuda = {"RPE_OPS_CPU": "0", "RPE_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.machine["capability"]}
        jobs = [self.job("build", [*build, "build/gpu-check-cuda"], env=cuda)]
        if self.machine["CPU operators"] is None:  # its attention alone takes a compiler most of a minute
            jobs.append(self.job("build cpu", [*build, "build/gpu-check-cpu"], "build", {"RPE_OPS_CUDA": "0"}))
        jobs.append(self.job("kernels", ["-c", KERNELS, str(found)], "build"))
        self.finish(*jobs)
        if found.exists():
            self.parts["kernels"]["rows"] = json.loads(found.read_text())

    def warm(self) -> list[Job]:
        """Processes that compile the models into the cache on disk, within the time of the tests."""
        return [
            self.job(f"model {name}", ["benchmarks/bench_model.py", "--device", self.device, "--warm", name], "tests")
            for name in ("plain", "k", "qkv")
        ]

    def tests(self) -> Job:
        telling = ["-p", "benchmarks.tell_tests", "--tb=short", "--no-summary"]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", *telling]
        if self.dry:
            return self.job("tests", [*command, "tests/test_rpe_index.py", "-k", "adjoint or columns"])
        if importlib.util.find_spec("xdist") is not None:
            # most of a test's time is a compiler's
            command += ["--numprocesses", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
        files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_*_gpu.py"))
        return self.job("tests", [*command, "-m", "gpu", *files])

    def benchmark(self, part: str) -> Job:
        out = ["--out", str(self.results)]
        if part == "ops":
            sizes = ["--device", "cuda", "--dtypes", "float32", "bfloat16", "--rounds", "4"]
            if self.dry:
                sizes = ["--shapes", "tiny", "--dtypes", "float32", "--rounds", "2"]
            return self.job(part, ["benchmarks/bench_rpe_index.py", *sizes, "--no-flat", *out])
        command = [f"benchmarks/bench_{part}.py", "--device", self.device, *out]
        if part == "attention":
            command += ["--flex-until", str(self.limits[part] - 10)]
        return self.job(part, command)

    def run(self, wanted: list[str]) -> None:
        self.prepare()
        warming = self.warm() if "model" in wanted else []
        if "tests" in wanted:
            self.finish(self.tests())
            log = (self.results / "tests.log").read_text(errors="replace").splitlines()
            self.parts["tests"]["rows"] = [x for x in log if x.startswith(("FAILED", "STOPPED"))] + log[-1:]
        self.finish(*warming)
        files = {"ops": "bench_rpe_index", "attention": "bench_attention", "model": "bench_model"}
        for part in [part for part in PARTS[1:] if part in wanted]:
            device = "cpu" if self.dry and part == "ops" else self.device
            file = self.results / f"{files[part]}_{device}.json"
            file.unlink(missing_ok=True)
            self.finish(self.benchmark(part))
            if file.exists():  # of a part that was stopped too, as far as it came
                self.parts[part]["rows"] = json.loads(file.read_text())["rows"]
                self.write()


def lines_of(name: str, part: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(part, case, result, beside it) for the table."""
    lines = [(name, "", part["status"], f"{part['seconds']} s")]
    rows = part.get("rows", [])
    if name == "tests":
        lines += [(name, "", row, "") for row in rows]
    if name == "kernels" and rows:
        failed = {kernel: error for kernel, error in rows.items() if isinstance(error, str)}
        lines.append((name, "", f"{len(rows) - len(failed)} of {len(rows)} kernels compile", ""))
        lines += [(name, kernel, "fails", error.splitlines()[-1] if error else "") for kernel, error in failed.items()]
    if name == "ops":
        for row in rows:
            for way, other in (("forward", "gather"), ("backward", "scatter_add")):
                beside = f"{row[way]:.2f} of the copy's time, {other} {row[other]:.2f}"
                result = f"{row[f'{way}, of copy bandwidth']:.2f} of copy bandwidth"
                lines.append((name, f"{row['shape']} {row['dtype']} {way}", result, beside))
    if name == "attention":
        for row in rows:
            case = f"{row['map']} B={row['B']} H={row['H']} {row['pass']}"
            for key in ("graph us", "launched us", "forward us", "backward us"):
                if base := row.get(key, {}).get("flash"):
                    ratios = [f"{other} {us / base:.2f}" for other, us in row[key].items() if other != "flash"]
                    lines.append((name, f"{case}, {key[:-3]}", f"flash {base:.1f} us", ", ".join(ratios)))
            lines += [(name, case, f"{other} fails", why) for other, why in row.get("failures", {}).items()]
    if name == "model":
        for row in rows:
            ratio = f"time {row['time over plain']:.3f}, " if "time over plain" in row else ""
            ratio += f"memory {row['memory over plain']:.3f} of plain" if "memory over plain" in row else ""
            if "failure" in row:
                lines.append((name, f"{row['model']} {row['mode']}", "fails", row["failure"]))
            else:
                result = f"{row['images/s']:.0f} images/s, {row['MiB']:.0f} MiB"
                lines.append((name, f"{row['model']} {row['mode']}", result, ratio))
    return lines


def table(parts: dict[str, dict[str, Any]]) -> str:
    lines = [("part", "case", "result", "beside")]
    for name, part in parts.items():
        lines += lines_of(name, part)
    widths = [max(len(line[c]) for line in lines) for c in range(3)]
    return "\n".join("  ".join([*map(str.ljust, line[:3], widths), line[3]]).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}, by commas; all by default")
    parser.add_argument("--results", type=Path, default=Path("gpu-check"), help="folder for logs and JSON")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="another time limit")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: what the tests of this script run")
    options = parser.parse_args()
    wanted = [part for part in options.only.replace(" ", "").split(",") if part] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    options.results = options.results.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    check = Check(options)
    if reason := check.find_machine():
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check.run(wanted)
    except KeyboardInterrupt:
        check.parts["gpu-check"] = {"status": "interrupted", "seconds": round(time.monotonic() - start, 1)}
    finally:
        for job in check.jobs:
            job.stop()
    check.write()
    for name, part in check.parts.items():
        if "tail" in part:
            print(f"\n{name}: {part['status']}; the end of {check.results / name}.log:\n  " + "\n  ".join(part["tail"]))
    print(f"\n{check.machine}\n\n{table(check.parts)}\n")
    failed = [name for name, part in check.parts.items() if part["status"] != "passed"]
    verdict = f"failed: {', '.join(failed)}" if failed else "all parts passed"
    print(f"{verdict}; {time.monotonic() - start:.0f} s; {check.results / 'gpu_check.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
