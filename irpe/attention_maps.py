"""What the encodings of a model add to the attention of one query on one image: the numbers of `irpe.viz_image`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .attention_calls import Call, Watched, watched
from .irpe import BucketMap

_SEEN = 1e-6  # smaller differences are rounding


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
        return np.asarray(sum((one for one in (self.on_keys, self.on_queries) if one is not None), 0 * self.scores))

    @property
    def moved(self) -> float:
        """Half of sum_j |weights_j - without_j|: the part of the attention that goes to other keys."""
        return float(np.abs(self.weights - self.without).sum() / 2)


class AttentionMaps(NamedTuple):
    """The attention of a token of the map, and of the class token, in one head; see `attention_maps`.

    size: (h, w), tokens; skip: tokens in front of the map; at: (row, column) of the query, from 0; block, of blocks,
    and head, of heads: from 1; query: its row; class_token: that of the class token, None in models without;
    note: why there is nothing to see, or ""; places: (L - skip,), row * w + column of each key, or -1 beside the map.
    The keys are all tokens, but in windows: there they are those of the window.
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
    places: np.ndarray

    def map(self, values: np.ndarray) -> np.ndarray:
        """(h, w): what the keys of the map have of values (L,); nan where no key is."""
        found = np.full(self.size[0] * self.size[1], np.nan, values.dtype)
        there = self.places >= 0
        found[self.places[there]] = values[self.skip :][there]
        return found.reshape(self.size)


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
        model: of timm or transformers, in which `irpe.equip` or `irpe.load` put encodings; see `attention_calls`.
        image: (channels, height, width), as the model takes it.
        query: (row, column) in tokens, counted from 0.
        block, head: counted from 1.

    Raises:
        ValueError: the model is of another kind or has no encodings, the block has none, or numbers are out of range.
    """
    seen = watched(model)
    _within("block", block, seen.blocks)
    if block is not None and block not in seen.attentions:
        has = ", ".join(map(str, seen.attentions))
        raise ValueError(f"block {block} has no encodings; expected one of {has}")
    model.eval()
    first = next(model.parameters())
    with seen.record(seen.attentions) as calls:
        seen.run(image[None].to(first.device, first.dtype))
    number = block if block is not None else max(calls)
    wholes = _wholes(seen, calls, number)
    if block is None and not any(one.tells_apart for one in wholes):
        for other in sorted(calls, reverse=True):
            others = _wholes(seen, calls, other)
            if any(one.tells_apart for one in others):
                number, wholes = other, others
                break
    windows, size = calls[number].windows, calls[number].size
    if windows is None:
        places = torch.arange(size[0] * size[1])[None]  # (1, h * w)
    else:
        places, size = windows.places(), windows.size
    if query is not None and not all(0 <= at < n for at, n in zip(query, size, strict=True)):
        raise ValueError(
            f"the query at row {query[0]}, column {query[1]} is not on the map of {size[0]}x{size[1]} "
            "tokens, whose rows and columns are counted from 0"
        )
    _within("head", head, wholes[0].heads)
    asked = None if query is None else query[0] * size[1] + query[1]
    middle = size[0] // 2 * size[1] + size[1] // 2
    chosen, token = _choose(wholes, places, None if head is None else head - 1, asked, middle, seen.has_class)
    window, at = (places == token).nonzero()[0].tolist()
    whole = wholes[window]
    return AttentionMaps(
        size, whole.skip, (token // size[1], token % size[1]), number, seen.blocks, chosen + 1, whole.heads,
        whole.row(chosen, whole.skip + at), whole.row(chosen, 0) if seen.has_class else None,
        _why_blank(seen, number, wholes), places[window].numpy(),
    )  # fmt: skip


def _wholes(seen: Watched, calls: dict[int, Call], number: int) -> list["_Whole"]:
    """The attention of a block, in each window where it has some."""
    attention = getattr(seen.attentions[number], "attn", seen.attentions[number])
    return [_Whole(attention, calls[number], window) for window in range(len(calls[number].q))]


def _choose(
    wholes: Sequence["_Whole"], places: Tensor, head: int | None, token: int | None, middle: int, has_class: bool
) -> tuple[int, int]:
    """The head and the token of the map, of which some are given, that are changed most."""
    changed = torch.stack([one.changed for one in wholes], 1)  # (H, windows, L)
    # otherwise rounding decides nothing: the middle, and where the class token is changed
    if not any(one.tells_apart for one in wholes):
        best = int(changed[:, 0, 0].argmax()) if has_class else 0
        return best if head is None else head, middle if token is None else token
    of_map = changed[:, :, wholes[0].skip :][:, places >= 0]  # (H, h * w)
    order = places[places >= 0]
    if head is None:
        head = int((of_map.mean(-1) if token is None else of_map[:, order == token].squeeze(-1)).argmax())
    return head, int(order[of_map[head].argmax()]) if token is None else token


def _within(name: str, number: int | None, count: int) -> None:
    if number is not None and not 1 <= number <= count:
        raise ValueError(f"{name} {number}; the model has {count}, counted from 1")


class _Whole:
    """All queries and heads of one attention, in one of its windows: attributes as those of `Row`, (H, L, L)."""

    def __init__(self, attention: Any, call: Call, window: int) -> None:
        q, k, v = (one[window : window + 1] for one in (call.q * call.scale, call.k, call.v))
        k_scaled = k * call.scale
        self.heads, self.skip = q.shape[1], q.shape[2] - call.size[0] * call.size[1]
        places: dict[str, Any] = dict(height=call.size[0], width=call.size[1])
        scores = q @ k.transpose(-2, -1)
        if call.mask is not None:
            mask = call.mask[window % len(call.mask)]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        self.scores = scores[0].float()  # (H, L, L)
        on_keys = None if attention.rpe_k is None else attention.rpe_k(q, **places)
        on_queries = None if attention.rpe_q is None else attention.rpe_q(k_scaled, **places).transpose(-2, -1)
        self.on_keys, self.on_queries = (
            None if one is None else one[0].float().expand_as(self.scores) for one in (on_keys, on_queries)
        )
        self.without = self.scores.softmax(-1)
        self.added = sum((one for one in (self.on_keys, self.on_queries) if one is not None), 0 * self.without)
        self.weights = (self.scores + self.added).softmax(-1)
        self.share = self.weights.new_zeros(self.weights.shape[:2])  # (H, L)
        self.of_values: list[tuple[Tensor, Tensor]] = []  # (H', N, D), ids (L, L)
        if attention.rpe_v is not None:
            weights = self.weights[None].to(v.dtype)
            own = (weights @ v).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
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
        return any(bool(one.abs().max() > _SEEN) for one in tables)

    @property
    def changed(self) -> Tensor:
        """(H, L): how much of the attention of each token goes to other keys, and the share of values."""
        return (self.weights - self.without).abs().sum(-1) / 2 + self.share

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


def _why_blank(seen: Watched, number: int, wholes: Sequence[_Whole]) -> str:
    """Why encodings of a block do not tell the keys of the map apart; "" where they do."""
    if any(one.tells_apart for one in wholes):
        return ""
    tables = [
        parameter for one in seen.attentions.values() for name, parameter in one.named_parameters() if "lookup" in name
    ]
    if not any(bool(one.abs().max() > 0) for one in tables):
        return "All tables are zero, so nothing is added: the encodings have not been trained."
    if number == seen.blocks and seen.reads_class and wholes[0].skip:
        return (
            f"Nothing is added on the map in block {number}, the last: only the class token is read from it, and all "
            "pairs with it lie in one bucket, so the tables for pairs of the map have had no gradient there."
        )
    return f"The encodings of block {number} add the same to every key of the map, which softmax does not see."
