"""A `config.json` with iRPE that transformers' own loaders refuse, and the one way to read it.

They would build the model without encodings, leave the tables in the file aside, and compute something else. No class,
Auto class, pipeline or argument of them gets past a number of layers that is none: it is a sentence there, and the
number stands beside it. (Of timm's models in transformers it is the name of the model.)
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SENTENCE = (
    "this model has iRPE, which transformers alone would leave out: load it with irpe.load(folder), of the package irpe"
)
_LAYERS = ("num_hidden_layers", "encoder_layers", "architecture")  # of vision transformers, of DETR, of timm's models
_KEPT = "irpe_"  # before the name, for the number itself
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def guard() -> None:
    """From now on transformers writes configurations of equipped models, also inside others, so that it refuses them.

    In memory they are as they were. `config.save_pretrained`, `model.save_pretrained`, `push_to_hub` and `Trainer` all
    write through the one method that is replaced.
    """
    from transformers import PreTrainedConfig

    config: Any = PreTrainedConfig
    if not hasattr(config.to_json_string, "before_irpe"):
        config.to_json_string = _guarded(config.to_json_string)


def _guarded(to_json_string: Any) -> Any:
    @functools.wraps(to_json_string)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> str:
        text: str = to_json_string(self, *args, **kwargs)
        if '"irpe"' not in text:
            return text
        values = json.loads(text)
        if _is_of_a_class_elsewhere(values):
            if type(self).__module__.startswith("transformers."):
                values[_KEPT + "model_type"] = values["model_type"]
                values["model_type"] += "-with-irpe"
        else:
            for config in _equipped(values):
                name = next((name for name in _LAYERS[::-1] if name in config), None)
                if name is not None and config[name] != SENTENCE:
                    config[_KEPT + name], config[name] = config[name], SENTENCE
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    guarded.before_irpe = to_json_string  # type: ignore[attr-defined]
    return guarded


def _is_of_a_class_elsewhere(values: dict[str, Any]) -> bool:
    """Whether a class that is not transformers' own is saved, which may equip itself when it is built.

    Its `from_pretrained` goes on to work; Auto classes and pipelines, which would take a class of transformers for the
    type, do not know the type then.
    """
    import transformers

    names = values.get("architectures") or []
    return bool(names) and not all(hasattr(transformers, str(name)) for name in names)


def readable(values: dict[str, Any]) -> bool:
    """Gives guarded configurations inside plain values their numbers back, in place; whether there were any."""
    found = False
    for config in _equipped(values):
        for name in (*_LAYERS, "model_type"):
            if _KEPT + name in config:
                config[name], found = config.pop(_KEPT + name), True
    return found


def _equipped(values: Any) -> list[dict[str, Any]]:
    """The dictionaries, from outside to inside, of configurations of equipped models."""
    if not isinstance(values, dict):
        return []
    own = [values] if isinstance(values.get("irpe"), list) else []
    return own + [part for value in values.values() for part in _equipped(value)]


def read_config(cls: Any, folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """`cls.from_pretrained(folder, ...)` for a class of configurations or AutoConfig, guarded or not."""
    from transformers import PreTrainedConfig

    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(folder, **hub)
    if not readable(values):
        return cls.from_pretrained(folder, **hub, **kwargs)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(values), encoding="utf-8")
        found = cls.from_pretrained(place, **kwargs)
    config = found[0] if isinstance(found, tuple) else found
    config._name_or_path = str(folder)
    return found
