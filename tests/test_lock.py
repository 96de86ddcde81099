"""requirements-dev.lock, which `make` and CI install: it holds the short list, with hashes, and what extras want."""

import re

import tomllib
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / "requirements-dev.lock").read_text()


def locked():
    """(name, version) -> number of hashes."""
    found = {}
    for block in re.split(r"\n(?=[a-z0-9])", "\n".join(x for x in LOCK.splitlines() if not x.startswith("#"))):
        name, version = re.match(r"([a-z0-9.-]+)==([^ ;\\]+)", block.strip()).groups()
        found[name, version] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
    return found


def test_every_file_has_a_hash_and_none_an_address():
    assert all(locked().values()) and len(locked()) > 100
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK


def test_it_is_of_the_short_list():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements-dev.txt").read_text().splitlines()]
    for line in filter(None, lines):
        assert tuple(line.split("==")) in locked(), f"{line} is not in requirements-dev.lock: make lock"


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
