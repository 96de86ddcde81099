"""What runs here, in words."""

import torch

from . import _native, rpe_attention_triton


def backends() -> dict[str, str]:
    """Name of each backend -> what it runs on this machine and what to know about it, as a sentence.

    >>> print(backends()["reference"])
    runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    compiled = {}
    for device, what in {"cpu": "compiled kernels for CPUs", "cuda": "compiled kernels for CUDA"}.items():
        if device in _native.MISSING:
            compiled[device] = f"not here: {what}; {_native.MISSING[device]}"
        elif device == "cuda" and gpu is None:
            compiled[device] = f"not here: no CUDA device is visible to the {what} in {_native.LOADED[device]}"
        else:
            compiled[device] = f"runs: {what}, deterministic, float16 to float64, from {_native.LOADED[device]}"
    reason = "no CUDA device is visible"
    if gpu is not None:
        reason = rpe_attention_triton.why_not(torch.empty(0, 1, device="cuda")) or ""
    triton = "attention on a GPU in Triton, forward and backward"
    return compiled | {
        "triton": f"not here: {triton}; {reason}"
        if reason
        else f"runs: {triton}, deterministic, float16 to float32, head sizes up to 128",
        "eager": f"runs on every device through gather and scatter_add of torch {torch.__version__} "
        f"({gpu or 'no CUDA device is visible'}); on CUDA "
        "scatter_add uses atomics, so bucket sums may differ in their last bits from run to run, unless "
        "torch.use_deterministic_algorithms(True) is set",
        "reference": "runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors",
    }
