"""What the encodings of a model add to the attention of one query on one image: the numbers of `irpe.viz_image`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .integrations.blocks import EncodedAttention
from .integrations.on_map import AttentionOnMap
from .irpe import BucketMap

_SEEN = 1e-6  # smaller differences are rounding
_WORKS = "pictures of attention are drawn of timm's ViT, DeiT, BEiT and EVA that have encodings"


class Row(NamedTuple):
    """One query i and all keys j: weights = softmax(scores + on_keys + on_queries), arrays (L,), L = skip + h*w.

    scores: scale q_i . k_j, and what the model itself adds to that (the bias of BEiT); without: softmax(scores).
    on_keys: scale q_i . W_k[ids[i,j]]; on_queries: scale k_j . W_q[ids[j,i]]; or biases. None without that encoding.
    on_values: weights_j |W_v[ids[i,j]]|, the length of what the key brings to the output by its place alone, or None.
    share: |sum_j weights_j W_v[ids[i,j]]| / |sum_j weights_j v_j|, 0 without encodings on values.
    """

    scores: np.ndarray
    on_keys: np.ndarray | None
    on_queries: np.ndarray | None
    without: np.ndarray
    weights: np.ndarray
    on_values: np.ndarray | None
    share: float

    @property
    def added(self) -> np.ndarray:
        """(L,): the sum of what is added to the scores."""
        return np.asarray(
            sum((scores for scores in (self.on_keys, self.on_queries) if scores is not None), 0 * self.scores)
        )

    @property
    def moved(self) -> float:
        """Half of sum_j |weights_j - without_j|: the part of the attention that goes to other keys."""
        return float(np.abs(self.weights - self.without).sum() / 2)


class AttentionMaps(NamedTuple):
    """The attention of a token of the map, and of the class token, in one head; see `attention_maps`.

    size: (h, w), tokens; skip: tokens in front of the map; at: (row, column) of the query, from 0; block, of blocks,
    and head, of heads: from 1; query: its row; class_token: that of the class token, None in models without;
    note: why there is nothing to see, or "".
    """

    size: tuple[int, int]
    skip: int
    at: tuple[int, int]
    block: int
    blocks: int
    head: int
    heads: int
    query: Row
    class_token: Row | None
    note: str

    def map(self, values: np.ndarray) -> np.ndarray:
        """(h, w): what the keys of the map have of values (L,)."""
        return values[self.skip :].reshape(self.size)


@torch.no_grad()
def attention_maps(
    model: nn.Module, image: Tensor, *, query: Sequence[int] | None = None, block: int | None = None,
    head: int | None = None,
) -> AttentionMaps:  # fmt: skip
    """softmax(q k^T) beside softmax(q k^T + encodings), and the encodings: of one token of an image in one head.

    >>> model = irpe.load("runs/NAME")
    >>> maps = attention_maps(model, model.predict.prepare(picture), query=(3, 5), block=9)
    >>> maps.map(maps.query.weights).shape
    (14, 14)

    What is not given is what shows most. The block is the last one in which encodings tell keys of the map apart: after
    training that is the last but one where the class token alone is read, see `note`. The head is the one in which
    they change the attention of the query most, or on average that of all where none is given; the query the
    one that is changed most in that head. A change is what has `moved`, plus the `share` of values.

    Args:
        model: of timm, a ViT, DeiT, BEiT or EVA, in which `irpe.equip` or `irpe.load` put encodings.
        image: (channels, height, width), as the model takes it.
        query: (row, column) in tokens, counted from 0.
        block, head: counted from 1.

    Raises:
        ValueError: the model is of another kind or has no encodings, the block has none, or numbers are out of range.
    """
    part = encoded_part(model)
    blocks = list(part.blocks)
    _within("block", block, len(blocks))
    attentions = {number: each.attn for number, each in enumerate(blocks, 1) if isinstance(each.attn, AttentionOnMap)}
    if block is not None and block not in attentions:
        has = ", ".join(map(str, attentions))
        raise ValueError(f"block {block} has no encodings; expected one of {has}")
    model.eval()
    first = next(model.parameters())
    with _recording(attentions) as calls:
        model(image[None].to(first.device, first.dtype))
    number = block if block is not None else max(calls)
    whole = _Whole(attentions[number], calls[number])
    if block is None and not whole.tells_apart:
        for other in sorted(calls, reverse=True):
            seen = _Whole(attentions[other], calls[other])
            if seen.tells_apart:
                number, whole = other, seen
                break
    if query is not None and not all(0 <= at < n for at, n in zip(query, whole.size, strict=True)):
        raise ValueError(
            f"the query at row {query[0]}, column {query[1]} is not on the map of {whole.size[0]}x{whole.size[1]} "
            "tokens, whose rows and columns are counted from 0"
        )
    _within("head", head, whole.heads)
    asked = None if query is None else query[0] * whole.size[1] + query[1]
    has_class = getattr(part, "cls_token", None) is not None
    chosen, token = whole.choose(None if head is None else head - 1, asked, has_class)
    at = (token // whole.size[1], token % whole.size[1])
    return AttentionMaps(
        whole.size, whole.skip, at, number, len(blocks), chosen + 1, whole.heads, whole.row(chosen, whole.skip + token),
        whole.row(chosen, 0) if has_class else None, _why_blank(part, attentions, number, whole),
    )  # fmt: skip


def _within(name: str, number: int | None, count: int) -> None:
    if number is not None and not 1 <= number <= count:
        raise ValueError(f"{name} {number}; the model has {count}, counted from 1")


def encoded_part(model: nn.Module) -> Any:
    """The part of a model with the blocks whose attentions have encodings.

    Raises:
        ValueError: there is none.
    """
    for part in model.modules():
        blocks = getattr(part, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and any(
            isinstance(getattr(inner, "attn", None), AttentionOnMap) for inner in blocks
        ):
            return part
    name = getattr(model, "original", type(model)).__name__
    if any(isinstance(module, EncodedAttention) for module in model.modules()):
        raise ValueError(f"{_WORKS}; the attention of {name} is in windows, each a map of its own")
    if not any(getattr(module, f"rpe_{letter}", None) is not None for module in model.modules() for letter in "qkv"):
        raise ValueError(f"{_WORKS}; this {name} has none: irpe.equip(model, ...) adds them, training fills them")
    raise ValueError(f"{_WORKS}; this is a {name}")


class _Call(NamedTuple):
    """What an attention was asked to compute: q, k, v (1, H, L, D), q not scaled."""

    q: Tensor
    k: Tensor
    v: Tensor
    size: tuple[int, int]
    mask: Tensor | None


@contextmanager
def _recording(attentions: dict[int, Any]) -> Iterator[dict[int, _Call]]:
    """While the block runs, calls of the attentions are written down, by the number of their block."""
    calls: dict[int, _Call] = {}

    def recorder(number: int, attend: Any) -> Any:
        def record(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, mask: Any = None, *rest: Any) -> Tensor:
            calls[number] = _Call(q, k, v, (height, width), mask)
            return attend(q, k, v, height, width, mask, *rest)

        return record

    try:
        for number, attention in attentions.items():
            attention.attend = recorder(number, attention.attend)
        yield calls
    finally:
        for attention in attentions.values():
            vars(attention).pop("attend", None)


class _Whole:
    """All queries and heads of one attention: attributes as those of `Row`, (H, L, L)."""

    def __init__(self, attention: Any, call: _Call) -> None:
        q, k = call.q * attention.scale, call.k * attention.scale
        self.size, self.heads, self.skip = call.size, q.shape[1], q.shape[2] - call.size[0] * call.size[1]
        places: dict[str, Any] = dict(height=call.size[0], width=call.size[1])
        scores = q @ call.k.transpose(-2, -1)
        if call.mask is not None:
            allowed = call.mask.dtype == torch.bool
            scores = scores.masked_fill(~call.mask, -torch.inf) if allowed else scores + call.mask
        self.scores = scores[0].float()  # (H, L, L)
        on_keys = None if attention.rpe_k is None else attention.rpe_k(q, **places)
        on_queries = None if attention.rpe_q is None else attention.rpe_q(k, **places).transpose(-2, -1)
        self.on_keys, self.on_queries = (
            None if scores is None else scores[0].float().expand_as(self.scores) for scores in (on_keys, on_queries)
        )
        self.without = self.scores.softmax(-1)
        self.added = sum((scores for scores in (self.on_keys, self.on_queries) if scores is not None), 0 * self.without)
        self.weights = (self.scores + self.added).softmax(-1)
        self.share = self.weights.new_zeros(self.weights.shape[:2])  # (H, L)
        self.of_values: list[tuple[Tensor, Tensor]] = []  # (H', N, D), ids (L, L)
        if attention.rpe_v is not None:
            weights = self.weights[None].to(call.v.dtype)
            own = (weights @ call.v).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            self.share = (attention.rpe_v(weights, **places).norm(dim=-1) / own)[0].float()
            for table, where in attention.rpe_v.tables(weights, **places):
                ids = where.ids() if isinstance(where, BucketMap) else where
                self.of_values.append((table.float(), ids.long().to(table.device)))

    @property
    def tells_apart(self) -> bool:
        """Whether for some token of the map the encodings differ between keys of the map."""
        added = self.added[:, self.skip :, self.skip :]
        if float((added.amax(-1) - added.amin(-1)).max()) > _SEEN:
            return True
        tables = [table[:, ids[self.skip :, self.skip :].unique()] for table, ids in self.of_values]
        return any(bool(table.abs().max() > _SEEN) for table in tables)

    def choose(self, head: int | None, token: int | None, has_class: bool) -> tuple[int, int]:
        """The head and the token of the map, of which some are given, that are changed most."""
        changed = (self.weights - self.without).abs().sum(-1) / 2 + self.share  # (H, L)
        of_map = changed[:, self.skip :]
        if not self.tells_apart:  # rounding decides nothing: the middle, and where the class token is changed
            middle = self.size[0] // 2 * self.size[1] + self.size[1] // 2
            best = int(changed[:, 0].argmax()) if has_class else 0
            return best if head is None else head, middle if token is None else token
        if head is None:
            head = int((of_map.mean(-1) if token is None else of_map[:, token]).argmax())
        return head, int(of_map[head].argmax()) if token is None else token

    def row(self, head: int, i: int) -> Row:
        """Query i of all L."""

        def of(values: Tensor | None) -> Any:
            return None if values is None else values[head, i].cpu().numpy()

        on_values = None
        if self.of_values:
            each = sum(table[head % len(table), ids[i]] for table, ids in self.of_values)  # (L, D)
            assert isinstance(each, Tensor)
            on_values = (self.weights[head, i] * each.norm(dim=-1)).cpu().numpy()
        return Row(
            of(self.scores), of(self.on_keys), of(self.on_queries), of(self.without), of(self.weights), on_values,
            float(self.share[head, i]),
        )  # fmt: skip


def _why_blank(part: Any, attentions: dict[int, Any], number: int, whole: _Whole) -> str:
    """Why encodings of a block do not tell the keys of the map apart; "" where they do."""
    if whole.tells_apart:
        return ""
    tables = [
        parameter
        for attention in attentions.values()
        for name, parameter in attention.named_parameters()
        if "lookup" in name
    ]
    if not any(bool(table.abs().max() > 0) for table in tables):
        return "All tables are zero, so nothing is added: the encodings have not been trained."
    if number == len(part.blocks) and getattr(part, "global_pool", None) == "token" and whole.skip:
        return (
            f"Nothing is added on the map in block {number}, the last: only the class token is read from it, and all "
            "pairs with it lie in one bucket, so the tables for pairs of the map have had no gradient there."
        )
    return f"The encodings of block {number} add the same to every key of the map, which softmax does not see."
