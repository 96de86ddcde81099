"""Image relative position encoding (iRPE): contextual and bias encodings on queries, keys and values.

Wu, Peng, Chen, Fu, Chao: "Rethinking and Improving Relative Position Encoding for Vision Transformer", ICCV 2021,
arXiv 2107.14222. This file needs torch and nothing else, and may be copied into any project; with the directory
`rpe_ops/` beside it (or installed) it uses the operators found there.

    config = get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k")
    rpe_q, rpe_k, rpe_v = build_rpe(config, head_dim=64, num_heads=6)      # modules, or None where there is none
    attn += rpe_k(q)                                                       # inside forward: q scaled, (B, H, L, D)
    out = rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v)                      # or the whole attention in one call

Read it from top to bottom: configuration, positions to buckets, the two operators, the modules, attention. B is batch,
H heads, L tokens, D head_dim, N buckets, h and w height and width of the map of tokens, skip the number of tokens in
front of it, L = skip + h*w. H' is the number of tables: 1 when heads share one, else H. A map may have any number of
axes, such as (frames, h, w): `ndim` in the configuration says how many, and `size=` in a call how long they are.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RPE_OPS_MISSING = ""  # why the operators of `rpe_ops` are not used
try:  # the directory copied beside this file, then the one beside its folder, then the installed one
    from .rpe_ops import constants as _constants  # type: ignore[import-not-found]
    from .rpe_ops import rpe_attention as _attention
    from .rpe_ops import rpe_index as _operators
except Exception as beside:  # whatever it is, this file works alone
    try:
        from ..rpe_ops import constants as _constants  # type: ignore[import-not-found]
        from ..rpe_ops import rpe_attention as _attention
        from ..rpe_ops import rpe_index as _operators
    except Exception as above:
        try:
            from rpe_ops import constants as _constants
            from rpe_ops import rpe_attention as _attention
            from rpe_ops import rpe_index as _operators
        except Exception as installed:
            _attention = _constants = _operators = None
            RPE_OPS_MISSING = f"beside irpe.py: {beside}; beside its folder: {above}; installed: {installed}"
RPEIndexFunction = getattr(_operators, "RPEIndexFunction", None)  # the release's file has the name, and None, too


class METHOD(enum.IntEnum):
    """How the offset of two tokens becomes a bucket (the numbers are those of the reference release)."""

    EUCLIDEAN = 0
    QUANT = 1
    PRODUCT = 3
    CROSS = 4
    CROSS_ROWS = 41
    CROSS_COLS = 42
    CROSS_DEPTH = 43
    CROSS_TIME = 44

    def __repr__(self) -> str:
        return f"METHOD.{self.name}"


_METHOD_NAMES = {method: "euc" if method is METHOD.EUCLIDEAN else method.name.lower() for method in METHOD}
_METHODS = {name: method for method, name in _METHOD_NAMES.items()}
_MODES = {"ctx": "contextual", "contextual": "contextual", "bias": "bias"}
# the one axis that a table of cross sees, and the name of the module that has it
_AXES = {METHOD.CROSS_TIME: -4, METHOD.CROSS_DEPTH: -3, METHOD.CROSS_ROWS: -2, METHOD.CROSS_COLS: -1}
_CROSS_PARTS = ("rp_time", "rp_depth", "rp_rows", "rp_cols")

Size = int | None  # of the map, in tokens
Axes = int | Sequence[int] | None  # the same for any number of axes
Number = float | tuple[float, ...]  # for all axes, or one for each
Places = Tensor | tuple[Tensor, Tensor] | None  # of one sequence, or (of the input's tokens, of the others)


def _as_method(method: str | int) -> METHOD:
    if isinstance(method, str):
        method = _METHODS.get(method.lower(), method)
    if isinstance(method, METHOD):
        return method
    if method not in METHOD.__members__.values():
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(_METHODS)}, or a METHOD")
    return METHOD(method)  # type: ignore[arg-type]


def _check_piecewise(alpha: float, beta: float, gamma: float) -> None:
    if not (0 < alpha <= beta < math.inf and alpha < gamma < math.inf):
        raise ValueError(
            f"alpha={alpha}, beta={beta}, gamma={gamma}; expected finite numbers, 0 < alpha <= beta and alpha < gamma"
        )


def _check_numbers(method: METHOD, alpha: Number, beta: Number, gamma: Number, ndim: int) -> None:
    if not 1 <= _as_int(ndim, "ndim", 1) <= len(_AXES):
        raise ValueError(f"ndim={ndim}; expected 1 to {len(_AXES)} axes")
    for name, number in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        one_distance = method in (METHOD.EUCLIDEAN, METHOD.QUANT)
        if isinstance(number, tuple) and (len(number) != ndim or one_distance):
            expected = f"one number, or for product and cross one for each of {ndim} axes"
            raise ValueError(f"{name}={number} for {method!r}; expected {expected}")
    for axis in range(-ndim, 0):
        _check_piecewise(*_of_axis(axis, alpha, beta, gamma))


def _of_axis(axis: int, *numbers: Number) -> tuple[float, ...]:
    """alpha, beta or gamma of one axis, counted from the last one: -1, -2, ..."""
    return tuple(number[axis] if isinstance(number, tuple) else number for number in numbers)


def _as_int(value: Any, name: str, least: int) -> Any:
    """`value` as an int that is at least `least`; symbolic sizes of torch.compile and exporters pass as they are."""
    if (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))) and not _is_open(value):
        try:
            value = operator.index([] if isinstance(value, bool) else value)
        except TypeError:
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected an int") from None
    if value < least:
        raise ValueError(f"{name}={value}; expected at least {least}")
    return value


@dataclasses.dataclass(frozen=True)
class SingleRPEConfig:
    """One encoding, made by `get_single_rpe_config`; alpha, beta, gamma are those of `piecewise_index`."""

    method: METHOD
    mode: str
    shared_head: bool
    skip: int
    alpha: Number
    beta: Number
    gamma: Number
    ndim: int = 2

    def __post_init__(self) -> None:
        mode = _MODES.get(self.mode) if isinstance(self.mode, str) else None
        if mode is None:
            raise ValueError(f"unknown mode {self.mode!r}; expected one of {', '.join(_MODES)}")
        object.__setattr__(self, "method", _as_method(self.method))
        for name in ("alpha", "beta", "gamma"):
            number = getattr(self, name)
            object.__setattr__(self, name, tuple(number) if isinstance(number, list) else number)
        _check_numbers(self.method, self.alpha, self.beta, self.gamma, self.ndim)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "shared_head", bool(self.shared_head))
        object.__setattr__(self, "skip", _as_int(self.skip, "skip", 0))

    @property
    def num_buckets(self) -> int:
        """Number of columns N of each table: the mapping's own buckets, and one more where skip > 0.

        ValueError for cross with a ratio for each axis, whose tables differ: ask `iRPE_Cross.parts`.
        """
        return get_num_buckets(self.method, self.alpha, self.beta, self.gamma, self.ndim) + (self.skip > 0)


@dataclasses.dataclass(frozen=True)
class RPEConfig:
    """Encodings on queries, keys and values, each a `SingleRPEConfig` or None; they may differ from each other."""

    rpe_q: SingleRPEConfig | None = None
    rpe_k: SingleRPEConfig | None = None
    rpe_v: SingleRPEConfig | None = None

    def __post_init__(self) -> None:
        if self.rpe_v is not None and self.rpe_v.mode == "bias":
            raise ValueError('mode="bias" does not exist on values; use mode="ctx" there, or leave "v" out of rpe_on')


def get_single_rpe_config(
    ratio: Number = 1.9,
    method: str | METHOD = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    skip: int = 0,
    ndim: int = 2,
) -> SingleRPEConfig:
    """Configuration of one encoding; the arguments are explained at `get_rpe_config`."""
    ratios = tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio,)
    if not ratios or not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in ratios):
        raise ValueError(f"ratio={ratio!r}; expected a finite number above 0, such as 1.9, or one for each axis")
    alpha, beta, gamma = (
        tuple(float(ratio) * n for ratio in ratios) if len(ratios) > 1 else float(ratios[0]) * n for n in (1, 2, 8)
    )
    return SingleRPEConfig(_as_method(method), mode, shared_head, skip, alpha, beta, gamma, ndim)


def get_rpe_config(
    ratio: Number = 1.9,
    method: str | METHOD = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    skip: int = 0,
    rpe_on: str = "k",
    ndim: int = 2,
) -> RPEConfig:
    """Configuration of image RPE on queries, keys and values.

    # contextual product encodings on keys, all heads share one table, one class token: the paper's default
    >>> get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k").rpe_k.num_buckets
    50
    >>> # biases by row and by column, on queries and keys, each head its own, no class token
    >>> config = get_rpe_config(ratio=20, method="cross", mode="bias", shared_head=False, rpe_on="qk")
    >>> config = RPEConfig(rpe_k=get_single_rpe_config(method="product"), rpe_v=get_single_rpe_config(method="cross"))

    Args:
        ratio: scale of the piecewise index g (Eq. 18): alpha = ratio, beta = 2*ratio, gamma = 8*ratio, in tokens
            (in squared tokens for `quant`). Offsets up to alpha have their own bucket, farther ones share them
            logarithmically, and from gamma on all fall in bucket int(beta). At 14x14 tokens the paper uses 1.9 for
            product (49 buckets), 20 for euc and cross, 33 for quant. Product and cross take one for each axis, too.
        method: how the offset (dr, dc) of two tokens becomes a bucket (Sec. 3.2):
            "euc"      g(round(sqrt(dr^2 + dc^2))): the distance, without direction;
            "quant"    g(dr^2 + dc^2): the squared distance, which separates close neighbours better;
            "cross"    g(dr) and g(dc) in two tables whose encodings are added;
            "product"  the pair (g(dr), g(dc)): every direction has a bucket of its own.
        mode: "ctx" (or "contextual") looks buckets up in q @ table, so the encoding depends on content;
            "bias" adds one learned number for each bucket.
        shared_head: True gives all heads one table, False each head its own.
        skip: number of tokens in front of the map (class, distillation, register tokens). Every pair with one of
            them has a bucket of its own, the last one.
        rpe_on: where encodings are added, a non-empty set of the letters q, k, v: "k", "qk", "qkv", ...
        ndim: number of axes of the map, 1 to 4: 1 for sequences, 2 for images, 3 for video and volumes. Distances are
            those over all axes, product has a bucket for each tuple, cross a table for each axis.

    Returns `RPEConfig` with rpe_q, rpe_k, rpe_v, each a `SingleRPEConfig` or None.

    Raises:
        ValueError: unknown method, mode or letter; ratio not finite or not positive; negative skip; bias on values.
    """
    if not isinstance(rpe_on, str) or not rpe_on or len(set(rpe_on)) < len(rpe_on) or set(rpe_on) - set("qkv"):
        raise ValueError(f'rpe_on={rpe_on!r}; expected a non-empty set of the letters q, k, v, such as "k" or "qkv"')
    single = get_single_rpe_config(ratio, method, mode, shared_head, skip, ndim)
    return RPEConfig(**{f"rpe_{letter}": single for letter in rpe_on})


def piecewise_index(
    relative_position: Tensor, alpha: float, beta: float, gamma: float, dtype: torch.dtype = torch.long
) -> Tensor:
    """g(x) = round(x) if |x| <= alpha, else sign(x) * trunc(min(beta, round(alpha + (beta - alpha) * t))),
    with t = ln(|x| / alpha) / ln(gamma / alpha).

    >>> piecewise_index(torch.tensor([-9, -1, 0, 2, 40]), alpha=2, beta=4, gamma=16, dtype=torch.long)
    tensor([-3, -1,  0,  2,  4])

    Eq. 18 of the paper; `round` is half-to-even. Computed in float64 whatever the input, so every device agrees.

    Args:
        relative_position: real offsets of any shape, in tokens.
        alpha, beta, gamma: end of the exact part, largest index, offset that reaches it; alpha <= beta, alpha < gamma.
        dtype: of the result.
    """
    _check_piecewise(alpha, beta, gamma)
    x = relative_position.double()
    far = alpha + (x.abs().clamp(min=alpha) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    far = x.sign() * far.round().clamp(max=beta).trunc()
    return torch.where(x.abs() <= alpha, x.round(), far).to(dtype)


def get_num_buckets(method: str | METHOD, alpha: Number, beta: Number, gamma: Number, ndim: int = 2) -> int:
    """(2b + 1)^ndim for product and 2b + 1 otherwise, b = int(beta); for cross in each table; no skip bucket.

    >>> get_num_buckets("product", 1.9, 3.8, 15.2)
    49
    """
    method = _as_method(method)
    _check_numbers(method, alpha, beta, gamma, ndim)
    if -_AXES.get(method, -1) > ndim:
        raise ValueError(f"{method!r} sees axis {_AXES[method]}, but the map has {ndim}")
    sides = [2 * int(_of_axis(axis, beta)[0]) + 1 for axis in range(-ndim, 0)]
    if method == METHOD.CROSS and len(set(sides)) > 1:
        raise ValueError("cross has tables of different sizes here: ask for METHOD.CROSS_ROWS, METHOD.CROSS_COLS, ...")
    return math.prod(sides) if method == METHOD.PRODUCT else sides[_AXES.get(method, 0)]


def _parts(method: METHOD, offsets: Sequence[Tensor], alpha: Number, beta: Number, gamma: Number) -> tuple[Tensor, ...]:
    """The bucket of offsets, a tensor for each axis, as a sum of one term, or of one for each axis where it factors."""

    def g(x: Tensor, axis: int = -1) -> Tensor:
        a, b, c = _of_axis(axis, alpha, beta, gamma)
        return piecewise_index(x, a, b, c) + int(b)

    if method in (METHOD.EUCLIDEAN, METHOD.QUANT):
        squares = sum(x * x for x in offsets[1:]) + offsets[0] * offsets[0]
        return (g(squares if method == METHOD.QUANT else squares.double().sqrt().round()),)
    if method == METHOD.CROSS:
        raise ValueError("cross has a map for each axis: ask for METHOD.CROSS_ROWS, METHOD.CROSS_COLS, ...")
    if method == METHOD.PRODUCT:
        sides = [2 * int(_of_axis(axis - len(offsets), beta)[0]) + 1 for axis in range(len(offsets))]
        return tuple(g(x, axis - len(sides)) * math.prod(sides[axis + 1 :]) for axis, x in enumerate(offsets))
    own = len(offsets) + _AXES[method]
    return tuple(
        g(x, _AXES[method]) if axis == own else torch.zeros_like(x, dtype=torch.long) for axis, x in enumerate(offsets)
    )


class BucketMap(NamedTuple):
    """ids[i, j] = bucket of tokens i and j of a grid, kept as what they depend on: the offset of the two.

    >>> map = get_bucket_map("product", (128, 96), skip=1, alpha=1.9, beta=3.8, gamma=15.2)
    >>> map.offsets.shape, map.ids(torch.uint8).shape
    (torch.Size([446]), torch.Size([12289, 12289]))

    offsets: int32. Product and cross factor: bucket(dr, dc) = rows[h-1+dr] + columns[w-1+dc], and offsets are rows and
    columns, one after the other, (2h-1 + 2w-1,). Others: bucket(dr, dc) = offsets[h-1+dr, w-1+dc], (2h-1, 2w-1).
    size: (h, w), or one number for each axis, and then offsets have as many parts or axes; a sequence is (1, w).
    skip: number of tokens in front of the grid. num_buckets: N, the skip bucket counted. columns: where it factors, how
    many values the columns have, and rows are multiples of that; elsewhere 0.
    """

    offsets: Tensor
    size: tuple[int, ...]
    skip: int
    num_buckets: int
    columns: int

    def axes(self) -> tuple[Tensor, ...]:
        """One part of `offsets` for each axis; empty where the mapping does not factor."""
        return self.offsets.split([2 * n - 1 for n in self.size]) if self.offsets.dim() == 1 else ()

    def grid(self) -> Tensor:
        """The bucket of each offset, (2h-1, 2w-1)."""
        axes = self.axes()
        return functools.reduce(lambda grid, part: grid.unsqueeze(-1) + part, axes) if axes else self.offsets

    def ids(self, dtype: torch.dtype | None = None) -> Tensor:
        """(L, L), L = skip + h*w, of the smallest dtype unless told: for the formula, pictures and people."""
        n = self.num_buckets
        dtype = dtype or (torch.uint8 if n <= 2**8 else torch.int16 if n <= 2**15 else torch.int32)
        every = tuple(range(len(self.size)))
        windows = self.grid().to(dtype).flip(every)
        for axis in every:  # (h, w, h, w): keys as the query at (h-1-row, w-1-column) sees them
            windows = windows.unfold(axis, self.size[axis], 1)
        tokens = math.prod(self.size)
        ids = windows.flip(every).reshape(tokens, tokens)
        return F.pad(ids, (self.skip, 0, self.skip, 0), value=self.num_buckets - 1) if self.skip else ids


def get_bucket_map(
    method: str | METHOD, size: Sequence[int], skip: int, alpha: Number, beta: Number, gamma: Number
) -> BucketMap:
    """The `BucketMap` of a grid of size (h, w), or of any number of axes; the rest as in `get_bucket_ids_2d`."""
    method, skip = _as_method(method), _as_int(skip, "skip", 0)
    names = ("height", "width") if len(size) == 2 else ("size",) * len(size)
    size = tuple(_as_int(n, name, 1) for n, name in zip(size, names, strict=True))
    num_buckets = get_num_buckets(method, alpha, beta, gamma, len(size)) + (skip > 0)
    if len(size) == 1:  # one row, which is what operators take
        size, method = (1, *size), METHOD.CROSS_COLS if method == METHOD.PRODUCT else method
    if method in (METHOD.EUCLIDEAN, METHOD.QUANT):  # neither sees signs, so a quarter is computed
        ahead = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        (offsets,) = _parts(method, ahead, alpha, beta, gamma)
        for axis, n in enumerate(size):
            offsets = torch.cat([offsets.flip(axis).narrow(axis, 0, n - 1), offsets], axis)
    else:
        along = [torch.arange(1 - n, n).view(-1, *[1] * (len(size) - 1 - axis)) for axis, n in enumerate(size)]
        parts = _parts(method, along, alpha, beta, gamma)
        offsets = torch.cat([part.flatten() for part in parts]) if len(parts) > 1 else parts[0]
    return BucketMap(offsets.int(), size, skip, num_buckets, _columns(method, beta))


def _columns(method: METHOD, beta: Number) -> int:
    """`BucketMap.columns`."""
    side = 2 * int(_of_axis(-1, beta)[0]) + 1
    return {METHOD.PRODUCT: side, METHOD.CROSS_COLS: side}.get(method, int(method in _AXES))


def get_bucket_ids_2d(
    method: str | METHOD,
    height: int,
    width: int,
    skip: int,
    alpha: Number,
    beta: Number,
    gamma: Number,
    dtype: torch.dtype = torch.long,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """ids[i, j] = bucket of query token i and key token j; the last bucket where one of them is a skip token.

    >>> ids, num_buckets = get_bucket_ids_2d("product", height=14, width=9, skip=1, alpha=1.9, beta=3.8, gamma=15.2)
    >>> ids.shape, num_buckets
    (torch.Size([127, 127]), 50)

    Args:
        method: any but cross, whose two tables are `METHOD.CROSS_ROWS` and `METHOD.CROSS_COLS`.
        height, width: of the map, in tokens, at least 1; tokens are in row-major order.
        skip: number of tokens in front of the map.
        alpha, beta, gamma: as in `piecewise_index`.

    Returns ids (L, L) with L = skip + height*width, and the number of buckets with the skip bucket counted.
    """
    bucket_map = get_bucket_map(method, (height, width), skip, alpha, beta, gamma)
    return bucket_map.ids(dtype).to(device), bucket_map.num_buckets


def get_bucket_ids(
    method: str | METHOD,
    positions: Tensor,
    key_positions: Tensor,
    skip: int,
    alpha: Number,
    beta: Number,
    gamma: Number,
) -> tuple[Tensor, int]:
    """ids[..., i, j] = bucket of the offset positions[..., i, :] - key_positions[..., j, :], for tokens of any places.

    >>> places = torch.tensor([[-1, -1], [0, 0], [0, 5]])  # a class token and two tokens that were kept
    >>> get_bucket_ids("product", places, places, skip=1, alpha=1.9, beta=3.8, gamma=15.2)[0]
    tensor([[49, 49, 49],
            [49, 24, 21],
            [49, 27, 24]])

    Args:
        method: any but cross, as in `get_bucket_ids_2d`.
        positions, key_positions: (..., Lq, 2) and (..., Lk, 2): row and column in tokens, whole numbers or not; or any
            other number of axes. A first number below 0 marks a token without a place (class token, padding): its
            pairs have the last bucket, if skip > 0.

    Returns ids (..., Lq, Lk) and the number of buckets, on a full grid those of `get_bucket_ids_2d`.
    """
    for places in (positions, key_positions):
        if places.dim() < 2 or not 0 < places.shape[-1] == positions.shape[-1] <= len(_AXES):
            raise ValueError(f"positions have shape {tuple(places.shape)}; expected (..., L, 2): row and column")
    offsets = (positions.double().unsqueeze(-2) - key_positions.double().unsqueeze(-3)).unbind(-1)  # (..., Lq, Lk) each
    num_buckets = get_num_buckets(method, alpha, beta, gamma, len(offsets))
    ids = sum(_parts(_as_method(method), offsets, alpha, beta, gamma), torch.zeros((), dtype=torch.long))
    placed = (positions[..., 0] >= 0).unsqueeze(-1) & (key_positions[..., 0] >= 0).unsqueeze(-2)
    # in a compiled graph the id of a bucket that is not there is outside the table, which every operator refuses
    if not skip and not torch.compiler.is_compiling() and not placed.all():
        raise ValueError("a row of positions is negative: tokens without a place need skip > 0 in the configuration")
    return ids.where(placed, num_buckets), num_buckets + (skip > 0)


def _cells(size: Sequence[int], device: torch.device) -> list[Tensor]:
    """The place of each token of a grid, in row-major order, (tokens,) for each axis."""
    cells = torch.arange(functools.reduce(operator.mul, size), device=device)
    places: list[Tensor] = []
    for n in reversed(size):
        places.insert(0, cells % n)
        cells = cells // n
    return places


def _build(kind: str, mapping: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """`BucketMap.offsets`, or ids (L, L), of a mapping "method skip alpha beta gamma"; symbolic sizes stay symbols."""
    method, skip, *numbers = mapping.split()
    piecewise: Any = (tuple(map(float, text.split(","))) if "," in text else float(text) for text in numbers)
    bucket_map = get_bucket_map(method, size, int(skip), *piecewise)
    if kind != "symbols":
        made = bucket_map.offsets if kind == "offsets" else bucket_map.ids(torch.long if kind == "saved" else None)
        return made.to(device)
    size, grid = bucket_map.size, bucket_map.grid().to(device, torch.long)
    places = zip(_cells(size, device), size, strict=True)
    ids = grid[tuple(place.unsqueeze(1) - place + (n - 1) for place, n in places)]
    return F.pad(ids, (int(skip), 0, int(skip), 0), value=bucket_map.num_buckets - 1)


def _build_aside(*key: Any) -> Tensor:
    """`_build` in a thread of its own, which no mode of the caller reaches and no trace records: a plain tensor."""
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(_build, *key).result()


_kept = functools.lru_cache(64)(_build_aside)  # offsets, where rpe_ops is absent
# compiled graphs ask rpe_ops: torch 2.11 would say True in all of them
_is_exporting = torch.compiler.is_exporting if _constants is None else _constants.is_exporting


def _to_onnx() -> bool:
    """Whether torch's older exporter of ONNX records a trace."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def _is_open(size: Any) -> bool:
    """Whether a size may be another one when an ONNX file is run."""
    return isinstance(size, Tensor) and _to_onnx()


def _open_ids(mapping: str, num_buckets: int, columns: int, size: tuple[Any, ...], device: torch.device) -> Tensor:
    """ids (L, L) for the sizes that an ONNX file is run with, by operators of integers, which every runtime has."""
    method, skip, _, _, gamma = mapping.split()
    reach = max(map(float, gamma.split(",")))  # farther offsets have its bucket; of quant it is a square
    ends = (math.ceil(math.sqrt(reach) if method == "quant" else reach) + 2,) * len(size)
    offsets = _build_aside("offsets", mapping, ends, device)
    ends, size = ((1, *ends), (1, *size)) if len(size) == 1 else (ends, size)
    grid = BucketMap(offsets, ends, int(skip), num_buckets, columns).grid()
    places = zip(_cells(size, device), ends, strict=True)
    ids = grid[tuple((place.unsqueeze(1) - place).clamp(1 - n, n - 1) + (n - 1) for place, n in places)]
    return F.pad(ids.long(), (int(skip), 0, int(skip), 0), value=num_buckets - 1)


def _bucket_map(
    mapping: str, num_buckets: int, columns: int, skip: int, size: tuple[int, ...], x: Tensor
) -> BucketMap | Tensor:
    """The map on x's device, which `rpe_ops` keeps; ids where it has more than two axes, where its size varies in a
    graph, and in graphs that are saved for others to run.
    """
    if any(map(_is_open, size)):
        return _open_ids(mapping, num_buckets, columns, size, x.device)
    saved = _is_exporting() or torch.jit.is_tracing()
    kind = "saved" if saved else "offsets" if len(size) <= 2 else "ids"
    varies = type(x).__name__ == "FakeTensor"
    if torch.compiler.is_compiling():
        numbers = None if _constants is None else _constants.numbers_of(size)
        varies, size = numbers is None, size if numbers is None else numbers
    if varies:
        return _build("symbols", mapping, size, x.device)
    if _constants is not None:
        built = _constants.made(_build_aside, kind, mapping, size, x.device)
    elif torch.compiler.is_compiling():
        built = _build(kind, mapping, size, x.device)
    else:
        built = (_kept if kind == "offsets" else _build_aside)(kind, mapping, size, x.device)
    if kind != "offsets":
        return built
    return BucketMap(built, (1, *size)[-2:], skip, num_buckets, columns)


def _size(
    tokens: Any, single: SingleRPEConfig, height: Size = None, width: Size = None, size: Axes = None
) -> tuple[int, ...]:
    """Of the map behind `tokens` tokens, checked: `size` or (height, width), without them one row or a square."""
    ndim, skip = single.ndim, single.skip
    if size is not None and (height, width) != (None, None):
        raise ValueError(f"height={height}, width={width} and size={size}: give one or the other")
    if (height is None) != (width is None):
        raise ValueError(f"height={height}, width={width}: give both or neither")
    if height is not None:
        size = (height, width)  # type: ignore[assignment]
    if size is None:
        rest = (tokens if ndim == 1 else operator.index(tokens)) - skip  # a row may be of any length in a graph
        side = rest if ndim == 1 else math.isqrt(max(rest, 0))
        if rest < 1 or ndim > 2 or side**ndim != rest:
            remedy = "pass height= and width=" if ndim == 2 else "pass size="
            raise ValueError(
                f"{tokens} tokens with skip={skip} leave {rest} for the map, which is not a square: "
                f"{remedy}, or set skip in the configuration"
            )
        if _is_open(tokens):
            side = ((tokens - skip) ** (1 / ndim)).round().long()
        return (side,) * ndim
    axes: Any = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    if len(axes) != ndim:
        raise ValueError(f"size={axes}, but the configuration has ndim={ndim}; expected {ndim} numbers")
    names = ("height", "width") if ndim == 2 else tuple(f"size[{axis}]" for axis in range(ndim))
    axes = tuple(map(_as_int, axes, names, (1,) * ndim))
    if (total := skip + functools.reduce(operator.mul, axes)) != tokens:
        factors = " * ".join(f"{name}={n}" for n, name in zip(axes, names, strict=True))
        raise ValueError(f"skip={skip} + {factors} = {total} tokens, but the input has {tokens}")
    return axes


def _rpe_index(input: Tensor, where: BucketMap | Tensor) -> Tensor:
    """Y[b, h, i, j] = input[b, h, i, ids[i, j]]: (B, H, Lq, N), a map or ids (.., Lq, Lk) -> (B, H, Lq, Lk)."""
    if _takes(where):
        return _operators.rpe_index(input, where)
    ids = where if isinstance(where, Tensor) else where.ids(torch.long)
    if ids.dim() == 4:  # one map for each sample, and biases for all of them
        input = input.expand(ids.shape[0], -1, -1, -1)
    if _to_onnx():  # which may take the number of samples for a constant: it comes from what is computed
        return input.gather(-1, ids.long() + 0 * (input[..., :1] > 0))
    return input.gather(-1, ids.long().expand(*input.shape[:2], *ids.shape[-2:]))


def _rpe_bucket_sum(input: Tensor, where: BucketMap | Tensor, num_buckets: int) -> Tensor:
    """S[b, h, i, n] = sum of input[b, h, i, j] over j with ids[i, j] = n: (B, H, Lq, Lk) -> (B, H, Lq, N)."""
    if _takes(where):
        return _operators.rpe_bucket_sum(input, where, num_buckets)
    ids = where if isinstance(where, Tensor) else where.ids(torch.long)
    if _to_onnx():  # whose scatter_add keeps the last one alone before opset 16; a product with Lq * Lk * N numbers
        member = ids.unsqueeze(-1) == torch.arange(num_buckets, device=ids.device)  # (.., Lq, Lk, N)
        return (input.unsqueeze(-2) @ member.to(input.dtype)).squeeze(-2)
    zeros = input.new_zeros(*input.shape[:3], num_buckets)
    return zeros.scatter_add(-1, ids.long().expand(input.shape), input)


def _takes(where: BucketMap | Tensor) -> bool:
    """Whether `rpe_ops` has the pair: for one map of all samples, outside of graphs that others run without it."""
    one_map = not isinstance(where, Tensor) or where.dim() == 2
    return _operators is not None and one_map and not _is_exporting() and not torch.jit.is_tracing()


class iRPE(nn.Module):
    """y[b,h,i,j] = (x @ W)[b,h,i,ids[i,j]], or bias[h,ids[i,j]]; on values y[b,h,i] = sum_j x[b,h,i,j] W[h,ids[i,j]].

    >>> rpe_k = iRPE(head_dim=64, num_heads=6, rpe_config=get_single_rpe_config(skip=1))
    >>> rpe_k(torch.randn(2, 6, 1 + 14 * 9, 64), height=14, width=9).shape
    torch.Size([2, 6, 127, 127])

    The encoding of the paper's Sec. 3.2, for every mapping but cross (see `iRPE_Cross`). Tables start at zero, so a new
    module changes nothing. Weights are summed by bucket before they meet W: O(L^2 + L N D), never a (L, L, D) tensor.

    Args:
        head_dim, num_heads: D, and H' the number of tables (1 when all heads share one).
        mode, method: those of `rpe_config` unless given.
        transposed: True for an encoding on keys or queries, False for the one on values.
        num_buckets: N; derived, and checked when given.
        initializer: called with the zero table, changes it in place; tables stay zero without one.
        rpe_config: `SingleRPEConfig`; the default of `get_single_rpe_config` when absent. device, dtype: of the table.
    The parameter is `lookup_table_bias` (H', N), or `lookup_table_weight` (H', D, N), on values (H', N, D).
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 8,
        mode: str | None = None,
        method: str | METHOD | None = None,
        transposed: bool = True,
        num_buckets: int | None = None,
        initializer: Callable[[Tensor], Any] | None = None,
        rpe_config: SingleRPEConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = get_single_rpe_config() if rpe_config is None else rpe_config
        chosen = (_as_method(given.method if method is None else method), given.mode if mode is None else mode)
        # field by field: a configuration that a second copy of this file has made is as good
        numbers, ndim = (given.alpha, given.beta, given.gamma), getattr(given, "ndim", 2)
        config = SingleRPEConfig(*chosen, given.shared_head, given.skip, *numbers, ndim)
        if config.method == METHOD.CROSS:
            raise ValueError("method cross has two tables: use iRPE_Cross, or build_rpe, which chooses")
        if config.mode == "bias" and not transposed:
            raise ValueError('mode="bias" does not exist on values; use mode="ctx" there')
        if num_buckets not in (None, config.num_buckets):
            raise ValueError(f"num_buckets={num_buckets}, but the configuration has {config.num_buckets}: leave it out")
        self.head_dim, self.num_heads = _as_int(head_dim, "head_dim", 1), _as_int(num_heads, "num_heads", 1)
        # text: torch.compile would turn floats into inputs of the graph
        texts = (",".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in numbers)
        self._mapping = " ".join((_METHOD_NAMES[config.method], str(config.skip), *texts))
        self.rpe_config, self.num_buckets = config, config.num_buckets
        self.method, self.mode = config.method, config.mode
        self._columns = _columns(config.method, config.beta)
        self.transposed, self.initializer = transposed, initializer
        inner = (self.head_dim, self.num_buckets) if transposed else (self.num_buckets, self.head_dim)
        shape = (self.num_heads, self.num_buckets) if self.mode == "bias" else (self.num_heads, *inner)
        name = "lookup_table_bias" if self.mode == "bias" else "lookup_table_weight"
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def table(self) -> nn.Parameter:
        """The one parameter, under either of its names."""
        return getattr(self, "lookup_table_bias" if self.mode == "bias" else "lookup_table_weight")

    def reset_parameters(self) -> None:
        """Set the table to zero, then call the initializer if there is one."""
        with torch.no_grad():
            self.table.zero_()
            if self.initializer is not None:
                self.initializer(self.table)

    def tables(
        self, x: Tensor, height: Size = None, width: Size = None, *, size: Axes = None, positions: Places = None
    ) -> list[tuple[Tensor, BucketMap | Tensor]]:
        """Pairs (table, map) that x is encoded with: one here, for cross one for each axis. A fused kernel needs these.

        table is W, (H', D, N), on values (H', N, D), or (1, H', L, N) biases. map is a `BucketMap`; with positions,
        more than two axes, and in graphs that are saved or have sizes that vary, ids (L, L), by sample (B, 1, L, L).
        """
        table = self.table
        self._check(x, positions, table)
        if positions is not None and (height, width, size) != (None, None, None):
            given = f"height={height}, width={width}" if size is None else f"size={size}"
            raise ValueError(f"{given} and positions: give one or the other")
        where: BucketMap | Tensor
        if positions is None:
            axes = _size(x.shape[2], self.rpe_config, height, width, size)
            where = _bucket_map(self._mapping, self.num_buckets, self._columns, self.rpe_config.skip, axes, x)
        else:
            where = self._ids_at(x, positions)
        bias = self.mode == "bias"
        return [(table[None, :, None, :].expand(1, -1, x.shape[2], -1) if bias else table, where)]

    def _ids_at(self, x: Tensor, positions: Any) -> Tensor:
        own, others = positions if isinstance(positions, tuple) else (positions, positions)
        for at, tokens in ((own, x.shape[2]), (others, others.shape[-2] if self.transposed else x.shape[3])):
            n = self.rpe_config.ndim
            if at.dim() not in (2, 3) or at.shape[-2:] != (tokens, n) or (at.dim() == 3 and len(at) != len(x)):
                got = tuple(at.shape)
                raise ValueError(f"positions have shape {got}; expected ({tokens}, {n}) or (B, {tokens}, {n})")
        c = self.rpe_config
        ids, _ = get_bucket_ids(c.method, own, others, c.skip, c.alpha, c.beta, c.gamma)
        return ids.unsqueeze(1) if ids.dim() == 3 else ids

    def forward(
        self, x: Tensor, height: Size = None, width: Size = None, *, size: Axes = None, positions: Places = None
    ) -> Tensor:
        """Encoding of x; what x is and what comes out depends on where the encoding is.

        Args:
            x: on keys the scaled queries and on queries the scaled keys, (B, H, L, D); on values the attention
                weights (B, H, L, L). Floating point, on the table's device, and of its dtype outside autocast.
            height, width: of the map in tokens; without them L - skip has to be a square.
            size: instead, one number for each axis, (frames, height, width); a sequence needs none.
            positions: instead, where the tokens are, as `get_bucket_ids` takes it: (L, 2), or (B, L, 2) where samples
                differ. A pair of such tensors is (of the tokens of x, of the others): queries and keys may
                be others, and of other numbers.

        Returns:
            (B, H, L, L) to be added to the attention (for the one on queries transposed first), (1, H', L, L) in bias
            mode; on values (B, H, L, D) to be added to the output.
        """
        ((table, where),) = self.tables(x, height, width, size=size, positions=positions)
        if self.transposed:
            return _rpe_index(table if self.mode == "bias" else x @ table, where)
        return _rpe_bucket_sum(x, where, self.num_buckets) @ table

    def _check(self, x: Tensor, positions: Places, table: Tensor) -> None:
        where, expected = ("q or k", "(B, H, L, D)") if self.transposed else ("v", "(B, H, L, L)")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"the input is {got}; expected a real floating-point tensor {expected}")
        if x.dim() != 4:
            raise ValueError(f"the input has shape {tuple(x.shape)}; an encoding on {where} expects {expected}")
        last = self.head_dim if self.transposed else x.shape[2 if positions is None else 3]
        if x.shape[3] != last:
            raise ValueError(f"the input has shape {tuple(x.shape)}; expected {expected} with last size {last}")
        if self.num_heads != 1 and self.num_heads != x.shape[1]:  # torch 2.11 compiles `in` of symbols wrongly
            raise ValueError(f"the input has {x.shape[1]} heads, but there are tables for {self.num_heads}")
        if x.device != table.device:
            raise ValueError(f"the input is on {x.device}, the table on {table.device}: move one of them")
        if x.dtype != table.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"the input is {x.dtype}, the table {table.dtype}: convert one, or use autocast")

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks this of every module of a model before it reads one."""
        raise TypeError("torch.jit.script cannot read iRPE: use torch.jit.trace, torch.export or torch.onnx.export")

    def extra_repr(self) -> str:
        where, alpha = "on queries or keys" if self.transposed else "on values", self.rpe_config.alpha
        alphas = "x".join(f"{a:g}" for a in (alpha if isinstance(alpha, tuple) else (alpha,)))
        return (
            f"{_METHOD_NAMES[self.method]}, {self.mode}, {where}, head_dim={self.head_dim}, num_heads={self.num_heads}"
            f", num_buckets={self.num_buckets}, skip={self.rpe_config.skip}, alpha={alphas}"
            f"{'' if self.rpe_config.ndim == 2 else f', ndim={self.rpe_config.ndim}'}"
        )


class iRPE_Cross(nn.Module):
    """y = rp_rows(x) + rp_cols(x): the cross method, one `iRPE` for row offsets and one for column offsets.

    >>> config = get_single_rpe_config(20, "cross", skip=1)
    >>> iRPE_Cross("cross", head_dim=64, num_heads=1, rpe_config=config)(torch.randn(2, 6, 50, 64)).shape
    torch.Size([2, 6, 50, 50])

    With `ndim` axes the modules are the last `ndim` of rp_time, rp_depth, rp_rows, rp_cols. Arguments, inputs and
    outputs are those of `iRPE`.
    """

    def __init__(
        self, method: str | METHOD, head_dim: int, num_heads: int = 8, mode: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        if _as_method(method) != METHOD.CROSS:
            raise ValueError(f"method {method!r} has one table: use iRPE")
        given = kwargs.get("rpe_config")
        ndim = 2 if given is None else getattr(given, "ndim", 2)
        self._names = _CROSS_PARTS[-ndim:]
        for name, method in zip(self._names, list(_AXES)[-ndim:], strict=True):
            self.add_module(name, iRPE(head_dim, num_heads, mode, method, **kwargs))
        *others, last = self.parts()
        self.method, self.mode, self.transposed = METHOD.CROSS, last.mode, last.transposed
        self.head_dim, self.num_heads = last.head_dim, last.num_heads
        # of each; None where a ratio for each axis makes them differ
        self.num_buckets = last.num_buckets if all(part.num_buckets == last.num_buckets for part in others) else None

    def parts(self) -> list[iRPE]:
        """The module of each axis."""
        return [self._modules[name] for name in self._names]  # type: ignore[misc]

    def tables(self, x: Tensor, *size: Any, **options: Any) -> list[tuple[Tensor, BucketMap | Tensor]]:
        """The pairs (table, map) of rows and of columns, see `iRPE.tables`."""
        return [pair for part in self.parts() for pair in part.tables(x, *size, **options)]

    def forward(
        self, x: Tensor, height: Size = None, width: Size = None, *, size: Axes = None, positions: Places = None
    ) -> Tensor:
        """rp_rows(x) + rp_cols(x), see `iRPE.forward`."""
        first, *others = (part(x, height, width, size=size, positions=positions) for part in self.parts())
        return sum(others, first)


RPEModule = iRPE | iRPE_Cross


def build_rpe(
    config: RPEConfig | None,
    head_dim: int,
    num_heads: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[RPEModule | None, RPEModule | None, RPEModule | None]:
    """(rpe_q, rpe_k, rpe_v): the modules of a configuration, None where there is no encoding.

    >>> build_rpe(get_rpe_config(skip=1), head_dim=64, num_heads=6)[1].lookup_table_weight.shape
    torch.Size([1, 64, 50])

    Args:
        config: from `get_rpe_config`; None gives (None, None, None).
        head_dim, num_heads: D and H of the attention, at least 1; device, dtype: of the tables.
    """
    head_dim, num_heads = _as_int(head_dim, "head_dim", 1), _as_int(num_heads, "num_heads", 1)
    if config is None:
        return None, None, None
    if not all(hasattr(config, f"rpe_{letter}") for letter in "qkv"):
        remedy = ": irpe.rpe_config_from_string(config, skip=...) is one" if isinstance(config, str) else ""
        raise TypeError(f"config is {config!r}; expected what get_rpe_config returns, or None{remedy}")

    def build(single: SingleRPEConfig | None, transposed: bool) -> RPEModule | None:
        if single is None:
            return None
        num_tables = 1 if single.shared_head else num_heads
        rest: dict[str, Any] = dict(transposed=transposed, rpe_config=single, device=device, dtype=dtype)
        if single.method == METHOD.CROSS:
            return iRPE_Cross(METHOD.CROSS, head_dim, num_tables, **rest)
        return iRPE(head_dim, num_tables, **rest)

    return build(config.rpe_q, True), build(config.rpe_k, True), build(config.rpe_v, False)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: RPEModule | None = None,
    rpe_k: RPEModule | None = None,
    rpe_v: RPEModule | None = None,
    *,
    height: Size = None,
    width: Size = None,
    size: Axes = None,
    positions: Places = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """p = dropout(softmax(scale q k^T + rpe_k(scale q) + rpe_q(scale k)^T + mask)), out = p v + rpe_v(p).

    >>> q, k, v = torch.randn(3, 2, 6, 1 + 14 * 9, 64)
    >>> rpe_q, rpe_k, rpe_v = build_rpe(get_rpe_config(skip=1, rpe_on="qkv"), head_dim=64, num_heads=6)
    >>> rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v, height=14, width=9).shape
    torch.Size([2, 6, 127, 64])

    Args:
        q, k, v: (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D), any strides, q not scaled. Lq = Lk without positions.
        rpe_q, rpe_k, rpe_v: what `build_rpe` returned, modules or None.
        height, width: of the map in tokens; without them L - skip has to be a square.
        size: instead, one number for each axis, such as (frames, height, width).
        positions: instead, where the tokens are, (L, 2) or (B, L, 2), or a pair of such tensors for queries and keys,
            see `get_bucket_ids`. Where samples differ nothing is fused: the kernels read one map for all.
        scale: of the dot products, D ** -0.5 by default.
        attn_mask: broadcasts to (B, H, Lq, Lk). Boolean: True takes part. Floating: added to the scores. A row without
            any key gets zero weights, so its output is 0 (as `F.scaled_dot_product_attention` has it), never NaN.
        dropout_p: probability that an attention weight is dropped; pass 0.0 in evaluation.
        backend: "cpu" and "cuda" (C++) and "triton" are the fused kernels of `rpe_ops`, "eager" plain torch's formula;
            "sdpa" hands the sum of encodings and mask to `F.scaled_dot_product_attention` (nothing on values);
            "reference" is the law. A name is honoured or refused. None takes what is fused where it runs (see
            `rpe_ops.rpe_attention.choose`), "sdpa" where nothing is trained and there is no rpe_v, else "eager".
    Returns (B, H, Lq, D).
    """
    rpe = _Encodings.of(q, k, rpe_q, rpe_k, rpe_v, dict(height=height, width=width, size=size, positions=positions))
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask is {attn_mask.dtype}; expected bool (True takes part) or floating point (added)")
    in_tensors = ("cpu", "cuda", "triton", "reference")
    if backend not in (None, *in_tensors, "eager", "sdpa"):
        raise ValueError(f'unknown backend {backend!r}; expected None, "eager", "sdpa" or one of {in_tensors}')
    if backend == "sdpa" and rpe_v is not None:
        raise ValueError('backend="sdpa" returns no attention weights, which an encoding on values needs; use "eager"')
    why_not = rpe.why_not_in_operators()
    if why_not and backend in in_tensors:
        raise ValueError(f'backend="{backend}" {why_not}')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    records = _is_exporting() or torch.jit.is_tracing()  # what others run without rpe_ops or gradients
    in_operators, name = not why_not and not records, backend
    if backend is None:
        name = _attention.choose(q, k, attn_mask) if in_operators else "eager"
    # dropped weights depend on the seed alone where rpe_ops draws them, also for its formula
    if name in in_tensors or (in_operators and name == "eager" and dropout_p > 0):
        options = dict(scale=scale, attn_mask=attn_mask, dropout_p=dropout_p, backend=name, or_eager=backend is None)
        return _attention.rpe_attention(q, k, v, *rpe.tables(q, k), **options)[0]
    bias, empty = rpe.bias(q * scale, k * scale, attn_mask)
    trains = not records and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    # in forward mode, which sdpa lacks; the name is private, and without it sdpa says so
    trains = trains or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0
    if backend == "sdpa" or (backend is None and rpe_v is None and not trains):
        bias = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale)
        return out if empty is None else out.masked_fill(empty, 0.0)
    return rpe.formula(q * scale, k, v, bias, empty, lambda weights: F.dropout(weights, dropout_p))[0]


class _Encodings(NamedTuple):
    """The encodings of one attention, and where its tokens are: attention written out."""

    q: RPEModule | None
    k: RPEModule | None
    v: RPEModule | None
    of_q: dict[str, Any]  # height, width, size and positions for an encoding of the queries' tokens: those on k and v
    of_k: dict[str, Any]  # and for the one on q

    @staticmethod
    def of(q: Tensor, k: Tensor, rpe_q: Any, rpe_k: Any, rpe_v: Any, places: dict[str, Any]) -> _Encodings:
        """Checked; places are height, width, size and positions as `rpe_attention` takes them."""
        for name, rpe, transposed in (("rpe_q", rpe_q, True), ("rpe_k", rpe_k, True), ("rpe_v", rpe_v, False)):
            if rpe is not None and rpe.transposed is not transposed:
                where = "keys or queries" if rpe.transposed else "values"
                raise ValueError(f"{name} is an encoding for {where}: {rpe}")
        positions = places["positions"]
        if positions is None:
            if q.shape[2] != k.shape[2] and not (rpe_q is None and rpe_k is None and rpe_v is None):
                raise ValueError(
                    f"{q.shape[2]} queries and {k.shape[2]} keys; an encoding expects the same tokens, or positions="
                )
            return _Encodings(rpe_q, rpe_k, rpe_v, places, places)
        at_q, at_k = positions if isinstance(positions, tuple) else (positions, positions)
        return _Encodings(
            rpe_q, rpe_k, rpe_v, places | dict(positions=(at_q, at_k)), places | dict(positions=(at_k, at_q))
        )

    def why_not_in_operators(self) -> str:
        """Why `rpe_ops` cannot take the attention, as the end of a sentence; "" where it can."""
        if _attention is None:
            return f"needs rpe_ops, which is absent ({RPE_OPS_MISSING})"
        some = [rpe for rpe in self[:3] if rpe is not None]
        if some and any(places.dim() > 2 for places in self.of_q["positions"] or ()):
            return 'takes one map for all samples; use "eager" for positions (B, L, 2)'
        for rpe in some:
            for part in (rpe, *rpe.parts()) if isinstance(rpe, iRPE_Cross) else (rpe,):
                hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
                if any(hooks) or "forward" in part.__dict__ or type(part) not in (iRPE, iRPE_Cross):
                    return 'reads the tables, without the hooks or the forward of an encoding; use "eager"'
        return ""

    def tables(self, q: Tensor, k: Tensor) -> tuple[list, list, list]:
        """(table, map) on q and on k, (map, table) on v: the arguments of `rpe_ops`."""
        on_q = [] if self.q is None else self.q.tables(k, **self.of_k)
        on_k = [] if self.k is None else self.k.tables(q, **self.of_q)
        if self.v is None:
            return on_q, on_k, []
        on_v = self.v.tables(q[:1, :, :, :1].expand(-1, -1, -1, k.shape[2]), **self.of_q)  # shaped as weights are
        return on_q, on_k, [(where, table) for table, where in on_v]

    def bias(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores, (.., Lq, Lk), and which rows have no key, (.., Lq, 1); q and k are scaled."""
        bias = None if self.k is None else self.k(q, **self.of_q)
        if self.q is not None:
            on_q = self.q(k, **self.of_k).transpose(-2, -1)
            bias = on_q if bias is None else bias + on_q
        if mask is None:
            return bias, None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
        mask = mask.to(q.dtype)  # first: finfo.min of a wider dtype is -inf in q's
        empty = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(empty, 0.0)  # such rows stay finite, and are cleared afterwards
        return mask if bias is None else bias + mask, empty

    def formula(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Any, empty: Tensor | None, drop: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(out, weights), (B, H, Lq, D) and (B, H, Lq, Lk), of scaled q, what `bias` has returned, and a dropout."""
        scores = q @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if empty is not None:
            weights = weights.masked_fill(empty, 0.0)
        weights = drop(weights)
        out = weights @ v
        return (out if self.v is None else out + self.v(weights, **self.of_q)), weights
