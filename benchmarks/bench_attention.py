"""Attention with iRPE beside attention without it: time and peak memory, one table.

    python benchmarks/bench_attention.py --maps 14 24 32 --on k qk qkv --dtype float32
    python benchmarks/bench_attention.py --device cuda --out results

All variants of a line run in turns within one process; the numbers are medians, and ratios to attention without iRPE:
the faster of `F.scaled_dot_product_attention` and matmul, softmax, matmul. Every call starts from q, k, v cut out of
one projection, as timm has them, and includes the products of queries and keys with the tables.

On a GPU the base is `F.scaled_dot_product_attention` by its flash kernel, and times are of replayed CUDA graphs, so of
the kernels alone; "launched" has the ratio of calls that Python launches one by one, as eager training does.
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
from benchmarks import common
from irpe import build_rpe, get_rpe_config, rpe_attention

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


def flex(q, k, v, rpe_k):
    """FlexAttention with the encoding on keys as a score_mod: forward only on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    ((W, ids),) = rpe_k.tables(q)
    lut = (q * DIM**-0.5) @ W
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + lut[b, h, i, ids[i, j]])


def variants(side, on, dtype, train):
    q, k, v, grad = inputs(side, dtype, train)
    rpe = encodings(on, dtype)
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "matmul": lambda: formula(q, k, v),
        "ours": lambda: rpe_attention(q, k, v, *rpe, backend="cpu"),
        "eager": lambda: rpe_attention(q, k, v, *rpe, backend="eager"),
    }
    if "v" not in on:
        calls["sdpa+bias"] = lambda: rpe_attention(q, k, v, *rpe, backend="sdpa")
    if on == "k" and not train:
        compiled = torch.compile(flex)
        calls["flex"] = lambda: compiled(q, k, v, rpe[1])

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
    while time.perf_counter() < stop or len(times["ours"]) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


GPU_SHAPES = {14: (128, 1), 32: (16, 1), 64: (4, 0)}  # side of the map: batch, skip tokens


def gpu_calls(side, heads, on, train):
    """{name: step} on a GPU in bfloat16, each checked on one image against the formula in float64."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    batch, skip = GPU_SHAPES[side]
    tokens, options = skip + side * side, dict(dtype=torch.bfloat16, device="cuda")
    q, k, v = torch.randn(batch, tokens, 3, heads, DIM, **options).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = (x.detach().requires_grad_(train) for x in (q, k, v))
    grad = torch.randn(batch, tokens, heads, DIM, **options).transpose(1, 2)
    rpe = build_rpe(get_rpe_config(1.9, "product", skip=skip, rpe_on=on), DIM, heads, **options)
    tables = [t for module in rpe if module is not None for t in module.parameters()]
    for table in tables:
        nn.init.normal_(table, std=0.1)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    def with_encoding(q, k, v):
        ((W, ids),) = rpe[1].tables(q)
        lut = (q * DIM**-0.5) @ W
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + lut[b, h, i, ids[i, j]])

    calls = {
        "flash": flash,
        "ours": lambda: rpe_attention(q, k, v, *rpe, backend="triton"),
        "eager": lambda: rpe_attention(q, k, v, *rpe, backend="eager"),
    }
    if on == "k" and heads == 6:  # compiling takes a while
        compiled = torch.compile(with_encoding, fullgraph=True)
        calls["flex"] = lambda: compiled(q, k, v)

    def step(call):
        if not train:
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call(), [q, k, v, *tables], grad, allow_unused=True)

    one = [x[:1].detach() for x in (q, k, v)]
    doubles = [m and copy.deepcopy(m).double() for m in rpe]
    with torch.no_grad():
        exact = rpe_attention(*(x.double() for x in one), *doubles, backend="eager")
        for name in calls.keys() - {"flash"}:
            error = (calls[name]()[:1].double() - exact).abs().max().item()
            assert error < 16 * torch.finfo(torch.bfloat16).eps, f"{name} is wrong by {error}"
    return {name: lambda call=call: step(call) for name, call in calls.items()}


def graphed(call):
    """A CUDA graph of the call, and the most memory in MiB that the call takes while it runs."""
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
    return graph, peak


def on_gpu(maps, on):
    lines = []
    for side in maps:
        for heads in (6, 12):
            for train in (False, True):
                for where in on:
                    torch._dynamo.reset()
                    calls = gpu_calls(side, heads, where, train)
                    graphs, mib = {}, {}
                    for name, call in calls.items():
                        try:
                            graphs[name], mib[name] = graphed(call)
                        except Exception as error:
                            if name in ("flash", "ours"):
                                raise
                            print(f"  {name} does not run: {type(error).__name__}", file=sys.stderr)
                    rounds = dict(rounds=4, device="cuda")
                    replayed = common.side_by_side({n: graph.replay for n, graph in graphs.items()}, **rounds)
                    launched = common.side_by_side({n: calls[n] for n in ("flash", "ours")}, **rounds)
                    base = replayed["flash"]["median"]
                    batch, skip = GPU_SHAPES[side]
                    line = dict(map=f"{side}x{side}+{skip}", B=batch, H=heads, dtype="bfloat16", on=where)
                    line |= {"pass": "forward+backward" if train else "forward", "flash ms": base * 1e3}
                    line |= {name: taken["median"] / base for name, taken in replayed.items() if name != "flash"}
                    line["launched"] = launched["ours"]["median"] / launched["flash"]["median"]
                    line["memory"] = mib["ours"] / mib["flash"]
                    line["MiB"] = mib
                    print(line, flush=True)
                    lines.append(line)
                    del calls, graphs
                    torch.cuda.empty_cache()
    heads = ["map", "B", "H", "on", "pass", "flash ms", "ours", "eager", "flex", "launched", "memory"]
    print("\nratios to flash attention without encodings; memory is the peak over the inputs:\n")
    print(common.markdown([{head: line.get(head, "") for head in heads} for line in lines]))
    return lines


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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: bfloat16, 6 and 12 heads")
    parser.add_argument("--maps", type=int, nargs="+", choices=BATCH | GPU_SHAPES)
    parser.add_argument("--on", nargs="+", default=["k", "qk", "qkv"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line of the table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread: for a machine that others use too")
    parser.add_argument("--memory", action="store_true", help="peak memory of each variant too, in MiB")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    if args.device == "cuda":
        print(common.machine("cuda"))
        torch.manual_seed(0)
        lines = on_gpu(args.maps or list(GPU_SHAPES), args.on)
        if args.out is not None:
            print(common.write(args.out, "bench_attention", "cuda", lines))
        return
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    torch.manual_seed(0)
    lines = []
    for dtype in args.dtype:
        for side in args.maps or [14, 24, 32]:
            for train in (False, True):
                for on in args.on:
                    torch._dynamo.reset()
                    seconds = medians(variants(side, on, getattr(torch, dtype), train), args.seconds, clock)
                    base = min(seconds["sdpa"], seconds["matmul"])
                    flops = 4 * BATCH[side] * HEADS * (SKIP + side * side) ** 2 * DIM * (3.5 if train else 1)
                    line = dict(dtype=dtype, map=side, pass_="forward+backward" if train else "forward", on=on)
                    line["clock"] = "CPU time of one thread" if args.cpu_time else "wall time"
                    line |= dict(base_ms=base * 1e3, base_gflops=flops / base / 1e9)
                    line["ratio"] = {name: value / base for name, value in seconds.items()}
                    if args.memory:
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
        print(common.write(args.out, "bench_attention", "cpu", lines))


if __name__ == "__main__":
    main()
