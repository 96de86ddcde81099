"""What `bench_attention.py --device cuda` measures: attention with iRPE beside flash, cuDNN's and FlexAttention.

On `device="dry"` the same lines run on a CPU, tiny and with torch's formula for every kernel: tests do that.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from irpe import build_rpe, get_bucket_ids_2d, get_rpe_config, rpe_attention

DIM = 64
SHAPES = {14: (128, 1, 6), 32: (16, 0, 6), 64: (4, 0, 12)}  # side of the map: batch, skip tokens, heads
PASSES = {False: "forward", True: "forward+backward"}


class Case:
    """The calls of one shape, on the same q, k, v, cut out of one projection as timm has them."""

    def __init__(self, device: str, batch: int, height: int, width: int, skip: int, heads: int) -> None:
        self.is_dry = device != "cuda"
        self.batch, self.heads, self.skip, self.size = batch, heads, skip, dict(height=height, width=width)
        options: dict[str, Any] = dict(dtype=torch.bfloat16, device="cpu" if self.is_dry else "cuda")
        tokens = skip + height * width
        qkv = torch.randn(batch, tokens, 3, heads, DIM, **options).permute(2, 0, 3, 1, 4)
        self.qkv = [x.detach().requires_grad_() for x in qkv.unbind(0)]
        self.grad = torch.randn(batch, tokens, heads, DIM, **options).transpose(1, 2)
        self.rpe = {
            on: build_rpe(get_rpe_config(1.9, "product", skip=skip, rpe_on=on), DIM, heads, **options)
            for on in ("k", "qkv")
        }
        for on in self.rpe:
            for table in self.tables(on):
                nn.init.normal_(table, std=0.1)

    def tables(self, on: str | None) -> list[Tensor]:
        return [t for module in self.rpe.get(on or "", ()) if module is not None for t in module.parameters()]

    def sdpa(self, backend: SDPBackend) -> Tensor:
        if self.is_dry:
            return F.scaled_dot_product_attention(*self.qkv)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*self.qkv)

    def ours(self, on: str, backend: str | None) -> Tensor:
        return rpe_attention(*self.qkv, *self.rpe[on], **self.size, backend="eager" if self.is_dry else backend)

    def flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        W = self.rpe["k"][1].lookup_table_weight
        ids, _ = get_bucket_ids_2d("product", *self.size.values(), self.skip, 1.9, 3.8, 15.2, device=W.device)

        def with_encoding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lut = (q * DIM**-0.5) @ W
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + lut[b, h, i, ids[i, j]])

        compiled = torch.compile(with_encoding, fullgraph=True)
        return lambda: compiled(*self.qkv)

    def calls(self) -> dict[str, tuple[str | None, Callable[[], Tensor]]]:
        """{name: (where encodings are, call)}."""
        return {
            "flash": (None, lambda: self.sdpa(SDPBackend.FLASH_ATTENTION)),
            "cuDNN": (None, lambda: self.sdpa(SDPBackend.CUDNN_ATTENTION)),
            "k": ("k", lambda: self.ours("k", None)),
            "qkv": ("qkv", lambda: self.ours("qkv", None)),
            "triton k": ("k", lambda: self.ours("k", "triton")),
            "triton qkv": ("qkv", lambda: self.ours("qkv", "triton")),
            "eager k": ("k", lambda: self.ours("k", "eager")),
            "eager qkv": ("qkv", lambda: self.ours("qkv", "eager")),
        }

    def step(self, on: str | None, call: Callable[[], Tensor], train: bool) -> Callable[[], Any]:
        wanted = [*self.qkv, *self.tables(on)]

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        def both() -> Any:
            return torch.autograd.grad(call(), wanted, self.grad, allow_unused=True)

        return both if train else forward

    def check(self, on: str, call: Callable[[], Tensor]) -> None:
        """One image against the formula in float64."""
        one = [x[:1].detach().double() for x in self.qkv]
        modules = [m and copy.deepcopy(m).double() for m in self.rpe[on]]
        with torch.no_grad():
            exact = rpe_attention(*one, *modules, **self.size, backend="eager")
            error = (call()[:1].double() - exact).abs().max().item()
        assert error < 16 * torch.finfo(torch.bfloat16).eps, f"wrong by {error}"


def measure(case: Case, train: bool, device: str, rounds: int) -> dict[str, Any]:
    """Times over flash attention's, replayed and launched, and memory; a variant that fails gives its reason."""
    replayed, launched, mib, failures = {}, {}, {}, {}
    for name, (on, call) in case.calls().items():
        try:
            if on is not None:
                case.check(on, call)
            launched[name] = case.step(on, call, train)
            replayed[name], mib[name] = common.graphed(launched[name], device)
        except Exception as error:
            launched.pop(name, None)
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    times = {
        "graph us": common.side_by_side(replayed, rounds=rounds, device=device),
        "launched us": common.side_by_side(launched, rounds=rounds, device=device),
    }
    line: dict[str, Any] = {"pass": PASSES[train]}
    for key, taken in times.items():
        line[key] = {name: seconds["median"] * 1e6 for name, seconds in taken.items()}
    return line | {"MiB": mib, "failures": failures}


def add_flex(case: Case, line: dict[str, Any], train: bool, device: str, rounds: int) -> None:
    try:
        call = case.flex()
        case.check("k", call)
        step = case.step("k", call, train)
        replay, line["MiB"]["flex k"] = common.graphed(step, device)
        for key, timed in (("graph us", replay), ("launched us", step)):
            taken = common.side_by_side({"flex k": timed}, rounds=rounds, device=device)
            line[key]["flex k"] = taken["flex k"]["median"] * 1e6
    except Exception as error:
        line["failures"]["flex k"] = f"{type(error).__name__}: {error}"[:300]


def host_times(device: str) -> dict[str, Any]:
    """Microseconds of the host for one call on one tiny image: what Python and the launches cost."""
    case = Case(device, 1, 3, 2, 1, 1)
    row: dict[str, Any] = {"map": "3x2+1", "B": 1, "H": 1, "pass": "host", "forward us": {}, "backward us": {}}
    for name, (on, call) in case.calls().items():
        if name in ("flash", "k", "qkv"):
            wanted = [*case.qkv, *case.tables(on)]

            def backward(out: Tensor, wanted: list[Tensor] = wanted) -> None:
                torch.autograd.grad(out, wanted, case.grad, allow_unused=True, retain_graph=True)

            out = call()
            row["forward us"][name] = common.host_us(call, device)
            row["backward us"][name] = common.host_us(lambda out=out, run=backward: run(out), device)
    return row


def ratios(line: dict[str, Any], key: str) -> dict[str, float]:
    return {name: us / line[key]["flash"] for name, us in line[key].items() if "flash" in line[key] and name != "flash"}


def main(args: argparse.Namespace) -> None:
    """Everything but FlexAttention first: compiling it may take more time than there is."""
    start = time.perf_counter()
    device = args.device
    rounds = 1 if device == "dry" else 5
    print(common.machine("cpu" if device == "dry" else device))
    torch.manual_seed(0)
    lines, waiting = [], []

    def write() -> None:
        if args.out is not None:
            common.write(args.out, "bench_attention", device, lines)

    shapes = {"3x2+1": (2, 3, 2, 1, 2)} if device == "dry" else {}
    for side in [] if device == "dry" else args.maps or SHAPES:
        batch, skip, heads = SHAPES[side]
        shapes[f"{side}x{side}+{skip}"] = (batch, side, side, skip, heads)
    try:
        lines.append(host_times(device))
    except Exception as error:
        print(f"host times were not taken: {type(error).__name__}: {error}", file=sys.stderr)
    for name, sizes in shapes.items():
        case = Case(device, *sizes)
        for train in PASSES:
            line = dict(map=name, B=case.batch, H=case.heads, dtype="bfloat16") | measure(case, train, device, rounds)
            print(name, line["pass"], line["graph us"], line["failures"] or "", flush=True)
            lines.append(line)
            waiting.append((case, line, train))
            write()
    longest = 20.0  # seconds for one of its lines, most of them torch.compile's
    for case, line, train in sorted(waiting, key=lambda one: not one[2]):
        begin = time.perf_counter()
        if device == "cuda" and begin - start + longest < args.flex_until:
            torch._dynamo.reset()
            add_flex(case, line, train, device, rounds)
            longest = max(longest, time.perf_counter() - begin)
            print("flex", line["map"], line["pass"], line["graph us"].get("flex k"), flush=True)
            write()
    print("\nratios to flash attention without encodings; in brackets, launched by Python one by one:\n")
    print(common.markdown([in_words(line) for line in lines if line["pass"] != "host"]))
    failed = [
        f"{line['map']} {name}" for line in lines for name in line.get("failures", ()) if name in ("flash", "k", "qkv")
    ]
    if failed:
        sys.exit(f"these do not run: {', '.join(failed)}")


def in_words(line: dict[str, Any]) -> dict[str, Any]:
    replayed, launched = ratios(line, "graph us"), ratios(line, "launched us")
    cells = {head: line[head] for head in ("map", "B", "H", "pass")}
    cells["flash us"] = line["graph us"].get("flash", "fails")
    for name in ("cuDNN", "k", "qkv", "triton k", "triton qkv", "eager k", "eager qkv", "flex k"):
        cells[name] = f"{replayed[name]:.2f} ({launched[name]:.2f})" if name in replayed else ""
    return cells
