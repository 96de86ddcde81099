"""irpe detect on what users bring: annotations of every kind, turned pictures, strips, options that nothing uses."""

import json
import os
import re
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

from PIL import Image, ImageOps
from test_detect import PLAIN, WORLD, coco, put, tiny
from test_train_folder import words
from train_tiny import irpe

from irpe.detect import model as models
from irpe.detect import run as job
from irpe.detect import saved, scenes
from irpe.detect.batches import Transform, collate, piece, train_batches
from irpe.detect.data import open_part, turned
from irpe.runs.workers import RunError

QUICK = ["--size", 0, "--d-model", 16, "--layers", 1, "--queries", 4, "--batch-size", 2, "--epochs", 1, "--draw", 0]
QUICK += ["--device", "cpu", "--hflip", 0, "--rpe", "none", "--max-steps", 1]


@pytest.fixture
def folder(tmp_path):
    return scenes.write(tmp_path / "data", 0, {"train": 4, "val": 3}, 1)


def changed(folder, part, change):
    file = folder / "annotations" / f"{part}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def document_with(change):
    document = scenes.document("val", 0, 4)
    change(document)
    return json.loads(json.dumps(document), parse_constant=float)


HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["annotations"].insert(1, None), "number 1 of its annotations is None; expected names and values"),
        (lambda d: d["images"].append([3]), "number 4 of its images is [3]"),
        (lambda d: d["categories"].append("car"), "number 10 of its categories is 'car'"),
        (lambda d: d["annotations"][0].pop("bbox"), "annotation 1 of the file has no bbox; expected [x, y, width"),
        (put(bbox=None), "annotation 1 of the file has no bbox"),
        (put(bbox=[HUGE, 1, 2, 3]), "annotation 1 of the file has the bbox [1000"),
        (put(bbox="1 2 3 4"), "has the bbox 1 2 3 4; expected [x, y, width, height]"),
        (put(bbox=["a", 1, 2, 3]), "expected [x, y, width, height] in pixels"),
        (put(bbox=[1, 2, None, 3]), "expected [x, y, width, height] in pixels"),
        (put(bbox={"x": 1}), "expected [x, y, width, height] in pixels"),
        (put(bbox=[float("inf"), 1, 2, 3]), "expected [x, y, width, height] in pixels"),
        (put(image_id="1"), "is of image '1', which is not among its images, such as 0"),
        (put(category_id="1"), "is of category '1', which is not among its categories, such as 1"),
        (put(image_id=[1]), "is not in COCO's detection format: TypeError"),
        (put(iscrowd=7), "annotation 1 of the file has iscrowd 7; expected 0 or 1"),
        (put(iscrowd="no"), "has iscrowd 'no'; expected 0 or 1"),
        (lambda d: [one.update(iscrowd=1) for one in d["annotations"]], "has boxes of crowds alone (iscrowd 1)"),
        (lambda d: d["images"][0].update(file_name="/etc/x"), "has the file_name '/etc/x'; expected a name inside"),
        (lambda d: d["images"][0].update(file_name="../a.png"), "has the file_name '../a.png'; expected a name inside"),
        (lambda d: d["images"][0].update(file_name="a/../../b.png"), "expected a name inside the folder of images"),
        (lambda d: d["images"][0].update(file_name=5), "has the file_name 5; expected a name"),
        (lambda d: d["images"][0].update(file_name=None), "has the file_name None; expected a name"),
        (lambda d: d["images"][0].update(width=0), "image 0 of the file has width and height (0, "),
        (lambda d: d["images"][0].update(height="80"), "expected whole numbers of pixels"),
        (lambda d: d["images"][0].update(height=HUGE), "expected whole numbers of pixels"),
        (lambda d: d["images"][0].update(height=40.5), "expected whole numbers of pixels"),
    ],
)  # fmt: skip
def test_annotations_are_refused_with_their_name(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        coco(document_with(change))


@pytest.mark.parametrize(("area", "given"), [
    (None, True), (-3, False), (float("nan"), False), (HUGE, False), ("big", False), (0, True), (5.5, True),
])  # fmt: skip
def test_areas_that_are_none_are_computed(area, given):
    data = coco(document_with(put(area=area)))
    x, y, right, bottom = data.pictures[0].boxes[0].tolist()
    expected = area if given and area is not None else (right - x) * (bottom - y)
    assert data.pictures[0].areas[0] == pytest.approx(expected)
    assert data.notes == ([] if given else ["the file: 1 area that is none was computed from the box"])


def test_what_is_kept_is_said():
    def change(document):
        document["images"][1]["file_name"] = document["images"][0]["file_name"]
        for one in document["categories"]:
            one.update(id=3 * one["id"], supercategory="digits")
        for one in document["annotations"]:
            one["category_id"] *= 3
        document["categories"].insert(0, {"id": 0, "name": "digits", "supercategory": "none"})

    data = coco(document_with(change))
    assert data.classes[:2] == ["digits", "0"] and len(data.classes) == 11
    assert data.notes[0] == "the file: 1 file is several images: 000000.png"
    assert data.notes[1].startswith(
        "the file: the ids of its 11 categories, 0 to 30, have holes; classes are numbered from 0 in"
    )
    assert data.notes[2] == (
        "the file: category digits (id 0) has no boxes and stands above others; it is kept as a class of its own"
    )


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_annotations_are_utf_8_whatever_the_locale(folder, mark, monkeypatch):
    file = folder / "annotations" / "train.json"
    changed(folder, "train", lambda d: d["categories"][0].update(name="Größe 日本"))
    document = json.loads(file.read_text())
    file.write_bytes((mark + json.dumps(document, ensure_ascii=False)).encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert open_part(tiny(data=str(folder)), "train").classes == ["Größe 日本"]
    for content, said in (
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "is not JSON"),
        (b"", "JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            open_part(tiny(data=str(folder)), "train")


# ---- pictures


def broken_pictures():
    """Bytes that make Pillow raise errors of many kinds."""
    import io
    import struct

    from PIL import features

    def saved(kind, size=(6, 4), mode="RGB"):
        file = io.BytesIO()
        Image.new(mode, size).save(file, kind)
        return file.getvalue()

    yield "bomb.png", saved("PNG").replace(struct.pack(">II", 6, 4), struct.pack(">II", 60_000, 60_000))
    yield "cut.jpg", saved("JPEG", (60, 40))[:300]
    yield "cut.tif", saved("TIFF", (60, 40))[:100]
    yield "tags.tif", saved("TIFF").replace(struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 2, 1))
    dds = saved("DDS")
    yield "odd.dds", dds[:80] + struct.pack("<I", 4) + b"ABCD" + dds[88:]
    if features.check("avif"):
        avif = saved("AVIF")
        yield "cut.avif", avif[: len(avif) * 3 // 4]
    yield "text.png", b"no picture"
    yield "empty.png", b""


@pytest.mark.parametrize(
    ("name", "content"), list(broken_pictures()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_pictures_that_cannot_be_read_are_named(folder, name, content):
    (folder / "train" / name).write_bytes(content)
    changed(folder, "train", lambda d: d["images"][2].update(file_name=name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = irpe("detect", folder, *QUICK, "--out", folder.parent, "--batch-size", 4)
    assert result.exit_code == 1, result.output
    assert f"{name} of" in words(result) and "cannot be read:" in words(result)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_is_no_picture(folder, workers):
    (folder / "train" / "000001.png").unlink()
    os.mkfifo(folder / "train" / "000001.png")
    data = open_part(tiny(data=str(folder)), "train")
    with pytest.raises(RunError, match="000001.png of .* cannot be read: it is a pipe; expected a file"):
        list(train_batches(data, PLAIN, tiny(batch_size=4, loader_workers=workers), 0, 1, epoch=0, first=0))


def with_exif(folder, orientation, *, square=False, stored_size=False):
    """The first training picture stored so that it is displayed as before, with its boxes as they are displayed."""
    path = folder / "train" / "000000.png"
    shown = Image.open(path).convert("RGB")
    if square:
        shown = shown.crop((0, 0, min(shown.size), min(shown.size)))
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]  # what undoes the turn
    exif = Image.Exif()
    exif[0x0112] = back
    stored = ImageOps.exif_transpose(_tagged(shown, exif))
    exif[0x0112] = orientation
    stored.save(path, exif=exif)

    def change(document):
        size = stored.size if stored_size else shown.size
        document["images"][0].update(width=size[0], height=size[1])
        document["annotations"] = [one for one in document["annotations"] if one["image_id"] != 0]
        document["annotations"].append({"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 9, 5]})

    changed(folder, "train", change)
    return np.asarray(shown), np.asarray(stored)


def _tagged(image, exif):
    import io

    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize("square", [False, True], ids=["oblong", "square"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_as_their_boxes_are_drawn(folder, orientation, square):
    shown, stored = with_exif(folder, orientation, square=square)
    settings = tiny(data=str(folder))
    data = open_part(settings, "train")
    assert np.array_equal(np.asarray(data.image(0)), shown)
    notes = turned(data, settings)
    if orientation == 1:
        assert notes == []
    else:
        assert len(notes) == 1 and "1 of 4 pictures have an orientation in EXIF" in notes[0] and "displayed" in notes[0]
    other = open_part(tiny(data=str(folder), orientation="stored"), "train")
    swaps = orientation >= 5 and not square
    assert np.array_equal(np.asarray(other.image(0)), shown if swaps else stored)  # the size in the file decides


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_sizes_of_the_stored_picture_mean_stored_pixels(folder, orientation):
    _, stored = with_exif(folder, orientation, stored_size=True)
    assert np.array_equal(np.asarray(open_part(tiny(data=str(folder)), "train").image(0)), stored)


def test_turned_pictures_are_counted_at_the_start(folder):
    with_exif(folder, 3)
    result = irpe("detect", folder, *QUICK, "--out", folder.parent, "--name", "run")
    assert result.exit_code == 0 and words(result).count("1 of 4 pictures have an orientation in EXIF") == 1
    assert "1 category, 4 pictures to train on, 3 to evaluate on" in words(result)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (20_000, 2), (2, 3)])
def test_strips_are_trained_on_and_measured(folder, size):
    for part in ("train", "val"):
        Image.new("RGB", size, (9, 99, 200)).save(folder / part / "000000.png")

        def change(document):
            document["images"][0].update(width=size[0], height=size[1])
            document["annotations"] = [one for one in document["annotations"] if one["image_id"] != 0]
            document["annotations"].append({"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 1]})

        changed(folder, part, change)
    quick = [*QUICK[2:], "--size", 64, "--max-size", 96, "--batch-size", 4]
    for more in ([], ["--crop", 1, "--train-size", 64]):
        result = irpe("detect", folder, *quick, *more, "--out", folder.parent, "--name", f"run{len(more)}")
        assert result.exit_code == 0, result.output


def test_a_piece_of_a_strip_is_that_of_the_resized_strip():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (300, 14_000, 3), dtype=np.uint8))
    boxes = torch.tensor([[0.0, 0.0, 14_000.0, 300.0]])
    cut, found, which = piece(image, boxes, np.random.default_rng(5))
    assert which.tolist() == [0] and found[0].tolist() == [0, 0, *cut.size]
    tall, _, _ = piece(image.transpose(Image.Transpose.ROTATE_90), boxes[:, [1, 0, 3, 2]], np.random.default_rng(5))
    assert min(tall.size) >= 384
    from irpe.detect import batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_LARGEST", 10**9)
        whole, _, _ = piece(image, boxes, np.random.default_rng(5))
    inside = (slice(3, -3), slice(3, -3))  # at the edge of a piece the smoothing sees less
    difference = np.asarray(cut).astype(int)[inside] - np.asarray(whole).astype(int)[inside]
    assert cut.size == whole.size and abs(difference).max() <= 1


def test_a_batch_has_at_least_the_size_of_a_token():
    rows = [(torch.ones(3, 1, 200), {}, 0), (torch.ones(3, 2, 3), {}, 1)]
    batch = collate(rows)
    assert batch.images.shape == (2, 3, 32, 200) and batch.mask.sum((1, 2)).tolist() == [200, 6]
    pixels, boxes, _ = Transform((800,), 1333, 0.0, (0.5,) * 3, (0.5,) * 3)(
        Image.new("RGB", (3000, 1)), torch.tensor([[0.0, 0.0, 1500.0, 1.0]]), np.random.default_rng(0)
    )
    assert pixels.shape == (3, 1, 1333) and boxes.tolist() == [[0.25, 0.5, 0.5, 1.0]]


# ---- options, queries, names


def test_options_that_the_model_does_not_use_are_refused(folder, tmp_path):
    place = saved.save(models.build(tiny(), ["digit"]), models.processor_of(tiny()), tmp_path / "model")
    given = ["detect", folder, "--pretrained", place, "--device", "cpu", "--out", tmp_path]
    for more, option in (
        (["--queries", 50], "--queries"), (["--layers", 4, "--d-model", 32], "--d-model, --layers"),
        (["--dropout", 0.5], "--dropout"), (["--model", "r50"], "--model"),
    ):  # fmt: skip
        for evaluate in ([], ["--evaluate-only"]):
            result = irpe(*given, *more, *evaluate)
            assert result.exit_code == 2 and f"{option}: the model is that of --pretrained" in words(result)
    for words_, said in (
        (["detect", folder, "--model", "r50", "--queries", 5], "--queries: --model r50 has its own; leave it out"),
        (["detect", folder, "--train-scenes", 5], "--train-scenes: only of the built-in scenes"),
        (["detect", "digits", "--val-images", folder], "--val-images: the built-in scenes have no files"),
        (["detect", folder, "--size", 0, "--max-size", 50], "--max-size: --size 0 leaves images as they are"),
    ):
        result = irpe(*words_, "--out", tmp_path)
        assert result.exit_code == 2 and said in words(result), result.output


def test_pictures_with_more_boxes_than_queries_are_counted():
    settings, said = tiny(queries=1), []
    data = open_part(settings, "train")
    job._say_notes((data,), models.build(settings, data.classes), settings, said.append)
    many = sum(len(one.boxes) > 1 for one in data.pictures)
    assert many and said[-1].startswith(
        f"digits (train): {many} of 12 pictures have more boxes than the model has queries (1)"
    )
    said.clear()
    settings = tiny(queries=9)
    job._say_notes((data,), models.build(settings, data.classes), settings, said.append)
    assert said == []


def test_names_of_categories_are_no_mathematics_and_reach_no_terminal(folder, tmp_path):
    for part in ("train", "val"):
        changed(folder, part, lambda d: d["categories"][0].update(name="$\\frac$ \x1b[31m"))
        changed(folder, part, lambda d: d["images"][0].update(file_name="a\x1b[31m.png"))
        (folder / part / "000000.png").rename(folder / part / "a\x1b[31m.png")
    result = irpe("detect", folder, *QUICK, "--draw", 3, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    (folder / "train" / "a\x1b[31m.png").write_text("no picture")
    result = irpe("detect", folder, *QUICK, "--batch-size", 4, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 1 and "\x1b" not in result.output and r"a\x1b[31m.png of" in words(result)
    from irpe.detect.draw import draw

    data = open_part(tiny(data=str(folder)), "val")
    found = [{"boxes": one.boxes, "scores": torch.ones(len(one.boxes)), "labels": one.labels} for one in data.pictures]
    assert draw(tmp_path / "a.png", data, found, count=2).exists()


def test_a_picture_on_which_nothing_was_found_says_so(folder, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from irpe.detect.draw import draw

    said = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, words, **more: said.append(words))
    data = open_part(tiny(data=str(folder)), "val")
    found = [{"boxes": one.boxes, "scores": torch.ones(len(one.boxes)), "labels": one.labels} for one in data.pictures]
    found[0]["scores"] = torch.full_like(found[0]["scores"], 0.2)
    draw(tmp_path / "a.png", data, found, count=2)
    assert said[0] == "nothing found over 0.5" and said.count(said[0]) == 1 and len(said) == 1 + len(found[1]["boxes"])


FETCHING = {
    "auto_map": {"AutoConfig": "evil.Config"},
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel@main",
    "quantization_config": {"quant_method": "evil"},
    "backbone": "hf-hub:someone/evil",
    "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/evil"},
}


@pytest.mark.parametrize("name", [*FETCHING, "adapter"])
def test_folders_of_models_fetch_and_run_nothing(tmp_path, name, monkeypatch):
    place = saved.save(models.build(tiny(), ["digit"]), models.processor_of(tiny()), tmp_path / "model")
    if name == "adapter":
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/evil"}')
    else:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {name: FETCHING[name]}))
    (place / "evil.py").write_text("open('evil', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=r"neither fetched nor run|names another model to fetch"):
        models.load(place)
    result = irpe("detect", "digits", "--pretrained", place, "--evaluate-only", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2 and not (tmp_path / "evil").exists()


def test_damaged_folders_of_models_end_in_a_sentence(tmp_path):
    place = saved.save(models.build(tiny(), ["digit"]), models.processor_of(tiny()), tmp_path / "model")
    given = [
        "detect",
        "digits",
        "--pretrained",
        place,
        "--evaluate-only",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--val-scenes",
        2,
    ]
    whole = {one.name: one.read_bytes() for one in place.iterdir()}
    for name, content in (
        ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b'{"model_type": "detr", "d_model": "x"}'),
        ("config.json", b'{"model_type": "vit"}'), ("preprocessor_config.json", b"{"), ("model.safetensors", b""),
        ("model.safetensors", whole["model.safetensors"][:500]),
    ):  # fmt: skip
        for one, data in whole.items():
            (place / one).write_bytes(data)
        (place / name).write_bytes(content)
        result = irpe(*given)
        assert result.exit_code == 2, (name, content[:40], result.output)
    assert WORLD.first
