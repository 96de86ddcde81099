"""docs/support.md, the matrix of model families and features, made from the outcomes of the tests.

    python -m pytest -m "not slow and not gpu" --outcomes=build/fast.json
    python -m pytest -m "slow and not gpu" --outcomes=build/slow.json
    python tests/support.py build/fast.json build/slow.json > docs/support.md

A test function that stands in FEATURES and has a parameter `family` (or one whose name ends so) fills a cell: yes where
some of its cases have passed and none failed (others are skipped: what the plain model cannot do either), no where one
has failed, empty where none ran.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

# test function: the feature that it stands for; several may stand for one
FEATURES = {
    "test_zero_tables_change_nothing": "outputs kept",
    "test_zero_tables_in_float32_stay_within_the_gap_between_timms_formulas": "outputs kept",
    "test_zero_tables_in_float32_stay_within_the_gap_between_backends": "outputs kept",
    "test_outputs_and_gradients_are_those_of_the_formula": "formula, gradients",
    "test_masks": "masks",
    "test_attention_dropout_in_training_only": "dropout",
    "test_some_blocks": "some blocks",
    "test_some_blocks_then_others": "some blocks",
    "test_unequip_gives_the_original_back": "unequip",
    "test_copies_stand_alone": "copy, pickle",
    "test_state_dicts_load_strictly": "save, load",
    "test_saving_and_loading": "save, load",
    "test_checkpointing": "checkpointing",
    "test_checkpointing_repeats_each_pass_on_its_own_map": "checkpointing",
    "test_bfloat16": "bfloat16",
    "test_bfloat16_autocast": "bfloat16",
    "test_half_precision": "bfloat16",
    "test_compiled": "compile",
    "test_compile_fullgraph": "compile",
    "test_compile_fullgraph_with_image_sizes_in_turns": "compile",
    "test_attention_maps": "attention maps",
    "test_features_of_a_block_and_its_attention": "fx",
    "test_attention_maps_by_name": "fx",
    "test_export": "export",
    "test_export_with_dynamic_batch": "export",
}
LIBRARIES = {"test_timm": "timm", "test_fx": "timm", "test_hf": "transformers", "test_torch": "torch and torchvision"}

outcomes: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="where to write what support.py reads")


def pytest_collection_modifyitems(items):
    for item in items:
        feature = FEATURES.get(getattr(item, "originalname", None))
        library = next((name for prefix, name in LIBRARIES.items() if item.path.stem.startswith(prefix)), None)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        family = next((value for name, value in parameters.items() if name.endswith("family")), None)
        if feature and library and isinstance(family, str):
            item.user_properties.append(("support", (library, family, feature)))


def pytest_runtest_logreport(report):
    for key, cell in report.user_properties:
        if key == "support" and (report.when == "call" or report.outcome != "passed"):
            library, family, feature = cell
            outcomes[library, family][feature].add(report.outcome)


def pytest_sessionfinish(session):
    file = session.config.getoption("--outcomes")
    if file is not None and not hasattr(session.config, "workerinput"):
        file.parent.mkdir(exist_ok=True)
        rows = [[*row, feature, sorted(found)] for row, cells in outcomes.items() for feature, found in cells.items()]
        file.write_text(json.dumps(rows))


def read(files):
    """Adds what the runs that wrote these files have found."""
    for file in files:
        for library, family, feature, found in json.loads(Path(file).read_text()):
            outcomes[library, family][feature].update(found)


def page():
    features = list(dict.fromkeys(FEATURES.values()))
    lines = [
        "# What `equip` supports",
        "",
        "Made by the tests (`make support`), not by hand: **yes** where cases of that family and feature have passed",
        "and none has failed (what the plain model cannot do either is skipped), empty where no test looks at it on",
        "its own. CI makes it anew and compares.",
    ]
    for library in dict.fromkeys(LIBRARIES.values()):
        rows = {family: cells for (one, family), cells in outcomes.items() if one == library}
        shown = [feature for feature in features if any(feature in cells for cells in rows.values())]
        lines += ["", f"## {library}", "", "| model | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
        for family in sorted(rows):
            marks = [mark(rows[family].get(feature, set())) for feature in shown]
            lines.append(f"| {family} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def mark(found):
    return "no" if "failed" in found else "yes" if "passed" in found else ""


if __name__ == "__main__":
    read(sys.argv[1:])
    print(page(), end="")
