"""Every kernel of backend "triton" is compiled for GPUs that are not here, by the oldest Triton and by the newest."""

import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

triton = pytest.importorskip("triton")

from rpe_ops import _triton_ahead, _triton_launch  # noqa: E402 (a skip comes first)

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels of the interpreter do not compile"),
    pytest.mark.timeout(600),
]
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
OLDEST = "3.6.0"  # of torch 2.11
# of a program; 99 KiB is what sm_86 and sm_89 have, which run the code of sm_80
SHARED = {"cuda:80": 99 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


def pairs(variant):
    """Every two facts about a variant: what a constant or a type is."""
    facts = sorted((name, str(value)) for name, value in (*variant.types, *variant.constants, *variant.options))
    return {(variant.kernel, *pair) for pair in itertools.combinations(facts, 2)}


def covering(variants):
    """Places of a few variants that hold each pair of facts that some variant holds, kernel by kernel."""
    found = []
    for kernel in dict.fromkeys(variant.kernel for variant in variants):
        waiting = {place: pairs(variant) for place, variant in enumerate(variants) if variant.kernel == kernel}
        open_ = set().union(*waiting.values())
        while open_:
            # the largest gain so far bounds the others', so most are not counted again
            place = max(waiting, key=lambda place: len(waiting[place] & open_))
            found.append(place)
            open_ -= waiting.pop(place)
    return found


@functools.cache
def chosen(*kernels):
    """Places of the variants that cover every pair of facts, of these kernels or of all."""
    places = [n for n, x in enumerate(_triton_launch.variants(TARGETS[0])) if not kernels or x.kernel in kernels]
    variants = [x for x in _triton_launch.variants(TARGETS[0]) if not kernels or x.kernel in kernels]
    return tuple(places[n] for n in covering(variants))


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


@pytest.mark.parametrize("version", [OLDEST, triton.__version__])
def test_the_front_end_takes_every_kernel(version):
    reports = compiled(version, "cuda:90", chosen("plan", "backward_delta"), only_front_end=True)
    assert {report.error for report in reports.values()} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, triton.__version__])
def test_the_front_end_takes_every_pair_of_constants(version):
    reports = compiled(version, "cuda:90", chosen(), only_front_end=True)
    assert len(reports) > 100 and {report.error for report in reports.values()} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, triton.__version__])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, version):
    variants = list(_triton_launch.variants(target))
    places = [variants.index(variant) for variant in _triton_launch.usual(target) if "bf16" in variant.name]
    reports = compiled(version, target, places)
    assert len(reports) == 6 and {report.error for report in reports.values()} == {""}
    assert max(report.shared for report in reports.values()) <= SHARED[target]


MUTATIONS = [
    ("            of_sums = tl.load", "            there = of_sums = tl.load", "backward_delta"),
    ("        end = (i[:, None]", "        to = (i[:, None]", "plan"),
]


@pytest.mark.parametrize(("before", "after", "kernel"), MUTATIONS)
def test_a_kernel_that_is_broken_on_purpose_is_found(tmp_path, before, after, kernel):
    shutil.copytree(ROOT / "rpe_ops", tmp_path / "rpe_ops", ignore=shutil.ignore_patterns("__pycache__", "build"))
    path = tmp_path / "rpe_ops" / "_triton_tiles.py"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    reports = compiled(triton.__version__, "cuda:90", chosen(kernel), only_front_end=True, root=tmp_path)
    assert any("Error" in report.error for report in reports.values())
