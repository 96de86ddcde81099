"""Differential fuzz of irpe.rpe_attention: every backend against the law in float64, for drawn calls.

    python tests/fuzz.py --seconds 240              draws calls until the time is over, from a seed that it prints
    python tests/fuzz.py --seed 123 --count 1       draws that one again

A call is one number, so each failure is told with the command that repeats it. Drawn are dtypes, head sizes from 1 to
300, maps with skip tokens and free positions, encodings that differ between q, k and v, masks, strides, dropout, and
values: unit-normal, tiny, denormal, huge, and NaNs of any payload and infinities among them.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from irpe import build_rpe, get_single_rpe_config, rpe_attention
from irpe.irpe import RPEConfig
from rpe_ops import _native

VALUES = ["normal"] * 6 + ["large", "tiny", "denormal", "huge", "special", "special", "special in values"]
MASKS = [None, None, "bool", "padding", "causal", "added", "lowest", "wide", "one row"]
LAYOUTS = ["contiguous", "timm", "detr", "gaps", "columns", "same sample", "same head", "same token", "offset"]


class Call(NamedTuple):
    """A drawn call; q, k, v, tables and mask are made of `seed`."""

    seed: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int, int]  # B, H, Lq, Lk, D
    size: dict[str, Any]  # height and width, or positions
    config: RPEConfig
    layout: tuple[str, str, str]
    mask: str | None
    values: str
    dropout_p: float
    scale: float | None


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    height, width, skip = rng.randint(1, 9), rng.randint(1, 9), rng.choice([0, 0, 1, 2])
    if rng.random() < 0.05:
        height, width = rng.randint(9, 16), rng.randint(9, 20)
    tokens = skip + height * width
    queries = keys = tokens
    size: dict[str, Any] = dict(height=height, width=width)
    batch, heads = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 2, 3])
    if rng.random() < 0.2:
        generator = torch.Generator().manual_seed(seed)
        queries, keys = rng.randint(1, 40), rng.randint(1, 40)
        of_each = (batch,) if rng.random() < 0.2 else ()
        low = -1 if skip else 0  # a negative row is a token without a place
        size = dict(
            positions=tuple(torch.randint(low, 9, (*of_each, n, 2), generator=generator) for n in (queries, keys))
        )
    singles = {}
    for letter in rng.choice(["", "k", "q", "v", "qk", "qkv", "qkv", "kv"]):
        method, mode = rng.choice(["product", "product", "cross", "euc", "quant"]), rng.choice(["ctx", "ctx", "bias"])
        mode = "ctx" if letter == "v" else mode
        ratio = rng.choice([0.5, 1.9, 1.9, 2.5, 3.0 if method == "product" else 20])
        singles[f"rpe_{letter}"] = get_single_rpe_config(ratio, method, mode, rng.random() < 0.5, skip)
    head_dim = rng.choice([1, 2, 3, 8, 16, 24, 32, 33, 64, 64, 80, 96, 128, rng.randint(1, 300), rng.randint(1, 300)])
    return Call(
        seed,
        rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        (batch, heads, queries, keys, head_dim),
        size,
        RPEConfig(**singles),
        tuple(rng.choice(LAYOUTS) for _ in range(3)),
        rng.choice(MASKS),
        rng.choice(VALUES),
        rng.choice([0.0, 0.0, 0.0, 0.3, 0.9]),
        rng.choice([None, None, None, 0.5, -0.7]),
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape, and where nothing is repeated the same values, in other strides."""
    B, H, L, D = x.shape
    if layout == "timm":
        many = x.new_zeros(B, L, 3, H, D)
        many[:, :, 1] = x.transpose(1, 2)
        return many.permute(2, 0, 3, 1, 4)[1]
    if layout == "detr":
        return x.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1).unflatten(0, (B, H))
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if layout == "columns":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "same sample":
        return x[:1].expand(B, -1, -1, -1)
    if layout == "same head":
        return x[:, :1].expand(-1, H, -1, -1)
    if layout == "same token":
        return x[:, :, :1].expand(-1, -1, L, -1)
    if layout == "offset":
        return torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(B, H, L, D)
    return x.contiguous()


def put_in_specials(x: Tensor, rng: random.Random) -> None:
    """NaNs of any payload and either sign, and infinities, in a few places."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    inf = torch.tensor(math.inf, dtype=x.dtype).view(bits).item()
    sign = -(2 ** (8 * x.element_size() - 1))
    for _ in range(rng.choice([0, 0, 1, 2])):
        payload = rng.choice([0, 1, 0, rng.randint(1, 2 ** (8 * x.element_size() - 1) - 1 - inf)])
        at = rng.randrange(x.numel())
        x.view(bits).view(-1)[at] = inf + payload + (sign if rng.random() < 0.5 else 0)


def made(call: Call) -> tuple[list[Tensor], tuple, Tensor | None, Tensor]:
    """(q, k, v), encodings, the mask, what the output is multiplied with for gradients."""
    rng, generator = random.Random(call.seed), torch.Generator().manual_seed(call.seed)
    B, H, Lq, Lk, D = call.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = dict(large=6.0, tiny=1e-3, denormal=torch.finfo(call.dtype).tiny / 8, huge=1e3).get(call.values, 1.0)
    qkv = [(normal(B, H, n, D) * size).to(call.dtype) for n in (Lq, Lk, Lk)]
    rpe = build_rpe(call.config, D, H, dtype=call.dtype)
    tables = [table for one in rpe if one is not None for table in one.parameters()]
    with torch.no_grad():
        for table in tables:
            table.copy_(normal(*table.shape) * size)
    mask = None
    if call.mask is not None:
        keep = torch.rand((B, 1, Lq, Lk), generator=generator) > 0.3
        if call.mask == "causal":
            keep = torch.ones(Lq, Lk, dtype=torch.bool).tril().expand(B, 1, Lq, Lk)
        elif call.mask == "padding":
            keep = torch.rand((B, 1, 1, Lk), generator=generator) > 0.3
        elif call.mask == "one row":
            keep = keep[:1, :, :1]
        mask = keep
        if call.mask in ("added", "lowest", "wide"):
            dtype = torch.float32 if call.mask == "wide" else call.dtype
            keep = keep | (torch.arange(Lk) == rng.randrange(Lk))  # rows of lowest numbers alone are of no law
            low = -math.inf if call.mask == "added" else torch.finfo(dtype).min
            mask = normal(B, 1, Lq, Lk).to(dtype).masked_fill(~keep, low)
    if call.values.startswith("special"):
        others = [*qkv[:2], *(table for one in rpe[:2] if one is not None for table in one.parameters())]
        others += [mask] if mask is not None and mask.is_floating_point() else []
        with torch.no_grad():
            # not in tables on values: a bucket without a pair is in the formula's product, and in no sum of the law
            for x in others if call.values == "special" else qkv[2:]:
                put_in_specials(x, rng)
    qkv = [laid_out(x, layout) for x, layout in zip(qkv, call.layout, strict=True)]
    return qkv, rpe, mask, normal(B, H, Lq, D).to(call.dtype)


def results(call: Call, dtype: torch.dtype, backend: str | None, gradients: bool = True) -> list[Tensor]:
    """[out] and the gradients of q, k, v and tables, computed in a dtype."""
    qkv, rpe, mask, of_out = made(call)
    rpe = tuple(one and one.to(dtype) for one in rpe)
    leaves = [x.to(dtype) if x.dtype != dtype else x for x in qkv]
    if gradients:
        leaves = [x.detach().requires_grad_() for x in leaves]
    # an added mask is of q's dtype: lowest numbers of a wider one are -inf there, as in the formula
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(call.dtype).to(dtype)
    options: dict[str, Any] = dict(scale=call.scale, attn_mask=mask, dropout_p=call.dropout_p, backend=backend)
    torch.manual_seed(call.seed)  # rpe_ops draws a seed from torch's generator: the same weights are dropped
    with torch.set_grad_enabled(gradients):
        out = rpe_attention(*leaves, *rpe, **call.size, **options)
    if not gradients:
        return [out]
    tables = [table for one in rpe if one is not None for table in one.parameters()]
    return [out, *torch.autograd.grad(out, [*leaves, *tables], of_out.to(dtype))]


def largest_score(call: Call) -> float:
    """The largest sum of absolute terms of a score, masks left out: rounding a score is relative to it."""
    qkv, rpe, _, _ = made(call)
    q, k = (x.double().abs() for x in qkv[:2])
    scale = abs(call.shape[-1] ** -0.5 if call.scale is None else call.scale)
    largest = scale * (q @ k.transpose(-2, -1)).nan_to_num(0, 0, 0).max().item()
    for x, one in ((k, rpe[0]), (q, rpe[1])):
        for table in [] if one is None else one.parameters():
            table = table.detach().double().abs().nan_to_num(0, 0, 0)
            terms = table if table.dim() == 2 else scale * x.nan_to_num(0, 0, 0) @ table
            largest += terms.max().item()
    return largest


def _is_formula(call: Call) -> bool:
    """Whether no fused backend can take the call."""
    positions = call.size.get("positions")
    return "cpu" not in _native.LOADED or (positions is not None and positions[0].dim() == 3)


def backends_of(call: Call) -> list[str | None]:
    found: list[str | None] = [None, "eager"]
    found += ["cpu"] if not _is_formula(call) else []
    found += ["sdpa"] if call.config.rpe_v is None and call.dropout_p == 0 else []
    return found


def wrong(call: Call) -> list[str]:
    """What a call gets wrong, as sentences."""
    positions = call.size.get("positions")
    by_sample = positions is not None and positions[0].dim() == 3
    if by_sample and call.dropout_p > 0:  # the formula of modules draws its own
        call = call._replace(dropout_p=0.0)
    law = "eager" if by_sample else "reference"
    special, found = call.values.startswith("special"), []
    # what is masked or dropped times infinity is NaN in the formula, and no kernel need compute it
    kinds = (torch.isnan, torch.isposinf, torch.isneginf) if call.values == "special" else (torch.isfinite,)
    exact = results(call, torch.float64, law, gradients=not special)
    formula = results(call, call.dtype, "eager", gradients=not special)
    score, eps = largest_score(call), torch.finfo(call.dtype).eps
    names = ["out", *(f"gradient of {name}" for name in ("q", "k", "v", *["a table"] * 9))]
    for backend in backends_of(call):
        # torch's own attention loses some NaNs; None is "sdpa" where nothing is fused or trained
        by_torch = backend == "sdpa" or (backend is None and call.config.rpe_v is None and _is_formula(call))
        for gradients in [False] if special else [False, True]:
            if (backend == "sdpa" and gradients) or (by_torch and special):
                continue
            ours = results(call, call.dtype, backend, gradients)
            for name, one, other, truth in zip(names, ours, formula, exact, strict=False):
                where = f"backend {backend}, gradients {gradients}: {name}"
                if one.dtype != call.dtype or one.shape != truth.shape:
                    found.append(f"{where} is {one.dtype} {tuple(one.shape)}")
                elif special:
                    for kind in kinds:
                        of_each = [kind(x) for x in (one, truth, other)]
                        differs = (of_each[0] != of_each[1]) & (of_each[0] != of_each[2])
                        if differs.any():
                            counts = [int(x.sum()) for x in of_each]
                            found.append(
                                f"{where}: {kind.__name__} of (it, law, formula) {counts}, {differs.sum()} differ"
                            )
                elif truth.abs().max() < torch.finfo(call.dtype).max / 4 and other.isfinite().all():
                    # rule 9, with the largest score beside 1: what a score is off by changes its weight
                    # in float64 the law is rounded as well
                    both = 2 if call.dtype == torch.float64 else 1
                    slack = 16 * both * eps * max(1.0, score) * max(1.0, truth.abs().max().item())
                    if backend == "eager" and name != "out" and eps * score > 1:
                        # the formula's own rounding decides which of two scores is the larger, and where all of the
                        # weight is: gradients of one key are 0, of two as large as their terms; others are beside it
                        if not one.isfinite().all():
                            found.append(f"{where} is not finite")
                        continue
                    error, its = (one - truth).abs().max().item(), (other - truth).abs().max().item()
                    if backend == "eager":  # is the formula
                        its = slack
                    if not error <= 2 * its + slack:
                        found.append(f"{where} is off by {error:.2g}, the formula by {its:.2g}; slack {slack:.2g}")
    return found


def fuzz(seed: int, seconds: float, count: int, say: Callable[[str], None] = print) -> int:
    """How many calls were wrong."""
    began, failures, done = time.monotonic(), 0, 0
    torch.set_num_threads(1)  # calls are small
    while done < count and time.monotonic() - began < seconds:
        call = draw(seed + done)
        try:
            sentences = wrong(call)
        except Exception as error:  # a call that is right by the documentation and raises
            sentences = [f"{type(error).__name__}: {error}"]
        done += 1
        if sentences:
            failures += 1
            say("\n".join([f"\npython tests/fuzz.py --seed {call.seed} --count 1", str(call), *sentences]))
    say(f"{done} calls from seed {seed}, {failures} wrong, in {time.monotonic() - began:.0f} s")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="of the first call; the next have the next numbers")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--count", type=int, default=10**9)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**40) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    sys.exit(fuzz(seed, options.seconds, options.count) > 0)


if __name__ == "__main__":
    main()
