"""The model of a run: transformers' DETR, small from a configuration, or pretrained, with iRPE in its encoder."""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, ConvNextConfig, DetrConfig, DetrForObjectDetection, DetrImageProcessor

from ..config_io import rpe_config_from_dict, rpe_config_from_string
from ..detr import detr_r50, detr_state_dict
from ..equip import equip, rpe_parameters
from ..integrations import hf_vit
from ..runs.files import reason_of
from ..runs.seeds import seed_all
from ..runs.tensors import read_torch
from .coco_names import COUNT, NAMES
from .data import NONE, named
from .saved import check_folder, offline
from .settings import Settings

FOLDER, BEST = "model", "best"  # of the weights at the end, and of those with the highest AP, in the folder of a run
Say = Callable[[str], None]


def known_classes(settings: Settings, ids: Mapping[str, int] | None = None) -> list[str] | None:
    """Names of the classes of the pretrained model, in the order of its outputs; None where a model is new.

    Those of a checkpoint of the release are COCO's: the ids of the data's own categories say nothing about them.

    Raises:
        ValueError: there is no such model, or it is no DETR.
    """
    if settings.pretrained is None:
        return None
    if _is_checkpoint(settings.pretrained):
        return [NAMES.get(number, NONE) for number in range(COUNT)]
    config = _config(settings.pretrained)
    return [str(config.id2label.get(number, NONE)) for number in range(config.num_labels)]


def build(settings: Settings, classes: Sequence[str], say: Say = lambda words: None) -> Any:
    """A DETR on the CPU with an output for each class, in evaluation mode.

    Args:
        say: is told what was not taken from the pretrained weights.

    Raises:
        ValueError: the pretrained model cannot be read, is no DETR, or has another iRPE than the one asked for.
    """
    seed_all(settings.seed, "model")
    wanted = None if settings.rpe == "none" else settings.rpe
    model: Any
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
    if settings.backbone is not None and (settings.model != "r50" or settings.pretrained):
        raise ValueError("--backbone gives weights to --model r50 without --pretrained; leave it out here")
    if settings.pretrained is not None and not _is_checkpoint(settings.pretrained):
        model = _pretrained(settings, classes, say)
    elif settings.pretrained is not None:
        model = _released(settings.pretrained, wanted, classes, say)
    elif settings.model == "small":
        model = _small(settings, labels)
        if wanted is not None:
            equip(model, wanted)
    else:
        model = detr_r50(wanted, num_labels=len(classes), auxiliary_loss=True)
        if settings.backbone is not None:
            _load_backbone(model, settings.backbone)
        else:
            say("the ResNet starts from random weights and its normalisation is fixed: use --backbone hub to train")
    model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    if settings.positions == "sine" and model.config.position_embedding_type == "none":
        raise ValueError(f"--positions sine, but {settings.pretrained} was trained without; leave --positions out")
    if settings.positions == "none":
        _remove_positions(model)
    _choose_trained(model)
    return model.eval()


def processor_of(settings: Settings) -> Any:
    """transformers' image processor with the run's sizes; mean and deviation are those of the pretrained model."""
    size = {"shortest_edge": settings.size, "longest_edge": settings.max_size}
    options: dict[str, Any] = dict(size=size) if settings.size else dict(do_resize=False)
    name = settings.pretrained
    if name is None or _is_checkpoint(name):
        return DetrImageProcessor(**options)
    own = Path(name) / "preprocessor_config.json"
    if Path(name).is_dir() and not own.exists() and not own.with_name("processor_config.json").exists():
        return DetrImageProcessor(**options)  # weights alone: those of ImageNet, as DETR has them
    try:
        return DetrImageProcessor.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the image processor of {name} cannot be read: {reason_of(error)}") from None


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Groups of AdamW: the backbone with its own learning rate, tables of iRPE without weight decay, the rest."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in named if _in_backbone(name)], "peak": settings.backbone_lr},
        {"params": [weight for name, weight in named if not _in_backbone(name)], "peak": settings.lr},
    ]
    if any(".lookup_table_" in name for name, _ in named):
        tables = rpe_parameters(model, peak=settings.lr)
        own = {id(weight) for weight in tables["params"]}
        groups[1]["params"] = [weight for weight in groups[1]["params"] if id(weight) not in own]
        groups.append(tables)
    return [group for group in groups if group["params"]]


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """The DETR of a folder or of a name on the hub, with the tables that were saved with it."""
    _config(str(folder))  # refuses other models, and folders that name code or what would be fetched
    cls = DetrForObjectDetection
    with offline(Path(folder)):
        config, options = hf_vit.read_config(DetrConfig, folder, return_unused_kwargs=True, **options)
    if hasattr(config.backbone_config, "use_pretrained_backbone"):
        config.backbone_config.use_pretrained_backbone = False  # its weights are in the folder
    without = config.position_embedding_type == "none"
    if without:
        config.position_embedding_type = "sine"
    make = functools.partial(hf_vit.from_pretrained, cls) if getattr(config, "irpe", None) else cls.from_pretrained
    with offline(Path(folder)):
        model = make(folder, config=config, **options)
    if without:
        _remove_positions(model)
    return model


class NoPositions(nn.Module):
    """Zeros (1, d_model, h, w) in place of DETR's absolute positions, which encoder and decoder add to theirs."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        return torch.zeros(1, self.d_model, *shape[-2:], device=device, dtype=dtype)


def _remove_positions(model: Any) -> None:
    """Only `load` reads what is saved then: transformers refuses the type in place of using positions silently."""
    model.model.position_embedding = NoPositions(model.config.d_model)
    model.config.position_embedding_type = "none"


def _is_checkpoint(name: str) -> bool:
    """Whether this is a file, which only checkpoints of the release are."""
    return Path(name).is_file()


def _config(name: str) -> Any:
    if (Path(name) / "config.json").exists():
        check_folder(Path(name))
    try:
        with offline(Path(name)):
            config = hf_vit.read_config(AutoConfig, name, trust_remote_code=False)
    except Exception as error:  # what a configuration of somebody else can raise has no end
        if (Path(name) / FOLDER / "config.json").exists():
            raise ValueError(
                f"--pretrained {name} is the folder of a run; name {name}/{FOLDER} or {name}/{BEST}"
            ) from None
        raise ValueError(
            f"--pretrained {name} cannot be read: {reason_of(error)}; expected a folder of save_pretrained, "
            "a name on the hub such as facebook/detr-resnet-50, or a checkpoint of the release"
        ) from None
    if not isinstance(config, DetrConfig):
        raise ValueError(f"--pretrained {name} is a model of type {config.model_type}; expected detr")
    return config


def _pretrained(settings: Settings, classes: Sequence[str], say: Say) -> Any:
    name = settings.pretrained
    assert name is not None
    config = _config(name)
    has, wanted = getattr(config, "irpe", None), settings.rpe
    if has and wanted is not None:
        asked = None if wanted == "none" else rpe_config_from_string(wanted)
        if asked is None or any(rpe_config_from_dict(entry["rpe_config"]) != asked for entry in has):
            raise ValueError(f"--rpe {wanted}, but {name} was trained with another iRPE; leave --rpe out")
    model = load(name, auxiliary_loss=True)
    _set_classes(model, known_classes(settings) or [], classes, name, say)
    if not has and wanted not in (None, "none"):
        equip(model, wanted)
    return model


def _released(name: str, wanted: str | None, classes: Sequence[str], say: Say) -> Any:
    """A DETR-R50 with the weights of a checkpoint of the release, or of the original DETR."""
    model: Any = detr_r50(wanted, num_labels=COUNT, auxiliary_loss=True)
    try:
        found = read_torch(Path(name))
        state = found.get("model", found) if isinstance(found, dict) else found
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds no state dict under model")
        renamed = detr_state_dict(state)
        model.load_state_dict(renamed, strict=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"--pretrained {name} cannot be read as a checkpoint of DETR: {reason_of(error)}") from None
    except RuntimeError as error:
        raise ValueError(f"--pretrained {name} does not fit: {' '.join(str(error).split())[:300]}") from None
    coco = [NAMES.get(number, NONE) for number in range(COUNT)]
    _set_classes(model, coco, classes, name, say)
    return model


def _set_classes(model: Any, known: Sequence[str], classes: Sequence[str], name: str, say: Say) -> None:
    """Gives the classifier a row for each class: that of the same name where there is one, and else a new one."""
    if list(known) == list(classes):
        return
    rows, old = named(known), model.class_labels_classifier
    kept = [label for label in classes if label in rows]
    new = nn.Linear(old.in_features, len(classes) + 1)
    with torch.no_grad():
        nn.init.normal_(new.weight, std=model.config.init_std)
        nn.init.zeros_(new.bias)
        for number, label in enumerate(classes):
            if label in rows:
                new.weight[number], new.bias[number] = old.weight[rows[label]], old.bias[rows[label]]
        if kept:  # beside known classes, "no object" means what it meant
            new.weight[-1], new.bias[-1] = old.weight[-1], old.bias[-1]
    model.class_labels_classifier = new
    if not kept:
        say(f"the classes are others than those of {name}: the classifier starts from random weights")
        return
    made = [label for label in classes if label not in rows]
    shown = ", ".join(made[:5]) + " and others" * (len(made) > 5)
    say(
        f"{shown} {'is' if len(made) == 1 else 'are'} not among the classes of {name}: "
        f"new rows of the classifier start from random weights, and {len(kept)} keep theirs"
    )


def _small(settings: Settings, labels: dict[str, Any]) -> Any:
    """A DETR that learns from random weights within minutes: a block of ConvNeXt on patches of 8x8 pixels."""
    # ConvNeXt normalises by itself; DETR replaces the batch norms of a ResNet by fixed ones, which do nothing here
    of_backbone: dict[str, Any] = dict(
        patch_size=8, num_stages=1, hidden_sizes=[settings.d_model], depths=[1], layer_scale_init_value=1.0,
        initializer_range=0.1, out_features=["stage1"],
    )  # fmt: skip
    options: dict[str, Any] = dict(
        backbone_config=ConvNextConfig(**of_backbone), use_timm_backbone=False, d_model=settings.d_model,
        encoder_layers=settings.layers, decoder_layers=settings.layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=2 * settings.d_model, decoder_ffn_dim=2 * settings.d_model,
        num_queries=settings.queries, dropout=settings.dropout, auxiliary_loss=True, **labels,
    )  # fmt: skip
    model: Any = DetrForObjectDetection(DetrConfig(**options))
    # as the original DETR starts; transformers' 0.02 everywhere makes all queries alike, and this width learns nothing
    for part in (model.model.encoder, model.model.decoder, model.bbox_predictor, model.model.input_projection):
        for weight in part.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
    nn.init.normal_(model.model.query_position_embeddings.weight)
    nn.init.zeros_(model.bbox_predictor.layers[-1].weight)
    return model


def _in_backbone(name: str) -> bool:
    return ".backbone." in f".{name}"


def _choose_trained(model: Any) -> None:
    """Everything is trained but the stem and the first stage of a ResNet, as in the original DETR."""
    # transformers 5.18 freezes all of its own ResNet and nothing of timm's
    resnet = "resnet" in str(model.config.backbone_config.to_dict()).lower()
    for name, weight in model.named_parameters():
        late = re.search(r"\b(layer[234]|stages\.[123])\.", name) is not None
        weight.requires_grad_(late or not (resnet and _in_backbone(name)))


def _load_backbone(model: Any, source: str) -> None:
    """Weights of timm's or torchvision's ResNet-50: from the hub, or from a file."""
    if source == "hub":
        import timm

        state = timm.create_model("resnet50", pretrained=True).state_dict()
    else:
        try:
            state = read_torch(Path(source))
        except (ValueError, OSError) as error:
            raise ValueError(f"--backbone {source} cannot be read: {reason_of(error)}") from None
        if not isinstance(state, dict):
            raise ValueError(f"--backbone {source} is no ResNet-50: it holds no state dict")
    body = model.model.backbone.model
    state = {key: value for key, value in state.items() if key in body.state_dict()}
    if lost := [key for key in body.state_dict() if key not in state]:
        raise ValueError(f"--backbone {source} is no ResNet-50: it lacks {', '.join(lost[:3])}")
    try:
        body.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"--backbone {source} does not fit: {' '.join(str(error).split())[:300]}") from None
