"""What every run can be told: the options that its process, its loop, its folder and its log read."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import option

PANELS = ("Data", "Model", "Recipe", "Augmentation", "Machine", "Checkpoints and logs")  # of --help, in this order
DATA, MODEL, RECIPE, AUGMENT, MACHINE, KEEP = PANELS
DIGITS = "digits"  # the data that is built in


@dataclass(frozen=True)
class RunSettings:
    """The options that all commands have which train on data; each adds its own."""

    data: str = field(metadata={"free": True})

    epochs: int = option(50, RECIPE, "Epochs of the schedule.", low=1)
    batch_size: int = option(
        8, RECIPE, "Images of one step, over all processes and accumulated batches together.", low=1
    )
    accumulate: int = option(1, RECIPE, "Batches whose gradients make one step.", low=1)
    seed: int = option(0, RECIPE, "All random numbers follow from it.", low=0)
    max_steps: int = option(0, RECIPE, "Stop after this many steps of the schedule; 0 is off.", low=0, free=True)

    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:1, mps.", free=True)
    amp: str = option("none", MACHINE, "Mixed precision; losses are float32.", choices=("none", "bf16", "fp16"))
    loader_timeout: int = option(
        600,
        MACHINE,
        "Seconds to wait for a batch of the processes that read images before giving up; 0 is for ever.",
        low=0,
        free=True,
    )

    save_every: int = option(0, KEEP, "Steps between checkpoints within an epoch; 0 is none.", low=0, free=True)
    keep: int = option(
        2, KEEP, "Checkpoints that are kept, the last ones; the best weights are kept besides.", low=1, free=True
    )
    log_every: int = option(50, KEEP, "Steps between lines of log.jsonl.", low=1, free=True)
    tensorboard: bool = option(True, KEEP, "Log for TensorBoard too, where its package is installed.", free=True)
    # not --log, which is the beginning of several options of torchrun, so that it would refuse the command
    track: tuple[str, ...] = option(
        (),
        KEEP,
        "Log to wandb or mlflow too (repeatable), as their own settings say where; a run that goes on does so there.",
        choices=("wandb", "mlflow"),
        free=True,
    )
    plots: bool = option(True, KEEP, "Draw curves at the end, and learned encodings of a classifier.", free=True)


def usually(name: str, default: Any) -> Any:
    """The option of this name in `RunSettings`, with the default of another command."""
    return dataclasses.field(default=default, metadata=RunSettings.__dataclass_fields__[name].metadata)


def refuse_two_digits(data: str) -> None:
    """Refuses `digits` where a folder has that name, too.

    Raises:
        ValueError: there is such a folder here.
    """
    if data == DIGITS and Path(DIGITS).is_dir():
        raise ValueError(
            "digits: there is a folder of this name here; write ./digits for the folder, and for the built-in digits "
            "run irpe in another one"
        )
