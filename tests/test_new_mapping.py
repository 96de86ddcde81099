"""CONTRIBUTING.md, "Adding a mapping": what irpe/irpe.py gets, as said there, works everywhere else untouched."""

import shutil

import pytest
from conftest import ROOT
from methods import FORMULAS, METHODS, TABLES

pytest.importorskip("timm")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

# one with an offset of its own for each pair, one that factors
EDITS = {
    "    CROSS_TIME = 44\n": "    CROSS_TIME = 44\n    DIAGONAL = 50\n    STRIPES = 51\n",
    "    if method == METHOD.PRODUCT:\n        sides": (
        "    if method == METHOD.DIAGONAL:\n        return (g(sum(offsets)),)\n"
        "    if method == METHOD.STRIPES:\n        between = [0 * x.long() for x in offsets[1:-1]]\n"
        "        return g(offsets[0]) * 2, *between, offsets[-1].long() % 2\n"
        "    if method == METHOD.PRODUCT:\n        sides"
    ),
    "    return math.prod(sides) if": (
        "    if method == METHOD.STRIPES:\n        return 2 * sides[0]\n    return math.prod(sides) if"
    ),
    "METHOD.CROSS_COLS: side}": "METHOD.CROSS_COLS: side, METHOD.STRIPES: 2}",
}
USE = """
    import math, pathlib, torch, timm
    from typer.testing import CliRunner
    import irpe
    from irpe import METHOD, equip, viz_maps
    from irpe.__main__ import app
    from irpe.irpe import get_bucket_ids, get_bucket_map

    def g(x):  # at ratio 1.9
        return round(x) if abs(x) <= 1.9 else int(math.copysign(int(min(3.8, round(
            1.9 + math.log(abs(x) / 1.9) / math.log(8) * 1.9))), x))

    LAWS = {"diagonal": lambda dr, dc: g(dr + dc) + 3, "stripes": lambda dr, dc: (g(dr) + 3) * 2 + dc % 2}
    where = [(row, column) for row in range(3) for column in range(5)]
    places = torch.tensor([(-1, -1), *where])
    for name, law in LAWS.items():
        buckets = 7 * (1 + (name == "stripes"))
        expected = [[law(a - c, b - d) for c, d in where] for a, b in where]
        ids, count = irpe.get_bucket_ids_2d(name, 3, 5, 1, 1.9, 3.8, 15.2)
        assert ids[1:, 1:].tolist() == expected and count == buckets + 1 and int(ids[0, 4]) == buckets
        assert torch.equal(get_bucket_ids(name, places, places, 1, 1.9, 3.8, 15.2)[0], ids)
        rpe = irpe.build_rpe(irpe.get_rpe_config(1.9, name, skip=1, rpe_on="qkv"), head_dim=8, num_heads=2)
        for module in rpe:
            torch.nn.init.normal_(module.table)
        q, k, v = torch.randn(3, 2, 2, 16, 8)
        outputs = [irpe.rpe_attention(q, k, v, *rpe, height=3, width=5, backend=one) for one in (None, "eager")]
        torch.testing.assert_close(*outputs)
        model = timm.models.VisionTransformer(img_size=(6, 10), patch_size=2, embed_dim=16, depth=1, num_heads=2)
        images = torch.randn(2, 3, 6, 10)
        equip(model, f"rpe-1.9-{name}-ctx-1-qk")(images).sum().backward()
        assert model.blocks[0].attn.rpe_k.lookup_table_weight.grad.any()
        own, other = (irpe.get_rpe_config(1.9, one, skip=1, rpe_on="qk") for one in (name, "product"))
        state = irpe.convert_tables(model.state_dict(), own, other, height=3, width=5)
        assert state["blocks.0.attn.rpe_k.lookup_table_weight"].shape[-1] == 50
        for frames in ([], ["--frames", "5"]):
            sides, out = ["--height", "3", "--width", "6"], name + "-".join(frames) + ".png"
            done = CliRunner().invoke(app, ["show", "--method", name, *sides, *frames, "--out", out])
            assert done.exit_code == 0 and pathlib.Path(out).stat().st_size > 10_000, done.output
            (drawn,) = viz_maps.bucket_maps(name, (*map(int, frames[1:]), 3, 6))
            ids = drawn.offsets()
            colors = torch.from_numpy(drawn.colors(ids)) * 255
            for axis in range(ids.dim()):  # neighbours have another color where they have another bucket
                differ, distance = ids.diff(dim=axis) != 0, colors.diff(dim=axis).abs().amax(-1)
                assert not distance[~differ].any() and (distance[differ] >= 3).all()
            assert len(colors.flatten(0, -2).unique(dim=0)) >= 4
    try:
        irpe.get_rpe_config(method="circle")
    except ValueError as error:
        assert "diagonal, stripes, or a METHOD" in str(error)
        print("DONE")
"""


def test_a_mapping_touches_one_file(tmp_path, run_python):
    for folder in ("irpe", "rpe_ops"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "build", "csrc"))
    text = (tmp_path / "irpe" / "irpe.py").read_text()
    for old, new in EDITS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "irpe" / "irpe.py").write_text(text)
    assert "DONE" in run_python(USE, path=[tmp_path]).stdout


def test_the_lists_of_mappings_are_whole():
    """A name that irpe.py loses would make every test that goes through them quietly shorter."""
    assert set(TABLES) == set(FORMULAS) and {"euc", "quant", "cross", "product"} <= set(METHODS)
