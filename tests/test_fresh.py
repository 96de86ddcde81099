"""Interpreters of their own, and the table that runs of the tests make: what other tests stand on."""

import json
from collections import defaultdict

import pytest
import support


def test_a_run_sees_nothing_of_another_or_of_the_tests(run_python, tmp_path):
    run_python(
        "import os, sys, torch; torch.seen = os.environ['SEEN'] = '1'; sys.modules['irpe'] = torch; os.chdir('/')"
    )
    done = run_python(
        """
        import os, sys, torch
        print("json" in globals(), hasattr(torch, "seen"), "SEEN" in os.environ)
        print("irpe" in sys.modules, "pytest" in sys.modules, os.getcwd())
        """
    )
    assert done.stdout.split() == [*["False"] * 5, str(tmp_path)]


def test_how_a_run_ends(run_python):
    done = run_python("print('said'); raise SystemExit('why')", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "said\n", "why\n")
    assert run_python("import os; os.abort()", check=False).returncode < 0
    with pytest.raises(pytest.fail.Exception, match="exit status 1"):
        run_python("import json", forbid=["json"])


def test_a_cell_is_of_all_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(support, "outcomes", defaultdict(lambda: defaultdict(set)))
    fast = [["timm", "vit", "compile", ["passed"]], ["timm", "vit", "masks", ["passed", "skipped"]]]
    slow = [["timm", "vit", "compile", ["failed"]], ["timm", "swin", "compile", ["passed"]]]
    for name, rows in (("fast", fast), ("slow", slow)):
        (tmp_path / name).write_text(json.dumps(rows))
    support.read([tmp_path / "fast", tmp_path / "slow"])
    table = support.page().split("## timm\n")[1].split("\n##")[0].split("\n")
    assert table[1::2] == ["| model | masks | compile |", "| swin |  | yes |", ""]
    assert table[4] == "| vit | yes | no |"
