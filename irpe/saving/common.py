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
    """Loads the weights of a folder, all of them."""
    from ..train.pretrained import read_weights

    file = next((one for one in (folder / WEIGHTS, folder / "pytorch_model.bin") if one.exists()), folder / WEIGHTS)
    try:
        model.load_state_dict(read_weights(file), strict=True)
    except RuntimeError as error:
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


def with_classifier(model: Any, names: Any, preprocessing: Any, count: int, kind: Any) -> Any:
    """The model in evaluation mode, with `predict`."""
    if not isinstance(names, list) or len(names) != count:
        names = [str(number) for number in range(count)]
    prepare = None if preprocessing is None else preprocessing.transform()
    channels = 3 if preprocessing is None else len(preprocessing.mean)
    names = [str(one) for one in names]
    model.eval().predict = kind(model, names, prepare, preprocessing=preprocessing, channels=channels)
    return model
