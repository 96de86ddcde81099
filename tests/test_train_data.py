"""irpe/train/data.py and loader.py: what is found, what is refused, bad images, shares, and random numbers."""

import re
import tarfile

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import Image
from train_tiny import LIBRARIES, ROOT, SMALL, environment, log, pictures, process
from typer.testing import CliRunner

from irpe.__main__ import app
from irpe.runs import seeds
from irpe.runs.workers import RunError
from irpe.train import data, loader
from irpe.train.settings import settings_from

NO_WORKERS = {"loader_workers": 0, "in_chans": 1, "img_size": "8x12"}


def settings(where, **more):
    return settings_from("small", {"data": str(where), **NO_WORKERS, **more})


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "pictures")


def packed(folder, archive, prefix=""):
    with tarfile.open(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.add(path, prefix + str(path.relative_to(folder)))
    return archive


def pixels(source):
    return sorted((label, image.tobytes()) for image, label in (source[k] for k in range(len(source))))


def test_folders_and_archives_hold_the_same(folder, tmp_path):
    plain = data.open_data(settings(folder))
    assert plain.classes == ["digit0", "digit1", "digit2", "digit3"]
    assert (len(plain.train), len(plain.val)) == (24, 24)
    assert plain.train.labels() == [plain.train[k][1] for k in range(24)]
    archives = tmp_path / "archives"
    archives.mkdir()
    for part in ("train", "val"):
        packed(folder / part, archives / f"{part}.tar")
    one = data.open_data(settings(archives))
    by_class = tmp_path / "by_class"
    for part in ("training", "validation"):
        (by_class / part).mkdir(parents=True)
        for label in range(4):
            source = folder / {"training": "train", "validation": "val"}[part] / f"digit{label}"
            packed(source, by_class / part / f"digit{label}.tar")
    each = data.open_data(settings(by_class))
    for other in (one, each):
        assert other.classes == plain.classes
        assert pixels(other.train) == pixels(plain.train)
        assert pixels(other.val) == pixels(plain.val)
        assert other.train.labels() == [other.train[k][1] for k in range(24)]


def test_archives_are_read_right_by_several_processes_after_this_one_has_read_them(folder, tmp_path):
    source = data.open_data(settings(packed(folder / "train", tmp_path / "all.tar"), val_share=0.25)).train
    expected = [source[k][0].tobytes() for k in range(len(source))]  # the archive is open now
    options = settings("all.tar", loader_workers=2)
    transform = loader.Transform(loader.Shape((8, 12), (0.0,), (1.0,), 1.0), options.interpolation)
    seen = []
    for batch in loader.eval_loader(source, transform, options, 0, 1, 3):
        seen += [(image[0] * 255).round().byte().numpy().tobytes() for image in batch.images[batch.real]]
    assert seen == expected


def test_a_share_of_every_class_is_held_out_once(folder):
    parts = data.open_data(settings(folder / "train", val_share=0.3))
    assert (len(parts.train), len(parts.val)) == (16, 8)
    assert sorted(parts.val.labels()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not {parts.train.name(k) for k in range(16)} & {parts.val.name(k) for k in range(8)}
    again = data.open_data(settings(folder / "train", val_share=0.3))
    assert parts.val.indices == again.val.indices
    assert parts.val.indices == data.open_data(settings(folder / "train", val_share=0.3, seed=1)).val.indices
    assert parts.val.indices != data.open_data(settings(folder / "train", val_share=0.3, split_seed=1)).val.indices


def broken(folder):
    """What each test below breaks, with the sentence that it has to bring."""
    one = folder / "train" / "digit1"
    yield "no folder", lambda: [path.unlink() for path in folder.rglob("*.png")], "has no pictures"
    yield (
        "empty class",
        lambda: [path.unlink() for path in one.iterdir()],
        f"classes without a picture .*: {one}; remove",
    )
    yield "no val", lambda: (folder / "val").rename(folder / "vole"), "has no val: expected .*/val or .*/val.tar"
    yield (
        "class only in train",
        lambda: (folder / "val" / "digit1").rename(folder / "x"),
        "differ: digit1 only in train",
    )
    yield (
        "class only in val", lambda: (folder / "val" / "digit1").rename(folder / "val" / "seven"),
        r"the classes of train \(4\) and val \(4\) differ: digit1 only in train; seven only in val",
    )  # fmt: skip
    yield "loose picture", lambda: next(one.iterdir()).rename(folder / "train" / "a.png"), "holds pictures itself"
    yield (
        "same name", lambda: pictures(folder / "train" / "more", parts=(".",)),
        "two folders of the name 'digit[01]' would be one",
    )  # fmt: skip


@pytest.mark.parametrize("number", range(7))
def test_folders_that_are_not_in_order(folder, number):
    _, breaks, sentence = list(broken(folder))[number]
    breaks()
    with pytest.raises(ValueError, match=sentence):
        data.open_data(settings(folder))


@pytest.mark.parametrize(("where", "more", "sentence"), [
    ("nowhere", {}, "nowhere does not exist; expected a folder with|nowhere does not exist"),
    ("torch/cifar10", {}, "needs --data-dir"),
    ("torch/cifar10", {"data_dir": "."}, "Dataset not found.*--download lets torchvision fetch it"),
    ("torch/cifar11", {"data_dir": "."}, "Unknown torchvision dataset cifar11"),
    ("digits", {"val_split": "tests"}, "digits has no split 'tests'; expected one of train, test, fit, valid"),
])  # fmt: skip
def test_data_that_is_not_there(where, more, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        data.open_data(settings(where, **more))


def test_files_that_are_no_archives(folder, tmp_path):
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(ValueError, match="a.tar is not a tar archive"):
        data.open_data(settings(tmp_path / "a.tar", val_share=0.1))
    with pytest.raises(ValueError, match=r"is a file; expected a folder, or an archive that ends in .tar"):
        data.open_data(settings(next(folder.rglob("*.png")), val_share=0.1))
    with pytest.raises(ValueError, match=r"has no part to evaluate on; expected .*--val-share 0.1"):
        data.open_data(settings(folder / "train"))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="empty.tar cannot be read as a tar archive with pictures"):
        data.open_data(settings(tmp_path / "empty.tar", val_share=0.1))


def test_torchvision_data_sets_by_name(tmp_path):
    """The real reader, on files in CIFAR-10's own format that are made here."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    place = tmp_path / CIFAR10.base_folder
    place.mkdir()
    names = [[name, None] for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    torch.manual_seed(0)
    for entry in [*names, [CIFAR10.meta["filename"], None]]:
        batch = {
            "data": torch.randint(256, (20, 3072), dtype=torch.uint8).numpy(),
            "labels": [k % 10 for k in range(20)],
        }
        content = pickle.dumps({"label_names": list("abcdefghij")} if entry[0] == CIFAR10.meta["filename"] else batch)
        (place / entry[0]).write_bytes(content)
        entry[1] = hashlib.md5(content).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", names[:5])
        patch.setattr(CIFAR10, "test_list", names[5:])
        meta = hashlib.md5((place / CIFAR10.meta["filename"]).read_bytes()).hexdigest()
        patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
        found = data.open_data(settings("torch/cifar10", data_dir=str(tmp_path), in_chans=3))
    assert (len(found.train), len(found.val)) == (100, 20)
    assert found.classes == list("abcdefghij")
    image, label = found.train[13]
    assert image.size == (32, 32) and image.mode == "RGB" and label == 3


def test_hugging_face_data_sets(folder):
    pytest.importorskip("datasets")
    found = data.open_data(settings(f"hfds/{folder}"))
    plain = data.open_data(settings(folder))
    assert found.classes == plain.classes
    assert pixels(found.train) == pixels(plain.train)
    assert len(found.val) == 24


@pytest.mark.slow
def test_webdataset_shards(folder, tmp_path):
    pytest.importorskip("webdataset")
    shards = tmp_path / "shards"
    shards.mkdir()
    for part in ("train", "val"):
        for number, path in enumerate(sorted((folder / part).rglob("*.png"))):
            with tarfile.open(shards / f"{part}-{number % 2}.tar", "a") as file:
                file.add(path, f"{number:04d}.png")
                label = tmp_path / "label"
                label.write_text(path.parent.name[-1])
                file.add(label, f"{number:04d}.cls")
    out = ["--out", tmp_path, "--name", "run", "--train-split", "train-{0..1}.tar", "--val-split", "val-{0..1}.tar"]
    given = ["train", f"wds/{shards}", *SMALL, "--num-classes", 4, "--train-samples", 24, "--batch-size", 6]
    given += ["--log-every", 1]
    result, _ = irpe(*given, *out)
    assert result.exit_code == 0, result.output
    other = [*out[:2], "--name", "parts", *out[4:], "--resume", "auto"]
    for more in (["--max-steps", 3], ["--max-steps", 6], []):  # an epoch has 4 steps
        result, _ = irpe(*given, *other, *more)
        assert result.exit_code == 0, result.output
    assert log(tmp_path / "run", "step") == log(tmp_path / "parts", "step")
    two = process("evaluate", tmp_path / "run", processes=2)
    assert "on 24 images" in two.stdout, two.stdout + two.stderr
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")], catch_exceptions=False)
    assert "on 24 images" in result.output


def spoil(folder):
    """Makes three of the 24 pictures of each part unreadable, each in its own way."""
    for part in ("train", "val"):
        paths = sorted((folder / part / "digit2").iterdir())
        paths[0].write_bytes(b"")
        paths[1].write_bytes(paths[1].read_bytes()[:60])  # truncated
        paths[2].write_text("no picture")
    return folder


def irpe(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return result, " ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in result.output).split())


def test_unreadable_images_stop_or_are_counted_and_named(folder, tmp_path):
    spoil(folder)
    options = ["train", folder, *SMALL, "--batch-size", "12", "--out", tmp_path]
    stopped, words = irpe(*options, "--name", "stop")
    assert stopped.exit_code == 1
    assert "irpe: unreadable image" in words and "--bad-images skip goes on without it" in words
    first, words = irpe(*options, "--name", "verify", "--verify")
    assert first.exit_code == 2
    assert "6 images cannot be read: " in words and "no image format that Pillow knows" in words
    assert not (tmp_path / "verify").exists()
    on, words = irpe(*options, "--name", "skip", "--bad-images", "skip", "--verify")
    assert on.exit_code == 0, on.output
    assert "3 unreadable images to evaluate on, left out: " in words
    line = log(tmp_path / "skip", "epoch")[-1]
    assert (line["val"]["images"], line["val"]["bad"]) == (21, 3)
    assert line["bad_images"] >= 3
    assert "3 unreadable left out" in (tmp_path / "skip" / "README.md").read_text()
    _, words = irpe("evaluate", tmp_path / "skip")
    assert "on 21 images, 3 unreadable" in words and "digit2" in words


def test_an_unreadable_image_is_the_same_sentence_from_a_loader_worker(folder, tmp_path):
    spoil(folder)
    options = ["train", folder, *SMALL, "--batch-size", "24", "--out", tmp_path]
    sentences = []
    for workers in (0, 1):
        result, words = irpe(*options, "--loader-workers", workers)
        assert result.exit_code == 1
        assert "Traceback" not in words and words.endswith("--bad-images skip goes on without it, --verify lists all")
        sentences.append(words[words.index("irpe: unreadable image") :])
    assert sentences[0] == sentences[1]


def test_a_source_of_nothing_but_bad_images_gives_up():
    class Bad:
        classes = ("a", "b")

        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise OSError("broken")

        def name(self, index):
            return f"picture {index}"

    samples = loader.Samples(Bad(), None, True)
    with pytest.raises(loader.BadImageError, match="20 unreadable images in a row, the first is picture 3: broken"):
        samples[3, 0]


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)])
def test_shares_of_processes_make_up_the_batch_of_one(size, accumulate):
    for step in range(3):
        parts = [seeds.Share(rank, size, 18, accumulate).places(step) for rank in range(size)]
        assert all(len(places) == 18 // size // accumulate for part in parts for places in part)
        assert sorted(place for part in parts for places in part for place in places) == list(
            range(18 * step, 18 * step + 18)
        )


def test_an_order_holds_every_image_once_and_with_repeats_in_a_row():
    order = loader.epoch_order(50, 1, 0, 0)
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, loader.epoch_order(50, 1, 0, 1))
    assert torch.equal(order, loader.epoch_order(50, 1, 0, 0))
    three = loader.epoch_order(50, 3, 0, 0)
    assert len(three) == 50 and torch.equal(three[::3], order[:17])
    assert torch.equal(three[0::3][:16], three[1::3][:16]) and torch.equal(three[0::3][:16], three[2::3][:16])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_has_every_image_once_and_as_many_batches_everywhere(folder, size):
    source = data.Subset(data.open_data(settings(folder)).val, range(11))
    options = settings(folder)
    transform = loader.Transform(loader.Shape((8, 12), (0.0,), (1.0,), 1.0), options.interpolation)
    seen, lengths = [], set()
    for rank in range(size):
        batches = list(loader.eval_loader(source, transform, options, rank, size, 2))
        lengths.add(len(batches))
        seen += [image.numpy().tobytes() for batch in batches for image in batch.images[batch.real]]
    assert len(lengths) == 1
    assert sorted(seen) == sorted(transform(source[k][0]).numpy().tobytes() for k in range(11))


def test_what_an_augmentation_draws_depends_on_the_place_in_the_epoch_alone(folder):
    options = settings_from("deit", {"data": str(folder), "batch_size": 4, **NO_WORKERS})
    source = data.open_data(options).train
    transform = loader.Transform(loader.Shape((8, 12), (0.5,), (0.5,), 1.0), options.interpolation, options)

    def batches(rank=0, size=1, first=0, epoch=3, **more):
        share = seeds.Share(rank, size, 4, 1)
        given = settings_from("deit", {"data": str(folder), "batch_size": 4, **NO_WORKERS, **more})
        return [one.images for one in loader.train_loader(source, transform, given, share, epoch=epoch, first=first)]

    whole = batches()
    torch.rand(5)
    assert torch.equal(torch.cat(whole[2:]), torch.cat(batches(first=2)))
    assert torch.equal(torch.cat(whole), torch.cat(batches(loader_workers=2)))
    both = torch.stack([torch.cat(batches(rank=rank, size=2)) for rank in range(2)], 1).flatten(0, 1)
    assert torch.equal(torch.cat(whole), both)
    assert not torch.equal(whole[0], batches(epoch=4)[0])
    assert not torch.equal(whole[0][0], whole[0][1])  # copies of one picture, drawn anew


def test_non_square_grey_and_normalised():
    options = settings_from("small", {"data": "digits", "in_chans": 1, "img_size": "8x12", "crop_scale": 1.0})
    for training in (True, False):
        transform = loader.Transform(
            loader.Shape((8, 12), (0.25,), (0.5,), 1.0), options.interpolation, options if training else None
        )
        image = transform(Image.new("L", (30, 50), 255))
        assert image.shape == (1, 8, 12)
        assert torch.allclose(image, torch.tensor(1.5))


def stretch(size, scale, picture):
    """How much wider than before training makes things on a picture (width, height): (mean, least, most)."""
    import math
    import random

    options = settings_from("small", {"data": "digits", "crop_scale": scale})
    shape = loader.Shape(size, (0.0,) * 3, (1.0,) * 3, 1.0)
    crop = loader.Transform(shape, options.interpolation, options).apply.transforms[0]
    random.seed(0)
    boxes = [crop.get_params(Image.new("L", picture), crop.scale, crop.ratio) for _ in range(500)]
    found = [(size[1] / width) / (size[0] / height) for _, _, height, width in boxes]
    return math.exp(sum(map(math.log, found)) / len(found)), min(found), max(found)


@pytest.mark.parametrize("size", [(224, 224), (224, 320), (320, 224), (96, 288)])
def test_training_stretches_pictures_by_3_to_4_either_way_whatever_the_shape(size):
    mean, least, most = stretch(size, 0.08, (640, 600))
    assert mean == pytest.approx(1, abs=0.05)
    assert 0.73 < least < 0.8 and 1.25 < most < 1.37


def test_crop_scale_1_keeps_all_of_a_picture_of_the_same_shape_and_else_the_middle():
    for size in ((224, 320), (320, 224), (64, 64)):
        for picture in ((size[1], size[0]), (2 * size[1], 2 * size[0]), (640, 480), (480, 640)):
            assert stretch(size, 1.0, picture) == pytest.approx((1, 1, 1), abs=0.01)
        options = settings_from("small", {"data": "digits", "crop_scale": 1.0})
        shape = loader.Shape(size, (0.0,) * 3, (1.0,) * 3, 1.0)
        crop = loader.Transform(shape, options.interpolation, options).apply.transforms[0]
        image = Image.new("L", (2 * size[1], 2 * size[0]))
        assert crop.get_params(image, crop.scale, crop.ratio) == (0, 0, 2 * size[0], 2 * size[1])
        wide = Image.new("L", (3 * size[1], size[0]))
        assert crop.get_params(wide, crop.scale, crop.ratio) == (0, size[1], *size)


def test_square_images_are_trained_on_as_timm_does():
    from timm.data import create_transform

    noise = Image.fromarray(torch.randint(256, (50, 70, 3), dtype=torch.uint8).numpy())
    for scale, ratio in ((0.08, None), (0.6, None), (1.0, (1.0, 1.0))):
        options = settings_from("deit", {"data": "digits", "crop_scale": scale})
        shape = loader.Shape((32, 32), (0.5,) * 3, (0.5,) * 3, 1.0)
        ours = loader.Transform(shape, options.interpolation, options)
        theirs = create_transform(
            (3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", is_training=True, ratio=ratio,
            scale=(scale, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel",
        )  # fmt: skip
        for seed in range(8):
            seeds.seed_all(seed)
            one = ours(noise)
            seeds.seed_all(seed)
            assert torch.equal(one, theirs(noise))


# ---- what users bring


@pytest.mark.parametrize("size", [(20_000, 2), (2, 20_000), (5000, 7), (1, 1), (9, 4000)])
@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (48, 32)])
def test_strips_are_cut_before_they_are_resized(size, shape):
    """In little memory, and to what timm makes of all of them (of the ones that it can be asked for)."""
    options = settings_from("small", {"data": "digits"})
    ours = loader.Transform(loader.Shape(shape, (0.0,) * 3, (1.0,) * 3, 0.875), options.interpolation)
    if size[0] * size[1] > 1:
        cut = loader.middle(Image.new("L", size), *ours.seen)
        assert cut.width * cut.height < 200_000 and min(cut.size) == min(size)
    levels = torch.linspace(0, 255, max(size)).to(torch.uint8)
    rows = levels[None].expand(size[1], -1) if size[0] >= size[1] else levels[:, None].expand(-1, size[0])
    image = Image.fromarray(rows.contiguous().numpy()).convert("RGB")
    assert image.size == size
    found = ours(image)
    assert found.shape == (3, *shape)
    if max(size) / min(size) < 1000:
        assert (found - ours.apply(image)).abs().max() < 0.02


def test_pictures_that_are_no_strips_are_as_timm_has_them():
    for size in ((640, 480), (900, 100), (16, 16)):
        image = Image.new("L", size)
        assert loader.middle(image, 36, 36) is image


def test_tuples_as_arguments_of_a_model():
    given = ("a=7x7", "b=(2,2,6,2)", "c=1,2", "d=(1,)", "e=[0.1, 0.2]", "f=avg", "g=16", "h=rope_2d", "i=a,b", "j=(x)")
    assert settings("x", model_arg=given).model_kwargs() == {
        "a": (7, 7), "b": (2, 2, 6, 2), "c": (1, 2), "d": (1,), "e": (0.1, 0.2), "f": "avg", "g": 16, "h": "rope_2d",
        "i": "a,b", "j": "(x)",
    }  # fmt: skip
    from irpe.train import model

    options = dict(
        data="x", model="swin_tiny_patch4_window7_224", img_size="32x48", drop_path=0.0,
        model_arg=("depths=(1,1)", "num_heads=1,2", "window_size=4x6", "embed_dim=8"),
    )  # fmt: skip
    built = model.build(settings_from("small", options), 3)
    assert len(built.layers) == 2 and built.layers[0].blocks[0].window_size == (4, 6)
    for name in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"):
        with pytest.raises(ValueError, match=f"{name} is about loading; --pretrained FILE names weights"):
            settings("x", model_arg=(f"{name}=x",)).model_kwargs()


STRANGE = """
import os, signal, sys, time
from irpe.runs import picture
own = picture.open_picture
def strange(path):
    if str(path).endswith("digit2/3.png"):
        {action}
    return own(path)
picture.open_picture = strange
from irpe.__main__ import main
sys.argv = ["irpe", *{words}]
main()
"""
ACTIONS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)", "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "waits": "time.sleep(3600)",
}  # fmt: skip


@pytest.mark.parametrize("what", ["killed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("stopped", "waits"))])
def test_a_loader_process_that_does_not_answer_ends_the_run_with_a_name(folder, tmp_path, what):
    given = [
        "train",
        folder,
        *SMALL,
        "--batch-size",
        8,
        "--loader-workers",
        1,
        "--loader-timeout",
        600 if what == "killed" else 4,
        "--out",
        tmp_path,
    ]
    code = STRANGE.format(action=ACTIONS[what], words=[str(word) for word in given])
    done = LIBRARIES.run(code, cwd=tmp_path, path=[ROOT], environment=environment())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if what == "killed":
        assert "irpe: a loader process was ended from outside" in done.stderr
    else:
        assert "irpe: no picture came from the loader processes for 4 seconds (--loader-timeout); " in done.stderr
        assert re.search(r"the batch that was awaited begins with .*/digit\d/\d.png", done.stderr)


def test_labels_that_the_model_does_not_have_are_told():
    from irpe.train.evaluation import check_labels

    check_labels(torch.tensor([0, 3]), 4)
    for strange in (4, -1):
        with pytest.raises(RunError, match=f"an image is of class {strange}, and there are 4, numbered from 0"):
            check_labels(torch.tensor([0, strange]), 4)
