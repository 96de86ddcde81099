"""All settings of a run as one frozen dataclass: the options of the command, the recipes, and the JSON of a run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runs.elsewhere import loading_arguments
from ..runs.options import check, from_dict, option
from ..runs.settings import AUGMENT, DATA, MACHINE, MODEL, RECIPE, RunSettings, usually

_OWN_OPTIONS = {
    "img_size": "--img-size", "in_chans": "--in-chans", "num_classes": "--num-classes",
    "drop_path_rate": "--drop-path", "pretrained": "--pretrained",
}  # fmt: skip


@dataclass(frozen=True)
class Settings(RunSettings):
    """One run. The defaults are DeiT's recipe (Touvron et al., ICML 2021), which the paper of iRPE trains with.

    >>> settings_from("small", {"data": "digits", "epochs": 5}).batch_size
    64
    """

    recipe: str = "deit"
    data_dir: str | None = option(
        None, DATA, "Where data sets with a name (torch/, hfds/, wds/) lie or are kept.", free=True
    )
    download: bool = option(False, DATA, "Let torchvision download a data set that is not there.", free=True)
    train_split: str | None = option(None, DATA, "Split to train on, where the data names its splits itself.")
    val_split: str | None = option(None, DATA, "Split to evaluate on, where the data names its splits itself.")
    val_share: float = option(
        0.0, DATA, "Hold this share of every class out for evaluation, where DATA has no val.", low=0, high=0.9
    )
    split_seed: int = option(0, DATA, "What --val-share holds out follows from it alone, not from --seed.", low=0)
    num_classes: int = option(0, DATA, "Number of classes, where the data cannot tell (wds/).", low=0)
    train_samples: int = option(0, DATA, "Images of an epoch, where the data cannot tell (wds/).", low=0)
    bad_images: str = option(
        "stop",
        DATA,
        "What an unreadable image does; skip goes on and counts them.",
        choices=("stop", "skip"),
        free=True,
    )
    verify: bool = option(
        False, DATA, "Read every image once before anything else, and report all bad ones.", free=True
    )

    model: str = option("deit_small_patch16_224", MODEL, "Name of a model of timm.")
    rpe: str = option("none", MODEL, "An iRPE such as rpe-1.9-product-ctx-1-k, or none.")
    pretrained: str | None = option(None, MODEL, "Weights to start from: a file, the folder of a run, or hub (timm's).")
    img_size: str | None = option(
        None, MODEL, "Side in pixels, or HEIGHTxWIDTH such as 224x320; the model's own by default."
    )
    in_chans: int = option(3, MODEL, "Channels of the images: 3 or 1 (grey).", low=1, high=3)
    model_arg: tuple[str, ...] = option(
        (), MODEL, "More arguments of the model, such as depth=6 or patch_size=8 (repeatable)."
    )
    drop_path: float = option(0.1, MODEL, "Stochastic depth.", low=0, high=0.99)
    mean: tuple[float, ...] = option((), MODEL, "Mean to subtract, a number for each channel; the model's by default.")
    std: tuple[float, ...] = option((), MODEL, "Deviation to divide by, in the same way.")
    crop_pct: float = option(
        0.0, MODEL, "Share of the resized image that evaluation looks at; 0 is the model's own.", low=0, high=1
    )

    epochs: int = usually("epochs", 300)
    batch_size: int = usually("batch_size", 1024)
    lr: float = option(0.0, RECIPE, "Peak learning rate; 0 is --base-lr x batch size / 512.", low=0)
    base_lr: float = option(5e-4, RECIPE, "Peak learning rate for 512 images.", low=0)
    min_lr: float = option(1e-5, RECIPE, "Learning rate at the end.", low=0)
    warmup_lr: float = option(1e-6, RECIPE, "Learning rate at the start.", low=0)
    warmup_epochs: float = option(
        5.0, RECIPE, "Epochs of linear warm-up; without this option at most a quarter of --epochs.", low=0
    )
    sched: str = option("cosine", RECIPE, "Schedule, by timm's name: cosine, step, poly, constant, ...")
    opt: str = option("adamw", RECIPE, "Optimizer, by timm's name: adamw, lamb, sgd, muon, ...")
    weight_decay: float = option(0.05, RECIPE, "Of matrices; none on biases, norms and positions.", low=0)
    rpe_weight_decay: float = option(0.0, RECIPE, "Of the tables of iRPE.", low=0)
    rpe_lr_scale: float = option(1.0, RECIPE, "Learning rate of the tables of iRPE, relative to the others.", low=0)
    layer_decay: float = option(
        0.0, RECIPE, "Learning rates shrink by this factor layer by layer; 0 is off.", low=0, high=1
    )
    clip_grad: float = option(0.0, RECIPE, "Largest norm of the gradient; 0 is off.", low=0)
    smoothing: float = option(0.1, RECIPE, "Label smoothing.", low=0, high=0.99)
    ema: float = option(
        0.99996, RECIPE, "Decay of the moving average of the weights; 0 is off.", low=0, high=0.999999999
    )

    mixup: float = option(0.8, AUGMENT, "Alpha of mixup; 0 is off.", low=0)
    cutmix: float = option(1.0, AUGMENT, "Alpha of cutmix; 0 is off.", low=0)
    mixup_prob: float = option(1.0, AUGMENT, "Share of batches that are mixed.", low=0, high=1)
    mixup_switch: float = option(0.5, AUGMENT, "Share of cutmix where both are on.", low=0, high=1)
    auto_augment: str = option("rand-m9-mstd0.5-inc1", AUGMENT, "timm's string for RandAugment and others, or none.")
    color_jitter: float = option(0.4, AUGMENT, "Where --auto-augment is none.", low=0)
    erase: float = option(0.25, AUGMENT, "Share of images with random erasing.", low=0, high=1)
    repeats: int = option(
        3, AUGMENT, "Repeated augmentation: copies of each image in an epoch of as many steps.", low=1
    )
    crop_scale: float = option(
        0.08,
        AUGMENT,
        "Smallest share of the area that a training crop keeps; 1 keeps all of a picture that has the shape of the "
        "images, and of another one the largest piece of that shape, in its middle.",
        low=0.01,
        high=1,
    )
    hflip: float = option(0.5, AUGMENT, "Share of images flipped left to right.", low=0, high=1)
    vflip: float = option(0.0, AUGMENT, "Share of images flipped upside down.", low=0, high=1)
    interpolation: str = option(
        "bicubic", AUGMENT, "Of the resizing.", choices=("bicubic", "bilinear", "nearest", "random")
    )

    compile: bool = option(False, MACHINE, "torch.compile, in training.")
    channels_last: bool = option(False, MACHINE, "Memory order of images and convolutions.")
    grad_checkpointing: bool = option(False, MACHINE, "Compute activations twice and keep fewer of them.")
    parallel: str = option("ddp", MACHINE, "How processes of torchrun share the model.", choices=("ddp", "fsdp"))
    loader_workers: int = option(
        -1,
        MACHINE,
        "Processes that read images, for each training process; 0 is none, -1 as many as there are cores, at most 8.",
        low=-1,
        free=True,
    )
    eval_batch_size: int = option(
        0, MACHINE, "Images of one batch of one process in evaluation; 0 is that of training.", low=0, free=True
    )

    def __post_init__(self) -> None:
        check(self)
        if self.parallel == "fsdp" and self.amp == "fp16":
            raise ValueError("--parallel fsdp with --amp fp16 cannot tell overflows in one process; use --amp bf16")
        if self.in_chans == 2:
            raise ValueError("--in-chans 2; expected 3 or 1 (grey)")
        for name, numbers in (("--mean", self.mean), ("--std", self.std)):
            if len(numbers) not in (0, self.in_chans):
                raise ValueError(f"{name} has {len(numbers)} numbers; expected {self.in_chans}, one for each channel")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs:g}; expected fewer than --epochs {self.epochs}")
        self.size()
        self.model_kwargs()

    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images in pixels, or None for the model's own."""
        if self.img_size is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.img_size)
        if match is None or not int(match[1]) or match[2] == "0":
            raise ValueError(
                f"--img-size {self.img_size!r}; expected a number such as 224, or HEIGHTxWIDTH as in 224x320"
            )
        return int(match[1]), int(match[2] or match[1])

    def model_kwargs(self) -> dict[str, Any]:
        """--model-arg as arguments: numbers, booleans and tuples such as 7x7 or (2,2,6,2) as such, all else as text.

        There is no None: `timm.create_model` drops it, and `pos_embed=none` means the text.
        """
        found: dict[str, Any] = {}
        for text in self.model_arg:
            name, equals, value = text.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--model-arg {text!r}; expected name=value such as depth=6")
            if name in _OWN_OPTIONS:
                raise ValueError(f"--model-arg {text}: write {_OWN_OPTIONS[name]} {value} in its place")
            if loading_arguments([name]):
                raise ValueError(f"--model-arg {text}: {name} is about loading; --pretrained FILE names weights")
            found[name] = _value(value)
        return found

    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return self.lr or self.base_lr * self.batch_size / 512


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    inside = text.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
    if re.fullmatch(r"\d+(x\d+)+", inside):
        return tuple(int(side) for side in inside.split("x"))
    parts = [part.strip() for part in inside.removesuffix(",").split(",")]
    if ("," in inside or inside != text.strip()) and not any(isinstance(_number(part), str) for part in parts):
        return tuple(_number(part) for part in parts)
    return _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


RECIPES: dict[str, dict[str, Any]] = {
    "deit": {},
    # for a data set of some thousands to some hundred thousands of pictures, from pretrained weights
    "finetune": dict(
        epochs=30, batch_size=256, base_lr=1e-4, min_lr=1e-6, warmup_epochs=2.0, layer_decay=0.75, mixup=0.0,
        cutmix=0.0, auto_augment="rand-m7-mstd0.5-inc1", erase=0.1, repeats=1, crop_scale=0.35, ema=0.0, clip_grad=1.0,
    ),
    # from random weights, where an epoch is too short for strong augmentation and slow averages
    "small": dict(
        epochs=100, batch_size=64, lr=1e-3, warmup_epochs=5.0, drop_path=0.0, mixup=0.0, cutmix=0.0,
        auto_augment="none", color_jitter=0.0, erase=0.0, repeats=1, crop_scale=0.6, hflip=0.0, ema=0.0, clip_grad=1.0,
    ),
}  # fmt: skip


def settings_from(recipe: str, options: Mapping[str, Any]) -> Settings:
    """The settings of a recipe with these options in place of its own."""
    if recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe}; expected one of {', '.join(RECIPES)}")
    values: dict[str, Any] = {**RECIPES[recipe], **options, "recipe": recipe}
    if "warmup_epochs" not in options:
        usual, epochs = (values.get(name, getattr(Settings, name)) for name in ("warmup_epochs", "epochs"))
        values["warmup_epochs"] = min(usual, epochs / 4)
    return Settings(**values)


def settings_from_dict(values: Mapping[str, Any]) -> Settings:
    """The settings that `dataclasses.asdict` and JSON have made into plain values."""
    if isinstance(values, Mapping) and "split_seed" not in values and values.get("val_share"):
        values = {**values, "split_seed": values.get("seed", 0)}  # runs of before it existed
    return from_dict(Settings, values)
