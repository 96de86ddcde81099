"""Configurations as strings, `rpe-1.9-product-ctx-1-k`, and as plain values that JSON can hold."""

import dataclasses
import re
from typing import Any

from .irpe import _METHOD_NAMES, Number, RPEConfig, SingleRPEConfig, get_rpe_config


def rpe_config_from_string(text: str, *, skip: int = 0) -> RPEConfig:
    """`"rpe-{ratio}-{method}-{mode}-{shared_head 0 or 1}-{rpe_on}"` as a configuration; `skip` comes beside it.

    >>> rpe_config_from_string("rpe-2.0-product-ctx-1-k", skip=1) == get_rpe_config(2.0, "product", "ctx", True, 1, "k")
    True

    Maps of other than two axes add their number, `rpe-1.9-product-ctx-1-k-3d`; a ratio for each axis stands with an x
    between them, `rpe-1.0x1.9x1.9-product-ctx-1-k-3d`.

    With `-clip` at the very end offsets are clipped in place of sharing buckets logarithmically, as in Shaw et al.
    (NAACL 2018): index max(-b, min(b, round(x))) with b = int(2 * ratio), so as many buckets as without (the paper's
    Table 3).

    A text of another form, or with a value that `get_rpe_config` refuses, is a ValueError.
    """
    match = re.fullmatch(r"rpe-([^-]+)-([^-]+)-([^-]+)-([01])-([^-]+)(?:-(\d+)d)?(-clip)?", text)
    try:
        if match is None:
            raise ValueError("it has another form")
        ratios, method, mode, shared_head, rpe_on, ndim, clip = match.groups()
        ratio: Number = tuple(map(float, ratios.split("x"))) if "x" in ratios else float(ratios)
        config = get_rpe_config(ratio, method, mode, shared_head == "1", skip, rpe_on, int(ndim or 2))
        return _clipped(config) if clip else config
    except ValueError as error:
        raise ValueError(
            f"{text!r}: {error}; expected rpe-RATIO-METHOD-MODE-SHARED-ON such as 'rpe-2.0-product-ctx-1-k', perhaps "
            "with -3d (the number of axes) and -clip at its end"
        ) from None


def _clipped(config: RPEConfig) -> RPEConfig:
    """With alpha = beta, from where on all offsets are in the last bucket."""
    clipped = {}
    for name, single in vars(config).items():
        if single is not None:
            beta = single.beta
            last = tuple(float(int(n)) for n in beta) if isinstance(beta, tuple) else float(int(beta))
            clipped[name] = dataclasses.replace(single, alpha=last, beta=last)
    return RPEConfig(**clipped)


def rpe_config_to_string(config: RPEConfig) -> str:
    """The string form of a configuration, without its `skip`: the inverse of `rpe_config_from_string`.

    >>> rpe_config_to_string(get_rpe_config(2.0, rpe_on="qk"))
    'rpe-2.0-product-ctx-1-qk'

    Configurations that differ between q, k and v have none (ValueError), nor has alpha : beta : gamma but 1 : 2 : 8,
    clipped or not.
    """
    singles = {name[-1]: single for name, single in vars(config).items() if single is not None}
    first = next(iter(singles.values()), None)
    if first is None or any(other != first for other in singles.values()):
        raise ValueError(f"{config} has no string form: q, k and v have different configurations, or none")
    mode = first.mode.replace("contextual", "ctx")
    gammas = first.gamma if isinstance(first.gamma, tuple) else (first.gamma,)
    ratio = "x".join(str(gamma / 8) for gamma in gammas)
    text = f"rpe-{ratio}-{_METHOD_NAMES[first.method]}-{mode}-{int(first.shared_head)}-{''.join(singles)}"
    text += "" if first.ndim == 2 else f"-{first.ndim}d"
    for form in (text, text + "-clip"):
        if rpe_config_from_string(form, skip=first.skip) == config:
            return form
    raise ValueError(f"{config} has no string form: alpha : beta : gamma is not 1 : 2 : 8")


def rpe_config_to_dict(config: RPEConfig) -> dict[str, Any]:
    """The three encodings as nested plain values; `rpe_config_from_dict` gives an equal configuration back."""
    return {
        name: None if single is None else dataclasses.asdict(single) | {"method": _METHOD_NAMES[single.method]}
        for name, single in vars(config).items()
    }


def rpe_config_from_dict(fields: dict[str, Any]) -> RPEConfig:
    """The configuration that `rpe_config_to_dict` wrote."""
    return RPEConfig(**{name: None if single is None else SingleRPEConfig(**single) for name, single in fields.items()})
