"""benchmarks/moving.py: clips and their directions, what sides can know, and a small run from end to end."""

import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

sys.path.insert(0, str(ROOT))
from benchmarks import moving
from irpe import digits
from irpe.irpe import get_bucket_ids

SIZE = moving.Size(3, 16, 24)


def some(count=60):
    return digits.Digits(*(part[:count] for part in digits.splits()["test"]))


def test_labels_are_the_directions_in_which_the_ink_moves():
    """By the centre of the ink, and by a search for the digit in every frame."""
    data = some()
    videos, labels = moving.clips(data, SIZE, torch.Generator().manual_seed(0))
    assert videos.shape == (60, 3, 16, 24) and set(labels.tolist()) == set(range(8))
    rows, columns = torch.arange(16.0)[:, None], torch.arange(24.0)
    for digit, video, label in zip(data.images[:, 0], videos, labels.tolist(), strict=True):
        centres = [((frame * rows).sum() / frame.sum(), (frame * columns).sum() / frame.sum()) for frame in video]
        for before, after in itertools.pairwise(centres):
            moved = [float(b - a) for a, b in zip(before, after, strict=True)]
            assert moved == pytest.approx([2 * way for way in moving.DIRECTIONS[label]], abs=1e-3)
        for frame in video:
            windows = frame.unfold(0, 8, 1).unfold(1, 8, 1)  # (9, 17, 8, 8)
            places = (windows == digit).all(-1).all(-1).nonzero()
            assert len(places) >= 1 and frame.sum() == pytest.approx(float(digit.sum()), abs=1e-3)


def test_the_place_in_the_middle_of_a_clip_says_nothing_of_its_direction():
    """Every direction has every place; digits and places stay on the canvas."""
    count = 60 * 200
    data = digits.Digits(*(part.repeat(200, *[1] * (part.ndim - 1)) for part in some()))
    marked = data._replace(images=torch.ones(count, 1, 8, 8))
    videos, labels = moving.clips(marked, moving.Size(3, 12, 16), torch.Generator().manual_seed(0))
    assert torch.equal(videos.sum((2, 3)), torch.full((count, 3), 64.0))
    columns = videos[:, 1].amax(1).argmax(1)  # of the left edge in the second frame
    rows = videos[:, 1].amax(2).argmax(1)
    assert set(rows.tolist()) == {2} and set(columns.tolist()) == {2, 3, 4, 5, 6}
    shares = torch.zeros(8, 5).index_put_((labels, columns - 2), torch.ones(count), accumulate=True) / count
    assert (shares - 1 / 40).abs().max() < 0.006


def test_canvases_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="a canvas of 5x12x24 pixels; in 5 frames a digit needs 16"):
        moving.clips(some(), moving.Size(5, 12, 24), torch.Generator())


def with_tables(side):
    torch.manual_seed(0)
    model = moving.Mover(side).eval()
    for name, weight in model.named_parameters():
        if "lookup_table" in name or "pos_" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("side", moving.TITLES)
def test_who_can_know_the_order_of_frames(side):
    """Without positions, and with rows and columns alone, a clip and the same one played backwards are one."""
    model = with_tables(side)
    for size in moving.TESTS:
        videos, _ = moving.clips(some(4), size, torch.Generator().manual_seed(1))
        with torch.no_grad():
            same = torch.allclose(model(videos), model(videos.flip(1)), atol=1e-4)
        assert same is (side in (moving.NONE, moving.PLANE)), size


def test_sides_have_the_tables_that_they_are_said_to_have():
    name = "blocks.0.attn.rpe_k.lookup_table_weight"
    assert moving.Mover(moving.PLANE).state_dict()[name].shape[-1] == 49  # 7 rows, 7 columns, one for time
    assert moving.Mover(moving.SPACE).state_dict()[name].shape[-1] == 343
    for side, parts in (
        (moving.PLANE, 2),
        (moving.SPACE, 2),
        (moving.SPACE_QKV, 6),
        (moving.ABSOLUTE, 0),
        (moving.NONE, 0),
    ):
        state = moving.Mover(side).state_dict()
        assert sum("lookup_table" in name for name in state) == parts
        assert sum("pos_" in name for name in state) == 2 * (side == moving.ABSOLUTE)


def test_pictures_show_what_is_added_to_the_score():
    """Of a table that knows one bucket: keys one frame later, on the row above, in the same column."""
    model = with_tables(moving.SPACE)
    query, key = torch.tensor([[1, 1, 1]]), torch.tensor([[2, 0, 1]])
    bucket = int(get_bucket_ids("product", query, key, 0, 1.9, 3.8, 15.2)[0])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.rpe_k.lookup_table_weight.zero_()
            block.attn.rpe_k.lookup_table_weight[..., bucket] = 1.0
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    found = moving.encodings({"side": moving.SPACE, "state": state})
    assert found.shape == (2, 2, 5, 5, 7)
    for added in found.flatten(0, 1):
        there = (added - added.median()).abs() > 1e-6
        assert there.nonzero().tolist() == [[3, 1, 3]]


def test_the_sides_start_from_the_same_weights_and_see_the_same_clips():
    states = {}
    for side in moving.TITLES:
        torch.manual_seed(3)
        states[side] = moving.Mover(side).state_dict()
    for name, weight in states[moving.SPACE].items():
        if "lookup_table" in name:
            assert not weight.any()
        else:
            assert all(torch.equal(weight, states[side][name]) for side in moving.TITLES), name
    first, again = (moving.test_clips("valid", SIZE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and len(first[1]) == 300


def test_the_rates_are_those_that_were_chosen_on_validation_images():
    found = json.loads((ROOT / "benchmarks" / "results" / "moving_tune_cpu.json").read_text())
    assert found["chosen"] == moving.RATES
    assert found["recipe"]["test_on"] == "valid" and found["recipe"]["epochs"] == moving.Run.epochs
    assert {run["seed"] for run in found["runs"]} == {*moving.TUNE_SEEDS}
    assert {run["lr"] for run in found["runs"]} == {*moving.GRID}


def test_a_small_run_writes_results_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(moving, "TESTS", moving.TESTS[:2])
    monkeypatch.setattr(moving, "fit_with_progress", lambda fit, runs, title_of, workers: [*map(fit, runs)])
    out = ["--out", str(tmp_path), "--epochs", "1", "--limit", "64"]
    moving.main([*out, "--seeds", "2", "--first-seed", "7", "--picture", str(tmp_path / "moving.png")])
    found = json.loads((tmp_path / "moving_cpu.json").read_text())
    assert [row["side"] for row in found["summary"]] == [*moving.TITLES]
    assert [row["title"] for row in found["summary"]] == [*moving.TITLES.values()]
    assert all(row["seeds"] == [7, 8] and row["lr"] == moving.RATES[row["side"]] for row in found["summary"])
    assert [*found["tests"]] == [*found["summary"][0]["accuracy"]] == ["3x12x16", "3x12x32"]
    assert [(gain["side"], gain["other"]) for gain in found["differences"]] == [*moving.PAIRS]
    assert found["recipe"]["epochs"] == 1 and found["machine"]["torch"] in torch.__version__
    assert len(found["runs"]) == 10 and "state" not in found["runs"][0]
    assert (tmp_path / "moving.png").stat().st_size > 10_000
