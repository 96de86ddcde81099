"""docs/api.md: every public name with its one line, from the docstrings. `python tests/api.py` writes the page."""

import importlib
import inspect
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
INTRODUCTION = """# Public names

What stands here stays as it is until a version says otherwise; everything else is internal, with an underscore or
without. `help(name)` has arguments, shapes, errors and sources. The page is made of the docstrings
(`python tests/api.py`).
"""
# what each module is for, and its public names where it has no __all__
MODULES = {
    "irpe": ("", None),
    "irpe.prediction": ("What `irpe.load` gives its models as `predict`.", None),
    "irpe.attention_maps": ("The numbers of `irpe show RUN --image`.", ["AttentionMaps", "Row", "attention_maps"]),
    "irpe.models": ("Its import registers the released DeiTs as models of timm.", ["count_macs"]),
    "irpe.detr": ("Released DETRs for transformers.", ["ReleasedDETR", "detr_r50", "detr_state_dict"]),
    "irpe.integrations.hf_vit": ("What `irpe.load` calls for transformers.", ["from_pretrained", "read_config"]),
    "irpe.integrations.on_map": ("Blocks of timm's models, run by hand.", ["blocks_on_map"]),
    "rpe_ops": ("The directory to copy.", ["backends"]),
    "rpe_ops.rpe_index": ("", ["RPEIndexFunction", "rpe_bucket_sum", "rpe_index"]),
    "rpe_ops.rpe_attention": ("", ["choose", "rpe_attention", "why_not"]),
    "rpe_ops.reference": ("The law.", ["dropout_weights", "rpe_attention", "rpe_bucket_sum", "rpe_index"]),
}


def public(name):
    """{public name: what it is} of a module."""
    module = importlib.import_module(name)
    return {one: getattr(module, one) for one in MODULES[name][1] or module.__all__}


def line(found):
    """The first paragraph of the docstring."""
    if isinstance(found, str):
        return "The version."
    return " ".join(inspect.getdoc(found).split("\n\n")[0].split()).replace("|", "\\|")


def page():
    """The text of docs/api.md."""
    parts = [INTRODUCTION]
    for name, (purpose, _) in MODULES.items():
        rows = [f"| `{one}` | {line(found)} |" for one, found in public(name).items()]
        parts += [f"## {name}\n", *([purpose + "\n"] if purpose else []), "\n".join(["| | |", "|---|---|", *rows, ""])]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parent.parent))
    PAGE.write_text(page(), encoding="utf-8")
