"""The figures of all runs in one small file, and their curves as a picture."""

import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from irpe import viz

from .arms import ABSOLUTE, MAIN, PARTS, WITHOUT
from .fit import Effort

DRAWN = (WITHOUT, ABSOLUTE, *MAIN[2:6])


@dataclass(frozen=True)
class Found:
    """What `plan.json` says, the learning rate, the results of pilot and runs, and the names of what was left out."""

    calibration: dict[str, Any]
    lr: float
    results: list[dict[str, Any]]
    left_out: list[str]


def collected(found: Found) -> dict[str, Any]:
    """{"machine", "settings", "parts": {part: arms}, "step": {arm: us for a picture}, "pilot", "runs", "left out"}."""
    runs, pilots = [], []
    for result in found.results:
        settings = result["settings"]
        row = {"arm": result["arm"], "seed": settings["seed"], "parameters": result["parameters"]}
        row |= {"accuracy": {size: round(value, 3) for size, value in result["accuracy"].items()}}
        row |= {"curve": [round(value, 3) for value in result["curve"]]}
        row |= {"loss": [round(value, 4) for value in result["loss"]], "seconds": round(result["seconds"], 1)}
        if settings["pilot"]:
            pilots.append({"lr": settings["lr"], **row})
        else:
            runs.append(row)
    machines = [result["machine"] for result in found.results]
    if others := {one["device"] for one in machines} - {machines[0]["device"]}:
        raise ValueError(f"runs of {machines[0]['device']} and of {', '.join(others)}; expected those of one device")
    effort = found.calibration["effort"]
    steps = found.calibration["steps"][str(Effort(**effort).shape)]
    return {
        "machine": machines[-1],
        "settings": {"lr": found.lr, "amp": found.calibration["amp"], **effort},
        "parts": {
            part: [{"arm": arm.name, "title": arm.title, "rpe": arm.rpe, "paper": arm.paper} for arm in arms]
            for part, arms in PARTS.items()
        },
        "step": {name: round(one["cost"] * 1e6, 2) for name, one in steps.items()},
        "pilot": pilots,
        "runs": runs,
        "left out": found.left_out,
    }


def write(file: Path, found: Found) -> None:
    """`collected` as JSON, a line for each run, and beside it the curves."""
    figures = collected(found)
    lines = []
    for name, value in figures.items():
        if name in ("pilot", "runs"):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f' "{name}": [\n  {rows}\n ]')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draw(file.with_suffix(".png"), figures)


def draw(file: Path, figures: dict[str, Any]) -> None:
    """Training loss and accuracy at 32x32 over epochs: the mean of the seeds as a line, their range as a band."""
    panels = []
    for key, label in (("curve", "right answers in percent, 32×32"), ("loss", "training loss")):
        curves = []
        for arm, color in zip(DRAWN, cycle(viz.COLORS), strict=False):
            values = [run[key] for run in figures["runs"] if run["arm"] == arm.name]
            if values:
                curves.append(viz.Curve(arm.title, range(1, len(values[0]) + 1), np.array(values), color))
        panels.append(viz.Panel(label, curves))
    viz.draw_panels(file, panels)
