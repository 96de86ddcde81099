"""What timm writes about an equipped model into `config.json`, so that nobody builds it without encodings unawares."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config_io import rpe_config_to_dict
from ..irpe import METHOD, RPEConfig, iRPE_Cross

# Among the arguments of a model that timm writes (`save_for_hf`, `push_to_hf_hub`). Its `create_model` hands them to
# the model's class, whose error has the name; else it would build the model without encodings, and with a new head
# leave the tables aside without a word.
RECORD = "saved_with_irpe_so_use_irpe_load"


def entries_of(attentions: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """[{"attentions": numbers, "rpe_config": values}, ...] of the equipped ones among attentions, as JSON has it."""
    found: list[tuple[list[int], RPEConfig]] = []
    for number, attention in enumerate(attentions):
        config = config_of(attention)
        if config == RPEConfig():
            continue
        if found and found[-1][1] == config:
            found[-1][0].append(number)
        else:
            found.append(([number], config))
    return [{"attentions": numbers, "rpe_config": rpe_config_to_dict(config)} for numbers, config in found]


def config_of(attention: nn.Module) -> RPEConfig:
    """The configuration that the encodings of an attention were built from; an empty one where it has none."""
    singles = {}
    for name in ("rpe_q", "rpe_k", "rpe_v"):
        rpe: Any = getattr(attention, name, None)
        if isinstance(rpe, iRPE_Cross):
            part: Any = next(rpe.children())
            singles[name] = dataclasses.replace(part.rpe_config, method=METHOD.CROSS)
        elif rpe is not None:
            singles[name] = rpe.rpe_config
    return RPEConfig(**singles)


def record(model: nn.Module, attentions: Iterable[nn.Module] = ()) -> None:
    """Writes into each model of timm inside a model (itself, or in a wrapper) which of these attentions have what.

    Without attentions it takes that out again.
    """
    attentions = list(attentions)
    for module in model.modules():
        of_timm, wrapper = "pretrained_cfg" in vars(module), hasattr(module, "timm_model") and hasattr(module, "config")
        if not of_timm and not wrapper:
            continue
        inside = {id(part) for part in module.modules()}
        entries = entries_of(attention for attention in attentions if id(attention) in inside)
        if wrapper:  # transformers', whose own configuration is what is saved
            config: Any = module.config
            if entries:
                config.irpe = entries
            else:
                vars(config).pop("irpe", None)
            continue
        arguments = {name: value for name, value in vars(module).get("_model_args", {}).items() if name != RECORD}
        module._model_args = arguments | ({RECORD: entries} if entries else {})  # type: ignore[assignment]
