import types

import torch

import rpe_ops


def test_backends_say_in_words_what_runs_here():
    backends = rpe_ops.backends()
    assert set(backends) == {"cpu", "cuda", "triton", "eager", "reference"}
    assert torch.__version__ in backends["eager"] and "atomics" in backends["eager"]
    assert all(" " in sentence for sentence in backends.values())


def test_the_package_never_rebinds_the_name_of_a_submodule():
    for name in ("rpe_index", "rpe_attention", "reference"):
        assert isinstance(getattr(rpe_ops, name), types.ModuleType)
