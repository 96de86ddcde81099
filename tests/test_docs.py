"""What the pages of docs/ show runs literally, and what they link to is there."""

import re

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FIGURE = re.compile(r"[\s*+-]*\d[\d,]*(\.\d| ±|(?<=,\d{3}))")  # at the beginning of a cell
# tables of figures that are neither written from benchmarks/results nor in a column that is called the paper's
WITHOUT_FILE = {
    ("choose.md", "| | `method` | directed | ratio and buckets"): "the paper's Table 1, as the text below it says",
    ("choose.md", "| part | values | what it is"): "what a name says",
    ("versions.md", "| | every change, in CI | tried by hand"): "numbers of versions",
    ("reproduce.md", "| on | paper, learned positions | digits"): "irpe sweep 4 digits, whose results were not kept",
    ("detect.md", "| encoder | AP | AP50 | AP75"): "irpe detect, whose results were not kept",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_are_there(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_numbers_of_an_old_copy_and_of_the_new_one(tmp_path, monkeypatch, capsys):
    """The script of migrate.md, once as the old copy and once as the new one; a changed table would show."""
    import torch

    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "migrate.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(script, "migrate.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(line.endswith("largest difference 0.0e+00") for line in lines)
    numbers = torch.load("rpe_numbers.pt", weights_only=True)
    numbers["cross v"] += 1
    torch.save(numbers, "rpe_numbers.pt")
    exec(compile(script, "migrate.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("1.0e+00")


def test_numbers_of_an_old_copy_that_cannot_run_all(tmp_path, monkeypatch, capsys):
    """quant on keys and queries crashes in built copies of the release: the rest is compared all the same."""
    import irpe

    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "migrate.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    forward = irpe.iRPE.forward

    def old(self, x, *args, **kwargs):
        if self.method == irpe.METHOD.QUANT and self.transposed:
            raise RuntimeError("index out of range")
        return forward(self, x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(irpe.iRPE, "forward", old)
        exec(compile(script, "migrate.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [f"quant {on} does not run: index out of range" for on in "kq"]
    exec(compile(script, "migrate.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("is new")] == ["quant k    is new", "quant q    is new"]
    assert sum(line.endswith("largest difference 0.0e+00") for line in lines) == 10


def test_what_migrate_says_of_configurations_and_modules():
    import dataclasses
    import json

    from irpe import METHOD, RPEConfig, build_rpe, get_rpe_config
    from irpe.irpe import RPE_OPS_MISSING, RPEIndexFunction, SingleRPEConfig

    config = get_rpe_config(skip=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rpe_k.mode = "bias"
    changed = dataclasses.replace(config, rpe_k=dataclasses.replace(config.rpe_k, mode="bias"))
    assert changed == get_rpe_config(mode="bias", skip=1)
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert RPEConfig(**{name: one and SingleRPEConfig(**one) for name, one in fields.items()}) == config
    assert vars(config)["rpe_k"] is config.rpe_k
    assert (RPEIndexFunction is None) == bool(RPE_OPS_MISSING)
    text = (ROOT / "docs" / "migrate.md").read_text()
    assert repr(build_rpe(config, 64, 6)[1]) in text
    for name in METHOD.__members__:
        assert f"{name}` {METHOD[name].value}" in text.replace("METHOD.", "")


def test_code_of_axes():
    """The blocks one after the other, and what the page says of a video of equal frames."""
    import torch

    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "axes.md").read_text(), re.DOTALL):
        exec(compile(block, "axes.md", "exec"), names)
    assert names["out"].shape == (1, 2, 61, 16)
    x = torch.randn(2, 3 * 4, 32)
    image, video = (names[name].eval() for name in ("image", "video"))
    torch.testing.assert_close(video(x.repeat(1, 2, 1)), image(x).repeat(1, 2, 1))
    names["sentences"](torch.randn(1, 7, 32))


def test_code_of_equip(monkeypatch):
    """The blocks one after the other; half of the blocks get one encoding, half the other."""
    timm = pytest.importorskip("timm")
    from irpe import METHOD

    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "equip.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "equip.md", "exec"), names)
    assert len(blocks) == 3 and names["out"].shape == (2, 126, 384)
    methods = [block.attn.rpe_k.method for block in names["model"].blocks]
    assert methods[:6] == [METHOD.PRODUCT] * 6 and METHOD.PRODUCT not in methods[6:]
    plain = timm.create_model("deit_tiny_patch16_224")
    added = sum(p.numel() for p in names["model"].parameters()) - sum(p.numel() for p in plain.parameters())
    assert sum(table.numel() for table in names["groups"][0]["params"]) == added > 0
    names["unequip"](names["model"])


def test_what_choose_says_of_names_and_buckets():
    from irpe import METHOD, get_num_buckets, get_rpe_config, rpe_config_from_string

    text = (ROOT / "docs" / "choose.md").read_text()
    for name in re.findall(r"`(rpe-[^`A-Z]+)`", text):
        rpe_config_from_string(name)
    rows = re.findall(r'^\| \W*\w+\W* \| `"(\w+)"` \| (\w+) \| ([\d.]+), uses (\d+)( \+ \d+)? \|', text, re.MULTILINE)
    assert [row[0] for row in rows] == ["euc", "quant", "cross", "product"]
    for method, _, ratio, buckets, second in rows:
        config = get_rpe_config(float(ratio), method, skip=1).rpe_k
        from irpe import get_bucket_ids_2d

        name = METHOD.CROSS_ROWS if second else method
        ids, count = get_bucket_ids_2d(name, 14, 14, 1, config.alpha, config.beta, config.gamma)
        assert ids.unique().numel() == int(buckets) <= count
        assert get_num_buckets(name, config.alpha, config.beta, config.gamma) + 1 == count


def figures_by_hand(text):
    """The first lines of tables with figures that `make tables` has not written and that are not called the paper's."""
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    for lines in (found.group().splitlines() for found in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE)):
        head, _, *rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
        for row in rows:
            if any(FIGURE.match(cell) and "paper" not in name for cell, name in zip(row, head, strict=True)):
                yield lines[0]
                break


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "rpe_ops" / "README.md", *PAGES], ids=lambda page: page.stem
)
def test_figures_come_from_files(page):
    """Whoever adds a table of figures lets benchmarks/tables.py write it, or says here why not."""
    if page.name == "api.md":  # docstrings
        return
    for head in figures_by_hand(page.read_text()):
        assert any(page.name == name and head.startswith(start) for name, start in WITHOUT_FILE), (
            f"{page.name}: the figures under {head} are in no file of benchmarks/results"
        )


@pytest.mark.parametrize(("name", "start"), WITHOUT_FILE)
def test_what_is_without_a_file_is_still_there(name, start):
    assert any(head.startswith(start) for head in figures_by_hand((ROOT / "docs" / name).read_text()))


def test_figures_by_hand_are_seen():
    made = "<!-- table: speed -->\n\n| a | b |\n|---|---|\n| k | 1.5 |\n\n<!-- end -->\n"
    paper, hand = "| row | paper |\n|---|---|\n| k | 80.9 |\n", "| row | here |\n|---|---|\n| k | 80.9 ± 0.1 |\n"
    words = "| option | what |\n|---|---|\n| `1.9` | since torch 2.11 |\n"
    assert list(figures_by_hand(f"{made}\n{paper}\n{words}\n")) == []
    assert list(figures_by_hand(f"{made}\n{hand}\n{words}\n")) == ["| row | here |"]
    assert list(figures_by_hand(f"{made}\n{hand.replace('80.9 ± 0.1', '1,024')}")) == ["| row | here |"]


def test_figures_of_the_paper_for_choosing_are_those_of_the_sweep():
    pytest.importorskip("timm")
    from irpe.train import sweep

    (table,) = re.findall(
        r"^\| \| `method` .*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / "choose.md").read_text(), re.MULTILINE
    )
    found = [cell.strip("* ") for line in table.splitlines() for cell in line.strip("|").split("|")[-2:]]
    assert sorted(found) == sorted(f"{row.paper:g}" for row in sweep.TABLES[1][1:])
