"""What a run leaves for people: curves of loss and accuracy, pictures of the encodings, and a model card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .. import viz
from ..irpe import get_offset_ids_2d
from .files import read_json, write_json, write_whole
from .loader import Shape, Transform
from .logs import epochs_of, read_log
from .settings import Settings, settings_from_dict

CURVES, ENCODINGS, CARD = "curves.png", "encodings.png", "README.md"


def write_report(folder: Path, model: nn.Module | None, val: Any, console: Console) -> None:
    """Writes curves.png, encodings.png where keys have encodings, result.json and README.md into a run's folder."""
    record = read_json(folder / "settings.json")
    lines = read_log(folder)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    result = {
        "epochs": epochs[-1]["epoch"], "step": epochs[-1]["step"], "last": _scores(epochs[-1]),
        "best": _scores(max(epochs, key=lambda line: line["val"]["top1"])), "seconds": epochs[-1]["seconds"],
    }  # fmt: skip
    write_json(folder / "result.json", result)
    paths = [draw_run(folder / CURVES, lines)] if record["settings"]["plots"] else []
    if paths and model is not None and not isinstance(val, IterableDataset):
        settings = settings_from_dict(record["settings"])
        found = encodings(model, settings, Shape(**record["shape"]), val)
        if found is not None:
            paths.append(viz.draw_encodings(folder / ENCODINGS, found))
    text = card(record, result, epochs, [path.name for path in paths])
    paths.append(write_whole(folder / CARD, lambda file: file.write(text.encode())))
    for path in paths:
        console.print(str(path), soft_wrap=True)


def _scores(line: dict[str, Any]) -> dict[str, Any]:
    keep = ("loss", "top1", "top5", "images", "bad")
    parts: dict[str, Any] = {name: {key: line[name][key] for key in keep} for name in ("val", "ema") if name in line}
    return {"epoch": line["epoch"], "train_loss": line["train_loss"], **parts}


def draw_run(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Loss (training and evaluation) and accuracy over epochs."""
    epochs = epochs_of(lines)
    figure = Figure(figsize=(9, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [line["epoch"] for line in epochs]
    style = dict(marker="o" if len(x) < 25 else None, ms=3, lw=1.8)
    left.plot(x, [line["train_loss"] for line in epochs], color="#7f7f7f", label="training", **style)
    left.plot(x, [line["val"]["loss"] for line in epochs], color="#1b6ca8", label="evaluation", **style)
    right.plot(x, [line["val"]["top1"] for line in epochs], color="#1b6ca8", label="top-1", **style)
    right.plot(x, [line["val"]["top5"] for line in epochs], color="#1b9e77", label="top-5", **style)
    if all("ema" in line for line in epochs):
        right.plot(x, [line["ema"]["top1"] for line in epochs], color="#d95f02", label="top-1 of the average", **style)
    left.set_ylabel("loss")
    right.set_ylabel("right answers in percent")
    for ax in (left, right):
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=9, frameon=False)
    figure.savefig(path)
    return path


@contextmanager
def _listening(modules: list[Any], told: Callable[[int, Tensor, Any], None]) -> Iterator[None]:
    """While the block runs, told(number, x, size) is called for the scaled queries that each encoding is applied to."""

    def listen(number: int, module: Any) -> None:
        own_forward, own_tables = module.forward, module.tables
        inside = False

        def forward(x: Tensor, *args: Any, **options: Any) -> Any:  # the formula: its queries are scaled
            nonlocal inside
            told(number, x, options)
            inside = True
            try:
                return own_forward(x, *args, **options)
            finally:
                inside = False

        def tables(x: Tensor, *args: Any, **options: Any) -> Any:  # fused attention scales inside
            if not inside:
                told(number, x * x.shape[-1] ** -0.5, options)
            return own_tables(x, *args, **options)

        module.forward, module.tables = forward, tables

    for number, module in enumerate(modules):
        listen(number, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward, module.tables


def encodings(
    model: nn.Module, settings: Settings, shape: Shape, source: Any, examples: int = 5, count: int = 32
) -> viz.Encodings | None:
    """What a trained model adds to its attention scores on keys, by offset, for `viz.draw_encodings`.

    None where no attention has contextual or bias encodings on keys, or where their maps are of different sizes. Single
    queries are the middle token of `examples` images, in the two heads whose answers differ most between images.
    """
    modules = [one.rpe_k for one in model.modules() if getattr(one, "rpe_k", None) is not None]
    if not modules:
        return None
    transform = Transform(settings, shape, training=False)
    images = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            images.append(transform(source[int(index)][0]))
        except Exception:  # unreadable ones were named when the model was measured
            continue
    if not images:
        return None
    heard: list[tuple[Tensor, dict[str, Any]]] = [(torch.empty(0), {})] * len(modules)

    def told(number: int, x: Tensor, options: Any) -> None:
        heard[number] = (x.detach(), options)

    device = next(model.parameters()).device
    model.eval()
    batch = torch.stack(images)
    with torch.no_grad(), _listening(modules, told):
        model(batch.to(device))
    sizes = {(options.get("height") or 0, options.get("width") or 0) for _, options in heard}
    heads = {x.shape[1] for x, _ in heard}
    if len(sizes) > 1 or 0 in next(iter(sizes)) or len(heads) > 1:
        return None
    ((height, width),) = sizes
    at = (height // 2, width // 2)
    with torch.no_grad():
        answers = [_answers(module, *one, at) for module, one in zip(modules, heard, strict=True)]
    mean, single = (torch.stack(part) for part in zip(*answers, strict=True))
    mean, single = (one - one.mean((-2, -1), keepdim=True) for one in (mean, single))  # softmax does not see a constant
    differ = single.std(1) if len(images) > 1 else single[:, 0].abs()  # (blocks, H, 2h-1, 2w-1)
    order = differ.mean((-2, -1)).flatten().argsort(descending=True)
    shown = [divmod(int(place), mean.shape[1]) for place in order[:2]]
    examples = min(examples, len(images))
    grey = batch[:examples].mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    return viz.Encodings(
        title=settings.rpe, mean=mean.numpy(),
        single=torch.stack([single[block, :examples, head] for block, head in shown]).numpy(),
        images=(1 - (grey - low) / (high - low).clamp(min=1e-6)).numpy(),  # drawn on white: 0 is white
        at=[at] * examples, shown=shown, patch=batch.shape[2] // height,
    )  # fmt: skip


def _answers(module: Any, x: Tensor, options: dict[str, Any], at: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(H, 2h-1, 2w-1) and (B, H, 2h-1, 2w-1): added to the score of a key by its offset, for the mean query of all
    images and for the query at (row, column) of each."""
    parts = [module] if hasattr(module, "rpe_config") else [module.rp_rows, module.rp_cols]
    batch, heads = x.shape[:2]
    height, width = options["height"], options["width"]
    mean, single = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for part, (table, _) in zip(parts, module.tables(x, **options), strict=True):
        c = part.rpe_config
        table = table if part.mode == "bias" else x @ table
        ids = get_offset_ids_2d(part.method, height, width, c.alpha, c.beta, c.gamma).flip(0, 1).to(table.device)
        table = table[:, :, c.skip :].float()  # (B, H, L, N), in bias mode (1, H', L, N)
        mean = mean + table.mean((0, 2))[..., ids]
        single = single + table[:, :, at[0] * width + at[1]][..., ids]
    return mean.expand(heads, -1, -1).cpu(), single.expand(batch, heads, -1, -1).cpu()


def card(record: dict[str, Any], result: dict[str, Any], epochs: list[dict[str, Any]], pictures: list[str]) -> str:
    """The text of README.md in a run's folder."""
    settings, shape, last, best = record["settings"], record["shape"], result["last"], result["best"]
    height, width = shape["size"]
    rows = [
        ("data", f"{settings['data']}, {len(record['classes'])} classes"),
        ("model", f"{settings['model']}, {record['parameters']:,} parameters, images of {height}x{width}"),
        ("encoding", settings["rpe"]),
        ("started from", settings["pretrained"] or "random weights"),
        (
            "recipe",
            f"{settings['recipe']}, {result['epochs']} of {settings['epochs']} epochs, {result['step']:,} steps",
        ),
        ("batch", f"{settings['batch_size']} images, {record['processes']} process(es) on {record['device']}"),
        *((f"optimizer: {name}", words) for name, words in record["parameter_groups"].items()),
        ("training", _duration(result["seconds"])),
    ]

    def line(name: str, epoch: dict[str, Any], part: str) -> str:
        one = epoch[part]
        bad = f", {one['bad']} unreadable left out" if one["bad"] else ""
        figures = (epoch["epoch"], f"{one['loss']:.4f}", f"{one['top1']:.2f}", f"{one['top5']:.2f}")
        return f"| {name} | {' | '.join(map(str, figures))} | {one['images']:,}{bad} |"

    scores = [line("best", best, "val"), line("last", last, "val")]
    if "ema" in last:
        scores.append(line("last, moving average", last, "ema"))
    titles = {CURVES: "Loss and accuracy over epochs", ENCODINGS: "What the learned encodings add to attention scores"}
    own = "\n".join(f"    {name} = {value}" for name, value in settings.items())
    return "\n".join(
        [
            f"# {settings['model']} on {Path(settings['data']).name}", "",
            "| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in rows), "",
            "Measured on the part of the data that was not trained on. `best` was chosen by these very numbers: an",
            "honest figure for it needs images that had no say, `irpe evaluate THIS_FOLDER --data OTHER`.", "",
            "| weights | epoch | loss | top-1 | top-5 | images |", "|---|---|---|---|---|---|", *scores, "",
            *(f"![{titles[name]}]({name})\n" for name in pictures),
            "## Files", "",
            "`best.safetensors`, `model.safetensors` (the last) and `ema.safetensors` (the average, if there is one)",
            "are state dicts; `settings.json` has all that builds the model; `log.jsonl` has a line for each epoch",
            "and for some steps.", "",
            "## Settings", "", own, "",
            "Made with " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".", "",
        ]
    )  # fmt: skip


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{seconds:.0f} s" if seconds < 120 else f"{rest // 60} min"
