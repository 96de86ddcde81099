"""What `bench_model.py --device cuda` measures: training steps of timm's DeiT-S at 224, plain and with iRPE.

A step is forward under bfloat16 autocast, cross-entropy, backward and AdamW. Eager models take turns, compiled ones
follow each other. `warm` compiles one variant beforehand, in a process of its own, into the cache on disk that the
others read. On `device="dry"` a tiny model takes the same way on a CPU: tests do that.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import irpe
from benchmarks import common

VARIANTS = {"plain": None, "k": "k", "qkv": "qkv"}
SIZE, BATCH = 224, 256


def build(name: str, device: str) -> tuple[nn.Module, int, int]:
    """(model, batch, size), the tables drawn at random, so that nothing is multiplied by zero."""
    torch.manual_seed(0)
    if device == "dry":
        options, batch, size = dict(img_size=(48, 32), depth=2, embed_dim=24, num_heads=3), 2, (48, 32)
    else:
        options, batch, size = dict(img_size=SIZE), BATCH, (SIZE, SIZE)
    with torch.device("cpu" if device == "dry" else "cuda"):
        model = timm.create_model("deit_small_patch16_224", **options)
    if VARIANTS[name] is not None:
        irpe.equip(model, irpe.get_rpe_config(1.9, "product", "ctx", True, rpe_on=VARIANTS[name]))
        for parameter, table in model.named_parameters():
            if "lookup_table" in parameter:
                nn.init.normal_(table, std=0.02)
    return model.train(), batch, size


def training_step(name: str, device: str, compiled: bool) -> tuple[Callable[[], None], int]:
    """(a function of nothing that trains one batch, images of a batch)."""
    model, batch, size = build(name, device)
    where = "cpu" if device == "dry" else "cuda"
    call = torch.compile(model, backend="eager" if device == "dry" else "inductor") if compiled else model
    images = torch.randn(batch, 3, *size, device=where)
    labels = torch.randint(1000, (batch,), device=where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "dry")

    def step() -> None:
        with torch.autocast(where, dtype=torch.bfloat16):
            logits = call(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, batch


def peak_mib(step: Callable[[], None], device: str, before: int) -> float:
    """The most memory over `before`: parameters, states of the optimizer and all that a step takes."""
    if device == "dry":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def warm(name: str, device: str) -> None:
    step, _ = training_step(name, device, compiled=True)
    step()


def measure(names: list[str], compiled: bool, device: str) -> list[dict[str, Any]]:
    """A row for each of the variants, which take turns."""
    mode = "compiled" if compiled else "eager"
    rows, steps, mib, images = [], {}, {}, 0
    for name in names:
        before = 0 if device == "dry" else torch.cuda.memory_allocated()
        try:
            step, images = training_step(name, device, compiled)
            for _ in range(3):
                step()
            mib[name], steps[name] = peak_mib(step, device, before), step
        except Exception as error:
            rows.append({"model": name, "mode": mode, "failure": f"{type(error).__name__}: {error}"[:300]})
    repeats, rounds = (1, 1) if device == "dry" else (3, 3)
    for name, seconds in common.side_by_side(steps, rounds=rounds, device=device, repeats=repeats).items():
        rows.append({"model": name, "mode": mode, "images/s": images / seconds["median"], "MiB": mib[name]})
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Time and memory over those of the plain model of the same mode."""
    plain = {row["mode"]: row for row in rows if row["model"] == "plain" and "failure" not in row}
    for row in rows:
        if row["mode"] in plain and "failure" not in row:
            base = plain[row["mode"]]
            row["time over plain"] = base["images/s"] / row["images/s"]
            row["memory over plain"] = row["MiB"] / (base["MiB"] or 1)


def main(args: argparse.Namespace) -> None:
    device = args.device
    if args.warm:
        with contextlib.suppress(KeyboardInterrupt):
            warm(args.warm, device)
        return
    print(common.machine("cpu" if device == "dry" else device))
    rows: list[dict[str, Any]] = []
    # compiled models do not take turns: a compiler that keeps one graph of a function alone would begin anew each time
    for names, compiled in [(list(VARIANTS), False), *(([name], True) for name in VARIANTS)]:
        torch._dynamo.reset()
        rows += measure(names, compiled, device)
        add_ratios(rows)
        print(rows[-len(names) :], flush=True)
        if args.out is not None:
            common.write(args.out, "bench_model", device, rows)
    heads = ["model", "mode", "images/s", "time over plain", "MiB", "memory over plain", "failure"]
    print(common.markdown([{head: row.get(head, "") for head in heads} for row in rows]))
    if failed := [f"{row['model']} {row['mode']}" for row in rows if "failure" in row]:
        sys.exit(f"these do not run: {', '.join(failed)}")
