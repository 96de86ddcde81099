"""Hugging Face's vision models: iRPE in their self-attentions, and saving and loading of what `equip` has made.

Height and width of the map travel from the image to every attention as an argument of each call (`irpe_map`), never as
state: a pre-hook of the model reads them off `pixel_values`, transformers' own models hand keyword arguments down to
the attention function, and gradient checkpointing keeps the arguments of each call.
"""

from .adapter import ADAPTER
from .on_disk import read_config
from .saving import from_pretrained

__all__ = ["ADAPTER", "from_pretrained", "read_config"]
