"""`irpe detect`: scenes and annotations, padded batches, average precision, steps, resuming, the command."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from fresh import PATIENCE
from PIL import Image
from test_detr import DETR
from typer.testing import CliRunner

from irpe import equip, iRPE, rpe_config_from_string
from irpe.__main__ import app
from irpe.detect import model as models
from irpe.detect import run as job
from irpe.detect import saved, scenes
from irpe.detect.batches import Batch, Transform, collate, eval_batches, piece, train_batches, transform_of
from irpe.detect.data import Coco, open_part
from irpe.detect.evaluation import average_precision, predict
from irpe.detect.loop import Totals, Trainer, whole_loss
from irpe.detect.settings import DIGITS, RPE, settings_from, settings_from_dict
from irpe.runs import checkpoint
from irpe.runs.workers import RunError
from irpe.runs.world import World

WORLD = World(0, 1, torch.device("cpu"))
PLAIN = Transform((0,), 0, 0.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
RUNNER = CliRunner()


def tiny(**options):
    """Settings of a run of seconds on the digits."""
    small = dict(
        train_scenes=12, val_scenes=6, d_model=16, layers=1, queries=5, batch_size=4, epochs=2, eval_every=2, draw=0
    )
    return settings_from({"data": DIGITS, "rpe": RPE, "device": "cpu", "digit_classes": 10, **small, **options})


def trainer_of(settings, world=WORLD):
    data, val = open_part(settings, "train"), open_part(settings, "val")
    return Trainer(settings, data, val, models.build(settings, data.classes), models.processor_of(settings), world)


def coco(document=None, classes=None):
    document = document or scenes.document("val", 0, 6)
    return Coco(document, lambda name: scenes.scene("val", 0, int(name[:-4]))[0], "the file", classes)


def perfect(data):
    return [
        {"boxes": one.boxes.clone(), "scores": torch.ones(len(one.boxes)), "labels": one.labels.clone()}
        for one in data.pictures
    ]


# ---- scenes


def test_boxes_are_tight_around_the_ink_and_do_not_overlap():
    sizes = set()
    for part in ("train", "val"):
        for number in range(40):
            image, found = scenes.scene(part, 3, number)
            sizes.add(image.size)
            assert 1 <= len(found) <= scenes.MOST
            pixels = np.asarray(image).astype(int)
            seen = np.zeros(pixels.shape[:2], bool)
            for digit, (x, y, width, height) in found:
                assert 0 <= digit <= 9
                assert x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height
                assert not seen[y : y + height, x : x + width].any()
                seen[y : y + height, x : x + width] = True
                inside = pixels[y : y + height, x : x + width].min(2)
                # the photographs are dimmed to half: what is lighter than that is ink, and ink touches all four sides
                assert (inside > 128).any()
                for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                    assert side.max() > 20
            assert pixels[~seen].max() <= 128, "no ink outside of the boxes"
    assert len(sizes) > 20 and any(width != height for width, height in sizes)


def test_scenes_are_functions_of_part_seed_and_number():
    first, boxes = scenes.scene("train", 0, 5)
    again, same = scenes.scene("train", 0, 5)
    assert np.array_equal(first, again) and boxes == same
    for other in (("val", 0, 5), ("train", 1, 5), ("train", 0, 6)):
        image, _ = scenes.scene(*other)
        assert image.size != first.size or not np.array_equal(image, first)
    with pytest.raises(ValueError, match="part='test'; expected one of train, val"):
        scenes.scene("test", 0, 0)


def test_a_written_folder_is_the_same_data(tmp_path):
    """Pixels, boxes and labels: the folder's code and that of the built-in scenes give equal batches."""
    folder = scenes.write(tmp_path / "digits", 0, {"train": 5, "val": 3})
    built_in = tiny(train_scenes=5, val_scenes=3)
    on_disk = dataclasses.replace(built_in, data=str(folder))
    processor = models.processor_of(built_in)
    for part in ("train", "val"):
        batches = []
        for settings in (built_in, on_disk):
            data = open_part(settings, part)
            batches.append(list(eval_batches(data, transform_of(settings, processor, training=False), settings, 0, 1)))
        for one, other in zip(*batches, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.mask, other.mask)
            for a, b in zip(one.labels, other.labels, strict=True):
                assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["class_labels"], b["class_labels"])
    with pytest.raises(ValueError, match="is not an empty folder"):
        scenes.write(folder, 0, {"train": 1})


# ---- annotations


def broken(change):
    document = json.loads(json.dumps(scenes.document("val", 0, 4)))
    change(document)
    return document


def put(**values):
    return lambda document: document["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("annotations"), "the file has no list of annotations"),
        (lambda d: d["images"].clear(), "0 images and 10 categories"),
        (lambda d: d["annotations"].clear(), "the file has no boxes"),
        (put(image_id=99), "annotation 1 of the file is of image 99, which is not among its images"),
        (put(category_id=77), "is of category 77, which is not among its categories"),
        (put(bbox=[500, 2, 9, 9]), r"bbox \[500, 2, 9, 9\] outside of its image of .* pixels; expected \[x, y, width"),
        (put(bbox=[3, 2, -9, 9]), "outside of its image"),
        (put(bbox=[3, 2, float("nan"), 9]), r"expected \[x, y, width, height\] in pixels"),
        (put(bbox=[3, 2, 4]), r"expected \[x, y, width, height\] in pixels"),
        (lambda d: d["images"][0].pop("height"), "not in COCO's detection format: KeyError 'height'"),
        (lambda d: d["categories"][0].update(name="1"), "two categories of one name or id"),
        (lambda d: d["images"][0].update(id=1), "several images of one id"),
    ],
)
def test_wrong_annotations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        coco(broken(change))
    with pytest.raises(ValueError, match="no list of images, annotations, categories"):
        coco([1])


def test_boxes_over_the_edge_are_clipped_and_empty_ones_left_out():
    def change(document):
        image = document["images"][0]
        extra = [[-5, 10, 20, 20], [image["width"] - 4, image["height"] - 6, 9, 9], [3, 3, 0, 5]]
        document["annotations"] = [
            {"id": k, "image_id": 0, "category_id": 1 + k, "bbox": box, "iscrowd": 0} for k, box in enumerate(extra)
        ]

    data = coco(broken(change))
    picture = data.pictures[0]
    right, bottom = picture.width, picture.height
    assert picture.boxes.tolist() == [[0, 10, 15, 30], [right - 4, bottom - 6, right, bottom]]
    assert picture.areas.tolist() == [300, 24] and picture.labels.tolist() == [0, 1]
    assert data.notes == [
        "the file: 2 boxes reach over the edge of their image and were clipped",
        "the file: 1 box without area was left out",
    ]  # fmt: skip


def test_categories_are_matched_by_name():
    def renumber(document):
        for one in document["categories"]:
            one["id"] = 100 - one["id"]
        for one in document["annotations"]:
            one["category_id"] = 100 - one["category_id"]

    known = [str(digit) for digit in range(10)]
    as_ever, renumbered = coco(classes=known), coco(broken(renumber), classes=known)
    for one, other in zip(renumbered.pictures, as_ever.pictures, strict=False):
        assert torch.equal(one.labels, other.labels)
    assert coco(broken(renumber)).classes == known[::-1]
    with pytest.raises(
        ValueError, match="categories that the training set or the model does not have: 8, 9; it has 0, 1"
    ):
        coco(classes=known[:8])


def test_crowds_are_not_learned_and_not_counted():
    document = scenes.document("val", 0, 4)
    document["annotations"][0]["iscrowd"] = 1
    data = coco(document)
    assert data.pictures[0].crowd[0] == 1
    batch = next(eval_batches(data, PLAIN, tiny(), 0, 1))
    assert len(batch.labels[0]["boxes"]) == len(data.pictures[0].boxes) - 1
    found = perfect(data)
    assert average_precision(found, data)["AP"] == 100  # what is found on a crowd is not wrong
    found[0] = {name: value[1:] for name, value in found[0].items()}
    assert average_precision(found, data)["AP"] == 100  # and what is not found there is not missed


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; expected one in COCO's layout, or digits"):
        open_part(tiny(data=str(tmp_path / "absent")), "train")
    with pytest.raises(
        ValueError, match=r"no annotation file for val: looked for .*instances_val2017.json.*--val-json"
    ):
        open_part(tiny(data=str(tmp_path)), "val")
    folder = scenes.write(tmp_path / "digits", 0, {"train": 3, "val": 2})
    settings = tiny(data=str(folder))
    image = folder / "train" / "000001.png"
    Image.open(image).resize((30, 20)).save(image)
    data = open_part(settings, "train")
    with pytest.raises(ValueError, match="000001.png has 30x20 pixels, but .*train.json says"):
        data.image(1)
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match="000001.png of .*train.json cannot be read"):
        data.image(1)
    words = []
    for workers in (0, 1):  # which would come with torch's traceback
        with pytest.raises(RunError) as caught:
            list(train_batches(data, PLAIN, tiny(batch_size=3, loader_workers=workers), 0, 1, epoch=0, first=0))
        words.append(str(caught.value))
    assert words[0] == words[1] and words[0].startswith("000001.png of ") and "Traceback" not in words[0]
    image.unlink()
    with pytest.raises(ValueError, match="1 of 3 images that .*train.json names are not in .*train: 000001.png"):
        open_part(settings, "train")
    (folder / "annotations" / "train.json").write_text("{")
    with pytest.raises(ValueError, match="train.json is not JSON"):
        open_part(settings, "train")
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"no folder of images for val: looked for .*--val-images"):
        open_part(settings, "val")
    assert len(open_part(dataclasses.replace(settings, val_images=str(folder / "elsewhere")), "val")) == 2


def test_images_of_16_bits_keep_their_levels_and_of_32_are_refused(tmp_path):
    folder = scenes.write(tmp_path / "digits", 0, {"train": 1, "val": 1})
    data, image = open_part(tiny(data=str(folder)), "train"), folder / "train" / "000000.png"
    width, height = Image.open(image).size
    levels = np.arange(width * height).reshape(height, width) % 256
    Image.fromarray((levels * 257).astype(np.uint16)).save(image)
    assert np.array_equal(np.asarray(data.image(0)), np.stack([levels] * 3, -1))
    Image.new("F", (width, height)).save(image, "TIFF")
    with pytest.raises(RunError, match="cannot be read: its pixels are 32-bit numbers"):
        data.image(0)


# ---- batches


def test_a_picture_becomes_what_transformers_makes_of_it():
    """Resized, normalised, padded: as DetrImageProcessor does it, on a portrait and a landscape.

    Boxes are as of a single picture. In a batch transformers 5.18 makes them relative to the padded size, which its own
    post_process_object_detection does not undo.
    """
    settings = dataclasses.replace(tiny(), size=40, max_size=60)
    processor = models.processor_of(settings)
    data = coco()
    tall = data.image(1).transpose(Image.Transpose.ROTATE_90)
    pictures = [data.image(2), tall]
    boxes = [torch.tensor([[4.0, 6.0, 20.0, 30.0]]), torch.tensor([[1.0, 2.0, 15.0, 40.0]])]
    transform = transform_of(settings, processor, training=False)
    rows = []
    for number, (image, box) in enumerate(zip(pictures, boxes, strict=True)):
        pixels, relative, _ = transform(image, box, np.random.default_rng(0))
        rows.append((pixels, {"class_labels": torch.tensor([3]), "boxes": relative}, number))
    batch = collate(rows)
    notes = [
        {"image_id": n, "annotations": [{"bbox": [x, y, r - x, b - y], "category_id": 3, "area": 1.0, "iscrowd": 0}]}
        for n, ((x, y, r, b),) in enumerate(one.tolist() for one in boxes)
    ]
    theirs = processor(images=pictures, return_tensors="pt")
    assert batch.images.shape == theirs["pixel_values"].shape
    assert torch.equal(batch.mask, theirs["pixel_mask"].long())
    # one grey level of 255, over the deviation: the two resize by different code
    assert (batch.images - theirs["pixel_values"]).abs().max() < 3 / 255 / 0.22
    for one, image, note in zip(batch.labels, pictures, notes, strict=True):
        single = processor(images=[image], annotations=[note], return_tensors="pt")["labels"][0]
        assert (one["boxes"] - single["boxes"]).abs().max() < 1e-6


def test_flipping_takes_the_boxes_along():
    image, boxes = Image.new("RGB", (40, 20)), torch.tensor([[4.0, 2.0, 10.0, 12.0]])
    image.paste((255, 255, 255), (4, 2, 10, 12))
    pixels, relative, _ = dataclasses.replace(PLAIN, hflip=1.0)(image, boxes, np.random.default_rng(0))
    x, y, width, height = (relative[0] * torch.tensor([40, 20, 40, 20])).tolist()
    left, top = round(x - width / 2), round(y - height / 2)
    assert (left, top, round(width), round(height)) == (30, 2, 6, 10)
    white = pixels[0] > 0
    assert white.sum() == 60 and white[top : top + 10, left : left + 6].all()


def test_pieces_have_what_is_left_of_the_boxes():
    """A picture whose two squares have values of their own: what the boxes hold is what the piece shows."""
    image = Image.new("RGB", (500, 400))
    image.paste((255, 0, 0), (40, 30, 90, 100))
    image.paste((0, 255, 0), (300, 310, 480, 390))
    boxes = torch.tensor([[40.0, 30, 90, 100], [300, 310, 480, 390]])
    seen = set()
    for seed in range(40):
        cut, left, which = piece(image, boxes, np.random.default_rng(seed))
        assert min(cut.size) >= 384 and max(cut.size) <= 600
        seen.add((len(which), cut.size))
        for channel in (0, 1):
            shown = torch.from_numpy(np.asarray(cut)[:, :, channel] > 127)
            rows, columns = shown.any(1).nonzero(), shown.any(0).nonzero()
            found = left[which == channel]
            if len(found) == 0:
                assert shown.sum() == 0
            elif shown.any():
                edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (found[0] - edges).abs().max() <= 1  # of a pixel, by the smoothing of the resize
    assert len({size for _, size in seen}) > 30 and {count for count, _ in seen} == {1, 2}
    kept = dataclasses.replace(PLAIN, sizes=(32,), longest=64, crop=1.0)(image, boxes, np.random.default_rng(3))
    assert min(kept[0].shape[1:]) == 32 and len(kept[1]) == len(kept[2]) and kept[1].max() <= 1


def test_an_epoch_has_every_picture_once_and_the_same_ones_for_any_number_of_processes():
    settings = tiny(train_scenes=13)
    data = open_part(settings, "train")
    alone = [batch.numbers for batch in train_batches(data, PLAIN, settings, 0, 1, epoch=1, first=0)]
    shared = [
        [batch.numbers for batch in train_batches(data, PLAIN, settings, rank, 2, epoch=1, first=0)] for rank in (0, 1)
    ]
    assert len(alone) == 3 and len({one for batch in alone for one in batch}) == 12
    for whole, first, second in zip(alone, *shared, strict=True):
        assert whole[0::2] == first and whole[1::2] == second
    halves = dataclasses.replace(settings, accumulate=2)
    for rank in (0, 1):
        found = [batch.numbers for batch in train_batches(data, PLAIN, halves, rank, 2, epoch=1, first=0)]
        for whole, one, two in zip(alone, found[0::2], found[1::2], strict=True):
            assert whole[rank::4] == one and whole[rank + 2 :: 4] == two
    assert found[2:] == [batch.numbers for batch in train_batches(data, PLAIN, halves, 1, 2, epoch=1, first=1)]
    later = [batch.numbers for batch in train_batches(data, PLAIN, settings, 0, 1, epoch=1, first=2)]
    assert later == alone[2:]
    assert alone != [batch.numbers for batch in train_batches(data, PLAIN, settings, 0, 1, epoch=2, first=0)]
    parts = [[n for b in eval_batches(data, PLAIN, settings, rank, 3) for n in b.numbers] for rank in range(3)]
    assert sorted(one for part in parts for one in part) == list(range(13))


@pytest.mark.parametrize("rpe", [RPE, "rpe-1.9-cross-ctx-0-qkv"])
def test_padded_batches_give_what_single_pictures_give(rpe):
    """With tables drawn at random: a wrong height or width of the map of a padded batch would change predictions."""
    settings = tiny(rpe=rpe)
    model = models.build(settings, list("0123456789")).double()
    # a convolution with a margin sees the padding, as in every DETR; what is left sees one patch at a time
    model.model.backbone.model.encoder.stages[-1].layers = torch.nn.Sequential()
    # so that boxes depend on the picture, which they do not with the weights that training starts from
    torch.nn.init.normal_(model.bbox_predictor.layers[-1].weight)
    tables = [one for one in model.modules() if isinstance(one, iRPE)]
    for one in tables:
        torch.nn.init.normal_(one.table, std=2.0)
    assert tables
    generator = torch.Generator().manual_seed(0)
    rows = [
        (torch.randn(3, 8 * height, 8 * width, generator=generator), {}, number)
        for number, (height, width) in enumerate([(3, 5), (4, 2), (2, 7), (5, 6)])
    ]
    batch = collate(rows)
    assert batch.images.shape == (4, 3, 40, 56)
    with torch.no_grad():
        together = model(batch.images.double(), pixel_mask=batch.mask)
        for row, (image, _, _) in enumerate(rows):
            single = model(image[None].double())
            assert (together.logits[row] - single.logits[0]).abs().max() < 1e-9
            assert (together.pred_boxes[row] - single.pred_boxes[0]).abs().max() < 1e-9
        for one in tables:
            one.table.zero_()
        assert (model(batch.images.double(), pixel_mask=batch.mask).logits - together.logits).abs().max() > 1e-4


# ---- average precision


def test_perfect_predictions_have_an_ap_of_100_and_shuffled_ones_less():
    data = coco(scenes.document("val", 0, 20))
    found = perfect(data)
    score = average_precision(found, data)
    assert score["AP"] == score["AP50"] == score["AP75"] == 100
    assert (
        score["AP large"] is None
        and score["images"] == 20
        and score["boxes"] == sum(len(one["boxes"]) for one in found)
    )
    assert set(score["per_class"]) <= set("0123456789")
    shuffled = found[1:] + found[:1]
    assert average_precision(shuffled, data)["AP"] < 20
    shifted = [one | {"boxes": one["boxes"] + 3.0} for one in found]
    moved = average_precision(shifted, data)
    assert 10 < moved["AP"] < 95 and moved["AP50"] > moved["AP75"]
    nothing = [{name: value[:0] for name, value in one.items()} for one in found]
    assert average_precision(nothing, data)["AP"] == 0


def test_predictions_are_in_pixels_of_the_file():
    """Also where the model sees another size: the picture is resized, boxes come back."""
    settings = dataclasses.replace(tiny(), size=80, max_size=200, eval_batch_size=2)
    data, processor = coco(), models.processor_of(settings)

    class Oracle(torch.nn.Module):
        def forward(self, images, pixel_mask):
            assert images.shape[2] >= 80
            logits, boxes = torch.full((len(images), 2, 11), -9.0), torch.full((len(images), 2, 4), 0.5)
            for row in range(len(images)):
                picture = data.pictures[self.seen]
                for k, (x, y, right, bottom) in enumerate(picture.boxes.tolist()):
                    logits[row, k, picture.labels[k]] = 9.0
                    at = [(x + right) / 2, (y + bottom) / 2, right - x, bottom - y]
                    boxes[row, k] = torch.tensor(at) / torch.tensor([picture.width, picture.height] * 2)
                self.seen += 1
            from types import SimpleNamespace

            return SimpleNamespace(logits=logits, pred_boxes=boxes)

    model = Oracle()
    model.seen = 0
    transform = transform_of(settings, processor, training=False)
    found = predict(model, data, transform, processor, settings, WORLD)
    assert average_precision(found, data)["AP"] == 100


# ---- training


def test_a_step_moves_every_weight_and_the_tables():
    trainer = trainer_of(tiny())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    batch = next(train_batches(trainer.train, PLAIN, trainer.settings, 0, 1, epoch=0, first=0))
    for _ in range(2):  # the first step's gradient of what is behind a zero weight is zero
        trainer._step(itertools.repeat(batch))
    still = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert not still
    groups = {group.get("weight_decay"): len(group["params"]) for group in trainer.optimizer.param_groups}
    assert groups[0.0] == sum(isinstance(one, iRPE) for one in trainer.model.modules()) == 1


def test_our_sum_of_the_parts_is_transformers_loss():
    trainer = trainer_of(tiny(layers=2))
    for number in (0, 1):
        batch = next(train_batches(trainer.train, PLAIN, trainer.settings, 0, 1, epoch=number, first=0))
        if number:
            for one in batch.labels:
                one.update(boxes=torch.zeros(0, 4), class_labels=torch.zeros(0, dtype=torch.long))
        output = trainer.model(batch.images, pixel_mask=batch.mask, labels=batch.labels)
        config = trainer.model.config
        ours = whole_loss(output.loss_dict, batch, config, Totals.of([batch], config, WORLD))
        assert torch.isfinite(ours) and abs(ours - output.loss) < 1e-5 * abs(output.loss)


def test_shares_of_a_batch_have_the_loss_of_the_whole():
    """The mean over two processes is the loss of one with all pictures: also where one share has no boxes."""
    trainer = trainer_of(tiny(layers=2, queries=3))
    config, generator = trainer.model.config, torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 40, 56, generator=generator)
    counts = (2, 1, 5, 0)  # one more than there are queries
    labels = [
        {"class_labels": torch.arange(n), "boxes": 0.2 + 0.3 * torch.rand(n, 4, generator=generator)} for n in counts
    ]

    def batch_of(rows):
        return Batch(images[rows], torch.ones(len(rows), 40, 56), [labels[row] for row in rows], rows)

    def loss(rows, totals):
        batch = batch_of(rows)
        output = trainer.model(batch.images, pixel_mask=batch.mask, labels=batch.labels)
        return whole_loss(output.loss_dict, batch, config, totals)

    class Half(World):
        def total(self, values):
            return sum(seen) if seen else values

    for shares in ([[0, 2], [1, 3]], [[0, 1], [3, 3]]):
        everything = [row for rows in shares for row in rows]
        whole = loss(everything, Totals.of([batch_of(everything)], config, WORLD))
        # as two accumulated batches
        totals = Totals.of([batch_of(rows) for rows in shares], config, WORLD)
        assert abs(sum(loss(rows, totals) for rows in shares) - whole) < 1e-5 * abs(whole)
        # as the batches of two processes
        seen = []
        parts = [Totals.of([batch_of(rows)], config, Half(0, 1, torch.device("cpu"))) for rows in shares]
        seen = [
            torch.tensor([float(sum(counts[row] for row in rows)), one.weights])
            for rows, one in zip(shares, parts, strict=True)
        ]
        both = [loss(rows, Totals.of([batch_of(rows)], config, Half(0, 2, torch.device("cpu")))) for rows in shares]
        assert abs(sum(both) / 2 - whole) < 1e-5 * abs(whole)


def test_accumulated_batches_make_the_step_of_one():
    """Pictures of one size and no dropout: gradients of two and of four parts are those of the whole batch."""
    found = []
    for accumulate in (1, 2, 4):
        trainer = trainer_of(tiny(accumulate=accumulate, layers=2, dropout=0.0, warmup_steps=0, clip_grad=0.0))
        trainer.optimizer.step = lambda: None
        images = torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(1))
        labels = [trainer.train.pictures[row] for row in range(4)]
        labels = [{"class_labels": one.labels, "boxes": torch.full((len(one.labels), 4), 0.3)} for one in labels]
        rows = [list(range(part, 4, accumulate)) for part in range(accumulate)]
        parts = [Batch(images[one], torch.ones(len(one), 40, 56), [labels[row] for row in one], one) for one in rows]
        norm = trainer._step(iter(parts))
        found.append([norm, float(trainer.losses[0][0]), *(one.grad for one in trainer.model.parameters())])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(same, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp):
    """Products in 16 bits, losses and weights in 32; predictions are near those in 32, and the loss falls."""
    trainer = trainer_of(tiny(amp=amp, lr=2e-3, backbone_lr=2e-3, warmup_steps=1, epochs=100))
    batch = next(train_batches(trainer.train, PLAIN, trainer.settings, 0, 1, epoch=0, first=0))
    kinds = []
    trainer.model.class_labels_classifier.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    for _ in range(25):
        trainer._step(itertools.repeat(batch))
    assert set(kinds) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    losses = torch.stack([loss for loss, _, _ in trainer.losses])
    assert losses.dtype == torch.float32 and losses[-5:].mean() < 0.8 * losses[:5].mean()
    assert {one.dtype for one in trainer.model.parameters()} == {torch.float32}
    transform = transform_of(trainer.settings, trainer.processor, training=False)
    low, high = (
        predict(trainer.model, trainer.val, transform, trainer.processor, settings, WORLD)
        for settings in (trainer.settings, dataclasses.replace(trainer.settings, amp="none"))
    )
    for one, other in zip(low, high, strict=True):
        assert one["scores"].dtype == torch.float32 and not torch.equal(one["scores"], other["scores"])
        assert (one["scores"] - other["scores"]).abs().max() < 0.05
    again = trainer_of(trainer.settings)
    again.load(trainer.state())
    assert again.scaler.state_dict() == trainer.scaler.state_dict()


def test_learning_rates_fall_in_one_step():
    trainer = trainer_of(tiny(lr_drop=2, epochs=4, warmup_steps=2))
    factors = []
    for trainer.progress.step in range(12):  # three steps an epoch
        factors.append(trainer._factor())
    assert factors == [0.5, 1.0] + [1.0] * 4 + [0.1] * 6
    assert trainer_of(tiny(epochs=4, warmup_steps=0))._factor() == 1.0


def test_without_absolute_positions(tmp_path):
    """Predictions do not know where anything is, until the tables of iRPE do; saved models stay so, loudly."""
    settings = tiny(positions="none", rpe="rpe-2.0-product-bias-0-k")
    model = models.build(settings, list("ab"))
    with torch.no_grad():
        for one in model.model.backbone.modules():  # of 7x7 patches: positions within the backbone
            if isinstance(one, torch.nn.Conv2d) and one.kernel_size == (7, 7):
                one.weight.zero_()
    images = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    turned = images.reshape(1, 3, 5, 8, 7, 8).flip(2, 4).reshape(images.shape)  # patches in another order

    def logits(of, pixels):
        with torch.no_grad():
            return of(pixels, pixel_mask=torch.ones(1, 40, 56)).pred_boxes

    model.bbox_predictor.layers[-1].weight.data.normal_()
    torch.testing.assert_close(logits(model, turned), logits(model, images), rtol=1e-4, atol=1e-5)
    table = model.model.encoder.layers[0].self_attn.rpe_k.table
    table.data.normal_()
    assert (logits(model, turned) - logits(model, images)).abs().max() > 1e-4

    folder = saved.save(model, models.processor_of(settings), tmp_path / "model")
    again = models.load(folder)
    assert torch.equal(logits(again, images), logits(model, images))
    with pytest.raises(Exception, match="this model has iRPE"):
        type(model).from_pretrained(folder)
    plain = models.build(dataclasses.replace(settings, rpe="none"), list("ab"))
    with pytest.raises(ValueError, match="Not supported none"):
        type(plain).from_pretrained(saved.save(plain, models.processor_of(settings), tmp_path / "plain"))
    same = models.build(dataclasses.replace(settings, positions=None, pretrained=str(folder)), list("ab"))
    assert torch.equal(logits(same, images), logits(model, images))
    with pytest.raises(ValueError, match="--positions sine, but .*model was trained without"):
        models.build(dataclasses.replace(settings, positions="sine", pretrained=str(folder)), list("ab"))


def test_the_loss_falls():
    trainer = trainer_of(tiny(lr=2e-3, backbone_lr=2e-3, warmup_steps=1, epochs=100))
    batch = next(train_batches(trainer.train, PLAIN, trainer.settings, 0, 1, epoch=0, first=0))
    for _ in range(25):
        trainer._step(itertools.repeat(batch))
    losses = torch.stack([loss for loss, _, _ in trainer.losses])
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()


def test_boxes_that_are_no_numbers_end_the_run():
    trainer = trainer_of(tiny())
    with torch.no_grad():
        trainer.model.bbox_predictor.layers[-1].bias.fill_(torch.nan)
    batch = next(train_batches(trainer.train, PLAIN, trainer.settings, 0, 1, epoch=0, first=0))
    with pytest.raises(ValueError, match="boxes are not numbers at step 0; .*A lower --lr"):
        trainer._step(itertools.repeat(batch))


def test_a_run_that_goes_on_ends_where_the_whole_one_ends(tmp_path):
    from rich.console import Console

    console, settings = Console(quiet=True), tiny(dropout=0.1)

    def go(name, resume=None, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        job.train(dataclasses.replace(settings, **options), lambda: folder, resume, console)
        return checkpoint.read(checkpoint.checkpoints(folder)[-1])

    whole = go("whole")
    part = go("parts", max_steps=4)  # in the second epoch of three steps
    assert part["step"] == 4 and whole["step"] == 6
    parts = go("parts", "auto")
    assert parts["step"] == 6
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert json.loads(whole["progress"])["score"] == json.loads(parts["progress"])["score"]
    result = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert result["steps"] == 6 and "AP" in result["score"]
    again = go("parts", "auto")  # a run at its end stays there
    assert again["step"] == 6
    with pytest.raises(ValueError, match="of a run with other settings: --lr was 0.00.*, is 0.5"):
        go("parts", "auto", lr=0.5)

    model = models.load(tmp_path / "whole" / "model")
    assert model.config.irpe and model.config.id2label[3] == "3"
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole["model"][name]), name


def test_pretrained_models_keep_what_they_know(tmp_path):
    settings = tiny(rpe=RPE)
    model = models.build(settings, [str(digit) for digit in range(10)])
    with torch.no_grad():
        for one in model.modules():
            if isinstance(one, iRPE):
                one.table.normal_()
    folder = str(saved.save(model, models.processor_of(settings), tmp_path / "rpe"))
    plain = models.build(tiny(rpe="none"), [str(digit) for digit in range(10)])
    without = str(saved.save(plain, models.processor_of(settings), tmp_path / "plain"))
    ids = {str(digit): digit + 1 for digit in range(10)}
    classes = models.known_classes(tiny(pretrained=folder, rpe=None), ids)
    assert classes == [str(digit) for digit in range(10)]

    def state(**options):
        return models.build(tiny(**options), options.pop("classes", classes)).state_dict()

    for options in ({"rpe": None}, {"rpe": RPE}):
        loaded = models.build(tiny(pretrained=folder, **options), classes).state_dict()
        assert set(loaded) == set(model.state_dict())
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    for other in ("none", "rpe-1.9-product-ctx-1-k"):
        with pytest.raises(ValueError, match=f"--rpe {other}, but .* was trained with another iRPE; leave --rpe out"):
            models.build(tiny(pretrained=folder, rpe=other), classes)
    fine = models.build(tiny(pretrained=without, rpe=RPE), classes).state_dict()
    assert all(torch.equal(value, fine[name]) for name, value in plain.state_dict().items())
    assert sum("lookup_table" in name for name in fine) == 1

    said = []
    new = models.build(tiny(pretrained=folder, rpe=None), ["cat", "dog"], said.append)
    assert "the classifier starts from random weights" in said[0]
    assert new.config.num_labels == 2 and new.class_labels_classifier.out_features == 3
    for name, value in new.state_dict().items():
        if not name.startswith("class_labels_classifier"):
            assert torch.equal(value, model.state_dict()[name]), name


def test_pretrained_models_that_are_none(tmp_path):
    with pytest.raises(
        ValueError, match="--pretrained .*absent cannot be read: .*expected a folder of save_pretrained"
    ):
        models.known_classes(tiny(pretrained=str(tmp_path / "absent")), {})
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type vit; expected detr"):
        models.known_classes(tiny(pretrained=str(tmp_path)), {})
    with pytest.raises(ValueError, match="--backbone gives weights to --model r50"):
        models.build(tiny(backbone="hub"), ["a"])


def test_settings():
    settings = tiny()
    assert settings_from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    for options, words in (
        ({"batch_size": 0}, "--batch-size 0; expected at least 1"),
        ({"model": "large"}, "--model large; expected one of small, r50"),
        ({"rpe": "rpe-1.9-produkt-ctx-1-k"}, "rpe-1.9-produkt-ctx-1-k"),
        ({"d_model": 20}, "--d-model 20; expected a multiple of 8"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"train_size": (40,)}, "--train-size with --size 0"),
        ({"crop": 0.5}, "--crop with --size 0"),
        ({"positions": "learned"}, "--positions learned; expected one of sine, none"),
        ({"train_size": (40, 0), "size": 40}, "--train-size .*; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(**options)
    with pytest.raises(ValueError, match="--batch-size 4 cannot be shared by 3 processes"):
        trainer_of(settings, World(0, 3, torch.device("cpu")))
    with pytest.raises(ValueError, match="--batch-size 4 cannot be shared by 1 processes x 3 accumulated batches"):
        trainer_of(tiny(accumulate=3))
    with pytest.raises(ValueError, match="--recipe paper; expected one of finetune, detr, digits"):
        settings_from({"data": "coco"}, "paper")
    paper = settings_from({"data": "coco", "rpe": RPE}, "detr")
    assert (paper.epochs, paper.lr_drop, paper.train_size[0], paper.train_size[-1]) == (150, 100, 480, 800)
    with pytest.raises(ValueError, match="--batch-size 40, but there are 12 images to train on"):
        trainer_of(tiny(batch_size=40))


# ---- the command

SMALL = [
    "--train-scenes",
    "6",
    "--val-scenes",
    "4",
    "--d-model",
    "16",
    "--layers",
    "1",
    "--batch-size",
    "3",
    "--device",
    "cpu",
]


def command(*words):
    done = RUNNER.invoke(app, ["detect", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_says_what_is_wrong(tmp_path):
    for words, message in (
        ([tmp_path / "absent"], "is not a folder"),
        (["digits", "--rpe", "none", "--rpe", RPE], "--rpe was given 2 times"),
        (["digits", "--seeds", "2"], "--seeds: only without DATA"),
        (["digits", "--evaluate-only"], "name it with --pretrained"),
        (["--seed", "2"], "without DATA small models are trained with several seeds"),
        (["digits", "--resume", tmp_path, *SMALL], "--resume"),
    ):
        done = RUNNER.invoke(app, ["detect", *map(str, words), "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert message in " ".join(done.output.replace("│", " ").split()), done.output


def test_a_missing_package_is_a_sentence(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else found(name))
    done = RUNNER.invoke(app, ["detect"])
    assert str(done.exception) == (
        "irpe: no module named pycocotools; install what irpe detect needs, in the folder of irpe: "
        'pip install ".[detect]"'
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Pictures of one size, dropout off: two gloo processes, with one or two batches each, have the losses of one."""
    folder = tmp_path / "data"
    counts = {"train": 8, "val": 5}
    scenes.write(folder, 0, counts, 1)
    for part in counts:
        file = folder / "annotations" / f"{part}.json"
        document = json.loads(file.read_text())
        for image in document["images"]:
            path = folder / part / image["file_name"]
            old = Image.open(path)
            new = Image.new("RGB", (80, 56))  # a larger canvas leaves the boxes where they are
            new.paste(old)
            new.save(path)
            image.update(width=80, height=56)
        file.write_text(json.dumps(document))
    own = [
        str(folder), "--rpe", RPE, "--size", "0", "--dropout", "0", "--queries", "5", "--d-model", "16",
        "--layers", "1", "--batch-size", "4", "--epochs", "2", "--log-every", "1", "--device", "cpu", "--draw", "0",
        "--out", str(tmp_path), "--lr", "1e-3", "--backbone-lr", "1e-3", "--warmup-steps", "1",
    ]  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    logs = []
    for count, accumulate in ((1, 1), (2, 1), (2, 2)):
        more = ["--name", f"of{count}x{accumulate}", "--accumulate", str(accumulate)]
        if count == 1:
            command(*own, *more)
        else:
            words = [*run, str(count), "-m", "irpe", "detect", *own, *more]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=PATIENCE)
            assert done.returncode == 0, done.stderr
        log = (tmp_path / f"of{count}x{accumulate}" / "log.jsonl").read_text()
        logs.append([json.loads(line) for line in log.splitlines()])
    losses = [torch.tensor([line["loss"] for line in log if line["kind"] == "step"]) for log in logs]
    assert len(losses[0]) == 4
    for other in losses[1:]:
        assert (losses[0] - other).abs().max() < 1e-4 * losses[0].max()
    scores = [[line["val"]["AP"] for line in log if line["kind"] == "epoch"] for log in logs]
    assert all(other == pytest.approx(scores[0], abs=1e-3) for other in scores[1:])


@pytest.mark.slow
def test_a_step_of_detr_r50(tmp_path):
    """The released architecture: its stem and first stage stay, and the table of six encoder layers moves."""
    settings = tiny(model="r50", size=32, max_size=48, batch_size=2, train_scenes=2, layers=6)
    trainer = trainer_of(settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batch = next(train_batches(trainer.train, PLAIN, settings, 0, 1, epoch=0, first=0))
    trainer._step(itertools.repeat(batch))
    after = trainer.model.state_dict()
    tables = [name for name in after if "lookup_table" in name]
    assert len(tables) == 6 and all(not torch.equal(after[name], before[name]) for name in tables)
    fixed = [name for name in after if ".backbone." in name and torch.equal(after[name], before[name])]
    assert any("layer1" in name for name in fixed) and any("conv1" in name for name in fixed)
    assert not any("layer4.2.conv" in name for name in fixed)


NAMED = ("toothbrush", "person", "traffic light", "car", "dog", "tv", "cup", "kite", "bus", "sink")


def release(folder, config=None, classes=91, **more):
    """A checkpoint of the release with random numbers, and its state dict."""
    sizes = dict(dim=256, heads=8, ffn=2048, layers=6, queries=100, classes=classes)
    state = DETR(**sizes, config=config).state_dict() | more
    for name, value in state.items():
        if "in_proj_" in name:
            value.normal_(0, 0.02)  # the module leaves them as the memory was
    torch.save({"model": state, "epoch": 3}, folder / "release.pth")
    return state


def renamed(folder, names, ids):
    """Gives the categories of every annotation file these names and ids."""
    for file in (folder / "annotations").iterdir():
        document = json.loads(file.read_text())
        of = {one["id"]: number for one, number in zip(document["categories"], ids, strict=True)}
        document["categories"] = [{"id": number, "name": name} for name, number in zip(names, ids, strict=True)]
        for one in document["annotations"]:
            one["category_id"] = of[one["category_id"]]
        file.write_text(json.dumps(document))


@pytest.mark.slow
def test_a_checkpoint_of_the_release_is_measured(tmp_path):
    """Its classes are COCO's, found by their names; random numbers stand in for the weights."""
    state = release(tmp_path, rpe_config_from_string(RPE))
    assert any("lookup_table" in name for name in state)
    folder = scenes.write(tmp_path / "data", 0, {"val": 2})
    renamed(folder, NAMED, range(10))
    settings = settings_from(
        {"data": str(folder), "pretrained": str(tmp_path / "release.pth"), "model": "r50", "rpe": RPE}
    )
    classes = models.known_classes(settings)
    assert len(classes) == 91 and classes[90] == "toothbrush" and classes[1] == "person" and classes[12] == "N/A"
    assert sum(one != "N/A" for one in classes) == 80
    model = models.build(settings, classes)
    table = model.model.encoder.layers[3].self_attn.rpe_k.table
    assert torch.equal(table, state["transformer.encoder.layers.3.self_attn.rpe_k.lookup_table_weight"])
    arguments = [folder, "--size", 32, "--max-size", 48, "--pretrained", tmp_path / "release.pth", "--model", "r50"]
    said = command(*arguments, "--rpe", RPE, "--evaluate-only", "--device", "cpu", "--out", tmp_path, "--name", "x")
    assert "AP" in said and (tmp_path / "x" / "predictions.png").exists()
    with pytest.raises(ValueError, match="release.pth does not fit"):
        models.build(dataclasses.replace(settings, rpe="none"), classes)


@pytest.mark.slow
def test_classes_of_the_release_are_matched_by_name_whatever_their_ids(tmp_path):
    """A checkpoint that always says car: it is right on cars under any id, and other names get rows of their own."""
    say_car = torch.full((92,), -9.0)
    say_car[3] = 9.0
    state = release(tmp_path, **{"class_embed.weight": torch.zeros(92, 256), "class_embed.bias": say_car})
    folder = scenes.write(tmp_path / "data", 0, {"train": 4, "val": 4}, 10)
    options = {"data": str(folder), "pretrained": str(tmp_path / "release.pth"), "model": "r50", "rpe": "none"}
    settings = settings_from({**options, "size": 32, "max_size": 48, "device": "cpu"})
    for ids in (range(10), range(95, 105), range(1, 11)):
        renamed(folder, NAMED, ids)
        data = open_part(settings, "val", models.known_classes(settings))
        model = models.build(settings, data.classes)
        processor = models.processor_of(settings)
        found = predict(model, data, transform_of(settings, processor, training=False), processor, settings, WORLD)
        assert {data.classes[label] for one in found for label in one["labels"].tolist()} == {"car"}

    for names, kept in ((("helmet", "vest", *NAMED[2:]), 8), (("Person", *NAMED[1:]), 9), (tuple("0123456789"), 0)):
        renamed(folder, names, range(1, 11))
        given = [folder, "--size", 32, "--max-size", 48, "--pretrained", tmp_path / "release.pth", "--model", "r50"]
        given = [str(one) for one in given] + ["--rpe", "none", "--device", "cpu", "--out", str(tmp_path / "out")]
        done = RUNNER.invoke(app, ["detect", *given, "--evaluate-only"])
        assert done.exit_code == 2 and "categories that the training set or the model does not have" in " ".join(
            done.output.replace("│", " ").split()
        )
        said = []
        train, _ = job._data(settings, said.append)
        assert train.classes == list(names)
        model = models.build(settings, train.classes, said.append)
        head = model.class_labels_classifier
        assert head.out_features == 11 and model.config.num_labels == 10
        if kept:
            assert f"new rows of the classifier start from random weights, and {kept} keep theirs" in said[-1]
            assert torch.equal(head.bias[3], state["class_embed.bias"][3])  # the car
            assert torch.equal(head.bias[10], state["class_embed.bias"][91]) and head.bias[0] == 0
        else:
            assert "the classifier starts from random weights" in said[-1]


def test_some_known_classes_keep_their_rows(tmp_path):
    model = models.build(tiny(rpe="none"), ["cat", "dog", "N/A", "cow", "N/A"])
    folder = str(saved.save(model, models.processor_of(tiny()), tmp_path / "model"))
    said = []
    new = models.build(tiny(pretrained=folder, rpe=None), ["helmet", "cow", "N/A", "cat"], said.append)
    old, head = model.class_labels_classifier, new.class_labels_classifier
    for row, from_row in ((1, 3), (3, 0), (4, 5)):
        assert torch.equal(head.weight[row], old.weight[from_row]) and torch.equal(head.bias[row], old.bias[from_row])
    assert said[-1].startswith("helmet, N/A are not among the classes of ") and "and 2 keep theirs" in said[-1]
    assert new.config.id2label == {0: "helmet", 1: "cow", 2: "N/A", 3: "cat"} and new.config.num_labels == 4
    again = models.load(saved.save(new, models.processor_of(tiny()), tmp_path / "again"))
    assert torch.equal(again.class_labels_classifier.weight, head.weight)


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path):
    """Scenes to a folder, one step on it, its weights measured again, and the comparison without DATA."""
    folder = tmp_path / "data"
    command("--write-digits", folder, *SMALL[:4])
    own = ["--size", 0, "--hflip", 0, "--queries", 5, "--draw", 2]
    command(folder, *SMALL[4:], *own, "--rpe", RPE, "--max-steps", 1, "--out", tmp_path, "--name", "run")
    run = tmp_path / "run"
    made = {"best", "checkpoints", "model", "log.jsonl", "result.json", "settings.json", "README.md"}
    made |= {"curves.png", "predictions.png"}
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == made  # where its package is installed
    assert Image.open(run / "predictions.png").size[0] > 200
    score = json.loads((run / "result.json").read_text())["score"]
    said = command(
        folder, "--size", 0, "--pretrained", run / "model", "--evaluate-only", "--out", tmp_path, "--name", "again",
        "--device", "cpu", "--draw", 0,
    )  # fmt: skip
    assert "AP" in said
    assert json.loads((tmp_path / "again" / "result.json").read_text())["score"] == score
    done = RUNNER.invoke(app, ["detect", str(folder), "--pretrained", str(run), "--evaluate-only"])
    assert done.exit_code == 2 and "is the folder of a run" in " ".join(done.output.replace("│", " ").split())
    said = command(*SMALL, "--max-steps", 1, "--seeds", 2, "--out", tmp_path, "--name", "both", "--draw", 0)
    assert "without iRPE" in said and RPE in said
    rows = json.loads((tmp_path / "both" / "results.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["none", RPE] and len(rows[0]["AP"]["values"]) == 2


def test_the_encoder_of_a_pretrained_detr_is_equipped():
    """`equip` on what `build` makes finds the encoder alone."""
    model = models.build(tiny(rpe="none", layers=2), list("ab"))
    equip(model, RPE)
    names = [name for name, one in model.named_modules() if isinstance(one, iRPE)]
    assert names == [f"model.encoder.layers.{layer}.self_attn.rpe_k" for layer in (0, 1)]
