"""`from_pretrained`: builds a model, equips it as its configuration says, and loads its weights and tables.

`equip` writes into `config.irpe` of the vision model which attentions have which encodings. Models that were built from
one and the same configuration object share what is written there: give each a copy of it.
"""

import functools
import os
from typing import Any

from ...config_io import rpe_config_from_dict
from .adapter import ADAPTER
from .on_disk import HUB, read_config

_OF_WEIGHTS = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")  # no matter of the configuration


def from_pretrained(cls: Any, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """`cls.from_pretrained(folder)` with the tables that `save_pretrained` of an equipped model has written there.

    `irpe.load(folder)` finds the class by itself; this is for another class, and for arguments.

    >>> irpe.equip(model, "rpe-1.9-product-ctx-1-k").save_pretrained("folder")
    >>> model = irpe.integrations.hf_vit.from_pretrained(AutoModelForImageClassification, "folder")

    Args:
        cls: a class of transformers, `ViTForImageClassification` and the like, or an Auto class.
        folder: a folder, or a name on the hub.
        args, kwargs: of `cls.from_pretrained`: config, dtype, device_map, num_labels, output_loading_info, ...

    Returns what `cls.from_pretrained` returns: the model, in evaluation mode.

    Raises:
        ValueError: `config.json` says nothing of iRPE, or there are no tables among the weights. Load such a folder
            with `cls.from_pretrained`, and equip the model.
    """
    with_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("config") is None:
        kwargs = _with_config(cls, folder, kwargs)
    model, info = _equipping(cls, folder).from_pretrained(folder, *args, output_loading_info=True, **kwargs)
    absent = sorted(key for key in info["missing_keys"] if ".lookup_table_" in key)
    if absent:
        raise ValueError(
            f"{folder} has no weights for {', '.join(absent[:3])}{' and others' * (len(absent) > 3)}: its config.json "
            "says that the model has iRPE, but it was saved without; load it with from_pretrained of its class, and "
            "call irpe.equip"
        )
    return (model, info) if with_info else model


def _with_config(cls: Any, folder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the configuration of the folder in them, and without those that it has taken."""
    from transformers import AutoConfig

    of_config = AutoConfig if hasattr(cls, "_model_mapping") else cls.config_class
    told = {name: value for name, value in kwargs.items() if name not in _OF_WEIGHTS}
    config, rest = read_config(of_config, folder, return_unused_kwargs=True, **told)
    kept = {name: value for name, value in kwargs.items() if name in rest or name in (*HUB, *_OF_WEIGHTS)}
    return kept | {"config": config}


def _equipping(cls: Any, folder: Any) -> Any:
    """A class like `cls`, whose models equip themselves when they are built, and are of the class `cls` then."""
    if hasattr(cls, "_model_mapping"):
        mapping = _Mapping(cls._model_mapping, folder)
        return type(cls)(cls.__name__, (cls,), {"_model_mapping": mapping, "__module__": cls.__module__})

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.__class__ = cls
        _equip_as_configured(self, folder)

    # transformers looks conversions of weights up by the class's name, and outputs to capture by its module as well
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), {"__init__": init, **same})


class _Mapping:
    """An Auto class's map from configurations to classes, with classes that equip their models."""

    def __init__(self, mapping: Any, folder: Any) -> None:
        self.mapping, self.folder = mapping, folder

    def __contains__(self, config_class: Any) -> bool:
        return config_class in self.mapping

    def __iter__(self) -> Any:
        return iter(self.mapping)

    def keys(self) -> Any:
        return self.mapping.keys()

    def __getitem__(self, config_class: Any) -> Any:
        found = self.mapping[config_class]
        if isinstance(found, (list, tuple)):
            return tuple(_equipping(cls, self.folder) for cls in found)
        return _equipping(found, self.folder)


def _equip_as_configured(model: Any, folder: Any) -> None:
    parts = [part for part in ADAPTER.find(model) if getattr(part.config, "irpe", None)]
    if not parts:
        raise ValueError(
            f"the configuration of {folder} says nothing of iRPE: it was saved by a model that was not equipped; load "
            f"it with {type(model).__name__}.from_pretrained, and call irpe.equip"
        )
    for part in parts:
        every, entries = ADAPTER.attentions(part), part.config.irpe
        for entry in entries:
            config = rpe_config_from_dict(entry["rpe_config"])
            chosen = [every[number] for number in entry["attentions"]]
            if reason := ADAPTER.why_not(part, config, chosen, None):
                raise ValueError(f"iRPE of {folder} cannot be added to {type(part).__name__}: {reason}")
            ADAPTER.equip(part, config, chosen, None)
