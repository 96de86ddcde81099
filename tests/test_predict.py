"""`irpe predict`: classifiers and detectors of runs, folders and ONNX files, on pictures that may be anything."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_tiny import irpe, words

import irpe as package
from irpe.drawing import with_boxes
from irpe.prediction import Detector, Found, pictures_in, read
from irpe.runs.picture import displayed

pytest.importorskip("timm")


@pytest.fixture
def files(tiny_run):
    found = (tiny_run.parent / "data" / "val").rglob("*.png")
    return sorted(found, key=lambda file: (file.parent.name, int(file.stem)))


def predict(*arguments):
    return irpe("predict", *arguments, "--device", "cpu")


def test_a_run_as_table_json_and_csv(tiny_run, files, tmp_path):
    places = ("--json", tmp_path / "new" / "all.json", "--csv", tmp_path / "all.csv")
    result = predict(tiny_run, tiny_run.parent / "data" / "val", "--top", 2, "--batch-size", 5, *places)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # where a bar would be, on a terminal
    values = json.loads((tmp_path / "new" / "all.json").read_text())
    assert [one["file"] for one in values] == [str(file) for file in files]
    expected = package.load(tiny_run).predict(files, top=2)
    for one, guesses in zip(values, expected, strict=True):
        assert [guess["label"] for guess in one["predictions"]] == [guess.label for guess in guesses]
        assert [guess["score"] for guess in one["predictions"]] == pytest.approx([one.score for one in guesses])
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert len(rows) == 2 * len(files) and list(rows[0]) == ["file", "rank", "label", "score"]
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "1", "2"]
    best = values[0]["predictions"][0]
    assert f"{best['label']} {100 * best['score']:.1f} %" in words(result)


def test_one_picture_of_any_kind(tiny_run, files, tmp_path, monkeypatch):
    """Formats, modes and sizes that the data did not have; the names of files are no markup."""
    image = Image.open(files[0])
    kinds = {"a.jpg": "L", "b.webp": "RGB", "c.bmp": "RGBA", "[red]d.gif": "P", "e.tiff": "I;16"}
    for name, mode in kinds.items():
        (image.resize((70, 31)) if mode != "I;16" else image.convert("I").convert("I;16")).convert(mode).save(
            tmp_path / name
        )
    monkeypatch.chdir(tmp_path)  # a long path is broken in its column, in the middle of a name, too
    result = predict(tiny_run, *sorted(kinds), "--top", 1)
    assert result.exit_code == 0, result.output
    assert all(name in words(result).replace(" ", "") for name in kinds)


def test_an_exported_file(tiny_run, files, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for batch in (0, 3):  # any number of images, and three of them
        file = tmp_path / f"model{batch}.onnx"
        assert irpe("export", tiny_run, "--out", file, "--batch", batch).exit_code == 0
        facts = json.loads(file.with_name(f"{file.name}.json").read_text())
        assert facts["use"] == f"irpe predict {file.name} picture.jpg" and "crop_pct" in facts["input"]["resize"]
        places = [tmp_path / f"{batch}.json", tmp_path / "run.json"]
        assert predict(file, *files[:7], "--json", places[0], "--batch-size", 4).exit_code == 0
        assert predict(tiny_run, *files[:7], "--json", places[1]).exit_code == 0
        found, expected = (json.loads(place.read_text()) for place in places)
        for one, other in zip(found, expected, strict=True):
            scores, others = (
                {guess["label"]: guess["score"] for guess in part["predictions"]} for part in (one, other)
            )
            assert scores == pytest.approx(others, abs=1e-5)
    (tmp_path / "model0.onnx.json").unlink()
    assert "model0.onnx.json does not exist; expected what irpe export wrote" in words(
        predict(file.with_name("model0.onnx"), files[0])
    )
    file.write_bytes(b"no ONNX")
    assert "model3.onnx cannot be read" in words(predict(file, files[0]))


def test_unreadable_pictures_are_named_and_the_others_told(tiny_run, files, tmp_path):
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    result = predict(tiny_run, tmp_path, files[0])
    assert result.exit_code == 1
    text = words(result)
    assert "unreadable:" in text and "broken.png" in text and "text.jpg" in text and "digit" in text
    for options, sentence in (
        ([tiny_run, tmp_path / "absent.png"], "absent.png does not exist"),
        ([tiny_run, files[0], "--weights", "ema"], "does not exist"),
        ([tiny_run, files[0], "--annotations", files[0]], "only detectors have boxes"),
        (
            [tiny_run, files[0], "--threshold", 0.5, "--out", tmp_path / "new"],
            "--threshold, --out: only detectors have boxes; leave it out",
        ),
        (
            [tmp_path / "nothing", files[0], "--out", "."],
            "--out . names no new folder; expected one, such as predictions",
        ),
        ([tmp_path / "nothing", files[0], "--out", tmp_path / ".."], "names no new folder"),
        ([tmp_path / "nothing" / "there", files[0]], "expected a folder, an .onnx file"),
        ([tmp_path, files[0]], "has neither config.json nor settings.json"),
        ([tiny_run, files[0], "--json", tiny_run], "cannot be a file"),
    ):
        result = predict(*options)
        assert result.exit_code == 2 and sentence in words(result), result.output
    assert "--device no; expected auto, cpu" in words(irpe("predict", tiny_run, files[0], "--device", "no"))
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in words(predict(tiny_run, tmp_path / "empty"))


def test_files_in_folders_are_told_in_their_order_and_once(files, tmp_path):
    place = tmp_path / "place"
    names = ["9.png", "10.png", "Folder.png/2.PNG", "other/1.png"]
    for name in (*names, ".hidden/1.png", "__MACOSX/1.png", "._9.png", "text.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(files[0].read_bytes())
    (place / "round").symlink_to(place)
    (place / "other" / "aside").symlink_to(place / "Folder.png")
    (place / "Folder.png" / "aside").symlink_to(place / "other")
    found = [file.relative_to(place).as_posix() for file in pictures_in([place, place / "9.png"])]
    through = ["Folder.png/aside/1.png", "other/aside/2.PNG"]
    assert found == ["9.png", "10.png", "Folder.png/2.PNG", through[0], "other/1.png", through[1]]
    (tmp_path / "empty.png").mkdir()
    with pytest.raises(ValueError, match=r"empty.png has no pictures"):
        pictures_in([tmp_path / "empty.png"])


def test_a_fixed_batch_reads_each_picture_once(tiny_run, files, monkeypatch):
    said = package.load(tiny_run).predict
    expected = said(files[:7])
    said.batch, read = 3, []
    prepare = said.prepare
    monkeypatch.setattr(said, "prepare", lambda image: read.append(1) or prepare(image))
    for one, other in zip(said(files[:7]), expected, strict=True):
        assert dict(one) == pytest.approx(dict(other))
    assert len(read) == 7


def test_outputs_that_are_no_numbers(tiny_run, files):
    model = package.load(tiny_run)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the outputs are not numbers"):
        model.predict(files[0])


def test_boxes_are_where_they_were_found():
    image = Image.new("RGB", (80, 50))
    one = Found("digit", 0.9, (20.0, 15.0, 60.0, 40.0), 1)
    drawn = with_boxes(image, [one])
    assert drawn.size == image.size and not image.getbbox()
    left, top, right, bottom = drawn.getbbox()
    assert (left, right, bottom) == (20, 61, 41) and top < 15
    assert not drawn.crop((22, 17, 58, 38)).getbbox()  # the middle is free
    assert with_boxes(image, []).getbbox()  # it says that there is nothing


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    """A small DETR with random weights, which finds something everywhere, in the folder of a run."""
    pytest.importorskip("transformers", minversion="5.18")
    pytest.importorskip("pycocotools")
    import dataclasses

    from irpe.detect.model import build, processor_of
    from irpe.detect.saved import save
    from irpe.detect.settings import settings_from

    place = tmp_path_factory.mktemp("detection")
    settings = settings_from({"data": "digits", "rpe": "rpe-2.0-product-ctx-1-k", "size": 64, "max_size": 96}, "digits")
    model = build(settings, ["cat", "dog"])
    (place / "run").mkdir()
    (place / "run" / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    save(model, processor_of(settings), place / "run" / "best")
    torch.manual_seed(0)
    for name, size in (("000000000139.png", (90, 60)), ("000000000285.png", (60, 90))):
        Image.fromarray(torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8).numpy()).save(place / name)
    return place


def test_detection_in_the_format_of_coco(detection, tmp_path):
    from pycocotools.coco import COCO

    names = ["000000000139.png", "000000000285.png"]
    files = [detection / name for name in names]
    places = ("--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv", "--out", tmp_path / "drawn")
    result = predict(detection / "run", *files, "--threshold", 0.01, *places)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "all.json").read_text())
    model = package.load(detection / "run")
    expected = [model.predict(file, threshold=0.01) for file in files]
    assert len(rows) == sum(map(len, expected)) > 0
    assert {row["image_id"] for row in rows} == {139, 285}
    x, y, right, bottom = expected[0][0].box
    assert rows[0]["bbox"] == pytest.approx([x, y, right - x, bottom - y], abs=0.02)
    assert rows[0]["category_id"] == expected[0][0].number and rows[0]["score"] == pytest.approx(
        expected[0][0].score, abs=1e-4
    )
    assert {one.name for one in (tmp_path / "drawn").iterdir()} == set(names)
    assert Image.open(tmp_path / "drawn" / names[1]).size == (60, 90)
    assert len(list(csv.DictReader((tmp_path / "all.csv").open()))) == len(rows)
    # with the ids of annotations COCO's own reader takes them; nothing that was drawn is overwritten
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    images = [{"id": 40 + k, "file_name": name, "height": 1, "width": 1} for k, name in enumerate(names)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    result = predict(detection / "run", *files, "--threshold", 0.01, *places, "--annotations", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "drawn-2").is_dir()
    loaded = COCO(str(tmp_path / "a.json")).loadRes(str(tmp_path / "all.json"))
    assert {one["image_id"] for one in loaded.anns.values()} == {40, 41}
    assert {one["category_id"] for one in loaded.anns.values()} <= {3, 7}
    result = predict(detection / "run", *files, "--threshold", 1, *places)
    assert "nothing found" in words(result) and json.loads((tmp_path / "all.json").read_text()) == []


def test_a_turned_picture_is_found_as_it_is_displayed(detection, tmp_path):
    image = Image.open(detection / "000000000139.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    model = package.load(detection / "run")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert model.predict(tmp_path / "turned.png", threshold=0) == model.predict(upright, threshold=0)
    assert model.predict.classes == ["cat", "dog"]


def test_several_pictures_are_what_each_is_alone(detection):
    model = package.load(detection / "run")
    files = sorted(detection.glob("*.png"))
    together = model.predict(files, threshold=0.0, batch_size=2)
    for file, found in zip(files, together, strict=True):
        alone = model.predict(file, threshold=0.0)
        assert [one.score for one in alone] == pytest.approx([one.score for one in found], abs=1e-4)


def test_a_detector_is_saved_and_loaded(detection, tmp_path):
    model = package.load(detection / "run")
    package.save(model, tmp_path / "saved")
    file = detection / "000000000285.png"
    assert package.load(tmp_path / "saved").predict(file, threshold=0.0) == model.predict(file, threshold=0.0)


def annotated(file, names, categories=("cat", "dog")):
    """Annotations whose images have the ids 40, 41, ... and whose categories 3, 4, ..."""
    images = [{"id": 40 + k, "file_name": name, "height": 1, "width": 1} for k, name in enumerate(names)]
    values = [{"id": 3 + k, "name": name} for k, name in enumerate(categories)]
    file.write_text(json.dumps({"images": images, "categories": values, "annotations": []}))
    return file


def test_annotations_are_looked_at_before_the_work(detection, tmp_path, monkeypatch):
    """Names of images are the longest ends of paths; what does not fit ends before anything is found."""
    monkeypatch.chdir(tmp_path)
    data = (detection / "000000000139.png").read_bytes()
    for name in ("p/a/x.png", "p/b/x.png", "p/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    one = ("predict", detection / "run", "--threshold", 0.01, "--device", "cpu", "--out", tmp_path / "drawn")
    one += ("--json", "all.json")
    annotations = ("--annotations", tmp_path / "notes.json")
    annotated(tmp_path / "notes.json", ["x.png", "b/x.png", "./p/y.png", "p/a/x.png"])
    assert irpe(*one, "p", *annotations).exit_code == 0
    rows = json.loads((tmp_path / "all.json").read_text())
    assert {row["file_name"]: row["image_id"] for row in rows} == {"p/a/x.png": 43, "p/b/x.png": 41, "p/y.png": 42}
    # a folder that was named from inside, and boxes of classes that have no category
    monkeypatch.chdir(tmp_path / "p")
    found = {row["category"] for row in rows}
    for categories in (["cat"], ["dog"]):
        annotated(tmp_path / "notes.json", ["p/y.png"], categories)
        result = irpe(*one, "y.png", *annotations, "--csv", "all.csv")
        assert result.exit_code == 0, result.output
        some, lines = json.loads(Path("all.json").read_text()), Path("all.csv").read_text().splitlines()[1:]
        assert {(row["image_id"], row["category_id"], row["category"]) for row in some} <= {(40, 3, *categories)}
        assert bool(some) == (categories[0] in found)
        left = f"all.json: without {len(lines) - len(some)} boxes of classes that --annotations does not have"
        assert (left in words(result)) == (len(lines) > len(some))
    assert len(found) < 2 or 0 < len(some) < len(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Detector, "of", lambda *arguments: pytest.fail("it has begun"))
    for names, categories, sentence in (
        (["y.png", "x.png"], ["cat"], "p/a/x.png and p/b/x.png would both be image x.png of --annotations"),
        (["y.png", "a/x.png"], ["cat"], "p/b/x.png is not among the images of --annotations"),
        (
            ["y.png", "a/x.png", "b/x.png"],
            ["fox"],
            "--annotations has the categories fox; the model has others: cat, dog",
        ),
    ):
        annotated(tmp_path / "notes.json", names, categories)
        result = irpe(*one, "p", *annotations)
        assert result.exit_code == 2 and sentence in words(result), result.output
    (tmp_path / "notes.json").write_text(json.dumps({"images": [{"id": [], "file_name": "x.png"}], "categories": []}))
    assert "is not in COCO's detection format" in words(irpe(*one, "p", *annotations))
    result = irpe(*one[:-2], "p", *annotations)
    assert result.exit_code == 2 and "--annotations tells the ids in --json; give that too" in words(result)
    result = irpe(*one, "p", "--top", 3)
    assert result.exit_code == 2 and "--top: only classifiers tell the likeliest classes" in words(result)


def test_files_of_one_name_keep_ids_of_their_own(detection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/7.png", "b/007.png", "a/x.png", "b/x.png", "b/8.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((detection / "000000000139.png").read_bytes())
    assert predict(detection / "run", "a", "b", "--threshold", 0.01, "--json", "all.json").exit_code == 0
    found = {row["file_name"]: row["image_id"] for row in json.loads((tmp_path / "all.json").read_text())}
    same = {name: name for name in ("a/7.png", "b/007.png", "a/x.png", "b/x.png")}
    assert found == same | {"b/8.png": 8, "b/y.png": "y.png"}


def test_detectors_take_what_training_takes(detection, tmp_path):
    """16 bits, damaged EXIF, and an image that Pillow has not decoded yet."""
    grey = torch.arange(60 * 90).reshape(60, 90).numpy().astype("uint16") * 12
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "deep.pgm")
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "turned.tiff", exif=exif)
    upright = read(tmp_path / "deep.pgm", "RGB", turned=True)
    assert upright.size == (90, 60) and upright.getextrema() == ((0, 252),) * 3
    lazy = [Image.open(io.BytesIO((tmp_path / name).read_bytes())) for name in ("turned.png", "turned.tiff")]
    for file in (tmp_path / "turned.png", tmp_path / "turned.tiff", *lazy):
        turned = read(file, "RGB", turned=True)
        assert turned.tobytes() == upright.transpose(Image.Transpose.ROTATE_270).tobytes()
        assert displayed(turned).size == (60, 90)  # once
    Image.new("RGB", (90, 60), "#336699").save(tmp_path / "damaged.png", exif=b"Exif\0\0no EXIF at all")
    result = predict(detection / "run", tmp_path, "--out", tmp_path / "drawn")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "drawn" / "damaged.png").size == (90, 60)
    (tmp_path / "cut.png").write_bytes((detection / "000000000139.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="truncated"):
        package.load(detection / "run").predict(Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": {"height": 64, "width": 48}}, "resizes pictures to .*'height': 64.*; expected shortest_edge"),
        ({"do_normalize": False}, "do_normalize=False; expected pixels divided by 255 and normalised"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1.0}, r"rescale_factor=1\.0"),
    ],
)
def test_processors_that_want_something_else_are_refused(detection, tmp_path, options, sentence):
    transformers = pytest.importorskip("transformers")
    model = package.load(detection / "run")
    model.predict.processor = transformers.DetrImageProcessor(**options)
    with pytest.raises(ValueError, match=sentence):
        model.predict(detection / "000000000139.png")
    # the command says so before it makes a folder
    package.save(model, tmp_path / "saved", processor=model.predict.processor)
    result = predict(tmp_path / "saved", detection / "000000000139.png", "--out", tmp_path / "drawn")
    assert result.exit_code == 2 and "the image processor" in words(result), result.output
    assert not (tmp_path / "drawn").exists()


def test_sizes_of_a_processor_are_those_of_its_own(detection):
    """What the model sees is what transformers' processor would give it."""
    transformers = pytest.importorskip("transformers")
    model, seen = package.load(detection / "run"), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    for options in (
        {"size": {"shortest_edge": 48, "longest_edge": 200}},
        {"size": {"shortest_edge": 48, "longest_edge": 64}},
        {"do_resize": False},
    ):
        model.predict.processor = transformers.DetrImageProcessor(**options)
        model.predict(detection / "000000000139.png")
        image = Image.open(detection / "000000000139.png")
        assert seen[-1] == model.predict.processor(images=image, return_tensors="pt")["pixel_values"].shape


def test_a_detector_in_half_precision(detection):
    """Pictures become what the weights are."""
    model = package.load(detection / "run")
    file = detection / "000000000139.png"
    expected = model.predict(file, threshold=0.0)
    found = model.to(torch.bfloat16).predict(file, threshold=0.0)
    assert len(found) == len(expected) and found[0].score == pytest.approx(expected[0].score, abs=0.02)
