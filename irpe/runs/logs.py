"""What one sees of a run: a progress bar, a line for each epoch, log.jsonl, and what trackers are told."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .files import WriteError, as_json, counted, parse_json, plain, read_text, reason_of, write_whole
from .trackers import Tracker

FILE = "log.jsonl"
PAUSE = 30.0  # seconds between lines, where there is no terminal for a bar


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that was torn by a kill is left out.

    Raises:
        ValueError: there is none, or a line within it is not one of a log.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {FILE}: it is not the folder of a run")
    lines = read_text(path).split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse_json(line, f"line {number} of {path}"))
        except ValueError:
            if number < len(lines):  # whole lines have an end
                raise
            continue
        if not _is_line(found[-1]):
            raise ValueError(f"line {number} of {path} is not of the log of a run: {line[:60]}")
    return found


def _is_line(line: Any) -> bool:
    """Whether these values have what every line has, and a measurement its score."""
    return (
        isinstance(line, dict)
        and line.get("kind") in ("step", "epoch")
        and all(isinstance(line.get(name), int) for name in ("step", "epoch"))
        and (line["kind"] == "step" or isinstance(line.get("val"), dict))
    )


def epochs_of(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each epoch: an epoch that a run has ended in, and gone on with later, was measured twice."""
    return list({line["epoch"]: line for line in lines if line["kind"] == "epoch"}.values())


def measured_at(folder: Path, step: int) -> dict[str, Any]:
    """The line of what was measured after a step; the last one where the log has none of it."""
    lines = [line for line in read_log(folder) if line["kind"] == "epoch"]
    return next((line for line in lines if line["step"] == step), lines[-1])


def duration(seconds: float) -> str:
    """Hours and minutes, minutes, or seconds, rounded.

    >>> duration(7260)
    '2 h 01 min'
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


class Pace:
    """Tells when it is time for a line."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def is_due(self) -> bool:
        """True once in every `PAUSE` seconds."""
        now = time.perf_counter()
        if now - self.last < PAUSE:
            return False
        self.last = now
        return True


class Log:
    """Writes the files and draws the bar; without a folder (in all processes but the first) it does nothing."""

    def __init__(
        self, folder: Path | None, console: Console, *, step: int = 0, measured: int = 0, total_images: int = 0,
        trackers: Mapping[str, Tracker] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """step, measured: where the run goes on; lines of later ones, which it will write again, are removed."""
        self.folder, self.console = folder, console
        self.trackers = dict(trackers)
        self.bar: Progress | None = None
        self.measured: Any = None  # the bar's task while images are measured
        self.reported = 0
        if folder is None:
            return
        if (folder / FILE).exists():
            self._keep(folder, step, measured)
        self.total, self.done, self.at_last_line = total_images, 0, 0
        self.began = self.since = time.perf_counter()
        self.pace = Pace()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"),
            TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        if console.is_terminal:
            self.bar = Progress(*columns, console=console, speed_estimate_period=120)
            self.task = self.bar.add_task("training", total=total_images, rate="")
            self.bar.start()

    def _keep(self, folder: Path, step: int, measured: int) -> None:
        """Removes the lines that the run will write again."""
        last = {"step": step, "epoch": measured}
        data = b"".join(as_json(line) for line in read_log(folder) if line["step"] <= last[line["kind"]])
        write_whole(folder / FILE, lambda file: file.write(data))

    def advance(self, images: int) -> None:
        """A step was done."""
        if self.folder is None:
            return
        self.done += images
        if self.bar is not None:
            self.bar.update(self.task, advance=images, rate=f"{self.rate():,.0f}/s")
        elif self.pace.is_due():
            self.console.print(f"{self.done:,} of {self.total:,} images, {self.speed()}", soft_wrap=True)

    def measuring(self, images: int, total: int | None) -> None:
        """So many images were measured in this process, of so many where that is known."""
        if self.folder is None:
            return
        if self.bar is None:
            if self.pace.is_due():
                of = "" if total is None else f" of {total:,}"
                self.console.print(f"measuring: {images:,}{of} images", soft_wrap=True)
            return
        if self.measured is None:
            self.measured = self.bar.add_task("measuring", rate="")
        self.bar.update(self.measured, completed=images, total=total)

    def speed(self) -> str:
        """Images in a second since the run began, with the time of measuring, and the time that is left at that."""
        spent = time.perf_counter() - self.began
        return f"{self.done / spent:,.0f} images/s, {duration((self.total - self.done) * spent / self.done)} left"

    def rate(self) -> float:
        """Images of training in a second since the last line of the log."""
        return (self.done - self.at_last_line) / max(1e-9, time.perf_counter() - self.since)

    def step(self, **values: Any) -> None:
        """The line of some steps."""
        if self.folder is None:
            return
        rate = self.rate()
        self.since, self.at_last_line = time.perf_counter(), self.done
        values = plain(values)  # a norm may overflow in float16, where the step is left out
        self._write({"kind": "step", **values, "images_per_second": round(rate, 1)})
        names = [name for name in ("loss", "lr", "grad_norm") if values.get(name) is not None]
        self._tell({f"train/{name}": values[name] for name in names}, values["step"])

    def epoch(self, values: dict[str, Any], words: str, *, is_best: bool) -> None:
        """The line of a measured epoch; `words` say on the console what was measured."""
        if self.folder is None:
            return
        self._write({"kind": "epoch", **values})
        words = f"epoch {values['epoch']}: train {values['train_loss']:.4f}, {words}"
        if values["bad_images"]:
            words += f", {counted(values['bad_images'], 'unreadable image', 'unreadable images')}"
        if self.done:
            words += f", {self.speed()}"
        if self.bar is not None and self.measured is not None:
            self.bar.remove_task(self.measured)
            self.measured = None
        self.console.print(words + (", the best so far" if is_best else ""), soft_wrap=True)
        self.since, self.at_last_line = time.perf_counter(), self.done
        figures = {
            f"{part}/{name.replace(' ', '_')}": figure
            for part in ("val", "ema")
            for name, figure in values.get(part, {}).items()
            if isinstance(figure, float)
        }
        self._tell(figures, values["step"])

    def bad_images(self, names: list[str]) -> None:
        """Names the first unreadable images, once."""
        if names and not self.reported and self.folder is not None:
            self.reported = len(names)
            left_out = counted(len(names), "unreadable image", "unreadable images")
            self.console.print(f"{left_out} to evaluate on, left out: {'; '.join(names[:3])}", soft_wrap=True)

    def close(self, *, ended: bool = True) -> None:
        """Ends the bar and the trackers, of a run that has come to its end or not."""
        if self.bar is not None:
            self.bar.stop()
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.close(ended=ended))  # type: ignore[misc]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self.close(ended=kind is None)

    def _tell(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step))  # type: ignore[misc]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """A tracker that fails, on a network that is gone, is left alone: no training ends for that."""
        try:
            act()
        except Exception as error:
            del self.trackers[name]
            self.console.print(f"{name} takes no more, {FILE} has it all: {reason_of(error)}", soft_wrap=True)

    def _write(self, line: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / FILE
        try:
            with open(path, "ab") as file:
                file.write(as_json(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"{path} could not be written: {error.strerror}; the checkpoints are whole") from error
