"""Operators of image relative position encoding. Knows tensors only, nothing of `irpe`; may be copied as a directory.

`rpe_ops.rpe_index`, `rpe_ops.rpe_attention` and `rpe_ops.reference` are modules: `from rpe_ops.rpe_index import
rpe_index` is the function.
"""

from . import maps, reference, rpe_attention, rpe_index
from ._backends import backends

__all__ = ["backends", "maps", "reference", "rpe_attention", "rpe_index"]
