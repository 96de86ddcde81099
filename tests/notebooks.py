"""The notebooks of examples/, run from top to bottom in folders of their own. `python tests/notebooks.py` writes them.

They are stored with what comes out, to be read where nothing runs: on the site, and on a repository's page.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(path, folder):
    """The notebook with what its cells print and draw; the kernel sees this checkout, and the command `irpe`."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    places = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    more = {name: os.pathsep.join(filter(None, [str(one), os.environ.get(name)])) for name, one in places.items()}
    # plain lines of one width; tqdm would like widgets
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PYTHONWARNINGS": "ignore:IProgress"}
    environment = os.environ | more | plain | {"HF_HUB_OFFLINE": "1"}
    options = dict(timeout=600, record_timing=False, coalesce_streams=True)
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute(env=environment)
    for cell in notebook.cells:
        for one in cell.get("outputs", ()):
            one.get("data", {}).pop("image/jpeg", None)  # Pillow's second one of a picture
    return notebook


def kinds(notebook):
    """What each cell of code leaves, by kind: text that was printed, pictures, values."""
    return [
        ["text" if one.output_type == "stream" else min(one.data) for one in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main():
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, folder)
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(notebook, path)
        print(path.name, f"{path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
