"""CIFAR-10 as four tensors, and batches of it made on its device."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as transforms

from irpe.train.pictures import pictures

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the 50,000, as everybody has them
PADDING = 4  # pixels that a crop may be moved
PARTS = ("train", "test")


def tensors(data: Path, cache: Path) -> dict[str, Tensor]:
    """{"train": uint8 (N, 3, 32, 32), "train labels": (N,), "test": ..., "test labels": ...}, in a fixed random order.

    Args:
        data: folders of class folders `train` and `test`, or the folder in which torchvision keeps its CIFAR10.
        cache: a file that keeps them, so that pictures are decoded once.

    Raises:
        ValueError: data is neither.
    """
    if not cache.exists():
        found = {}
        for part in PARTS:
            images, labels = _of_torchvision(data, part) if _is_torchvision(data) else _of_folder(data, part)
            # folders are sorted by class; the first pictures are to be as good as any
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            found |= {part: images[order], f"{part} labels": labels[order]}
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".unfinished")
        torch.save(found, unfinished)
        unfinished.replace(cache)
    return torch.load(cache, weights_only=True, mmap=True)


def _is_torchvision(data: Path) -> bool:
    return (data / CIFAR10.base_folder).is_dir()


def _of_torchvision(data: Path, part: str) -> tuple[Tensor, Tensor]:
    found = CIFAR10(data, train=part == "train")
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def _of_folder(data: Path, part: str) -> tuple[Tensor, Tensor]:
    if not (data / part).is_dir():
        raise ValueError(
            f"{data} has no {part}; expected train and test with a folder for each class, or {CIFAR10.base_folder}, "
            'which torchvision.datasets.CIFAR10("data", download=True) fetches into data'
        )
    source, _ = pictures(data / part, "RGB")
    images = np.stack([np.asarray(source[index][0]) for index in range(len(source))])  # (N, H, W, 3)
    if images.shape[1:] != (32, 32, 3):
        raise ValueError(f"pictures of {data / part} have {images.shape[2]}x{images.shape[1]} pixels; expected 32x32")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.labels())


def normalised(images: Tensor) -> Tensor:
    """uint8 as the models take it, float32."""
    return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Stretched to this size, as the models take it."""
    if images.shape[-2:] != (height, width):
        images = transforms.resize(images, [height, width], antialias=True)
    return normalised(images)


def augmented(images: Tensor, moves: Tensor) -> Tensor:
    """Each picture cropped out of its padded self at a place of its own, and mirrored or not.

    torchvision's RandomCrop would move all pictures of a batch alike.

    Args:
        images: uint8 (B, 3, H, W).
        moves: integers (B, 3): row and column of the crop in the padded picture, 1 for a mirrored one.
    """
    height, width = images.shape[-2:]
    padded = transforms.pad(images, [PADDING])
    rows = moves[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(moves[:, 2:] == 1, columns.flip(0), columns) + moves[:, 1:2]  # (B, W)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    crops = padded[each, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3): advanced indices come first
    return normalised(crops.permute(0, 3, 1, 2))


def epoch(pictures: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(an order (N,), the moves of each place in it (N, 3)), by the generator alone."""
    order = torch.randperm(pictures, generator=generator)
    crops = torch.randint(2 * PADDING + 1, (pictures, 2), generator=generator)
    return order, torch.cat([crops, torch.randint(2, (pictures, 1), generator=generator)], dim=1)
