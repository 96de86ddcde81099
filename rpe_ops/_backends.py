"""What runs here, in words."""

import torch

from . import _native


def backends() -> dict[str, str]:
    """Name of each backend -> what it runs on this machine and what to know about it, as a sentence.

    >>> print(backends()["reference"])
    runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors
    """
    names = {"cpu": "compiled kernels for CPUs", "cuda": "compiled kernels for CUDA"}
    compiled = {
        device: f"runs: {what}, deterministic, float16 to float64, from {_native.LOADED[device]}"
        if device in _native.LOADED
        else f"not here: {what}; {_native.MISSING[device]}"
        for device, what in names.items()
    }
    gpu = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no CUDA device is visible"
    return compiled | {
        "eager": f"runs on every device through gather and scatter_add of torch {torch.__version__} ({gpu}); on CUDA "
        "scatter_add uses atomics, so bucket sums may differ in their last bits from run to run, unless "
        "torch.use_deterministic_algorithms(True) is set",
        "reference": "runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors",
    }
