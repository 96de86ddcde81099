"""Real digits that move: a small transformer on (frames, rows, columns) of tokens tells in which of eight directions.

    python benchmarks/moving.py --out benchmarks/results           # `make moving`
    python benchmarks/moving.py --tune --out benchmarks/results    # the learning rates, on validation images

scikit-learn's handwritten digits, training and test digits apart, move over an empty canvas by two pixels a frame.
Sides differ in how they know positions. Where the digit is in the middle of a clip does not depend on its direction,
and a clip played backwards is one of the opposite direction, so who does not see the order of frames is right half of
the time at most.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from irpe import RPEMultiheadAttention, digits, paired
from irpe.cli.common import console, write_json
from irpe.cli.demo import fit_with_progress, gained, scores
from irpe.irpe import get_bucket_map

DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # (rows, columns), by class
STEP, PATCH = 2, 4  # pixels: a digit's way from frame to frame, and the side of a token
NONE, ABSOLUTE = "none", "absolute"
PLANE = "rpe-0.4x1.9x1.9-product-ctx-1-k-3d"  # this ratio has one bucket for all offsets in time
SPACE, SPACE_QKV = "rpe-1.9-product-ctx-1-k-3d", "rpe-1.9-product-ctx-1-qkv-3d"
TITLES = {NONE: "none", ABSOLUTE: "learned absolute", PLANE: "2D iRPE on k", SPACE: "3D iRPE on k"}
TITLES |= {SPACE_QKV: "3D iRPE on q, k, v"}
PAIRS = ((SPACE, ABSOLUTE), (SPACE_QKV, ABSOLUTE), (SPACE, PLANE), (SPACE_QKV, SPACE))
GRID = (4e-3, 8e-3, 1.6e-2)  # learning rates that every side was offered
RATES = {NONE: 4e-3, ABSOLUTE: 4e-3, PLANE: 1.6e-2, SPACE: 1.6e-2, SPACE_QKV: 4e-3}  # and what `best_rates` chose
TUNE_SEEDS = (100,)
MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
CAPTION = (
    "weights: their number; lr: peak learning rate; s: seconds of one run. Tests are frames x height x width in pixels."
)


class Size(NamedTuple):
    """Of a clip: frames, and the canvas in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.frames, self.height // PATCH, self.width // PATCH


TRAIN = Size(3, 12, 16)
TESTS = (TRAIN, Size(3, 12, 32), Size(5, 20, 24))


def clips(data: digits.Digits, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos (N, frames, height, width) in [0, 1], one of each digit, and the direction (N,) of each.

    The place in the middle of a clip is any from which all directions stay on the canvas.
    """
    half = STEP * (size.frames - 1) // 2
    if min(size[1:]) < digits.HEIGHT + 2 * half:
        raise ValueError(f"a canvas of {size} pixels; in {size.frames} frames a digit needs {digits.HEIGHT + 2 * half}")
    count = len(data.images)
    labels = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    middle = torch.stack(
        [
            torch.randint(half, side - digits.HEIGHT - half + 1, (count,), generator=generator)
            for side in (size.height, size.width)
        ]
    )  # (2, N)
    way = STEP * torch.arange(size.frames) - half  # (frames,)
    at = middle[..., None] + torch.tensor(DIRECTIONS)[labels].T[..., None] * way  # (2, N, frames)
    rows, columns = at[..., None] + torch.arange(digits.HEIGHT)  # (N, frames, 8) each
    videos = data.images.new_zeros(count, *size)
    clip, frame = torch.arange(count)[:, None, None, None], torch.arange(size.frames)[:, None, None]
    videos[clip, frame, rows[..., None], columns[..., None, :]] = data.images.expand(-1, size.frames, -1, -1)
    return videos, labels


class Block(nn.Module):
    """x + attention, + MLP, normalised before."""

    def __init__(self, rpe: str | None) -> None:
        super().__init__()
        dim = MODEL["embed_dim"]
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = RPEMultiheadAttention(dim, MODEL["num_heads"], batch_first=True, rpe_config=rpe)
        hidden = MODEL["mlp_ratio"] * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.encoded = rpe is not None

    def forward(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False, **({"size": size} if self.encoded else {}))[0]
        return x + self.mlp(self.norm2(x))


class Mover(nn.Module):
    """Videos (B, frames, height, width) to scores of directions: patches, blocks, the largest value over tokens.

    Learned absolute positions are the sum of a table of frames and one of the canvas, resampled to other sizes.
    """

    def __init__(self, side: str) -> None:
        super().__init__()
        dim, (frames, height, width) = MODEL["embed_dim"], TRAIN.tokens
        self.embed = nn.Linear(PATCH * PATCH, dim)
        rpe = None if side in (NONE, ABSOLUTE) else side
        self.blocks = nn.ModuleList(Block(rpe) for _ in range(MODEL["depth"]))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(DIRECTIONS))
        # last, so that a seed gives all sides the same weights before
        self.pos_time = self.pos_space = None
        if side == ABSOLUTE:
            self.pos_time = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, frames), std=0.02))
            self.pos_space = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, height, width), std=0.02))

    def forward(self, videos: Tensor) -> Tensor:
        size = Size(*videos.shape[1:]).tokens
        tiles = videos.unflatten(2, (size[1], PATCH)).unflatten(4, (size[2], PATCH))  # (B, T, h, 4, w, 4)
        x = self.embed((tiles.transpose(3, 4).flatten(4) - 0.3) / 0.38)  # (B, T, h, w, D)
        if self.pos_time is not None:
            time_, space = self.pos_time, self.pos_space
            if size != TRAIN.tokens:
                time_ = F.interpolate(time_, size[0], mode="linear", align_corners=True)
                space = F.interpolate(space, size[1:], mode="bicubic", antialias=True)
            x = x + time_.transpose(1, 2)[:, :, None, None] + space.movedim(1, -1)[:, None]
        x = x.flatten(1, 3)
        for block in self.blocks:
            x = block(x, size)
        return self.head(self.norm(x).amax(1))  # a mean would be thinned by empty tokens


@dataclass(frozen=True)
class Run(paired.Run):
    """One training of a side."""

    epochs: int = 16


def fit(run: Run, on_epoch: Callable[[int], None] = lambda epoch: None) -> dict[str, Any]:
    """Trains one model on new clips in each epoch, which are the same for all sides, and tests it at the end.

    Returns:
        The fields of `run`; "parameters"; "accuracy" {size: [percent]}, on clips that are the same for all runs; "loss"
        (mean of every epoch), "seconds" (wall), "cpu_seconds"; "state" {name: numpy array}.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(run.seed)
    drawn = torch.Generator().manual_seed(run.seed)
    parts = digits.splits()
    data = digits.Digits(*(part[: run.limit] for part in parts[run.fit_on]))
    model = Mover(run.side)
    optimizer = torch.optim.AdamW(paired.parameter_groups(model), lr=run.lr)
    steps = run.epochs * math.ceil(len(data.labels) / run.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=steps)
    losses = []
    for epoch in range(1, run.epochs + 1):
        videos, labels = clips(data, TRAIN, drawn)
        batches = torch.randperm(len(labels), generator=drawn).split(run.batch_size)
        losses.append(paired.train_epoch(model, optimizer, schedule, videos, labels, batches))
        if epoch < run.epochs:
            on_epoch(epoch)
    tested = {str(size): [accuracy(model, *test_clips(run.test_on, size))] for size in TESTS}
    on_epoch(run.epochs)
    return asdict(run) | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "accuracy": tested,
        "loss": losses,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "state": {name: weight.numpy() for name, weight in model.state_dict().items()},
    }


def test_clips(part: str, size: Size) -> tuple[Tensor, Tensor]:
    """A clip of each digit of a part, always the same one."""
    return clips(digits.splits()[part], size, torch.Generator().manual_seed(1000))


def accuracy(model: nn.Module, videos: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent."""
    with torch.inference_mode():
        answers = torch.cat([model(some).argmax(-1) for some in videos.split(200)])
    return 100.0 * float((answers == labels).float().mean())


def encodings(result: dict[str, Any]) -> Tensor:
    """(blocks, H, 2t-1, 2h-1, 2w-1): what is added to the score of a key, by its offset from the mean query on ink."""
    model = Mover(result["side"])
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in result["state"].items()})
    videos, _ = test_clips("test", TRAIN)
    inked = F.avg_pool2d(videos, PATCH).flatten(1) > 0.3  # (B, L)
    found: list[Tensor] = []

    def hear(module: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        """Attention is the formula where it is listened to, and calls its encodings with the scaled queries."""
        config = module.rpe_config
        ids = get_bucket_map(config.method, TRAIN.tokens, 0, config.alpha, config.beta, config.gamma).grid().long()
        mean = args[0].transpose(1, 2)[inked].mean(0)  # (H, D)
        added = (mean[:, None] @ module.lookup_table_weight)[:, 0, ids.flip(0, 1, 2)]  # keys as the query sees them
        found.append(added - added.mean((-3, -2, -1), keepdim=True))

    for block in model.blocks:
        block.attn.rpe_k.register_forward_pre_hook(hear, with_kwargs=True)
    with torch.no_grad():
        model(videos)
    return torch.stack(found)


def draw(path: Path, result: dict[str, Any]) -> Path:
    """Above clips of three directions; below the encodings of the first block, a slice for each offset in time."""
    values = encodings(result)[0]  # (H, 2t-1, 2h-1, 2w-1)
    frames = TRAIN.frames
    figure = Figure(figsize=(10, 6.2), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    top.suptitle("Clips: the digit moves down and to the left, to the right, up", fontsize=11)
    videos, labels = test_clips("test", TRAIN)
    shown = [int((labels == DIRECTIONS.index(way)).nonzero()[0]) for way in ((1, -1), (0, 1), (-1, 0))]
    for number, ax in enumerate(top.subplots(1, 3 * frames)):
        ax.imshow(videos[shown[number // frames], number % frames], cmap="gray_r", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"frame {number % frames + 1}", fontsize=8)
    bottom.suptitle(
        f"What {TITLES[result['side']]} learned: added to the score of a key, by its place around the query (○)",
        fontsize=11,
    )
    axes = bottom.subplots(len(values), values.shape[1], squeeze=False)
    limit = float(values.abs().max()) or 1.0
    for head, line in enumerate(axes):
        for number, ax in enumerate(line):
            picture = ax.imshow(values[head, number], cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.plot((values.shape[3] - 1) / 2, (values.shape[2] - 1) / 2, "o", ms=4, mfc="white", mec="black")
            ax.set_xticks([])
            ax.set_yticks([])
            if head == 0:
                ax.set_title(f"{number - frames + 1:+d} frames" if number != frames - 1 else "same frame", fontsize=9)
        line[0].set_ylabel(f"block 1, head {head + 1}", fontsize=9)
    bottom.colorbar(picture, ax=axes.ravel().tolist(), fraction=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def record(results: Sequence[dict[str, Any]], tune: bool, wall: float) -> dict[str, Any]:
    """What goes into the file, and from there into docs/axes.md."""
    order = [*TITLES]
    rows = sorted(paired.summarise(results), key=lambda row: (order.index(row["side"]), row["lr"]))
    recipe = {"optimizer": "AdamW, one-cycle", "weight_decay": paired.WEIGHT_DECAY}
    recipe |= {name: results[0][name] for name in ("epochs", "batch_size", "fit_on", "test_on", "limit")}
    found = {
        "machine": paired.machine(),
        "tests": {str(size): f"{size}{', as trained' * (size == TRAIN)}" for size in TESTS},
        "model": MODEL,
        "recipe": recipe,
        "wall_seconds": wall,
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "summary": [row | {"title": TITLES[row["side"]]} for row in rows],
        "differences": [] if tune else paired.differences(results, PAIRS),
        "runs": [{key: value for key, value in result.items() if key != "state"} for result in results],
    }
    return found | ({"chosen": paired.best_rates(rows)} if tune else {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side, with seeds that follow each other")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Run.epochs)
    parser.add_argument("--limit", type=int, help="of digits to fit on, for a smoke run")
    parser.add_argument("--workers", type=int, help="worker processes; by default one for each CPU core")
    parser.add_argument("--tune", action="store_true", help="try the learning rates of the grid, on validation images")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--picture", type=Path, help="file for the picture of docs/axes.md")
    args = parser.parse_args(arguments)
    seeds = TUNE_SEEDS if args.tune else range(args.first_seed, args.first_seed + args.seeds)
    on = {"fit_on": "fit", "test_on": "valid"} if args.tune else {}
    # the dearest sides come first, so that the workers end at about the same time
    runs = [
        Run(side, seed, lr, epochs=args.epochs, limit=args.limit, **on)
        for seed in seeds
        for side in reversed(TITLES)
        for lr in (GRID if args.tune else [RATES[side]])
    ]
    started = time.perf_counter()
    results = fit_with_progress(fit, runs, TITLES.__getitem__, args.workers)
    found = record(results, args.tune, time.perf_counter() - started)
    images = "clips of validation images" if args.tune else "clips of test images"
    sizes = {test: test for test in found["tests"]}
    console.print(scores(found["summary"], sizes, TITLES.__getitem__, images, CAPTION))
    if len(seeds) > 1 and not args.tune:
        console.print(gained(found["differences"], sizes, TITLES.__getitem__))
    for side, lr in found.get("chosen", {}).items():
        console.print(f"chosen for {TITLES[side]}: lr {lr:g}")
    console.print(f"{len(runs)} runs, {found['wall_seconds']:.0f} s, {found['cpu_seconds']:.0f} s of CPU time")
    if args.picture is not None:
        first = next(result for result in results if result["side"] == SPACE)
        console.print(str(draw(args.picture, first)))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"moving{'_tune' * args.tune}_cpu.json"
        write_json(file, found)
        console.print(str(file))


if __name__ == "__main__":
    main()
