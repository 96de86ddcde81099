"""Settings of a run as a frozen dataclass whose fields are the options of a command, checked, and kept as JSON."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

S = TypeVar("S")


def option(
    default: Any,
    panel: str,
    words: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    free: bool = False,
) -> Any:
    """A field that is an option: its panel and words in --help, its bounds; `free` ones may differ in a resumed run."""
    return dataclasses.field(
        default=default,
        metadata={"panel": panel, "help": words, "low": low, "high": high, "choices": choices, "free": free},
    )


def flag(name: str) -> str:
    """The option of a field: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def check(settings: Any) -> None:
    """Refuses values out of the bounds of their fields.

    Raises:
        ValueError: with the option, its value and what was expected.
    """
    for field in dataclasses.fields(settings):
        value, rules = getattr(settings, field.name), field.metadata
        if "help" not in rules or value is None:
            continue
        said = f"{flag(field.name)} {value}; expected"
        several = value if isinstance(value, tuple) else (value,)
        if rules["choices"] and (strange := [one for one in several if one not in rules["choices"]]):
            said = f"{flag(field.name)} {strange[0]}; expected one of"
            again = ", and the option once for each" if isinstance(value, tuple) else ""
            raise ValueError(f"{said} {', '.join(map(str, rules['choices']))}{again}")
        for number in several:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{said} a finite number")
            if rules["low"] is not None and number < rules["low"]:
                raise ValueError(f"{said} at least {rules['low']:g}")
            if rules["high"] is not None and number > rules["high"]:
                raise ValueError(f"{said} at most {rules['high']:g}")


def values_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from JSON or YAML as the fields of these settings hold them.

    Raises:
        ValueError: a name that no settings have, or a value that its field does not take.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    if strange := sorted(set(map(str, values)) - set(known)):
        near = difflib.get_close_matches(strange[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown settings {', '.join(strange)}: of another version, or misspelt{meant}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hints = get_type_hints(cls)
    for name, value in plain.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{flag(name)} is {value!r} in the file; expected {_words(hints[name])}")
    return plain


def _words(kind: Any) -> str:
    """A type as users know it."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return " or ".join(map(_words, get_args(kind))) or names.get(kind, str(kind))


def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
    """The settings that `dataclasses.asdict` and JSON have made into plain values.

    Raises:
        ValueError: a name or a value that no settings have.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"the settings are {type(values).__name__}; expected names and values")
    try:
        return cls(**values_of(cls, values))
    except TypeError as error:
        raise ValueError(f"the settings are damaged or not of irpe: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of the type of a field."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if inner:  # X | None
        return any(_fits(value, kind) for kind in inner)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def changed(old: S, new: S) -> list[str]:
    """`--option was A, is B` for each setting that has to be the same when a run goes on, and is not."""
    return [
        f"{flag(field.name)} was {getattr(old, field.name)}, is {getattr(new, field.name)}"
        for field in dataclasses.fields(old)  # type: ignore[arg-type]
        if getattr(old, field.name) != getattr(new, field.name) and not field.metadata.get("free", False)
    ]
