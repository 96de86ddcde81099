"""`irpe export`: a trained classifier as one file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.files import counted
from ..runs.options import flag
from ..train.settings import RECIPES, Settings, settings_from, settings_from_dict
from .options import given, sentences, with_settings

_OF_MODEL = (
    *("model", "rpe", "pretrained", "in_chans", "num_classes", "model_arg", "img_size"),
    *("mean", "std", "crop_pct"),
)


def _export(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder that irpe train DATA wrote; or give --model and --pretrained.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write: .pt2 (torch.export) or .onnx. Default: model.pt2 in RUN.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Which of the run's: best, last, ema, or a file.", rich_help_panel="Model")
    ] = "best",
    batch: Annotated[int, typer.Option(min=0, help="Images of a call; 0 leaves their number open.")] = 0,
    **settings: Any,
) -> None:
    """Write a classifier as one file that needs neither irpe nor timm, and check that it computes the same.

    irpe export runs/RUN --out model.onnx. A JSON file beside it has the classes, and how images are prepared.
    """
    from ..train import run as job
    from ..train.export import check_path, export

    options = given(settings)
    with sentences() as printer:
        if run is None:
            if not {"model", "pretrained"} <= set(options) or out is None:
                raise ValueError("name the folder of a run; or give --model, --pretrained and --out")
            chosen, path = settings_from("deit", options | {"data": ""}), None
            classes = [str(number) for number in range(chosen.num_classes or 1000)]
        else:
            if fixed := sorted(set(options) - {"img_size", "mean", "std", "crop_pct"}):
                raise ValueError(f"{', '.join(map(flag, fixed))}: the run has its own; leave it out")
            old, classes = job.settings_of(run)
            chosen, path = settings_from_dict({**dataclasses.asdict(old), **options}), job.weights_of(run, weights)
        file = out or Path(str(run)) / "model.pt2"
        check_path(file)
        facts = export(chosen, path, classes, file, batch=batch, say=printer.print)
        shape = "x".join(str(side) for side in facts["input"]["shape"]).replace("batch", "B")
        words = f"{file}: {facts['format']}, images {shape}, {counted(len(classes), 'class', 'classes')}"
        printer.print(f"{words}, at most {facts['largest_difference']:.1e} from the model", soft_wrap=True)
        printer.print(str(file.with_name(file.name + ".json")), soft_wrap=True)


export = with_settings(
    _export,
    Settings,
    RECIPES,
    tuple(field.name for field in dataclasses.fields(Settings) if field.name not in _OF_MODEL),
)
