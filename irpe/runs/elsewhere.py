"""What the configuration of a model names that lies elsewhere: what would be fetched, read beside it, or run."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

# arguments of timm.create_model that name files and addresses
_LOADING = {"checkpoint_path", "cache_dir", "model_name", "custom_load", "url", "file", "source", "state_dict"}
_LOADING_BEGINNINGS = ("pretrained", "hf_", "kwargs")
# that choose what it builds
_CHOOSING = {"model_cfg", "feature_cfg", "features_only", "out_indices", "scriptable", "exportable", "no_jit"}
_OF_BACKBONES = {"features_only", "out_indices"}
# entries that transformers runs, fetches, or reads in place of the file itself
_NAMING = (
    "auto_map", "custom_pipelines", "quantization_config", "configuration_files",
    "repo_path", "class_info_file",  # of an image processor
)  # fmt: skip
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "irpe")
_LABELS = ("id2label", "label2id")  # whose keys are anybody's words


def loading_arguments(names: Iterable[str], *, backbone: bool = False) -> list[str]:
    """Those among the names of arguments of `timm.create_model` that read, fetch, or choose what is built.

    >>> loading_arguments(["depth", "checkpoint_path"])
    ['checkpoint_path']

    Args:
        backbone: whether features may be asked for in place of classes.
    """
    refused = _LOADING | _CHOOSING - (_OF_BACKBONES if backbone else set())
    return sorted(str(name) for name in names if name in refused or str(name).startswith(_LOADING_BEGINNINGS))


def is_of_timm(name: object) -> bool:
    """Whether this is the plain name of a model that timm has: no address, no path, nothing before it."""
    try:
        import timm  # other models are loaded where it is not installed
    except ModuleNotFoundError:
        return False
    return isinstance(name, str) and bool(re.fullmatch(r"\w+(?:\.\w+)?", name)) and bool(timm.is_model(name))


def named_elsewhere(config: Any) -> str | None:
    """What in a configuration of transformers, or inside one, names code, files or a model elsewhere; None if nothing.

    >>> named_elsewhere({"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:user/name"}})
    "architecture: 'hf-hub:user/name', which is none of timm"
    """
    if not isinstance(config, dict):
        return "no settings"
    if not isinstance(config.get("backbone_config") or {}, dict):
        return "a backbone_config that is none"
    return next((words for part in _parts(config) if (words := _in_part(part)) is not None), None)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The dictionary and all inside it, without recursion, as somebody else has chosen the depth."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += [inner for name, inner in value.items() if name not in _LABELS]
        elif isinstance(value, list):
            left += value


def _in_part(part: dict[str, Any]) -> str | None:
    for name in _NAMING:
        if part.get(name):
            return f"{name}: {part[name]!r}"
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if part.get(name) and part[name] not in _ATTENTIONS:
            return f"{name}: {part[name]!r}"
    for name in ("backbone", "architecture"):
        if part.get(name) and not isinstance(part[name], dict) and not is_of_timm(part[name]):
            return f"{name}: {part[name]!r}, which is none of timm"
    if part.get("backbone") and part.get("use_timm_backbone", True) is False:
        return f"the backbone {part['backbone']!r}, which is not timm's"
    arguments = part.get("model_args")
    if isinstance(arguments, dict) and (strange := loading_arguments(arguments, backbone=True)):
        return f"model_args with {', '.join(strange)}"
    return None
