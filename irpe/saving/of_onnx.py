"""Exported classifiers as modules: what `irpe export` wrote, in torch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..prediction import Classifier, Preprocessing


class OnnxModel(nn.Module):
    """images (B, channels, height, width) -> logits (B, classes), computed by onnxruntime on the CPU."""

    def __init__(self, data: bytes, name: str) -> None:
        import onnxruntime

        super().__init__()
        self.session, self.name = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]), name

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: images.float().cpu().numpy()})[0])


def load_onnx(path: Path) -> Any:
    """The model of an .onnx file, with `predict`, as the JSON beside it says.

    Raises:
        ValueError: a file is missing, damaged or of something else; onnxruntime is not installed.
    """
    from ..runs.files import check_regular, read_json, reason_of

    beside = path.with_name(path.name + ".json")
    for file in (path, beside):
        if not file.exists():
            raise ValueError(f"{file} does not exist; expected what irpe export wrote: an .onnx file, and its JSON")
    facts = read_json(beside)
    try:
        said, classes = facts["input"], [str(name) for name in facts["classes"]]
        batch, _, height, width = said["shape"]
        values = {name: said[name] for name in ("mean", "std", "crop_pct", "interpolation")} | {"size": [height, width]}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{beside} is not what irpe export wrote") from None
    preprocessing = Preprocessing.from_dict(values, beside)
    try:
        check_regular(path)
        # as bytes: a file of somebody else could name others that lie beside it
        model: Any = OnnxModel(path.read_bytes(), str(said.get("name", "images")))
    except ModuleNotFoundError:
        raise ValueError(
            'onnxruntime is not installed, which .onnx needs; in the folder of irpe: pip install ".[export]"'
        ) from None
    except Exception as error:  # onnxruntime has errors of its own
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
    batch = batch if isinstance(batch, int) else None
    model.predict = Classifier(model, classes, preprocessing=preprocessing, batch=batch)
    return model.eval()
