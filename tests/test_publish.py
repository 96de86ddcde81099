"""`irpe.push_to_hub` against a hub on this machine; the snippet of the card runs in a process of its own."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from fresh import PATIENCE
from hub_stand_in import hub
from train_tiny import environment

import irpe as package
from irpe.detect.settings import settings_from
from irpe.publish import card, facts_of_run

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")


def process(code, address, home, folder):
    """Runs code where the stand-in is the hub, and nothing is cached."""
    more = dict(
        HF_ENDPOINT=address, HF_HOME=str(home), HF_TOKEN="hf_none", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1"
    )
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: one for name, one in environment(**more).items() if name not in offline}
    options = dict(capture_output=True, text=True, env=env, timeout=PATIENCE, cwd=folder)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_comes_back(tiny_run, tmp_path):
    with hub() as (address, repositories):
        code = (
            f"import irpe; print(irpe.push_to_hub({str(tiny_run)!r}, 'user/name', license='mit', text='For *tests*.'))"
        )
        assert process(code, address, tmp_path / "home", tmp_path).split() == [f"{address}/user/name"]
        files = repositories["user/name"]
        assert {"README.md", "config.json", "irpe.json", "model.safetensors"} <= set(files)
        assert not any("data" in name or name.endswith((".pt", ".jsonl")) for name in files)
        text = files["README.md"].decode()
        # the snippet, literally, and what it finds
        (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        picture = next((tiny_run.parent / "data" / "val").rglob("*.png"))
        (tmp_path / "picture.jpg").write_bytes(picture.read_bytes())
        said = process(f"{snippet}\nprint(found[0].label)", address, tmp_path / "other", tmp_path)
        assert said.split()[-1] == package.load(tiny_run).predict(picture)[0].label
        # a name that is not there
        code = "import irpe\ntry: irpe.load('user/other')\nexcept ValueError as error: print('ValueError', error)\n"
        assert "ValueError user/other is neither here nor on the hub" in process(
            code, address, tmp_path / "o", tmp_path
        )
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "irpe", "image-classification")
    figures = {one.metric_name: one.metric_value for one in data.eval_results}
    best = json.loads((tiny_run / "result.json").read_text())["best"]["val"]
    assert figures["top-1 accuracy in percent"] == best["top1"]
    assert "For *tests*." in text and "rpe-1.9-product-ctx-1-k" in text and str(tiny_run) not in text


def test_the_card_of_a_model_without_figures(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 48))
    package.equip(model, "rpe-20-cross-ctx-0-qv")
    text = str(card(model, "user/name"))
    data = huggingface_hub.ModelCard(text).data
    assert data.eval_results is None and "rpe-20.0-cross-ctx-0-qv" in text and 'irpe.load("user/name")' in text
    assert "predict" not in text
    text = str(card(model, "user/name", results={"top-1": 81.25}, data="a|b"))
    (figure,) = huggingface_hub.ModelCard(text).data.eval_results
    assert (figure.metric_name, figure.metric_value, figure.dataset_name) == ("top-1", 81.25, "a|b")
    assert "| data | a\\|b |" in text


def plain(depth=1):
    return timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=(32, 48), num_classes=3)


def hf():
    transformers = pytest.importorskip("transformers", minversion="5.18")
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32)
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=(32, 48), **sizes))


def of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    sizes = dict(image_size=32, patch_size=8, num_layers=1, num_heads=3, hidden_dim=24, mlp_dim=32)
    return torchvision.models.VisionTransformer(**sizes)


def released():
    from irpe import models  # noqa: F401

    return timm.create_model("deit_tiny_patch16_224_ctx_product_50_shared_k", depth=1, num_classes=3)


@pytest.mark.parametrize(
    ("make", "equipped", "refusing"),
    [
        (plain, True, "timm"),
        (plain, False, None),
        (hf, True, "transformers"),
        (hf, False, None),
        (of_torchvision, True, None),
        (released, False, None),
    ],
)
def test_the_card_says_who_refuses_the_files(make, equipped, refusing, tmp_path):
    model = make()
    if equipped:
        package.equip(model, "rpe-1.9-product-ctx-1-k")
    has = equipped or make is released
    text = str(card(model, "user/name"))
    assert ("image relative position encoding" in text) == has == ("without relative position encoding" not in text)
    assert ("relative-position-encoding" in huggingface_hub.ModelCard(text).data.tags) == has
    assert f"| encoding | {'rpe-1.9-product-ctx-1-k' if has else 'none'} |" in text
    for one in ("timm", "transformers", "torchvision"):
        assert (f"The loaders of {one} refuse these files" in text) == (one == refusing)
    # as it is: timm and transformers do, and say so
    if make in (plain, released):
        package.save(model, tmp_path / "saved")
        if refusing:
            with pytest.raises(TypeError, match="saved_with_irpe"):
                timm.create_model(f"local-dir:{tmp_path / 'saved'}")
        else:
            again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
            images = torch.randn(2, 3, *again.default_cfg["input_size"][1:])
            assert torch.equal(again.eval()(images), model.eval()(images))


def test_the_encodings_of_the_card():
    model = package.equip(plain(depth=3), "rpe-1.9-product-ctx-1-k", blocks=[0])
    package.equip(model, "rpe-20-cross-ctx-0-qv", blocks=[1])
    assert "| encoding | rpe-1.9-product-ctx-1-k, rpe-20.0-cross-ctx-0-qv |" in str(card(model, "user/name"))
    config = package.get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k")
    other = dataclasses.replace(config, rpe_k=dataclasses.replace(config.rpe_k, alpha=3.5))
    model = package.equip(plain(), other)
    assert "| encoding | without a string form (see config.json) |" in str(card(model, "user/name"))


def of_detection(folder, result, **settings):
    """The files of a run of irpe detect whose best weights were those of step 2 of 6."""
    values = dataclasses.asdict(settings_from({"data": "/home/me/coco", "rpe": "none", **settings}))
    lines = [
        {"kind": "epoch", "epoch": epoch, "step": step, "train_loss": 1.0, "val": {"AP": ap, "AP50": None}}
        for epoch, step, ap in ((1, 2, 30.5), (1, 4, 20.5), (2, 6, 10.5))
    ]
    folder.mkdir()
    for name, one in (("settings.json", values), ("result.json", {"score": lines[-1]["val"], "best_step": 2} | result)):
        (folder / name).write_text(json.dumps(one))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_figures_of_a_detector_are_those_of_its_best_weights(tmp_path):
    """Of a run that says so, and of one of a version that wrote the best AP alone; epoch 1 was measured twice."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("transformers", minversion="5.18")
    from irpe.detect.report import scores

    old = of_detection(tmp_path / "old", {"best": 30.5})
    found = scores(old, 2, 6)
    assert {name: (one["step"], one["val"]["AP"]) for name, one in found.items()} == {
        "best": (2, 30.5),
        "last": (6, 10.5),
    }
    new = of_detection(tmp_path / "new", found)
    (new / "log.jsonl").unlink()
    for folder in (old, new):
        assert facts_of_run(folder)["results"] == {"AP in percent": 30.5}
        assert facts_of_run(folder)["base"] == "small" and facts_of_run(folder)["data"] == "coco"


@pytest.mark.parametrize(
    ("pretrained", "base"),
    [
        ("facebook/detr-resnet-50", "facebook/detr-resnet-50"),
        ("{here}/first/best", "first"),
        ("/gone/before/model", "before"),
        ("{here}/weights.pth", "weights.pth"),
    ],
)
def test_the_model_of_a_card_is_what_the_run_began_with(pretrained, base, tmp_path):
    (tmp_path / "first" / "best").mkdir(parents=True)
    best = {"best": {"val": {"AP": 1.0}}}
    folder = of_detection(tmp_path / "run", best, pretrained=pretrained.format(here=tmp_path))
    assert facts_of_run(folder)["base"] == base
