"""The benchmarks of CPUs: what they hold down."""

import json
import subprocess
import sys

import pytest
from attention_cases import ISAS
from conftest import ROOT


@pytest.mark.skipif("avx2" not in ISAS, reason="the operators are not built, or the processor has no AVX2")
def test_an_instruction_set_holds_down_both_sides_and_stands_in_the_file(tmp_path):
    command = [sys.executable, "benchmarks/bench_rpe_index.py", "--isa", "avx2", "--shapes", "tiny", "--rounds", "1"]
    command += ["--dtypes", "float32", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    machine = json.loads((tmp_path / "bench_rpe_index_cpu_avx2.json").read_text())["machine"]
    assert machine["isa"] == machine["RPE_OPS_ISA"] == "avx2" and machine["isa of torch"] == "AVX2"
    assert machine["ATEN_CPU_CAPABILITY"] == "avx2" and machine["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert machine["ONEDNN_MAX_CPU_ISA"] == "AVX2"
