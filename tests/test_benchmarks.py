"""The benchmarks of CPUs: what they hold down, and the tables that are written from their results."""

import json
import sys

import pytest
from attention_cases import ISAS
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import tables
from rpe_ops import _native


@pytest.mark.skipif("avx2" not in ISAS, reason="the operators are not built, or the processor has no AVX2")
def test_an_instruction_set_holds_down_both_sides_and_stands_in_the_file(run_python, tmp_path):
    command = ["benchmarks/bench_rpe_index.py", "--isa", "avx2", "--shapes", "tiny", "--rounds", "1"]
    command += ["--dtypes", "float32", "--out", str(tmp_path)]
    # which starts itself again, without this
    run_python(f"import runpy, sys; sys.argv = {command!r}; runpy.run_path(sys.argv[0], run_name='__main__')", cwd=ROOT)
    machine = json.loads((tmp_path / "bench_rpe_index_cpu_avx2.json").read_text())["machine"]
    assert machine["isa"] == machine["RPE_OPS_ISA"] == "avx2" and machine["isa of torch"] == "AVX2"
    assert machine["ATEN_CPU_CAPABILITY"] == "avx2" and machine["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert machine["ONEDNN_MAX_CPU_ISA"] == "AVX2"


@pytest.mark.parametrize("name", tables.FILES)
def test_the_tables_are_what_the_results_give(name):
    text = (ROOT / name).read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert tables.rendered(text) == text, "`make tables` writes them"


def test_every_table_stands_somewhere():
    text = "".join((ROOT / name).read_text() for name in tables.FILES)
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)


def test_both_instruction_sets_have_a_table_with_machine_and_date(tmp_path):
    facts = dict(device="A processor", threads=2, torch="2.14.1+cpu", date="2026-11-27", isa="avx512_bf16")
    row = dict(dtype="float32", map=14, B=16, on="k", base_ms=10.04, base_gflops=88.2)
    row |= dict(ratio=dict(sdpa=1.0, matmul=1.2, tiles=0.97, ours=1.04, eager=2.5))
    rows = [
        row | {"pass_": "forward"},
        row | {"pass_": "forward+backward", "mib": dict(sdpa=8.2, ours=13.1, eager=98.0)},
    ]
    text = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in ("attention", "terms", "memory"))
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


@pytest.mark.skipif("cpu" not in _native.LOADED, reason=_native.MISSING.get("cpu", ""))
def test_attention_on_videos_is_measured_and_has_a_table(run_python, tmp_path):
    """As the command does it, but for its six processes that measure memory, of which there is one."""
    code = f"""
        import sys
        from benchmarks import bench_axes
        peak = bench_axes.peak_mib
        bench_axes.peak_mib = lambda *asked: peak(*asked) if asked[1:] == ("qkv", "ours") else -1.0
        sys.argv[1:] = ["--size", "2", "3", "5", "--rounds", "1", "--threads", "1", "--out", {str(tmp_path)!r}]
        bench_axes.main()
    """
    run_python(code, path=[ROOT])
    file = tmp_path / "bench_axes_cpu.json"
    found = json.loads(file.read_text())
    measured = {(row["pass_"], row["on"]): row for row in found["rows"]}
    assert set(measured) == {(key, on) for key in tables.PASSES for on in ("k", "qkv")}
    for row in measured.values():
        assert row["size"] == [2, 3, 5] and row["base_ms"] > 0 and set(row["ratio"]) == {"sdpa", "ours", "eager"}
        assert ("mib" in row) == (row["pass_"] != "forward")
    assert measured["forward+backward", "qkv"]["mib"]["ours"] >= 0
    found["machine"] |= dict(device="A processor", threads=2, torch="2.14.1+cpu", date="2026-11-27", isa="avx2")
    for row in found["rows"]:
        row |= dict(base_ms=57.31, ratio=dict(sdpa=1.0, ours=1.084, eager=4.969))
        if "mib" in row:
            row["mib"] = dict(sdpa=28.9, ours=50.5, eager=473.6)
    file.write_text(json.dumps(found))
    lines = tables.rendered("<!-- table: axes -->\n<!-- end -->", tmp_path).splitlines()
    assert "| 2x3x5, B=2, H=6 | without | ours | formula | MiB without | ours | formula |" in lines
    assert "| forward, k | 57.3 ms | 1.08 | 4.97 |  |  |  |" in lines
    assert "| forward and backward, q, k and v | 57.3 ms | 1.08 | 4.97 | 29 | 50 | 474 |" in lines
    assert "float32, avx2, 2 threads of A processor, torch 2.14.1, 2026-11-27" in lines


def test_ratios_of_a_gpu_are_those_of_one_run_each(tmp_path):
    graph, other = {"flash": 200.0, "cuDNN": 150.0, "k": 250.0, "qkv": 500.0}, {"flash": 100.0}
    other |= {"triton k": 300.0, "triton qkv": 700.0, "eager k": 450.0, "eager qkv": 1520.0}
    line = {"map": "14x14+1", "B": 128, "H": 6, "graph us": graph, "graph us, another run": other}
    rows = [{"pass": "host"}, *(line | {"pass": name} for name in ("forward", "forward+backward"))]
    facts = dict(device="A GPU", torch="2.11.0+cu130", date="2026-11-27")
    (tmp_path / "bench_attention_cuda.json").write_text(json.dumps(dict(machine=facts, note="a note", rows=rows)))
    long, short = (
        tables.rendered(f"<!-- table: {name} -->\n<!-- end -->", tmp_path).splitlines()
        for name in ("gpu attention", "gpu attention in short")
    )
    cells = "0.75 | 1.25 | 2.50 | 3.00 | 7.00 | 4.50 | 15.2 |"
    assert f"| 14x14+1, B=128, H=6, forward | 200 us | {cells}" in long
    assert "bfloat16, A GPU, torch 2.11.0, 2026-11-27; a note" in long
    assert "| 14x14+1, B=128, H=6, forward and backward | 200 us | 1.25 | 2.50 | 4.50 | 15.2 |" in short
    assert not any("forward |" in row for row in short)


def trainings(**more):
    facts = dict(device="A processor", isa="avx2", torch="2.14.1+cpu", date="2026-11-27")
    found = dict(machine=facts, tests={"8": "8x8", "12": "8x12"}, cpu_seconds=1234.4, runs=[{}] * 6, differences=[])
    return found | more


def side(name, lr, *figures):
    accuracy = {test: dict(mean=mean, std=std) for test, (mean, std) in zip(("8", "12"), figures, strict=True)}
    return dict(side=name, title=name.upper(), lr=lr, parameters=57706, seeds=[0, 1], accuracy=accuracy)


def test_trainings_have_pairs_and_bold_only_where_deviations_do_not_overlap(tmp_path):
    rows = [
        side("none", 0.002, (70, 1.04), (50, 2)),
        side("k", 0.004, (94, 2), (71, 9)),
        side("qkv", 0.008, (97.96, 1), (75, 9)),
    ]
    gains = [dict(side="qkv", other="k", difference={"8": dict(mean=3.96, error=0.5), "12": dict(mean=-4, error=5.04)})]
    (tmp_path / "digits_cpu.json").write_text(json.dumps(trainings(summary=rows, differences=gains)))
    long, short = (
        tables.rendered(f"<!-- table: {name} -->\n<!-- end -->", tmp_path).splitlines()
        for name in ("digits", "digits in short")
    )
    under = "Seeds 0, 1; operators in avx2, A processor, torch 2.14.1, 2026-11-27; 6 runs took 1,234 s of CPU time"
    assert "| NONE | 70.0 ± 1.0 | 50.0 ± 2.0 | 57,706 | 0.002 |" in long and under in long
    assert "| QKV | **98.0 ± 1.0** | 75.0 ± 9.0 |" in short and under in short
    assert "| K | 94.0 ± 2.0 | 71.0 ± 9.0 |" in short
    assert "| QKV, to K | +4.0 ± 0.5 | -4.0 ± 5.0 |" in short
    rows[1]["accuracy"]["8"]["std"] = 3.0  # 97 and 96.96: they touch
    (tmp_path / "digits_cpu.json").write_text(json.dumps(trainings(summary=rows)))
    assert "**" not in tables.rendered("<!-- table: digits -->\n<!-- end -->", tmp_path)


def test_rates_show_the_one_that_was_chosen(tmp_path):
    rows = [side("k", lr, (first, 0), (second, 0)) for lr, first, second in ((0.004, 91.84, 64.5), (0.002, 87, 58))]
    found = trainings(summary=rows, chosen={"k": 0.004})
    found["machine"]["isa"] = None
    (tmp_path / "moving_tune_cpu.json").write_text(json.dumps(found))
    lines = tables.rendered("<!-- table: moving rates -->\n<!-- end -->", tmp_path).splitlines()
    assert lines[2:6] == ["| peak lr | K |", "|---|---|", "| 0.002 | 87.0 (58.0) |", "| 0.004 | **91.8** (64.5) |"]
    assert any(line.startswith("Seeds 0, 1; plain torch, A processor") for line in lines)


def test_one_table_has_every_machine(tmp_path):
    facts = dict(device="A processor", threads=2, torch="2.14.1+cpu", date="2026-11-27", isa="avx512_bf16")
    both = [
        dict(dtype="float32", map=side, B=4, on=on, pass_=pass_, ratio=dict(ours=1.04 * side, eager=2.5))
        for side in (14, 24, 32)
        for on in ("k", "qkv")
        for pass_ in tables.PASSES
    ]
    (tmp_path / "bench_attention_cpu.json").write_text(json.dumps(dict(machine=facts, rows=both)))
    graph, other = {"flash": 200.0, "k": 250.0, "qkv": 500.0}, {"flash": 100.0, "eager k": 450.0, "eager qkv": 1520.0}
    rows = [{"map": side, "B": 8, "H": 6, "pass": "forward+backward"} for side in ("14x14+1", "32x32+0", "64x64+0")]
    rows = [row | {"graph us": graph, "graph us, another run": other} for row in rows]
    gpu = dict(device="A GPU", torch="2.11.0+cu130", date="2026-11-27")
    (tmp_path / "bench_attention_cuda.json").write_text(json.dumps(dict(machine=gpu, note="a note", rows=rows)))
    cpu = "float32, avx512_bf16, 2 threads of A processor, torch 2.14.1, 2026-11-27"
    made = tables.rendered("<!-- table: attention everywhere -->\n<!-- end -->", tmp_path).splitlines()
    assert [line for line in made if "| 14" in line or "| 32" in line or "| 64" in line] == [
        "| CPU, avx512_bf16 | 14x14+1, B=4 | 14.6 | 14.6 | 2.50 | 2.50 |",
        "| CPU, avx512_bf16 | 32x32+1, B=4 | 33.3 | 33.3 | 2.50 | 2.50 |",
        "| A GPU | 14x14+1, B=8, H=6 | 1.25 | 2.50 | 4.50 | 15.2 |",
        "| A GPU | 32x32, B=8, H=6 | 1.25 | 2.50 | 4.50 | 15.2 |",
    ]
    assert f"{cpu}; bfloat16, A GPU, torch 2.11.0, 2026-11-27" in made


def test_a_table_that_nobody_makes_is_named():
    with pytest.raises(ValueError, match="no table 'speed'; expected one of attention in short"):
        tables.rendered("<!-- table: speed -->\n<!-- end -->")
