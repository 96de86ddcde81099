"""What the tests of training share: a tiny model, folders of real digits as pictures, processes."""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

from fresh import PATIENCE, Fresh
from PIL import Image
from typer.testing import CliRunner

from irpe import digits

ROOT = Path(__file__).parent.parent
RPE = "rpe-1.9-product-ctx-1-k"
# 8 x 12 pixels in patches of 2: 4 x 6 tokens and a class token
MODEL = [
    "--model", "vit_tiny_patch16_224", "--img-size", "8x12", "--in-chans", "1", "--model-arg", "patch_size=2",
    "--model-arg", "embed_dim=16", "--model-arg", "depth=1", "--model-arg", "num_heads=2", "--rpe", RPE,
]  # fmt: skip
TINY = MODEL[:-2]  # without the encoding
# behind the options of a command of the docs, of which the last word counts: a run of one step on tiny pictures
ONE_STEP = [
    "--batch-size", "16", "--loader-workers", "0", "--max-steps", "1", "--no-compile", "--device", "cpu",
    "--name", "run", "--no-plots",
]  # fmt: skip
SMALL = [
    *MODEL, "--recipe", "small", "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "30", "--loader-workers", "0",
    "--no-plots",
]  # fmt: skip
LIBRARIES = Fresh("safetensors.torch", "sklearn.datasets", "timm", "typer.testing")
atexit.register(LIBRARIES.close)
# the stochastic parts off: what is left depends on the order of the images alone
STILL = ["--crop-scale", "1", "--drop-path", "0"]


def pictures(folder, per_class=6, classes=4, parts=("train", "val")):
    """folder/part/class/number.png: digits on canvases of 8 x 12, other ones in each part."""
    data = digits.splits()["train"]
    one_each = [3 * row + row % 3 for row in range(len(data.rows))]  # of three places
    data = digits.Digits(*(part[one_each] for part in digits.on_canvas(data, 12)))
    for label in range(classes):
        rows = (data.labels == label).nonzero().flatten().tolist()
        for number, row in enumerate(rows[: per_class * len(parts)]):
            place = folder / parts[number // per_class] / f"digit{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = (data.images[row, 0] * 255).round().byte().numpy()
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def environment(**more):
    """Of a process that runs this checkout on one thread."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | more


def command(*arguments, processes=1):
    """The command line of `irpe`, under torchrun where there are several processes."""
    words = [str(one) for one in arguments]
    if processes == 1:
        return [sys.executable, "-m", "irpe", *words]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*run, "-m", "irpe", *words]


def irpe(*arguments):
    """Runs `irpe` in this process."""
    from irpe.__main__ import app

    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


class Said(str):
    """What was printed, in one line; what it contains is compared without white space: lines are wrapped anywhere."""

    def __contains__(self, text):
        return "".join(text.split()) in "".join(self.split())


def words(result):
    """What was printed, in one line and without frames."""
    return Said(" ".join("".join(" " if one in "│╭╮╰╯─\n" else one for one in result.output).split()))


def process(*arguments, processes=1, **options):
    """Runs `irpe` in processes of its own; a single one finds its libraries imported."""
    if processes == 1 and not options:
        words = [str(one) for one in arguments]
        code = f"import runpy, sys; sys.argv[1:] = {words!r}; runpy.run_module('irpe', None, '__main__', True)"
        return LIBRARIES.run(code, cwd=Path.cwd(), path=[ROOT], environment=environment())
    return subprocess.run(
        command(*arguments, processes=processes),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
        **options,
    )


def log(folder, kind):
    """The lines of a run's log of one kind, without what a clock has said."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "seconds")
    return [{name: one for name, one in line.items() if name not in timed} for line in lines if line["kind"] == kind]


__all__ = [
    "LIBRARIES",
    "MODEL",
    "ONE_STEP",
    "ROOT",
    "RPE",
    "SMALL",
    "STILL",
    "TINY",
    "command",
    "environment",
    "irpe",
    "log",
    "pictures",
    "process",
    "words",
]
