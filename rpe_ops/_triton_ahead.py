"""Compiles the kernels of backend "triton" ahead of time, in parallel processes: for the GPU that is here, or for any.

`compile_here()` fills Triton's cache, so that the first step of a training run compiles nothing. `compile_for` needs
no GPU: it is how CI learns that every kernel compiles for GPUs that it does not have, and that none spills registers.

    python -m rpe_ops._triton_ahead            # what compile_here says
    python -m rpe_ops._triton_ahead cuda:90    # for compute capability 9.0
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = dict(
    fp16=torch.float16, bf16=torch.bfloat16, fp32=torch.float32, u8=torch.uint8, i32=torch.int32, i64=torch.int64
)


class Variant(NamedTuple):
    """What Triton makes one binary of: a kernel, the types of its arguments, its constants and its options."""

    kernel: str
    types: tuple[tuple[str, str], ...]  # of each argument: "*bf16", "i32", "fp32", "constexpr"
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]  # num_warps and num_stages

    @property
    def name(self) -> str:
        types = dict(self.types)
        data = types.get("q", types.get("x", "")).strip("*")
        given = [f"{name}={value}" for name, value in (*self.constants, *self.options) if value is not None]
        known = dict(self.constants)
        if known.get("ON_V") and known.get("values1", 0) is None:
            given.append("without sums")
        return " ".join([self.kernel, data, *given])


class Report(NamedTuple):
    """How it went: seconds, bytes of local memory of a thread, registers, bytes of shared memory; or the error."""

    seconds: float
    spilled: int = 0
    registers: int = 0
    shared: int = 0
    error: str = ""


def compile_here(processes: int | None = None, variants: Iterable[Variant] | None = None) -> dict[str, float | str]:
    """{name of a variant: seconds, or the error} for the current GPU; what is compiled stays in Triton's cache.

    >>> failed = {name: error for name, error in compile_here().items() if isinstance(error, str)}  # doctest: +SKIP

    Args:
        processes: how many at a time; as many as there are processors by default.
        variants: `usual()` by default.
    """
    from . import _triton_variants

    if not torch.cuda.is_available():
        raise RuntimeError("compile_here compiles for the GPU that is here, and no GPU is visible: see compile_for")
    target = f"cuda:{10 * torch.cuda.get_device_capability()[0]}" if torch.version.hip is None else "hip:"
    chosen = list(_triton_variants.usual(target) if variants is None else variants)
    reports = compile_for(chosen, "here", processes)
    return {name: report.error or report.seconds for name, report in reports.items()}


def compile_for(
    variants: Sequence[Variant], target: str, processes: int | None = None, only_front_end: bool = False
) -> dict[str, Report]:
    """{name of a variant: report} for a target such as "cuda:90" or "hip:gfx942".

    With only_front_end each goes as far as Triton's own checks: types, shapes, names.
    """
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments = variants, itertools.repeat(target), itertools.repeat(only_front_end)
    if processes == 1 or len(variants) < (16 if only_front_end else 2):  # sooner done than processes started
        reports = list(map(_compile, *arguments))
    else:
        # a process that has used CUDA cannot be forked
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(processes, len(variants)), context) as pool:
            reports = list(pool.map(_compile, *arguments, chunksize=1 + len(variants) // (8 * processes)))
    return {variant.name: report for variant, report in zip(variants, reports, strict=True)}


def _compile(variant: Variant, target: str, only_front_end: bool) -> Report:
    start = time.perf_counter()
    try:
        report = _compiled(variant, target, only_front_end)
    except Exception as error:  # whatever a compiler says about one variant must not hide the others
        report = Report(0.0, error=f"{type(error).__name__}: {str(error).strip()}"[-2000:])
    return report._replace(seconds=time.perf_counter() - start)


def _compiled(variant: Variant, target: str, only_front_end: bool) -> Report:
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    kernel = _kernel(variant.kernel)
    if target == "here":
        return _measured(_warm(kernel, variant))
    kind, arch = target.split(":")
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, 64 if arch.startswith("gfx9") else 32)
    places = {name: place for place, (name, _) in enumerate(variant.types)}
    constants = {(places[name],): value for name, value in variant.constants}
    source = ASTSource(kernel, signature=dict(variant.types), constexprs=constants)
    if only_front_end:
        backend = make_backend(gpu)
        options = backend.parse_options(dict(variant.options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        source.make_ir(gpu, options, functions, backend.get_module_map(), context)
        return Report(0.0)
    return _measured(triton.compile(source, target=gpu, options=dict(variant.options)))


def _kernel(name: str) -> Any:
    from . import _triton_axes, _triton_lookup, _triton_tables

    modules = {"axes": _triton_axes, "table": _triton_tables}
    return getattr(modules.get(name.split("_")[0], _triton_lookup), name)


def _warm(kernel: Any, variant: Variant) -> Any:
    """Compiled by the way that a launch takes, so that it lies where the launch will look for it."""
    return kernel.warmup(*arguments_of(variant), grid=(1,), **dict(variant.options))


def arguments_of(variant: Variant) -> list[Any]:
    """What stands for the arguments of a launch: dtypes for tensors, some number for numbers."""
    pointers = {f"*{name}": dtype for name, dtype in DTYPES.items()}
    constants, values = dict(variant.constants), {"i32": 7, "fp32": 0.5}
    return [constants[name] if name in constants else pointers.get(t, values.get(t)) for name, t in variant.types]


def _measured(binary: Any) -> Report:
    shared = binary.metadata.shared
    if "cubin" not in binary.asm:
        registers, spilled = (_number(binary.asm["amdgcn"], f".{key}:") for key in ("vgpr_count", "vgpr_spill_count"))
        return Report(0.0, 4 * spilled, registers, shared)
    registers, stack = _usage(binary.asm["cubin"])
    return Report(0.0, stack, registers, shared)


def _number(text: str, key: str) -> int:
    return int(text.split(key, 1)[1].split(maxsplit=1)[0])


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of stack, which is where registers spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return _number(usage, "REG:"), _number(usage, "STACK:")


def _main(words: Sequence[str]) -> None:
    """Standard input may hold {"variants": places in `_triton_variants.variants`, "only_front_end": true or false}."""
    from . import _triton_variants

    if not words:
        print(json.dumps(compile_here(), indent=1))
        return
    wanted = json.load(sys.stdin) if not sys.stdin.isatty() else {}
    variants = list(_triton_variants.variants(words[0]))
    chosen = [variants[place] for place in wanted.get("variants", range(len(variants)))]
    reports = compile_for(chosen, words[0], wanted.get("processes"), wanted.get("only_front_end", False))
    print(json.dumps(reports))


if __name__ == "__main__":
    _main(sys.argv[1:])
