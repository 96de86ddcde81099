"""From pictures to padded batches: which picture when, at which size, on which process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_transforms import get_size_with_aspect_ratio

from ..runs.seeds import mixed
from ..runs.workers import Careful, Loader, Reading
from .data import Coco
from .settings import Settings


class Batch(NamedTuple):
    """Images (B, 3, h, w), padded at the right and at the bottom; mask (B, h, w), 1 where there is a picture.

    labels are what transformers' loss takes: for each picture class_labels (n,) and boxes (n, 4) as centre, width and
    height, relative to its own size. (In a batch transformers' own image processor has them relative to the padded
    size, which its `post_process_object_detection` does not undo.)
    """

    images: Tensor
    mask: Tensor
    labels: list[dict[str, Tensor]]
    numbers: list[int]


# of pieces, in pixels: shorter side of the picture that they are cut from, and their own smallest and largest sides
CROP_FROM, CROP_SIDES = (400, 500, 600), (384, 600)
_LARGEST = 4_000_000  # pixels of a picture that is resized as a whole before a piece is cut out
_LEAST = 32  # pixels along the sides of a batch, as backbones have them for one of their tokens


def resized(image: Image.Image, short: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) with `short` pixels along the shorter side, at most `longest` along the other, at least 1."""
    height, width = get_size_with_aspect_ratio((image.height, image.width), short, longest)
    return max(1, height), max(1, width)


@dataclass(frozen=True)
class Transform:
    """A picture as the model takes it: perhaps a piece of it, resized, perhaps flipped, normalised."""

    sizes: tuple[int, ...]  # shorter sides to draw from; (0,) leaves pictures as they are
    longest: int
    hflip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 0.0

    def __call__(self, image: Image.Image, boxes: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(image (3, h, w), boxes (m, 4), which (m,)) of an image and n boxes as x, y, x, y in pixels.

        The boxes are centre and size relative to the new image, of those m <= n of which something is in it.
        """
        which = torch.arange(len(boxes))
        if self.crop and draw.random() < self.crop:
            image, boxes, which = piece(image, boxes, draw)
        boxes = boxes / torch.tensor([image.width, image.height] * 2)
        short = self.sizes[int(draw.integers(len(self.sizes)))]
        if short:
            height, width = resized(image, short, self.longest)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if draw.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        return pixels, torch.cat([centre, size], 1), which


def piece(image: Image.Image, boxes: Tensor, draw: np.random.Generator) -> tuple[Image.Image, Tensor, Tensor]:
    """A random piece of the image, as DETR is trained with: (piece, boxes (m, 4) in its pixels, which (m,) they are).

    The image is resized to a shorter side of 400, 500 or 600 pixels; height and width of the piece are between 384 and
    600. Boxes are cut at its edges, and left out where nothing remains. (Carion et al., ECCV 2020, section 4; the
    numbers are those of DETR's published code.)
    """
    short = CROP_FROM[int(draw.integers(len(CROP_FROM)))]
    height, width = resized(image, short)
    boxes = boxes * torch.tensor([width / image.width, height / image.height] * 2)
    least, most = CROP_SIDES
    h, w = (int(draw.integers(least, min(side, most) + 1)) for side in (height, width))
    top, left = int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1))
    if height * width > _LARGEST:  # of a strip the piece alone is resized
        x, y = image.width / width, image.height / height
        image = image.resize((w, h), Image.Resampling.BILINEAR, box=(left * x, top * y, (left + w) * x, (top + h) * y))
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + w, top + h))
    boxes = (boxes - torch.tensor([left, top] * 2)).clamp(min=torch.zeros(4), max=torch.tensor([w, h] * 2))
    which = torch.nonzero((boxes[:, 2:] > boxes[:, :2]).all(1))[:, 0]
    return image, boxes[which], which


def transform_of(settings: Settings, processor: Any, *, training: bool) -> Transform:
    """The transform of a run, with mean and deviation of the model's own image processor."""
    sizes = settings.train_size if training and settings.train_size else (settings.size,)
    hflip, crop = (settings.hflip, settings.crop) if training else (0.0, 0.0)
    return Transform(sizes, settings.max_size, hflip, tuple(processor.image_mean), tuple(processor.image_std), crop)


class Samples(Careful[tuple[Tensor, dict[str, Tensor], int]]):
    """Pictures after their transform; a key is (number, what its random numbers follow from)."""

    def __init__(self, data: Coco, transform: Transform) -> None:
        self.data, self.transform = data, transform

    def name_of(self, key: tuple[int, int]) -> str:
        return self.data.pictures[key[0]].name

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor], int]:
        number, seed = key
        picture = self.data.pictures[number]
        learned = picture.crowd == 0
        draw = np.random.default_rng(seed)
        image, boxes, which = self.transform(self.data.image(number), picture.boxes[learned], draw)
        return image, {"class_labels": picture.labels[learned][which], "boxes": boxes}, number


def collate(samples: Sequence[tuple[Tensor, dict[str, Tensor], int]]) -> Batch:
    """Pads to the largest height and the largest width, and to 32 pixels."""
    height, width = (max(_LEAST, *(image.shape[side] for image, _, _ in samples)) for side in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    mask = torch.zeros(len(samples), height, width, dtype=torch.long)
    for row, (image, _, _) in enumerate(samples):
        images[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = 1
    return Batch(images, mask, [labels for _, labels, _ in samples], [number for _, _, number in samples])


def train_batches(
    data: Coco, transform: Transform, settings: Settings, rank: int, size: int, *, epoch: int, first: int
) -> Iterator[Batch]:
    """What one process takes of the steps of an epoch, from step `first` on: `accumulate` batches for each of them.

    The order of an epoch and all that is drawn for a picture follow from (seed, epoch, place) alone, and the pictures
    of a step are the same for any number of processes and of accumulated batches.
    """
    order = np.random.default_rng(mixed(settings.seed, "order", epoch)).permutation(len(data)).tolist()
    whole, stride = settings.batch_size, size * settings.accumulate
    keys = [
        [(order[place], mixed(settings.seed, "picture", epoch, place)) for place in range(start, at + whole, stride)]
        for at in range(first * whole, len(order) // whole * whole, whole)
        for start in range(at + rank, at + stride, size)
    ]
    reading = Reading(settings.loader_workers, settings.loader_timeout)
    return iter(Loader(Samples(data, transform), collate, reading, batch_sampler=keys))


def eval_batches(data: Coco, transform: Transform, settings: Settings, rank: int, size: int) -> Iterator[Batch]:
    """What one process takes of the pictures to evaluate on; each of them is in one batch of one process."""
    mine, step = [(number, 0) for number in range(rank, len(data), size)], settings.eval_batch_size
    keys = [mine[at : at + step] for at in range(0, len(mine), step)]
    reading = Reading(settings.loader_workers, settings.loader_timeout)
    return iter(Loader(Samples(data, transform), collate, reading, batch_sampler=keys))


def found_on(
    model: Any, batch: Batch, sizes: Sequence[tuple[int, int]], processor: Any, *, threshold: float
) -> tuple[list[dict[str, Tensor]], int]:
    """(scores (n,), labels (n,) and boxes (n, 4) of each picture, on the CPU; on how many outputs are not numbers).

    Args:
        sizes: (height, width) of the pictures, in whose pixels the boxes are.
        threshold: least score.
    """
    weight = next(model.parameters(), batch.images)
    output = model(batch.images.to(weight.device, weight.dtype), pixel_mask=batch.mask.to(weight.device))
    output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
    numbers = (output.logits.isfinite().all(2) & output.pred_boxes.isfinite().all(2)).all(1)  # (B,)
    found = processor.post_process_object_detection(output, threshold=threshold, target_sizes=torch.tensor(sizes))
    return [{name: value.cpu() for name, value in boxes.items()} for boxes in found], int((~numbers).sum())
