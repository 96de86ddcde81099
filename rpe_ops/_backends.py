"""What runs here, in words."""

from . import _native, _torch, fused, rpe_attention_eager


def backends() -> dict[str, str]:
    """Name of each backend -> what it runs on this machine and what to know about it, as a sentence.

    >>> print(backends()["reference"])
    runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors
    """
    found = {name: backend.about() for name, backend in fused.BACKENDS.items()}
    found["cuda"] = _native.about("cuda", "compiled kernels of rpe_index for CUDA")
    found["eager"] = rpe_attention_eager.about()
    found["reference"] = "runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors"
    if _torch.MISSING:
        missing = "; ".join(f"{name}: {without}" for name, without in _torch.MISSING.items())
        found["torch"] = f"{_native.torch.__version__} lacks {missing}"
    return found
