"""What saving has in common: names of files, weights, preprocessing, and the check that a model can be built again."""

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runs.folder import SAVED

NOTE = "irpe.json"  # beside config.json: which library, and how pictures are prepared
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# files of a model, of which none may stay when another one is saved over it
MODEL = re.compile(
    rf"{SAVED.pattern}|{re.escape(NOTE)}|video_preprocessor_config\.json"
    r"|pytorch_model(?:-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)


def check_same(model: nn.Module, again: nn.Module) -> None:
    """Refuses a model that is not what its configuration builds."""
    own, other = ({name: tensor.shape for name, tensor in part.state_dict().items()} for part in (model, again))
    if own != other:
        strange = sorted({name for name, _ in set(own.items()) ^ set(other.items())})
        raise ValueError(
            f"the model was changed after it was built: its own library would build it with other {strange[0]}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; save such a model by its state_dict()"
        )


def fill(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a folder, all of them, as plain data; a model in half precision stays one."""
    from ..runs.files import reason_of
    from ..runs.tensors import read_safetensors, read_torch

    file = next((path for path in (folder / WEIGHTS, folder / "pytorch_model.bin") if path.exists()), folder / WEIGHTS)
    try:
        state = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {reason_of(error)}") from None
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not fit the model: {' '.join(str(error).split())[:300]}") from None
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(kinds) == 1 and kinds <= {torch.float16, torch.bfloat16, torch.float64}:
        model.to(kinds.pop())


def preprocessing_of(processor: Any) -> Any:
    """A `Preprocessing`, as it is or from what torchvision's weights have as `transforms()`.

    Raises:
        TypeError: it is none of them.
        ValueError: its numbers are none.
    """
    from ..prediction import Preprocessing

    if processor is None:
        return None
    if isinstance(processor, Preprocessing):
        return Preprocessing.from_dict(asdict(processor), "processor")
    if not hasattr(processor, "crop_size"):
        raise TypeError(
            f"processor is a {type(processor).__name__}; expected an irpe.prediction.Preprocessing, or the "
            "transforms() of torchvision's weights"
        )
    crop, resize = processor.crop_size[0], processor.resize_size[0]
    mean, std = tuple(processor.mean), tuple(processor.std)
    return Preprocessing((crop, crop), mean, std, share_of(crop, resize), processor.interpolation.value)


def share_of(crop: int, resize: int) -> float:
    """crop / resize, so that floor(crop / share) is `resize` again."""
    share = crop / resize
    return math.nextafter(share, 0) if math.floor(crop / share) < resize else share


def check_classes(names: list[str], count: int) -> None:
    """Refuses names that are not one for each output.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(names) != count:
        raise ValueError(f"classes has {len(names)} names, but the model has {count} outputs; expected one for each")


def with_classifier(model: Any, names: Any, preprocessing: Any, count: int) -> Any:
    """The model in evaluation mode, with `predict` where it has classes."""
    from ..prediction import Classifier

    model.eval()
    if not count:
        return model
    if not isinstance(names, list) or len(names) != count:
        names = [str(number) for number in range(count)]
    model.predict = Classifier(model, [str(name) for name in names], preprocessing=preprocessing)
    return model
