"""irpe/viz_maps.py: counts, maps against the ids of all pairs, colors that tell buckets apart, places."""

import itertools

import numpy as np
import pytest
import torch

from irpe import METHOD, get_bucket_map
from irpe.viz_maps import RATIOS, bucket_maps, query_on

SIZES = [(5, 7), (4, 3), (1, 6), (3, 4, 6), (2, 1, 5), (1, 3, 4)]


@pytest.mark.parametrize(("method", "count"), [("euc", 20), ("quant", 51), ("cross", 56), ("product", 50)])
def test_counts_are_those_of_the_papers_table_1(method, count):
    assert sum(one.used() for one in bucket_maps(method, (14, 14), skip=1)) == count


@pytest.mark.parametrize("method", list(RATIOS))
@pytest.mark.parametrize(("size", "skip"), list(zip(SIZES, [0, 2, 1, 0, 2, 1], strict=True)))
def test_maps_are_rows_of_the_bucket_ids(method, size, skip):
    for one in bucket_maps(method, size, skip=skip):
        ids = get_bucket_map(one.method, size, skip, *one.piecewise).ids(torch.long)
        assert one.used() == len(ids.unique())
        offsets = one.offsets()
        for token, query in enumerate(itertools.product(*map(range, size))):
            expected = ids[skip + token, skip:].view(size)
            assert torch.equal(one.around(query), expected)
            window = tuple(slice(n - 1 - at, 2 * n - 1 - at) for n, at in zip(size, query, strict=True))
            assert torch.equal(offsets[window], expected)


def test_cross_has_a_table_for_each_axis():
    tables = bucket_maps("cross", (3, 4, 6))
    assert [one.method for one in tables] == [METHOD.CROSS_DEPTH, METHOD.CROSS_ROWS, METHOD.CROSS_COLS]
    assert [one.title for one in tables] == ["Cross: frames", "Cross: rows", "Cross: columns"]
    assert [one.method for one in bucket_maps("cross", (3, 4))] == [METHOD.CROSS_ROWS, METHOD.CROSS_COLS]


@pytest.mark.parametrize("method", list(RATIOS))
@pytest.mark.parametrize(("size", "least"), [((14, 14), 4), ((5, 16), 4), ((5, 4, 6), 3)])
def test_neighbouring_buckets_have_colors_that_can_be_told_apart(method, size, least):
    for one in bucket_maps(method, size):
        for ids in (one.offsets(), one.around((2, 1, 3)[-len(size) :])):
            colors = one.colors(ids) * 255
            assert colors.shape == (*ids.shape, 3) and colors.min() >= 0 and colors.max() <= 255
            for axis in range(ids.dim()):
                differ = np.diff(ids.numpy(), axis=axis) != 0
                distance = np.abs(np.diff(colors, axis=axis)).max(-1)
                assert distance[~differ].max(initial=0) == 0
                assert distance[differ].min(initial=255) >= least


@pytest.mark.parametrize(("size", "count"), [((14, 9), 49), ((5, 4, 6), 245)])
def test_directed_maps_have_one_color_for_each_bucket(size, count):
    (one,) = bucket_maps("product", size)
    ids = one.offsets()
    color_of = {}
    for bucket, color in zip(ids.flatten().tolist(), one.colors(ids).reshape(-1, 3), strict=True):
        color_of.setdefault(bucket, set()).add(tuple(color.round(6)))
    assert all(len(colors) == 1 for colors in color_of.values())
    assert len(set.union(*color_of.values())) == len(color_of) == count


def test_one_frame_is_the_map_of_an_image():
    (video,), (image,) = bucket_maps("product", (1, 4, 6)), bucket_maps("product", (4, 6))
    steps = image.around((1, 2))
    assert torch.equal(video.around((0, 1, 2))[0], 3 * 49 + steps)  # of 7 x 49 buckets those of offset 0 in time
    assert np.array_equal(video.colors(video.around((0, 1, 2)))[0], image.colors(steps))


def test_frames_before_are_darker_and_frames_after_paler():
    (one,) = bucket_maps("product", (3, 4, 6))
    before, here, after = one.colors(one.around((1, 2, 3))).sum((1, 2, 3))
    assert before < 0.9 * here and after > 1.05 * here


def test_the_place_to_look_from():
    assert query_on((8, 14, 21)) == (3, 6, 9) and query_on((14, 21)) == (6, 9)
    assert query_on((8, 14, 21), (0, 5)) == (3, 0, 5) and query_on((8, 14, 21), (7, 0, 5)) == (7, 0, 5)
    with pytest.raises(ValueError, match="the query at row 0, column 4 is not on the map of 3x4 tokens"):
        query_on((3, 4), (0, 4))
    with pytest.raises(ValueError, match="frame 3, row 0, column 0 is not on the map of 3x4x6 tokens"):
        query_on((3, 4, 6), (3, 0, 0))


def test_wrong_values_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="unknown method"):
        bucket_maps("circle", (3, 4))
    with pytest.raises(ValueError, match="width=0"):
        bucket_maps("euc", (3, 0))
    with pytest.raises(ValueError, match="size=0; expected at least 1"):
        bucket_maps("euc", (0, 2, 3))
    with pytest.raises(ValueError, match=r"size=\(5,\); pictures are of \(height, width\)"):
        bucket_maps("euc", (5,))
