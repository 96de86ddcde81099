"""Where the figures of a run go besides its log: TensorBoard, Weights & Biases, MLflow. A run here is one run there."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from .files import read_json, reason_of, write_json
from .folder import BOARD, TRACKERS
from .settings import RunSettings
from .workers import RunError

PROJECT = "irpe"  # there, where the environment names no other
_LONGEST = 500  # characters of a setting, as MLflow takes them


class Tracker(Protocol):
    """What takes the figures of a step, by names such as val/top1, until the run ends or is left."""

    id: str | None  # of its run, to go on with

    def log(self, values: dict[str, float], step: int) -> None:
        """The figures of a step."""

    def close(self, *, ended: bool) -> None:
        """The run has come to its end, or was stopped or failed."""


class _TensorBoard:
    id: str | None = None  # the run there is in the folder of this one

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, *, ended: bool) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: RunSettings, before: str | None) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=before, resume="allow",
            dir=str(folder), config=None if before else dataclasses.asdict(settings),
            settings=wandb.Settings(console="off"),  # what is printed is nobody else's
        )  # fmt: skip
        self.id: str | None = self.run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, *, ended: bool) -> None:
        self.run.finish(exit_code=0 if ended else 1)


class _MLflow:
    def __init__(self, folder: Path, settings: RunSettings, before: str | None) -> None:
        from mlflow import MlflowClient

        self.client: Any = MlflowClient()
        self.id = before
        if before is not None:
            self.client.update_run(before, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        for key, value in dataclasses.asdict(settings).items():
            self.client.log_param(self.id, key, str(value)[:_LONGEST])

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self, *, ended: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if ended else "KILLED")


_TRACKERS: dict[str, Callable[[Path, RunSettings, str | None], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
}  # by --track, which are the names of their packages


def check_packages(settings: RunSettings) -> None:
    """Refuses trackers whose package is missing, before anything is read.

    Raises:
        ValueError: with what installs it.
    """
    for name in settings.track:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--track {name}: no module named {name}; pip install {name} brings it")


def trackers_of(folder: Path, settings: RunSettings, step: int) -> dict[str, Tracker]:
    """The trackers of a run that begins, or goes on after `step`; called in the first process.

    The ids of their runs are kept in trackers.json, so that a run that goes on does so there, too.

    Raises:
        RunError: one cannot begin, with its reason.
    """
    found: dict[str, Tracker] = {}
    if settings.tensorboard:
        with suppress(ImportError):  # its package is not there, or does not fit
            found[BOARD] = _TensorBoard(folder, step)
    ids = _ids(folder / TRACKERS)
    for name in dict.fromkeys(settings.track):
        try:
            found[name] = _TRACKERS[name](folder, settings, ids.get(name))
        except Exception as error:  # of any kind: no network, no login, a run that is there no more
            again = f" ({folder / TRACKERS} names its run there; without it another one begins)" if name in ids else ""
            raise RunError(f"--track {name}: {reason_of(error)}{again}") from None
        ids[name] = str(found[name].id)
        write_json(folder / TRACKERS, ids)
    return found


def _ids(path: Path) -> dict[str, str]:
    """{tracker: id of its run} in a file, which may be anybody's."""
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict) or not all(re.fullmatch(r"[\w-]{1,64}", str(value)) for value in values.values()):
        raise ValueError(f"{path} is not of a run of irpe, or it is damaged; without it trackers begin other runs")
    return {str(name): str(value) for name, value in values.items()}
