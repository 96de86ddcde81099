"""The examples run as they are, each in an interpreter and a folder of its own."""

import importlib.util

import pytest
from conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"timm_model": "timm", "transformers_model": "transformers", "detr": "transformers", "video": "transformers"}


@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * (file.stem in NEEDS)) for file in EXAMPLES]
)
def test_example(file, run_python):
    if importlib.util.find_spec(NEEDS.get(file.stem, "torch")) is None:
        pytest.skip(f"needs {NEEDS[file.stem]}")
    done = run_python(f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')", path=[ROOT])
    losses = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert not losses or sum(losses[-3:]) < sum(losses[:3])


def test_there_are_five_and_each_fits_a_screen():
    assert [file.stem for file in EXAMPLES] == ["detr", "plain_torch", "timm_model", "transformers_model", "video"]
    for file in EXAMPLES:
        assert len(file.read_text().splitlines()) < 40, file.name
