"""Weights to start from: found, read as plain data alone, and fitted to a model of timm, or refused with a sentence."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..runs.files import read_json, reason_of
from ..runs.folder import SETTINGS
from ..runs.tensors import ObjectsError, read_safetensors, read_torch

# of a run: at its end, of the highest top-1, and their moving average at the end
WEIGHTS, BEST, AVERAGE = "model.safetensors", "best.safetensors", "ema.safetensors"
_SHARED = "rel_pos_bias.relative_position_bias_table"  # of BEiT's pretraining: one table for all blocks
_TABLE = ".relative_position_bias_table"


def find_weights(path: Path) -> Path:
    """The file of weights: the path itself, or that of a run's folder, its best before its last."""
    if path.is_dir():
        for name in (BEST, WEIGHTS):
            if (path / name).exists():
                return path / name
        raise ValueError(f"{path} has no {WEIGHTS}: the run has not ended, or it is not the folder of a run")
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a file of weights, the folder of a run, or hub")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or from torch's format, of which nothing but plain data is loaded.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except ObjectsError:
        raise ValueError(
            f"{path} holds Python objects besides weights, which are not loaded; save model.state_dict() alone"
        ) from None
    except (ValueError, OSError) as error:
        damaged = f": {reason_of(error)}" if "damaged:" in str(error) or isinstance(error, OSError) else ""
        raise ValueError(
            f"{path} is no file of weights{damaged}; expected safetensors, or what torch.save made of a state dict"
        ) from None
    for name in ("state_dict", "model"):  # of a checkpoint
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict; expected names and tensors, as model.state_dict() gives them")
    from timm.models import clean_state_dict

    return clean_state_dict({str(name): value for name, value in found.items()})


def size_of_run(weights: Path) -> tuple[int, int] | None:
    """(height, width) of the images of the run whose folder the file lies in, or None if it lies in no such folder."""
    record = weights.parent / SETTINGS
    if not record.exists():
        return None
    try:
        height, width = read_json(record)["shape"]["size"]
    except (ValueError, KeyError, TypeError):  # somebody else's file of that name
        return None
    sides = (height, width)
    return sides if all(isinstance(side, int) and 0 < side < 100_000 for side in sides) else None


def load_weights(
    model: nn.Module, path: Path, say: Callable[[str], None], *, strict: bool = False, same_size: bool = False
) -> None:
    """Loads all of the file, but for a head of other classes and the tables of iRPE, which may be absent if not strict.

    Args:
        same_size: whether the model has the size that the weights were trained with, as those of a run.

    Raises:
        ValueError: any other weight is missing, left over or of another shape; nothing has been loaded then.
    """
    raw, own = read_weights(path), model.state_dict()
    head = tuple(f"{name}." for name in _head_names(model))
    tables = {name for name in own if "lookup_table" in name}
    _check_positions(raw, model, path)
    raw, shared = _own_biases(raw, own)
    # timm takes a table for that of a square window wherever it may be one
    kept = {
        name: weight for name, weight in raw.items() if same_size and name.endswith(_TABLE) and _same(own, name, weight)
    }
    try:
        state = _adapted({name: weight for name, weight in raw.items() if name not in kept}, model) | kept
    except Exception as error:  # timm's filters take for granted that the weights are of the model's family
        differences = _problems(raw, own, ()) or [reason_of(error)]
        if "old_window_size" in str(error):
            differences = ["its tables of relative positions are of a window that is not square, nor that of the model"]
        raise ValueError(f"{path} does not fit the model: {_some(differences)}") from None
    other_head = [name for name, weight in state.items() if name.startswith(head) and not _same(own, name, weight)]
    dropped = [] if strict else other_head
    state = {name: weight for name, weight in state.items() if name not in dropped}
    missing = [name for name in own if name not in state]
    problems = _problems(state, own, () if strict else (*tables, *(name for name in own if name.startswith(head))))
    if problems:
        more = ""
        if all("lookup_table" in words.split()[0] for words in problems):
            more = "; irpe.convert_tables makes the tables of one encoding into those of another"
        raise ValueError(f"{path} does not fit the model: {_some(problems)}{more}")
    model.load_state_dict(state, strict=False)
    if shared:
        say(f"{path.name} has one table of relative positions for all blocks; each block got a copy of it")
    if dropped or (not strict and any(name.startswith(head) for name in missing)):
        say(f"{path.name} has a head for other classes; a new one was made")
    if absent := [name for name in missing if name in tables]:
        say(f"{path.name} has no tables of iRPE for {len(absent)} encodings; they start at zero")


def _adapted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """By timm's function beside the model's class, which resamples positions and patch kernels to the model's size."""
    beside = (getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None) for cls in type(model).__mro__)
    adapt = next(filter(None, beside), None)
    return state if adapt is None else dict(adapt(state, model))


def _same(own: dict[str, Tensor], name: str, weight: Any) -> bool:
    return name in own and isinstance(weight, Tensor) and own[name].shape == weight.shape


def _problems(state: dict[str, Any], own: dict[str, Tensor], optional: tuple[str, ...]) -> list[str]:
    """In what weights differ from those of the model."""
    found = [f"{name} is missing" for name in own if name not in state and name not in optional]
    found += [f"{name} is left over" for name in state if name not in own]
    found += [
        f"{name} is {tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__} in the file, "
        f"{tuple(own[name].shape)} in the model"
        for name, weight in state.items()
        if name in own and not _same(own, name, weight)
    ]
    return found


def _some(problems: list[str]) -> str:
    return "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")


def _own_biases(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """(weights with a copy of BEiT's shared table for each block, whether there was one to copy)."""
    wanted = [name for name in own if name.startswith("blocks.") and name.endswith(_TABLE)]
    if _SHARED not in state or _SHARED in own or not wanted:
        return state, False
    rest = {name: weight for name, weight in state.items() if not name.startswith("rel_pos_bias.")}
    return rest | {name: state[_SHARED] for name in wanted if name not in rest}, True


def _check_positions(state: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """timm resamples positions as if they had been a square."""
    there, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if not isinstance(there, Tensor) or own is None or there.shape == own.shape or there.ndim != 3:
        return
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
    if math.isqrt(tokens := there.shape[1] - prefix) ** 2 != tokens:
        raise ValueError(
            f"{path} has positions for {tokens} tokens, which are no square; use the size that it was "
            "trained with, or the folder of the run, which tells height and width"
        )


def _head_names(model: nn.Module) -> list[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)
