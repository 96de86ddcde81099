"""The site of mkdocs.yml: every page is in its menu, CI builds it strictly, and a page fetches nothing from outside."""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from api import MODULES, public
from conftest import ROOT

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
built = pytest.mark.skipif(not MKDOCS.exists(), reason="the site's environment is not there: make docs")


def entries(menu):
    """The files of a menu, its sections included."""
    for one in menu:
        for value in one.values():
            yield from [value] if isinstance(value, str) else entries(value)


def test_the_menu_has_every_page_once_and_no_other():
    patterns = ("*.md", "docs/*.md", "examples/*.md", "examples/*.ipynb", "rpe_ops/*.md")
    pages = [path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)]
    assert sorted(entries(CONFIG["nav"])) == sorted(pages)


def test_ci_builds_it_and_every_warning_is_an_error():
    assert re.search(r"^make docs$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    (recipe,) = re.findall(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # --quiet would drop warnings before they are counted
    assert "mkdocs build --strict\n" in recipe and CONFIG["strict"] is True
    assert set(CONFIG["validation"].values()) == {"warn"} and "anchors" in CONFIG["validation"]


def copied(place):
    """The files of the repository that the site reads, in another folder."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build", "csrc")
    for name in ("irpe", "rpe_ops", "docs", "examples"):
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    for path in (*ROOT.glob("*.md"), *(ROOT / name for name in ("LICENSE", "CITATION.cff", "requirements-dev.txt"))):
        shutil.copy(path, place)
    shutil.copy(ROOT / "mkdocs.yml", place)
    return place


def build(place):
    command = [str(MKDOCS), "build", "--strict"]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})


@built
@pytest.mark.slow
def test_what_is_built_has_docstrings_and_notebooks_and_fetches_nothing(tmp_path):
    done = build(copied(tmp_path))
    assert done.returncode == 0, done.stderr
    site = tmp_path / "build" / "site"
    names = (site / "docs" / "api.html").read_text()
    for module in MODULES:
        for name in set(public(module)) - {"__version__"}:
            assert re.search(rf'id="{re.escape(module)}\.(\w+\.)?{name}"', names), f"{module}.{name}"
    assert 'id="irpe.equip.Adapter"' not in names
    assert (site / "examples" / "look_at_encodings.html").read_text().count("data:image/png;base64") >= 3
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect)[^>]+href=[\"']?(?:https?:)?//", text), page
    # a file to copy, and a page beside it, from the start
    assert 'href="irpe/irpe.py"' in (site / "index.html").read_text() and (site / "irpe" / "irpe.py").exists()


@built
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "more", "said"),
    [
        ("README.md", "[gone](docs/gone.md)", "docs/gone.md"),
        ("docs/use.md", "[gone](train.md#gone)", "#gone"),
        ("docs/extra.md", "# Not in the menu", "docs/extra.md"),
    ],
)
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, page, more, said):
    place = copied(tmp_path)
    with (place / page).open("a") as file:
        file.write(f"\n{more}\n")
    done = build(place)
    assert done.returncode != 0 and said in done.stdout + done.stderr
