"""The mappings, as irpe.py has them: a new one is in every test that goes through these lists, by its formula here."""

import math

from irpe import METHOD
from irpe.irpe import _AXES, _METHOD_NAMES

# with one map each, of two axes; and those of configurations
TABLES = [name for method, name in _METHOD_NAMES.items() if method != METHOD.CROSS and _AXES.get(method, -1) >= -2]
METHODS = [name for method, name in _METHOD_NAMES.items() if method not in _AXES]

# the bucket of an offset (dr, dc) in the simplest words: by g, Eq. 18, and b, its largest value
FORMULAS = {
    "euc": lambda dr, dc, g, b: g(round(math.sqrt(dr * dr + dc * dc))) + b,
    "quant": lambda dr, dc, g, b: g(dr * dr + dc * dc) + b,
    "cross_rows": lambda dr, dc, g, b: g(dr) + b,
    "cross_cols": lambda dr, dc, g, b: g(dc) + b,
    "product": lambda dr, dc, g, b: (g(dr) + b) * (2 * b + 1) + (g(dc) + b),
}
