"""scikit-learn's 1,797 real handwritten digits (8x8, ten classes), split once and for all, also on wider canvases."""

from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

HEIGHT = 8  # pixels, of a digit and of every canvas
PATCH = 2  # pixels; digits are placed at whole patches, so that no side sees patches it was not trained on
WIDTHS = (8, 12, 16)  # pixels, of the canvases to test on; 8 is the size that all sides train at
NUM_TEST, NUM_VALID = 597, 300
_SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images (N, 1, 8, width) in [0, 1], their labels (N,), and their row numbers (N,) in scikit-learn's data set."""

    images: Tensor
    labels: Tensor
    rows: Tensor


@cache
def splits() -> dict[str, Digits]:
    """Four parts, stratified by class: "train" (1,200) and "test" (597); "fit" (900) and "valid" (300) make up train.

    Learning rates are chosen by training on "fit" and looking at "valid"; the reported numbers come from training on
    "train" and looking at "test". The data set does not say who wrote a digit, so writers occur on both sides.
    """
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8); 16 is the largest value
    labels = torch.from_numpy(data.target).long()

    def divide(rows: Tensor, second: int) -> tuple[Tensor, Tensor]:
        first, other = train_test_split(
            rows.numpy(), test_size=second, random_state=_SPLIT_SEED, stratify=labels[rows].numpy()
        )
        return torch.from_numpy(first), torch.from_numpy(other)

    train, test = divide(torch.arange(len(labels)), NUM_TEST)
    fit, valid = divide(train, NUM_VALID)
    parts = {"train": train, "test": test, "fit": fit, "valid": valid}
    return {name: Digits(images[rows], labels[rows], rows) for name, rows in parts.items()}


def on_canvas(digits: Digits, width: int) -> Digits:
    """Each digit on as many empty canvases 8 x width as there are even columns for it, one at each, in their order.

    >>> on_canvas(splits()["test"], 16).images.shape  # 5 places
    torch.Size([2985, 1, 8, 16])

    Args:
        width: of the canvas, in pixels: even, at least 8. At 8 the digits stay as they are.
    """
    if width < HEIGHT or width % PATCH:
        raise ValueError(f"width={width}; expected an even number of pixels, at least {HEIGHT}")
    columns = range(0, width - HEIGHT + 1, PATCH)
    images = digits.images.new_zeros(len(digits.images), len(columns), HEIGHT, width)
    for canvas, column in zip(images.unbind(1), columns, strict=True):
        canvas[..., column : column + HEIGHT] = digits.images[:, 0]
    each = len(columns)
    labels, rows = digits.labels.repeat_interleave(each), digits.rows.repeat_interleave(each)
    return Digits(images.view(-1, 1, HEIGHT, width), labels, rows)
