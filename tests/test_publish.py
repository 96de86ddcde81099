"""`irpe.push_to_hub` against a hub on this machine; the snippet of the card runs in a process of its own."""

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
from irpe.publish import card

pytest.importorskip("timm")
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
    timm = pytest.importorskip("timm")
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
