"""irpe/runs/trackers.py: the figures of runs in Weights & Biases and MLflow, in stand-ins and in the real ones.

The stand-ins have what is used of the packages. The tests of the real packages run where these are installed.
"""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from train_tiny import SMALL, irpe, log, pictures, process, words

from irpe.runs import trackers
from irpe.runs.workers import RunError
from irpe.train.settings import settings_from

STEPS = [*SMALL, "--epochs", 2, "--log-every", 1, "--batch-size", 15, "--no-plots", "--no-tensorboard"]
BOTH = ["--track", "wandb", "--track", "mlflow"]

WANDB = """
import json, os

def say(**values):
    with open(os.environ["SAID"], "a") as file:
        file.write(json.dumps(values) + "\\n")

class Settings:
    def __init__(self, *, console):
        assert console == "off"

class Run:
    def __init__(self, id):
        self.id = id

    def log(self, values, step):
        if os.environ.get("BREAKS"):
            raise ConnectionError("the network\\nis gone")
        say(to="wandb", id=self.id, values=values, step=step)

    def finish(self, exit_code):
        say(to="wandb", id=self.id, end=exit_code)

def init(*, project, name, id, resume, dir, config, settings):
    if os.environ.get("REFUSES"):
        raise RuntimeError("no key: wandb login\\nand more")
    assert isinstance(settings, Settings) and resume == "allow" and os.path.isdir(dir)
    say(to="wandb", project=project, name=name, before=id, config=config)
    return Run(id or "w" + name)
"""
MLFLOW = """
from types import SimpleNamespace as of

from wandb import say

class MlflowClient:
    def get_experiment_by_name(self, name):
        return None if name == "irpe" else of(experiment_id=name)

    def create_experiment(self, name):
        return "new " + name

    def create_run(self, experiment, run_name):
        say(to="mlflow", project=experiment, name=run_name)
        return of(info=of(run_id="m" + run_name))

    def update_run(self, id, status):
        say(to="mlflow", before=id, status=status)

    def log_param(self, id, key, value):
        assert isinstance(value, str) and len(value) <= 500
        say(to="mlflow", id=id, key=key, value=value)

    def log_metric(self, id, key, value, step):
        say(to="mlflow", id=id, values={key: value}, step=step)

    def set_terminated(self, id, status):
        say(to="mlflow", id=id, end=status)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), per_class=8)


@pytest.fixture
def said(tmp_path, monkeypatch):
    """The stand-ins in place of the packages; gives what they were told, of one of them."""
    place = tmp_path / "packages"
    for name, text in (("wandb", WANDB), ("mlflow", MLFLOW)):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(place)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAID", str(tmp_path / "said"))

    def said(to):
        lines = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
        return [{key: value for key, value in one.items() if key != "to"} for one in lines if one["to"] == to]

    yield said
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)


def figures(lines):
    """{name: {step: value}}"""
    found = {}
    for one in lines:
        for name, value in one.get("values", {}).items():
            found.setdefault(name, {})[one["step"]] = value
    return found


def of_log(run):
    """The same, of log.jsonl."""
    steps, epochs = log(run, "step"), log(run, "epoch")
    found = {f"train/{name}": {one["step"]: one[name] for one in steps} for name in ("loss", "lr", "grad_norm")}
    return found | {
        f"val/{name}": {one["step"]: one["val"][name] for one in epochs} for name in ("loss", "top1", "top5")
    }


def test_a_run_goes_to_both_and_goes_on_in_the_same_runs_there(said, folder, tmp_path):
    arguments = ["train", folder, *STEPS, *BOTH, "--out", tmp_path, "--name", "run"]
    assert irpe(*arguments, "--max-steps", 3).exit_code == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert said("wandb")[0] == {"project": "irpe", "name": "run", "before": None, "config": settings}
    assert said("mlflow")[0] == {"project": "new irpe", "name": "run"}
    told = {one["key"]: one["value"] for one in said("mlflow") if "key" in one}
    assert told.keys() == settings.keys() and told["batch_size"] == "15" and told["track"] == "('wandb', 'mlflow')"
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": "wrun", "mlflow": "mrun"}
    first = {name: len(said(name)) for name in ("wandb", "mlflow")}

    result = irpe(*arguments, "--resume", "auto")
    assert result.exit_code == 0, result.output
    again = said("wandb")[first["wandb"] :]
    assert again[0] == {"project": "irpe", "name": "run", "before": "wrun", "config": None}
    assert {one["id"] for one in again[1:]} == {"wrun"}
    assert said("mlflow")[first["mlflow"]] == {"before": "mrun", "status": "RUNNING"}
    assert {one["id"] for one in said("mlflow") if "values" in one} == {"mrun"}
    for name, end in (("wandb", 0), ("mlflow", "FINISHED")):
        assert figures(said(name)) == of_log(tmp_path / "run")
        assert [one["end"] for one in said(name) if "end" in one] == [end, end]

    assert irpe(*arguments, "--overwrite", "--max-steps", 1).exit_code == 0  # anew, there as well
    assert [one["before"] for one in said("wandb") if "before" in one] == [None, "wrun", None]


def test_names_of_projects_come_from_the_environment(said, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    assert irpe("train", folder, *STEPS, *BOTH, "--out", tmp_path, "--name", "run", "--max-steps", 1).exit_code == 0
    assert said("wandb")[0]["project"] == "mine" and said("mlflow")[0]["project"] == "ours"


def test_a_run_that_fails_says_so_there(said, folder, tmp_path):
    arguments = ["train", folder, *STEPS, *BOTH, "--lr", 1e20, "--out", tmp_path, "--name", "run"]
    result = irpe(*arguments)
    assert result.exit_code == 1 and ("not finite" in words(result) or "is nan" in words(result))
    assert said("wandb")[-1] == {"id": "wrun", "end": 1} and said("mlflow")[-1] == {"id": "mrun", "end": "KILLED"}


def test_a_tracker_that_breaks_is_told_once_and_the_run_goes_on(said, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BREAKS", "1")
    result = irpe("train", folder, *STEPS, *BOTH, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 0
    assert words(result).count("wandb takes no more, log.jsonl has it all: the network") == 1
    assert not figures(said("wandb")) and figures(said("mlflow")) == of_log(tmp_path / "run")


def test_a_tracker_that_cannot_begin_is_a_sentence(said, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSES", "1")
    settings = settings_from("small", {"data": "digits", "track": ("wandb",)})
    with pytest.raises(RunError, match=r"^--track wandb: no key: wandb login$"):
        trackers.trackers_of(tmp_path, settings, 0)
    (tmp_path / "trackers.json").write_text('{"wandb": "lost"}')
    with pytest.raises(
        RunError, match=r"no key: wandb login \(.*trackers.json names its run there; without it another"
    ):
        trackers.trackers_of(tmp_path, settings, 0)


@pytest.mark.parametrize("text", ["[]", '{"wandb": "../x"}', '{"wandb": "a b"}', '{"mlflow": null, "wandb": ""}'])
def test_a_file_of_ids_may_be_anybodys(said, tmp_path, text):
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=r"trackers.json is not of a run of irpe, or it is damaged"):
        trackers.trackers_of(tmp_path, settings_from("small", {"data": "digits", "track": ("wandb",)}), 0)


def test_a_missing_package_and_an_unknown_tracker_are_told_before_anything_is_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    result = irpe("train", "nothere", "--track", "wandb", "--out", tmp_path)
    assert result.exit_code == 2 and "--track wandb: no module named wandb; pip install wandb brings it" in words(
        result
    )
    result = irpe("train", "nothere", "--track", "wandb,mlflow")
    assert "--track wandb,mlflow; expected one of wandb, mlflow, and the option once for each" in words(result)


def test_detection_goes_there_too(said, tmp_path):
    pytest.importorskip("torchmetrics")
    from test_detect_folder import detect

    assert detect(tmp_path, *BOTH, "--max-steps", 3).exit_code == 0
    assert detect(tmp_path, *BOTH, "--resume", "auto").exit_code == 0
    for name in ("wandb", "mlflow"):
        found = figures(said(name))
        assert list(found["train/loss"]) == [1, 2, 3, 4] and list(found["val/AP50"]) == [2, 3, 4]
        assert len({one["id"] for one in said(name) if "values" in one}) == 1


@pytest.mark.slow
def test_the_first_of_two_processes_logs_alone(said, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    done = process("train", folder, *STEPS, "--batch-size", 16, *BOTH, "--out", tmp_path, "--name", "run", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("wandb", "mlflow"):
        assert figures(said(name)) == of_log(tmp_path / "run")
        assert sum("end" in one for one in said(name)) == 1


@pytest.mark.slow
def test_mlflow_itself_is_told(folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    arguments = ["train", folder, *STEPS, "--track", "mlflow", "--out", tmp_path, "--name", "run"]
    for more in (["--max-steps", 3], ["--resume", "auto"]):
        result = irpe(*arguments, *more)
        assert result.exit_code == 0, result.output
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("irpe").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["batch_size"] == "15"
    for name, values in of_log(tmp_path / "run").items():
        assert {one.step: one.value for one in client.get_metric_history(run.info.run_id, name)} == values


@pytest.mark.slow
def test_wandb_itself_is_told(folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ["train", folder, *STEPS, "--track", "wandb", "--out", tmp_path, "--name", "run"]
    for more in (["--max-steps", 3], ["--resume", "auto"]):
        result = irpe(*arguments, *more)
        assert result.exit_code == 0, result.output
    own = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert found and {one.name.rsplit("-", 1)[1] for one in found} == {own}
    assert all(next(one.glob("*.wandb")).stat().st_size > 500 for one in found)
