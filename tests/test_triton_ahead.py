"""Every kernel of backend "triton" is compiled for GPUs that are not here, by the oldest Triton and by the newest."""

import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
from conftest import ROOT

triton = pytest.importorskip("triton")

from rpe_ops import _triton_ahead, _triton_variants  # noqa: E402 (a skip comes first)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels of the interpreter do not compile"
)
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
OLDEST = "3.6.0"  # of torch 2.11
# of a program; 99 KiB is what sm_86 and sm_89 have, which run the code of sm_80
SHARED = {"cuda:80": 99 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


def facts(variant, size):
    """Every `size` facts about a variant at a time: what its constants are, and its dtype."""
    types = dict(variant.types)
    known = dict(variant.constants) | dict(variant.options) | {"dtype": types.get("q", types.get("x"))}
    known = sorted((name, str(value)) for name, value in known.items() if value is not None)
    return {(variant.kernel, *some) for some in itertools.combinations(known, size)}


@functools.cache
def covering(target, size):
    """Places of a few variants that hold every `size` facts that some variant of their kernel holds."""
    found, kernels = [], {}
    for place, variant in enumerate(_triton_variants.variants(target)):
        kernels.setdefault(variant.kernel, {})[place] = facts(variant, size)
    for waiting in kernels.values():
        missing = set().union(*waiting.values())
        while missing:
            place = max(waiting, key=lambda place: len(waiting[place] & missing))
            found.append(place)
            missing -= waiting.pop(place)
    return found


def compiled(version, target, places, only_front_end=False, root=ROOT):
    """{name: report}, from build/ahead where nothing has changed since."""
    folder, environment = ROOT / "build" / "ahead", dict(os.environ)
    if version != triton.__version__:
        path = ROOT / "build" / f"triton-{version}"
        if not path.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(path)]
            done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"triton {version} cannot be installed here: {done.stderr[-300:]}")
        environment["PYTHONPATH"] = str(path)
    sources = [path.read_bytes() for path in sorted((root / "rpe_ops").glob("_triton_*.py"))]
    wanted = json.dumps(dict(variants=places, only_front_end=only_front_end))
    words = [version, target, wanted, *sources]
    key = hashlib.sha256(b"\0".join(x if isinstance(x, bytes) else x.encode() for x in words)).hexdigest()[:32]
    kept = folder / f"{key}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environment["TRITON_CACHE_DIR"] = str(folder / f"triton-{version}")
        command = [sys.executable, "-m", "rpe_ops._triton_ahead", target]
        done = subprocess.run(command, cwd=root, env=environment, input=wanted, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(done.stdout)
        partial.rename(kept)
    return {name: _triton_ahead.Report(*report) for name, report in json.loads(kept.read_text()).items()}


VERSIONS = [OLDEST, triton.__version__]


def errors(reports):
    return {name: report.error for name, report in reports.items() if report.error}


def test_the_front_end_takes_every_value_of_every_constant():
    places = covering("cuda:90", 1)
    reports = compiled(triton.__version__, "cuda:90", places, only_front_end=True)
    assert len(reports) == len(places) >= 10 and not errors(reports)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_front_end_takes_every_pair_of_constants(version):
    """All 1,900 that can be launched take an hour: `python -m rpe_ops._triton_ahead cuda:90` compiles those."""
    places = covering("cuda:90", 2)
    reports = compiled(version, "cuda:90", places, only_front_end=True)
    assert len(reports) == len(places) > 50 and not errors(reports)


# bytes of a thread that may go to local memory, by words of target and name, and why
SPILLS = [
    ("fp32", 2500, "operands of tf32x3 are three numbers each; smaller tiles would leave tensor cores idle"),
    ("WIDE=128", 1500, "two accumulators of 128 take half of the registers; heads of 128 are rare with iRPE"),
    ("PLACES=16", 500, "numbers that stay the same in the loop are read back once a tile"),
    ("axes_backward_keys", 800, "the same: two accumulators, and tables of k and v from the side of queries"),
    ("axes_", 400, "the same, by Triton 3.6 and most on sm_80"),
    ("lookup_", 16, "the same"),
    ("hip:", 600, "look-ups keep a tile of 64 lanes in registers; nobody has seen what that costs there"),
    ("EXTRA=True", 200, "masks and dropout: the same"),
]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, version):
    """What training uses on every target, a half with either version, and every value of every constant on one of 8."""
    variants = list(_triton_variants.variants(target))
    mine = 2 * TARGETS.index(target) + VERSIONS.index(version)
    names = [one.name for one in usual(target)]
    # the halves change from target to target, so that each kernel is compiled by either version
    names = names[(TARGETS.index(target) + VERSIONS.index(version)) % 2 :: 2]
    places = [place for place, x in enumerate(variants) if x.name in names]
    places += [place for place in covering(target, 1)[mine::8] if place not in places]
    reports = compiled(version, target, places)
    assert len(reports) == len(places) and not errors(reports)
    for name, report in reports.items():
        assert report.shared <= SHARED[target], name
        known = [most for word, most, _ in SPILLS if word in f"{target} {name}"]
        assert report.spilled <= max(known, default=0), (name, report)


def usual(target):
    return [
        x for x in _triton_variants.usual(target) if "*bf16" in dict(x.types).values() and "PLACES=16" not in x.name
    ]


def test_compile_here_asks_for_what_a_launch_asks_for():
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for variant in list(_triton_variants.variants("cuda:90"))[::50]:
        kernel = _triton_ahead._kernel(variant.kernel)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        stand_ins = map(MockTensor.wrap_dtype, _triton_ahead.arguments_of(variant))
        _, found, _ = bind(*stand_ins, **dict(variant.options))
        assert list(kernel.arg_names) == [name for name, _ in variant.types]
        assert [type_ for type_, _ in found] == [type_ for _, type_ in variant.types]
        # of real arguments: not by whether a number is 1 or an address a multiple of 16
        real = {"fp32": 1.0, "i32": 1} | {f"*{x}": torch.zeros(9, dtype=y)[1:] for x, y in _triton_ahead.DTYPES.items()}
        constants = dict(variant.constants)
        real = [constants[name] if name in constants else real[type_] for name, type_ in variant.types]
        bound, types, _ = bind(*real, **dict(variant.options))
        assert types == found
        # later launches hand on what the binder would: arguments, then constants in the kernel's order
        words = [name for name, type_ in variant.types if name in constants and constants[name] is not None]
        first = len(variant.types) - len(words)
        assert [name for name, _ in variant.types][first:] == words
        rest = {name: constants[name] for name in words}
        again, _, _ = bind(*real[:first], **rest, **dict(variant.options))
        values = [*real[:first], *rest.values()]
        assert all(one is other for one, other in zip(again.values(), values, strict=True))
        assert all(one is other for one, other in zip(bound.values(), values, strict=True))


class Counting:
    """A kernel that counts how often Triton is asked for it, and what it compiles to."""

    arg_names = ("q", "mask", "n", "WIDE", "PLACES")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def first(*arguments, **constants):
            self.asked.append(constants)
            return Compiled(self.launched)

        return first


class Compiled:
    launch_metadata = None

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


def test_a_kernel_is_asked_for_once_for_all_that_it_depends_on(monkeypatch):
    import torch

    from rpe_ops import _triton_call

    monkeypatch.setattr(_triton_call, "_compiled", {})
    module, half = types.SimpleNamespace(kernel=Counting()), torch.zeros(3, dtype=torch.half)
    constants = dict(PLACES=8, WIDE=64, num_warps=4)
    for grid, n in (((5,), 1), ((7,), 2), ((7, 3), 1)):
        _triton_call.launch(module, "kernel", grid, (half, None, n), constants)
    assert len(module.kernel.asked) == 1
    assert module.kernel.launched == [((7, 1, 1), (half, None, 2, 64, 8)), ((7, 3, 1), (half, None, 1, 64, 8))]
    for x, mask, n, more in (
        (half.float(), None, 1, {}),
        (half, half, 1, {}),
        (half, None, 1.0, {}),
        (half, None, 1, dict(num_warps=8)),
        (half.to("meta"), None, 1, {}),
    ):
        before = len(module.kernel.asked)
        _triton_call.launch(module, "kernel", (5,), (x, mask, n), constants | more)
        assert len(module.kernel.asked) == before + 1


@pytest.mark.parametrize(
    ("file", "before", "after", "kernel"),
    [
        ("lookup", "        end = ends", "        there = ends", "plan"),
        ("lookup", "        top = new\n", "        top = p\n", "lookup_forward"),
        ("axes", "            top = new\n", "            top = new.to(tl.float16)\n", "axes_forward"),
    ],
)
def test_a_variable_that_changes_its_type_in_a_loop_is_found(tmp_path, file, before, after, kernel):
    shutil.copytree(ROOT / "rpe_ops", tmp_path / "rpe_ops", ignore=shutil.ignore_patterns("__pycache__", "build"))
    path = tmp_path / "rpe_ops" / f"_triton_{file}.py"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    variants = list(_triton_variants.variants("cuda:90"))
    places = [place for place in covering("cuda:90", 1) if variants[place].kernel == kernel]
    reports = compiled(triton.__version__, "cuda:90", places, only_front_end=True, root=tmp_path)
    assert len(errors(reports)) == len(places)
