"""irpe/viz.py: pictures that can be drawn, and the command that draws slices."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from typer.testing import CliRunner

from irpe import viz
from irpe.__main__ import app
from irpe.encodings import Encodings
from irpe.viz_maps import RATIOS, bucket_maps


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


@pytest.mark.parametrize(
    ("draw", "size", "query"), [(viz.draw_buckets, (3, 4), (0, 4)), (viz.draw_slices, (2, 3, 4), (2, 0, 0))]
)
def test_a_query_beside_the_map_draws_nothing(tmp_path, draw, size, query):
    with pytest.raises(ValueError, match="is not on the map of"):
        draw(tmp_path / "a.png", [bucket_maps("euc", size)], query)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 31), (17, 3)])
def test_bucket_maps_of_odd_sizes_can_be_drawn(tmp_path, height, width):
    path = viz.draw_buckets(tmp_path / "a.png", [bucket_maps("product", (height, width), skip=5)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_of_a_training_can_be_drawn(tmp_path):
    rng = np.random.default_rng(0)
    results = [
        {"title": title, "accuracy": {8: [10.0, 50.0 + seed], 12: [5.0, 40.0 + seed]}, "measured_at": [1, 2]}
        for title in ("one", "other")
        for seed in range(3)
    ]
    learned = Encodings(
        "a title", rng.normal(size=(2, 3, 7, 7)), rng.normal(size=(1, 4, 7, 7)), rng.random((4, 8, 8)),
        [(0, 0), (1, 3), (3, 3), (2, 0)], [(1, 2)], 2,
    )  # fmt: skip
    paths = [
        viz.draw_accuracy(tmp_path / "curves.png", results, 8),
        viz.draw_samples(tmp_path / "samples.png", [("8×8", torch.rand(5, 8, 8)), ("8×12", torch.rand(5, 8, 12))]),
        viz.draw_encodings(tmp_path / "encodings.png", learned),
        viz.draw_overview(tmp_path / "irpe.png", learned),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert paths[-1].stat().st_size < 300_000


def test_slices_of_all_methods_can_be_drawn(tmp_path):
    path = viz.draw_slices(tmp_path / "new" / "slices.png", [bucket_maps(one, (3, 4, 6)) for one in RATIOS])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_slices(tmp_path):
    path = tmp_path / "video.png"
    result = run("--frames", 3, "--height", 4, "--width", 6, "--skip", 0, "--query", 0, 5, "--out", path)
    assert result.exit_code == 0, result.output
    assert path.exists()
    used = [one.used() for one in bucket_maps("cross", (3, 4, 6))]
    assert "{} + {} + {} = {} buckets in use".format(*used, sum(used)) in result.output
    for frames in (0, 17):
        result = run("--frames", frames, "--out", path)
        assert result.exit_code == 2 and "expected 1 to 16" in result.output
    result = run("--frames", 3, "--height", 4, "--query", 4, 0, "--out", path)
    assert result.exit_code == 2 and "is not on the map" in result.output
