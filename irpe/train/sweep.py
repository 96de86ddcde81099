"""The rows of the paper's Tables 1 to 4: encodings to train one after the other, with the paper's figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runs.files import read_json
from ..runs.folder import SETTINGS
from ..runs.options import changed
from ..runs.report import RESULT
from . import compare
from .run import read_record
from .settings import Settings, settings_from_dict


@dataclass(frozen=True)
class Row:
    """What a row is called, its encoding ("none" without), the paper's top-1 on ImageNet, and options of its own."""

    title: str
    rpe: str
    paper: float
    options: tuple[str, ...] = ()

    def name(self, seed: int) -> str:
        """The folder of its run with a seed."""
        return f"{self.rpe}{'-no-positions' if self.options else ''}-seed{seed}"


_WITHOUT = Row("without", "none", 79.9)
_NO_POSITIONS = ("--model-arg", "pos_embed=none")
_ON = {"none": (79.9, 77.6), "q": (80.9, 80.9), "k": (80.9, 80.9), "v": (80.2, 80.2), "qk": (81.1, 81.0)}
_ON |= {"qkv": (81.4, 81.3)}
_METHODS = {"euc": (20, 80.1, 80.4), "quant": (33, 80.3, 80.5), "cross": (20, 80.5, 80.8), "product": (1.9, 80.5, 80.9)}


def _on(where: str) -> str:
    return "none" if where == "none" else f"rpe-1.9-product-ctx-1-{where}"


# biases of each head and contextual tables that heads share, where the paper does not say: see docs/reproduce.md
TABLES: dict[int, tuple[Row, ...]] = {
    1: (
        _WITHOUT,
        *(Row(f"{name}, bias", f"rpe-{ratio}-{name}-bias-0-k", bias) for name, (ratio, bias, _) in _METHODS.items()),
        *(Row(f"{name}, contextual", f"rpe-{ratio}-{name}-ctx-1-k", ctx) for name, (ratio, _, ctx) in _METHODS.items()),
    ),
    2: (
        Row("bias, each head", "rpe-1.9-product-bias-0-k", 80.54),
        Row("bias, shared", "rpe-1.9-product-bias-1-k", 80.05),
        Row("contextual, each head", "rpe-1.9-product-ctx-0-k", 80.99),
        Row("contextual, shared", "rpe-1.9-product-ctx-1-k", 80.89),
    ),
    3: (
        Row("clip, bias", "rpe-1.9-product-bias-1-k-clip", 80.1),
        Row("clip, contextual", "rpe-1.9-product-ctx-1-k-clip", 80.9),
        Row("piecewise, bias", "rpe-1.9-product-bias-1-k", 80.0),
        Row("piecewise, contextual", "rpe-1.9-product-ctx-1-k", 80.9),
    ),
    4: (
        *(Row(f"learned, {where}", _on(where), learned) for where, (learned, _) in _ON.items()),
        *(Row(f"no positions, {where}", _on(where), no, _NO_POSITIONS) for where, (_, no) in _ON.items()),
    ),
}


def unfinished(wanted: Mapping[tuple[Row, int], Settings], out: Path) -> list[tuple[Row, int]]:
    """Those of the wanted runs, by row and seed, that have not ended yet.

    Raises:
        ValueError: what lies in a run's folder is of other data or of other settings.
    """
    found = []
    for (row, seed), settings in wanted.items():
        folder = out / row.name(seed)
        if not (folder / SETTINGS).exists():
            found.append((row, seed))
            continue
        record = read_record(folder)
        old = settings_from_dict(record["settings"])
        differences = [f"DATA was {old.data}, is {settings.data}"] if _place(old) != _place(settings) else []
        if differences := differences + changed(old, settings):
            raise ValueError(f"{folder} is of a run with other settings: {'; '.join(differences)}. Use another --out")
        steps = record["steps_per_epoch"] * settings.epochs
        steps = min(steps, settings.max_steps or steps)
        result = folder / RESULT
        if not result.exists() or step_of(result) < steps:
            found.append((row, seed))
    return found


def step_of(result: Path) -> int:
    """The last step of a run, as its result.json has it."""
    values = read_json(result)
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError(f"{result} is not of a run of irpe train, or it is damaged")
    return values["step"]


def _place(settings: Settings) -> Path:
    return Path(settings.data).absolute()


def measured(row: Row, seeds: int, out: Path) -> list[float]:
    """Top-1 of each seed at the end of its run, in percent."""
    return [compare.load(out / row.name(seed)).epochs[-1]["val"]["top1"] for seed in range(seeds)]
