"""What a set of pictures holds: sizes, formats, files that cannot be read, and pictures that are there twice."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files import reason_of
from .picture import orientation
from .workers import Careful, Loader, Reading

FEW = 10  # pictures of a class, under which it is named
_BATCH = 16  # pictures between two steps of a bar


class Look(NamedTuple):
    """One picture, looked at; of one that cannot be read `reason` says why. `label` is -1 where nobody tells it."""

    number: int
    label: int = -1
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    turned: bool = False  # by its EXIF
    digest: bytes = b""
    reason: str = ""


def look_at(number: int, label: int, stored: Image.Image, picture: Image.Image) -> Look:
    """What there is to say about a picture as it is stored, and as it is read; the digest is that of its pixels."""
    pixels = hashlib.blake2b(f"{picture.mode} {picture.size}".encode(), digest_size=16)
    pixels.update(picture.tobytes())
    kind, turned = stored.format or "", orientation(stored) != 1
    return Look(number, label, *picture.size, kind, stored.mode, turned, pixels.digest())


class Looks(Careful[Look]):
    """A source, of which picture `number` is looked at by look(source, number)."""

    def __init__(self, source: Any, look: Callable[[Any, int], Look], name: Callable[[Any, int], str]) -> None:
        self.source, self.look, self.name = source, look, name

    def name_of(self, key: int) -> str:
        return self.name(self.source, key)

    def __getitem__(self, number: int) -> Look:
        try:
            return self.look(self.source, number)
        except Exception as error:  # what broken files raise has no end
            return Look(number, reason=reason_of(error))


def looked(looks: Looks, reading: Reading, advance: Callable[[int], None], **options: Any) -> list[Look]:
    """Looks at every picture once, in their order; `advance` is told how many more are done.

    Args:
        options: of torch's DataLoader.
    """
    count = len(looks.source)
    batches = [range(count)[k : k + _BATCH] for k in range(0, count, _BATCH)]
    found: list[Look] = []
    for batch in Loader(looks, list, reading, batch_sampler=batches, **options):
        found += batch
        advance(len(batch))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the middle and the largest of some numbers."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def of_part(looks: Sequence[Look], name: Callable[[int], str]) -> dict[str, Any]:
    """The facts about the pictures of a part, in plain values; sizes and kinds of those that can be read."""
    good = [look for look in looks if not look.reason]
    widths, heights = [look.width for look in good], [look.height for look in good]
    return {
        "unreadable": [{"name": name(look.number), "reason": look.reason} for look in looks if look.reason],
        "width": spread(widths) if good else None, "height": spread(heights) if good else None,
        "of_known_size": len(good), "not_square": sum(look.width != look.height for look in good),
        "turned_by_exif": sum(look.turned for look in good),
        "formats": dict(Counter(look.format for look in good if look.format).most_common()),
        "modes": dict(Counter(look.mode for look in good).most_common()),
        "copies": len(good) - len({look.digest for look in good}),
    }  # fmt: skip


def shared(train: Sequence[Look], val: Sequence[Look]) -> list[tuple[Look, Look]]:
    """(picture of train, picture of val) of the same pixels, for each of val that train has too."""
    first = {look.digest: look for look in reversed(train) if not look.reason}
    return [(first[look.digest], look) for look in val if not look.reason and look.digest in first]


def contradictions(looks: Sequence[Look]) -> list[tuple[Look, Look]]:
    """(the first, another one) of the same pixels and of different classes."""
    first: dict[bytes, Look] = {}
    pairs = ((first.setdefault(look.digest, look), look) for look in looks if not look.reason)
    return [(look, other) for look, other in pairs if look.label != other.label]


def scarce(counts: Sequence[int]) -> float:
    """The number of pictures under which a class has few: 10, or a tenth of the median class."""
    return max(FEW, statistics.median(counts) / 10)


def unnormalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """image (C, h, w) * std + mean, cut to 0 .. 1: (h, w, 3), or (h, w) of one channel."""
    shift, scale = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    found: np.ndarray = (image * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
    return found[..., 0] if found.shape[2] == 1 else found
