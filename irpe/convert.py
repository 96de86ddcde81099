"""convert_tables(state_dict, old, new): learned tables for another mapping, other axes, other heads, other places."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config_io import rpe_config_from_string
from .irpe import (
    _AXES,
    _CROSS_PARTS,
    METHOD,
    RPEConfig,
    SingleRPEConfig,
    _as_int,
    _of_axis,
    get_bucket_map,
    get_num_buckets,
)

_KEY = re.compile(rf"((?:.*\.)?)(rpe_[qkv])\.(?:({'|'.join(_CROSS_PARTS)})\.)?lookup_table_(weight|bias)")


def convert_tables(
    state_dict: dict[str, Tensor],
    old_config: RPEConfig | str,
    new_config: RPEConfig | str,
    *,
    height: int | None = None,
    width: int | None = None,
    size: int | Sequence[int] | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    drop: bool = False,
) -> dict[str, Tensor]:
    """A state dict whose tables are those of `new_config` that are closest to the old, over all pairs of tokens.

    >>> old, new = "rpe-1.9-product-ctx-1-k", "rpe-2.5-product-ctx-1-k"
    >>> state = convert_tables(model.state_dict(), old, new, height=14, width=9)
    >>> equip(timm.create_model("deit_small_patch16_224"), new).load_state_dict(state)

    A table gives each offset of two tokens an encoding. Among all tables of the new mapping these have the smallest sum
    of squared differences over the pairs of tokens of a height x width map: each bucket is the mean of the pairs in it,
    and for cross the sum of its two tables is the best there is. So nothing changes where the new mapping can say what
    the old one said: buckets that are finer on this map, undirected (euc, quant) to directed (product), cross to
    product. Else it is the nearest thing: product to euc averages directions, product to cross keeps what a row and a
    column say apart. Buckets without a pair on the map stay zero, as in a new model: name the largest map that matters.

    Maps with other axes have the last ones in common: (height, width) of a video are those of its frames. Tables of
    images become those of videos by meaning the same whatever the offset in time ("inflated"), and those of videos
    become those of images by what they say within a frame. On a video of equal frames an inflated attention gives each
    of them the output that the image had: there are as many equal keys as frames, each with its share of the weight.
    Prefix tokens are no frames: each has to be there as many times as frames (`skip` times frames) to weigh the same.

    | from | to | tables |
    |---|---|---|
    | any method and ratio | the same | copied whole |
    | | another | as above; needs `height` and `width`, or `size` |
    | product or cross, 2 axes | the same, 3 | inflated: copied for each offset in time; cross's new table is zero |
    | product, 3 axes | the same, 2 | the tables of offset 0 in time |
    | any | other axes | as above, over the pairs of `size` |
    | shared by all heads | one for each | copied; needs `num_heads` |
    | one for each head | shared | refused unless all are equal: heads have no dimensions in common |
    | contextual | bias, or back | refused: one is a vector that meets queries or keys, the other a number |
    | no prefix tokens | some | zero in their bucket; it is copied where both have it, and left out with them |
    | no encoding on q, k or v | one | zero, which changes nothing |
    | one | none | refused without `drop=True`, as it changes the model |

    Args:
        state_dict: of a model or of a part of one. It is left alone; keys that are no tables pass as they are, and
            tables keep dtype and device.
        old_config, new_config: from `get_rpe_config`, with the `skip` of the tables, or in string form: then tables
            have the bucket of prefix tokens if the old ones have it.
        height, width: of the map, in tokens; size: instead, one number for each axis of `new_config`.
        num_heads: H, where there is a table for each head, and there was none before.
        head_dim: D, where encodings are added and no old table tells it.
        drop: True leaves out the tables of encodings that `new_config` does not have.

    Raises:
        ValueError: what the table above refuses; a size that is needed and absent; tables that `old_config` does not
            describe, or none at all.
    """
    old, new = _as_config(old_config, "old_config"), _as_config(new_config, "new_config")
    if (height is None) != (width is None) or (height is not None and size is not None):
        raise ValueError(f"height={height}, width={width}, size={size}: give both or neither, or size alone")
    if height is not None and width is not None:
        size = (height, width)
    attentions: dict[str, dict[str, dict[str | None, Tensor]]] = {}  # prefix, rpe_q and so on, rows or cols or None
    for key, value in state_dict.items():
        if match := _KEY.fullmatch(key):
            prefix, name, part, kind = match.groups()
            single = getattr(old, name)
            if single is None or (kind == "bias") != (single.mode == "bias"):
                raise ValueError(f"{key} is not described by old_config, {old_config!r}")
            attentions.setdefault(prefix, {}).setdefault(name, {})[part] = value
    if not attentions:
        raise ValueError("the state dict has no tables of iRPE (rpe_k.lookup_table_weight and the like)")
    numbers = None if size is None else (size,) if isinstance(size, int) else tuple(size)
    options = _Options(numbers, num_heads, head_dim)
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        if match is None:
            result[key] = value
        elif match[1] in attentions:  # the first table of an attention stands where all its new ones go
            prefix = match[1]
            tables = attentions.pop(prefix)
            encodings: dict[str, _Encoding | None] = {}
            for name, single in vars(old).items():
                if single is not None and name not in tables:
                    raise ValueError(
                        f"old_config has an encoding {prefix}{name}, but the state dict has no table of it"
                    )
                described = not isinstance(old_config, str)
                encodings[name] = single and _read(tables[name], single, prefix + name, described)
            result |= _convert(prefix, encodings, new, not isinstance(new_config, str), drop, options)
    return result


def _as_config(config: RPEConfig | str, name: str) -> RPEConfig:
    if isinstance(config, str):
        config = rpe_config_from_string(config)
    if not isinstance(config, RPEConfig):
        raise TypeError(f"{name} is {config!r}; expected what get_rpe_config returns, or 'rpe-1.9-product-ctx-1-k'")
    return config


class _Options(NamedTuple):
    size: tuple[int, ...] | None
    num_heads: int | None
    head_dim: int | None


class _Encoding(NamedTuple):
    """The tables of one encoding, (N, H', D) each, in bias mode (N, H', 1); the bucket of prefix tokens is the last."""

    single: SingleRPEConfig
    tables: list[Tensor]
    skip: bool


def _parts(single: SingleRPEConfig) -> dict[str | None, METHOD]:
    """The method of each table, by the name of its module."""
    if single.method == METHOD.CROSS:
        return dict(list(zip(_CROSS_PARTS, _AXES, strict=True))[-single.ndim :])
    return {None: single.method}


def _sizes(single: SingleRPEConfig) -> list[int]:
    """Buckets of each table, the one of prefix tokens not counted."""
    numbers = (single.alpha, single.beta, single.gamma, single.ndim)
    return [get_num_buckets(method, *numbers) for method in _parts(single).values()]


def _axes(single: SingleRPEConfig) -> list[tuple[float, ...]]:
    """alpha, beta, gamma of each axis."""
    return [_of_axis(axis, single.alpha, single.beta, single.gamma) for axis in range(-single.ndim, 0)]


def _buckets_first(name: str, single: SingleRPEConfig) -> tuple[int, ...]:
    """The order of a table's axes that puts buckets, heads, channels in this order; (1, 0, 2) is its own inverse."""
    if single.mode == "bias":
        return (1, 0)
    return (1, 0, 2) if name.endswith("rpe_v") else (2, 0, 1)


def _read(found: dict[str | None, Tensor], single: SingleRPEConfig, name: str, described: bool) -> _Encoding:
    parts, sizes = _parts(single), _sizes(single)
    if found.keys() != parts.keys():
        raise ValueError(f"{name} has other tables than old_config says, which has the method {single.method!r} there")
    order, tables = _buckets_first(name, single), []
    for part, size in zip(parts, sizes, strict=True):
        table = found[part]
        shape = tuple(table.shape)
        counts = [size + (single.skip > 0)] if described else [size, size + 1]
        if len(shape) != len(order) or shape[order[0]] not in counts or (single.shared_head and shape[0] != 1):
            raise ValueError(
                f"a table of {name} has shape {shape}; old_config has {' or '.join(map(str, counts))} buckets "
                f"there, the one of prefix tokens counted, and shared_head={single.shared_head}: name the ratio, "
                "method, shared_head and skip that it was made with"
            )
        table = table.permute(order)
        tables.append(table.unsqueeze(-1) if single.mode == "bias" else table)
    skips = {len(table) > size for table, size in zip(tables, sizes, strict=True)}
    if len(skips) > 1:
        raise ValueError(f"the tables of {name} have different numbers of buckets")
    return _Encoding(single, tables, skips.pop())


def _convert(
    prefix: str, encodings: dict[str, _Encoding | None], new: RPEConfig, described: bool, drop: bool, options: _Options
) -> dict[str, Tensor]:
    """The new tables of one attention, under their keys."""
    given = [old for old in encodings.values() if old is not None]
    result = {}
    for name, single in vars(new).items():
        old = encodings[name]
        if single is None:
            if old is not None and not drop:
                raise ValueError(
                    f"new_config has no encoding {prefix}{name}: leaving it out changes what the model computes; "
                    "pass drop=True if that is meant"
                )
            continue
        skip = single.skip > 0 if described else any(other.skip for other in given)
        if old is None:
            tables = _zeros(prefix + name, single, skip, given, options)
        elif old.single.mode != single.mode:
            raise ValueError(
                f"{prefix}{name} is {old.single.mode} and would become {single.mode}, which has no meaning: a "
                "contextual table holds vectors that meet queries or keys, a bias numbers that do not depend on them"
            )
        else:
            tables = _remap(old, single, skip, options)
            tables = [_for_heads(table, old.single, single, prefix + name, options) for table in tables]
        order = _buckets_first(name, single)
        for part, table in zip(_parts(single), tables, strict=True):
            kind = "bias" if single.mode == "bias" else "weight"
            key = ".".join(filter(None, (prefix + name, part, f"lookup_table_{kind}")))
            table = table.squeeze(-1) if single.mode == "bias" else table
            back = [order.index(axis) for axis in range(len(order))]
            result[key] = table.permute(back).clone(memory_format=torch.contiguous_format)
    return result


def _zeros(name: str, single: SingleRPEConfig, skip: bool, given: list[_Encoding], options: _Options) -> list[Tensor]:
    """Tables for an encoding that was not there, of the sizes of those that were."""
    heads = [old.tables[0].shape[1] for old in given if not old.single.shared_head]
    dims = [old.tables[0].shape[2] for old in given if old.single.mode != "bias"]

    def size(which: str, told: list[int], argument: int | None, needed: bool) -> int:
        sizes = {*told, *([] if argument is None else [argument])} if needed else {1}
        if len(sizes) != 1:
            why = f"the tables and the argument say {sorted(sizes)}" if sizes else "no other table tells it"
            raise ValueError(f"{name} is new, and {which} is not known: {why}; pass {which}= of the model")
        return sizes.pop()

    heads_and_dim = (
        size("num_heads", heads, options.num_heads, not single.shared_head),
        size("head_dim", dims, options.head_dim, single.mode != "bias"),
    )
    return [given[0].tables[0].new_zeros(size + skip, *heads_and_dim) for size in _sizes(single)]


def _for_heads(table: Tensor, old: SingleRPEConfig, new: SingleRPEConfig, name: str, options: _Options) -> Tensor:
    heads = table.shape[1]
    if not old.shared_head and options.num_heads not in (None, heads):
        raise ValueError(f"{name} has tables for {heads} heads, but num_heads={options.num_heads}: leave it out")
    if new.shared_head and not old.shared_head:
        if not (table == table[:, :1]).all():
            raise ValueError(
                f"{name} has different tables for its {heads} heads, which cannot become one: the dimensions of one "
                "head's queries are not those of another's, so a mean would mean nothing; keep shared_head=False"
            )
        return table[:, :1]
    if old.shared_head and not new.shared_head:
        if options.num_heads is None:
            raise ValueError(f"{name} is shared by all heads and would be one for each: pass num_heads= of the model")
        return table.expand(-1, options.num_heads, -1)
    return table


def _remap(old: _Encoding, new: SingleRPEConfig, skip: bool, options: _Options) -> list[Tensor]:
    """The tables under the mapping of `new`, with the bucket of prefix tokens if `skip`."""
    like, sizes = old.tables[0], _sizes(old.single)
    tables = [table[:size] for table, size in zip(old.tables, sizes, strict=True)]
    last = [table[size:] for table, size in zip(old.tables, sizes, strict=True)]
    if (copied := _copied(tables, old.single, new)) is not None:
        tables = copied
        last = [torch.zeros_like(last[0])] * (len(tables) - len(last)) + last
    else:
        tables = [table.to(like.dtype) for table in _closest(tables, old.single, new, options)]
        both = torch.stack(last).double().sum(0)  # cross adds the buckets of its tables
        last = [(both / len(tables)).to(like.dtype)] * len(tables)
    if not skip:
        return tables
    if not old.skip:
        last = [like.new_zeros(1, *like.shape[1:])] * len(tables)
    return [torch.cat(pair) for pair in zip(tables, last, strict=True)]


def _copied(tables: list[Tensor], old: SingleRPEConfig, new: SingleRPEConfig) -> list[Tensor] | None:
    """The tables where `new` has the mapping of `old`, on the axes that they have in common; None where it has not."""
    common = min(old.ndim, new.ndim)
    if old.method != new.method or _axes(old)[-common:] != _axes(new)[-common:]:
        return None
    more = _axes(new)[:-common] or _axes(old)[:-common]  # the axes that only one of them has
    if not more or old.method in _AXES:
        return tables
    if old.method == METHOD.PRODUCT:
        buckets = [2 * int(beta) + 1 for _, beta, _ in more]
        if new.ndim > old.ndim:
            return [tables[0].repeat(math.prod(buckets), 1, 1)]
        return [tables[0].unflatten(0, (*buckets, -1))[tuple(n // 2 for n in buckets)]]
    if old.method == METHOD.CROSS and new.ndim > old.ndim:
        zeros = [tables[0].new_zeros(size, *tables[0].shape[1:]) for size in _sizes(new)[: len(more)]]
        return zeros + tables
    return None


def _closest(tables: list[Tensor], old: SingleRPEConfig, new: SingleRPEConfig, options: _Options) -> list[Tensor]:
    """Least squares over the pairs of tokens of the map, in float64."""
    size = options.size
    if size is None:
        raise ValueError(
            "another method or ratio, or axes that cannot be copied: pass height= and width= of the map in tokens, or "
            "size=, whose pairs decide what is closest"
        )
    if len(size) != new.ndim:
        raise ValueError(f"size={size}, but new_config has ndim={new.ndim}; expected {new.ndim} numbers")
    names = ("height", "width") if len(size) == 2 else [f"size[{axis}]" for axis in range(len(size))]
    size = tuple(_as_int(n, name, 1) for n, name in zip(size, names, strict=True))
    size = (1,) * (old.ndim - new.ndim) + size  # an image is one frame
    device = tables[0].device

    def ids(single: SingleRPEConfig, method: METHOD) -> Tensor:
        own = size[-single.ndim :]
        grid = get_bucket_map(method, own, 0, single.alpha, single.beta, single.gamma).grid()
        shape = [2 * n - 1 for n in size]  # offsets on axes that a configuration lacks mean nothing to it
        return grid.reshape(shape[-single.ndim :]).expand(shape).flatten().to(device, torch.long)

    parts = zip(tables, _parts(old).values(), strict=True)
    # of each offset, (P, H', D)
    encoding = torch.stack([table.double()[ids(old, method)] for table, method in parts]).sum(0)
    pairs = torch.ones((), dtype=torch.double, device=device)  # how many pairs of tokens have this offset, (P)
    for n in size:
        pairs = pairs.unsqueeze(-1) * (n - torch.arange(1 - n, n, device=device).abs())
    pairs = pairs.flatten()
    means, count = [], len(_parts(new))
    for method, buckets in zip(_parts(new).values(), _sizes(new), strict=True):
        where = ids(new, method)
        total = pairs.new_zeros(buckets).index_add(0, where, pairs)
        mean = encoding.new_zeros(buckets, *encoding.shape[1:]).index_add(0, where, encoding * pairs[:, None, None])
        means.append(mean / total.clamp(min=1)[:, None, None])
        if count > 1:
            # as the count of pairs is a product over the axes, the best sum of a row and a column is mean of the row +
            # mean of the column - mean of all, which all tables share; and so on for more axes
            overall = (encoding * pairs[:, None, None]).sum(0) / pairs.sum()
            means[-1] = torch.where(total[:, None, None] > 0, means[-1] - overall * (count - 1) / count, means[-1])
    return means
