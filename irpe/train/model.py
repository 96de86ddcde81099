"""The model of a run: timm's, with iRPE; its weights, its parameter groups and its optimizer."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..equip import equip, rpe_parameters
from ..runs.seeds import seed_all
from .loader import Shape
from .pretrained import find_weights, load_weights, size_of_run
from .settings import Settings

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")  # timm's


def build(
    settings: Settings, num_classes: int, say: Callable[[str], None] = lambda words: None, *, strict: bool = False
) -> nn.Module:
    """A new model on the CPU, with its weights; a function of the settings and of the files that they name.

    Args:
        say: is told what was not taken from the pretrained weights.
        strict: whether everything has to be taken from them.

    Raises:
        ValueError, TypeError: timm does not know the model or an argument; iRPE cannot be added to it; the file does
            not fit.
    """
    import timm

    options = settings.model_kwargs()
    size = settings.size()
    hub = settings.pretrained == "hub"
    weights = find_weights(Path(settings.pretrained)) if settings.pretrained and not hub else None
    of_run = size_of_run(weights) if weights is not None else None
    if (first := of_run or size) is not None:
        options["img_size"] = first
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    _check_name(settings)
    seed_all(settings.seed, "model")
    try:
        model: nn.Module = timm.create_model(
            settings.model, pretrained=hub, num_classes=num_classes, in_chans=settings.in_chans, **options
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(f"timm cannot build {settings.model} with {given or 'its own arguments'}: {error}") from None
    except OSError as error:
        raise ValueError(f"--pretrained hub: {error}") from None
    _check_blocks(settings, model)
    _check_patches(settings, model)
    if settings.rpe != "none":
        equip(model, settings.rpe)
    if weights is not None:
        load_weights(model, weights, say, strict=strict, same_size=of_run is not None)
        if of_run is not None and of_run != (wanted := shape_of(settings, model).size):
            # only the model itself knows the height and width of the positions that it has
            if not hasattr(model, "set_input_size"):
                raise ValueError(f"{settings.model} cannot change the size of its images; leave --img-size out")
            model.set_input_size(img_size=wanted)  # type: ignore[operator]
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _check_name(settings: Settings) -> None:
    import timm

    if not timm.is_model(settings.model):
        near = difflib.get_close_matches(settings.model, timm.list_models(), 4)
        raise ValueError(f"--model {settings.model}: timm has none of that name; similar: {', '.join(near) or 'none'}")


def _check_blocks(settings: Settings, model: nn.Module) -> None:
    """Refuses --model-arg depth=0, which timm builds."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and not len(blocks):
        words = ", ".join(settings.model_arg) or "these settings"
        raise ValueError(f"{settings.model} has no blocks with {words}; expected a depth of at least 1")


def _check_patches(settings: Settings, model: nn.Module) -> None:
    """Refuses sizes of which the last rows or columns would be in no patch, which timm drops without a word.

    The size that a model of timm was trained with is its own matter: some drop pixels there by design.
    """
    from timm.layers import PatchEmbed

    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad or embed.proj.stride != embed.patch_size:
        return
    own = tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", ()))[1:]
    size, patch = shape_of(settings, model).size, embed.patch_size
    if size == own and "patch_size" not in settings.model_kwargs():
        return
    if any(side % part for side, part in zip(size, patch, strict=True)):
        near = "x".join(str(max(1, round(side / part)) * part) for side, part in zip(size, patch, strict=True))
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels cannot be cut into patches of {patch[0]}x{patch[1]}: "
            f"{size[0] % patch[0]} rows and {size[1] % patch[1]} columns would be in none; expected --img-size {near} "
            "or another multiple"
        )


def shape_of(settings: Settings, model: nn.Module) -> Shape:
    """What images the model takes: the settings' word, or the model's own."""
    return _shape(settings, getattr(model, "pretrained_cfg", None) or {})


def expected_shape(settings: Settings) -> Shape:
    """`shape_of` the model that the settings name, without building it.

    Raises:
        ValueError: timm does not know it.
    """
    from timm.models import get_pretrained_cfg

    _check_name(settings)
    try:
        config = get_pretrained_cfg(settings.model)
    except RuntimeError as error:  # what stands behind the dot is no weights of it
        raise ValueError(f"--model {settings.model}: {error}") from None
    return _shape(settings, {} if config is None else config.to_dict())


def _shape(settings: Settings, config: Mapping[str, Any]) -> Shape:
    size = settings.size() or tuple(config.get("input_size", (3, 224, 224)))[1:]

    def numbers(own: tuple[float, ...], key: str, default: float) -> tuple[float, ...]:
        found = own or tuple(config.get(key) or ()) or (default,) * 3
        return found if len(found) == settings.in_chans else (sum(found) / len(found),) * settings.in_chans

    height, width = size
    crop_pct = settings.crop_pct or config.get("crop_pct") or 0.875
    return Shape((height, width), numbers(settings.mean, "mean", 0.5), numbers(settings.std, "std", 0.5), crop_pct)


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay by --weight-decay; tables of iRPE by --rpe-weight-decay, which is 0; all else does not.

    The tables are groups of their own, with --rpe-lr-scale; with --layer-decay one for each of timm's groups of layers.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    own: Any = model
    spared = set(own.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    tables: set[nn.Parameter] = set()
    if settings.rpe != "none":
        tables = set(rpe_parameters(model)["params"])
    if settings.layer_decay:
        groups = param_groups_layer_decay(
            model, settings.weight_decay, no_weight_decay_list=spared, layer_decay=settings.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
    found = []
    for group in groups:
        mine = [weight for weight in group["params"] if weight in tables]
        others = [weight for weight in group["params"] if weight not in tables]
        if others:
            found.append({**group, "params": others})
        if mine:
            scale = group.get("lr_scale", 1.0) * settings.rpe_lr_scale
            found.append({**group, "params": mine, "weight_decay": settings.rpe_weight_decay, "lr_scale": scale})
    return [{name: value for name, value in group.items() if name != "param_names"} for group in found]


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's optimizer over `parameter_groups`."""
    from timm.optim import create_optimizer_v2, list_optimizers

    try:
        return create_optimizer_v2(
            parameter_groups(model, settings), opt=settings.opt, lr=settings.peak_lr(), weight_decay=0
        )
    except (ValueError, AssertionError) as error:
        known = [str(name) for name in list_optimizers()]
        near = difflib.get_close_matches(settings.opt, known, 4)
        similar = "" if settings.opt in known else f"; similar: {', '.join(near) or ', '.join(known)}"
        raise ValueError(f"--opt {settings.opt}: {error}{similar}") from None


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, steps_per_epoch: int) -> Any:
    """timm's schedule, which moves with every step."""
    from timm.scheduler import create_scheduler_v2

    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=settings.sched, num_epochs=settings.epochs, min_lr=settings.min_lr,
            warmup_lr=settings.warmup_lr, warmup_epochs=settings.warmup_epochs, step_on_epochs=False,  # type: ignore[arg-type]
            updates_per_epoch=steps_per_epoch,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        expected = "" if settings.sched in SCHEDULES else f"; expected one of {', '.join(SCHEDULES)}"
        raise ValueError(f"--sched {settings.sched}: {error}{expected}") from None
    return scheduler


def make_loss(settings: Settings) -> nn.Module:
    """timm's loss: of mixed targets, of smoothed ones, or plain cross entropy."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if settings.mixup or settings.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()


def make_mixup(settings: Settings, num_classes: int, local_batch: int) -> Any:
    """timm's Mixup, or None where both mixup and cutmix are off."""
    from timm.data import Mixup

    if not (settings.mixup or settings.cutmix):
        return None
    if local_batch % 2:
        raise ValueError(
            f"mixup and cutmix mix pairs, but a process has {local_batch} images at a time; use an even number"
        )
    return Mixup(
        mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch, label_smoothing=settings.smoothing, num_classes=num_classes,
    )  # fmt: skip
