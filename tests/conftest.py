import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import Fresh
from support import pytest_addoption, pytest_collection_modifyitems, pytest_runtest_logreport, pytest_sessionfinish

__all__ = [  # pytest's hooks
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_runtest_logreport",
    "pytest_sessionfinish",
]

pytest.register_assert_rewrite("equipped", "families", "family_matrix")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

try:
    from hypothesis import settings
except ImportError:  # `make gpu-check` installs nothing, and the tests that it runs draw no examples
    pass
else:
    # the same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones
    settings.register_profile("same", derandomize=True, database=None)
    settings.register_profile("explore", print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the processes that they start
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes that import torch again


@pytest.fixture(scope="session")
def fresh():
    interpreters = Fresh()
    yield interpreters
    interpreters.close()


@pytest.fixture
def run_python(fresh, tmp_path):
    """Runs code in a fresh interpreter that sees nothing of this checkout but what the test puts on its path."""

    def run(code, *, cwd=tmp_path, check=True, **options):
        done = fresh.run(code, cwd=cwd, **options)
        if check and done.returncode:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): the file of that name, which `make(path)` makes once for all of pytest's workers."""

    def file(name, make):
        import fcntl  # not everywhere

        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # one compiles, the others wait
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).exists():
                make(folder / name)
        return folder / name

    return file


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of `irpe train` on tiny pictures, beside their folder `data`; for reading alone."""
    from train_tiny import SMALL, irpe, pictures

    place = tmp_path_factory.mktemp("tiny")
    data = pictures(place / "data", per_class=8)
    result = irpe("train", data, *SMALL, "--device", "cpu", "--out", place, "--name", "run")
    assert result.exit_code == 0, result.output
    return place / "run"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load_golden(name):
    """(arrays, meta) of tests/golden/{name}.npz; meta is None where the file has none."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else None
    return arrays, meta


def relative_error(actual, expected):
    """Largest difference over the largest entry of `expected`, computed in float64."""
    expected = torch.as_tensor(expected).double()
    actual = actual.detach().double()
    assert actual.shape == expected.shape
    largest = expected.abs().max()
    return ((actual - expected).abs().max() / largest).item() if largest > 0 else actual.abs().max().item()
