"""A trained classifier as one file that needs neither this package nor timm: torch.export's or ONNX."""

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..runs.files import write_json
from . import model as models
from .loader import evaluated
from .settings import Settings

FORMATS = {".pt2": "torch.export", ".onnx": "ONNX"}
_USE = {
    ".pt2": 'run = torch.export.load("{name}").module(); logits = run(images)',
    ".onnx": "irpe predict {name} picture.jpg",
}
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # of the largest logit, in float32
Run = Callable[[Tensor], Tensor]


def check_path(path: Path) -> None:
    """Refuses what cannot be written, before a model is built.

    Raises:
        ValueError: of another format, in a folder that does not exist, or packages that ONNX needs are missing.
    """
    if path.suffix not in FORMATS:
        expected = " or ".join(f"{suffix} ({name})" for suffix, name in FORMATS.items())
        raise ValueError(f"--out {path} has the suffix {path.suffix or '(none)'}; expected {expected}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: {path.parent} is not a folder")
    if path.suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f'{name} is not installed, which ONNX needs; in the folder of irpe: pip install ".[export]"'
                )


def export(
    settings: Settings, weights: Path | None, classes: list[str], path: Path, *, batch: int = 0,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the model to `path`, reads the file again, and compares it with the model on random images.

    The file maps images (B, channels, height, width), normalised with the mean and the deviation in the JSON file
    beside it, to logits (B, classes). That JSON is returned: the classes, how images are prepared, the difference.

    Args:
        weights: what to load in place of `--pretrained`.
        classes: their names, in the order of the logits.
        path: ends in .pt2 (torch.export) or in .onnx.
        batch: B in the file; 0 leaves it open.

    Raises:
        ValueError: see `check_path` and `model.build`.
        RuntimeError: what the file computes is not what the model computes.
    """
    check_path(path)
    if weights is not None:
        settings = dataclasses.replace(settings, pretrained=str(weights))
    settings = dataclasses.replace(settings, grad_checkpointing=False)
    model = models.build(settings, len(classes), say, strict=True).eval()
    shape = models.shape_of(settings, model)
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randn(count, settings.in_chans, *shape.size, generator=generator)

    # an example of one image would make torch.export write that number down
    example = images(batch or 2)
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
            run = (_pt2 if path.suffix == ".pt2" else _onnx)(program, part)
            difference, largest = _compare(model, run, [images(count) for count in ((batch,) if batch else (1, 2, 5))])
        if not difference <= TOLERANCE * max(1.0, largest):
            raise RuntimeError(f"the exported file differs from the model by {difference:.2e} of {largest:.2e}")
        os.replace(part, path)
    finally:
        for left in path.parent.glob(f"{glob.escape(part.name)}*"):
            left.unlink()
    facts = {
        "format": FORMATS[path.suffix], "model": settings.model, "rpe": settings.rpe,
        "weights": str(weights or settings.pretrained), "classes": classes,
        "input": {
            "name": INPUT, "shape": [batch or "batch", settings.in_chans, *shape.size], "dtype": "float32",
            "scale": "pixels in [0, 1], minus mean, divided by std", "mean": shape.mean, "std": shape.std,
            "resize": "so that it covers size / crop_pct, then the middle of size", "crop_pct": shape.crop_pct,
            "interpolation": evaluated(settings.interpolation),
        },
        "use": _USE[path.suffix].format(name=path.name),
        "output": {"name": OUTPUT, "shape": [batch or "batch", len(classes)]},
        "largest_difference": difference, "versions": {"irpe": __version__, "torch": torch.__version__},
    }  # fmt: skip
    write_json(path.with_name(path.name + ".json"), facts)
    return facts


def _pt2(program: Any, path: Path) -> Run:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _onnx(program: Any, path: Path) -> Run:
    import onnxruntime

    written = torch.onnx.export(
        program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, external_data=False, verbose=False
    )
    assert written is not None  # without a path there is a program
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _compare(model: nn.Module, run: Run, batches: list[Tensor]) -> tuple[float, float]:
    """(largest difference, largest logit) over the batches."""
    found, expected = [run(images) for images in batches], [model(images) for images in batches]
    differences = [float((logits - other).abs().max()) for logits, other in zip(found, expected, strict=True)]
    return max(differences), max(float(logits.abs().max()) for logits in expected)
