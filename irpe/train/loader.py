"""From a source to batches: which image when, with which random numbers, on which process.

What an augmentation draws depends on (seed, epoch, place in the epoch) alone, and what a step draws on (seed, step,
process, batch), whatever the number of loader workers.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..runs.picture import converted, mode_of
from ..runs.seeds import Share, mixed, seed_all
from ..runs.workers import BadImageError, Careful, Loader, Reading
from .data import Source
from .settings import Settings
from .shards import local_only

TRIES = 20  # pictures in a row that may be unreadable before a run gives up


class Batch(NamedTuple):
    """images (B, C, h, w) and targets (B,); `real` (B,) is False where an image stands in for none; `bad` are names."""

    images: Tensor
    targets: Tensor
    real: Tensor
    bad: list[str]


class Sample(NamedTuple):
    """One image after its transform; see Batch."""

    image: Tensor
    target: int
    real: bool
    bad: tuple[str, ...]


class Samples(Careful[Sample]):
    """A source and a transform; a key is (index, what its random numbers follow from); index -1 stands for none."""

    def __init__(self, source: Source, transform: Any, replace: bool | None) -> None:
        """replace: a bad image stops (None), is replaced by a following one (True), or stands for none (False)."""
        self.source, self.transform, self.replace = source, transform, replace

    def name_of(self, key: tuple[int, int]) -> str:
        return self.source.name(key[0]) if key[0] >= 0 else "none"

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, seed = key
        seed_all(seed)
        if index < 0:
            return self._none(())
        bad: list[str] = []
        for _ in range(TRIES):
            try:
                image, target = self.source[index]
            except Exception as error:  # what broken files raise has no end: OSError, SyntaxError, struct.error, ...
                bad.append(f"{self.source.name(index)}: {error or type(error).__name__}")
                if self.replace is None:
                    raise BadImageError(
                        f"unreadable image {bad[0]}; --bad-images skip goes on without it, --verify lists all"
                    ) from None
                if not self.replace:
                    return self._none(tuple(bad))
                index = (index + 1) % len(self.source)
                continue
            return Sample(self.transform(image), target, True, tuple(bad))
        raise BadImageError(f"{TRIES} unreadable images in a row, the first is {bad[0]}")

    def _none(self, bad: tuple[str, ...]) -> Sample:
        # every process does as many batches, so some hold images that are not counted
        mode = mode_of(getattr(self.transform, "channels", 3))
        return Sample(self.transform(Image.new(mode, (64, 64))), 0, False, bad)


class StreamSamples(IterableDataset[Sample]):
    """A stream and a transform."""

    def __init__(self, stream: Any, transform: Any) -> None:
        self.stream, self.transform = stream, transform

    def __iter__(self) -> Iterator[Sample]:
        seed_all(get_worker_info().seed)  # type: ignore[union-attr]
        mode = mode_of(getattr(self.transform, "channels", 3))
        for image, target in self.stream:
            try:
                picture = converted(image, mode)
            except Exception as error:  # as the readers of streams do with those that they cannot decode
                warnings.warn(f"unreadable image of a stream, left out: {error}", stacklevel=1)
                continue
            yield Sample(self.transform(picture), int(target), True, ())


class Transform:
    """timm's transform: picture -> image (channels, height, width).

    Args:
        shape: of the images.
        interpolation: of the resize; "random" is that of training, and bicubic in evaluation.
        training: the settings whose augmentations are applied; without them that of evaluation.
        crop_mode: how evaluation brings a picture into the shape: center, squash or border, as timm calls them.
    """

    def __init__(
        self, shape: "Shape", interpolation: str, training: Settings | None = None, crop_mode: str = "center"
    ) -> None:
        from timm.data import create_transform

        settings, self.channels = training, len(shape.mean)
        self.seen: tuple[int, ...] | None = None  # of the resized picture, around what evaluation looks at
        common: dict[str, Any] = dict(input_size=(self.channels, *shape.size), mean=shape.mean, std=shape.std)
        if settings is None:
            steady = evaluated(interpolation)
            self.apply = create_transform(**common, interpolation=steady, crop_pct=shape.crop_pct, crop_mode=crop_mode)
            if crop_mode == "center":
                self.seen = tuple(math.floor(side / shape.crop_pct) for side in shape.size)
            return
        common["interpolation"] = interpolation
        augment = None if settings.auto_augment == "none" else settings.auto_augment
        check_augment(augment)
        # crops are stretched by 3/4 to 4/3 when they become images, whatever the shape of those is
        form = shape.size[1] / shape.size[0]
        ratio = (form, form) if settings.crop_scale == 1 else (3 / 4 * form, 4 / 3 * form)
        try:
            self.apply = create_transform(
                **common, is_training=True, scale=(settings.crop_scale, 1.0), ratio=ratio, hflip=settings.hflip,
                vflip=settings.vflip, color_jitter=settings.color_jitter, auto_augment=augment, re_prob=settings.erase,
                re_mode="pixel",
            )  # fmt: skip
        except (AssertionError, ValueError) as error:
            raise ValueError(f"--auto-augment {augment}: {str(error) or 'timm does not know it'}") from None

    def __call__(self, image: Any) -> Tensor:
        return self.apply(image if self.seen is None else middle(image, *self.seen))


def evaluated(interpolation: str) -> str:
    """The interpolation of evaluation, where that of training may be drawn anew for each picture."""
    return "bicubic" if interpolation == "random" else interpolation


def middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a strip: what is left of it when it is resized to cover height x width and cut; others as they are.

    timm resizes all of a picture before it cuts, which of 20000 x 2 pixels takes gigabytes.
    """
    scale = min(image.height / height, image.width / width)
    sizes = ((image.width, width), (image.height, height))
    if image.width * image.height <= 16 * height * width * scale**2:
        return image
    # twice what is seen and some more, as the smoothing looks around; as many left out on either side
    cut = [max(0, (side - math.ceil(2 * seen * scale) - 16) // 2) for side, seen in sizes]
    return image.crop((cut[0], cut[1], image.width - cut[0], image.height - cut[1]))


def check_augment(words: str | None) -> None:
    """Refuses parts of --auto-augment that timm passes over without a word.

    Raises:
        ValueError: a part is neither a letter or word with a number, nor (in RandAugment) a known set of operations.
    """
    name, *parts = (words or "").split("-")
    sets = ("tweights", "t3a", "t3aw") if name == "rand" else ()
    if strange := [part for part in parts if not re.fullmatch(r"[a-z]+\d+(\.\d*)?", part) and part not in sets]:
        raise ValueError(
            f"--auto-augment {words}: {', '.join(map(repr, strange))}; expected parts such as m9 or mstd0.5, as in "
            "rand-m9-mstd0.5-inc1"
        )


@dataclass(frozen=True)
class Shape:
    """What a model takes: (height, width), normalisation for each channel, share of the image that evaluation sees."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor([sample.real for sample in samples]),
        [name for sample in samples for name in sample.bad],
    )


def epoch_order(count: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """(count,) indices: a permutation, or with repeats the first count / repeats of one, each that often in a row.

    Copies in a row go to different processes where there are several, as in DeiT's repeated augmentation.
    """
    generator = torch.Generator().manual_seed(mixed(seed, "order", epoch))
    return torch.randperm(count, generator=generator).repeat_interleave(repeats)[:count]


def train_loader(source: Any, transform: Any, settings: Settings, share: Share, *, epoch: int, first: int) -> Any:
    """Batches of an epoch for one process, from step `first` on; `accumulate` of them make a step."""
    if isinstance(source, IterableDataset):
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        seed = mixed(settings.seed, "stream", epoch)
        return _stream(source, transform, reading_of(settings), seed, share.local, drop_last=True)
    order = epoch_order(len(source), settings.repeats, settings.seed, epoch).tolist()
    batches = [
        [(order[place], mixed(settings.seed, "sample", epoch, place)) for place in places]
        for step in range(first, len(source) // share.batch_size)
        for places in share.places(step)
    ]
    samples = Samples(source, transform, True if settings.bad_images == "skip" else None)
    return _loader(samples, reading_of(settings), batch_sampler=batches)


def eval_loader(source: Any, transform: Any, settings: Settings, rank: int, size: int, batch_size: int) -> Any:
    """Batches for one process that hold every image of the source exactly once over all processes.

    Every process has as many batches; those at the end are filled with samples that are not real.
    """
    if isinstance(source, IterableDataset):  # which has no places to share out: the first process reads all of it
        return [] if rank else _stream(source, transform, reading_of(settings), 0, batch_size, drop_last=False)
    rounds = -(-len(source) // size)
    mine = [index if (index := k * size + rank) < len(source) else -1 for k in range(rounds)]
    batches = [[(index, index) for index in mine[k : k + batch_size]] for k in range(0, rounds, batch_size)]
    samples = Samples(source, transform, False if settings.bad_images == "skip" else None)
    return _loader(samples, reading_of(settings), batch_sampler=batches)


def _stream(stream: Any, transform: Any, reading: Reading, seed: int, batch_size: int, *, drop_last: bool) -> Any:
    # its shuffling keeps a state from epoch to epoch, where a process of its own in each epoch begins anew
    reading = Reading(max(1, reading.workers), reading.timeout)
    if hasattr(stream, "set_loader_cfg"):
        stream.set_loader_cfg(num_workers=reading.workers)
    generator = torch.Generator().manual_seed(seed)
    samples = StreamSamples(stream, transform)
    return _loader(samples, reading, batch_size=batch_size, drop_last=drop_last, generator=generator)


def _loader(samples: Any, reading: Reading, **options: Any) -> Loader:
    return Loader(samples, collate, reading, worker_init_fn=start_worker, **options)


def reading_of(settings: Settings) -> Reading:
    """How one training process reads images; by default with its part of the cores."""
    usual = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return Reading(usual if settings.loader_workers < 0 else settings.loader_workers, settings.loader_timeout)


def start_worker(worker: int) -> None:
    """Makes a loader process ready for its dataset: one thread, files of its own."""
    torch.set_num_threads(1)
    dataset = get_worker_info().dataset  # type: ignore[union-attr]
    if isinstance(dataset, StreamSamples):
        with suppress(ImportError):  # a process that was spawned has nothing of its parent's
            local_only()
    source = getattr(dataset, "source", None)
    while source is not None:
        if hasattr(source, "reopen"):
            source.reopen()
        source = getattr(source, "source", None)


def unreadable(source: Source, reading: Reading) -> list[str]:
    """Reads every image once; `name: reason` of each that cannot be."""
    samples = Samples(source, _nothing, False)
    batches = [
        list(zip(part, part, strict=True))
        for k in range(0, len(source), 64)
        if (part := range(len(source))[k : k + 64])
    ]
    return [name for batch in _loader(samples, reading, batch_sampler=batches) for name in batch.bad]


def _nothing(image: Any) -> Tensor:
    return torch.zeros(1)
