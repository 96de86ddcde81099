"""The workflows of .github, which run elsewhere: what they name is there, and wheels are those of `make wheels`."""

import re
import shlex

import pytest
import tomllib
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path):
    """The command lines of all jobs."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_names_is_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = commands(path)
    assert lines
    for words in map(shlex.split, lines):
        if words[0] == "make":
            assert words[1] in targets
        for word in words:
            if word.startswith((".ci/", "tests/", "pyproject", "rpe_ops")):
                assert list(ROOT.glob(word)), word


def test_pythons_are_those_that_the_package_takes_and_the_page_names():
    found = re.findall(r'"(3\.\d+)"', (ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert sorted(set(found), key=lambda one: int(one[2:])) == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    assert all(one in (ROOT / "docs" / "versions.md").read_text() for one in found)


def test_wheels_of_cibuildwheel_are_those_of_make_wheels():
    """Built against the oldest torch, for the oldest Python, with the same libraries left to torch."""
    settings = PROJECT["tool"]["cibuildwheel"]
    setup = (ROOT / "rpe_ops" / "setup.py").read_text()
    (oldest,) = [one for one in map(Requirement, PROJECT["project"]["dependencies"]) if one.name == "torch"]
    (built,) = [Requirement(word) for word in settings["before-build"].split() if word.startswith("torch")]
    assert str(oldest.specifier) == ">=2.11" and str(built.specifier) == "==2.11.0" and "0x020b" in setup
    assert settings["test-requires"] == [str(built)] and settings["environment"] == {"RPE_OPS_CUDA": "0"}
    assert settings["build-frontend"]["args"] == ["--no-build-isolation"]
    assert int(re.search(r"cp3(\d+)-", settings["build"]).group(1)) >= int(re.search(r'"cp3(\d+)"', setup).group(1))
    (recipe,) = re.findall(r"^\tauditwheel (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    left_out = [re.findall(r"--exclude '([^']+)'", one) for one in (recipe, settings["linux"]["repair-wheel-command"])]
    assert left_out[1] == [name for name in left_out[0] if "cuda" not in name] != []
    assert "--strip" in recipe and "--strip" in settings["linux"]["repair-wheel-command"]
    assert any(
        "--config-file pyproject.toml" in one and one.endswith("rpe_ops")
        for path in WORKFLOWS
        for one in commands(path)
    )
