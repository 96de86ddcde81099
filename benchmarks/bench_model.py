"""Models of timm as they are and with iRPE: images per second and peak memory, in inference and training.

    python benchmarks/bench_model.py --sizes 224 384 518

DeiT-S at 224 and 384, and at 518 the ViT-B/14 of DINOv2.

A step of training is forward, cross-entropy, backward and AdamW. The models take turns within one process; "fused" is
what an equipped model does by itself where the operators are built, "eager" the formula in plain torch. On a GPU
(`model_gpu.py`) a batch is 256 images, in bfloat16, and models run eager and compiled.
"""

import argparse
import functools
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import irpe
from benchmarks import common, model_gpu
from irpe.integrations import blocks as attention_blocks

MODELS = {  # by image size
    224: "deit_small_patch16_224",
    384: "deit_small_patch16_224",
    518: "vit_base_patch14_dinov2",
}
CLASSES = 1000
BATCH = {224: 16, 384: 4, 518: 1}
VARIANTS = {  # where encodings are, and the backend
    "plain": (None, None),
    "k eager": ("k", "eager"),
    "k fused": ("k", "cpu"),
    "qkv eager": ("qkv", "eager"),
    "qkv fused": ("qkv", "cpu"),
}


def build(variant: str, size: int) -> nn.Module:
    """The model of a variant, its tables drawn at random, so that nothing is multiplied by zero."""
    torch.manual_seed(0)
    model = timm.create_model(MODELS[size], img_size=size, num_classes=CLASSES)
    on, _ = VARIANTS[variant]
    if on is not None:
        irpe.equip(model, irpe.get_rpe_config(1.9, "product", "ctx", True, rpe_on=on))
        for name, table in model.named_parameters():
            if "lookup_table" in name:
                nn.init.normal_(table, std=0.02)
    return model


def step(variant: str, size: int, train: bool):
    """A function of nothing that infers, or trains, one batch."""
    model = build(variant, size).train(train)
    backend = VARIANTS[variant][1]
    images, labels = torch.randn(BATCH[size], 3, size, size), torch.randint(CLASSES, (BATCH[size],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if train else None

    def call() -> None:
        attention_blocks.rpe_attention = functools.partial(irpe.rpe_attention, backend=backend)
        if optimizer is None:
            with torch.inference_mode():
                model(images)
            return
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def check(size: int) -> None:
    """Fused and eager models give the same logits."""
    images = torch.randn(2, 3, size, size)
    for on in ("k", "qkv"):
        logits = {}
        for name in ("eager", "fused"):
            model = build(f"{on} {name}", size).eval()
            attention_blocks.rpe_attention = functools.partial(irpe.rpe_attention, backend=VARIANTS[f"{on} {name}"][1])
            with torch.inference_mode():
                logits[name] = model(images)
        torch.testing.assert_close(logits["fused"], logits["eager"], rtol=1e-4, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCH), choices=BATCH)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="the first is the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda", "dry"], help="dry: the steps of cuda, tiny, on a CPU"
    )
    parser.add_argument(
        "--warm", choices=model_gpu.VARIANTS, help="on a GPU: compile this one for the next run, no more"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory, a process for each model")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    common.add_isa(parser)
    args = parser.parse_args()
    common.hold_down(args.isa)
    if args.device != "cpu":
        model_gpu.main(args)
        return
    torch.set_num_threads(args.threads)
    rows = []
    for size in args.sizes:
        check(size)
        for train in (False, True):
            taken = common.side_by_side({v: step(v, size, train) for v in args.variants}, rounds=args.rounds)
            for variant, seconds in taken.items():
                row = {
                    "name": MODELS[size],
                    "size": size,
                    "batch": BATCH[size],
                    "pass": "training" if train else "inference",
                }
                row |= {"model": variant, "images/s": BATCH[size] / seconds["median"]}
                row["time over plain"] = seconds["median"] / taken[args.variants[0]]["median"]
                if not args.no_memory:
                    code = f"from benchmarks import bench_model as b\ncall = b.step({variant!r}, {size}, {train})"
                    row["peak MiB"] = common.peak_mib(code, threads=args.threads)
                rows.append(row)
        print(common.markdown(rows), flush=True)
    if args.out is not None:
        print(common.write(args.out, "bench_model", "cpu", rows, args.isa))


if __name__ == "__main__":
    main()
