# ruff: noqa: N803 (B, H and D are sizes)
"""The CUDA kernels of rpe_attention, compiled for the host: `on_host/cuda.h` and `on_host/warp.h` emulate blocks.

Every result is NaN beforehand, as is what shared memory holds.
"""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from irpe.irpe import get_bucket_map
from rpe_ops.rpe_attention import rpe_attention

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.slow,  # most of it a compiler's time
    pytest.mark.skipif(
        COMPILER is None or not sys.platform.startswith("linux"), reason="no C++ compiler, or no fibers that are known"
    ),
]
DTYPES = {torch.float16: b"h", torch.bfloat16: b"b"}
ORDERS = RISING, FALLING, SHUFFLED = range(3)
RESULTS = ("out", "grad_q", "grad_k", "grad_v")
PLACES = 8
INT, INT64, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def fields(kind, names):
    return [(name, kind) for name in names.split()]


class Heads(ctypes.Structure):
    _fields_ = [*fields(POINTER, "data"), *fields(INT64, "b h"), *fields(INT, "l")]


class Encoding(ctypes.Structure):
    _fields_ = [
        *fields(POINTER, "axes weights"),
        *fields(ctypes.c_bool, "is_float"),
        *fields(INT64, "h d n"),
        *fields(INT, "rows columns buckets"),
        *fields(POINTER, "far sums"),
    ]


class Geometry(ctypes.Structure):
    _fields_ = fields(INT, "height width skip length up free_rows groups across free_slots rows_end chunks")


class Attention(ctypes.Structure):
    _fields_ = [
        *fields(Geometry, "map"),
        *fields(INT, "batch heads head_pieces"),
        *fields(ctypes.c_float, "scale"),
        *fields(Encoding, "on_q on_k on_v"),
        *fields(Heads, "q k v out grad_out grad_q grad_k grad_v"),
        *fields(POINTER, "lse delta"),
    ]


class TableGradient(ctypes.Structure):
    _fields_ = [
        *fields(Heads, "x"),
        *fields(POINTER, "sums"),
        *fields(Encoding, "e"),
        *fields(POINTER, "grad"),
        *fields(ctypes.c_float, "factor"),
    ]


class TableGradients(ctypes.Structure):
    _fields_ = [
        *fields(TableGradient * 3, "of"),
        *fields(INT, "count heads pieces length"),
        *fields(INT64, "tokens"),
        *fields(INT, "splits"),
        *fields(ctypes.c_bool, "skips"),
        *fields(POINTER, "parts"),
    ]


class Options(ctypes.Structure):
    _fields_ = fields(INT64, "warps parts order is_known")


def build(library):
    flags = os.environ.get("RPE_OPS_CXXFLAGS", "-O2").split()
    if "-fsanitize=address" in flags:  # fibers have stacks of their own
        flags += ["--param", "asan-stack=0"]
    command = [COMPILER, "-std=c++17", *flags, "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    source = ROOT / "tests" / "on_host" / "rpe_attention.cpp"
    subprocess.run([*command, f"-I{ROOT / 'tests'}", source, "-o", library], check=True)


@pytest.fixture(scope="module")
def kernels(made_once):
    return ctypes.CDLL(str(made_once("rpe_attention_on_host.so", build)))


def heads_of(x):
    assert x.stride(-1) == 1
    return Heads(x.data_ptr(), *x.stride()[:3])


def buckets_of_places(map):
    """(64, N) of 0 and 1: the bucket of each place (g, c)."""
    rows = (map.num_buckets - (map.skip > 0)) // map.columns
    ones = torch.zeros(PLACES, PLACES, map.num_buckets, dtype=torch.float64)
    for g in range(PLACES):
        for c in range(PLACES):
            if g < rows and c < map.columns:
                ones[g, c, g * map.columns + c] = 1
            elif map.skip:
                ones[g, c, -1] = 1
    return ones.flatten(0, 1)


class Problem:
    """q, k, v, grad_out, and on q, k, v each a map and its W, or None; `check` holds the kernels against the law."""

    def __init__(self, grid, on, dtype, B=2, H=2, D=64, ratio=1.9, shared=False, table_dtype=None, layout="timm"):
        torch.manual_seed(0)
        self.height, self.width, self.skip = grid
        L = self.skip + self.height * self.width
        self.dtype, self.B, self.H, self.L, self.D = dtype, B, H, L, D
        self.scale = D**-0.5
        if layout == "timm":
            q, k, v, grad = torch.randn(B, L, 4, H, D).to(dtype).permute(2, 0, 3, 1, 4)
        elif layout == "detr":
            q, k, v, grad = (torch.randn(L, B, H, D).to(dtype).permute(1, 2, 0, 3) for _ in range(4))
        else:  # rows with something else behind them
            q, k, v, grad = torch.randn(4, B, H, L, D + 8).to(dtype)[..., :D]
        self.q, self.k, self.v, self.grad = q, k, v, grad
        self.maps, self.tables = {}, {}
        for letter, method in on.items():
            map = get_bucket_map(method, (self.height, self.width), self.skip, ratio, 2 * ratio, 8 * ratio)
            shape = (1 if shared else H, D, map.num_buckets)
            W = torch.randn(shape).to(table_dtype or dtype)
            self.maps[letter], self.tables[letter] = map, W.transpose(1, 2).contiguous() if letter == "v" else W

    def law(self):
        """Names to what the kernels have to find, in float64 from the same inputs, and to how large its terms are."""
        q, k, v = (x.double().requires_grad_() for x in (self.q, self.k, self.v))
        W = {letter: W.to(self.dtype).double().requires_grad_() for letter, W in self.tables.items()}
        luts = {letter: self.scale * x @ W[letter] for letter, x in (("q", k), ("k", q)) if letter in W}
        for lut in luts.values():
            lut.retain_grad()
        on_q, on_k = ([(luts[letter], self.maps[letter])] if letter in luts else [] for letter in "qk")
        on_v = [(self.maps["v"], self.maps["v"].num_buckets)] if "v" in W else []
        out, sums = rpe_attention(q, k, v, on_q, on_k, on_v, scale=self.scale, backend="eager")
        if sums:
            out = out + sums[0] @ W["v"]
        out.backward(self.grad.double())
        p, lse, grad_p = self.weights({letter: table.detach() for letter, table in W.items()})
        found = dict(out=out.detach(), lse=lse, grad_q=q.grad, grad_k=k.grad, grad_v=v.grad)
        found |= {f"sums_{letter}": lut.grad for letter, lut in luts.items()}
        if sums:
            found["sums_v"] = sums[0].detach()
        found |= {f"grad_W{letter}": table.grad for letter, table in W.items()}
        sizes = {name: x.abs().max() for name, x in found.items()}
        for letters, dim in (("qk", -1), ("kq", -2)):  # of sums that may cancel
            terms = (p * grad_p).norm(dim=dim)
            for name in (f"grad_{letters[0]}", f"sums_{letters[1]}"):
                if name in sizes:
                    sizes[name] = max(sizes[name], terms.max())
            if letters[1] in W:
                sizes[f"grad_W{letters[1]}"] = max(sizes[f"grad_W{letters[1]}"], self.scale * terms.norm())
        return found, sizes

    def weights(self, W):
        """The attention weights and the log of what divides them, and the gradient of the weights."""
        scores = self.scale * self.q.double() @ self.k.double().transpose(-2, -1)
        grad = self.grad.double() @ self.v.double().transpose(-2, -1)
        if "k" in W:
            scores = scores + self.looked_up("k", self.scale * self.q.double() @ W["k"])
        if "q" in W:
            scores = scores + self.looked_up("q", self.scale * self.k.double() @ W["q"]).transpose(-2, -1)
        if "v" in W:
            grad = grad + self.looked_up("v", self.grad.double() @ W["v"].transpose(-2, -1))
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp(), lse, grad

    def looked_up(self, letter, table):
        ids = self.maps[letter].ids(torch.long)
        return table.gather(-1, ids.expand(self.B, self.H, *ids.shape))

    def run(self, kernels, warps=2, order=SHUFFLED, is_known=True, parts=1, splits=2, trains=True):
        """The same names to what the kernels find. What lies between rows and heads of results stays as it is."""
        shape = (self.B, self.H, self.L)
        wide = torch.full((self.B, self.L, 4, self.H + 1, self.D + 8), torch.nan, dtype=self.dtype)
        results = wide.permute(2, 0, 3, 1, 4)[:, :, : self.H, :, : self.D]
        named = dict(zip(RESULTS, results, strict=True))
        found = {name: torch.full(shape, torch.nan) for name in ("lse", "delta")}
        a = Attention(map=Geometry(self.height, self.width, self.skip), batch=self.B, heads=self.H)
        a.head_pieces, a.scale = self.D // 8, self.scale
        for name, x in (named | dict(q=self.q, k=self.k, v=self.v, grad_out=self.grad)).items():
            setattr(a, name, heads_of(x))
        a.lse, a.delta = found["lse"].data_ptr(), found["delta"].data_ptr()
        fars = {letter: torch.full((*shape, PLACES**2), torch.nan, dtype=self.dtype) for letter in self.maps}
        all = TableGradients(count=len(self.maps), heads=self.H, pieces=self.D // 8, length=self.L)
        all.tokens, all.splits, all.skips = self.B * self.L, splits, self.skip > 0
        for n, (letter, map) in enumerate(sorted(self.maps.items(), key=lambda item: "qkv".index(item[0]))):
            W = self.tables[letter].expand(self.H, -1, -1)
            sums = found[f"sums_{letter}"] = torch.full_like(fars[letter], torch.nan)
            grad = found[f"grad_W{letter}"] = torch.full_like(W, torch.nan, memory_format=torch.contiguous_format)
            e = self.encoding(letter, map, W)
            e.far, e.sums = fars[letter].data_ptr(), sums.data_ptr() if trains else None
            setattr(a, f"on_{letter}", e)
            x = dict(q=self.k, k=self.q, v=self.grad)[letter]
            factor = 1.0 if letter == "v" else self.scale
            all.of[n] = TableGradient(
                heads_of(x), sums.data_ptr(), self.encoding(letter, map, grad), grad.data_ptr(), factor
            )
        kind, options = ctypes.c_char(DTYPES[self.dtype]), Options(warps, parts, order, is_known)
        kernels.forward_on_host(kind, ctypes.byref(a), ctypes.byref(options))
        if trains:
            kernels.backward_on_host(kind, ctypes.byref(a), ctypes.byref(options), ctypes.byref(all))
        found |= {name: x.clone() for name, x in named.items()}
        results[:] = torch.nan
        assert wide.isnan().all()
        return found

    @staticmethod
    def encoding(letter, map, W):
        h, d, n = W.stride() if letter != "v" else (W.stride(0), W.stride(2), W.stride(1))
        sizes = ((map.num_buckets - (map.skip > 0)) // map.columns, map.columns, map.num_buckets)
        return Encoding(map.offsets.data_ptr(), W.data_ptr(), W.dtype == torch.float32, h, d, n, *sizes)

    def errors(self, found):
        """Of each result the largest error, in units of eps of the size of its terms."""
        errors, (law, sizes) = {}, self.law()
        for name, exact in law.items():
            x = found[name].double()
            if name[:4] == "sums":
                x = x @ buckets_of_places(self.maps[name[-1]])
            if name[:6] == "grad_W" and len(exact) == 1:
                x = x.sum(0, keepdim=True)  # heads that share W: as torch does it behind expand
            errors[name] = ((x - exact).abs().max() / sizes[name] / torch.finfo(self.dtype).eps).item()
        return errors

    def check(self, kernels, **options):
        errors = self.errors(self.run(kernels, **options))
        assert all(error <= 4 for error in errors.values()), errors


ALL = dict(q="product", k="product", v="product")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("letters", ["", "q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_the_law_of_any_encodings(kernels, letters, dtype):
    Problem((14, 13, 1), dict.fromkeys(letters, "product"), dtype, B=1).check(kernels)
    Problem((5, 7, 0), dict.fromkeys(letters, "product"), dtype, D=32, H=1).check(kernels)


@pytest.mark.parametrize("skip", [0, 1, 5, 40])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (16, 9), (3, 33), (9, 40), (17, 4), (1, 20), (20, 1), (1, 1)])
def test_any_grid_and_tokens_before_it(kernels, height, width, skip):
    dtype = torch.bfloat16 if (height + skip) % 2 else torch.float16
    Problem((height, width, skip), ALL, dtype, B=1, H=1, D=32).check(kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head", "warps"), [(8, 1), (32, 8), (40, 2), (64, 4), (80, 3), (96, 1), (128, 2)])
def test_any_head_size_and_warps(kernels, head, warps, dtype):
    Problem((6, 11, 5), ALL, dtype, D=head).check(kernels, warps=warps)


@pytest.mark.parametrize("layout", ["timm", "detr", "gaps"])
@pytest.mark.parametrize("table_dtype", [None, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_tables_and_layouts(kernels, shared, table_dtype, layout):
    options = dict(shared=shared, table_dtype=table_dtype, layout=layout, dtype=torch.bfloat16)
    Problem((7, 5, 1), ALL, **options).check(kernels)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.9])
@pytest.mark.parametrize(
    "on",
    [
        dict(q="cross_rows", k="cross_cols", v="product"),
        dict(q="cross_cols", k="product", v="cross_rows"),
        dict(q="product", k="cross_rows", v="cross_cols"),
    ],
)
def test_every_map_that_factors(kernels, on, ratio):
    for grid in ((9, 6, 0), (4, 19, 1)):
        Problem(grid, on, torch.float16, B=1, ratio=ratio).check(kernels)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_block_takes_samples_in_turn(kernels, parts):
    for on in (ALL, dict(k="product")):
        Problem((3, 17, 1), on, torch.float16, B=3, D=32).check(kernels, parts=parts, splits=parts)


@pytest.mark.parametrize("letters", ["k", "qkv"])
def test_neither_order_nor_blocks_change_a_bit(kernels, letters):
    problem = Problem((18, 9, 5), dict.fromkeys(letters, "product"), torch.float16, H=1)
    first = problem.run(kernels)
    for order in ORDERS:
        for warps in (1, 3, 8):
            again = problem.run(kernels, warps=warps, order=order, is_known=warps > 1, parts=1 + warps % 2)
            assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_gradients_of_tables_in_any_number_of_parts(kernels, splits):
    """Of 1 to 3 stages of 32 tokens, and of none."""
    Problem((6, 5, 1), ALL, torch.bfloat16, B=3, D=80).check(kernels, splits=splits)


def test_bucket_sums_of_weights_are_left_out_where_nobody_wants_them(kernels):
    problem = Problem((5, 7, 1), ALL, torch.float16)
    found, without = problem.run(kernels), problem.run(kernels, trains=False)
    assert torch.equal(found["out"], without["out"]) and without["sums_v"].isnan().all()


@pytest.mark.parametrize("largest", [6.0, 30.0])
def test_large_scores(kernels, largest):
    """The largest score of a row is its last or its first, by chance, and far above the smallest."""
    problem = Problem((11, 6, 1), dict(k="product", v="product"), torch.bfloat16)
    ramp = torch.linspace(-largest, largest, problem.L).view(1, 1, -1, 1)
    problem.q = torch.randn_like(problem.q[..., :1]).sign() * torch.ones_like(problem.q)
    problem.k = (ramp + 0 * problem.k).to(problem.dtype)
    problem.check(kernels)
