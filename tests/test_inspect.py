"""`irpe inspect`: the facts about data with classes and with boxes, and the pictures as a model sees them."""

import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import ExifTags, Image
from train_tiny import ROOT, irpe, pictures, words

import irpe.runs.grid as grid
from irpe.runs.survey import Look, contradictions, scarce, shared
from irpe.train import survey
from irpe.train.loader import Transform
from irpe.train.model import build, expected_shape, shape_of
from irpe.train.settings import settings_from

COUNTS = {"cat": (24, 3), "dog": (12, 2), "elk": (2, 1)}
ALONE = ["--loader-workers", 0]


def picture(seed, height, width, mode="RGB"):
    """Noise, of which no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of 24, 12 and 2 pictures to train on: JPEG and PNG, one grey, one square, one turned by EXIF, one
    broken; to evaluate on one of train under another name and in another format, and one twice."""
    monkeypatch.chdir(tmp_path)
    root, seed = tmp_path / "animals", 0
    for name, counts in COUNTS.items():
        for part, count in zip(("train", "val"), counts, strict=True):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                picture(seed, 20 + seed % 7, 30 + seed % 5).save(root / part / name / f"{k}.png")
                seed += 1
    picture(1000, 19, 64, "L").save(root / "train/dog/0.png")
    picture(1001, 40, 40).save(root / "train/dog/1.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(1002, 18, 33).save(root / "train/dog/2.jpg", exif=exif)
    (root / "train/dog/2.png").unlink()
    (root / "train/cat/3.png").write_bytes(b"no picture\x1b[31m")
    (root / "train/cat/notes.txt").write_text("mine")
    Image.open(root / "train/cat/5.png").save(root / "val/cat/1.bmp")
    (root / "val/cat/1.png").unlink()
    shutil.copy(root / "val/dog/0.png", root / "val/dog/1.png")
    return root


def inspected(*arguments):
    """(what was printed, the facts)."""
    result = irpe("inspect", *arguments, *ALONE, "--json", "facts.json")
    assert result.exit_code == 0, result.output
    with open("facts.json", encoding="utf-8") as file:
        return words(result), json.load(file)


def refused(*arguments):
    result = irpe("inspect", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return words(result)


def test_the_facts_about_a_folder(folder):
    said, facts = inspected("animals", "--recipe", "small", "--img-size", "16x32")
    assert facts["classes"] == [
        {"name": name, "train": train, "val": val} for name, (train, val) in COUNTS.items()
    ]  # with the broken one: it is there
    assert facts["few_under"] == 10 and facts["few"] == ["elk"]
    train, val = facts["parts"]["train"], facts["parts"]["val"]
    assert (train["pictures"], val["pictures"]) == (38, 6)
    assert train["unreadable"] == [
        {"name": "animals/train/cat/3.png", "reason": "its bytes are of no image format that Pillow knows"}
    ]
    assert val["unreadable"] == []
    expected = [Image.open(path).size for path in sorted(folder.glob("train/*/*.*g")) if path.name != "3.png"]
    expected += [Image.open(folder / "train/dog/3.png").size]
    widths, heights = (sorted(side) for side in zip(*expected, strict=True))
    for name, sides in (("width", widths), ("height", heights)):
        middle = (sides[(len(sides) - 1) // 2] + sides[len(sides) // 2]) / 2
        assert train[name] == {"min": sides[0], "median": middle, "max": sides[-1]}
    assert (train["width"]["max"], train["height"]["min"], train["height"]["max"]) == (64, 18, 40)
    assert train["of_known_size"] == 37 and train["not_square"] == 36
    assert train["formats"] == {"PNG": 36, "JPEG": 1} and train["modes"] == {"RGB": 36, "L": 1}
    assert val["formats"] == {"PNG": 5, "BMP": 1}
    assert (train["turned_by_exif"], val["turned_by_exif"]) == (1, 0)
    assert (train["copies"], val["copies"]) == (0, 1)
    assert facts["in_both"] == [{"train": "animals/train/cat/5.png", "val": "animals/val/cat/1.bmp"}]
    assert facts["of_two_classes"] == []
    assert facts["images"] == {"height": 16, "width": 32, "recipe": "small"}
    for sentence in (
        "animals: 3 classes, 38 pictures to train on, 6 pictures to evaluate on",
        "1 file was left out that is no picture: .txt (1)",
        "1 class has fewer than 10 pictures to train on: elk",
        "36 of 37",
        "PNG 36, JPEG 1",
        "1 picture to train on cannot be read: animals/train/cat/3.png: its bytes are",
        "1 picture to train on has an orientation in EXIF, which is not followed",
        "1 of 6 pictures to evaluate on is in train too, pixel by pixel",
        "animals/val/cat/1.bmp is animals/train/cat/5.png",
        "1 of 6 pictures to evaluate on is a copy of another one there",
        "runs/inspect-animals.png",
    ):
        assert sentence in said, sentence
    with Image.open("runs/inspect-animals.png") as image:
        assert image.format == "PNG" and image.width > 800


def test_the_columns_of_the_table_are_in_proportion(folder):
    result = irpe("inspect", "animals", "--no-verify", *ALONE)
    bars = {line.split()[0]: line.count("█") for line in result.output.splitlines() if "█" in line}
    assert bars == {"cat": 24, "dog": 12, "elk": 2}
    assert list(bars) == ["cat", "dog", "elk"]
    assert "no picture was read (--no-verify)" in words(result)
    assert "cannot be read" not in words(result) and "every picture can be read" not in words(result)


def test_long_lists_show_both_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(60):
        place = tmp_path / "many" / f"class{k:02}"
        place.mkdir(parents=True)
        for number in range(60 - k):
            (place / f"{number}.png").write_bytes(b"")
    picture(0, 8, 12).save(tmp_path / "many" / "class59" / "0.png")
    result = irpe("inspect", "many", "--no-verify", "--samples", 1, "--img-size", "16x32", *ALONE)
    assert result.exit_code == 0, result.output
    shown = re.findall(r"class\d\d", result.output.split("fewer than")[0])
    assert shown == [f"class{k:02}" for k in (*range(12), *range(48, 60))]
    assert "... 36 more, with 48 to 13" in words(result)


def test_the_panels_are_what_the_transforms_give(folder, monkeypatch):
    settings = settings_from("deit", {"data": "animals", "img_size": "16x32", "loader_workers": 0, "erase": 0.0})
    shape = expected_shape(settings)
    assert shape == shape_of(settings, build(settings, 3))
    data, parts = survey.open_parts(settings)
    columns, rows = survey.rows_of(settings, data.classes, parts["train"], shape, 5)
    assert columns == ["stored", "evaluation", *["training"] * 4, "mixed in its batch"]
    assert [len(row.panels) for row in rows] == [7, 7, 7, 7, 6]  # pairs are mixed
    numbers = list(survey.shown(parts["train"], settings.seed))
    assert sorted(numbers) == list(range(38))
    labels = parts["train"].labels()
    assert {labels[number] for number in numbers[:3]} == {0, 1, 2}  # one of each first
    readable = [number for number in numbers if not parts["train"].name(number).endswith("cat/3.png")][:5]
    evaluation = Transform(shape, settings.interpolation)
    for number, row in zip(readable, rows, strict=True):
        image, label = parts["train"][number]
        assert row.title == f"{data.classes[label]}  {image.height}×{image.width}"
        np.testing.assert_array_equal(row.panels[0].image, np.asarray(image) / 255)
        back = (torch.from_numpy(row.panels[1].image).permute(2, 0, 1) - torch.tensor(shape.mean)[:, None, None]) / (
            torch.tensor(shape.std)[:, None, None]
        )
        torch.testing.assert_close(back, evaluation(image), atol=1e-5, rtol=1e-5)
        views = [panel.image for panel in row.panels[2:6]]
        assert all(view.shape == (16, 32, 3) and view.min() >= 0 and view.max() <= 1 for view in views)
        assert any((views[0] != view).any() for view in views[1:])
        if len(row.panels) == 7:
            shares = [int(part) for part in re.findall(r"(\d+)%", row.panels[6].title)]
            assert data.classes[label] in row.panels[6].title and 99 <= sum(shares) <= 101
    again = survey.rows_of(settings, data.classes, parts["train"], shape, 5)[1]
    for one, other in zip(rows, again, strict=True):
        for a, b in zip(one.panels, other.panels, strict=True):
            np.testing.assert_array_equal(a.image, b.image)


def test_still_training_is_evaluation_of_grey_pictures(folder):
    """Without augmentation the panels of training are those of the largest piece; no column of mixtures."""
    still = dict(crop_scale=1.0, hflip=0.0, auto_augment="none", color_jitter=0.0, erase=0.0, mixup=0.0, cutmix=0.0)
    options = {"data": "animals", "img_size": "16x32", "loader_workers": 0, "in_chans": 1, **still}
    settings = settings_from("small", options)
    shape = expected_shape(settings)
    data, parts = survey.open_parts(settings)
    columns, rows = survey.rows_of(settings, data.classes, parts["train"], shape, 2)
    assert columns[-1] == "training"
    for row in rows:
        assert len(row.panels) == 6 and row.panels[1].image.shape == (16, 32)
        for panel in row.panels[3:]:
            np.testing.assert_array_equal(panel.image, row.panels[2].image)


def test_the_grid_has_every_panel_and_box(tmp_path, monkeypatch):
    figures = []
    save = grid.Figure.savefig
    monkeypatch.setattr(grid.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    image = np.zeros((8, 12, 3))
    boxes = [grid.Box((0.25, 0.5, 0.75, 1.0), "a $name$", 1), grid.Box((0.0, 0.0, 0.5, 0.5), "many", 0, True)]
    rows = [
        grid.Row("first", [grid.Panel(image, boxes), grid.Panel(image, title="above")]),
        grid.Row("second", [grid.Panel(image)]),
    ]
    path = grid.draw_grid(tmp_path / "new" / "grid.png", ["left", "right"], rows, "what it is")
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == 4 and sum(len(ax.images) for ax in figure.axes) == 3
    first = figure.axes[0]
    found = [(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in first.patches]
    assert found == [(2.5, 3.5, 6.0, 4.0), (-0.5, -0.5, 6.0, 4.0)]
    assert [patch.get_linestyle() for patch in first.patches] == ["-", "--"]
    assert [text.get_text() for text in first.texts] == ["a $name$", "many", "left"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["first", "", "second", ""]


def test_one_part_alone_and_a_part_that_is_held_out(folder):
    said, facts = inspected("animals/train", "--no-verify", "--samples", 2)
    assert list(facts["parts"]) == ["all"] and facts["parts"]["all"] == {"pictures": 38}
    assert "animals/train: 3 classes, 38 pictures" in said
    _, facts = inspected("animals/train", "--val-share", 0.25, "--samples", 2)
    assert {name: part["pictures"] for name, part in facts["parts"].items()} == {"train": 28, "val": 10}
    assert facts["in_both"] == []


def test_archives_and_the_built_in_digits(folder, tmp_path):
    (tmp_path / "packed").mkdir()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / "packed" / f"{part}.tar", "w") as archive:
            archive.add(folder / part, ".")
    (_, plain), (_, packed) = (inspected(name, "--samples", 1) for name in ("animals", "packed"))
    assert packed["classes"] == plain["classes"] and len(packed["in_both"]) == 1
    for part in ("train", "val"):
        for one in (plain, packed):
            one["parts"][part]["unreadable"] = [bad["reason"] for bad in one["parts"][part]["unreadable"]]
        assert packed["parts"][part] == plain["parts"][part]
    _, facts = inspected("digits", "--in-chans", 1, "--img-size", 8, "--samples", 2)
    assert (facts["parts"]["train"]["pictures"], facts["parts"]["val"]["pictures"]) == (900, 300)
    assert facts["parts"]["train"]["width"] == {"min": 8, "median": 8, "max": 8}


def test_data_that_tells_its_classes_only_when_it_is_read(folder, monkeypatch):
    """As data sets of Hugging Face do."""
    monkeypatch.setattr(survey.FolderSource, "labels", lambda self: None)
    said, facts = inspected("animals", "--samples", 2, "--no-verify")
    assert facts["classes"][0] == {"name": "cat", "train": None, "val": None} and facts["few"] == []
    assert "cat??" in said
    _, facts = inspected("animals", "--samples", 2)
    assert facts["classes"] == [
        {"name": "cat", "train": 23, "val": 3},  # one of them cannot be read
        {"name": "dog", "train": 12, "val": 2},
        {"name": "elk", "train": 2, "val": 1},
    ]


def test_data_sets_of_torchvision(folder):
    said, facts = inspected("torch/image_folder", "--data-dir", "animals", "--val-split", "val", "--samples", 1)
    assert facts["parts"]["train"]["pictures"] == 38 and len(facts["parts"]["train"]["unreadable"]) == 1
    assert facts["parts"]["train"]["modes"] == {"RGB": 37} and "formats" in facts["parts"]["train"]
    assert "2 of 6" not in said


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "nowhere does not exist; expected a folder of class folders"),
    (["empty"], "empty has no pictures; expected a folder for each class"),
    (["animals", "--out", "grid.jpg"], "--out grid.jpg; expected a file name that ends in .png"),
    (["animals", "--out", "animals/train/cat/notes.txt/x.png"], "is in its way"),
    (["animals", "--recipe", "none"], "--recipe none; expected one of deit, finetune, small"),
    (["animals", "--crop", "0.5"], "--crop: this data is taken as one of classes"),
    (["animals", "--detect"], "there is no annotation file for train"),
    (["animals", "--model", "vit_tinny"], "timm has none of that name; similar: "),
    (["animals", "--auto-augment", "rand-m"], "--auto-augment rand-m"),
    (["wds/animals", "--num-classes", "3"], "wds/animals is a stream"),
    (["animals", "--model", "vit_tiny_patch16_224.mine"], "--model vit_tiny_patch16_224.mine: Invalid pretrained tag"),
    (["animals", "--samples", "0"], "'--samples'"),
    (["broken"], "none of its pictures can be read: its bytes are of no image format"),
])  # fmt: skip
def test_wrong_input_is_a_sentence(folder, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "1.png").write_bytes(b"no picture")
    assert said in refused(*arguments)


def test_names_that_a_terminal_would_obey(folder):
    (folder / "train/elk").rename(folder / "train/\x1b[31melk")
    (folder / "val/elk").rename(folder / "val/\x1b[31melk")
    (folder / "train/\x1b[31melk/0.png").write_bytes(b"no picture")
    result = irpe("inspect", "animals", "--samples", 3, *ALONE)
    assert result.exit_code == 0
    assert "\x1b" not in result.output and result.output.count("\\x1b[31melk") >= 2


def test_pairs_of_the_same_pixels():
    a, b, c = (Look(k, label, digest=digest) for k, label, digest in ((0, 0, b"x"), (1, 1, b"x"), (2, 0, b"y")))
    bad = Look(3, 1, reason="broken")
    assert shared([a, c, bad], [b, bad]) == [(a, b)]
    assert contradictions([a, b, c, bad, Look(4, 0, digest=b"x")]) == [(a, b)]
    assert scarce([3, 50, 60]) == 10 and scarce([3, 500, 600]) == 50


def test_several_processes_find_the_same(folder):
    settings = settings_from("small", {"data": "animals", "img_size": "16x32"})
    found = []
    for workers in (0, 2):
        chosen = settings_from("small", {"data": "animals", "img_size": "16x32", "loader_workers": workers})
        data, parts = survey.open_parts(settings)
        steps = []
        found.append(survey.survey(chosen, data, parts, steps.append))
        assert sum(steps) == 44
    assert found[0] == found[1]


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """20 scenes of ten digits to train on, 5 to evaluate on; one broken, one of another size, one in both parts."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    from irpe.detect.scenes import write

    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "coco", 0, {"train": 20, "val": 5})
    (root / "train/000003.png").write_bytes(b"no picture")
    with Image.open(root / "train/000004.png") as image:
        image.resize((image.width + 1, image.height)).save(root / "train/000004.png")
    documents = {part: json.loads((root / "annotations" / f"{part}.json").read_text()) for part in ("train", "val")}
    shutil.copy(root / "train/000007.png", root / "val/000002.png")
    size = {name: documents["train"]["images"][7][name] for name in ("width", "height")}
    documents["val"]["images"][2] |= size
    documents["val"]["annotations"] = [one for one in documents["val"]["annotations"] if one["image_id"] != 2]
    documents["train"]["annotations"][0]["iscrowd"] = 1
    for part, document in documents.items():
        (root / "annotations" / f"{part}.json").write_text(json.dumps(document))
    return documents


def test_the_facts_about_boxes(scenes):
    said, facts = inspected("coco", "--size", 0, "--samples", 3)
    assert facts["kind"] == "detection"
    for part in ("train", "val"):
        own, found = scenes[part], facts["parts"][part]
        assert found["pictures"] == len(own["images"])
        assert found["boxes"] == len(own["annotations"]) == sum(found["box_areas"].values())
        small = sum(one["area"] < 1024 for one in own["annotations"])
        assert found["box_areas"]["small"] == small and found["box_areas"]["large"] == 0
        for one in facts["classes"]:
            numbers = [each["category_id"] for each in own["annotations"]]
            assert one[part] == numbers.count(int(one["name"]) + 1)
        widths = [one["width"] for one in own["images"]]
        assert (found["width"]["min"], found["width"]["max"]) == (min(widths), max(widths))
        each = [sum(one["image_id"] == image["id"] for one in own["annotations"]) for image in own["images"]]
        assert (found["boxes_of_a_picture"]["max"], found["without_boxes"]) == (max(each), each.count(0))
    assert (facts["parts"]["train"]["of_crowds"], facts["parts"]["val"]["without_boxes"]) == (1, 1)
    bad = {one["name"]: one["reason"] for one in facts["parts"]["train"]["unreadable"]}
    assert list(bad) == ["000003.png", "000004.png"] and "its boxes are of another version" in bad["000004.png"]
    assert facts["in_both"] == [{"train": "000007.png", "val": "000002.png"}]
    for sentence in ("coco: 10 categories, 20 pictures to train on", "2 pictures to train on cannot be read", "small"):
        assert sentence in said
    with Image.open("runs/inspect-coco.png") as image:
        assert image.format == "PNG"


def test_boxes_go_where_the_transforms_take_them(scenes):
    from irpe.detect import survey as of_boxes
    from irpe.detect.settings import settings_from as detection

    settings = detection({"data": "coco", "size": 64, "hflip": 1.0})
    parts = of_boxes.open_parts(settings)
    columns, rows = of_boxes.rows_of(settings, parts["train"], 20)
    assert columns == ["annotated", "evaluation", "training", "training"]
    assert len(rows) == 18 and all(len(row.panels) == 4 for row in rows)  # two cannot be read
    pictures = {picture.name: picture for picture in parts["train"].pictures}
    crowds = 0
    for row in rows:
        own = pictures[row.title.split()[0]]
        annotated, still, flipped = row.panels[:3]
        sides = (own.width, own.height) * 2
        for box, corners, label in zip(annotated.boxes, own.boxes.tolist(), own.labels.tolist(), strict=True):
            assert box.corners == pytest.approx([x / side for x, side in zip(corners, sides, strict=True)])
            assert box.label == parts["train"].classes[label]
        crowds += sum(box.crowd for box in annotated.boxes)
        learned = [box for box in annotated.boxes if not box.crowd]
        assert min(still.image.shape[:2]) == 64 and still.title == "{}×{}".format(*still.image.shape)
        np.testing.assert_allclose(flipped.image, still.image[:, ::-1], atol=1e-6)
        for one, two, three in zip(learned, still.boxes, flipped.boxes, strict=True):
            left, top, right, bottom = one.corners
            assert two.corners == pytest.approx(one.corners, abs=1e-6)
            assert three.corners == pytest.approx((1 - right, top, 1 - left, bottom), abs=1e-6)
    assert crowds == 1


def test_the_command_of_the_page_about_detection(scenes):
    (line,) = re.findall(r"irpe inspect coco [^#]*", (ROOT / "docs" / "detect.md").read_text())
    options = line.split()[3:]
    said, facts = inspected("coco", *options, "--samples", 1, "--no-verify")
    assert facts["images"] == {"shorter_side": [480, 800], "longest_side": 1333, "recipe": "finetune"}
    assert "unreadable" not in facts["parts"]["train"] and "no picture was read" in said


def test_built_in_scenes(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    said, facts = inspected("digits", "--detect", "--train-scenes", 6, "--val-scenes", 3, "--samples", 2)
    assert "digits: 1 category, 6 pictures to train on, 3 pictures to evaluate on" in said
    assert facts["in_both"] == [] and facts["images"]["recipe"] == "digits"


def test_what_is_taken_as_boxes(scenes, tmp_path):
    from irpe.detect.data import is_annotated

    assert is_annotated("coco") and not is_annotated("coco/train") and not is_annotated("nowhere")
    roboflow = tmp_path / "exported" / "valid"
    roboflow.mkdir(parents=True)
    (roboflow / "_annotations.coco.json").write_text("{}")
    assert is_annotated(str(roboflow.parent))
    assert "--img-size: this data is taken as one of boxes" in refused("coco", "--img-size", "224")
    assert "holds pictures itself" in refused("coco", "--no-detect")
    assert "--max-size: --size 0 leaves images as they are" in refused("coco", "--size", 0, "--max-size", 9)
    (tmp_path / "coco/annotations/val.json").unlink()
    assert "there is no annotation file for val" in refused("coco")


def test_the_options_have_the_defaults_of_training():
    said = words(irpe("inspect", "--help"))
    for option in ("--auto-augment", "--crop-scale", "--val-share", "--train-json", "--hflip", "--samples"):
        assert option in said
    for option in ("--epochs", "--device", "--rpe", "--batch-size"):
        assert option not in said


def test_tiny_pictures_in_every_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "tiny", per_class=2)
    _, facts = inspected("tiny", "--in-chans", 1, "--img-size", "8x12", "--samples", 1)
    assert facts["parts"]["train"]["modes"] == {"L": 8}


def test_settings_in_a_file(tmp_path, monkeypatch):
    """The augmentations of a run; what the command line says comes first."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", per_class=4)
    (tmp_path / "mine.yaml").write_text(
        "data: data\nrecipe: small\nimg-size: 10x14\nin-chans: 1\nmodel-arg: [depth=1, patch_size=2]\nbatch-size: 8\n"
        "pretrained: hub\n"
    )
    _, facts = inspected("--config", "mine.yaml", "--samples", 1)
    assert facts["images"] == {"height": 10, "width": 14, "recipe": "small"} and facts["data"] == "data"
    _, facts = inspected("data/train", "--config", "mine.yaml", "--img-size", "8x12", "--samples", 1)
    assert facts["images"]["height"] == 8 and facts["data"] == "data/train"
    (tmp_path / "short.yaml").write_text("hflip: 0.0")
    assert "name the DATA to look at: neither the command line nor a file does" in refused("--config", "short.yaml")
    inspected("data", "--config", "short.yaml", "--in-chans", 1, "--img-size", "8x12", "--samples", 1)
    assert "--recipe deit: the file has recipe small" in refused("--config", "mine.yaml", "--recipe", "deit")
    (tmp_path / "odd.yaml").write_text("data: data\nimgsize: 3\n")
    assert "odd.yaml: unknown settings imgsize" in refused("--config", "odd.yaml")
    (tmp_path / "far.yaml").write_text("data: hfds/user/name\n")
    assert "what a file names is not fetched" in refused("--config", "far.yaml")


def test_settings_of_a_run_with_boxes_in_a_file(scenes, tmp_path):
    from dataclasses import asdict

    from irpe.detect.settings import settings_from

    own = asdict(settings_from({"data": "coco", "size": 64, "hflip": 0.0, "queries": 3, "pretrained": "facebook/x"}))
    (tmp_path / "settings.json").write_text(json.dumps(own))
    _, facts = inspected("--config", tmp_path / "settings.json", "--samples", 1)
    assert facts["kind"] == "detection" and facts["images"]["shorter_side"] == [64]
    assert "unknown settings" in refused("--config", tmp_path / "settings.json", "--no-detect")
