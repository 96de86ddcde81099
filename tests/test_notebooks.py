"""The notebooks of examples/: what is stored is what comes out, and every one is listed, run and shown."""

import json
import re

import pytest
from conftest import ROOT

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from notebooks import NOTEBOOKS, kinds, run

EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_are_three_and_the_list_of_examples_has_them():
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (ROOT / "examples" / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS] and len(listed) == 3


@EACH
def test_what_is_stored_was_run_from_top_to_bottom_and_is_nobodys(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "make notebooks"
    outputs = [one for cell in code for one in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    text = json.dumps([{key: value for key, value in one.items() if key != "data"} for one in outputs])
    assert "/tmp" not in text and "/home" not in text and "\\u001b" not in text
    assert path.stat().st_size < 200 * 1024, "pictures are small"


@pytest.mark.slow
@EACH
def test_it_runs_and_leaves_what_is_stored(path, tmp_path):
    """Numbers depend on the processor; what each cell leaves, and the asserts of the notebook, do not."""
    assert kinds(run(path, tmp_path)) == kinds(read(path)), "make notebooks"


def test_a_command_that_fails_stops_a_notebook(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "fails.ipynb"
    cell = nbformat.v4.new_code_cell("%%bash\nirpe show --height nine")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(CellExecutionError, match="nine"):
        run(path, tmp_path)
