"""Tables that a checkpoint of transformers does not have are zero.

`from_pretrained` builds a model on the meta device, gives the parameters that the checkpoint lacks uninitialized
memory, and has `PreTrainedModel` initialize them, which knows its own modules alone. A class that equips itself when it
is built would have tables of whatever was there.
"""

import functools
import sys
from typing import Any

from torch import nn

from ..irpe import iRPE

_DONE = "_is_hf_initialized"  # transformers' mark on parameters that were loaded and on modules that are done


def zero_missing_tables(model: nn.Module) -> None:
    """From now on transformers, where it is loaded, initializes tables as it does its own weights.

    Those of `model` that are no longer on the meta device have been, and are left alone.
    """
    modeling = sys.modules.get("transformers.modeling_utils")  # no model of it exists before that
    if modeling is None:
        return
    for module in model.modules():
        if isinstance(module, iRPE) and not module.table.is_meta:
            setattr(module, _DONE, True)
    cls = modeling.PreTrainedModel
    if not hasattr(cls._initialize_weights, "before_irpe"):
        cls._initialize_weights = _with_tables(cls._initialize_weights)


def _with_tables(initialize: Any) -> Any:
    @functools.wraps(initialize)
    def _initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        done = isinstance(module, iRPE) and any(getattr(x, _DONE, False) for x in (module, module.table))
        if isinstance(module, iRPE) and not done:
            module.reset_parameters()
        initialize(self, module, *args, **kwargs)

    _initialize_weights.before_irpe = initialize  # type: ignore[attr-defined]
    return _initialize_weights
