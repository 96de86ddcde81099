"""`irpe predict`: what a trained model says of pictures, as a table, JSON, CSV, and boxes drawn on them."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
from rich import box as lines
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..runs.files import printable, read_json
from .common import Terminal, check_place, new_folder, write, write_json
from .options import sentences

_SHOWN = 100  # rows of the table
_TOP, _THRESHOLD, _OUT = 5, 0.5, Path("runs/predictions")


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
    top: Annotated[
        int | None, typer.Option(min=1, help="Classes of each picture (classifiers).", show_default=str(_TOP))
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Least score of a box (detectors).", show_default=str(_THRESHOLD)),
    ] = None,
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
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the pictures with their boxes (detectors).", show_default=str(_OUT)),
    ] = None,
) -> None:
    """Say what is on pictures: the likeliest classes, or boxes.

    irpe predict runs/NAME cat.jpg holidays/ --csv found.csv. Pictures are prepared as the run evaluated its own.
    """
    with sentences("a smaller --batch-size needs less") as printer:
        from ..prediction import Detector, pictures_in, read
        from ..runs.world import device_of
        from ..saving import load

        check_place(json_file, csv_file)
        if out is not None and (out.name in ("", "..") or printable(out.name) != out.name):
            raise ValueError(f"--out {out} names no new folder; expected one, such as {out / _OUT.name}")
        files = pictures_in(images)
        model = load(source, weights=weights)
        said = getattr(model, "predict", None)
        if said is None:
            raise ValueError(f"{source} is a {type(model).__name__}, neither a classifier nor a detector")
        detects = isinstance(said, Detector)
        if detects:
            _refuse("only classifiers tell the likeliest classes", top=top)
        else:
            _refuse("only detectors have boxes", threshold=threshold, annotations=annotations, out=out)
        if annotations is not None and json_file is None:
            raise ValueError("--annotations tells the ids in --json; give that too, or leave it out")
        said.check()
        ids = _Ids(files, annotations, said.classes) if detects else None
        model.to(device_of(device))
        out = out or _OUT
        folder = new_folder(out.parent, out.name, overwrite=False) if detects else None
        results: list[tuple[Path, list[Any]]] = []
        bad: list[str] = []
        mode = "L" if getattr(said, "channels", 3) == 1 else "RGB"
        limit = (_THRESHOLD if threshold is None else threshold) if detects else top or _TOP
        for part in _batches(files, batch_size):
            read_ones = []
            for file in part:
                try:
                    read_ones.append((file, read(file, mode, turned=detects)))
                except ValueError as error:
                    bad.append(str(error))
            found = said.of([image for _, image in read_ones], limit) if read_ones else []
            for (file, image), entry in zip(read_ones, found, strict=True):
                results.append((file, entry))
                if folder is not None:
                    _draw(folder, file, image, entry)
        printer.print(_table(results, detects))
        if json_file is not None:
            write_json(json_file, _by_file(results) if ids is None else _boxes(results, ids))
        if csv_file is not None:
            write(csv_file, _csv(results, detects))
        for place in (json_file, csv_file, folder):
            if place is not None:
                printer.print(str(place), soft_wrap=True)
        if ids is not None and (words := ids.left_out(results)):
            printer.print(f"{json_file}: {words}", soft_wrap=True)
        for words in bad:
            printer.print(f"unreadable: {words}", soft_wrap=True)
        if bad:
            raise typer.Exit(1)


def _refuse(why: str, **options: object) -> None:
    """Refuses options that were given and would do nothing."""
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: {why}; leave it out")


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    """The files in pieces, with a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Terminal(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("pictures", total=len(files))
        for at in range(0, len(files), size):
            yield files[at : at + size]
            bar.update(task, advance=len(files[at : at + size]))


class _Ids:
    """The ids of images and of categories in COCO's results: those of annotations, by names, or ones of our own.

    Args:
        classes: names of the model's.

    Raises:
        ValueError: a file is not among the annotations' images, or two would be one of them; or all classes are others.
    """

    def __init__(self, files: Sequence[Path], annotations: Path | None, classes: Sequence[str]) -> None:
        self.images: dict[Path, Any] = {}
        self.categories: dict[str, Any] | None = None
        if annotations is None:
            # a file's number, as COCO's are named, or its name; the whole path where several have one
            own = {file: int(file.stem) if re.fullmatch("[0-9]{1,18}", file.stem) else file.name for file in files}
            count = Counter(own.values())
            self.images = {file: str(file) if count[name] > 1 else name for file, name in own.items()}
            return
        values = read_json(annotations)
        try:
            names = {PurePosixPath(image["file_name"]).as_posix(): image["id"] for image in values["images"]}
            self.categories = {str(category["name"]): category["id"] for category in values["categories"]}
            if not all(isinstance(number, (int, str)) for number in (*names.values(), *self.categories.values())):
                raise TypeError
        except (KeyError, TypeError):
            raise ValueError(f"--annotations {annotations} is not in COCO's detection format") from None
        taken: dict[Any, Path] = {}
        for file in files:
            name = next((name for name in _suffixes(file) if name in names), None)
            if name is None:
                raise ValueError(f"{file} is not among the images of --annotations")
            if (other := taken.setdefault(names[name], file)) != file:
                raise ValueError(f"{other} and {file} would both be image {name} of --annotations; leave one out")
            self.images[file] = names[name]
        if self.categories.keys().isdisjoint(classes):
            expected, found = (", ".join(sorted(map(str, names))[:5]) for names in (self.categories, classes))
            raise ValueError(f"--annotations has the categories {expected}; the model has others: {found}")

    def category(self, box: Any) -> Any:
        """Of annotations, None where they have none of this name; else the number of the model's class."""
        return box.number if self.categories is None else self.categories.get(box.label)

    def left_out(self, results: Sequence[tuple[Path, list[Any]]]) -> str:
        """A line about the boxes that have no category, or nothing."""
        count = Counter(box.label for _, found in results for box in found if self.category(box) is None)
        names = ", ".join(name for name, _ in count.most_common(5)) + ", ..." * (len(count) > 5)
        return f"without {count.total():,} boxes of classes that --annotations does not have: {names}" if count else ""


def _suffixes(file: Path) -> Iterator[str]:
    """The whole path of a file, then shorter and shorter ends of it: /a/b/c.png, a/b/c.png, b/c.png, c.png."""
    path = Path(os.path.abspath(file))
    yield path.as_posix()
    for at in range(1, len(path.parts)):
        yield "/".join(path.parts[at:])


def _by_file(results: Sequence[tuple[Path, list[Any]]]) -> list[dict[str, Any]]:
    return [{"file": str(file), "predictions": [result._asdict() for result in found]} for file, found in results]


def _boxes(results: Sequence[tuple[Path, list[Any]]], ids: _Ids) -> list[dict[str, Any]]:
    """COCO's results, with two names more."""
    return [
        {
            "image_id": ids.images[file], "category_id": ids.category(box), "bbox": _bbox(box.box), "score": box.score,
            "file_name": str(file), "category": box.label,
        }
        for file, found in results
        for box in found
        if ids.category(box) is not None
    ]  # fmt: skip


def _bbox(box: Sequence[float]) -> list[float]:
    """x, y, width and height in hundredths of a pixel."""
    return [round(side, 2) for side in (box[0], box[1], box[2] - box[0], box[3] - box[1])]


def _csv(results: Sequence[tuple[Path, list[Any]]], detects: bool) -> bytes:
    """A line for each box, or for each class of a picture."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(
        ("file", "label", "score", "x", "y", "width", "height") if detects else ("file", "rank", "label", "score")
    )
    for file, found in results:
        for rank, result in enumerate(found, 1):
            more = (result.label, result.score, *_bbox(result.box)) if detects else (rank, result.label, result.score)
            writer.writerow((file, *more))
    return text.getvalue().encode()


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
    table = Table(box=lines.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("picture", overflow="fold")
    table.add_column("boxes" if detects else "classes", overflow="fold")
    for file, found in results[:_SHOWN]:
        words = ", ".join(f"{result.label} {100 * result.score:.1f} %" for result in found)
        table.add_row(str(file), words or "nothing found")
    return table
