"""`irpe predict`: what a trained model says of pictures, as a table, JSON, CSV, and boxes drawn on them."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .common import Terminal, check_place, new_folder, words_of, write_json
from .options import sentences

_SHOWN = 100  # rows of the table


def predict(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of a run of irpe train or irpe detect, or of a model (irpe.save, save_pretrained), or a file "
            "model.onnx of irpe export, or a name on the hub.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Pictures of any format, and folders of them.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes of each picture (classifiers).")] = 5,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least score of a box (detectors).")] = 0.5,
    weights: Annotated[str, typer.Option(help="Which of a run's: best, last or ema.")] = "best",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all there; of detectors in the format of COCO's results.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a line for each class or box there.")] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO's JSON whose ids of images and categories --json takes, by their names (detectors)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="New folder for the pictures with their boxes (detectors).")] = Path(
        "runs/predictions"
    ),
) -> None:
    """Say what is on pictures: the likeliest classes, or boxes.

    irpe predict runs/NAME cat.jpg holidays/ --csv found.csv. Pictures are prepared as the run evaluated its own.
    """
    with sentences() as printer:
        from ..prediction import Detector, pictures_in, read
        from ..runs.world import device_of
        from ..saving import load

        check_place(json_file, csv_file)
        files = pictures_in(images)
        model = load(source, weights=weights)
        said = getattr(model, "predict", None)
        if said is None:
            raise ValueError(f"{source} is a {type(model).__name__}, neither a classifier nor a detector")
        model.to(device_of(device))
        detects = isinstance(said, Detector)
        if annotations is not None and not detects:
            raise ValueError("--annotations: only detectors have boxes; leave it out")
        ids = _Ids(annotations)
        folder = new_folder(out.parent, out.name, overwrite=False) if detects else None
        results: list[tuple[Path, list[Any]]] = []
        bad: list[str] = []
        mode, limit = "L" if getattr(said, "channels", 3) == 1 else "RGB", threshold if detects else top
        for part in _batches(files, batch_size):
            read_ones = []
            for file in part:
                try:
                    read_ones.append((file, read(file, mode, turned=detects)))
                except ValueError as error:
                    bad.append(str(error))
            found = said.of([image for _, image in read_ones], limit) if read_ones else []
            for (file, image), one in zip(read_ones, found, strict=True):
                results.append((file, one))
                if folder is not None:
                    _draw(folder, file, image, one)
        rows = _boxes(results, ids) if detects else _classes(results)
        printer.print(_table(results, detects))
        if json_file is not None:
            write_json(json_file, rows if detects else _by_file(results))
        if csv_file is not None:
            _write_csv(csv_file, rows, detects)
        for place in (json_file, csv_file, folder):
            if place is not None:
                printer.print(str(place), soft_wrap=True)
        for words in bad:
            printer.print(f"unreadable: {words}", soft_wrap=True)
        if bad:
            raise typer.Exit(1)


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    """The files in pieces, with a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("pictures", total=len(files))
        for at in range(0, len(files), size):
            yield files[at : at + size]
            bar.update(task, advance=len(files[at : at + size]))


class _Ids:
    """The ids of images and categories in COCO's annotations, by their names."""

    def __init__(self, file: Path | None) -> None:
        from ..runs.files import read_json

        self.images: dict[str, Any] | None = None
        self.categories: dict[str, Any] | None = None
        if file is None:
            return
        values = read_json(file)
        try:
            self.images = {str(one["file_name"]): one["id"] for one in values["images"]}
            self.categories = {str(one["name"]): one["id"] for one in values["categories"]}
        except (KeyError, TypeError):
            raise ValueError(f"--annotations {file} is not in COCO's detection format") from None

    def image(self, file: Path) -> Any:
        """Of annotations; else the number that the file is named by, as COCO's are; else its name."""
        if self.images is not None:
            name = next((name for name in (file.as_posix(), file.name) if name in self.images), None)
            if name is None:
                raise ValueError(f"{file} is not among the images of --annotations")
            return self.images[name]
        return int(file.stem) if file.stem.isdecimal() and file.stem.isascii() else file.name

    def category(self, label: str, number: int) -> Any:
        """Of annotations; else the number of the model's class."""
        if self.categories is None:
            return number
        if label not in self.categories:
            raise ValueError(f"{label!r} is not among the categories of --annotations")
        return self.categories[label]


def _classes(results: Sequence[tuple[Path, list[Any]]]) -> list[dict[str, Any]]:
    return [
        {"file": str(file), "rank": rank, "label": one.label, "score": one.score}
        for file, found in results
        for rank, one in enumerate(found, 1)
    ]


def _by_file(results: Sequence[tuple[Path, list[Any]]]) -> list[dict[str, Any]]:
    return [{"file": str(file), "predictions": [one._asdict() for one in found]} for file, found in results]


def _boxes(results: Sequence[tuple[Path, list[Any]]], ids: _Ids) -> list[dict[str, Any]]:
    """COCO's results, with two names more."""
    return [
        {
            "image_id": ids.image(file), "category_id": ids.category(one.label, one.number),
            "bbox": [round(one.box[0], 2), round(one.box[1], 2), *_size(one.box)], "score": one.score,
            "file_name": str(file), "category": one.label,
        }
        for file, found in results
        for one in found
    ]  # fmt: skip


def _size(corners: tuple[float, float, float, float]) -> tuple[float, float]:
    return round(corners[2] - corners[0], 2), round(corners[3] - corners[1], 2)


def _write_csv(file: Path, rows: Sequence[dict[str, Any]], detects: bool) -> None:
    from ..runs.files import write_whole

    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if detects:
        writer.writerow(("file", "label", "score", "x", "y", "width", "height"))
        writer.writerows((one["file_name"], one["category"], one["score"], *one["bbox"]) for one in rows)
    else:
        writer.writerow(("file", "rank", "label", "score"))
        writer.writerows((one["file"], one["rank"], one["label"], one["score"]) for one in rows)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda handle: handle.write(text.getvalue().encode()))
    except OSError as error:
        raise ValueError(words_of(error)) from None


def _draw(folder: Path, file: Path, image: Any, found: Sequence[Any]) -> None:
    """A PNG of the picture's name; of several files of one name, numbered."""
    from ..drawing import with_boxes

    place, number = folder / f"{file.stem}.png", 1
    while place.exists():
        number += 1
        place = folder / f"{file.stem}-{number}.png"
    with_boxes(image, found).save(place)


def _table(results: Sequence[tuple[Path, list[Any]]], detects: bool) -> Table:
    more = len(results) - _SHOWN
    caption = f"and {more:,} pictures more; --json and --csv have all" if more > 0 else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("picture", overflow="fold")
    table.add_column("boxes" if detects else "classes", overflow="fold")
    for file, found in results[:_SHOWN]:
        words = ", ".join(f"{one.label} {100 * one.score:.1f} %" for one in found)
        table.add_row(str(file), words or "nothing found")
    return table
