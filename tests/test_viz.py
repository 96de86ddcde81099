"""irpe/viz.py: counts, maps against brute force, colors that tell buckets apart, and pictures that can be drawn."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from irpe import METHOD, get_bucket_ids_2d, viz
from irpe.encodings import Encodings


@pytest.mark.parametrize(("method", "count"), [("euc", 20), ("quant", 51), ("cross", 56), ("product", 50)])
def test_counts_are_those_of_the_papers_table_1(method, count):
    assert sum(one.used() for one in viz.bucket_maps(method, 14, 14, skip=1)) == count


@pytest.mark.parametrize("method", list(viz.RATIOS))
@pytest.mark.parametrize(("height", "width", "skip"), [(5, 7, 0), (4, 3, 2), (1, 6, 1)])
def test_maps_are_rows_of_the_bucket_ids(method, height, width, skip):
    for one in viz.bucket_maps(method, height, width, skip=skip):
        ids, _ = get_bucket_ids_2d(one.method, height, width, skip, *one.piecewise)
        assert one.used() == len(ids.unique())
        offsets = one.offsets()
        for row in range(height):
            for column in range(width):
                expected = ids[skip + row * width + column, skip:].view(height, width)
                assert torch.equal(one.around((row, column)), expected)
                window = offsets[height - 1 - row :, width - 1 - column :][:height, :width]
                assert torch.equal(window, expected)


@pytest.mark.parametrize("method", list(viz.RATIOS))
@pytest.mark.parametrize("size", [(14, 14), (5, 16)])
def test_neighbouring_buckets_have_colors_that_can_be_told_apart(method, size):
    for one in viz.bucket_maps(method, *size):
        for ids in (one.offsets(), one.around((2, 3))):
            colors = one.colors(ids) * 255
            assert colors.min() >= 0
            assert colors.max() <= 255
            for axis in (0, 1):
                differ = np.diff(ids.numpy(), axis=axis) != 0
                distance = np.abs(np.diff(colors, axis=axis)).max(-1)
                assert distance[~differ].max(initial=0) == 0
                assert distance[differ].min(initial=255) >= 4


def test_directed_maps_have_one_color_for_each_bucket():
    (one,) = viz.bucket_maps("product", 14, 14)
    ids = one.offsets()
    color_of = {}
    for bucket, color in zip(ids.flatten().tolist(), one.colors(ids).reshape(-1, 3), strict=True):
        color_of.setdefault(bucket, set()).add(tuple(color.round(6)))
    assert all(len(colors) == 1 for colors in color_of.values())
    assert len(set.union(*color_of.values())) == len(color_of) == 49


def test_wrong_values_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="unknown method"):
        viz.bucket_maps("circle", 3, 4)
    with pytest.raises(ValueError, match="width=0"):
        viz.bucket_maps("euc", 3, 0)
    with pytest.raises(ValueError, match="not on the map of 3x4 tokens"):
        viz.draw_buckets(tmp_path / "a.png", [viz.bucket_maps("euc", 3, 4)], (0, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 31), (17, 3)])
def test_bucket_maps_of_odd_sizes_can_be_drawn(tmp_path, height, width):
    path = viz.draw_buckets(tmp_path / "a.png", [viz.bucket_maps("product", height, width, skip=5)])
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


def test_cross_is_drawn_as_its_two_tables():
    assert [one.method for one in viz.bucket_maps("cross", 3, 4)] == [METHOD.CROSS_ROWS, METHOD.CROSS_COLS]
