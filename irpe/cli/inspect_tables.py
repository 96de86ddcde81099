"""The facts of `irpe inspect` in tables and sentences."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ..runs.files import counted

_SHOWN, _ENDS = 40, 12  # classes that are listed all; and at each end of a longer list
_NAMES = 5  # of files in a sentence
_ONE = {"classes": "class", "categories": "category"}
_BAR = 24


def tables(facts: dict[str, Any]) -> Iterator[Table | str]:
    """What is printed, one after the other."""
    parts = facts["parts"]
    unit = "boxes" if facts["kind"] == "detection" else "pictures"
    kind = "categories" if unit == "boxes" else "classes"
    counts = ", ".join(counted(part["pictures"], "picture", "pictures") + _of(name) for name, part in parts.items())
    yield f"{facts['data']}: {counted(len(facts['classes']), _ONE[kind], kind)}, {counts}"
    yield from facts["notes"]
    yield _classes(facts, unit)
    if few := facts["few"]:
        words = counted(len(few), f"{_ONE[kind]} has", f"{kind} have")
        yield f"{words} fewer than {facts['few_under']:g} {unit}{_of(next(iter(parts)))}: {_some(few)}"
    if any(map(_lines, parts.values())):
        yield _figures(parts)
    if not facts["verified"]:
        yield "no picture was read (--no-verify): what is broken or there twice is not known"
        return
    yield from _broken(parts)
    yield from _twice(facts)


def _of(part: str) -> str:
    return {"train": " to train on", "val": " to evaluate on"}.get(part, "")


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return between.join(names[:_NAMES]) + more


def _classes(facts: dict[str, Any], unit: str) -> Table:
    """The classes from the largest to the smallest, of a long list both ends."""
    parts, few = list(facts["parts"]), set(facts["few"])
    rows = sorted(facts["classes"], key=lambda row: -(row[parts[0]] or 0))
    most = max(1, *(row[parts[0]] or 0 for row in rows))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("category" if unit == "boxes" else "class", overflow="fold")
    for part in parts:
        table.add_column(unit if part == "all" else part, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    long = len(rows) > _SHOWN
    for k, row in enumerate(rows):
        if long and _ENDS <= k < len(rows) - _ENDS:
            if k == _ENDS:
                left = rows[_ENDS : len(rows) - _ENDS]
                words = f"... {len(left):,} more, with {_count(left[0][parts[0]])} to {_count(left[-1][parts[0]])}"
                table.add_row(words, *[""] * len(parts), "")
            continue
        length = round(_BAR * (row[parts[0]] or 0) / most)
        marks = "█" * max(length, 1 if row[parts[0]] else 0) + (" few" if row["name"] in few else "")
        table.add_row(row["name"], *(_count(row[part]) for part in parts), marks)
    if long:
        table.caption, table.caption_justify = f"{len(rows):,} in all, of which --json writes every one", "left"
    return table


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _figures(parts: dict[str, Any]) -> Table:
    """A line for each kind of figure, a column for each part."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in parts:
        table.add_column("pictures" if name == "all" else name, overflow="fold")
    lines = [_lines(part) for part in parts.values()]
    for words in dict.fromkeys(words for each in lines for words in each):
        table.add_row(words, *(each.get(words, "") for each in lines))
    return table


def _lines(part: dict[str, Any]) -> dict[str, str]:
    found = {}
    if "boxes" in part:
        found = {
            "boxes": f"{part['boxes']:,}",
            "small, medium, large": ", ".join(f"{count:,}" for count in part["box_areas"].values()),
            "of crowds": f"{part['of_crowds']:,}",
            "boxes of a picture": _spread(part["boxes_of_a_picture"]),
            "pictures without boxes": f"{part['without_boxes']:,}",
        }
    if part.get("width"):
        found |= {name: _spread(part[name]) for name in ("width", "height")}
        found["not square"] = f"{part['not_square']:,} of {part['of_known_size']:,}"
    for name in ("formats", "modes"):
        if part.get(name):
            found[name] = ", ".join(f"{kind} {count:,}" for kind, count in part[name].items())
    return found


def _spread(values: dict[str, float]) -> str:
    return f"{values['min']:,g} to {values['max']:,g}, median {values['median']:,g}"


def _broken(parts: dict[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if turned := part.get("turned_by_exif"):
            verb, those = ("has", "it") if turned == 1 else ("have", "them")
            words = f"{counted(turned, 'picture', 'pictures')}{_of(name)} {verb} an orientation in EXIF"
            yield f"{words}, which is not followed: turn {those} before"
        if bad := part["unreadable"]:
            names = [f"{picture['name']}: {picture['reason']}" for picture in bad]
            yield f"{counted(len(bad), 'picture', 'pictures')}{_of(name)} cannot be read: {_some(names, '; ')}"
    if not any(part["unreadable"] for part in parts.values()):
        yield "every picture can be read"


def _twice(facts: dict[str, Any]) -> Iterator[str]:
    parts = facts["parts"]
    for name, part in parts.items():
        if part["copies"]:
            count, whole = f"{part['copies']:,}", f"{part['pictures']:,}"
            what = "is a copy of another one" if part["copies"] == 1 else "are copies of others"
            yield f"{count} of {whole} pictures{_of(name)} {what} there, pixel by pixel"
    if pairs := facts.get("of_two_classes"):
        words = _some([" and ".join(pair) for pair in pairs], "; ")
        yield f"{len(pairs):,} of the copies are of another class: {words}"
    if "in_both" not in facts:
        return
    if not (leaks := facts["in_both"]):
        yield "no picture is both in train and in val"
        return
    verb, names = ("is", "it") if len(leaks) == 1 else ("are", "them")
    words = _some([f"{pair['val']} is {pair['train']}" for pair in leaks], "; ")
    yield (
        f"{len(leaks):,} of {parts['val']['pictures']:,} pictures to evaluate on {verb} in train too, pixel by "
        f"pixel, so what is measured on {names} has been learned by heart: {words}"
    )
