"""Attention on a map of (frames, height, width) tokens, product encoding, on a CPU: beside attention without it.

    python benchmarks/bench_axes.py --out benchmarks/results

All variants of a line run in turns within one process. A time is the lowest tenth of a variant's, a ratio is to that of
`F.scaled_dot_product_attention` without encodings. Memory is the peak of a first forward and backward over what stands
before it, in a process of its own.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common
from irpe import build_rpe, get_rpe_config, rpe_attention

BATCH, HEADS, DIM = 2, 6, 64


def variants(size: tuple[int, ...], on: str, train: bool) -> dict[str, Callable[[], Any]]:
    """{name: a forward, or a forward and backward}, all of the same inputs, tables drawn at random."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(BATCH, HEADS, math.prod(size), DIM) for _ in range(4))
    rpe = build_rpe(get_rpe_config(rpe_on=on, ndim=len(size)), DIM, HEADS)
    tables = [table for module in rpe if module is not None for table in module.parameters()]
    for table in tables:
        nn.init.normal_(table)
    wanted = [*(x.requires_grad_(train) for x in (q, k, v)), *tables]
    calls: dict[str, Callable[[], torch.Tensor]] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, backend in {"ours": "cpu", "eager": "eager"}.items():
        calls[name] = functools.partial(rpe_attention, q, k, v, *rpe, size=size, backend=backend)

    def step(call: Callable[[], torch.Tensor]) -> Any:
        if not train:
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call(), wanted, grad, allow_unused=True)

    return {name: functools.partial(step, call) for name, call in calls.items()}


def peak_mib(size: tuple[int, ...], on: str, name: str) -> float:
    """Of a forward and backward, what small ones load aside."""
    code = f"""
from benchmarks import bench_axes as b
b.variants((2, 3, 4), {on!r}, True)[{name!r}]()
call = b.variants({size}, {on!r}, True)[{name!r}]
"""
    return common.peak_mib(code, threads=torch.get_num_threads())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(8, 14, 14), metavar=("T", "H", "W"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, a process for each variant")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    common.add_isa(parser)
    args = parser.parse_args()
    common.hold_down(args.isa)
    torch.set_num_threads(args.threads)
    size = tuple(args.size)
    rows = []
    for train in (False, True):
        for on in ("k", "qkv"):
            calls = variants(size, on, train)
            torch.testing.assert_close(calls["ours"](), calls["eager"](), rtol=1e-3, atol=1e-3)
            seconds = {name: taken["best"] for name, taken in common.side_by_side(calls, rounds=args.rounds).items()}
            row: dict[str, Any] = {"size": size, "B": BATCH, "H": HEADS, "dtype": "float32"}
            row |= {"pass_": "forward+backward" if train else "forward", "on": on, "base_ms": seconds["sdpa"] * 1e3}
            row["ratio"] = {name: value / seconds["sdpa"] for name, value in seconds.items()}
            if train and not args.no_memory:
                row["mib"] = {name: peak_mib(size, on, name) for name in calls}
            print({key: row[key] for key in row if key not in ("B", "H", "dtype")}, flush=True)
            rows.append(row)
    if args.out is not None:
        print(common.write(args.out, "bench_axes", "cpu", rows, args.isa))


if __name__ == "__main__":
    main()
