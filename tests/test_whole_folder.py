"""`runs.whole_folder`: the folder of before or the new one, whatever happens; nothing of anybody else is lost."""

import os
import re
import stat
from pathlib import Path

import pytest

from irpe.runs import whole_folder
from irpe.runs.files import WriteError
from irpe.runs.whole_folder import unfinished, write_folder

OURS = re.compile(r"config\.json|[abc]\.bin")


def writer(word, names=("config.json", "a.bin")):
    def write(folder):
        for name in names:
            (folder / name).write_text(word)

    return write


def content(folder):
    return {str(one.relative_to(folder)): one.read_text() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture(params=["beside", "inside"])
def place(request, tmp_path, monkeypatch):
    """A folder with a model, and files of somebody else."""
    folder = write_folder(tmp_path / "deep" / "model", writer("old", ("config.json", "a.bin", "b.bin")), OURS)
    assert content(folder) == dict.fromkeys(("config.json", "a.bin", "b.bin"), "old")
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "a.bin").write_text("mine")
    if request.param == "inside":
        monkeypatch.setattr(os.path, "ismount", lambda path: True)  # it cannot be moved
    return folder


MINE = {"notes.txt": "mine", "more/a.bin": "mine"}
OLD = {"config.json": "old", "a.bin": "old", "b.bin": "old", **MINE}
NEW = {"config.json": "new", "a.bin": "new", **MINE}


def test_the_new_takes_the_place_of_the_old(place):
    before = os.stat(place).st_mode
    os.chmod(place, 0o700)
    assert write_folder(place, writer("new"), OURS) == place
    assert content(place) == NEW and os.listdir(place.parent) == ["model"]
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700 != stat.S_IMODE(before)
    # files of any name that are written anew are the new ones
    write_folder(place, writer("newer", ("config.json", "notes.txt")), OURS)
    assert content(place) == {"config.json": "newer", "notes.txt": "newer", "more/a.bin": "mine"}
    assert os.listdir(place.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError("refused"), KeyboardInterrupt()])
def test_what_is_refused_changes_nothing(place, error):
    def write(folder):
        writer("new")(folder)
        raise error

    with pytest.raises(type(error)):
        write_folder(place, write, OURS)
    assert content(place) == OLD and os.listdir(place.parent) == ["model"]


@pytest.mark.parametrize("at", range(4))
def test_a_step_that_fails_is_taken_back(place, at, monkeypatch):
    inside = os.path.ismount("")
    replace, left = os.replace, [at]

    def fails(*paths):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fails)
    # beside the folder there are two steps, and then one for each thing of somebody else
    moved = at < 2 or inside
    words = "could not be written: No space" if moved else "is written, but not all else that was in it, which is in"
    with pytest.raises(WriteError, match=f"^{place} {words}"):
        write_folder(place, writer("new"), OURS)
    if moved:
        assert content(place) == OLD and os.listdir(place.parent) == ["model"]
    monkeypatch.setattr(os, "replace", replace)
    write_folder(place, writer("new"), OURS)
    assert content(place) == NEW and os.listdir(place.parent) == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("at", range(3))
def test_a_killed_process_leaves_one_model_whole(place, at, request):
    """Which of both, `config.json` says; never one with files of the other."""
    words, replace, left = request.node.callspec.params["place"], os.replace, [at]

    def dies(*paths):
        left[0] -= 1
        if left[0] == -1:
            os._exit(9)
        replace(*paths)

    if (child := os.fork()) == 0:
        os.replace = dies
        write_folder(place, writer("new"), OURS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    whole = place if (place / "config.json").exists() else unfinished(place)
    found = {one.name: one.read_text() for one in whole.iterdir() if OURS.fullmatch(one.name)}
    if words == "beside":
        assert found == {name: word for name, word in (OLD if at < 2 else NEW).items() if OURS.fullmatch(name)}
    else:
        assert set(found.values()) == {"old"}  # some of them; the others lie where they lay
    assert write_folder(place, writer("newer"), OURS) == place
    left = {name: word for name, word in content(place).items() if not name.startswith(".")}
    assert left == {"config.json": "newer", "a.bin": "newer", **MINE}
    assert not list(place.parent.rglob("*.old"))


def test_where_this_process_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, writer("old"), OURS)
    write_folder(Path("."), writer("new"), OURS)
    assert content(tmp_path) == {"config.json": "new", "a.bin": "new"}
    assert os.getcwd() == str(tmp_path) and os.path.samefile(os.getcwd(), tmp_path)


def test_links_stay_links(tmp_path):
    write_folder(tmp_path / "far" / "model", writer("old"), OURS)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "model")
    write_folder(tmp_path / "link", writer("new"), OURS)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "far" / "model") == {
        "config.json": "new", "a.bin": "new"
    }  # fmt: skip


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(WriteError, match="could not be written: (Not a directory|File exists)"):
            write_folder(place, writer("new"), OURS)
    assert content(tmp_path) == {"file": "mine"}
    # leftovers of a killed process with the number of this one are passed by
    left = tmp_path / f".model.{os.getpid()}.tmp"
    left.mkdir()
    (left / "a.bin").write_text("half")
    assert content(write_folder(tmp_path / "model", writer("new"), OURS)) == {"config.json": "new", "a.bin": "new"}
    assert whole_folder.unfinished(tmp_path / "model") is None


def test_what_lies_about_is_nobody_elses_loss(tmp_path):
    """Folders of a killed process: links are not followed, and files that are there twice stay twice."""
    folder = write_folder(tmp_path / "model", writer("old"), OURS)
    (folder / "notes.txt").write_text("newer")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis.txt").write_text("mine")
    (tmp_path / ".model.1.old").symlink_to(tmp_path / "far")
    (tmp_path / ".model.2.old").mkdir()
    for name in ("notes.txt", "more.txt", "b.bin"):
        (tmp_path / ".model.2.old" / name).write_text("of before")
    write_folder(folder, writer("new"), OURS)
    assert content(tmp_path / "far") == {"thesis.txt": "mine"}
    assert content(folder) == {"config.json": "new", "a.bin": "new", "notes.txt": "newer", "more.txt": "of before"}
    assert content(tmp_path / ".model.2.old") == {"notes.txt": "of before"}
