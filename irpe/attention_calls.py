"""What attentions of an equipped model are asked for on an image: queries, keys, values, and where tokens are."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .integrations.blocks import EncodedAttention
from .integrations.on_map import AttentionOnMap

_WORKS = (
    "pictures of attention are drawn of timm's ViT, DeiT, BEiT, EVA and Swin, and of transformers' ViT, DeiT, BEiT, "
    "DINOv2, DINOv3, CLIP and SigLIP, that have encodings"
)


class Windows(NamedTuple):
    """A map of size (h, w) that is shifted, filled up at the right and below, and cut into windows, as in Swin."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    def places(self) -> Tensor:
        """(windows, L): where on the map the tokens of each window are, row * w + column; -1 beside it."""
        (h, w), (high, wide) = self.size, self.window
        index = torch.arange(h * w).view(h, w).roll((-self.shift[0], -self.shift[1]), (0, 1))
        index = F.pad(index, (0, -w % wide, 0, -h % high), value=-1)
        return index.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).reshape(-1, high * wide)


class Call(NamedTuple):
    """What an attention was asked to compute: q, k, v (W, H, L, D), q not scaled; W is 1, or the number of windows.

    size: (h, w) of the map that its tokens have, but for those in front; of a window its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    size: tuple[int, int]
    mask: Tensor | None
    scale: float
    windows: Windows | None = None


class Watched(NamedTuple):
    """A model as pictures of attention see it.

    run: computes the model on a batch; attentions: those that have encodings, by the number of their block, from 1;
    blocks: how many there are; has_class: whether the first token in front of the map is a class token; reads_class:
    whether that alone is read from the last block; record: a context in which calls are written down.
    """

    run: Callable[[Tensor], Any]
    attentions: dict[int, Any]
    blocks: int
    has_class: bool
    reads_class: bool
    record: Callable[[dict[int, Any]], AbstractContextManager[dict[int, Call]]]


def watched(model: nn.Module) -> Watched:
    """The part of a model whose attentions have encodings.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    for part in model.modules():
        blocks = getattr(part, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and any(
            isinstance(getattr(one, "attn", None), AttentionOnMap) for one in blocks
        ):
            every: list[Any] = [one.attn for one in blocks]
            found: dict[int, Any] = {n: one for n, one in enumerate(every, 1) if isinstance(one, AttentionOnMap)}
            has_class = getattr(part, "cls_token", None) is not None
            reads_class = getattr(part, "global_pool", None) == "token"
            return Watched(model, found, len(blocks), has_class, reads_class, _of_timm)
    in_windows = [one for one in model.modules() if hasattr(getattr(one, "attn", None), "window_size")]
    if any(isinstance(one.attn, EncodedAttention) for one in in_windows):
        found = {n: one for n, one in enumerate(in_windows, 1) if isinstance(one.attn, EncodedAttention)}
        return Watched(model, found, len(in_windows), False, False, _of_windows)
    if (of_transformers := _transformer(model)) is not None:
        return of_transformers
    name = getattr(model, "original", type(model)).__name__
    if not any(getattr(one, f"rpe_{letter}", None) is not None for one in model.modules() for letter in "qkv"):
        raise ValueError(f"{_WORKS}; this {name} has none: irpe.equip(model, ...) adds them, training fills them")
    raise ValueError(f"{_WORKS}; this is a {name}")


def _transformer(model: nn.Module) -> Watched | None:
    """A model of transformers whose tokens are a map; None for other models, for detectors and those of videos."""
    if "transformers" not in sys.modules:
        return None
    from .integrations.hf_vit.adapter import ADAPTER
    from .integrations.hf_vit.families import family_of, lookup, own_class

    parts = [one for one in ADAPTER.find(model) if not isinstance((lookup(one) or ("", ""))[1], str)]
    for part in parts:
        family, every = family_of(part), ADAPTER.attentions(part)
        found = {number: one for number, one in enumerate(every, 1) if ADAPTER.has_encodings(one)}
        if found and family.ndim == 2 and not family.swapped:
            classifies = "Classification" in own_class(model).__name__
            reads_class = classifies and family.module.split(".")[0] in ("vit", "deit")

            def run(images: Tensor, part: Any = part) -> Any:
                return part(pixel_values=images)

            return Watched(run, found, len(every), family.prefix > 0, reads_class, _of_transformers)
    return None


@contextmanager
def _of_timm(attentions: dict[int, Any]) -> Iterator[dict[int, Call]]:
    """While the block runs, calls of attentions of timm are written down, by the number of their block."""
    calls: dict[int, Call] = {}

    def recorder(number: int, attention: Any, attend: Any) -> Any:
        def record(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, mask: Any = None, *rest: Any) -> Tensor:
            calls[number] = Call(q, k, v, (height, width), mask, attention.scale)
            return attend(q, k, v, height, width, mask, *rest)

        return record

    try:
        for number, one in attentions.items():
            one.attend = recorder(number, one, one.attend)
        yield calls
    finally:
        for one in attentions.values():
            vars(one).pop("attend", None)


@contextmanager
def _of_windows(blocks: dict[int, Any]) -> Iterator[dict[int, Call]]:
    """The same of blocks of Swin, whose attentions see windows: the map is what goes into the block."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(number: int) -> Any:
        def hook(block: Any, args: tuple[Tensor, ...]) -> None:
            sizes[number] = (args[0].shape[1], args[0].shape[2])

        return hook

    handles = [block.register_forward_pre_hook(measure(number)) for number, block in blocks.items()]
    try:
        with _of_timm({number: block.attn for number, block in blocks.items()}) as calls:
            yield calls
    finally:
        for handle in handles:
            handle.remove()
    for number, block in blocks.items():
        windows = Windows(sizes[number], tuple(block.window_size), tuple(block.shift_size))
        calls[number] = calls[number]._replace(windows=windows)


@contextmanager
def _of_transformers(attentions: dict[int, Any]) -> Iterator[dict[int, Call]]:
    """The same of attentions of transformers, which call a function by its name."""
    from transformers import AttentionInterface

    from .integrations.hf_vit.attention import NAME, OnMap, attention

    calls: dict[int, Call] = {}
    numbers = {id(one): number for number, one in attentions.items()}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **options: Any) -> Any:
        own, place = mask if isinstance(mask, OnMap) else (mask, options.get("irpe_map"))
        if (number := numbers.get(id(module))) is not None and place is not None:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            calls[number] = Call(query, key, value, (place.height, place.width), own, scale)
        return attention(module, query, key, value, mask, *rest, **options)

    AttentionInterface.register(NAME, record)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, attention)
