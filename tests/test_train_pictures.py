"""irpe/train/pictures.py, irpe/runs/picture.py: which files are read, what each becomes, what is said of the others."""

import io
import tarfile
import warnings

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import Image
from train_tiny import SMALL, pictures
from typer.testing import CliRunner

from irpe.__main__ import app
from irpe.runs import picture
from irpe.train import data
from irpe.train import pictures as reading
from irpe.train.settings import settings_from


def settings(where, **more):
    return settings_from("small", {"data": str(where), "in_chans": 1, **more})


def irpe(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return result, " ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in result.output).split())


def ramp():
    """Grey levels 0, 257, 2 x 257, ... of 16 bits, on 4 x 6 pixels, and what they are in 8 bits."""
    levels = np.linspace(0, 255, 24).round().astype(np.uint16).reshape(4, 6)
    return levels * 257, levels.astype(np.uint8)


def sixteen(folder):
    """A folder of two classes with one 16-bit picture in each."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(ramp()[0]).save(folder / name / "one.png")
    return folder


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_16_bits_keep_their_grey_levels(kind, mode):
    wide, narrow = ramp()
    file = io.BytesIO()
    Image.fromarray(wide).save(file, kind)
    found = np.asarray(picture.converted(Image.open(file), mode))
    assert np.array_equal(found, narrow if mode == "L" else np.stack([narrow] * 3, -1))


def test_16_bits_between_two_levels_go_to_the_nearer_one():
    found = picture.converted(Image.fromarray(np.array([[128, 129, 65535 - 128, 65535 - 129]], np.uint16)), "L")
    assert np.asarray(found).tolist() == [[0, 1, 255, 254]]


def test_16_bits_in_every_source(tmp_path):
    pytest.importorskip("datasets")
    folder = sixteen(tmp_path / "all" / "train")
    sixteen(tmp_path / "all" / "val")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(folder, ".")
    narrow = ramp()[1]
    sources = [
        reading.pictures(folder, "L")[0],
        reading.pictures(tmp_path / "all.tar", "L")[0],
        data.open_data(settings("torch/image_folder", data_dir=str(tmp_path / "all"))).train,
        data.open_data(settings(f"hfds/{tmp_path / 'all'}")).train,
    ]
    for source in sources:
        assert [np.array_equal(np.asarray(source[k][0]), narrow) for k in range(2)] == [True, True], source
        assert [source[k][1] for k in range(2)] == [0, 1]


def test_16_bits_in_a_stream(tmp_path):
    pytest.importorskip("webdataset")
    from irpe.train import loader

    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        file = io.BytesIO()
        Image.fromarray(ramp()[0]).save(file, "PNG")
        for name, content in (("0.png", file.getvalue()), ("0.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    more = {"train_split": "train-0.tar", "val_split": "train-0.tar", "num_classes": 2, "train_samples": 1}
    options = settings(f"wds/{tmp_path}", loader_workers=0, crop_pct=1.0, **more)
    transform = loader.Transform(loader.Shape((4, 6), (0.0,), (1.0,), 1.0), options.interpolation)
    (batch,) = loader.eval_loader(data.open_data(options).val, transform, options, 0, 1, 1)
    assert np.array_equal((batch.images[0, 0] * 255).round().numpy(), ramp()[1])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused_as_unreadable(mode, tmp_path):
    folder = pictures(tmp_path / "pictures")
    Image.new(mode, (12, 8)).save(folder / "train" / "digit1" / "deep.tif")
    result, words = irpe("train", folder, *SMALL, "--batch-size", 25, "--out", tmp_path)
    assert result.exit_code == 1
    assert "deep.tif: its pixels are 32-bit numbers" in words and "save it with 8 or 16 bits" in words


def test_files_that_are_no_pictures_have_words_of_their_own(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="^its bytes are of no image format that Pillow knows$"):
        picture.read_picture(tmp_path / "text.jpg", "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_modes_of_8_bits_become_grey_or_colour_without_a_warning(mode):
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted in ("RGB", "L"):
            found = picture.converted(image, wanted)
            assert found.mode == wanted and np.asarray(found).min() == 255


def test_exif_orientation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (6, 4)).save(tmp_path / "one.jpg", exif=exif)
    assert picture.read_picture(tmp_path / "one.jpg", "L").size == (6, 4)


FORMATS = ("png", "jpg", "JPEG", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "tga")


def formats(folder):
    """One picture of every format in each of two classes, with other files and what systems leave behind."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for one in FORMATS:
            Image.new("L", (12, 8), 200).save(folder / name / f"picture.{one}")
        for other in ("x.txt", "y.txt", "z.mp4", "LICENSE", ".DS_Store", "Thumbs.db", "._picture.jpg"):
            (folder / name / other).write_bytes(b"no picture")
    (folder / ".cache").mkdir()
    Image.new("L", (12, 8)).save(folder / ".cache" / "c.png")
    (folder / "list.csv").write_text("x")
    return folder


def test_every_format_is_read_and_other_files_are_named(tmp_path):
    folder = formats(tmp_path / "pictures")
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        archive.add(folder, ".")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("a", "b"):
        with tarfile.open(parts / f"{name}.tar", "w") as archive:
            archive.add(folder / name, ".")
    for place, others in ((folder, 9), (tmp_path / "pictures.tar", 9), (parts, 8)):
        source, notes = reading.pictures(place, "L")
        assert source.classes == ["a", "b"] and len(source) == 2 * len(FORMATS), place
        assert source.labels().count(0) == len(FORMATS)
        for k in range(len(source)):
            assert abs(int(np.asarray(source[k][0]).mean()) - 200) < 3, source.name(k)
        words = ".txt (4), .mp4 (2), no extension (2)" + ", .csv (1)" * (others == 9)
        assert [set(one.rpartition(": ")[2].split(", ")) for one in notes] == [set(words.split(", "))]
        assert notes[0].startswith(f"{place}: {others} files were left out that are no pictures: .txt (4), ")
    from timm.data import get_img_extensions

    assert get_img_extensions() == (".png", ".jpg", ".jpeg")  # timm's own list is as it was


def test_left_out_files_are_told_once_at_the_start(tmp_path):
    folder = pictures(tmp_path / "pictures")
    (folder / "train" / "digit1" / "notes.txt").write_text("x")
    result, words = irpe("train", folder, *SMALL, "--batch-size", 24, "--epochs", 1, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 0, result.output
    assert words.count(f"{folder}/train: 1 file was left out that is no picture: .txt (1)") == 1
    result, words = irpe("evaluate", tmp_path / "run", "--data", folder / "train")
    assert result.exit_code == 0 and "1 file was left out" in words


def test_an_index_of_large_archives_that_was_there_is_told(tmp_path):
    folder = sixteen(tmp_path / "some")
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(folder, ".")
    with open(tmp_path / "some.tar", "r+b") as file:
        file.truncate(10 * 1024**3 + 1024)  # a hole: it takes no place on the disk
    _, notes = reading.pictures(tmp_path / "some.tar", "L")
    assert notes == [] and (tmp_path / "_some_tarinfos.pickle").exists()
    source, notes = reading.pictures(tmp_path / "some.tar", "L")
    assert len(source) == 2 and "its files were taken from" in notes[0] and "_some_tarinfos.pickle" in notes[0]


def folders(place, *names):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 8), 200).save(place / name)
    return place


@pytest.mark.parametrize("inner", ["a/indoor/2.png", "a/more/indoor/2.png"])
@pytest.mark.parametrize("kind", ["folder", "archive", "archives"])
def test_a_folder_of_pictures_in_a_folder_of_pictures_is_no_class(tmp_path, inner, kind):
    place = folders(tmp_path / "all", "a/1.png", "b/1.png", inner)
    if kind == "archive":
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(place, ".")
        place = tmp_path / "all.tar"
    if kind == "archives":
        for name in ("a", "b"):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                archive.add(place / name, ".")
        (tmp_path / "sets").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"{name}.tar").rename(tmp_path / "sets" / f"{name}.tar")
        place = tmp_path / "sets"
    with pytest.raises(
        ValueError, match=r"holds pictures, and so does .*indoor inside it, which would be a class of its own"
    ):
        reading.pictures(place, "L")


def test_classes_below_folders_without_pictures_stay(tmp_path):
    place = folders(tmp_path / "all", "animals/cat/1.png", "animals/dog/1.png", "car/1.png")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(place, ".")
    for one in (place, tmp_path / "all.tar"):
        assert reading.pictures(one, "L")[0].classes == ["car", "cat", "dog"]
    folders(place, "plants/cat/1.png")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(place, ".")
    for one in (place, tmp_path / "all.tar"):
        with pytest.raises(
            ValueError, match=r"two folders of the name 'cat' would be one class: .*animals/cat and .*plants/cat"
        ):
            reading.pictures(one, "L")


def test_links_are_followed_and_end(tmp_path):
    """A link to another class's folder is a class; one to a folder that it lies in would have no end."""
    place = folders(tmp_path / "all", "a/x/1.png", "b/y/1.png", "b/y/2.png")
    (place / "b" / "z").symlink_to(place / "a" / "x")
    for name, target in (("a/back", "."), ("a/here", "a"), ("b/above", "..")):
        (place / name).symlink_to(place / target)
    assert reading.pictures(place, "L")[0].classes == ["x", "y", "z"]
    for name, target in (("a/to", "b"), ("b/fro", "a")):
        (place / name).symlink_to(place / target)
    found = {one.folder.removeprefix(str(place)) for one in picture.walk(place) if one.pictures}
    assert found == {"/a/x", "/a/to/y", "/a/to/z", "/b/y", "/b/z", "/b/fro/x"}


def test_the_order_is_that_of_timm(tmp_path):
    from timm.utils.misc import natural_key

    names = ["b10", "B9", "a", "10", "9", "c1d20", "c1d3", "c01d4", "_", "٣"]
    assert sorted(names, key=picture.natural) == sorted(names, key=natural_key)
    place = folders(tmp_path / "all", "9/1.png", "10/1.png", "²/1.png")  # a digit that is no number
    assert reading.pictures(place, "L")[0].classes == ["9", "10", "²"]


def test_the_number_of_classes_is_said_at_the_start(tmp_path):
    folder = pictures(tmp_path / "pictures")
    given = ["train", folder, *SMALL, "--batch-size", 6, "--max-steps", 1, "--out", tmp_path, "--name", "run"]
    _, words = irpe(*given)
    assert f"{folder}: 4 classes, 24 images to train on, 24 images to evaluate on" in words
    _, words = irpe("evaluate", tmp_path / "run")
    assert f"{folder}: 4 classes, 24 images to evaluate on" in words
    _, words = irpe("train", folder / "train", "--val-share", 0.25, *given[2:])
    assert "4 classes, 16 images to train on, 8 images to evaluate on" in words


def test_archives_that_are_not_in_order(tmp_path):
    place = folders(tmp_path / "all", "a/1.png", "b/1.png")
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(place, ".")
        archive.add(place / "b" / "1.png", "./a/1.png")
    with pytest.raises(ValueError, match=r"holds 1 names twice, such as a/1.png"):
        reading.pictures(path, "L")
    for depth in (2, 60):
        inner = tmp_path / "0.tar"
        with tarfile.open(inner, "w") as archive:
            archive.add(place, ".")
        for number in range(1, depth + 1):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
                archive.add(tmp_path / f"{number - 1}.tar", "x.tar")
        with pytest.raises(ValueError, match=r"is an archive in an archive|without an end"):
            reading.pictures(tmp_path / f"{depth}.tar", "L")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"cut.tar"):
        reading.pictures(tmp_path / "cut.tar", "L")


def test_the_index_of_large_archives_runs_nothing(tmp_path, monkeypatch):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil",)

    monkeypatch.chdir(tmp_path)
    folder = sixteen(tmp_path / "some")
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(folder, ".")
    with open(tmp_path / "some.tar", "r+b") as file:
        file.truncate(10 * 1024**3 + 1024)
    (tmp_path / "_some_tarinfos.pickle").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ValueError, match="cannot be read as a tar archive with pictures: Global .*system is not permitted"
    ):
        reading.pictures(tmp_path / "some.tar", "L")
    assert not (tmp_path / "evil").exists()
