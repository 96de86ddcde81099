"""`irpe bench`: what iRPE costs on this machine, before it is used."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import check_place, write_json
from .options import sentences


def bench(
    size: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTH in tokens (repeatable).")] = None,
    rpe: Annotated[list[str] | None, typer.Option(help="Encodings as strings (repeatable).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of attention and of the model.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="Of attention.")] = 6,
    head_dim: Annotated[int, typer.Option(min=1, help="Of attention.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of attention: float32, bfloat16 or float16.")] = "float32",
    model: Annotated[str, typer.Option(help="One of timm's models, or none.")] = "deit_small_patch16_224",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each row, about.")] = 3.0,
    json: Annotated[Path | None, typer.Option(help="A file for the numbers, too.", show_default=False)] = None,
) -> None:
    """Measure attention and one model with iRPE and without: a table of ratios for this machine.

    irpe bench --size 14x14 --size 32x24 --model none
    """
    import torch

    from .. import bench as job
    from ..runs.world import device_of

    with sentences("a smaller --batch-size or --size needs less, and --model none") as printer:
        check_place(json)
        texts = rpe or ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"]
        sizes = [_size(text) for text in size or ["14x14", "24x24", "32x32"]]
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in kinds:
            raise ValueError(f"--dtype {dtype}; expected one of {', '.join(kinds)}")
        place = device_of(device)
        printer.print(
            f"{_name_of(place)}, torch {torch.__version__}; attention: {dtype}, B={batch_size}, H={heads}, D={head_dim}"
        )
        shape: dict[str, Any] = dict(batch=batch_size, device=place, seconds=seconds)
        rows: list[Any] = []
        try:
            _print(
                job.attention(sizes, texts, heads=heads, head_dim=head_dim, dtype=kinds[dtype], **shape), rows, printer
            )
            if model != "none":
                _print(job.model(model, texts, **shape), rows, printer)
        finally:  # what was measured before something failed is not lost
            if json is not None and rows:
                write_json(json, [row.as_dict() for row in rows])
                printer.print(str(json), soft_wrap=True)


def _name_of(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text}; expected HEIGHTxWIDTH in tokens, such as 14x14")
    return int(height), int(width)


def _print(rows: Iterable[Any], done: list[Any], printer: Console) -> None:
    """A line for each row, as soon as it is measured: the time without encodings, and the others over it."""
    for number, row in enumerate(rows):
        done.append(row)
        base, *names = row.seconds
        if not number:
            widths = [max(9, len(row.what)), len("with backward"), len(base) + 4]
            widths += [max(5, len(name)) for name in names]
            printer.print(_line(["", "", f"{base}, ms", *names], widths), soft_wrap=True)
        ratios = [f"{row.ratios()[name]:.2f}" for name in names]
        line = _line([row.what, row.pass_, f"{1000 * row.seconds[base]:.1f}", *ratios], widths)
        printer.print(line, soft_wrap=True)


def _line(cells: list[str], widths: list[int]) -> str:
    """Two columns at the left, the others at the right."""
    pairs = zip(cells, widths, strict=True)
    return "  ".join(
        cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(pairs)
    ).rstrip()
