"""All settings of a detection run as one frozen dataclass: the options of the command and the JSON of a run."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config_io import rpe_config_from_string

DIGITS = "digits"  # the data that is built in
MODELS = ("small", "r50")
RPE = "rpe-2.0-product-ctx-1-k"  # the paper's for DETR
FREE = ("device", "loader_workers", "eval_every", "save_every", "keep", "log_every", "draw", "max_steps")


@dataclass(frozen=True)
class Settings:
    """One run. Defaults are for fine-tuning a DETR on a folder; those of the digits come from `settings_from`."""

    data: str
    train_json: str | None = None
    val_json: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    train_scenes: int = 2000  # of the digits
    val_scenes: int = 300
    digit_classes: int = 1

    model: str = "small"
    pretrained: str | None = None
    backbone: str | None = None  # weights: hub or a file
    rpe: str | None = None  # None: as the pretrained model has it
    d_model: int = 64
    layers: int = 2
    queries: int = 100
    dropout: float = 0.1

    size: int = 800  # pixels of the shorter side; 0 leaves pictures as they are
    max_size: int = 1333
    train_size: tuple[int, ...] = ()  # shorter sides to draw from in training
    hflip: float = 0.5

    epochs: int = 50
    batch_size: int = 8
    lr: float = 1e-4
    backbone_lr: float = 1e-5
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    clip_grad: float = 0.1
    seed: int = 0
    max_steps: int = 0

    device: str = "auto"
    loader_workers: int = 0
    eval_batch_size: int = 8
    eval_every: int = 1  # epochs
    save_every: int = 0  # steps within an epoch
    keep: int = 2
    log_every: int = 50
    draw: int = 8

    def __post_init__(self) -> None:
        least = {
            "train_scenes": 1, "val_scenes": 1, "d_model": 8, "layers": 1, "queries": 1, "size": 0, "max_size": 1,
            "epochs": 1, "batch_size": 1, "lr": 0, "backbone_lr": 0, "weight_decay": 0, "warmup_steps": 0,
            "clip_grad": 0, "seed": 0, "max_steps": 0, "loader_workers": 0, "eval_batch_size": 1, "eval_every": 1,
            "save_every": 0, "keep": 1, "log_every": 1, "draw": 0, "hflip": 0, "dropout": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < low:
                raise ValueError(f"{flag(name)} {value}; expected at least {low}")
        if self.hflip > 1 or self.dropout >= 1:
            raise ValueError(
                f"--hflip {self.hflip}, --dropout {self.dropout}; expected shares up to 1, dropout below it"
            )
        if self.digit_classes not in (1, 10):
            raise ValueError(f"--digit-classes {self.digit_classes}; expected 1 or 10")
        if self.model not in MODELS:
            raise ValueError(f"--model {self.model}; expected one of {', '.join(MODELS)}")
        if self.d_model % 8:
            raise ValueError(f"--d-model {self.d_model}; expected a multiple of 8")
        if self.rpe not in (None, "none"):
            rpe_config_from_string(self.rpe)
        if any(one < 1 for one in self.train_size):
            raise ValueError(f"--train-size {self.train_size}; expected numbers of pixels")
        if self.train_size and not self.size:
            raise ValueError("--train-size with --size 0, which leaves pictures as they are; give --size too")


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


# found by trying learning rates without iRPE; docs/detect.md has the figures
_DIGITS: dict[str, Any] = dict(
    queries=6, dropout=0.0, size=0, hflip=0.0, epochs=16, batch_size=16, lr=7e-4, backbone_lr=7e-4, clip_grad=1.0,
    eval_batch_size=20, eval_every=4,
)  # fmt: skip


def settings_from(options: Mapping[str, Any]) -> Settings:
    """The settings of the data's kind (digits, or a folder) with these options in place of its own."""
    found: dict[str, Any] = {**(_DIGITS if options["data"] == DIGITS else {}), **options}
    return Settings(**found)


def settings_from_dict(values: Mapping[str, Any]) -> Settings:
    """The settings that `dataclasses.asdict` and JSON have made into plain values."""
    known = {one.name for one in dataclasses.fields(Settings)}
    if strange := sorted(set(values) - known):
        raise ValueError(f"unknown settings {', '.join(strange)}: they were written by another version")
    found: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
    return Settings(**found)


def changed(old: Settings, new: Settings) -> list[str]:
    """`--option was A, is B` for each setting that has to be the same when a run goes on, and is not."""
    return [
        f"{flag(one.name)} was {getattr(old, one.name)}, is {getattr(new, one.name)}"
        for one in dataclasses.fields(Settings)
        if getattr(old, one.name) != getattr(new, one.name) and one.name not in FREE
    ]
