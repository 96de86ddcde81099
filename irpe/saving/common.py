"""What saving has in common: names of files, weights, preprocessing, and the check that a model can be built again."""

from pathlib import Path
from typing import Any

from torch import nn

NOTE = "irpe.json"  # beside config.json: which library, and how pictures are prepared
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def check_same(model: nn.Module, again: nn.Module, file: Path) -> None:
    """Refuses a model that is not what its configuration builds, and takes the configuration away again."""
    own, other = ({name: one.shape for name, one in part.state_dict().items()} for part in (model, again))
    if own != other:
        file.unlink()
        strange = sorted({name for name, _ in set(own.items()) ^ set(other.items())})
        raise ValueError(
            f"the model was changed after it was built: its own library would build it with other {strange[0]}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; save such a model by its state_dict()"
        )


def fill(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a folder, all of them, as plain data."""
    from ..runs.files import reason_of
    from ..runs.tensors import read_safetensors, read_torch

    file = next((one for one in (folder / WEIGHTS, folder / "pytorch_model.bin") if one.exists()), folder / WEIGHTS)
    try:
        state = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {reason_of(error)}") from None
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not fit the model: {' '.join(str(error).split())[:300]}") from None


def preprocessing_of(processor: Any) -> Any:
    """A `Preprocessing`, as it is or from what torchvision's weights have as `transforms()`."""
    from ..prediction import Preprocessing

    if processor is None or isinstance(processor, Preprocessing):
        return processor
    if not hasattr(processor, "crop_size"):
        raise TypeError(
            f"processor is a {type(processor).__name__}; expected an irpe.prediction.Preprocessing, or the "
            "transforms() of torchvision's weights"
        )
    crop, resize = processor.crop_size[0], processor.resize_size[0]
    mean, std = tuple(processor.mean), tuple(processor.std)
    return Preprocessing((crop, crop), mean, std, crop / resize, processor.interpolation.value)


def with_classifier(model: Any, names: Any, preprocessing: Any, count: int) -> Any:
    """The model in evaluation mode, with `predict`."""
    from ..prediction import Classifier

    if not isinstance(names, list) or len(names) != count:
        names = [str(number) for number in range(count)]
    model.eval().predict = Classifier(model, [str(one) for one in names], preprocessing=preprocessing)
    return model
