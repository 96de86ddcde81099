"""Settings from files: what --config gives, and what a run that goes on was told before."""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .files import parse_json, read_json, read_text, reason_of
from .folder import SETTINGS, Kind, resumed, run_of
from .options import flag, values_of
from .settings import RunSettings

Fetches = Callable[[Any], list[str]]  # names of settings whose values would be fetched, or let something be fetched


def read_config(path: Path, cls: type) -> dict[str, Any]:
    """The options in a file: `name: value` in YAML or JSON, by the names of options, or the settings.json of a run.

    >>> read_config(Path("mine.yaml"), Settings)  # batch-size: 64
    {'batch_size': 64}

    Raises:
        ValueError: it is no such file, or it has a name or a value that no option has.
    """
    values = _parsed(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options; expected lines such as batch-size: 64")
    if isinstance(values.get("settings"), dict):
        values = values["settings"]
    hints = get_type_hints(cls)
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        several = value if isinstance(value, list) else [value]
        if not all(item is None or isinstance(item, (str, int, float)) for item in several):
            raise ValueError(f"{path}: {key} is nested; expected a value, or a list of values")
        found[name] = _as(hints.get(name), value)
    try:
        return values_of(cls, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parsed(path: Path) -> Any:
    if path.suffix == ".json":
        return parse_json(read_text(path), path)
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {reason_of(error)}") from None


def _as(kind: Any, value: Any) -> Any:
    """What is meant by a value where YAML has another type: 1e-4 is text to it, and 224 is no text."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is tuple:
        return [_as(kinds[0], item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and str in kinds:
        return str(value)
    return value


def told_before(resume: str, kind: Kind) -> dict[str, Any]:
    """The settings of the run that --resume names, by its folder or a checkpoint in it; none of another checkpoint.

    Raises:
        ValueError: there is no such run.
    """
    folder = run_of(resumed(resume, kind), kind)
    if folder is None:
        return {}
    try:
        return dataclasses.asdict(kind.recorded(read_json(folder / SETTINGS)))
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}") from None


def from_files(config: Path | None, resume: str | None, kind: Kind, cls: type) -> dict[str, Any]:
    """What --config or the run of --resume gives, under what the command line says.

    Raises:
        ValueError: both do, or one of them is wrong.
    """
    before = told_before(resume, kind) if resume not in (None, "auto") else {}
    if config is None:
        return before
    if before:
        raise ValueError(f"--config {config}: the run of --resume {resume} has its settings; leave one of them out")
    return read_config(config, cls)


def check_fetched(settings: RunSettings, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuses settings that only a file names and that would be fetched: it may be anybody's.

    Args:
        given: names of the settings that the command line gives.
        names: those whose values would be fetched.

    Raises:
        ValueError: with what to say.
    """
    if strange := [name for name in names if name not in given]:
        words = on_command_line(settings, strange)
        raise ValueError(f"what a file names is not fetched: say {words} on the command line too, if you trust it")


def on_command_line(settings: RunSettings, names: Iterable[str]) -> str:
    """How these settings are given to a command."""
    words: list[str] = []
    for name in names:
        value = getattr(settings, name)
        words += [value] if name == "data" else [flag(name)] if value is True else [flag(name), str(value)]
    return shlex.join(words)


def as_yaml(settings: Any) -> str:
    """All settings as --config takes them."""
    import yaml

    values: Mapping[str, Any] = dataclasses.asdict(settings)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None))
