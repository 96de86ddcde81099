"""Registers of the CUDA attention kernels: with 104 bytes of stack, which is what spilled, one took 25% longer."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

NVCC = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))
SOURCE = """
#include "rpe_attention_kernels.h"
using namespace rpe_ops;
template __global__ void rpe_ops::attention_kernel<Brain, 64, ON, Pass::kForward>(const Attention);
template __global__ void rpe_ops::attention_kernel<Brain, 64, ON, Pass::kQueries>(const Attention);
template __global__ void rpe_ops::attention_kernel<Brain, 64, ON, Pass::kKeys>(const Attention);
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path(NVCC).exists(), reason="no nvcc")
@pytest.mark.parametrize("on", [2, 7], ids=["k", "qkv"])
def test_hardly_a_register_is_spilled(tmp_path, on):
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE)
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-gencode=arch=compute_90,code=sm_90",
        "-Xptxas",
        "-v",
        f"-DON={on}",
        "-cubin",
    ]
    command += [f"-I{ROOT / 'rpe_ops' / 'csrc' / 'cuda'}", str(source), "-o", str(tmp_path / "kernels.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stacks = [int(one) for one in re.findall(r"(\d+) bytes stack frame", told)]
    assert len(stacks) == 3 and max(stacks) <= 16, told
