"""Real digits that move: which of eight directions, told by a small transformer on (frames, rows, columns) of tokens.

    python benchmarks/moving.py --out benchmarks/results           # `make moving`
    python benchmarks/moving.py --tune --out benchmarks/results    # the choice of the learning rates, on validation images

scikit-learn's handwritten digits, training and test digits apart, move by two pixels a frame over an empty canvas. Sides
differ in how they know positions. Where the digit is in the middle of a clip does not depend on its direction, so the
place alone says nothing, and a clip played backwards is one of the opposite direction: who does not see the order of
frames is right at most half of the time.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from irpe import RPEMultiheadAttention, digits, paired

DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # (rows, columns), by class
STEP, PATCH = 2, 4  # pixels: a digit's way from frame to frame, and the side of a token
NONE, ABSOLUTE = "none", "absolute"
# ratio 0.4 has one bucket for all offsets in time: rows and columns alone count
PLANE, SPACE, SPACE_QKV = (
    "rpe-0.4x1.9x1.9-product-ctx-1-k-3d",
    "rpe-1.9-product-ctx-1-k-3d",
    "rpe-1.9-product-ctx-1-qkv-3d",
)
TITLES = {
    NONE: "none",
    ABSOLUTE: "learned absolute",
    PLANE: "2D iRPE on k",
    SPACE: "3D iRPE on k",
    SPACE_QKV: "3D iRPE on q, k, v",
}
DIM, DEPTH, HEADS = 32, 2, 2


class Size(NamedTuple):
    """Of a clip: frames, and height and width of a canvas in pixels."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self):
        return (self.frames, self.height // PATCH, self.width // PATCH)

    def __str__(self):
        return f"{self.frames}x{self.height}x{self.width}"


TRAIN = Size(4, 16, 20)
TESTS = (TRAIN, Size(4, 16, 32), Size(6, 20, 28))


def clips(data: digits.Digits, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, (frames, height, width) = len(data.images), size
    labels = torch.randint(len(DIRECTIONS), (n,), generator=generator)
    way = STEP * (frames - 1)
    half = way // 2
    row = torch.randint(half, height - digits.HEIGHT - half + 1, (n,), generator=generator)
    column = torch.randint(half, width - digits.HEIGHT - half + 1, (n,), generator=generator)
    ahead = torch.tensor(DIRECTIONS)[labels]
    moved = STEP * torch.arange(frames) - half
    rows = row[:, None, None] + moved[:, None] * ahead[:, :1, None] + torch.arange(digits.HEIGHT)
    columns = column[:, None, None] + moved[:, None] * ahead[:, 1:, None] + torch.arange(digits.HEIGHT)
    videos = torch.zeros(n, frames, height, width)
    videos[
        torch.arange(n)[:, None, None, None], torch.arange(frames)[:, None, None], rows[..., None], columns[:, :, None]
    ] = data.images.expand(-1, frames, -1, -1)
    return videos, labels


class Block(nn.Module):
    def __init__(self, rpe):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = RPEMultiheadAttention(DIM, HEADS, batch_first=True, rpe_config=rpe)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x, size):
        y = self.norm1(x)
        kw = {"size": size} if self.attn.rpe_k is not None else {}
        x = x + self.attn(y, y, y, need_weights=False, **kw)[0]
        return x + self.mlp(self.norm2(x))


class Mover(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, DIM)
        t, h, w = TRAIN.tokens
        if side == ABSOLUTE:
            self.pos_time = nn.Parameter(torch.empty(1, DIM, t))
            self.pos_space = nn.Parameter(torch.empty(1, DIM, h, w))
            nn.init.trunc_normal_(self.pos_time, std=0.02)
            nn.init.trunc_normal_(self.pos_space, std=0.02)
        else:
            self.pos_time = self.pos_space = None
        self.blocks = nn.ModuleList(Block(None if side in (NONE, ABSOLUTE) else side) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, len(DIRECTIONS))

    def forward(self, v):
        B, T, H, W = v.shape
        size = (T, H // PATCH, W // PATCH)
        x = v.view(B, T, size[1], PATCH, size[2], PATCH).permute(0, 1, 2, 4, 3, 5).flatten(4)
        x = self.embed((x - 0.3) / 0.38)
        if self.pos_time is not None:
            tm, sp = self.pos_time, self.pos_space
            if T != tm.shape[-1]:
                tm = F.interpolate(tm, T, mode="linear", align_corners=True)
            if size[1:] != sp.shape[2:]:
                sp = F.interpolate(sp, size[1:], mode="bicubic", antialias=True)
            x = x + tm.transpose(1, 2)[:, :, None, None] + sp.permute(0, 2, 3, 1)[:, None]
        x = x.flatten(1, 3)
        for b in self.blocks:
            x = b(x, size)
        return self.head(self.norm(x.mean(1)))


@dataclass(frozen=True)
class Run:
    side: str
    seed: int
    lr: float
    epochs: int = 20
    batch_size: int = 64
    fit_on: str = "train"
    test_on: str = "test"


def fit(run, on_epoch=lambda e: None):
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(run.seed)
    gen = torch.Generator().manual_seed(run.seed)
    data = digits.splits()[run.fit_on]
    tests = {str(s): clips(digits.splits()[run.test_on], s, torch.Generator().manual_seed(1)) for s in TESTS}
    model = Mover(run.side)
    dec = [p for n, p in model.named_parameters() if p.ndim > 1 and "lookup" not in n and "pos_" not in n]
    ids = {id(p) for p in dec}
    nod = [p for p in model.parameters() if id(p) not in ids]
    opt = torch.optim.AdamW([dict(params=dec, weight_decay=0.05), dict(params=nod, weight_decay=0.0)], lr=run.lr)
    n = len(data.labels)
    sch = torch.optim.lr_scheduler.OneCycleLR(opt, run.lr, total_steps=run.epochs * math.ceil(n / run.batch_size))
    acc = {k: [] for k in tests}
    for epoch in range(1, run.epochs + 1):
        model.train()
        v, l = clips(data, TRAIN, gen)
        for b in torch.randperm(n, generator=gen).split(run.batch_size):
            loss = F.cross_entropy(model(v[b]), l[b])
            opt.zero_grad()
            loss.backward()
            opt.step()
            sch.step()
        if epoch == run.epochs or epoch % 10 == 0:
            model.eval()
            with torch.inference_mode():
                for k, (v, l) in tests.items():
                    r = sum(int((model(a).argmax(-1) == b).sum()) for a, b in zip(v.split(200), l.split(200)))
                    acc[k].append(100 * r / len(l))
        on_epoch(epoch)
    return asdict(run) | dict(
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=acc,
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
    )


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    ep = int(os.environ.get("EP", 20))
    for side in os.environ.get("SIDES", ",".join(TITLES)).split(","):
        for lr in map(float, os.environ.get("LRS", "0.004").split(",")):
            r = fit(Run(side, 0, lr, ep))
            print(
                side,
                lr,
                {k: [round(x) for x in v] for k, v in r["accuracy"].items()},
                r["parameters"],
                round(r["cpu_seconds"], 1),
                round(r["seconds"], 1),
                flush=True,
            )
