"""All settings of a detection run as one frozen dataclass: the options of the command, the recipes, a run's JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.options import check, flag, from_dict, option
from ..runs.settings import DATA, DIGITS, KEEP, MACHINE, MODEL, RECIPE, RunSettings

RPE = "rpe-2.0-product-ctx-1-k"  # the paper's for DETR


@dataclass(frozen=True)
class Settings(RunSettings):
    """One run. The defaults fine-tune a DETR on a folder; `RECIPES` has others."""

    recipe: str = "finetune"
    train_json: str | None = option(None, DATA, "Annotations to train on, where they lie elsewhere.", free=True)
    val_json: str | None = option(None, DATA, "Annotations to evaluate on.", free=True)
    train_images: str | None = option(None, DATA, "Folder of the images to train on.", free=True)
    val_images: str | None = option(None, DATA, "Folder of the images to evaluate on.", free=True)
    orientation: str = option(
        "displayed",
        DATA,
        "What boxes are drawn on where EXIF turns a picture and its size does not tell: displayed or stored.",
        choices=("displayed", "stored"),
    )
    train_scenes: int = option(2000, DATA, "Built-in scenes to train on.", low=1)
    val_scenes: int = option(300, DATA, "Built-in scenes to evaluate on.", low=1)
    digit_classes: int = option(
        1, DATA, "Categories of the built-in scenes: 1 (digit) or 10 (which one).", choices=(1, 10)
    )
    size: int = option(800, DATA, "Shorter side of the images in pixels, 0 as they are.", low=0)
    max_size: int = option(1333, DATA, "Longer side at most.", low=1)
    train_size: tuple[int, ...] = option(
        (), DATA, "Shorter side in training, drawn among those given (repeatable); --size by default.", low=1
    )
    crop: float = option(0.0, DATA, "Share of images of which training sees a random piece.", low=0, high=1)
    hflip: float = option(0.5, DATA, "Share of images flipped left to right in training.", low=0, high=1)

    model: str = option(
        "small", MODEL, "small: from random weights in minutes. r50: DETR with a ResNet-50.", choices=("small", "r50")
    )
    pretrained: str | None = option(
        None,
        MODEL,
        "A folder of save_pretrained, a name on the hub such as facebook/detr-resnet-50, or a checkpoint of the "
        "release.",
    )
    backbone: str | None = option(None, MODEL, "Weights of the ResNet of --model r50: hub (timm's), or a file.")
    rpe: str | None = None  # an iRPE in the encoder, or "none"; None is as the pretrained model has it
    positions: str | None = option(
        None,
        MODEL,
        "Absolute positions of encoder and decoder: sine or none. Default: as --pretrained has them, else sine.",
        choices=("sine", "none"),
    )
    d_model: int = option(64, MODEL, "Width of --model small.", low=8)
    layers: int = option(2, MODEL, "Of its encoder and of its decoder.", low=1)
    queries: int = option(100, MODEL, "Of --model small.", low=1)
    dropout: float = option(0.1, MODEL, "Of --model small.", low=0, high=0.99)

    lr: float = option(1e-4, RECIPE, "Peak learning rate.", low=0)
    backbone_lr: float = option(1e-5, RECIPE, "Peak learning rate of the backbone.", low=0)
    lr_drop: int = option(
        0, RECIPE, "Epochs after which learning rates fall to a tenth; 0 is half a cosine to zero.", low=0
    )
    warmup_steps: int = option(100, RECIPE, "Steps of linear warm-up.", low=0)
    weight_decay: float = option(1e-4, RECIPE, "Of all weights but the tables of iRPE.", low=0)
    clip_grad: float = option(0.1, RECIPE, "Largest norm of the gradient; 0 is off.", low=0)

    loader_workers: int = option(0, MACHINE, "Processes that read images, for each training process.", low=0, free=True)
    eval_batch_size: int = option(8, MACHINE, "Images of one batch of one process in evaluation.", low=1, free=True)

    eval_every: int = option(1, KEEP, "Epochs between measurements.", low=1, free=True)
    draw: int = option(8, KEEP, "Images in predictions.png.", low=0, free=True)

    def __post_init__(self) -> None:
        check(self)
        if self.d_model % 8:
            raise ValueError(f"--d-model {self.d_model}; expected a multiple of 8")
        if self.rpe not in (None, "none"):
            from ..config_io import rpe_config_from_string  # torch, which --help does without

            rpe_config_from_string(self.rpe)
        for name in ("train_size", "crop"):
            if getattr(self, name) and not self.size:
                raise ValueError(f"{flag(name)} with --size 0, which leaves images as they are; give --size too")


RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {},
    # DETR from a pretrained ResNet (Carion et al., ECCV 2020, and its published code, for 300 epochs), with the
    # learning rate falling after two thirds of 150 as well
    "detr": dict(
        model="r50", train_size=tuple(range(480, 801, 32)), crop=0.5, epochs=150, lr_drop=100, batch_size=16,
        warmup_steps=0,
    ),
    # of the built-in scenes; found by trying learning rates without iRPE: docs/detect.md has the figures
    DIGITS: dict(
        queries=6, dropout=0.0, size=0, hflip=0.0, epochs=16, batch_size=16, lr=7e-4, backbone_lr=7e-4, clip_grad=1.0,
        eval_batch_size=20, eval_every=4,
    ),
}  # fmt: skip


def unused(options: Mapping[str, Any], settings: Settings, *, released: bool) -> list[str]:
    """Sentences about options that were given and that nothing would use.

    Args:
        released: whether --pretrained is a checkpoint of the release, and not a folder or a name on the hub.
    """
    found = []

    def refuse(names: Iterable[str], why: str) -> None:
        if given := [flag(name) for name in names if name in options]:
            found.append(f"{', '.join(given)}: {why}; leave {'it' if len(given) == 1 else 'them'} out")

    of_small = ("d_model", "layers", "queries", "dropout")
    if settings.pretrained is not None:
        refuse(of_small, f"the model is that of --pretrained {settings.pretrained}")
        if not released or settings.model != "r50":
            refuse(("model",), f"the model is that of --pretrained {settings.pretrained}")
    elif settings.model != "small":
        refuse(of_small, f"--model {settings.model} has its own")
    if settings.data == DIGITS:
        places = ("train_json", "val_json", "train_images", "val_images", "orientation")
        refuse(places, "the built-in scenes have no files")
    else:
        refuse(("train_scenes", "val_scenes", "digit_classes"), f"only of the built-in scenes ({DIGITS})")
    if not settings.size:
        refuse(("max_size",), "--size 0 leaves images as they are")
    return found


def fetched(settings: Settings) -> list[str]:
    """Names of the settings whose values would be fetched: weights that are no files here."""
    names = ("pretrained", "backbone")
    return [name for name in names if (value := getattr(settings, name)) is not None and not Path(value).exists()]


def settings_from(options: Mapping[str, Any], recipe: str | None = None) -> Settings:
    """The settings of a recipe, by default the one for the data, with these options in place of its own."""
    recipe = recipe or (DIGITS if options["data"] == DIGITS else "finetune")
    if recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe}; expected one of {', '.join(RECIPES)}")
    return Settings(**{**RECIPES[recipe], **options, "recipe": recipe})


def settings_from_dict(values: Mapping[str, Any]) -> Settings:
    """The settings that `dataclasses.asdict` and JSON have made into plain values."""
    return from_dict(Settings, values)


def is_record(values: Mapping[str, Any]) -> bool:
    """Whether these are the settings.json of a run of `irpe detect`, of this version or of one that had fewer."""
    return {"data", "recipe", "train_scenes", "digit_classes", "rpe", "queries"} <= set(values)
