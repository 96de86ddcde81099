"""The file and the directory are copied into other projects: each has to work alone, with torch and nothing else."""

import shutil

import pytest
from conftest import ROOT

THIRD_PARTY = ["timm", "numpy", "easydict", "torchvision", "irpe_installed"]
FIVE_STEPS = """
    import torch
    from {package}irpe import get_rpe_config, build_rpe, rpe_attention, RPE_OPS_MISSING
    for method in ("euc", "quant", "cross", "product"):
        config = get_rpe_config(ratio=1.9, method=method, mode="ctx", shared_head=False, skip=1, rpe_on="qkv")
        rpe_q, rpe_k, rpe_v = build_rpe(config, head_dim=8, num_heads=2)
        for table in [*rpe_q.parameters(), *rpe_k.parameters(), *rpe_v.parameters()]:
            torch.nn.init.normal_(table)
        q, k, v = torch.randn(3, 2, 2, 1 + 3 * 5, 8).requires_grad_()
        attn = q * 8**-0.5 @ k.transpose(-2, -1)
        attn += rpe_k(q * 8**-0.5, height=3, width=5)
        attn += rpe_q(k * 8**-0.5, height=3, width=5).transpose(2, 3)
        attn = attn.softmax(-1)
        out = attn @ v
        out += rpe_v(attn, height=3, width=5)
        torch.testing.assert_close(rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v, height=3, width=5), out)
        out.sum().backward()
        assert rpe_q.state_dict().keys() and all(p.grad.any() for p in rpe_k.parameters())
        first, again = (rpe_k.tables(q, height=3, width=5)[0][1] for _ in range(2))
        assert first.offsets is again.offsets  # made once
    for ndim, size in ((1, (7,)), (3, (2, 3, 4))):
        rpe_q, rpe_k, rpe_v = build_rpe(get_rpe_config(skip=1, rpe_on="qkv", ndim=ndim), head_dim=8, num_heads=2)
        q, k, v = torch.randn(3, 2, 2, 1 + torch.tensor(size).prod(), 8)
        out = rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v, size=size)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    print("OPS", RPE_OPS_MISSING or "found")
"""


def copy_directory(target):
    shutil.copytree(ROOT / "rpe_ops", target / "rpe_ops", ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))


@pytest.mark.parametrize("where", ["beside the script", "inside a package"])
@pytest.mark.parametrize("what", ["one file", "both"])
def test_copied_parts_run_the_five_steps(tmp_path, run_python, where, what):
    target = tmp_path / "project" / "models" if where == "inside a package" else tmp_path / "project"
    target.mkdir(parents=True)
    package = "models." if where == "inside a package" else ""
    if package:
        (target / "__init__.py").touch()
    shutil.copy(ROOT / "irpe" / "irpe.py", target)
    if what == "both":
        copy_directory(target)
    # rpe_ops is forbidden as a top-level package unless that is where it was copied to
    forbid = THIRD_PARTY + ([] if what == "both" and not package else ["rpe_ops"])
    out = run_python(FIVE_STEPS.format(package=package), path=[tmp_path / "project"], forbid=forbid).stdout
    if what == "both":
        assert "OPS found" in out
    else:
        assert "OPS beside irpe.py:" in out and "forbidden by the test" in out


@pytest.mark.parametrize("built", [False, True], ids=["two folders", "with an installed one"])
def test_the_directory_beside_the_folder_of_the_file(tmp_path, run_python, built):
    """RPE/iRPE/irpe.py beside RPE/rpe_ops, as CVLface and others have it."""
    folder = tmp_path / "models" / "RPE" / "iRPE"
    folder.mkdir(parents=True)
    for one in (folder, folder.parent, folder.parent.parent):
        (one / "__init__.py").touch()
    shutil.copy(ROOT / "irpe" / "irpe.py", folder)
    copy_directory(folder.parent)
    code = "import models.RPE.iRPE.irpe as m; print(m._attention.__name__, m._operators.__name__, m.RPE_OPS_MISSING)"
    out = run_python(code, path=[tmp_path, *([ROOT] if built else [])]).stdout
    assert out.split() == ["models.RPE.rpe_ops.rpe_attention", "models.RPE.rpe_ops.rpe_index"]
    out = run_python(FIVE_STEPS.format(package="models.RPE.iRPE."), path=[tmp_path], forbid=THIRD_PARTY).stdout
    assert "OPS found" in out


def test_every_place_is_named_where_there_are_no_operators(tmp_path, run_python):
    folder = tmp_path / "models" / "iRPE"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "irpe" / "irpe.py", folder)
    code = "import models.iRPE.irpe as m; print(m.RPE_OPS_MISSING)"
    out = run_python(code, path=[tmp_path], forbid=["rpe_ops"]).stdout
    assert "beside irpe.py: No module named 'models.iRPE.rpe_ops'" in out
    assert "beside its folder: No module named 'models.rpe_ops'" in out
    assert "installed: No module named 'rpe_ops'" in out


def test_the_copied_directory_is_preferred_to_an_installed_one(tmp_path, run_python):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(ROOT / "irpe" / "irpe.py", models)
    copy_directory(models)
    code = "import models.irpe as m, sys; print(m._operators.__name__, 'rpe_ops' in sys.modules)"
    assert run_python(code, path=[tmp_path, ROOT]).stdout.split() == ["models.rpe_ops.rpe_index", "False"]


def test_an_rpe_ops_of_another_project_is_not_mistaken_for_ours(tmp_path, run_python):
    """The release's directory has no __init__.py and registers a compiled operator when its module is imported."""
    shutil.copy(ROOT / "irpe" / "irpe.py", tmp_path)
    foreign = tmp_path / "rpe_ops"
    foreign.mkdir()
    (foreign / "rpe_index.py").write_text("raise AssertionError('the extension was not built')\n")
    out = run_python(FIVE_STEPS.format(package=""), path=[tmp_path]).stdout
    assert "OPS beside irpe.py:" in out and "cannot import name 'constants'" in out


def test_two_copies_in_one_process_share_configurations(tmp_path, run_python):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "irpe" / "irpe.py", tmp_path / name)
        copy_directory(tmp_path / name)
    run_python(
        """
        import torch, one.irpe, two.irpe
        config = one.irpe.get_rpe_config(20, "cross", skip=1)
        theirs, ours = (m.build_rpe(config, 8, 2)[1] for m in (one.irpe, two.irpe))
        ours.load_state_dict({n: torch.randn_like(p) for n, p in ours.state_dict().items()})
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(1, 2, 13, 8)
        assert torch.equal(ours(x, 3, 4), theirs(x, 3, 4))
        """,
        path=[tmp_path],
    )


def test_importing_the_package_needs_torch_alone_and_says_nothing(run_python):
    done = run_python(
        """
        import sys, torch
        before = set(sys.modules)
        import irpe
        for name in irpe.__all__:
            getattr(irpe, name)
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not {"timm", "numpy", "matplotlib", "sklearn", "typer", "rich", "sympy"} & new, new
        assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in sys.modules)
        print(irpe.__version__)
        """,
        path=[ROOT],
        forbid=["timm", "matplotlib", "sklearn", "typer", "rich", "transformers", "torchvision"],
    )
    assert done.stderr == ""
    assert done.stdout.strip()


def test_the_file_can_be_read_in_one_sitting():
    assert len((ROOT / "irpe" / "irpe.py").read_text().splitlines()) <= 980
