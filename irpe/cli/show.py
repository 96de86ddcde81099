"""The command show: bucket maps, and on a picture what the encodings of a model add."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import check_place, checked, console
from .options import sentences

BUCKETS, PICTURE = "Bucket maps", "On a picture"
_OF_MAPS = ("method", "height", "width", "ratio", "skip", "frames")
_OF_PICTURES = ("source", "block", "head", "weights")


def show(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="With --image: folder of a run of irpe train or of a model (irpe.save), or a name on the hub.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="euc, quant, cross or product (repeatable); all four by default.", rich_help_panel=BUCKETS),
    ] = None,
    height: Annotated[int, typer.Option(help="Of the map, in tokens.", rich_help_panel=BUCKETS)] = 14,
    width: Annotated[int, typer.Option(help="Of the map, in tokens.", rich_help_panel=BUCKETS)] = 14,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Scale of the piecewise index; by default that of the paper for each method.", rich_help_panel=BUCKETS
        ),
    ] = None,
    skip: Annotated[int, typer.Option(help="Number of tokens in front of the map.", rich_help_panel=BUCKETS)] = 1,
    frames: Annotated[
        int | None,
        typer.Option(help="Of a video, in tokens: draws a slice of the map for each.", rich_help_panel=BUCKETS),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The picture on which attention is drawn.", rich_help_panel=PICTURE)
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Counted from 1; by default the last whose encodings tell tokens of the map apart.",
            rich_help_panel=PICTURE,
        ),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            help="Counted from 1; by default the one whose attention encodings change most.", rich_help_panel=PICTURE
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Which of a run's: best, last or ema.", rich_help_panel=PICTURE)
    ] = "best",
    query: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="ROW COLUMN",
            help="The token to look from, counted from 0; on a picture by default the one that is changed most.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write. Default: runs/buckets.png, of a picture runs/attention.png.")
    ] = None,
) -> None:
    """Draw which bucket each offset of query and key falls in, or on a picture what encodings do to attention.

    irpe show runs/NAME --image cat.jpg: attention of a token and of the class token without and with the encodings,
    and what those add on keys, on queries and on values.
    """
    sources = {name: context.get_parameter_source(name) for name in (*_OF_MAPS, *_OF_PICTURES)}
    given = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    out = out or Path("runs/buckets.png" if image is None else "runs/attention.png")
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}; expected a file name that ends in .png")
    for name in given:
        if (name in _OF_PICTURES) != (image is not None):
            words = "RUN" if name == "source" else f"--{name}"
            if image is not None:
                raise typer.BadParameter(f"{words} is of bucket maps; leave it out beside --image")
            raise typer.BadParameter(f"{words} is of a picture; expected --image x.jpg beside it")
    if image is None:
        _buckets(method, (height, width), ratio, skip, frames, query, out)
    elif source is None:
        raise typer.BadParameter(f"--image {image}: expected RUN, the folder of the model that looks at it")
    else:
        check_place(out)
        with sentences():
            _attention(source, weights, image, out, query=query, block=block, head=head)


def _buckets(
    method: list[str] | None, size: tuple[int, int], ratio: float | None, skip: int, frames: int | None,
    query: tuple[int, int] | None, out: Path,
) -> None:  # fmt: skip
    from .. import viz, viz_maps

    names = list(dict.fromkeys(method or viz_maps.RATIOS))
    if max(size) > 256:
        raise typer.BadParameter(f"{size[0]}x{size[1]} tokens; expected at most 256 along a side")
    if frames is not None and not 1 <= frames <= 16:
        raise typer.BadParameter(f"--frames {frames}; expected 1 to 16")
    axes = size if frames is None else (frames, *size)
    groups = [checked(viz_maps.bucket_maps, name, axes, ratio=ratio, skip=skip) for name in names]
    path = checked(viz.draw_buckets if frames is None else viz.draw_slices, out, groups, query)
    for name, group in zip(names, groups, strict=True):
        used = " + ".join(str(table.used()) for table in group)
        total = f" = {sum(table.used() for table in group)}" if len(group) > 1 else ""
        console.print(f"{name:8} ratio {group[0].ratio:<5g} {used}{total} buckets in use")
    console.print(str(path), soft_wrap=True)


def _attention(source: str, weights: str, image: Path, out: Path, **wanted: Any) -> None:
    import numpy as np

    from ..attention_calls import watched
    from ..attention_maps import attention_maps
    from ..prediction import read
    from ..runs.files import printable
    from ..runs.picture import mode_of
    from ..saving import load
    from ..viz_image import draw_attention

    if source.endswith(".onnx"):
        raise ValueError(f"{source}: an exported file does not show its attention; expected the folder of its run")
    model = load(source, weights=weights)
    watched(model)  # refuses others before anything is asked of `predict`
    said = getattr(model, "predict", None)
    if said is None:
        raise ValueError(f"{source} is no classifier, and does not say how pictures are prepared for it")
    prepared = said.prepare(read(image, mode_of(said.channels)))
    maps = attention_maps(model, prepared, **wanted)
    mean, std = map(np.array, said.normalised_by)
    pixels = np.clip(prepared.permute(1, 2, 0).numpy() * std + mean, 0, 1)  # as the model saw it, in colour
    draw_attention(out, maps, np.repeat(pixels, 3 // said.channels, -1), printable(image.name))
    console.print(
        f"block {maps.block} of {maps.blocks}, head {maps.head} of {maps.heads}, query at row {maps.at[0]}, column "
        f"{maps.at[1]} of {maps.size[0]}x{maps.size[1]} tokens",
        soft_wrap=True,
    )
    rows = [("query", maps.query), *([] if maps.class_token is None else [("class token", maps.class_token)])]
    for name, row in rows:
        values = "" if row.on_values is None else f"; values get {100 * row.share:.1f} % of their length"
        console.print(f"{name}: {100 * row.moved:.1f} % of its attention goes to other keys{values}", soft_wrap=True)
    if maps.note:
        console.print(maps.note, soft_wrap=True)
    console.print(str(out), soft_wrap=True)
