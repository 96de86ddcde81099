"""The arrows of CONTRIBUTING.md, read from the sources' own import statements."""

import ast
import sys

import pytest
from conftest import ROOT

THIRD_PARTY = {"timm", "transformers", "matplotlib", "sklearn", "typer", "rich", "numpy", "PIL", "safetensors"}
THIRD_PARTY |= {"onnxruntime", "torchvision", "huggingface_hub", "yaml"}
RUNS = {"irpe.runs", "irpe.viz", "irpe._version", *THIRD_PARTY}
ABOVE = RUNS | {"irpe.equip", "irpe.config_io", "irpe.digits"}  # train and detect
# who may import what, by the longest prefix that fits; torch and the standard library are everyone's
ALLOWED = {
    "rpe_ops": {"rpe_ops"},
    "rpe_ops.setup": {"setuptools"},
    "rpe_ops._triton_ahead": {"triton", "rpe_ops"},
    "rpe_ops._triton_axes": {"triton", "rpe_ops"},
    "rpe_ops._triton_lookup": {"triton", "rpe_ops"},
    "rpe_ops._triton_parts": {"triton"},
    "rpe_ops._triton_places": {"triton", "rpe_ops"},
    "rpe_ops._triton_tables": {"triton", "rpe_ops"},
    "rpe_ops._triton_variants": {"triton", "rpe_ops"},
    "irpe.irpe": {"rpe_ops", "irpe.rpe_ops"},  # and one beside its folder, which here is the first
    "irpe._version": set(),
    "irpe.__init__": {
        *("irpe._version", "irpe.config_io", "irpe.convert", "irpe.equip", "irpe.irpe", "irpe.multihead_attention"),
        *("irpe.publish", "irpe.saving"),
    },
    "irpe.config_io": {"irpe.irpe"},
    "irpe.convert": {"irpe.irpe", "irpe.config_io"},
    "irpe.fx": set(),
    "irpe.multihead_attention": {"irpe.irpe", "irpe.config_io", "irpe.fx"},
    "irpe.integrations.adapter": {"irpe.irpe"},
    "irpe.integrations.torch_mha": {"irpe.irpe", "irpe.multihead_attention", "irpe.integrations.adapter"},
    "irpe.integrations.blocks": {"irpe.irpe", "irpe.fx", "irpe.integrations.adapter"},
    "irpe.integrations.on_map": {"irpe.integrations.blocks"},
    "irpe.integrations.timm_record": {"irpe.irpe", "irpe.config_io"},
    "irpe.integrations.hf_missing": {"irpe.irpe"},
    "irpe.integrations.hf_vit": {
        *("transformers", "irpe.irpe", "irpe.config_io", "irpe.integrations.hf_vit", "irpe.integrations.adapter")
    },
    "irpe.equip": {"irpe.irpe", "irpe.config_io", "irpe.integrations"},
    "irpe.models": {"timm", "irpe.equip"},
    "irpe.detr": {"transformers", "irpe.irpe", "irpe.equip"},
    "irpe.digits": {"sklearn"},
    "irpe.encodings": {"numpy", "irpe.irpe"},
    "irpe.attention_calls": {
        "transformers",
        "irpe.integrations.blocks",
        "irpe.integrations.on_map",
        "irpe.integrations.hf_vit",
    },
    "irpe.attention_maps": {"numpy", "irpe.irpe", "irpe.attention_calls"},
    "irpe.viz_maps": {"numpy", "irpe.irpe"},
    "irpe.viz_image": {"matplotlib", "numpy", "irpe.attention_maps", "irpe.viz"},
    "irpe.viz": {"matplotlib", "numpy", "irpe.encodings", "irpe.viz_maps"},
    "irpe.paired": {"irpe._version", "rpe_ops"},
    "irpe.demo": {"timm", "irpe.digits", "irpe.encodings", "irpe.equip", "irpe.paired"},
    "irpe.runs": RUNS,  # of train and detect nothing, and none of them knows the other
    "irpe.runs.trackers": {"irpe.runs", "wandb", "mlflow"},
    "irpe.train": ABOVE | {"irpe.train", "irpe.encodings"},
    "irpe.detect": ABOVE | {"irpe.detect", "irpe.detr", "irpe.integrations", "torchmetrics"},
}
FILES = sorted([*(ROOT / "irpe").rglob("*.py"), *(ROOT / "rpe_ops").rglob("*.py")])


OF_TIMM = {"timm", "irpe.fx", *(f"irpe.integrations.{name}" for name in ("adapter", "blocks", "on_map"))}


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def within(name, allowed):
    return any(name == one or name.startswith(one + ".") for one in allowed)


BELOW_COMMANDS = {module_name(file).removesuffix(".__init__") for file in FILES} - {"irpe", "irpe.__main__"}
BELOW_COMMANDS = {name for name in BELOW_COMMANDS if not within(name, ["irpe.cli"])}
for name in BELOW_COMMANDS - ALLOWED.keys():
    if name.startswith("irpe.integrations.timm_"):  # a family of timm each
        ALLOWED[name] = OF_TIMM
for above in ("saving", "publish", "prediction", "drawing", "bench"):
    ALLOWED[f"irpe.{above}"] = {*THIRD_PARTY, *BELOW_COMMANDS}


def imports(file):
    """(module, at the top level of the file) for each import, relative ones resolved."""
    package = module_name(file).split(".")[:-1]
    tree = ast.parse(file.read_text())
    top = set(
        map(id, ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])))
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            full = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                file_of = ROOT / (full + "." + alias.name).replace(".", "/")
                is_module = file_of.with_suffix(".py").exists() or file_of.is_dir()
                yield (f"{full}.{alias.name}" if is_module else full), id(node) in top


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_import_direction(file):
    name = module_name(file)
    rule = max((prefix for prefix in ALLOWED if name == prefix or name.startswith(prefix + ".")), key=len, default=None)
    for imported, at_top in imports(file):
        root = imported.split(".")[0]
        if root == "torch" or root in sys.stdlib_module_names:
            continue
        every = {"irpe", "rpe_ops", *THIRD_PARTY, *map(module_name, FILES)} - {"irpe.__main__"}
        allowed = ALLOWED[rule] if rule else every
        assert within(imported, allowed), f"{name} imports {imported}"
        if name == "irpe.equip" and "integrations" in imported and not imported.endswith(".adapter"):
            assert not at_top, "equip imports adapters inside functions: a model's library may be absent"


def test_the_rules_see_what_they_forbid(tmp_path):
    """The reader itself: relative, nested and aliased imports are found."""
    file = ROOT / "irpe" / "equip.py"
    found = dict(imports(file))
    assert found["irpe.irpe"] is True
    assert found["irpe.integrations.timm_vit"] is False
    for first, second in (("train", "detect"), ("detect", "train"), ("runs", "train"), ("runs", "detect")):
        assert not within(f"irpe.{second}.loop", ALLOWED[f"irpe.{first}"])


def test_detection_stays_behind_its_command():
    """Its packages are no others' business: what needs them is in irpe/detect, or inside a function."""
    for file in FILES:
        name = module_name(file)
        for imported, at_top in imports(file):
            if imported.split(".")[0] == "torchmetrics" or imported.startswith("irpe.detect"):
                light = imported == "irpe.detect.settings"  # options alone
                assert name.startswith("irpe.detect") or light or not at_top, f"{name} imports {imported}"


def test_backends_import_neither_each_other_nor_the_law():
    """The formula of "eager" may be imported: it goes on where a kernel fails."""
    for file in (ROOT / "rpe_ops").glob("*.py"):
        others = {name for name in dict(imports(file)) if name.startswith("rpe_ops.")}
        if file.stem not in {"__init__", "_backends", "rpe_attention"}:
            assert "rpe_ops.reference" not in others, file.name
        if file.stem not in {
            "__init__",
            "_backends",
            "rpe_attention",
            "fused",
        }:  # who tell of them, who chooses, who calls
            assert not others & {"rpe_ops.fused", "rpe_ops.rpe_attention_cpu", "rpe_ops.rpe_attention_triton"}, (
                file.name
            )
