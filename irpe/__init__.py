"""Image relative position encoding (iRPE) for vision transformers. `irpe.irpe` is the file to copy.

A name costs what its module imports, and is imported when it is first asked for: `irpe --help` needs no torch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config_io import rpe_config_from_dict, rpe_config_from_string, rpe_config_to_dict, rpe_config_to_string
    from .convert import convert_tables
    from .equip import equip, rpe_parameters, unequip
    from .irpe import (
        METHOD,
        BucketMap,
        RPEConfig,
        SingleRPEConfig,
        build_rpe,
        get_bucket_ids,
        get_bucket_ids_2d,
        get_bucket_map,
        get_num_buckets,
        get_rpe_config,
        get_single_rpe_config,
        iRPE,
        iRPE_Cross,
        piecewise_index,
        rpe_attention,
    )
    from .multihead_attention import RPEMultiheadAttention
    from .publish import push_to_hub
    from .saving import load, save

__all__ = [
    "METHOD",
    "BucketMap",
    "RPEConfig",
    "RPEMultiheadAttention",
    "SingleRPEConfig",
    "__version__",
    "build_rpe",
    "convert_tables",
    "equip",
    "get_bucket_ids",
    "get_bucket_ids_2d",
    "get_bucket_map",
    "get_num_buckets",
    "get_rpe_config",
    "get_single_rpe_config",
    "iRPE",
    "iRPE_Cross",
    "load",
    "piecewise_index",
    "push_to_hub",
    "rpe_attention",
    "rpe_config_from_dict",
    "rpe_config_from_string",
    "rpe_config_to_dict",
    "rpe_config_to_string",
    "rpe_parameters",
    "save",
    "unequip",
]

# of the names that are not in irpe.irpe
_ELSEWHERE = {
    "RPEMultiheadAttention": "multihead_attention", "convert_tables": "convert", "equip": "equip", "load": "saving",
    "push_to_hub": "publish", "rpe_config_from_dict": "config_io", "rpe_config_from_string": "config_io",
    "rpe_config_to_dict": "config_io", "rpe_config_to_string": "config_io", "rpe_parameters": "equip", "save": "saving",
    "unequip": "equip",
}  # fmt: skip


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_ELSEWHERE.get(name, 'irpe')}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # the import of a submodule would put it in the place of the function of its name, which is `irpe.equip`
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
