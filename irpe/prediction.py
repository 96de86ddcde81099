"""What a model says of pictures: `model.predict` of models that `irpe.load` gives."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Picture = Any  # a path, or an image of Pillow
_OF_PIXELS = ("do_rescale", "rescale_factor", "do_normalize")  # of an image processor
_UNKNOWN = (
    "it is not known how pictures are prepared for this model: save it with irpe.save(model, folder, processor=...)"
)


class Guess(NamedTuple):
    """A class, and its share of the softmax."""

    label: str
    score: float


class Found(NamedTuple):
    """A box (x, y, x, y in pixels of the picture as it is displayed), its class (also as a number) and its score."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    number: int


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become the images that a classifier was evaluated on.

    The picture is resized so that it covers `size` / `crop_pct`, and the middle of `size` is cut out: of 224 pixels and
    crop_pct 0.875 the shorter side becomes 256. Then (pixels in [0, 1] - mean) / std, channel by channel. With the
    crop_mode "squash" height and width are resized each by its own factor; with "border" the longer side fits, and the
    mean fills what is left. All as timm evaluates.
    """

    size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    @classmethod
    def from_dict(cls, values: Any, where: object) -> "Preprocessing":
        """What `asdict` wrote, checked.

        Raises:
            ValueError: it is something else; `where` says of which file.
        """
        try:
            size, mean, std = (tuple(values[name]) for name in ("size", "mean", "std"))
            crop_pct, interpolation = float(values["crop_pct"]), str(values["interpolation"])
            numbers = all(isinstance(number, (int, float)) for number in (*mean, *std)) and len(mean) == len(std) in (
                1,
                3,
            )
            sides = len(size) == 2 and all(isinstance(side, int) and 0 < side < 100_000 for side in size)
            known = interpolation in ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box")
            crop_mode = values.get("crop_mode", "center")  # files of before have none
            known = known and crop_mode in ("center", "squash", "border")
            if not (numbers and sides and known and 0 < crop_pct <= 10 and all(std)):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{where}: {values!r} is no preprocessing; expected size (height, width), mean and std of 1 or 3 "
                "channels, crop_pct, interpolation and crop_mode"
            ) from None
        return cls((size[0], size[1]), mean, std, crop_pct, interpolation, crop_mode)

    def transform(self) -> Callable[[Any], Tensor]:
        """That of `irpe evaluate`: picture -> image (channels, height, width)."""
        from .train.loader import Shape, Transform

        return Transform(
            Shape(self.size, self.mean, self.std, self.crop_pct), self.interpolation, crop_mode=self.crop_mode
        )


class Classifier:
    """predict(picture) -> the likeliest classes, best first; of several pictures a list for each.

    >>> irpe.load("runs/NAME").predict("cat.jpg")
    [Guess(label='cat', score=0.93), Guess(label='dog', score=0.02), ...]

    Args:
        model: maps images (B, channels, height, width) to logits, or to what has `.logits`.
        classes: names in the order of the logits.
        preprocessing: how pictures become images, or
        processor: an image processor of transformers, which knows it.
        batch: the number of images of each call, where the model takes no other (an exported one).
    """

    def __init__(
        self, model: nn.Module, classes: Sequence[str], *, preprocessing: Preprocessing | None = None,
        processor: Any = None, batch: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.classes, self.batch = model, list(classes), batch
        self.preprocessing, self.processor = preprocessing, processor
        self.channels = 3 if preprocessing is None else len(preprocessing.mean)
        self._transform: Callable[[Any], Tensor] | None = None

    def check(self) -> None:
        """Refuses a model of which nobody has said how pictures are prepared.

        Raises:
            ValueError: that, with what to do.
        """
        if self.processor is None and self.preprocessing is None:
            raise ValueError(f"{_UNKNOWN}, or load the folder of its run")

    @property
    def normalised_by(self) -> tuple[Sequence[float], Sequence[float]]:
        """(mean, deviation) of each channel: an image is (pixels in [0, 1] - mean) / deviation."""
        if self.preprocessing is not None:
            return self.preprocessing.mean, self.preprocessing.std
        if not getattr(self.processor, "do_normalize", False):
            return (0.0,) * 3, (1.0,) * 3
        return self.processor.image_mean, self.processor.image_std

    def prepare(self, image: Any) -> Tensor:
        """The image (channels, height, width) of a picture in RGB or L."""
        self.check()
        if self.processor is not None:
            pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
            return pixels
        assert self.preprocessing is not None
        self._transform = self._transform or self.preprocessing.transform()
        return self._transform(image)

    def __call__(self, pictures: Picture | Sequence[Picture], *, top: int = 5, batch_size: int = 32) -> Any:
        """Args:
            pictures: a path or an image of Pillow, or a list of them.
            top: how many classes of each.
            batch_size: images at a time.

        Raises:
            ValueError: a file is no picture, or outputs are not numbers.
        """
        return _of_each(pictures, batch_size, lambda batch: self.of(batch, top))

    @torch.inference_mode()
    def of(self, pictures: Sequence[Picture], top: int = 5) -> list[list[Guess]]:
        """The guesses for a batch of pictures."""
        if self.batch is not None and len(pictures) > self.batch:
            return [result for part in chunks(pictures, self.batch) for result in self.of(part, top)]
        from .runs.picture import mode_of

        mode = mode_of(self.channels)
        images = torch.stack([self.prepare(read(each, mode)) for each in pictures])  # (B, channels, height, width)
        if self.batch is not None:
            images = torch.cat([images, images.new_zeros(self.batch - len(images), *images.shape[1:])])
        first = next(self.model.parameters(), None)
        if first is not None:
            images = images.to(first.device, first.dtype)
        self.model.eval()
        output = self.model(images)
        logits = getattr(output, "logits", output)[: len(pictures)].float().cpu()  # (B, classes)
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise ValueError(f"the model has outputs {tuple(logits.shape)}; expected {len(self.classes)} classes")
        if not bool(logits.isfinite().all()):
            raise ValueError("the outputs are not numbers: the weights are damaged, or training went wrong")
        scores, order = logits.double().softmax(1).sort(dim=1, descending=True, stable=True)
        return [
            [Guess(self.classes[k], score) for k, score in zip(ids[:top], values[:top], strict=True)]
            for ids, values in zip(order.tolist(), scores.tolist(), strict=True)
        ]


class Detector:
    """predict(picture) -> what is found on it, best first; of several pictures a list for each.

    >>> irpe.load("runs/detect-NAME").predict("street.jpg")
    [Found(label='car', score=0.98, box=(12.1, 40.7, 95.3, 88.0), number=2), ...]

    Args:
        model: transformers' DETR.
        classes: names in the order of the outputs.
        processor: its image processor; sizes, mean and deviation are taken from it.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], processor: Any) -> None:
        self.model, self.classes, self.processor = model, list(classes), processor

    def check(self) -> None:
        """Refuses a model of which it is not known how pictures are prepared, or that wants them in another way.

        Raises:
            ValueError: that, with what to do.
        """
        if self.processor is None:
            raise ValueError(_UNKNOWN)
        said = self.processor
        size = dict(said.size or {}) if said.do_resize else None
        if size is not None and not (size.get("shortest_edge") and size.get("longest_edge")):
            raise ValueError(
                f"the image processor resizes pictures to {size}; expected shortest_edge and longest_edge, which keep "
                "their shape, or do_resize=False"
            )
        if not (said.do_rescale and said.do_normalize and math.isclose(said.rescale_factor, 1 / 255)):
            found = ", ".join(f"{name}={getattr(said, name)}" for name in _OF_PIXELS)
            raise ValueError(f"the image processor has {found}; expected pixels divided by 255 and normalised")

    def __call__(self, pictures: Picture | Sequence[Picture], *, threshold: float = 0.5, batch_size: int = 4) -> Any:
        """Args:
            pictures: a path or an image of Pillow, or a list of them.
            threshold: least score.
            batch_size: images at a time.

        Raises:
            ValueError: a file is no picture, or outputs are not numbers.
        """
        return _of_each(pictures, batch_size, lambda batch: self.of(batch, threshold))

    @torch.inference_mode()
    def of(self, pictures: Sequence[Picture], threshold: float = 0.5) -> list[list[Found]]:
        """What is found on a batch of pictures."""
        import numpy as np

        from .detect.batches import Transform, collate, found_on

        self.check()
        size = self.processor.size if self.processor.do_resize else {"shortest_edge": 0, "longest_edge": 0}
        short, longest = int(size["shortest_edge"]), int(size["longest_edge"])
        mean, std = tuple(self.processor.image_mean), tuple(self.processor.image_std)
        transform = Transform((short,), longest, 0.0, mean, std)
        images = [read(picture, "RGB", turned=True) for picture in pictures]
        none, draw = torch.zeros(0, 4), np.random.default_rng(0)
        batch = collate([(transform(image, none, draw)[0], {}, k) for k, image in enumerate(images)])
        sizes = [(image.height, image.width) for image in images]
        self.model.eval()
        found, strange = found_on(self.model, batch, sizes, self.processor, threshold=threshold)
        if strange:
            raise ValueError("the outputs are not numbers: the weights are damaged, or training went wrong")
        return [self._sorted(raw) for raw in found]

    def _sorted(self, raw: dict[str, Tensor]) -> list[Found]:
        values = zip(raw["scores"].tolist(), raw["labels"].tolist(), raw["boxes"].tolist(), strict=True)
        boxes = [Found(self.classes[label], score, tuple(box), label) for score, label, box in values]
        return sorted(boxes, key=lambda found: -found.score)


def _of_each(pictures: Any, size: int, of: Callable[[Sequence[Picture]], list[Any]]) -> Any:
    """What `of` says of one picture, or a list of that for several, in batches of at most `size`."""
    if not isinstance(pictures, (list, tuple)):
        return of([pictures])[0]
    return [found for batch in chunks(pictures, size) for found in of(batch)]


def read(picture: Picture, mode: str, *, turned: bool = False) -> Any:
    """The picture in RGB or L, turned as EXIF says where that is wanted (classifiers are trained on what is stored).

    Raises:
        ValueError: it is no picture, with its name.
    """
    from .runs.files import reason_of
    from .runs.picture import converted, displayed, open_picture

    try:
        image = open_picture(picture) if isinstance(picture, (str, Path)) else picture
        return converted(displayed(image) if turned else image, mode)
    except (OSError, SyntaxError, ValueError, MemoryError) as error:  # of an image that nobody has decoded yet
        raise ValueError(f"{picture}: {reason_of(error)}") from None


def chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The values in pieces of at most `size`."""
    for at in range(0, len(values), max(1, size)):
        yield values[at : at + max(1, size)]


def pictures_in(paths: Iterable[str | Path]) -> list[Path]:
    """The files of pictures that paths name, each once: files as they are, and all pictures in folders, in their order.

    Raises:
        ValueError: a path is not there, or a folder has no pictures.
    """
    from .runs.picture import natural, walk

    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist; expected pictures, or folders of them")
        inside = [str(path)]
        if path.is_dir():
            inside = [os.path.join(place.folder, name) for place in walk(path) for name in place.pictures]
            if not inside:
                raise ValueError(f"{path} has no pictures (.jpg, .png, .webp, ...)")
        found += map(Path, sorted(inside, key=natural))
    return list(dict.fromkeys(found))


__all__ = ["Classifier", "Detector", "Found", "Guess", "Preprocessing", "pictures_in", "read"]
