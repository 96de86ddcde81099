"""`irpe bench`: what iRPE costs on this machine, before it is used."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import check_place, checked, console, write_json


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

    check_place(json)
    texts = rpe or ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"]
    sizes = [checked(_size, text) for text in size or ["14x14", "24x24", "32x32"]]
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise typer.BadParameter(f"--dtype {dtype}; expected one of {', '.join(kinds)}")
    place = checked(device_of, device)
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{where}, torch {torch.__version__}; attention: {dtype}, B={batch_size}, H={heads}, D={head_dim}")
    shape: dict[str, Any] = dict(batch=batch_size, device=place, seconds=seconds)
    rows: list[Any] = checked(
        list, job.attention(sizes, texts, heads=heads, head_dim=head_dim, dtype=kinds[dtype], **shape)
    )
    _print(rows)
    if model != "none":
        more: list[Any] = checked(list, job.model(model, texts, **shape))
        _print(more)
        rows += more
    if json is not None:
        write_json(json, [row._asdict() | {"ratios": row.ratios()} for row in rows])
        console.print(str(json), soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text}; expected HEIGHTxWIDTH in tokens, such as 14x14")
    return int(height), int(width)


def _print(rows: list[Any]) -> None:
    """A line for each row: the time without encodings, and the others over it."""
    table = Table(box=None, pad_edge=False)
    names = list(rows[0].seconds)
    for head in ("", "", f"{names[0]}, ms", *names[1:]):
        table.add_column(head, justify="left" if not head else "right")
    for row in rows:
        ratios = [f"{ratio:.2f}" for ratio in list(row.ratios().values())[1:]]
        table.add_row(row.what, row.pass_, f"{1000 * row.seconds[names[0]]:.1f}", *ratios)
    console.print(table)
