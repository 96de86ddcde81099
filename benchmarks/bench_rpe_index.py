"""rpe_index and rpe_bucket_sum against a copy of the same size, torch.gather, scatter_add and flat advanced indexing.

    python benchmarks/bench_rpe_index.py                      # CPU, with the threads that torch takes
    OMP_NUM_THREADS=2 python benchmarks/bench_rpe_index.py --dtypes float32 --out benchmarks/results
    python benchmarks/bench_rpe_index.py --device cuda --out results

Forward: the table is read and (B, H, L, L) is written. Backward (`rpe_bucket_sum`): (B, H, L, L) is read. Every ratio
is to `out.copy_(x)` of (B, H, L, L), which reads and writes it, in the same run; operators also allocate what they
return. Results are compared with torch's before anything is timed. On a GPU the times are of replayed CUDA graphs, so
of the kernels alone; "launched" has those of calls that Python launches one by one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpe_ops
from benchmarks import common
from irpe import get_bucket_ids_2d
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

# name -> batch, heads, height, width, skip, ratio (N = 50 at 1.9 with a skip token, 81 at 2.0 without)
CPU_SHAPES = {
    "DeiT 14x14+1": (16, 6, 14, 14, 1, 1.9),
    "DeiT 24x24+1": (4, 6, 24, 24, 1, 1.9),
    "DeiT 32x32+1": (4, 6, 32, 32, 1, 1.9),
    "DETR 25x34": (2, 8, 25, 34, 0, 2.0),
}
TINY_SHAPES = {"tiny": (2, 3, 5, 4, 1, 1.9)}
GPU_SHAPES = {"B=128 14x14+1": (128, 6, 14, 14, 1, 1.9), "B=8 64x64+1": (8, 12, 64, 64, 1, 1.9)}


def plain_index(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, ids.expand(*x.shape[:2], *ids.shape))


def plain_bucket_sum(y: torch.Tensor, ids: torch.Tensor, buckets: int) -> torch.Tensor:
    return y.new_zeros(*y.shape[:3], buckets).scatter_add_(-1, ids.expand(y.shape), y)


def flat_ids(ids: torch.Tensor, buckets: int) -> torch.Tensor:
    return (ids + buckets * torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)).flatten()


def flat_index(x: torch.Tensor, flat: torch.Tensor, keys: int) -> torch.Tensor:
    """The advanced indexing that many projects write: every (i, bucket) as one dimension."""
    return x.flatten(2)[:, :, flat].unflatten(2, (x.shape[2], keys))


def check(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, buckets: int) -> None:
    assert torch.equal(rpe_index(x, ids), plain_index(x, ids)), "rpe_index differs from torch.gather"
    exact = plain_bucket_sum(y.double(), ids, buckets)
    eps = torch.finfo(y.dtype).eps
    worst = (plain_bucket_sum(y, ids, buckets).double() - exact).abs().max()
    error = (rpe_bucket_sum(y, ids, buckets).double() - exact).abs().max()
    assert error <= 2 * worst + 16 * eps * max(1, exact.abs().max()), f"rpe_bucket_sum is off by {error}"


def measure(name: str, dtype: torch.dtype, device: str, rounds: int, flat: bool) -> dict[str, Any]:
    batch, heads, height, width, skip, ratio = (CPU_SHAPES | GPU_SHAPES | TINY_SHAPES)[name]
    ids, buckets = get_bucket_ids_2d("product", height, width, skip, ratio, 2 * ratio, 8 * ratio, device=device)
    keys = ids.shape[0]
    x = torch.randn(batch, heads, keys, buckets, device=device).to(dtype)
    y = torch.randn(batch, heads, keys, keys, device=device).to(dtype)
    out = torch.empty_like(y)
    check(x[:1], y[:1], ids, buckets)
    calls = {
        "copy": lambda: out.copy_(y),
        "clone": lambda: y.clone(),
        "forward": lambda: rpe_index(x, ids),
        "backward": lambda: rpe_bucket_sum(y, ids, buckets),
        "gather": lambda: plain_index(x, ids),
        "scatter_add": lambda: plain_bucket_sum(y, ids, buckets),
    }
    if flat:
        where = flat_ids(ids, buckets)
        leaf = x.clone().requires_grad_()
        indexed = flat_index(leaf, where, keys)
        calls["indexing"] = lambda: flat_index(x, where, keys)
        calls["its backward"] = lambda: torch.autograd.grad(indexed, leaf, y, retain_graph=True)
    launched = {}
    if device == "cuda":
        names = ("copy", "forward", "backward")
        launched = common.side_by_side({name: calls[name] for name in names}, rounds=rounds, device=device)
        del calls["clone"]
        calls = {name: common.graphed(call, device)[0] for name, call in calls.items()}
    taken = common.side_by_side(calls, rounds=rounds, device=device)
    copy = taken["copy"]
    row: dict[str, Any] = {"shape": name, "B": batch, "H": heads, "N": buckets, "dtype": str(dtype).split(".")[1]}
    row |= {"copy ms": copy["best"] * 1e3, "copy ms, median": copy["median"] * 1e3}
    for call, seconds in taken.items():
        if call != "copy":
            row[call] = seconds["best"] / copy["best"]
    for call in ("forward", "backward"):
        row[f"{call}, medians"] = taken[call]["median"] / copy["median"]
        table = x.numel() + y.numel() + ids.numel() * ids.element_size() / x.element_size()
        row[f"{call}, of copy bandwidth"] = table / (2 * y.numel()) * copy["best"] / taken[call]["best"]
        if launched:
            row[f"{call}, launched"] = launched[call]["best"] / launched["copy"]["best"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--shapes", nargs="+", choices=CPU_SHAPES | GPU_SHAPES | TINY_SHAPES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-flat", action="store_true", help="leave flat advanced indexing out, which is slow")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    common.add_isa(parser)
    options = parser.parse_args()
    common.hold_down(options.isa)
    common.keep_memory()
    print(common.machine(options.device))
    print(f"{options.device}: {rpe_ops.backends()[options.device]}")
    shapes = options.shapes or (GPU_SHAPES if options.device == "cuda" else CPU_SHAPES)
    rows = []
    with torch.no_grad():
        for name in shapes:
            for dtype in options.dtypes:
                with torch.enable_grad():
                    rows.append(
                        measure(name, getattr(torch, dtype), options.device, options.rounds, not options.no_flat)
                    )
                print(rows[-1], flush=True)
                if options.out:  # at once: whoever stops the run keeps what was measured
                    file = common.write(options.out, "bench_rpe_index", options.device, rows, options.isa)
    short = ["shape", "dtype", "N", "copy ms", "forward", "backward", "gather", "scatter_add"]
    if options.device == "cpu":
        short.insert(4, "clone")
    if not options.no_flat:
        short += ["indexing", "its backward"]
    if options.device == "cuda":
        short += [
            "forward, of copy bandwidth",
            "backward, of copy bandwidth",
            "forward, launched",
            "backward, launched",
        ]
    print("\nratios to the copy, the lowest tenth of each call's times:\n")
    print(common.markdown([{head: row[head] for head in short} for row in rows]))
    if options.out:
        print(f"\n{file}")


if __name__ == "__main__":
    main()
