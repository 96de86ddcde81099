"""The benchmarks of CPUs: what they hold down, and the tables that are written from their results."""

import json
import subprocess
import sys

import pytest
from attention_cases import ISAS
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import tables


@pytest.mark.skipif("avx2" not in ISAS, reason="the operators are not built, or the processor has no AVX2")
def test_an_instruction_set_holds_down_both_sides_and_stands_in_the_file(tmp_path):
    command = [sys.executable, "benchmarks/bench_rpe_index.py", "--isa", "avx2", "--shapes", "tiny", "--rounds", "1"]
    command += ["--dtypes", "float32", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    machine = json.loads((tmp_path / "bench_rpe_index_cpu_avx2.json").read_text())["machine"]
    assert machine["isa"] == machine["RPE_OPS_ISA"] == "avx2" and machine["isa of torch"] == "AVX2"
    assert machine["ATEN_CPU_CAPABILITY"] == "avx2" and machine["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert machine["ONEDNN_MAX_CPU_ISA"] == "AVX2"


@pytest.mark.parametrize("name", tables.FILES)
def test_the_tables_are_what_the_results_give(name):
    text = (ROOT / name).read_text()
    assert text.count("<!-- cpu: ") == text.count("<!-- end -->") > 0
    assert tables.rendered(text) == text, "`make tables` writes them"


def test_every_table_stands_somewhere():
    text = "".join((ROOT / name).read_text() for name in tables.FILES)
    assert all(f"<!-- cpu: {name} -->" in text for name in tables.TABLES)


def test_both_instruction_sets_have_a_table_with_machine_and_date(tmp_path):
    facts = dict(device="A processor", threads=2, torch="2.14.1+cpu", date="2026-11-27", isa="avx512_bf16")
    row = dict(dtype="float32", map=14, B=16, on="k", base_ms=10.04, base_gflops=88.2)
    row |= dict(ratio=dict(sdpa=1.0, matmul=1.2, tiles=0.97, ours=1.04, eager=2.5))
    rows = [
        row | {"pass_": "forward"},
        row | {"pass_": "forward+backward", "mib": dict(sdpa=8.2, ours=13.1, eager=98.0)},
    ]
    text = "".join(f"<!-- cpu: {name} -->\nold\n<!-- end -->\n" for name in ("attention", "terms", "memory"))
    assert "old" not in tables.rendered(text, tmp_path)
    (tmp_path / "bench_attention_cpu.json").write_text(json.dumps(dict(machine=facts, rows=rows)))
    held = facts | dict(isa="avx2", RPE_OPS_ISA="avx2")
    (tmp_path / "bench_attention_cpu_avx2.json").write_text(json.dumps(dict(machine=held, rows=rows)))
    made = tables.rendered(text, tmp_path)
    assert tables.rendered(made, tmp_path) == made
    for line in (
        "|  | 14x14+1, B=16 |",
        "| without, forward | 10 ms, 88 GFLOP/s |",
        "| forward and backward, k | 1.04 (2.50) |",
        "| forward, k | 0.97 + 0.07 |",
        "| 14x14+1, float32, forward and backward, k | 8 | 13 | 98 |",
        "float32, avx512_bf16, 2 threads of A processor, torch 2.14.1, 2026-11-27",
        "float32, both sides held down to avx2, 2 threads of A processor, torch 2.14.1, 2026-11-27",
    ):
        assert line in made.splitlines()


def test_a_table_that_nobody_makes_is_named():
    with pytest.raises(ValueError, match="no table 'speed'; expected one of attention in short"):
        tables.rendered("<!-- cpu: speed -->\n<!-- end -->")
