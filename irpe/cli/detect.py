"""`irpe detect`: its options, and what it prints."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .common import new_folder

DATA, MODEL, RECIPE, MACHINE, FOLDER = "Data", "Model", "Recipe", "Machine", "Folder and resuming"


def _option(words: str, panel: str, *names: str, low: float | None = None) -> Any:
    return typer.Option(*names, help=words, rich_help_panel=panel, show_default=False, min=low)


def detect(
    data: Annotated[
        str | None,
        typer.Argument(
            help="Folder in COCO's layout: train2017 or train, val2017 or val, annotations/*.json. Without it digits "
            "on photographs, which need no download, with and without iRPE.",
            show_default=False,
        ),
    ] = None,
    train_json: Annotated[str | None, _option("Annotations to train on, where they lie elsewhere.", DATA)] = None,
    val_json: Annotated[str | None, _option("Annotations to evaluate on.", DATA)] = None,
    train_images: Annotated[str | None, _option("Folder of the images to train on.", DATA)] = None,
    val_images: Annotated[str | None, _option("Folder of the images to evaluate on.", DATA)] = None,
    write_digits: Annotated[
        Path | None, _option("Write the built-in scenes into this new folder, in COCO's layout, and end.", DATA)
    ] = None,
    train_scenes: Annotated[int | None, _option("Built-in scenes to train on. Default: 2000.", DATA)] = None,
    val_scenes: Annotated[int | None, _option("Built-in scenes to evaluate on. Default: 300.", DATA)] = None,
    digit_classes: Annotated[
        int | None, _option("Categories of the built-in scenes: 1 (digit) or 10 (which one). Default: 1.", DATA)
    ] = None,
    size: Annotated[
        int | None, _option("Shorter side of the images, 0 as they are. Default: 800; 0 (digits).", DATA)
    ] = None,
    max_size: Annotated[int | None, _option("Longer side at most. Default: 1333.", DATA)] = None,
    train_size: Annotated[
        list[int] | None, _option("Shorter side in training, drawn among those given (repeatable).", DATA)
    ] = None,
    hflip: Annotated[float | None, _option("Share of images flipped. Default: 0.5; 0 (digits).", DATA)] = None,
    model: Annotated[
        str | None, _option("small: from random weights in minutes. r50: DETR with a ResNet-50. Default: small.", MODEL)
    ] = None,
    pretrained: Annotated[
        str | None,
        _option(
            "A folder of save_pretrained, a name on the hub such as facebook/detr-resnet-50, or a checkpoint of the "
            "release.",
            MODEL,
        ),
    ] = None,
    backbone: Annotated[
        str | None, _option("Weights of the ResNet of --model r50: hub (timm's), or a file.", MODEL)
    ] = None,
    rpe: Annotated[
        list[str] | None,
        _option(
            "An iRPE such as rpe-2.0-product-ctx-1-k in the encoder, or none; without DATA several. Default: as "
            "--pretrained has it; rpe-2.0-product-ctx-1-k and none (digits).",
            MODEL,
        ),
    ] = None,
    d_model: Annotated[int | None, _option("Width of --model small. Default: 64.", MODEL)] = None,
    layers: Annotated[int | None, _option("Of its encoder and of its decoder. Default: 2.", MODEL)] = None,
    queries: Annotated[int | None, _option("Of --model small. Default: 100; 6 (digits).", MODEL)] = None,
    dropout: Annotated[float | None, _option("Of --model small. Default: 0.1; 0 (digits).", MODEL)] = None,
    epochs: Annotated[int | None, _option("Epochs. Default: 50; 16 (digits).", RECIPE)] = None,
    batch_size: Annotated[
        int | None, _option("Images of a step, over all processes. Default: 8; 16 (digits).", RECIPE)
    ] = None,
    lr: Annotated[float | None, _option("Peak learning rate. Default: 1e-4; 7e-4 (digits).", RECIPE)] = None,
    backbone_lr: Annotated[float | None, _option("Of the backbone. Default: 1e-5; 7e-4 (digits).", RECIPE)] = None,
    weight_decay: Annotated[float | None, _option("None on the tables of iRPE. Default: 1e-4.", RECIPE)] = None,
    warmup_steps: Annotated[int | None, _option("Of linear warm-up. Default: 100.", RECIPE)] = None,
    clip_grad: Annotated[
        float | None, _option("Largest norm of the gradient, 0 is off. Default: 0.1; 1 (digits).", RECIPE)
    ] = None,
    seed: Annotated[int | None, _option("All random numbers follow from it. Default: 0.", RECIPE)] = None,
    seeds: Annotated[int | None, _option("Without DATA: runs of each side. Default: 3.", RECIPE, low=1)] = None,
    max_steps: Annotated[int | None, _option("Stop after this many steps of the schedule.", RECIPE)] = None,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Measure --pretrained, train nothing.")
    ] = False,
    device: Annotated[str | None, _option("auto, cpu, cuda, cuda:1.", MACHINE)] = None,
    loader_workers: Annotated[int | None, _option("Processes that read images. Default: 0.", MACHINE)] = None,
    eval_batch_size: Annotated[int | None, _option("Of one process. Default: 8; 20 (digits).", MACHINE)] = None,
    out: Annotated[Path, _option("Folder of all results.", FOLDER)] = Path("runs"),
    name: Annotated[str | None, _option("Folder of this one inside --out.", FOLDER)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that exists.", rich_help_panel=FOLDER)
    ] = False,
    resume: Annotated[
        str | None, _option("auto: go on from the last checkpoint in --out/--name. Or a checkpoint, or a run.", FOLDER)
    ] = None,
    eval_every: Annotated[int | None, _option("Epochs between measurements. Default: 1; 4 (digits).", FOLDER)] = None,
    save_every: Annotated[int | None, _option("Steps between checkpoints in an epoch; 0 is none.", FOLDER)] = None,
    keep: Annotated[int | None, _option("Checkpoints that are kept. Default: 2.", FOLDER)] = None,
    log_every: Annotated[int | None, _option("Steps between lines of log.jsonl. Default: 50.", FOLDER)] = None,
    draw: Annotated[int | None, _option("Pictures in predictions.png. Default: 8.", FOLDER)] = None,
) -> None:
    """Train and evaluate DETR with iRPE in its encoder on DATA in COCO's format; without DATA, digits on photographs.

    irpe detect coco --pretrained facebook/detr-resnet-50 --rpe rpe-2.0-product-ctx-1-k. On several GPUs: torchrun
    --nproc-per-node 8 -m irpe detect ... docs/detect.md has more examples.
    """
    _ask_for_packages()
    given = {key: value for key, value in locals().items() if value is not None and value != []}
    own = ("data", "rpe", "out", "name", "overwrite", "resume", "seeds", "evaluate_only", "write_digits")
    options = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key not in own
    }
    from .train import _sentences

    with _sentences() as printer:
        from ..detect import run as job
        from ..detect.settings import DIGITS, RPE, settings_from

        several = data is None and not evaluate_only and write_digits is None
        if rpe and len(rpe) > 1 and not several:
            raise ValueError(f"--rpe was given {len(rpe)} times; a run on DATA has one encoding")
        if seeds is not None and not several:
            raise ValueError("--seeds: only without DATA; a run on DATA has one --seed")
        if several and (seed is not None or pretrained is not None):
            raise ValueError(
                "--seed, --pretrained: without DATA small models are trained with several seeds; name DATA (digits)"
            )
        if several and resume not in (None, "auto"):
            raise ValueError(f"--resume {resume}: without DATA only auto, which goes on with all runs of --out/--name")
        if resume is not None and (overwrite or evaluate_only):
            raise ValueError(
                "--resume goes on with training in a folder that exists; leave --overwrite and --evaluate-only out"
            )
        chosen = settings_from(options | {"data": data or DIGITS} | ({"rpe": rpe[0]} if rpe and not several else {}))
        if write_digits is not None:
            printer.print(str(job.make_digits(write_digits, chosen)), soft_wrap=True)
        elif several:
            folder = new_folder(out, name or "detect-digits", overwrite or resume == "auto")
            sides = tuple(dict.fromkeys(rpe or ("none", RPE)))
            for side in sides:
                dataclasses.replace(chosen, rpe=side)  # refuses what is no encoding, before anything is trained
            printer.print(_table(job.compare(chosen, sides, seeds or 3, folder, resume, printer)["rows"]))
            printer.print(str(folder / "results.json"), soft_wrap=True)
        else:
            called = name or job.default_name(chosen) + "-evaluated" * evaluate_only

            def make() -> Path:
                if resume in (None, "auto"):
                    return new_folder(out, called, overwrite or resume == "auto")
                path = Path(str(resume))
                return path if path.is_dir() else path.parent.parent

            if evaluate_only:
                job.measure(chosen, make, printer)
            else:
                job.train(chosen, make, resume, printer)


def _ask_for_packages() -> None:
    """Ends with one sentence where a package is missing, before anything is read: some would be missed late."""
    packages = ("transformers", "torchvision", "torchmetrics", "pycocotools", "scipy", "sklearn", "matplotlib", "timm")
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        remedy = 'install what irpe detect needs with: pip install "irpe[detect]"'
        raise SystemExit(f"irpe: no module named {', '.join(missing)}; {remedy}")


def _table(rows: list[dict[str, Any]]) -> Table:
    count = rows[0]["seeds"]
    table = Table(
        title=f"Average precision in percent, mean ± deviation of {count} seed{'s' * (count > 1)}",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("encoder")
    for title in ("AP", "AP50", "AP75", "weights", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        scores = [
            f"{one['mean']:.1f}" + ("" if one["std"] is None else f"±{one['std']:.1f}")
            for one in (row[key] for key in ("AP", "AP50", "AP75"))
        ]
        side = "without iRPE" if row["side"] == "none" else row["side"]
        table.add_row(side, *scores, f"{row['parameters']:,}", f"{row['seconds']:.0f}")
    return table
