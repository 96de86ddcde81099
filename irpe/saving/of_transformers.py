"""Models of transformers in a folder: what save_pretrained writes, by classes that transformers has."""

import re
from pathlib import Path
from typing import Any

from .common import CONFIG, fill


def save_transformers(model: Any, folder: Path, classes: list[str], processor: Any) -> dict[str, Any]:
    from ..detect.saved import check_folder, write_pretrained

    own = getattr(processor, "image_processor", processor)  # of a processor of pictures and texts
    if own is not None and not hasattr(own, "save_pretrained"):
        raise TypeError(f"processor is a {type(processor).__name__}; expected an image processor of transformers")
    if classes:
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: number for number, name in enumerate(classes)}
    write_pretrained(model, own, folder)
    check_folder(folder)  # what `load` would refuse
    return {}


def load_transformers(folder: Path, config: dict[str, Any]) -> Any:
    import transformers

    from ..detect.saved import check_folder, offline, quiet
    from ..prediction import Classifier, Detector
    from ..runs.files import reason_of

    check_folder(folder)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder / CONFIG} names {name!r}, which is no model of transformers; load a class of your own with its "
            "from_pretrained"
        )
    processor = None
    with quiet(), offline(folder):
        model = _model(cls, folder)
        if (folder / "preprocessor_config.json").exists():
            try:
                processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # what a configuration of somebody else can raise has no end
                raise ValueError(f"the image processor of {folder} cannot be read: {reason_of(error)}") from None
    labels = [str(model.config.id2label.get(number, number)) for number in range(model.config.num_labels)]
    if name == "DetrForObjectDetection":
        model.eval().predict = Detector(model, labels, processor)
    elif "ForImageClassification" in str(name) and labels:
        model.eval().predict = Classifier(model, labels, processor=processor)
    return model.eval()


def _model(cls: Any, folder: Path) -> Any:
    """The model of a class of transformers, with the tables of the folder where it has some."""
    from ..integrations import hf_vit
    from ..runs.files import reason_of

    if cls.__name__ == "DetrForObjectDetection":
        from ..detect.model import load as load_detr

        return load_detr(folder)
    try:
        own: Any = hf_vit.read_config(cls.config_class, folder)
    except Exception as error:  # as above
        raise ValueError(f"{folder / CONFIG} is not of a {cls.__name__}: {reason_of(error)}") from None
    if hasattr(getattr(own, "backbone_config", None), "use_pretrained_backbone"):
        own.backbone_config.use_pretrained_backbone = False  # its weights are in the folder
    if own.model_type == "timm_wrapper" and getattr(own, "irpe", None):
        return _timm_wrapper(cls, own, folder)
    with_tables = bool(re.search(r'"irpe": *\[', own.to_json_string()))
    make = hf_vit.from_pretrained if with_tables else _from_pretrained
    return make(cls, folder, config=own)


def _from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    return cls.from_pretrained(folder, **options)


def _timm_wrapper(cls: Any, config: Any, folder: Path) -> Any:
    from ..config_io import rpe_config_from_dict
    from ..equip import equip

    model = cls(config)
    for entry in list(config.irpe):
        equip(model, rpe_config_from_dict(entry["rpe_config"]), blocks=entry["attentions"])
    fill(model, folder)
    return model
