"""Run folders, checkpoints and data sets of strangers: nothing is run or fetched, and names reach no terminal."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import tarfile

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import Image
from test_train_folder import content, words
from train_tiny import SMALL, irpe, pictures

from irpe.cli.common import Terminal, new_folder, sentence
from irpe.runs import checkpoint, files
from irpe.train import data, shards
from irpe.train.pretrained import read_weights
from irpe.train.settings import Settings, settings_from, settings_from_dict

STRINGS = [name for name, kind in Settings.__annotations__.items() if "str" in str(kind)]
PAYLOADS = (
    "pipe:touch evil", "wds/pipe:touch evil", "$(touch evil)", "; touch evil", "`touch evil`",
    "__import__('os').system('touch evil')",
    "http://127.0.0.1:9/evil", "wds/http://127.0.0.1:9/evil", "hfds/someone/evil", "hfids/someone/evil", "tfds/evil",
    "hf-hub:someone/evil", "hf_hub:someone/evil", "local-dir:.", "torch/cifar10", "torch/imagenet",
    "file:///etc/passwd", "../../../../etc", "hub", "evil.pt",
    "checkpoint_path=evil.pt", "pretrained_cfg=evil", "pretrained_cfg_overlay=evil", "cache_dir=/tmp",
    "features_only=true",
)  # fmt: skip


class Evil:
    def __reduce__(self):
        return SYSTEM, ("touch evil",)


SYSTEM = os.system


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    folder = pictures(place / "pictures")
    assert (
        irpe("train", folder, *SMALL, "--max-steps", 1, "--batch-size", 6, "--out", place, "--name", "run").exit_code
        == 0
    )
    return place


@pytest.fixture
def walled(tmp_path, monkeypatch):
    """Any process, address or file of the name evil fails the test."""
    told = []

    def refuse(*arguments, **options):
        told.append(arguments)
        raise OSError("not in this test")

    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    for where, name in ((subprocess.Popen, "__init__"), (os, "system"), (os, "popen"), (socket, "create_connection")):
        monkeypatch.setattr(where, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tmp_path
    assert told == [] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", STRINGS)
def test_no_setting_of_a_run_runs_or_fetches_anything(made, walled, name):
    loaded = ("data", "model", "model_arg", "train_split", "val_split", "device", "img_size")  # which evaluation reads
    for payload in PAYLOADS if name in loaded else PAYLOADS[:3]:
        run = shutil.copytree(made / "run", walled / "run", dirs_exist_ok=True)
        record = json.loads((run / "settings.json").read_text())
        is_list = isinstance(record["settings"][name], list)
        record["settings"][name] = [payload] if is_list else payload
        (run / "settings.json").write_text(json.dumps(record))
        others = [["compare", run], ["export", run, "--out", walled / "a.pt2"]] if payload == PAYLOADS[0] else []
        for given in (["evaluate", run], *others):
            result = irpe(*given)
            assert result.exit_code in (0, 1, 2), (name, payload)
            assert isinstance(result.exception, (SystemExit, type(None)))


def test_data_on_the_hub_is_named_by_the_user_or_not_read(made, walled):
    run = shutil.copytree(made / "run", walled / "run")
    record = json.loads((run / "settings.json").read_text())
    record["settings"].update(data="hfds/someone/evil", download=True)
    (run / "settings.json").write_text(json.dumps(record))
    assert "what a file names is not fetched: say --data hfds/someone/evil if you trust it" in words(
        irpe("evaluate", run)
    )
    from irpe.train.run import settings_of

    assert settings_of(run)[0].download is False


@pytest.mark.parametrize("place", ["pipe:touch evil", "http://127.0.0.1:9/a", "nowhere", "", "-", "file:/tmp"])
def test_shards_lie_in_local_folders(walled, place):
    pytest.importorskip("webdataset")
    more = {"train_split": "a-{0..1}.tar", "val_split": "b-0.tar", "num_classes": 2, "train_samples": 4}
    with pytest.raises(ValueError, match="is no folder here; expected wds/FOLDER. Shards are read from local folders"):
        data.open_data(settings_from("small", {"data": f"wds/{place}", **more}))


@pytest.mark.parametrize("split", [
    "a.tar::pipe:touch evil #.tar", "pipe:touch evil;.tar", "../x.tar", "/etc/passwd.tar", "-.tar",
    "a-{0..99999999}.tar",
    "http://127.0.0.1:9/a.tar", "evil",
])  # fmt: skip
def test_splits_name_files_of_the_folder(walled, split):
    pytest.importorskip("webdataset")
    (walled / "shards").mkdir()
    (walled / "x.tar").touch()
    info = {
        "splits": {"evil": {"name": "evil", "num_samples": 1, "filenames": ["pipe:touch evil"], "shard_lengths": [1]}}
    }
    (walled / "shards" / "_info.json").write_text(json.dumps(info))
    more = {"train_split": split, "val_split": split, "num_classes": 2, "train_samples": 4}
    with pytest.raises(ValueError, match=r"cannot be read|stands for|split"):
        data.open_data(settings_from("small", {"data": f"wds/{walled / 'shards'}", **more}))


def test_the_opener_of_webdataset_is_closed(walled):
    pytest.importorskip("webdataset")
    from webdataset import gopen

    shards.local_only()
    (walled / "a.tar").write_bytes(b"abc")
    os.mkfifo(walled / "pipe.tar")
    for url in ("pipe:touch evil", str(walled / "a.tar"), f"file:{walled / 'a.tar'}"):
        with pytest.raises(ValueError, match="unsafe_gopen"):
            gopen(url)
    assert gopen(f"{shards.SCHEME}:{walled / 'a.tar'}").read() == b"abc"
    with pytest.raises(ValueError, match="it is a pipe; expected a file"):
        gopen(f"{shards.SCHEME}:{walled / 'pipe.tar'}")


@pytest.mark.filterwarnings("ignore:unreadable image of a stream")
def test_damaged_shards_end_the_run_and_pictures_that_are_none_are_left_out(tmp_path):
    pytest.importorskip("webdataset")
    png = io.BytesIO()
    Image.new("L", (12, 8)).save(png, "PNG")

    def shard(name, *members):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return (tmp_path / name).read_bytes()

    whole = [(f"{n}.{kind}", content) for n in range(8) for kind, content in (("png", png.getvalue()), ("cls", b"1"))]
    of_each = {
        "whole": shard("whole.tar", *whole),
        "cut": shard("whole.tar", *whole)[:3000],
        "twice": shard("twice.tar", *whole[:2], whole[2], whole[2], *whole[3:]),
        "strange": shard("strange.tar", ("x.png", b"no picture"), ("x.cls", b"1"), *whole),
    }
    given = ["train", f"wds/{tmp_path}", *SMALL, "--batch-size", 4, "--max-steps", 2, "--num-classes", 2]
    given += ["--train-samples", 8, "--train-split", "a.tar", "--val-split", "b.tar", "--out", tmp_path / "runs"]
    (tmp_path / "b.tar").write_bytes(of_each["whole"])
    for name, expected in (
        ("cut", f"the shard {tmp_path / 'a.tar'} cannot be read: unexpected end of data"),
        ("twice", "a shard holds the name 1.png twice in a row"),
        ("strange", None),
    ):
        (tmp_path / "a.tar").write_bytes(of_each[name])
        result = irpe(*given, "--name", name)
        assert result.exit_code == (0 if expected is None else 2), result.output
        assert expected is None or expected in words(result), result.output


def test_a_data_set_that_names_addresses_is_not_read(walled):
    pytest.importorskip("datasets")
    place = walled / "set"
    place.mkdir()
    for words_ in (
        "data_files: http://127.0.0.1:9/a.csv",
        "configs:\n- config_name: a\n  data_files: 'zip://x::http://h/a'",
    ):
        (place / "README.md").write_text(f"---\n{words_}\n---\n")
        with pytest.raises(ValueError, match=r"README.md names data at an address; what a file names is not fetched"):
            data.open_data(settings_from("small", {"data": f"hfds/{place}"}))


@pytest.mark.parametrize("make", [
    lambda path: torch.save({"step": 1, "settings": {}, "a": Evil()}, path),
    lambda path: path.write_bytes(pickle.dumps(Evil())),
    lambda path: path.write_text("<html>"),
    lambda path: path.write_bytes(b""),
    lambda path: torch.save([1], path),
    lambda path: torch.save({"step": "x", "settings": []}, path),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
])  # fmt: skip
def test_files_that_are_no_checkpoints_end_in_a_sentence_of_our_own(walled, made, make):
    """Without torch's advice to load them all the same."""
    make(walled / "some.pt")
    for read in (checkpoint.read, read_weights):
        with pytest.raises(ValueError, match=r"some\.pt") as caught:
            read(walled / "some.pt")
        assert "weights_only" not in str(caught.value) and "torch.load" not in str(caught.value)
    for option in ("--resume", "--pretrained"):
        result = irpe("train", made / "pictures", *SMALL, option, walled / "some.pt", "--out", walled)
        assert result.exit_code == 2 and "some.pt" in words(result) and "weights_only" not in words(result)


def damaged(run):
    """settings.json and log.jsonl in states that no run leaves them in."""
    whole = json.loads((run / "settings.json").read_text())
    yield "settings.json", "", "is not JSON"
    yield "settings.json", "[" * 100_000, "nested too deeply"
    yield "settings.json", '{"a": 1}', "is not of a run of irpe train, or it is damaged"
    for name, value in (("epochs", "many"), ("mean", ["a"]), ("model", 5), ("compile", 2), ("evil", 1), ("data", None)):
        yield "settings.json", json.dumps(whole | {"settings": whole["settings"] | {name: value}}), name
    yield "settings.json", json.dumps(whole | {"shape": {"size": [10**30, 8]}}), "or it is damaged"
    yield "settings.json", "\ufeff" + json.dumps(whole), None
    for line in ("[1]", '{"kind": "step"}', '{"kind": "epoch", "step": 1, "epoch": 1, "val": 3}', '{"kind": 3}', "x"):
        yield "log.jsonl", f"{line}\n" + (run / "log.jsonl").read_text(), "line 1 of"
    for val in ("{}", '{"loss": 1, "top1": null, "top5": 2}'):
        line = f'{{"kind": "epoch", "step": 1, "epoch": 1, "train_loss": 1, "val": {val}}}\n'
        yield "compared", line, "the line of epoch 1 has no scores of a classifier"
    yield "log.jsonl", (run / "log.jsonl").read_text() + '{"kind": "st', None


def test_damaged_files_of_a_run_end_in_a_sentence(made, tmp_path):
    given = ["train", made / "pictures", *SMALL, "--batch-size", 6, "--max-steps", 1]
    for name, text, expected in damaged(made / "run"):
        run = shutil.copytree(made / "run", tmp_path / "run", dirs_exist_ok=True)
        (run / name.replace("compared", "log.jsonl")).write_text(text, encoding="utf-8")
        before = content(run)
        results = [irpe("compare", run, "--out", tmp_path / "a.png")]
        if name == "settings.json":
            results.append(irpe("evaluate", run))
        if name == "log.jsonl":
            results.append(irpe(*given, "--out", tmp_path, "--name", "run", "--resume", "auto"))
        for result in results:
            assert result.exit_code == (0 if expected is None else 2), (text[:80], result.output)
            assert expected is None or expected in words(result), (text[:80], result.output)
        if expected is not None:
            assert content(run) == before


# ---- what reaches the terminal

NAMES = (
    "a\x1b[31mred",
    "a\x07bell",
    "a\rback",
    "a\nirpe: all is well",
    "a\u202egnp",
    "a\u2028b",
    "a[/bold]b",
    "a[link=x]:smile:",
    "a\udcff",
)


def test_a_pipe_is_no_terminal_whatever_the_environment_says(monkeypatch):
    """FORCE_COLOR is set in notebooks and by CI; bars would fill their output, as nothing there draws over a line."""
    import io

    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Terminal(file=io.StringIO()).is_terminal
    assert Terminal(file=io.StringIO(), force_terminal=True).is_terminal


def test_strings_are_printed_as_they_are():
    import io

    from rich.table import Table

    stream = io.StringIO()
    terminal = Terminal(file=stream, force_terminal=True, width=200)
    table = Table(title="\x1b[31m", caption="a\x1b[32m")
    table.add_column("b\x1b[33m")
    for name in NAMES:
        table.add_row(name)
        terminal.print(name, soft_wrap=True)
    terminal.print(table)
    shown = stream.getvalue()
    import re

    ours = re.sub(r"\x1b\[[0-9;]*m", "", shown.replace("\x1b[31mred", "BAD"))  # of the table's own style
    assert "BAD" not in shown and all(one not in ours for one in "\x1b\x07\r\u202e\u2028\udcff")
    for one in (
        r"a\x1b[31mred",
        r"a\x07bell",
        r"a\nirpe: all is well",
        r"a\u202egnp",
        "a[/bold]b",
        "a[link=x]:smile:",
        r"a\udcff",
    ):
        assert one in shown
    assert sentence(ValueError("a\x1b[0m\nb")) == r"a\x1b[0m b"
    assert files.printable("Größe ×2 – 日本 é") == "Größe ×2 – 日本 é"


@pytest.mark.parametrize("name", [one for one in NAMES if "\n" not in one and "/" not in one])
def test_names_of_files_and_classes_do_not_reach_the_terminal(tmp_path, name, capfd):
    folder = pictures(tmp_path / "pictures")
    for part in ("train", "val"):
        (folder / part / "digit1").rename(folder / part / name)
        (folder / part / name / f"{name}.png").write_text("no picture")
    given = ["train", folder, *SMALL, "--batch-size", 6, "--max-steps", 1, "--out", tmp_path, "--name", "run"]
    for more, code in (([], 1), (["--bad-images", "skip"], 0), (["--verify"], 2)):
        result = irpe(*given, *more)
        assert result.exit_code == code, result.output
        said = result.output + "".join(capfd.readouterr())
        assert not set(said) & set("\x1b\x07\r\u202e\u2028\udcff")
    with pytest.raises(ValueError, match="expected the name of one folder"):
        new_folder(tmp_path, f"{name}\x1b", False)


def test_names_in_archives_and_tables_do_not_reach_the_terminal(made, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for number, path in enumerate(sorted((made / "pictures" / "train").rglob("*.png"))):
            archive.add(path, f"{path.parent.name}\x1b[31m/{number}.png")
        archive.add(__file__, "digit0\x1b[31m/a\x1b[32m.txt\x1b[33m")
    given = ["train", tmp_path / "all.tar", "--val-share", 0.2, *SMALL, "--batch-size", 6, "--max-steps", 1]
    assert "\x1b" not in irpe(*given, "--out", tmp_path, "--name", "run").output
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    record["settings"]["model"] = "vit\x1b[31m"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(record))
    for words_ in (
        ["compare", tmp_path / "run", made / "run", "--out", tmp_path / "a.png"],
        ["evaluate", tmp_path / "run"],
    ):
        assert "\x1b" not in irpe(*words_).output


def test_pictures_of_somebody_are_files(tmp_path):
    """A pipe would wait for ever, and so would what only looks like a disk."""
    folder = pictures(tmp_path / "pictures")
    os.mkfifo(folder / "train" / "digit1" / "pipe.png")
    given = ["train", folder, *SMALL, "--batch-size", 5, "--max-steps", 1, "--out", tmp_path]
    result = irpe(*given, "--verify")
    assert result.exit_code == 2 and "pipe.png: it is a pipe; expected a file" in words(result)
    with tarfile.open(tmp_path / "pipe.tar", "w"):
        pass
    (tmp_path / "pipe.tar").unlink()
    os.mkfifo(tmp_path / "pipe.tar")
    result = irpe("train", tmp_path / "pipe.tar", "--val-share", 0.1, *SMALL, "--out", tmp_path)
    assert result.exit_code == 2 and "it is a pipe; expected a file" in words(result)
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="it is a pipe"):
        files.read_text(tmp_path / "log.jsonl")
    assert settings_from_dict({"data": "x"}).data == "x"
    assert Image.registered_extensions()
