"""Image relative position encoding (iRPE) for vision transformers. `irpe.irpe` is the file to copy."""

from ._version import __version__
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
    get_offset_ids_2d,
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
    "get_offset_ids_2d",
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
