"""What runs here, in words."""

import json
import os
import subprocess
import sys
import time

import torch

from . import _torch, fused, rpe_attention_eager


def backends(compile: bool = False) -> dict[str, str]:
    """Name of each backend -> what it runs on this machine and what to know about it, as a sentence.

    >>> print(backends()["reference"])
    runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors

    Args:
        compile: where there is a GPU, compile the Triton kernels for it, in processes of their own, and say how long
            that took and what failed. Triton keeps what was compiled, so the first step of a run has it.
    """
    found = {name: backend.about() for name, backend in fused.BACKENDS.items()}
    if compile and found["triton"].startswith("runs: "):
        found["triton"] += _compiled()
    found["eager"] = rpe_attention_eager.about()
    found["reference"] = "runs on every device: the law, in float32 or float64; for tests, slow and with L x L tensors"
    if _torch.MISSING:
        missing = "; ".join(f"{name}: {without}" for name, without in _torch.MISSING.items())
        found["torch"] = f"{torch.__version__} lacks {missing}"
    return found


def _compiled() -> str:
    # a command of its own: processes that are spawned here would run the caller's script again
    start = time.perf_counter()
    command = [sys.executable, "-m", f"{__package__}._triton_ahead"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return f"; the kernels could not be compiled: {done.stderr.strip()[-500:]}"
    reports = json.loads(done.stdout)
    failed = {name: words for name, words in reports.items() if isinstance(words, str)}
    told = f"; {len(reports) - len(failed)} of {len(reports)} kernels compiled in {seconds:.0f} s"
    return told + "".join(f"; the formula takes the place of {name}: {words[-200:]}" for name, words in failed.items())
