"""What the benchmarks share: memory that is reused, timings side by side, tables and JSON."""

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What holds libraries down to an instruction set: these operators, torch itself, oneDNN and MKL under it.
ISA_VARIABLES = {
    "avx2": {
        "RPE_OPS_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


def add_isa(parser: argparse.ArgumentParser) -> None:
    """The option `--isa`, for `hold_down`."""
    names = ", ".join(f"{name}={value}" for name, value in ISA_VARIABLES["avx2"].items())
    parser.add_argument(
        "--isa", choices=ISA_VARIABLES, help=f"both sides as on a machine without AVX-512: starts again with {names}"
    )


def hold_down(isa: str | None) -> None:
    """Starts this program again where the variables of `isa` are not set: libraries read them when they load."""
    wanted = ISA_VARIABLES.get(isa or "", {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def keep_memory() -> None:
    """Tell glibc to keep memory that is freed: else page faults of large outputs would be timed, not operators."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece of memory of its own for any tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the system
    except (AttributeError, OSError):
        pass  # another C library: its own habits are timed with the rest


def side_by_side(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 30, device: str = "cpu", repeats: int = 10
) -> dict[str, dict[str, float]]:
    """{name: {"median": s, "best": s}}: the calls take turns, so whatever else the machine does meets all of them.

    `best` is the lowest tenth: on a shared machine the median tells of the neighbours. On a GPU a time is that of
    `repeats` calls in a row, by CUDA events.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            seconds = _on_gpu(call, repeats) if device == "cuda" else _on_cpu(call)
            if round_number >= 2:
                times[name].append(seconds)
    return {
        name: {"median": statistics.median(taken), "best": sorted(taken)[len(taken) // 10]}
        for name, taken in times.items()
    }


def _on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], Any], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def graphed(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], float]:
    """What repeats `call` without the host's part in it, and the most memory in MiB that a call takes.

    On a GPU a CUDA graph that is replayed; elsewhere the call itself, and no figure for the memory.
    """
    if device != "cuda":
        call()
        return call, 0.0
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay, peak


def host_us(call: Callable[[], Any], device: str, calls: int = 50) -> float:
    """Microseconds of this thread for a call, the best of five runs; `call` leaves a GPU next to nothing to do."""
    call()
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def peak_mib(code: str, *, threads: int) -> float:
    """Peak of the resident memory of `call()` over what stands before it, in a process of its own.

    `code` defines `call`, with what it needs, and has warmed up what should not be counted.
    """
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
torch.set_num_threads({threads})
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
{code}
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
call()
print((status("VmHWM") - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        facts |= {"device": torch.cuda.get_device_name(), "driver": driver.stdout.strip().split("\n")[0]}
        facts["triton"] = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    else:
        from rpe_ops import _native, rpe_attention_cpu  # what stands here now: `gpu_check` may just have built it

        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        facts |= {"device": names[0] if names else platform.processor(), "threads": torch.get_num_threads()}
        isa = rpe_attention_cpu.isa() if "cpu" in _native.LOADED else None
        facts |= {"isa": isa, "isa of torch": torch.backends.cpu.get_cpu_capability()}
        facts |= {name: os.environ[name] for name in ISA_VARIABLES["avx2"] if name in os.environ}
    return facts


def write(folder: Path, name: str, device: str, rows: list[dict[str, Any]], isa: str | None = None) -> Path:
    """{folder}/{name}_{device}.json, or {name}_{device}_{isa}.json, with the machine and the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}_{device}{f'_{isa}' if isa else ''}.json"
    file.write_text(
        json.dumps({"machine": machine("cuda" if device == "cuda" else "cpu"), "rows": rows}, indent=1) + "\n"
    )
    return file


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, floats with three digits."""
    heads = list(rows[0])
    text = [[f"{row[h]:.3g}" if isinstance(row[h], float) else str(row[h]) for h in heads] for row in rows]
    widths = [max(len(h), *(len(line[c]) for line in text)) for c, h in enumerate(heads)]
    lines = [heads, ["-" * w for w in widths], *text]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
