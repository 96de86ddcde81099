"""Attention on maps of (8, 14, 14) tokens, product encoding: fused, the formula, and plain attention, on a CPU.

    python -m benchmarks.bench_axes --out benchmarks/results/bench_axes_cpu.json

Times are the least of the rounds, in which all take turns; memory is what the process grew by at its peak.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from irpe import build_rpe, get_rpe_config, rpe_attention

SIZE, B, H, D = (8, 14, 14), 2, 6, 64


def calls() -> dict[str, Callable[[], torch.Tensor]]:
    """{name: forward}."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, math.prod(SIZE), D, requires_grad=True) for _ in "qkv")
    made: dict[str, Callable[[], torch.Tensor]] = {"none": lambda: F.scaled_dot_product_attention(q, k, v)}
    for on in ("k", "qkv"):
        rpe = build_rpe(get_rpe_config(rpe_on=on, ndim=3), D, H)
        for one in rpe:
            if one is not None:
                torch.nn.init.normal_(one.table)
        for backend in ("cpu", "eager"):
            made[f"{on} {backend}"] = lambda rpe=rpe, backend=backend: rpe_attention(
                q, k, v, *rpe, size=SIZE, backend=backend
            )
    return made


def peak() -> float:
    """MiB of resident memory at the most, of this process alone (getrusage remembers that of the parent)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def memory_of(name: str) -> float:
    """MiB that one forward and backward needs at its peak, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_axes", "--memory", name], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="print the memory of this call")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = calls()
    if options.memory:
        small = [x[:, :, :8] for x in torch.randn(3, 1, 1, 8, D)]
        F.scaled_dot_product_attention(*small)
        before = peak()
        made[options.memory]().sum().backward()
        print(peak() - before)
        return
    with torch.no_grad():
        for on in ("k", "qkv"):  # the same numbers first
            torch.testing.assert_close(made[f"{on} cpu"](), made[f"{on} eager"](), rtol=1e-4, atol=1e-4)
    times = {name: {"forward": math.inf, "both": math.inf} for name in made}
    for _ in range(options.rounds):
        for name, call in made.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            middle = time.perf_counter()
            call().sum().backward()
            end = time.perf_counter()
            times[name]["forward"] = min(times[name]["forward"], middle - start)
            times[name]["both"] = min(times[name]["both"], end - middle)
    rows = {name: {**one, "memory_mib": memory_of(name)} for name, one in times.items()}
    for name, one in rows.items():
        ratios = one["forward"] / rows["none"]["forward"], one["both"] / rows["none"]["both"]
        print(f"{name:10} {one['forward']:.3f} s ({ratios[0]:.2f})  {one['both']:.3f} s ({ratios[1]:.2f})"
              f"  {one['memory_mib']:.0f} MiB")  # fmt: skip
    if options.out:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        machine = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
        about = dict(size=SIZE, B=B, H=H, D=D, rounds=options.rounds, threads=torch.get_num_threads(), cpu=machine)
        about |= dict(torch=torch.__version__, load=os.getloadavg()[0])
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
