"""What the encodings of a trained model add to its attention scores: the numbers of the pictures in `irpe.viz`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .irpe import BucketMap

HEADS = 2  # whose single queries are shown


class Encodings(NamedTuple):
    """What a trained model adds to its attention scores by offset.

    mean: (blocks, H, 2h-1, 2w-1) for the mean query of many images; single: (heads, examples, 2h-1, 2w-1) for single
    queries, of the heads in `shown`, pairs (block, head); images: (examples, height, width), pixels; at: token (row,
    column) of each query; patch: pixels along the side of a token. All maps have the query in the middle and a mean of
    0, which softmax does not see.
    """

    title: str
    mean: np.ndarray
    single: np.ndarray
    images: np.ndarray
    at: Sequence[tuple[int, int]]
    shown: Sequence[tuple[int, int]]
    patch: int


def learned(
    model: nn.Module, batch: Tensor, pixels: Tensor, examples: Sequence[int], title: str, asking: Tensor | None = None
) -> Encodings | None:
    """What a model's encodings on keys, contextual or bias, add to attention scores by offset.

    None where it has none, or where attentions differ in their number of heads or in the size of their maps. Single
    queries are of the two heads whose answers differ most between queries: in each example, of the token whose answer
    is least like those before it.

    Args:
        batch: (B, C, height, width), images as the model takes them.
        pixels: (B, height, width) in [0, 1], the same images to be drawn, 0 in white.
        examples: numbers of the images in the batch whose single queries are shown.
        asking: (B, L), which tokens of the map may be shown; all of them by default.
    """
    blocks = _heard(model, batch)
    sizes = {(answers.shape[1], *ids.shape) for block in blocks for answers, ids in block}
    if len(sizes) != 1 or not all(blocks):
        return None
    ((heads, *offsets),) = sizes
    height, width = ((side + 1) // 2 for side in offsets)
    means = [[(answers.mean((0, 2)), ids) for answers, ids in block] for block in blocks]
    mean = torch.stack([_centred(_on_offsets(tables)) for tables in means])
    every = (_of_head(block, head) for block in blocks for head in range(heads))  # large: one at a time
    differ = torch.stack([answers.std((0, 1), correction=0).mean() for answers in every])
    if differ.max() <= 1e-6 * mean.abs().max():  # biases are the same for every query
        differ = mean.abs().mean((-2, -1)).flatten()
    shown = [divmod(int(place), heads) for place in differ.argsort(descending=True)[:HEADS]]
    of_first = _of_head(blocks[shown[0][0]], shown[0][1], examples)  # (examples, L, 2h-1, 2w-1)
    tokens = _unlike(of_first, None if asking is None else asking[list(examples)])
    single = [_of_head(blocks[block], head, examples)[range(len(examples)), tokens] for block, head in shown]
    return Encodings(
        title=title, mean=mean.numpy(), single=torch.stack(single).numpy(), images=pixels[list(examples)].numpy(),
        at=[divmod(token, width) for token in tokens], shown=shown, patch=batch.shape[2] // height,
    )  # fmt: skip


# for each table of an attention: added to scores (B, H, h*w, N) by bucket, and the buckets (2h-1, 2w-1) of offsets
Block = list[tuple[Tensor, Tensor]]


def _heard(model: nn.Module, batch: Tensor) -> list[Block]:
    """What each encoding on keys adds when the model looks at a batch; nothing of one that knows positions alone."""
    found: dict[int, Block] = {}
    modules = [module.rpe_k for module in model.modules() if getattr(module, "rpe_k", None) is not None]
    model.eval()
    with torch.no_grad(), _listening(modules, found):
        model(batch.to(next(model.parameters()).device))
    return list(found.values())


@contextmanager
def _listening(modules: list[Any], found: dict[int, Block]) -> Iterator[None]:
    """While the block runs, `found` gets what the modules add; attention is the formula then, which calls them."""

    def hear(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        queries, found[id(module)] = args[0], []
        for table, where in module.tables(*args, **options):
            if isinstance(where, BucketMap) and len(where.size) == 2:
                answers = (table if module.mode == "bias" else queries @ table).detach()[:, :, where.skip :]
                ids = where.grid().flip(0, 1).long().cpu()  # keys as the query in the middle sees them
                found[id(module)].append((answers.float().cpu().expand(*queries.shape[:2], -1, -1), ids))

    handles = [module.register_forward_pre_hook(hear, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_head(block: Block, head: int, images: Sequence[int] | None = None) -> Tensor:
    """(B, h*w, 2h-1, 2w-1): what one head adds, for every query of all images or of some."""
    rows = slice(None) if images is None else list(images)
    return _centred(_on_offsets([(answers[rows, head], ids) for answers, ids in block]))


def _on_offsets(tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(..., 2h-1, 2w-1): the sum over tables (..., N) of what the bucket of each offset has."""
    return torch.stack([answers[..., ids] for answers, ids in tables]).sum(0)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean((-2, -1), keepdim=True)


def _unlike(answers: Tensor, asking: Tensor | None) -> list[int]:
    """A token of each example (examples, L, 2h-1, 2w-1): the one that is farthest from the nearest of those before."""
    tokens: list[int] = []
    held = torch.zeros(1, *answers.shape[2:])
    for number, answer in enumerate(answers):
        distance = (answer[:, None] - held).square().sum((-2, -1)).amin(-1)  # (L,)
        allowed = torch.ones_like(distance, dtype=torch.bool) if asking is None else asking[number]
        tokens.append(int(distance.where(allowed, -1).argmax()))
        held = torch.stack([answers[k, token] for k, token in enumerate(tokens)])
    return tokens
