"""Finds and loads the shared libraries that `setup.py` built: beside this file first, then the installed ones.

The operators are registered once in a process, however many copies of this directory are imported. Nothing here raises:
`LOADED` and `MISSING` say what there is, and why the rest is not.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from . import _torch

# device type -> library; the one for the CPU also defines the schemas
_LIBRARIES = {"cpu": "_rpe_ops_C", "cuda": "_rpe_ops_cuda"}
_SCHEMAS = {
    "rpe_index": "rpe_ops::rpe_index(Tensor input, Tensor index) -> Tensor",
    "rpe_bucket_sum": "rpe_ops::rpe_bucket_sum(Tensor input, Tensor index, SymInt num_buckets) -> Tensor",
    "rpe_attention_shares": "rpe_ops::rpe_attention_shares(Tensor like, int heads, int tokens, int threads) -> Tensor",
    "rpe_isa": "rpe_ops::rpe_isa(Tensor q) -> str",
    "rpe_attention": (
        "rpe_ops::rpe_attention(Tensor q, Tensor k, Tensor v, Tensor[] tables_q, Tensor[] tables_k, "
        "Tensor[] tables_v, Tensor[] maps_q, Tensor[] maps_k, Tensor[] maps_v, SymInt[] sizes_q, SymInt[] sizes_k, "
        "SymInt[] sizes_v, Tensor? attn_mask, Tensor? seed, float scale, float dropout_p) -> (Tensor, Tensor, Tensor[])"
    ),
    "rpe_attention_backward": (
        "rpe_ops::rpe_attention_backward(Tensor grad_out, Tensor[] grad_sums, Tensor q, Tensor k, Tensor v, "
        "Tensor lse, Tensor[] tables_q, Tensor[] tables_k, Tensor[] tables_v, Tensor[] maps_q, Tensor[] maps_k, "
        "Tensor[] maps_v, SymInt[] sizes_q, SymInt[] sizes_k, SymInt[] sizes_v, Tensor? attn_mask, Tensor? seed, "
        "float scale, float dropout_p) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor[])"
    ),
    "rpe_attention_cuda": (
        "rpe_ops::rpe_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor[] maps, SymInt[] numbers, "
        "int on, float scale, bool keeps) -> (Tensor, Tensor, Tensor)"
    ),
    "rpe_attention_cuda_backward": (
        "rpe_ops::rpe_attention_cuda_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor sums, Tensor[] tables, Tensor[] maps, SymInt[] numbers, int on, float scale) "
        "-> (Tensor, Tensor, Tensor, Tensor[])"
    ),
}
_ON_BOTH = ("rpe_index", "rpe_bucket_sum")
_ON_CUDA = (*_ON_BOTH, "rpe_attention_cuda", "rpe_attention_cuda_backward")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HOW = "build it with `python setup.py build_ext --inplace` in the directory rpe_ops"

LOADED: dict[str, str] = {}  # device type -> where its kernels come from
MISSING: dict[str, str] = {}  # device type -> why it has none


def takes(input: Tensor) -> bool:
    """True where a compiled kernel computes on `input`; elsewhere plain torch does.

    Plain torch is also what torch.jit.trace can save, what subclasses such as DTensor know how to split, and what
    torch.func transforms inside a compiled graph can differentiate (eager ones have `autograd.Function`s).
    """
    if input.device.type not in LOADED or input.dtype not in _DTYPES or hasattr(type(input), "__tensor_flatten__"):
        return False
    return not (_torch.transforms_active() if torch.compiler.is_compiling() else torch.jit.is_tracing())


def about(device: str, what: str) -> str:
    """A sentence for `rpe_ops.backends()`."""
    if device in MISSING:
        return f"not here: {what}; {MISSING[device]}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"not here: no CUDA device is visible to the {what} in {LOADED[device]}"
    return f"runs: {what}, deterministic, float16 to float64, from {LOADED[device]}"


def first_time(face: str) -> bool:
    """True once in a process, where there are operators: who gets it registers the fakes and derivatives of `face`."""
    namespace = torch.ops.rpe_ops
    if not LOADED or getattr(namespace, f"has_face_of_{face}", False):
        return False
    setattr(namespace, f"has_face_of_{face}", True)
    return True


def _candidates(library: str) -> list[str]:
    here = Path(__file__).parent
    beside = [here / (library + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = [str(file) for file in beside if file.exists()]
    try:
        spec = importlib.util.find_spec(library)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None and spec.origin not in found:
        found.append(spec.origin)
    return found


def _has_kernels(device: str) -> bool:
    if not all(hasattr(torch.ops.rpe_ops, name) for name in _SCHEMAS):
        return False
    names = _ON_CUDA if device == "cuda" else [name for name in _SCHEMAS if name in _ON_BOTH or name not in _ON_CUDA]
    return all(_torch.has_kernel(f"rpe_ops::{name}", device.upper()) for name in names)


def _foreign() -> str | None:
    """What another owner of the namespace has registered under our names, if it is not what we would."""
    for name, schema in _SCHEMAS.items():
        if hasattr(torch.ops.rpe_ops, name):
            found = _torch.schema(name)
            if found not in (None, schema):
                return f"another library of this process has registered {found}; expected {schema}"
    return None


def _load(device: str) -> str | None:
    """None when the kernels of `device` are there, else the reason."""
    library = _LIBRARIES[device]
    if foreign := _foreign():
        return foreign
    if _has_kernels(device):
        LOADED[device] = "loaded by another copy of rpe_ops"
        return None
    if device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if device == "cuda" and "cpu" not in LOADED:
        return f"needs the library for the CPU, which is absent: {MISSING['cpu']}"
    if any(hasattr(torch.ops.rpe_ops, name) for name in _SCHEMAS) and device == "cpu":
        return "another library of this process has registered rpe_ops:: operators without kernels for the CPU"
    reasons = []
    for file in _candidates(library):
        try:
            torch.ops.load_library(file)
        except OSError as error:
            cause = error.__cause__ or error
            reasons.append(f"{file} does not load into torch {torch.__version__} (built against another?): {cause}")
            continue
        if _foreign() is None and _has_kernels(device):
            LOADED[device] = file
            return None
        return f"{file} is of another version of rpe_ops: {_foreign() or 'it has no kernels'}; {_HOW} again"
    return "; ".join(reasons) + f"; {_HOW} again" if reasons else f"{library} was not found: {_HOW}"


for _device in _LIBRARIES:
    if _reason := _load(_device):
        MISSING[_device] = _reason
