"""Attention with iRPE beside attention without it: time and peak memory, one table.

    python benchmarks/bench_attention.py --maps 14 24 32 --on k qk qkv --dtype float32
    python benchmarks/bench_attention.py --device cuda --out results

All variants of a line run in turns within one process; the numbers are medians, and ratios to attention without iRPE:
the faster of `F.scaled_dot_product_attention` and matmul, softmax, matmul. Every call starts from q, k, v cut out of
one projection, as timm has them, and includes the products of queries and keys with the tables.

On a GPU (`attention_gpu.py`) the base is `F.scaled_dot_product_attention` by its flash kernel, and times are of
replayed CUDA graphs, so of the kernels alone, and of calls that Python launches one by one, as eager training does.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import attention_gpu, common
from irpe import build_rpe, get_bucket_ids_2d, get_rpe_config, rpe_attention
from rpe_ops.rpe_attention import rpe_attention as plain_tiles

HEADS, DIM, SKIP = 6, 64, 1
BATCH = {14: 16, 24: 4, 32: 2, 64: 1}


def inputs(side, dtype, train):
    batch, tokens = BATCH[side], SKIP + side * side
    qkv = torch.randn(batch, tokens, 3, HEADS, DIM, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_(train) for x in qkv.unbind(0))
    return q, k, v, torch.randn(batch, tokens, HEADS, DIM, dtype=dtype).transpose(1, 2)


def encodings(on, dtype):
    modules = build_rpe(get_rpe_config(1.9, "product", skip=SKIP, rpe_on=on), DIM, HEADS, dtype=dtype)
    for module in modules:
        for table in [] if module is None else module.parameters():
            nn.init.normal_(table, std=0.1)
    return modules


def formula(q, k, v):
    return ((q * DIM**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def flex(q, k, v, table, ids):
    """FlexAttention with the encoding on keys as a score_mod: forward only on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    lut = (q * DIM**-0.5) @ table
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + lut[b, h, i, ids[i, j]])


def variants(side, on, dtype, train, with_flex):
    q, k, v, grad = inputs(side, dtype, train)
    rpe = encodings(on, dtype)
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "matmul": lambda: formula(q, k, v),
        "tiles": lambda: plain_tiles(q, k, v, backend="cpu")[0],  # ours, without encodings
        "ours": lambda: rpe_attention(q, k, v, *rpe, backend="cpu"),
        "eager": lambda: rpe_attention(q, k, v, *rpe, backend="eager"),
    }
    if "v" not in on:
        calls["sdpa+bias"] = lambda: rpe_attention(q, k, v, *rpe, backend="sdpa")
    if with_flex and on == "k" and not train:
        compiled = torch.compile(flex)
        ids, _ = get_bucket_ids_2d("product", side, side, SKIP, 1.9, 3.8, 15.2)
        calls["flex"] = lambda: compiled(q, k, v, rpe[1].lookup_table_weight, ids)

    def step(call):
        if not train:
            with torch.no_grad():
                return call()
        wanted = [q, k, v, *tables]
        return torch.autograd.grad(call(), wanted, grad, allow_unused=True)

    exact = rpe_attention(q.double(), k.double(), v.double(), *(m and copy.deepcopy(m).double() for m in rpe))
    for name in ("ours", "eager"):
        error = (calls[name]().double() - exact).abs().max().item()
        assert error < 64 * torch.finfo(dtype).eps, f"{name} is wrong by {error}"
    return {name: lambda call=call: step(call) for name, call in calls.items()}


def medians(calls, seconds, clock):
    times = {name: [] for name in calls}
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:
            print(f"  {name} does not run: {type(error).__name__}", file=sys.stderr)
            del calls[name], times[name]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["ours"]) < 3:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(side, on, dtype, train, name):
    """Peak of the resident memory over what inputs and imports take."""
    code = f"""
from benchmarks import bench_attention as b
q, k, v, grad = b.inputs({side}, {dtype}, {train})
rpe = b.encodings({on!r}, {dtype})
attention = dict(sdpa=lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    ours=lambda: b.rpe_attention(q, k, v, *rpe, backend="cpu"),
    eager=lambda: b.rpe_attention(q, k, v, *rpe, backend="eager"))[{name!r}]
def call():
    out = attention()
    if {train}:
        out.backward(grad)
small = [x[:1, :, :17].detach() for x in (q, k, v)]
b.rpe_attention(*small, *rpe, height=4, width=4).sum()
"""
    return common.peak_mib(code, threads=torch.get_num_threads())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda", "dry"], help="dry: the lines of cuda, tiny, on a CPU"
    )
    parser.add_argument("--maps", type=int, nargs="+", choices=BATCH)
    parser.add_argument("--on", nargs="+", default=["k", "qk", "qkv"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line of the table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread: for a machine that others use too")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], choices=BATCH, help="maps whose peak memory is taken"
    )
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, which takes a minute to compile")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument(
        "--flex-until",
        type=float,
        default=600,
        help="on a GPU, seconds after which FlexAttention is not compiled any more",
    )
    common.add_isa(parser)
    args = parser.parse_args()
    common.hold_down(args.isa)
    if args.device != "cpu":
        attention_gpu.main(args)
        return
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    torch.manual_seed(0)
    lines = []
    for dtype in args.dtype:
        for side in args.maps or [14, 24, 32]:
            if dtype == "bfloat16" and side > 32:
                continue  # the formula takes minutes there
            for train in (False, True):
                for on in args.on:
                    torch._dynamo.reset()
                    seconds = medians(variants(side, on, getattr(torch, dtype), train, args.flex), args.seconds, clock)
                    base = min(seconds["sdpa"], seconds["matmul"])
                    flops = 4 * BATCH[side] * HEADS * (SKIP + side * side) ** 2 * DIM * (3.5 if train else 1)
                    line = dict(
                        dtype=dtype, map=side, B=BATCH[side], pass_="forward+backward" if train else "forward", on=on
                    )
                    line["clock"] = "CPU time of one thread" if args.cpu_time else "wall time"
                    line |= dict(base_ms=base * 1e3, base_gflops=flops / base / 1e9)
                    line["ratio"] = {name: value / base for name, value in seconds.items()}
                    if side in args.memory and on == args.on[-1]:
                        names = ["sdpa", "ours", "eager"]
                        line["mib"] = {n: peak_mib(side, on, getattr(torch, dtype), train, n) for n in names}
                    ratios = "  ".join(f"{name} {value:.2f}" for name, value in line["ratio"].items())
                    memory = "  ".join(f"{name} {value:.0f} MiB" for name, value in line.get("mib", {}).items())
                    print(
                        f"{dtype} {side}x{side}+{SKIP} {line['pass_']} {on}: {base * 1e3:.1f} ms "
                        f"({line['base_gflops']:.0f} GFLOP/s)  {ratios}  {memory}",
                        flush=True,
                    )
                    lines.append(line)
    if args.out is not None:
        print(common.write(args.out, "bench_attention", "cpu", lines, args.isa))


if __name__ == "__main__":
    main()
