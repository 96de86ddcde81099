import re
import subprocess
import sys
import types

import torch

import rpe_ops
from rpe_ops import rpe_attention_triton


def test_backends_say_in_words_what_runs_here():
    backends = rpe_ops.backends()
    assert set(backends) == {"cpu", "cuda", "triton", "eager", "reference"}
    assert torch.__version__ in backends["eager"] and "atomics" in backends["eager"]
    assert all(" " in sentence for sentence in backends.values())


def test_the_package_never_rebinds_the_name_of_a_submodule():
    for name in ("rpe_index", "rpe_attention", "reference", "maps"):
        assert isinstance(getattr(rpe_ops, name), types.ModuleType)


def test_the_kernels_that_compile_are_counted_and_those_that_fail_are_named(monkeypatch):
    monkeypatch.setattr(rpe_attention_triton, "about", lambda: "runs: kernels")
    reports = '{"lookup_forward bf16": 1.5, "lookup_forward fp32": "CompilationError: at 12:3"}'
    code = f"import sys; print('{reports}') if sys.argv[1:] == ['-m', 'rpe_ops._triton_ahead'] else sys.exit(sys.argv)"
    run = subprocess.run

    def compiler(command, **options):
        assert command[0] == sys.executable and options["env"]["PYTHONPATH"]
        return run([sys.executable, "-c", code, *command[1:]], **options)

    monkeypatch.setattr(subprocess, "run", compiler)
    assert rpe_ops.backends()["triton"] == "runs: kernels"
    sentence = rpe_ops.backends(compile=True)["triton"]
    assert re.search(r"runs: kernels; 1 of 2 kernels compiled in \d+ s; the formula takes the place of ", sentence)
    assert sentence.endswith("lookup_forward fp32: CompilationError: at 12:3")
    code = "import sys; sys.exit('no compiler')"
    assert rpe_ops.backends(compile=True)["triton"].endswith("the kernels could not be compiled: no compiler")
