"""Tables under another number of axes: images that become videos, and back, and what is closest elsewhere."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from irpe import build_rpe, convert_tables, equip, get_bucket_ids, get_rpe_config, rpe_attention, rpe_config_from_string

FRAMES, HEIGHT, WIDTH, HEADS, DIM = 3, 2, 4, 2, 4


def filled(config, state=None):
    """Encodings on queries, keys and values, with random tables or with these."""
    module = nn.Module()
    module.rpe_q, module.rpe_k, module.rpe_v = build_rpe(config, DIM, HEADS, dtype=torch.float64)
    for table in module.parameters():
        nn.init.normal_(table)
    if state is not None:
        module.load_state_dict(state, strict=True)
    return module


def attend(module, q, k, v, size):
    with torch.no_grad():
        return rpe_attention(q, k, v, module.rpe_q, module.rpe_k, module.rpe_v, size=size)


def still(x, skip):
    """Tokens of an image, and those of a video of FRAMES such images; its prefix tokens as often."""
    prefix, cells = x[:, :, :skip], x[:, :, skip:]
    return torch.cat([prefix.repeat(1, 1, FRAMES, 1), cells.repeat(1, 1, FRAMES, 1)], 2)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("time", [None, 1.0, 4.0])
@pytest.mark.parametrize("method", ["product", "cross", "cross_rows"])
def test_inflated_tables_give_each_frame_of_a_still_video_what_the_image_had(method, time, shared, skip):
    old = get_rpe_config(1.9, method, "ctx", shared, skip, "qkv")
    ratio = 1.9 if time is None else (time, 1.9, 1.9)
    new = get_rpe_config(ratio, method, "ctx", shared, skip * FRAMES, "qkv", 3)
    image = filled(old)
    state = convert_tables(image.state_dict(), old, new)  # needs no size
    video = filled(new, state)
    q, k, v = torch.randn(3, 2, HEADS, skip + HEIGHT * WIDTH, DIM, dtype=torch.float64)
    expected = still(attend(image, q, k, v, (HEIGHT, WIDTH)), skip)
    got = attend(video, *(still(x, skip) for x in (q, k, v)), (FRAMES, HEIGHT, WIDTH))
    assert (got - expected).abs().max() <= 1e-12
    if method == "cross":
        assert all(
            (table == 0).all() == ("rp_depth" in name) for name, table in state.items() if skip == 0 or "rp_d" in name
        )


def test_inflated_biases():
    old = get_rpe_config(1.9, "product", "bias", False, 0, "qk")
    new = get_rpe_config(1.9, "product", "bias", False, 0, "qk", 3)
    image = filled(old)
    video = filled(new, convert_tables(image.state_dict(), old, new))
    q, k, v = torch.randn(3, 2, HEADS, HEIGHT * WIDTH, DIM, dtype=torch.float64)
    expected = still(attend(image, q, k, v, (HEIGHT, WIDTH)), 0)
    got = attend(video, *(still(x, 0) for x in (q, k, v)), (FRAMES, HEIGHT, WIDTH))
    assert (got - expected).abs().max() <= 1e-12


def test_a_prefix_token_that_is_not_repeated_weighs_less():
    """What the docstring says of `skip`: the output of a still video is not that of the image then."""
    old, new = get_rpe_config(skip=1), get_rpe_config(skip=1, ndim=3)
    image = filled(old)
    video = filled(new, convert_tables(image.state_dict(), old, new))
    q, k, v = torch.randn(3, 1, HEADS, 1 + HEIGHT * WIDTH, DIM, dtype=torch.float64)
    expected = attend(image, q, k, v, (HEIGHT, WIDTH))
    once = (torch.cat([x[:, :, :1], still(x, 1)[:, :, FRAMES:]], 2) for x in (q, k, v))
    got = attend(video, *once, (FRAMES, HEIGHT, WIDTH))
    assert (got[:, :, 0] - expected[:, :, 0]).abs().max() > 1e-3


class ViT(nn.Module):
    """A vision transformer on images (B, 3, h, w), or with `frames` on videos (B, 3, t, h, w), with mean pooling."""

    def __init__(self, frames=None, tubelet=2):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4) if frames is None else nn.Conv3d(3, 8, (tubelet, 4, 4), (tubelet, 4, 4))
        self.positions = nn.Parameter(torch.randn(1, HEIGHT * WIDTH, 8))
        self.frames = 1 if frames is None else frames // tubelet
        layer = nn.TransformerEncoderLayer(8, HEADS, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions.repeat(1, self.frames, 1)
        return self.head(self.encoder(x).mean(1))


def test_a_model_of_images_becomes_one_of_videos():
    old, new = "rpe-1.9-product-ctx-0-qkv", "rpe-1.0x1.9x1.9-product-ctx-0-qkv-3d"
    images = equip(ViT(), old, grid=(HEIGHT, WIDTH)).double().eval()
    for one in images.parameters():
        nn.init.normal_(one, std=0.5)
    state = convert_tables(images.state_dict(), old, new)
    state["patch.weight"] = state["patch.weight"].unsqueeze(2).repeat(1, 1, 2, 1, 1) / 2
    videos = equip(ViT(2 * FRAMES), new, grid=(FRAMES, HEIGHT, WIDTH)).double().eval()
    videos.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, 4 * HEIGHT, 4 * WIDTH, dtype=torch.float64)
    video = image.unsqueeze(2).repeat(1, 1, 2 * FRAMES, 1, 1)
    assert (videos(video) - images(image)).abs().max() <= 1e-12
    plain = ViT(2 * FRAMES).double().eval()  # and the tables have a say in it
    plain.load_state_dict({key: one for key, one in state.items() if "lookup" not in key})
    assert (plain(video) - images(image)).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["product", "cross_rows", "cross", "euc"])
def test_a_model_of_videos_becomes_one_of_images(method):
    """Its tables say of an image what they said of a video of one frame."""
    old, new = (get_rpe_config(1.9, method, skip=1, rpe_on="qkv", ndim=ndim) for ndim in (3, 2))
    video = filled(old)
    size = None if method in ("product", "cross_rows") else (HEIGHT, WIDTH)
    image = filled(new, convert_tables(video.state_dict(), old, new, size=size))
    q, k, v = torch.randn(3, 2, HEADS, 1 + HEIGHT * WIDTH, DIM, dtype=torch.float64)
    expected = attend(video, q, k, v, (1, HEIGHT, WIDTH))
    assert (attend(image, q, k, v, (HEIGHT, WIDTH)) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("method", ["product", "cross"])
def test_there_and_back(method):
    old, new = (get_rpe_config(1.9, method, skip=1, rpe_on="qkv", ndim=ndim) for ndim in (2, 3))
    image = filled(old).state_dict()
    options = {} if method == "product" else dict(size=(HEIGHT, WIDTH))
    back = convert_tables(convert_tables(image, old, new), new, old, **options)
    assert back.keys() == image.keys()
    if method == "product":
        assert all(torch.equal(back[key], image[key]) for key in image)
    q, k, v = torch.randn(3, 2, HEADS, 1 + HEIGHT * WIDTH, DIM, dtype=torch.float64)
    got, expected = (attend(filled(old, tables), q, k, v, (HEIGHT, WIDTH)) for tables in (back, image))
    assert (got - expected).abs().max() <= 1e-12


def pairs_matrix(single, size):
    """One row for each pair of tokens, one column for each bucket."""
    cells = torch.tensor(list(itertools.product(*map(range, size))))
    names = ("cross_time", "cross_depth", "cross_rows", "cross_cols")[-single.ndim :]
    methods = names if single.method.name == "CROSS" else [single.method]
    columns = []
    for method in methods:
        own = cells[:, -single.ndim :]
        ids, count = get_bucket_ids(method, own, own, 0, single.alpha, single.beta, single.gamma)
        columns.append(nn.functional.one_hot(ids.flatten(), count))
    return torch.cat(columns, 1).double()


def table_of(state):
    return torch.cat([table[0].T for name, table in state.items() if name.startswith("rpe_k")])


@pytest.mark.parametrize(
    ("old", "new", "size"),
    [
        ("rpe-1.9-product-ctx-1-k-3d", "rpe-1.2-product-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-1.9-product-ctx-1-k-3d", "rpe-1.9-cross-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-1.2x1.9x1.9-product-ctx-1-k-3d", "rpe-1.0x1.9x2.5-cross-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-1.0x1.9x2.5-cross-ctx-1-k-3d", "rpe-1.9-product-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-1.9-product-ctx-1-k-3d", "rpe-3.0-euc-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-3.0-euc-ctx-1-k", "rpe-9.0-quant-ctx-1-k-3d", (3, 2, 4)),
        ("rpe-1.9-product-ctx-1-k-1d", "rpe-1.0-product-ctx-1-k-1d", (9,)),
        ("rpe-1.9-euc-ctx-1-k-1d", "rpe-1.9-product-ctx-1-k", (3, 4)),
        ("rpe-1.9-product-ctx-1-k-4d", "rpe-1.2-cross-ctx-1-k-4d", (2, 2, 1, 3)),
    ],
)
def test_no_tables_are_closer(old, new, size):
    state = filled(rpe_config_from_string(old)).state_dict()
    got = convert_tables(state, old, new, size=size)
    wanted = pairs_matrix(rpe_config_from_string(old).rpe_k, size) @ table_of(state)
    matrix = pairs_matrix(rpe_config_from_string(new).rpe_k, size)
    best = matrix @ torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
    assert (matrix @ table_of(got) - best).abs().max() <= 1e-10
    filled(rpe_config_from_string(new), got)  # fits


def test_finer_buckets_change_nothing():
    old, new, size = get_rpe_config(1.2, ndim=3), get_rpe_config((3.0, 2.0, 5.0), ndim=3), (3, 2, 4)
    coarse = filled(old)
    fine = filled(new, convert_tables(coarse.state_dict(), old, new, size=size))
    q, k, v = torch.randn(3, 2, HEADS, math.prod(size), DIM, dtype=torch.float64)
    assert (attend(coarse, q, k, v, size) - attend(fine, q, k, v, size)).abs().max() <= 1e-12


def test_the_given_tables_are_left_alone():
    old, new = get_rpe_config(), get_rpe_config(ndim=3)
    state = filled(old).state_dict()
    before = copy.deepcopy(state)
    result = convert_tables(state, old, new)
    result["rpe_k.lookup_table_weight"].zero_()
    assert all(torch.equal(state[key], one) for key, one in before.items())


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        ("rpe-1.9-product-ctx-1-k", "rpe-2.5-product-ctx-1-k-3d", {}, "or axes that cannot be copied.*or size="),
        ("rpe-1.9-euc-ctx-1-k", "rpe-1.9-euc-ctx-1-k-3d", {}, "axes that cannot be copied"),
        ("rpe-1.9-product-ctx-1-k", "rpe-2.5-product-ctx-1-k-3d", dict(height=2, width=4), r"\(2, 4\), but.*ndim=3"),
        ("rpe-1.9-product-ctx-1-k", "rpe-2.5-product-ctx-1-k-3d", dict(size=8), r"size=\(8,\), but.*ndim=3"),
        ("rpe-1.9-product-ctx-1-k", "rpe-2.5-product-ctx-1-k", dict(height=2, width=4, size=(2, 4)), "or size alone"),
        (
            "rpe-1.9-product-ctx-1-k",
            "rpe-2.5-product-ctx-1-k-3d",
            dict(size=(0, 2, 4)),
            r"size\[0\]=0; expected at least 1",
        ),
        ("rpe-2.5-product-ctx-1-k-3d", "rpe-2.5-product-ctx-1-k", {}, "old_config has 1331 or 1332 buckets"),
    ],
)
def test_what_cannot_be_converted(old, new, options, message):
    state = filled(rpe_config_from_string(old.removesuffix("-3d"))).state_dict()
    with pytest.raises(ValueError, match=message):
        convert_tables(state, old, new, **options)
