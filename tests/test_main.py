"""irpe/__main__.py: the commands info and show, wrong input, missing packages, folders that exist."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fresh import PATIENCE

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import torch
from typer.testing import CliRunner

import irpe
import rpe_ops
from irpe.__main__ import app, new_folder

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def words(text):
    """The text without what rich draws around it and without its line breaks."""
    return " ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in text).split())


def test_info_says_what_is_there_and_why_the_rest_is_not():
    result = run("info")
    assert result.exit_code == 0, result.output
    text = words(result.output)
    for expected in (irpe.__version__, "torch", "timm", "device"):
        assert expected in text
    for name in rpe_ops.backends():
        assert name in text
    if not torch.cuda.is_available():
        assert "no CUDA device is visible" in text


def test_show_draws_the_four_methods_and_prints_the_counts_of_the_paper(tmp_path):
    path = tmp_path / "new" / "maps.png"
    result = run("show", "--out", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    for count in ("20 buckets", "51 buckets", "28 + 28 = 56 buckets", "50 buckets"):
        assert count in result.output
    assert str(path) in result.output


def test_show_takes_one_method_any_size_ratio_and_token(tmp_path):
    path = tmp_path / "one.png"
    result = run(
        "show",
        "--method",
        "product",
        "--height",
        3,
        "--width",
        9,
        "--ratio",
        2.5,
        "--skip",
        2,
        "--query",
        2,
        8,
        "--out",
        path,
    )
    assert result.exit_code == 0, result.output
    assert path.exists()
    ids, _ = irpe.get_bucket_ids_2d("product", 3, 9, 2, 2.5, 5.0, 20.0)
    assert f"product  ratio 2.5   {len(ids.unique())} buckets" in result.output
    assert "euc" not in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "--method", "circle"], "unknown method 'circle'; expected one of euc, quant"),
        (["show", "--height", 0], "height=0; expected at least 1"),
        (["show", "--width", 0], "width=0; expected at least 1"),
        (["show", "--width", 100000], "expected at most 256 along a side"),
        (["show", "--ratio", -1], "ratio=-1.0; expected a finite number above 0"),
        (["show", "--ratio", "nan"], "ratio=nan; expected a finite number above 0"),
        (["show", "--skip", -1], "skip=-1; expected at least 0"),
        (["show", "--query", 14, 0], "row 14, column 0 is not on the map of 14x14 tokens"),
        (["show", "--out", "maps.txt"], "ends in .png"),
        (["train", "--rpe", "rpe-1.9-circle-ctx-1-k"], "unknown method 'circle'"),
        (["train", "--rpe", "product"], "it has another form; expected rpe-RATIO-METHOD-MODE-SHARED-ON"),
        (["train", "--rpe", "rpe-1.9-product-bias-1-v"], "does not exist on values"),
        (["train", "--seeds", 0], "value for '--seeds'"),
        (["train", "--epochs", 0], "value for '--epochs'"),
        (["train", "--workers", 0], "value for '--workers'"),
        (["train", "--lr", 0], "expected a number above 0 and below 1"),
        (["train", "--name", "a/b"], "expected the name of one folder"),
        (["train", "--name", ".."], "expected the name of one folder"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train":
        pytest.importorskip("timm")
        pytest.importorskip("sklearn")
        monkeypatch.setattr("irpe.paired.fit_all", lambda *rest: pytest.fail("it trained"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in words(result.output)
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    out = tmp_path / "runs"
    assert new_folder(out, "digits", False) == out / "digits"
    assert new_folder(out, "digits", False) == out / "digits-2"
    assert new_folder(out, "digits", False) == out / "digits-3"
    assert new_folder(out, "digits", True) == out / "digits"
    (out / "file").touch()
    assert new_folder(out, "file", False) == out / "file-2"
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        new_folder(out, "file", True)
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        new_folder(out / "file", "digits", False)


@pytest.mark.parametrize(
    ("package", "command"),
    [("typer", "info"), ("rich", "info"), ("matplotlib", "show"), ("timm", "train"), ("sklearn", "train")],
)
def test_a_missing_package_is_one_sentence_with_the_remedy(package, command, run_python, tmp_path):
    code = f"""
        import sys
        sys.modules[{package!r}] = None
        sys.argv = ["irpe", {command!r}]
        from irpe.__main__ import main
        main()
    """
    done = run_python(code, path=[ROOT], environment={"PATH": ""}, check=False)
    assert done.returncode == 1, done.stderr
    assert 'pip install ".[train]"' in done.stderr
    assert package in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_python_m_irpe_prints_help():
    done = subprocess.run(
        [sys.executable, "-m", "irpe", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    for command in ("train", "evaluate", "compare", "show", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_needs_no_torch(option):
    """Whoever asks for help waits for what help needs."""
    code = f"""
        import sys
        sys.argv = ["irpe", {option!r}]
        from irpe.__main__ import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        heavy = {{"torch", "timm", "transformers", "torchvision", "matplotlib", "numpy", "PIL", "sklearn"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert irpe.__version__ in done.stdout if option == "--version" else "predict" in done.stdout


def test_every_command_has_h():
    for command in ("train", "evaluate", "predict", "export", "compare", "sweep", "detect", "show", "info"):
        result = run(command, "-h")
        assert result.exit_code == 0 and "Usage" in result.output, command


def test_names_are_imported_when_they_are_asked_for():
    code = """
        import sys, irpe
        assert "torch" not in sys.modules
        assert {"equip", "save", "rpe_attention"} <= set(dir(irpe))
        import irpe.equip, irpe.models
        assert callable(irpe.equip) and irpe.equip is sys.modules["irpe.equip"].equip
        from irpe import *
        assert equip is irpe.equip and iRPE is irpe.irpe.iRPE
        for name in irpe.__all__:
            assert getattr(irpe, name) is globals().get(name, irpe.__version__), name
        assert not hasattr(irpe, "strange")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_lists_of_names_agree():
    """What type checkers read, and what is imported."""
    import ast

    tree = ast.parse((ROOT / "irpe" / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in typed.body for alias in node.names}
    assert set(told) | {"__version__"} == set(irpe.__all__)
    for name, module in told.items():
        assert getattr(irpe, name) is getattr(sys.modules[f"irpe.{module}"], name)


def test_types_are_shipped():
    config = (ROOT / "pyproject.toml").read_text()
    for package in ("irpe", "rpe_ops"):
        assert (ROOT / package / "py.typed").exists()
        assert f'{package} = ["py.typed"' in config


def test_errors_of_a_command_line_are_sentences():
    """Of options for `irpe train`, which are parsed without running it."""
    from irpe.cli.train import settings_of

    assert settings_of(["digits", "--model", "vit_tiny_patch16_224"]).model == "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match="--no-such"):
        settings_of(["digits", "--no-such", "3"])


@pytest.mark.parametrize(("typed", "expected"), [("irpe det", "detect"), ("irpe detect --eval-b", "--eval-batch-size")])
def test_shells_complete_commands_and_options(typed, expected):
    """What a shell asks once `irpe --install-completion` has told it how."""
    code = "import sys; sys.argv = ['irpe']; from irpe.__main__ import main; main()"
    asked = {"_IRPE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked, cwd=ROOT, timeout=PATIENCE
    )
    assert done.stdout.split() == [expected], done.stderr
    assert "--install-completion" in run("--help").output
