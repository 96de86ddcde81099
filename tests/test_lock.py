"""The lock files, which `make` and CI install: they hold the short lists, with hashes, and what extras want."""

import re

import pytest
import tomllib
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEAST = {"requirements-dev": 100, "requirements-docs": 20}  # packages
EACH = pytest.mark.parametrize("name", LEAST)


def locked(name="requirements-dev"):
    """(name, version) -> number of hashes."""
    found = {}
    lines = (ROOT / f"{name}.lock").read_text().splitlines()
    for block in re.split(r"\n(?=[a-z0-9])", "\n".join(x for x in lines if not x.startswith("#"))):
        name, version = re.match(r"([a-z0-9.-]+)==([^ ;\\]+)", block.strip()).groups()
        found[name, version] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
    return found


@EACH
def test_every_file_has_a_hash_and_none_an_address(name):
    assert all(locked(name).values()) and len(locked(name)) > LEAST[name]
    text = (ROOT / f"{name}.lock").read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text


@EACH
def test_it_is_of_the_short_list(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / f"{name}.txt").read_text().splitlines()]
    for line in filter(None, lines):
        package, version = line.split("==")
        assert (package.split("[")[0], version) in locked(name), f"{line} is not in {name}.lock: make lock"


def test_both_have_one_ruff_and_the_site_has_no_torch():
    both = dict(locked()), dict(locked("requirements-docs"))
    (ours,) = [version for package, version in both[0] if package == "ruff"]
    assert ("ruff", ours) in both[1] and "torch" not in {package for package, _ in both[1]}


def test_what_the_extras_ask_for_is_in_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {}
    for name, version in locked():
        versions.setdefault(name, []).append(version)
    asked = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    for one in map(Requirement, asked):
        if one.name == "irpe" or (one.marker and not one.marker.evaluate({"python_version": "3.11"})):
            continue
        its = versions.get(canonicalize_name(one.name), [])
        assert any(one.specifier.contains(version) for version in its), f"{one}: {its} in requirements-dev.lock"
