"""irpe/runs/logs.py and report.py: the bar, lines that are written again, TensorBoard, pictures of encodings."""

import io

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

import numpy as np
from rich.console import Console
from train_tiny import SMALL, irpe, pictures

from irpe import viz
from irpe.runs import logs
from irpe.runs.logs import Log, duration, read_log
from irpe.runs.trackers import trackers_of
from irpe.train import data, loader, model, report
from irpe.train.settings import settings_from

SCORE = {"loss": 1.5, "top1": 50.0, "top5": 90.0, "images": 10, "bad": 0, "per_class": [50.0, None]}


def epoch(number, step):
    return {"epoch": number, "step": step, "train_loss": 2.0, "bad_images": 0, "seconds": 1.0, "val": SCORE}


def test_the_bar_tells_images_their_rate_and_the_time_that_is_left(tmp_path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, highlight=False)
    log = Log(tmp_path, console, total_images=400)
    for _ in range(2):
        log.advance(100)
    log.step(step=2, epoch=1, loss=2.0, lr=0.1)
    log.epoch(epoch(1, 2), "val 1.5000, top-1 50.00", is_best=True)
    log.close()
    shown = text.getvalue()
    assert "200/400" in shown and "/s" in shown and "left" in shown
    assert (
        "epoch 1: train 2.0000, val 1.5000, top-1 50.00" in shown and "images/s" in shown and "the best so far" in shown
    )
    assert [line["kind"] for line in read_log(tmp_path)] == ["step", "epoch"]


def test_the_bar_of_measuring_moves_and_goes(tmp_path):
    text = io.StringIO()
    log = Log(tmp_path, Console(file=text, force_terminal=True, width=120, highlight=False), total_images=400)
    log.advance(100)
    for images in (16, 32, 47):
        log.measuring(images, 47)
        log.bar.refresh()
    assert "47/47" in text.getvalue() and "32/47" in text.getvalue() and len(log.bar.tasks) == 2
    log.epoch(epoch(1, 2), "", is_best=False)
    assert len(log.bar.tasks) == 1
    log.close()


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: clock[0])
    text = io.StringIO()
    log = Log(tmp_path, Console(file=text, width=120, highlight=False), total_images=4000)
    for _ in range(7):
        clock[0] += 10
        log.advance(100)
    for images in (16, 32, 47):
        clock[0] += 20
        log.measuring(images, 47)
    clock[0] += 30
    log.measuring(99, None)
    assert text.getvalue().splitlines() == [
        "300 of 4,000 images, 10 images/s, 6 min left",
        "600 of 4,000 images, 10 images/s, 6 min left",
        "measuring: 16 of 47 images",
        "measuring: 47 of 47 images",
        "measuring: 99 images",
    ]


def test_a_run_in_a_pipe_tells_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "PAUSE", 0.0)
    pictures(tmp_path / "data", per_class=8)
    result = irpe("train", tmp_path / "data", *SMALL, "--out", tmp_path, "--name", "run")
    assert result.exit_code == 0, result.output
    assert "30 of 60 images," in result.output and "measuring: 30 of 32 images" in result.output
    assert "measuring: 32 of 32 images" in result.output and "60 of 60 images," in result.output


def test_lines_that_will_be_written_again_are_removed(tmp_path):
    console = Console(file=io.StringIO())
    log = Log(tmp_path, console)
    for step in range(1, 7):
        log.step(step=step, epoch=1, loss=1.0, lr=0.1)
        if step % 3 == 0:
            log.epoch(epoch(step // 3, step), "", is_best=False)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    Log(tmp_path, console, step=6, measured=3)  # stopped while the second epoch was measured
    assert [(line["kind"], line["step"]) for line in read_log(tmp_path)] == [
        ("step", 1), ("step", 2), ("step", 3), ("epoch", 3), ("step", 4), ("step", 5), ("step", 6),
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text('{"kind"\n{}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*log.jsonl is not JSON"):
        read_log(tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(
        tmp_path, Console(file=io.StringIO()), trackers=trackers_of(tmp_path, settings_from("small", {"data": ""}), 0)
    )
    log.step(step=1, epoch=1, loss=2.5, lr=0.1)
    log.epoch(epoch(1, 1), "", is_best=True)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("val/top1")[0].value == 50.0


@pytest.mark.parametrize("rpe", ["rpe-1.9-product-ctx-1-k", "rpe-20-cross-ctx-0-qk", "rpe-20-euc-bias-0-k"])
def test_encodings_are_what_the_attention_adds(tmp_path, rpe):
    folder = pictures(tmp_path)
    options = dict(
        data=str(folder), rpe=rpe, model="vit_tiny_patch16_224", img_size="8x12", in_chans=1,
        model_arg=("patch_size=2", "embed_dim=24", "depth=2", "num_heads=3"),
    )  # fmt: skip
    settings = settings_from("small", options)
    found = data.open_data(settings)
    vit = model.build(settings, 4).eval()
    shape = model.shape_of(settings, vit)
    for name, parameter in vit.named_parameters():
        if "lookup_table" in name:
            torch.nn.init.normal_(parameter)
    learned = report.encodings(vit, settings, shape, found.val)
    assert learned.mean.shape == (2, 3, 7, 11)  # 4 x 6 tokens
    assert not vit.blocks[0].attn.rpe_k._forward_pre_hooks
    block, head = learned.shown[0]
    attention = vit.blocks[block].attn
    heard = []
    handle = attention.qkv.register_forward_hook(lambda module, args, output: heard.append(output))
    transform = loader.Transform(shape, settings.interpolation)
    with torch.no_grad():
        vit(transform(found.val[0][0])[None])
        handle.remove()
        q = heard[0].reshape(1, 25, 3, 3, 8)[:, :, 0].transpose(1, 2) * attention.scale
        y = attention.rpe_k(q, 4, 6)
    row, column = learned.at[0]
    y = y[0, head if y.shape[1] > 1 else 0, 1 + row * 6 + column, 1:].view(4, 6).numpy()
    drawn = learned.single[0, 0, 3 - row : 7 - row, 5 - column : 11 - column]
    np.testing.assert_allclose(drawn - drawn.mean(), y - y.mean(), atol=1e-5)
    viz.draw_encodings(tmp_path / "one.png", learned)


def test_durations_are_rounded():
    spans = {0.4: "0 s", 119.4: "119 s", 120: "2 min", 3569: "59 min", 3571: "1 h 00 min", 7260: "2 h 01 min"}
    assert {span: duration(span) for span in spans} == spans
