"""Places that cannot be written, names that no disk takes, and little memory: sentences in every command."""

import errno
import json
import os

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from test_train_folder import words
from train_tiny import SMALL, irpe, pictures

from irpe.runs import files, tensors

LONG = "n" * 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    folder = pictures(place / "pictures")
    given = ["train", folder, *SMALL, "--max-steps", 1, "--batch-size", 6, "--out", place, "--name", "run"]
    assert irpe(*given).exit_code == 0
    return place


def commands(made, out):
    """Every command that writes, into `out`."""
    run, data = made / "run", made / "pictures"
    train = ["train", data, *SMALL, "--batch-size", 6, "--max-steps", 1]
    small = [
        "--train-scenes",
        4,
        "--val-scenes",
        2,
        "--d-model",
        16,
        "--layers",
        1,
        "--batch-size",
        4,
        "--device",
        "cpu",
    ]
    yield [*train, "--out", out]
    yield [*train, "--out", out, "--name", "x", "--resume", "auto"]
    yield [*train, "--out", out, "--name", "x", "--overwrite"]
    yield ["train", "--quick", "--out", out]
    yield ["compare", run, "--out", out / "a.png"]
    yield ["compare", run, "--out", made / "a.png", "--json", out / "a.json"]
    yield ["evaluate", run, "--json", out / "a.json"]
    yield ["export", run, "--out", out / "a.pt2"]
    yield ["show", "--height", 3, "--width", 4, "--out", out / "a.png"]
    yield ["detect", "digits", *small, "--max-steps", 1, "--out", out]
    yield ["detect", *small, "--seeds", 1, "--max-steps", 1, "--out", out]
    yield ["detect", *small[:4], "--write-digits", out / "scenes"]


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("where", ["file", "device", "name", "proc"])
def test_places_that_cannot_be_written_are_a_sentence(made, tmp_path, number, where):
    (tmp_path / "file").write_text("mine")
    out = {
        "file": tmp_path / "file", "device": tmp_path.__class__("/dev/null"), "name": tmp_path / LONG,
        "proc": tmp_path.__class__("/proc/none"),
    }[where]  # fmt: skip
    given = list(commands(made, out))[number]
    result = irpe(*given)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert str(out)[:40] in words(result)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [LONG, "a/b", "..", "", "a\0b", "a\x1bb", "a\nb"])
def test_names_that_no_folder_has(made, tmp_path, name):
    result = irpe("train", made / "pictures", *SMALL, "--batch-size", 6, "--out", tmp_path, "--name", name)
    assert (result.exit_code == 2 and not list(tmp_path.iterdir())) or name == "", result.output
    if name == LONG:
        assert "cannot be made: File name too long; --out and --name say where else to write" in words(result)


def test_a_file_that_can_be_neither_made_nor_removed_tells_the_first_reason(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(files.WriteError, match="a.json could not be written: Read-only file system; what was there"):
        files.write_json(tmp_path / "a.json", {})


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
])  # fmt: skip
def test_little_memory_is_a_sentence(made, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("irpe.train.loop.Trainer._step", fail)
    result = irpe("train", made / "pictures", *SMALL, "--batch-size", 6, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 1 and "there is not enough memory for this; a smaller --batch-size" in words(result)


def test_mistakes_of_ours_keep_their_traceback(made, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("ours")

    monkeypatch.setattr("irpe.train.loop.Trainer._step", fail)
    with pytest.raises(RuntimeError, match="ours"):
        irpe("train", made / "pictures", *SMALL, "--batch-size", 6, "--out", tmp_path, "--name", "run")


def test_the_demo_does_not_write_into_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "results.json").write_text('{"mine": 1}')
    result = irpe("train", "--quick", "--out", tmp_path, "--overwrite")
    assert result.exit_code == 2 and "and no results.json of the demo; nothing in it was touched" in words(result)
    assert json.loads((tmp_path / "digits" / "results.json").read_text()) == {"mine": 1}


def test_weights_need_no_more_than_their_own_size(tmp_path):
    """What a file says of its sizes is compared with its own before memory is taken."""
    import struct

    import torch

    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    for name in "abc":
        with pytest.raises(ValueError, match="no file of safetensors"):
            tensors.read_safetensors(tmp_path / f"{name}.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert tensors.read_torch(tmp_path / "old.pt")["a"].shape == (3,)
