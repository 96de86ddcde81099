"""Builds and installs the shared libraries of rpe_ops, and nothing else: `_rpe_ops_C` (CPU) and `_rpe_ops_cuda`.

    python setup.py build_ext --inplace          # beside the sources, for this directory alone
    python setup.py install --user               # for every project; inside a virtual environment, into that
    pip install --no-build-isolation ./rpe_ops   # the same; `pip uninstall rpe_ops_libraries` removes either

The CPU needs a C++17 compiler. CUDA is built where nvcc is found, whether or not a GPU is visible. Environment:

    RPE_OPS_CPU           0: leave the CPU out, where its library is there already
    RPE_OPS_CUDA          1: build CUDA or fail; 0: leave it out
    TORCH_CUDA_ARCH_LIST  such as "8.0;9.0+PTX"; by default all of sm_80, sm_90 and sm_100 that nvcc knows, the last
                          with PTX, which newer GPUs compile when they first load it
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.install import install

if not os.environ.get("CUDA_HOME") and (found_nvcc := shutil.which("nvcc")):
    # often a link or a script that calls the one in its toolkit, whose libraries are wanted too: it knows where it is
    dry_run = subprocess.run([found_nvcc, "--dryrun", "-c", "_.cu"], capture_output=True, text=True)
    if here := re.search(r"_HERE_=(.+)", dry_run.stderr):
        os.environ["CUDA_HOME"] = str(Path(here.group(1)).resolve().parent)
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"rpe_ops is built against the torch that is installed, and there is none here ({error}).\n"
        "With pip, pass --no-build-isolation: pip install --no-build-isolation ./rpe_ops"
    )

# the oldest torch that the libraries run on, as the stable ABI wants it: 2.11
TORCH_TARGET_VERSION = "0x020b000000000000"
ARCHITECTURES = ("8.0", "9.0", "10.0")


def why_no_cuda() -> str | None:
    """The reason for which CUDA is not built, or None."""
    if os.environ.get("RPE_OPS_CUDA") == "0":
        return "RPE_OPS_CUDA=0 leaves it out"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if CUDA_HOME is None or not nvcc().exists():
        return "no nvcc was found, neither under CUDA_HOME nor on the PATH"
    match = re.search(r"release (\d+)\.(\d+)", run_nvcc("--version"))
    if match is None or match.group(1) != torch.version.cuda.split(".")[0]:
        release = ".".join(match.groups()) if match else "of unknown release"
        return f"{nvcc()} is {release}, and torch {torch.__version__} was built with CUDA {torch.version.cuda}"
    return None


def nvcc() -> Path:
    return Path(CUDA_HOME or "") / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")


def run_nvcc(*arguments: str) -> str:
    return subprocess.run([str(nvcc()), *arguments], capture_output=True, text=True, check=True).stdout


def architectures() -> str:
    known = run_nvcc("--list-gpu-code")
    return ";".join(name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known.split()) + "+PTX"


def extensions() -> list[Any]:
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)]
    # g++ warns of undefined operands inside its own AVX-512 headers, and of vectors as arguments, which leave no file
    cxx = ["/O2", "/std:c++17"] if os.name == "nt" else ["-O3", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    cxx += os.environ.get("RPE_OPS_CXXFLAGS", "").split()
    found: list[Any] = []
    if NO_CPU is None:
        found.append(
            CppExtension(
                "_rpe_ops_C",
                ["csrc/rpe_ops.cpp", *sorted(str(file) for file in Path("csrc/cpu").glob("*.cpp"))],
                define_macros=defines[:1],
                extra_compile_args={"cxx": cxx},
                extra_link_args=os.environ.get("RPE_OPS_LDFLAGS", "").split(),
                py_limited_api=True,
            )
        )
    if NO_CUDA is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        found.append(
            CUDAExtension(
                "_rpe_ops_cuda",
                sorted(str(file) for file in Path("csrc/cuda").glob("*.cu")),
                define_macros=defines,
                extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
                py_limited_api=True,
            )
        )
    return found


class BuildOps(BuildExtension):
    """Builds what can be built, and says at the end what was and what was not."""

    def run(self) -> None:
        reasons = {"_rpe_ops_C": NO_CPU, "_rpe_ops_cuda": NO_CUDA}
        self.reasons = {name: reason for name, reason in reasons.items() if reason is not None}
        super().run()
        for name in ("_rpe_ops_C", "_rpe_ops_cuda"):
            print(f"rpe_ops: {name} was not built: {self.reasons[name]}" if name in self.reasons else self.report(name))

    def report(self, name: str) -> str:
        what = f"sm {os.environ['TORCH_CUDA_ARCH_LIST']}" if name.endswith("cuda") else "CPU"
        where = Path(self.get_ext_fullpath(name) if self.inplace else Path(self.build_lib, self.get_ext_filename(name)))
        return f"rpe_ops: {name} was built ({what}) for torch 2.11 and later: {where}"

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if ext.name == "_rpe_ops_C" or os.environ.get("RPE_OPS_CUDA") == "1":
                raise
            # the CPU library is worth having without it
            self.reasons[ext.name] = f"its compiler failed, see above ({error.__class__.__name__})"
            ext.optional = True

    def get_export_symbols(self, ext: Any) -> list[str]:
        return []  # no Python module's init function: torch.ops.load_library opens the libraries


class InstallOps(install):
    """`install`, with the list of files by which `pip uninstall` removes the libraries.

    `--user` inside a virtual environment means the environment: it cannot see the user's own.
    """

    user: bool
    root: str | None

    def finalize_options(self) -> None:
        if self.user and sys.prefix != sys.base_prefix:
            print(f"rpe_ops: --user inside a virtual environment: installing into {sys.prefix}")
            self.user = False
        super().finalize_options()

    def run(self) -> None:
        super().run()
        if self.root:
            return  # a wheel, which has a list of its own
        info = self.get_finalized_command("install_egg_info").target
        files = [os.path.relpath(file, info) for file in self.get_outputs()]
        Path(info, "installed-files.txt").write_text("\n".join([*files, "installed-files.txt"]) + "\n")


NO_CPU = "RPE_OPS_CPU=0 leaves it out" if os.environ.get("RPE_OPS_CPU") == "0" else None
NO_CUDA = why_no_cuda()
if NO_CUDA is not None and os.environ.get("RPE_OPS_CUDA") == "1":
    sys.exit(f"rpe_ops: RPE_OPS_CUDA=1 asks for CUDA, but {NO_CUDA}")
os.chdir(Path(__file__).resolve().parent)  # the sources are named from here
setup(
    name="rpe_ops_libraries",
    version="0.1.0",
    description="Shared libraries of rpe_ops: image relative position encoding in C++ and CUDA",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=[],
    py_modules=[],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOps, "install": InstallOps},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
