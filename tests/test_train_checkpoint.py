"""irpe/runs/checkpoint.py: whole or absent, kept and removed, read as plain data; and groups of the optimizer."""

import builtins
import os
import pickle

import pytest
import torch

pytest.importorskip("timm")

from irpe.runs import checkpoint, files
from irpe.runs.options import changed
from irpe.train import model, pretrained
from irpe.train.settings import RECIPES, Settings, settings_from, settings_from_dict

STATE = {"step": 7, "settings": {}, "model": {"a": torch.arange(3.0)}}


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 30, 4):
        checkpoint.save(tmp_path, STATE | {"step": step}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000000004.pt", "step-000000030.pt"]
    state = checkpoint.read(checkpoint.checkpoints(tmp_path)[-1])
    assert state["step"] == 30 and torch.equal(state["model"]["a"], STATE["model"]["a"])


def test_nothing_new_is_there_when_writing_fails(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"old": 1})

    def half(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(files.WriteError, match=r"a.json could not be written: No space left on device; what was"):
        files.write_whole(path, half)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_text() == '{\n "old": 1\n}\n'
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE, keep=1)
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r": real("/dev/full" if "w" in mode else path, mode))
    with pytest.raises(files.WriteError, match="No space left on device"):
        checkpoint.save(tmp_path, STATE | {"step": 8}, keep=1)
    monkeypatch.undo()
    (path,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.read(path)["step"] == 7


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(tmp_path):
    path = checkpoint.save(tmp_path, STATE, keep=3)
    torn = path.with_name(".step-000000008.pt.123.tmp")
    torn.write_bytes(path.read_bytes()[:50])
    assert checkpoint.checkpoints(tmp_path) == [path]
    checkpoint.clean(tmp_path)
    assert not torn.exists() and path.exists()


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path):
    checkpoint.save(tmp_path, STATE, keep=3)
    path = checkpoint.save(tmp_path, STATE | {"step": 8}, keep=3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000000008.pt cannot be read .* goes on from step-000000007.pt"):
        checkpoint.read(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_nothing_but_plain_data_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE | {"more": Evil()}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "one.pt")
    with pytest.raises(ValueError, match="holds Python objects besides weights, which are not loaded"):
        pretrained.read_weights(tmp_path / "one.pt")
    (tmp_path / "two.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "two.pt")
    torch.save([1], tmp_path / "three.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of irpe train"):
        checkpoint.read(tmp_path / "three.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("layer_decay", [0.0, 0.75])
def test_tables_do_not_decay_unless_asked(layer_decay):
    options = dict(
        data="digits", rpe="rpe-2.0-cross-ctx-0-qk", model="vit_tiny_patch16_224", img_size="32x48", weight_decay=0.3,
        model_arg=("depth=2", "embed_dim=24", "num_heads=3"), layer_decay=layer_decay,
    )  # fmt: skip
    for more, expected in (({}, 0.0), ({"rpe_weight_decay": 0.1, "rpe_lr_scale": 5.0}, 0.1)):
        settings = settings_from("deit", options | more)
        built = model.build(settings, 3)
        names = {one: name for name, one in built.named_parameters()}
        groups = model.parameter_groups(built, settings)
        assert sorted(names[one] for group in groups for one in group["params"]) == sorted(names.values())
        for group in groups:
            found = {names[one] for one in group["params"]}
            tables = {name for name in found if "lookup_table" in name}
            assert tables in (set(), found)
            plain = any(names[one].endswith((".bias", "_embed", "_token")) or one.ndim == 1 for one in group["params"])
            assert group["weight_decay"] == (expected if tables else 0.0 if plain else 0.3)
            if tables and not layer_decay:
                assert group["lr_scale"] == settings.rpe_lr_scale
        optimizer = model.make_optimizer(built, settings)
        scheduler = model.make_scheduler(optimizer, settings, 10)
        scheduler.step_update(60)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) > 1 if layer_decay or more else len(rates) == 1


def test_settings_are_whole_and_go_through_json():
    import dataclasses
    import json

    for recipe in RECIPES:
        settings = settings_from(recipe, {"data": "digits", "model_arg": ("depth=2",), "mean": (0.1, 0.2, 0.3)})
        again = settings_from_dict(json.loads(json.dumps(dataclasses.asdict(settings))))
        assert again == settings
        assert changed(settings, dataclasses.replace(settings, epochs=99, loader_workers=1)) == [
            f"--epochs was {settings.epochs}, is 99"
        ]
    assert Settings("x", img_size="24").size() == (24, 24) and Settings("x", img_size="24x40").size() == (24, 40)
    assert Settings("x").peak_lr() == pytest.approx(1e-3)  # DeiT's for its batches of 1024
    assert Settings("x", model_arg=("a=1", "b=0.5", "c=true", "d=none", "e=avg")).model_kwargs() == {
        "a": 1, "b": 0.5, "c": True, "d": "none", "e": "avg"
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown settings more: of another version, or misspelt"):
        settings_from_dict({"data": "x", "more": 1})
