"""equip(model, config): image relative position encoding in a model that exists."""

import sys
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from .irpe import RPEConfig, rpe_config_from_string

Model = TypeVar("Model", bound=nn.Module)


def equip(model: Model, config: RPEConfig | str) -> Model:
    """Adds rpe_q, rpe_k and rpe_v to every attention block of `model`, in place, and returns it.

    >>> model = equip(timm.create_model("deit_small_patch16_224"), "rpe-1.9-product-ctx-1-k")

    The tables start at zero, so the outputs stay what they were until training moves them. All weights and state-dict
    keys stay; the tables come on top (`blocks.0.attn.rpe_k.lookup_table_weight`), on the device and of the dtype of
    the block. Height and width of the map, also for inputs of other sizes and shapes, and the number of prefix tokens
    (class, distillation, register tokens) are the model's own: `skip` is set from it. The class of the model and of its
    attentions becomes a subclass until `unequip`; blocks that are run one by one need `blocks_on_map` of the adapter.

    Args:
        model: a supported model, or a module that holds some, such as timm's features_only wrapper.
        config: from `get_rpe_config`, or its string form.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model is not supported, with the reason and the list of what is; the configuration
            has a `skip` that is neither 0 nor the model's. Nothing has been changed then.
    """
    if isinstance(config, str):
        config = rpe_config_from_string(config)
    if not isinstance(config, RPEConfig) or config == RPEConfig():
        raise TypeError(
            f"config is {config!r}; expected what get_rpe_config returns, or 'rpe-1.9-product-ctx-1-k' and the like"
        )
    adapter, parts = _find(model)
    for part in parts:
        if reason := adapter.why_not(part, config):
            raise ValueError(f"iRPE cannot be added to {type(part).__name__}: {reason}. {_SUPPORTED}")
    for part in parts:
        adapter.equip(part, config)
    return model


def unequip(model: Model) -> Model:
    """Takes out everything that `equip` has added, in place: the model has its classes, keys and hooks of before.

    Raises:
        TypeError, ValueError: the model is not supported, or no part of it is equipped.
    """
    adapter, parts = _find(model)
    equipped = [part for part in parts if adapter.is_equipped(part)]
    if not equipped:
        raise ValueError(f"{type(model).__name__} has no iRPE: it was never equipped, or unequipped before")
    for part in equipped:
        adapter.unequip(part)
    return model


_SUPPORTED = (
    "Supported are timm's VisionTransformer (vit, deit, deit3, with registers, with dynamic image sizes) and "
    "VisionTransformerDistilled (deit distilled), alone or inside another module; for other models add the modules of "
    "build_rpe to the attention yourself, see the README"
)


def _find(model: nn.Module) -> tuple[ModuleType, list[Any]]:
    """The adapter and the parts of the model that it can work on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module. {_SUPPORTED}")
    if "timm" in sys.modules:  # a model from timm cannot exist before that
        from .integrations import timm_vit

        if parts := timm_vit.find(model):
            return timm_vit, parts
    raise TypeError(f"{type(model).__name__} is not a model that iRPE can be added to. {_SUPPORTED}")
