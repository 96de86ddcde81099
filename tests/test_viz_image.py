"""irpe/viz_image.py, `irpe show RUN --image` from end to end, and docs/show.md."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import timm
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn
from train_tiny import ROOT, irpe, words

import irpe as package
from irpe import viz_image
from irpe.attention_maps import attention_maps

TEXT = (ROOT / "docs" / "show.md").read_text()
LINES = [line for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def vit(side="rpe-1.9-product-ctx-0-qkv", **more):
    size = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=2)
    model = package.equip(timm.create_model("vit_tiny_patch16_224", **size, **more), side).eval()
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their files."""
    figures = []
    monkeypatch.setattr(viz_image, "_save", lambda figure, path: figures.append(figure) or path)
    return figures


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch):
    """The folder of a run and a picture, of the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "runs" / "NAME")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 31, 3), dtype=np.uint8)).save("cat.jpg")
    return tmp_path


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


ON = {"k": "added on keys", "q": "added on queries", "v": "added on values"}
ALWAYS = ["attention without iRPE", "attention with iRPE", "change"]


@pytest.mark.parametrize("on", ["k", "qv", "qkv"])
@pytest.mark.parametrize("class_token", [True, False])
def test_a_column_for_what_there_is_and_a_row_for_each_query(drawn, tmp_path, on, class_token):
    model = vit(f"rpe-1.9-product-ctx-0-{on}", **({} if class_token else dict(class_token=False, global_pool="avg")))
    maps = attention_maps(model, torch.rand(3, 16, 24), query=(3, 1), block=1)
    pixels = np.random.default_rng(0).random((16, 24, 3))
    viz_image.draw_attention(tmp_path / "a.png", maps, pixels, "cat_$1.jpg")
    (figure,) = drawn
    columns = [*ALWAYS, *(ON[one] for one in "kqv" if one in on)]
    rows = [["query: row 3, column 1", *columns], *([["class token", *columns]] if class_token else [])]
    assert titles(figure) == [one for row in rows for one in row]
    np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), pixels)
    boxes = [one for one in figure.axes[0].patches if isinstance(one, Rectangle)]
    assert {(one.get_xy(), one.get_width(), one.get_height()) for one in boxes} == {((4.0, 12.0), 4.0, 4.0)}
    assert f"head {maps.head} of 3" in figure.get_suptitle() and "cat_$1.jpg" in figure.get_suptitle()
    figure.savefig(tmp_path / "a.png")
    first = [ax for ax in figure.axes if ax.get_title()][: 1 + len(columns)]
    tops = {round(ax.get_window_extent().y1, 1) for ax in first}
    assert len(tops) == 1, "panels of a row stand on one line"


def test_a_panel_shows_its_map(drawn, tmp_path):
    maps = attention_maps(vit(), torch.rand(3, 16, 24), query=(3, 1), block=1)
    viz_image.draw_attention(tmp_path / "a.png", maps, np.ones((16, 24, 3)), "cat")
    panels = {ax.get_title(): ax for ax in reversed(drawn[0].axes)}
    weights, without = (maps.map(one) for one in (maps.query.weights, maps.query.without))
    largest = max(weights.max(), without.max())
    for title, values in (("attention with iRPE", weights), ("attention without iRPE", without)):
        assert [one.get_extent() for one in panels[title].get_images()] == 2 * [[0, 24, 16, 0]]
        overlay = panels[title].get_images()[1].get_array()
        np.testing.assert_allclose(overlay[..., 3], 0.2 + 0.6 * np.sqrt(values / largest), atol=1e-6)
        assert f"class token: {100 * (1 - values.sum()):.1f} %" == panels[title].get_xlabel()
    on_keys = maps.map(maps.query.on_keys)
    blue = panels["added on keys"].get_images()[1].get_array()
    assert ((blue[..., 0] < blue[..., 2]) == (on_keys < on_keys.mean())).mean() > 0.9
    assert f"together {100 * maps.query.share:.1f} %" in panels["added on values"].get_xlabel()


def test_what_is_empty_says_so(drawn, tmp_path):
    model = vit()
    viz_image.draw_attention(tmp_path / "a", attention_maps(model, torch.rand(3, 16, 24)), np.ones((16, 24, 3)), "")
    said = {(ax.get_title(), one.get_text()) for ax in drawn[0].axes for one in ax.texts}
    assert said == {("added on keys", "the same for all keys")}  # of the class token
    assert not drawn[0].get_supxlabel()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lookup_table" in name:
                parameter.zero_()
    viz_image.draw_attention(tmp_path / "a", attention_maps(model, torch.rand(3, 16, 24)), np.ones((16, 24, 3)), "")
    said = [(ax.get_title(), one.get_text()) for ax in drawn[1].axes for one in ax.texts]
    assert said == 2 * [(title, "nothing") for title in ("change", *ON.values())]
    assert drawn[1].get_supxlabel().startswith("All tables are zero")


def test_the_command_draws_what_the_model_saw(drawn, tmp_path):
    model = vit(in_chans=3)
    package.save(model, tmp_path / "model", classes=["a", "b"])
    colors = np.zeros((16, 24, 3), np.uint8)
    colors[:, :12] = (200, 30, 90)
    Image.fromarray(colors).save(tmp_path / "half.png")
    result = irpe("show", tmp_path / "model", "--image", tmp_path / "half.png", "--query", 1, 4)
    assert result.exit_code == 0, result.output
    pixels = drawn[0].axes[0].get_images()[0].get_array()
    assert pixels.shape == (16, 24, 3)
    np.testing.assert_allclose(255 * pixels[8, 2], (200, 30, 90), atol=3)
    np.testing.assert_allclose(pixels[8, 21], 0, atol=0.02)
    loaded = package.load(tmp_path / "model")
    image = loaded.predict.prepare(Image.fromarray(colors))
    maps = attention_maps(loaded, image, query=(1, 4))
    text = words(result)
    assert f"block {maps.block} of 2, head {maps.head} of 3, query at row 1, column 4 of 4x6 tokens" in text
    assert f"query: {100 * maps.query.moved:.1f} % of its attention goes to other keys; values get" in text
    assert f"class token: {100 * maps.class_token.moved:.1f} %" in text


def test_the_commands_of_the_page(place):
    assert len(LINES) == 2
    for line in LINES:
        program, *arguments = shlex.split(line)
        result = irpe(*arguments)
        assert program == "irpe" and result.exit_code == 0, result.output
    for file in ("runs/attention.png", "cat.png"):
        assert (place / file).read_bytes().startswith(b"\x89PNG")
    # of one block, whose class token alone is read: the sentence, in the text too
    assert "in block 1, the last: only the class token is read from it" in words(result)


def test_the_numbers_of_the_page(place):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(block, "show.md", "exec"), names)
    assert names["seen"].shape == (4, 6)
    row = names["maps"].query
    np.testing.assert_allclose(row.weights, np.exp(row.scores + row.added) / np.exp(row.scores + row.added).sum(), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["runs/NAME"], "RUN is of a picture; expected --image x.jpg beside it"),
        (["--head", 1], "--head is of a picture; expected --image"),
        (["--image", "cat.jpg"], "--image cat.jpg: expected RUN"),
        (["runs/NAME", "--image", "cat.jpg", "--method", "euc"], "--method is of bucket maps; leave it out"),
        (["runs/NAME", "--image", "cat.jpg", "--height", 14], "--height is of bucket maps"),
        (["runs/NAME", "--image", "none.jpg"], "none.jpg: it cannot be read"),
        (["runs/NAME", "--image", "runs/NAME/settings.json"], "settings.json: its bytes are of no image format"),
        (["runs/NAME", "--image", "cat.jpg", "--query", 4, 0], "the query at row 4, column 0 is not on the map of 4x6"),
        (["runs/NAME", "--image", "cat.jpg", "--block", 2], "block 2; the model has 1, counted from 1"),
        (["runs/NAME", "--image", "cat.jpg", "--head", 3], "head 3; the model has 2, counted from 1"),
        (["runs/NAME", "--image", "cat.jpg", "--weights", "newest"], "newest"),
        (["runs/NAME", "--image", "cat.jpg", "--out", "a.jpg"], "ends in .png"),
        (["runs/NAME", "--image", "cat.jpg", "--out", "cat.jpg/a.png"], "is in its way"),
        (["model.onnx", "--image", "cat.jpg"], "an exported file does not show its attention"),
        (["nowhere", "--image", "cat.jpg"], "nowhere does not exist"),
        (["plain", "--image", "cat.jpg"], "this VisionTransformer has none"),
    ],
)
def test_wrong_input_is_a_sentence(place, arguments, sentence):
    if arguments[0] == "plain":
        size = dict(img_size=(8, 12), patch_size=2, embed_dim=12, depth=1, num_classes=2)
        package.save(timm.create_model("vit_tiny_patch16_224", **size), "plain")
    before = sorted(place.rglob("*"))
    result = irpe("show", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in words(result)
    assert sorted(place.rglob("*")) == before


def test_models_of_transformers_are_drawn(drawn, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=(8, 12),
        patch_size=2, num_labels=2,
    )  # fmt: skip
    model = package.equip(transformers.ViTForImageClassification(config), "rpe-1.9-product-ctx-1-k")
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter)
    colors = np.zeros((8, 12, 3), np.uint8)
    colors[:, :6] = (200, 30, 90)
    Image.fromarray(colors).save(tmp_path / "a.png")
    package.save(model, tmp_path / "model")
    result = irpe("show", tmp_path / "model", "--image", tmp_path / "a.png")
    assert result.exit_code == 2 and "how pictures are prepared" in words(result)
    ways = [dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.3, 0.2]), dict(do_normalize=False)]
    for number, more in enumerate(ways):
        processor = transformers.ViTImageProcessor(size={"height": 8, "width": 12}, **more)
        package.save(model, tmp_path / f"model{number}", processor=processor)
        result = irpe("show", tmp_path / f"model{number}", "--image", tmp_path / "a.png", "--query", 1, 4, "--block", 2)
        assert result.exit_code == 0, result.output
        assert "block 2 of 2, head" in words(result) and "of 4x6 tokens" in words(result)
        pixels = drawn[number].axes[0].get_images()[0].get_array()
        np.testing.assert_allclose(255 * pixels, colors, atol=2)


def test_a_model_that_classifies_nothing_is_a_sentence(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24)
    model = transformers.ViTModel(transformers.ViTConfig(**size, image_size=(8, 12), patch_size=2))
    package.save(package.equip(model, "rpe-1.9-product-ctx-1-k"), tmp_path / "model")
    Image.new("RGB", (8, 12)).save(tmp_path / "a.png")
    result = irpe("show", tmp_path / "model", "--image", tmp_path / "a.png")
    assert result.exit_code == 2 and "is no classifier, and does not say how pictures are prepared" in words(result)


def test_beside_the_window_of_swin_the_picture_is_bare(drawn, tmp_path):
    size = dict(
        img_size=(16, 24), patch_size=4, window_size=2, depths=(2,), embed_dim=24, num_heads=(3,), num_classes=2
    )
    model = package.equip(timm.models.SwinTransformer(**size), "rpe-1.9-product-ctx-0-qkv").eval()
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter)
    maps = attention_maps(model, torch.rand(3, 16, 24), query=(2, 3), block=2)
    viz_image.draw_attention(tmp_path / "a.png", maps, np.ones((16, 24, 3)), "cat")
    panels = {ax.get_title(): ax for ax in drawn[0].axes}
    for title in (*ALWAYS, *ON.values()):
        seen = panels[title].get_images()[1].get_array()[..., 3] > 0
        assert np.argwhere(seen).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]], title
    drawn[0].savefig(tmp_path / "a.png")
