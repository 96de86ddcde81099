"""equip(model, config): image relative position encoding in a model that exists."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from .config_io import rpe_config_from_string
from .integrations.adapter import Adapter
from .irpe import RPEConfig, iRPE

Model = TypeVar("Model", bound=nn.Module)
Blocks = slice | Iterable[int] | Callable[[int, str], bool]


def equip(
    model: Model, config: RPEConfig | str, *, blocks: Blocks | None = None, grid: int | Sequence[int] | None = None
) -> Model:
    """Adds rpe_q, rpe_k and rpe_v to the attentions of `model`, in place, and returns it.

    >>> model = equip(timm.create_model("deit_small_patch16_224"), "rpe-1.9-product-ctx-1-k")

    The tables start at zero, so the outputs stay what they were until training moves them. All weights and state-dict
    keys stay; the tables come on top (`blocks.0.attn.rpe_k.lookup_table_weight`), on the device and of the dtype of
    the block. Height and width of the map, also for inputs of other sizes and shapes, and the number of prefix tokens
    (class, distillation, register tokens) are the model's own: `skip` is set from it. Classes of the model and of its
    attentions become subclasses until `unequip`.

    Args:
        model: a supported model, or a module that holds some, such as timm's features_only wrapper.
        config: from `get_rpe_config`, or its string form.
        blocks: which attentions, counted through the model from 0: a slice, the numbers, or a function of
            (number, name) that says yes or no; all when absent. Equip the others in a second call, with another
            configuration, if they are to differ.
        grid: (height, width) of the map in tokens, for models that cannot know it, such as a plain
            `nn.TransformerEncoder`; one number for each axis where the configuration has another `ndim`, such as
            (frames, height, width), and for a sequence n or (n,). Without it their maps are taken for squares, and with
            ndim=1 for sequences of any length. Other models refuse it. For those models the number of prefix tokens is
            the configuration's `skip`, and attentions of decoder layers are left alone; they are equipped where no
            vision transformer is found.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model is not supported, with the reason and the list of what is; it is in
            DistributedDataParallel or sharded by FSDP, which come after `equip`; the configuration has a `skip` or an
            `ndim` that is not the model's; `blocks` names none. Nothing has been changed then.
    """
    if isinstance(config, str):
        config = rpe_config_from_string(config)
    if not isinstance(config, RPEConfig) or config == RPEConfig():
        raise TypeError(
            f"config is {config!r}; expected what get_rpe_config returns, or 'rpe-1.9-product-ctx-1-k' and the like"
        )
    _check_alone(model)
    size = _size_of(grid)
    found = _find(model)
    names = {id(module): name for name, module in model.named_modules()}
    every = [attention for adapter, part in found for attention in adapter.attentions(part)]
    wanted = _choose(blocks, [names[id(attention)] for attention in every])
    chosen = {id(attention) for attention, want in zip(every, wanted, strict=True) if want}
    jobs = [(adapter, part, [a for a in adapter.attentions(part) if id(a) in chosen]) for adapter, part in found]
    for adapter, part, attentions in jobs:
        if not attentions and blocks is not None:
            continue
        if reason := adapter.why_not(part, config, attentions, size):
            raise ValueError(f"iRPE cannot be added to {type(part).__name__}: {reason}. {_SUPPORTED}")
    if not chosen:
        raise ValueError(f"blocks={blocks!r} names none of the {len(every)} attentions of {type(model).__name__}")
    for adapter, part, attentions in jobs:
        if attentions:
            adapter.equip(part, config, attentions, size)
    from .integrations import hf_missing, timm_record

    hf_missing.zero_missing_tables(model)
    timm_record.record(model, every)
    return model


def unequip(model: Model) -> Model:
    """Takes out everything that `equip` has added, in place: the model has its classes, keys and hooks of before.

    Raises:
        TypeError, ValueError: the model is not supported, or shared between processes, or no part of it is equipped.
    """
    _check_alone(model)
    equipped = [(adapter, part) for adapter, part in _find(model, everything=True) if adapter.is_equipped(part)]
    if not equipped:
        raise ValueError(f"{type(model).__name__} has no iRPE: it was never equipped, or unequipped before")
    for adapter, part in equipped:
        adapter.unequip(part)
    from .integrations import timm_record

    timm_record.record(model)
    return model


def rpe_parameters(model: nn.Module, **options: Any) -> dict[str, Any]:
    """{"params": every table of a model, "weight_decay": 0.0}: the tables as a parameter group of an optimizer.

    >>> tables = rpe_parameters(model, lr=1e-3)
    >>> own = set(tables["params"])
    >>> torch.optim.AdamW([tables, {"params": [p for p in model.parameters() if p not in own]}], lr=1e-4)

    Tables are not decayed unless `weight_decay` says so: zero is "no encoding", and what pulls there is a choice. The
    other options (lr, betas, ...) are put into the group as they are. To train the tables alone, freeze the rest:
    `model.requires_grad_(False)`, then `for table in rpe_parameters(model)["params"]: table.requires_grad_()`.

    Raises:
        ValueError: there is no table in the model.
    """
    tables = [module.table for module in model.modules() if isinstance(module, iRPE)]
    if not tables:
        raise ValueError(f"{type(model).__name__} has no tables of iRPE: equip it first")
    return {"params": tables, "weight_decay": 0.0, **options}


_SUPPORTED = (
    "Supported are timm's VisionTransformer (vit, deit, deit3, with registers, with dynamic image sizes), "
    "VisionTransformerDistilled (deit distilled), Eva (eva02, dinov3, vit with rope), Beit and SwinTransformer (v1); "
    "of transformers ViT, DeiT, BEiT, DINOv2 (with registers or not), DINOv3 ViT, the vision towers of CLIP and "
    "SigLIP, the encoder of DETR, and on videos (ndim=3) VideoMAE and V-JEPA 2; torchvision's VisionTransformer; "
    "nn.MultiheadAttention in nn.TransformerEncoder, nn.TransformerEncoderLayer or modules of your own; all alone or "
    "inside another module. For other models add the modules of build_rpe to the attention yourself, or use "
    "RPEMultiheadAttention, see the README"
)


def _adapters() -> Iterator[Adapter]:
    """Every adapter but torch's, in the order in which they are asked."""
    if "timm" in sys.modules:  # a model of a library cannot exist before that
        from .integrations import timm_beit, timm_eva, timm_refused, timm_swin, timm_vit

        yield from (module.ADAPTER for module in (timm_vit, timm_eva, timm_beit, timm_swin, timm_refused))
    if "transformers" in sys.modules:
        from .integrations import hf_vit

        yield hf_vit.ADAPTER


def _find(model: nn.Module, everything: bool = False) -> list[tuple[Adapter, Any]]:
    """The parts of the model, each with its adapter; those of plain torch where there are no others, or everything."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module. {_SUPPORTED}")
    found = [(adapter, part) for adapter in _adapters() for part in adapter.find(model)]
    if not found or everything:  # beside a vision transformer, torch's attentions are mostly heads and decoders
        from .integrations.torch_mha import ADAPTER

        found += [(ADAPTER, part) for part in ADAPTER.find(model)]
    if not found:
        raise TypeError(f"{type(model).__name__} is not a model that iRPE can be added to. {_SUPPORTED}")
    return found


def _check_alone(model: nn.Module) -> None:
    """Processes that share a model have agreed on its parameters when it was wrapped."""
    if not isinstance(model, nn.Module):
        return  # `_find` has the words for it
    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        if shared := names & {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError(
                f"{type(module).__name__} is shared between processes ({shared.pop()}), which would not share the "
                "tables: call equip or unequip first, and DistributedDataParallel or fully_shard after it"
            )


def _size_of(grid: Any) -> tuple[int, ...] | None:
    """`grid` as a number for each axis."""
    if grid is None:
        return None
    size = tuple(grid) if isinstance(grid, Sequence) else (grid,)
    if not size or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"grid={grid!r}; expected (height, width) in tokens, or one number for each axis, at least 1")
    return size


def _choose(blocks: Blocks | None, names: list[str]) -> list[bool]:
    """Which of the attentions with these names `blocks` means."""
    everything = range(len(names))
    if blocks is None:
        return [True] * len(names)
    if callable(blocks):
        return [bool(blocks(number, name)) for number, name in enumerate(names)]
    if isinstance(blocks, slice):
        wanted = set(everything[blocks])
    elif isinstance(blocks, Iterable) and not isinstance(blocks, str):
        wanted = set()
        for number in blocks:
            if not isinstance(number, int) or not -len(names) <= number < len(names):
                raise ValueError(f"blocks holds {number!r}, but the model has {len(names)} attentions")
            wanted.add(everything[number])
    else:
        raise TypeError(f"blocks is {blocks!r}; expected a slice, numbers, or a function of (number, name)")
    return [number in wanted for number in everything]
