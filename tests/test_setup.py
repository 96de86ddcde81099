"""Building the libraries and loading what was built, each situation in interpreters of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE

from rpe_ops import _native

COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
)
QUICK = {"RPE_OPS_CUDA": "0", "RPE_OPS_CXXFLAGS": "-O0"}
built_here = pytest.mark.skipif(
    not _native.LOADED.get("cpu", "").startswith(str(ROOT)), reason="the operators are not built in place: make ops"
)
with_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
WORKS = """
    import torch
    from {package} import _native
    from {package}.rpe_index import rpe_bucket_sum, rpe_index
    import {package}
    index = torch.randint(50, (23, 41))
    x = torch.randn(3, 4, 23, 50, requires_grad=True)
    y = rpe_index(x, index)
    expected = x.gather(-1, index.expand(3, 4, 23, 41))
    assert torch.equal(y, expected)
    weight = torch.randn_like(y)
    gradients = [torch.autograd.grad((one * weight).sum(), x) for one in (y, expected)]
    torch.testing.assert_close(*gradients)
    print({package}.backends()["cpu"])
"""


def copy_sources(target):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    return shutil.copytree(ROOT / "rpe_ops", target / "rpe_ops", ignore=ignore)


def copy_library(target):
    shutil.copy(_native.LOADED["cpu"], target)


def setup_py(folder, *arguments, env=QUICK, python=sys.executable, cwd=None):
    return subprocess.run(
        [python, str(folder / "setup.py"), *map(str, arguments)],
        cwd=cwd or folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
@with_compiler
def test_a_copy_in_a_subpackage_builds_in_place_for_any_processor(tmp_path, run_python):
    """From another directory, and with the loops that every compiler has, which no processor here would choose."""
    models = tmp_path / "project" / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").touch()
    folder = copy_sources(models)
    plain = QUICK | {"RPE_OPS_CXXFLAGS": "-O1 -DRPE_OPS_PLAIN"}
    done = setup_py(folder, "build_ext", "--inplace", env=plain, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_rpe_ops_C was built (CPU)" in done.stdout
    assert "_rpe_ops_cuda was not built: RPE_OPS_CUDA=0 leaves it out" in done.stdout
    code = (
        WORKS.format(package="models.rpe_ops")
        + """
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(3, 4, 23, 50).to(dtype)
        assert torch.equal(rpe_index(x, index), x.gather(-1, index.expand(3, 4, 23, 41)))
        y = torch.randn(3, 4, 23, 41).to(dtype)
        exact = torch.zeros(3, 4, 23, 50, dtype=torch.float64).scatter_add(-1, index.expand(y.shape), y.double())
        error = (rpe_bucket_sum(y, index, 50).double() - exact).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    """
    )
    out = run_python(code, path=[tmp_path / "project"], forbid=["rpe_ops", "numpy"]).stdout
    assert f"from {folder}" in out


@pytest.mark.slow
@with_compiler
def test_install_user_inside_a_virtual_environment(tmp_path):
    """The environment cannot see what --user installs elsewhere."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # torch, numpy and setuptools of this environment, without its editable installations
    with open(os.path.join(site, "borrowed.pth"), "w") as file:
        file.write(f"import site; import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    folder = copy_sources(tmp_path)
    done = setup_py(folder, "install", "--user", python=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--user inside a virtual environment: installing into" in done.stdout
    project = tmp_path / "project"
    copy_sources(project)
    code = "import rpe_ops; print(rpe_ops.backends()['cpu'])"
    out = subprocess.run([python, "-c", code], cwd=project, capture_output=True, text=True, check=True).stdout
    assert out.startswith("runs:") and str(environment) in out
    # and pip takes it away again, so that nothing old is loaded later
    pip = [python, "-m", "pip", "uninstall", "--yes", "rpe_ops_libraries"]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True)
    assert "Successfully uninstalled" in done.stdout, done.stdout + done.stderr
    assert not [name for name in os.listdir(site) if "rpe_ops" in name]


@pytest.mark.slow
@with_compiler
def test_pip_install_holds_the_library_alone(tmp_path, run_python):
    folder, site, project = copy_sources(tmp_path), tmp_path / "site", tmp_path / "project"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    done = subprocess.run([*command, folder], env=os.environ | QUICK, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (site / "rpe_ops").exists() and not (site / "csrc").exists()
    copy_sources(project)
    out = run_python(WORKS.format(package="rpe_ops"), path=[project, site]).stdout
    assert f"from {site}" in out


@pytest.mark.slow
@with_compiler
@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_cuda_builds_without_a_gpu(run_python):
    kept = ROOT / "build" / "cuda"  # .ci/run loads it with another torch
    shutil.rmtree(kept, ignore_errors=True)
    folder = copy_sources(kept)
    # for one kind of GPU, beside the library for the CPU that is there: for all of them a compiler takes minutes
    copy_library(folder)
    env = {"RPE_OPS_CPU": "0", "RPE_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = setup_py(folder, "build_ext", "--inplace", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_rpe_ops_cuda was built (sm 9.0)" in done.stdout
    code = "from rpe_ops import _native; assert set(_native.LOADED) == {'cpu', 'cuda'}, _native.MISSING"
    run_python(code, path=[kept])


def test_the_cpu_is_left_out_where_its_library_is_there(tmp_path):
    folder = copy_sources(tmp_path)
    done = setup_py(folder, "build_ext", "--inplace", env={"RPE_OPS_CPU": "0", "RPE_OPS_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    assert "_rpe_ops_C was not built: RPE_OPS_CPU=0 leaves it out" in done.stdout and not list(folder.glob("*.so"))


def test_cuda_that_cannot_be_built_is_refused_when_asked_for(tmp_path):
    folder = copy_sources(tmp_path)
    env = {"RPE_OPS_CUDA": "1", "CUDA_HOME": str(tmp_path / "nowhere")}
    done = setup_py(folder, "build_ext", "--inplace", env=env)
    assert done.returncode != 0 and "RPE_OPS_CUDA=1 asks for CUDA, but" in done.stderr


def test_without_torch_setup_says_how(tmp_path):
    folder = copy_sources(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    done = setup_py(folder, "build_ext", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0 and "--no-build-isolation" in done.stderr and "Traceback" not in done.stderr


def test_not_built_runs_on_plain_torch(tmp_path, run_python):
    copy_sources(tmp_path)
    out = run_python(WORKS.format(package="rpe_ops"), path=[tmp_path]).stdout
    assert "not here" in out and "_rpe_ops_C was not found: build it with" in out


@built_here
def test_a_copy_beside_an_installed_library_takes_its_own(tmp_path, run_python):
    project, site = tmp_path / "project", tmp_path / "site"
    site.mkdir()
    copy_library(site)
    folder = copy_sources(project)
    assert f"from {site}" in run_python(WORKS.format(package="rpe_ops"), path=[project, site]).stdout
    copy_library(folder)
    assert f"from {folder}" in run_python(WORKS.format(package="rpe_ops"), path=[project, site]).stdout


@built_here
def test_two_copies_in_one_process(tmp_path, run_python):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copy_library(copy_sources(tmp_path / name))
    code = WORKS.format(package="one.rpe_ops") + WORKS.format(package="two.rpe_ops")
    first, second = run_python(code, path=[tmp_path]).stdout.splitlines()
    assert f"from {tmp_path / 'one'}" in first and "loaded by another copy of rpe_ops" in second


@with_compiler
def test_a_library_of_another_torch_is_a_sentence(tmp_path, run_python):
    folder = copy_sources(tmp_path)
    source = tmp_path / "later.cpp"
    source.write_text('extern "C" int torch_of_a_later_version(); int x = torch_of_a_later_version();\n')
    library = folder / "_rpe_ops_C.abi3.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", library], check=True)
    out = run_python(WORKS.format(package="rpe_ops"), path=[tmp_path]).stdout
    assert f"{library} does not load into torch {torch.__version__} (built against another?)" in out
    assert "torch_of_a_later_version" in out and out.strip().endswith("again")


def test_a_broken_file_is_a_sentence(tmp_path, run_python):
    (copy_sources(tmp_path) / "_rpe_ops_C.abi3.so").write_text("")
    assert "does not load into torch" in run_python(WORKS.format(package="rpe_ops"), path=[tmp_path]).stdout


@built_here
def test_foreign_operators_of_the_same_name_are_left_alone(tmp_path, run_python):
    copy_library(copy_sources(tmp_path))
    code = """
    import torch
    theirs = torch.library.Library("rpe_ops", "DEF")
    theirs.define("rpe_index(Tensor table) -> Tensor")
    """
    out = run_python(code + WORKS.format(package="rpe_ops"), path=[tmp_path]).stdout
    assert "another library of this process has registered rpe_ops::rpe_index(Tensor table) -> Tensor" in out
