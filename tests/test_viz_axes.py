"""irpe/viz_axes.py: slices of maps against the ids of all pairs, colors that tell buckets apart, and the command."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from typer.testing import CliRunner

from irpe import METHOD, get_bucket_map, viz, viz_axes
from irpe.__main__ import app

SIZE = (3, 4, 6)
METHODS = list(viz.RATIOS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "skip"), [(SIZE, 0), ((2, 1, 5), 2), ((1, 3, 4), 1)])
def test_slices_are_rows_of_the_bucket_ids(method, size, skip):
    for one in viz_axes.video_maps(method, size, skip=skip):
        ids = get_bucket_map(one.method, size, skip, one.ratio, 2 * one.ratio, 8 * one.ratio).ids(torch.long)
        assert one.used() == len(ids.unique())
        for token, query in enumerate(itertools.product(*map(range, size))):
            assert torch.equal(one.around(query), ids[skip + token, skip:].view(size))


def test_cross_has_three_tables():
    tables = [one.method for one in viz_axes.video_maps("cross", SIZE)]
    assert tables == [METHOD.CROSS_DEPTH, METHOD.CROSS_ROWS, METHOD.CROSS_COLS]
    assert [viz._title(one) for one in tables] == ["Cross: frames", "Cross: rows", "Cross: columns"]


@pytest.mark.parametrize("method", METHODS)
def test_buckets_have_one_color_and_neighbours_another(method):
    for one in viz_axes.video_maps(method, (5, 4, 6)):
        ids = one.around((2, 1, 2))
        colors = one.colors(ids) * 255
        assert colors.shape == (5, 4, 6, 3) and colors.min() >= 0 and colors.max() <= 255
        for axis in range(3):
            differ = np.diff(ids.numpy(), axis=axis) != 0
            distance = np.abs(np.diff(colors, axis=axis)).max(-1)
            assert distance[~differ].max(initial=0) == 0
            assert distance[differ].min(initial=255) >= 3


def test_one_frame_is_the_map_of_an_image():
    (video,), (image,) = viz_axes.video_maps("product", (1, 4, 6)), viz.bucket_maps("product", 4, 6)
    steps = image.around((1, 2))
    assert torch.equal(video.around((0, 1, 2))[0], 3 * 49 + steps)  # of 7 x 49 buckets those of offset 0 in time
    assert np.allclose(video.colors(video.around((0, 1, 2)))[0], image.colors(steps), atol=0.06)


def test_pictures(tmp_path):
    groups = [viz_axes.video_maps(one, SIZE) for one in METHODS]
    path = viz_axes.draw_slices(tmp_path / "new" / "slices.png", groups)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="frame 3, row 0, column 0 is not on the map of 3x4x6 tokens"):
        viz_axes.draw_slices(path, groups, (3, 0, 0))
    with pytest.raises(ValueError, match=r"size=0; expected at least 1"):
        viz_axes.video_maps("euc", (0, 2, 3))


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def test_the_command_draws_slices(tmp_path):
    path = tmp_path / "video.png"
    result = run("--frames", 3, "--height", 4, "--width", 6, "--skip", 0, "--query", 0, 5, "--out", path)
    assert result.exit_code == 0, result.output
    assert path.exists()
    used = [one.used() for one in viz_axes.video_maps("cross", SIZE)]
    assert "{} + {} + {} = {} buckets in use".format(*used, sum(used)) in result.output
    for frames in (0, 17):
        result = run("--frames", frames, "--out", path)
        assert result.exit_code == 2 and "expected 1 to 16" in result.output
    result = run("--frames", 3, "--height", 4, "--query", 4, 0, "--out", path)
    assert result.exit_code == 2 and "is not on the map" in result.output
