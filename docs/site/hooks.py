"""The site's pages are files of the repository, at their own places: mkdocs.yml has what is around them.

A link of README.md to docs/use.md, or of docs/use.md to ../SECURITY.md, leads to the same file on both. Notebooks
become pages, and below the names of docs/api.md come their docstrings.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

# pages, and files that pages link to
SHOWN = (
    "*.md", "LICENSE", "CITATION.cff", "requirements-dev.txt", "docs/*.md", "docs/images/*.png", "examples/*.md",
    "examples/*.py", "examples/*.ipynb", "irpe/irpe.py", "rpe_ops/README.md",
)  # fmt: skip
NAME = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


class Notebook(File):
    """A notebook is a page."""

    def is_documentation_page(self):
        return True


def on_files(files, config):
    """The files of SHOWN in place of those of docs/; the theme's stay."""
    root = Path(config.config_file_path).parent
    shown = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted(path for pattern in SHOWN for path in root.glob(pattern)):
        kind = Notebook if path.suffix == ".ipynb" else File
        shown.append(kind.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return shown


def on_page_read_source(page, config):
    """A notebook as Markdown; other pages are read as they are."""
    if page.file.src_uri.endswith(".ipynb"):
        notebook = json.loads(Path(page.file.abs_src_path).read_text(encoding="utf-8"))
        return "\n\n".join(part for cell in notebook["cells"] for part in markdown(cell))
    return None


def on_page_markdown(markdown, page, config, files):
    """Below each table of docs/api.md the docstrings of its names, to which they link."""
    if page.file.src_uri != "docs/api.md":
        return None
    head, *modules = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    return head + "".join(with_docstrings(one) for one in modules)


def with_docstrings(section):
    """A section of docs/api.md, a module's, with a docstring for each name of its table."""
    module = section.split("\n", 1)[0].removeprefix("## ").strip()
    names = [name for name in NAME.findall(section) if not name.startswith("__")]
    # irpe.equip is a function, and a file that has it
    path = {name: f"{module}.{name}" for name in names}
    path |= {name: f"{one}.{name}" for name, one in path.items() if Path(*one.split(".")).with_suffix(".py").exists()}
    linked = NAME.sub(lambda found: f"| [`{found[1]}`][{path[found[1]]}] |" if found[1] in path else found[0], section)
    return linked + "".join(f"\n::: {one}\n" for one in path.values()) + "\n"


def markdown(cell):
    """The parts of a cell: its text, or its code and what came of it."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *(shown for one in cell["outputs"] if (shown := output(one)))]


def output(one):
    """What a cell has printed, returned or drawn."""
    if "text" in one:
        return fenced(one["text"])
    if picture := one["data"].get("image/png"):
        return f"![what the cell above draws](data:image/png;base64,{''.join(picture).strip()})"
    return fenced(one["data"]["text/plain"])


def fenced(lines):
    return f"```text\n{''.join(lines).rstrip()}\n```"
