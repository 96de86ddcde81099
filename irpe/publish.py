"""irpe.push_to_hub(model, "user/name"): a model with iRPE on the hub, with a card that says what it is."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ._version import __version__
from .saving import load, save

_WITH = (
    "A vision transformer with image relative position encoding (iRPE, Wu et al., ICCV 2021,",
    "[arXiv 2107.14222](https://arxiv.org/abs/2107.14222)).",
)
_WITHOUT = ("A vision transformer without relative position encoding, in a folder of irpe.",)
_TASKS = {"Classifier": "image-classification", "Detector": "object-detection"}


def push_to_hub(
    model: nn.Module | str | Path, name: str, *, private: bool = False, token: str | None = None,
    license: str | None = None, text: str = "", results: dict[str, float] | None = None, **options: Any,
) -> str:  # fmt: skip
    """Uploads a model, or the best of a run, as `irpe.save` writes it, with a model card; returns its address.

    >>> irpe.push_to_hub("runs/NAME", "user/name", license="mit")
    >>> model = irpe.load("user/name")

    Args:
        model: a model that `irpe.save` takes, or the folder of a run or of a model, whose figures go into the card.
        name: of the repository, user/name; it is made where there is none.
        private: whether a new repository is.
        token: of huggingface_hub; by default the one that its login keeps.
        license: for the card, such as "mit": yours to choose.
        text: what else the card says, in Markdown.
        results: figures for the card, {"top-1": 81.2}, of the data set of a run or of nobody knows which.
        options: `classes` and `processor` of `irpe.save`.

    Raises:
        ValueError, TypeError: see `irpe.save` and `irpe.load`.
        huggingface_hub's errors: the hub refuses.
    """
    from huggingface_hub import HfApi

    source = None if isinstance(model, nn.Module) else Path(model)
    found: Any = model if source is None else load(source)
    with tempfile.TemporaryDirectory() as place:
        folder = save(found, Path(place) / "model", **options)
        facts = facts_of_run(source) if source is not None else {}
        if results is not None:
            facts["results"] = results
        card(found, name, license=license, text=text, **facts).save(folder / "README.md")
        api = HfApi(token=token)
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model with iRPE")
        return f"{api.endpoint}/{repository}"


def card(
    model: Any, name: str, *, license: str | None = None, text: str = "", results: dict[str, float] | None = None,
    data: str = "", base: str = "", rpe: str = "",
) -> Any:  # fmt: skip
    """The `huggingface_hub.ModelCard` of a model: metadata, how it is loaded, figures.

    Args:
        data: name of the data that it was trained and measured on.
        base: name of the model in its library.
        rpe: its encoding.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task = _TASKS.get(type(getattr(model, "predict", None)).__name__)
    encodings = _encodings(model)
    figures = [
        EvalResult(
            task_type=task or "image-feature-extraction", dataset_type=_slug(data) or "unknown",
            dataset_name=data or "unknown", metric_type=_slug(metric), metric_name=metric, metric_value=value,
        )
        for metric, value in (results or {}).items()
    ]  # fmt: skip
    values = ModelCardData(
        model_name=name.split("/")[-1], library_name="irpe", pipeline_tag=task, license=license,
        tags=["irpe", *(["relative-position-encoding"] if encodings else []), "vision-transformer"],
        eval_results=figures or None,
    )  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("model", base or type(model).__name__), ("encoding", rpe or ", ".join(encodings) or "none"),
        ("parameters", f"{count:,}"),
        ("data", data), *((metric, f"{value:g}") for metric, value in (results or {}).items()),
    ]  # fmt: skip
    use = 'found = model.predict("picture.jpg")\n' if task else ""
    library = _refusing(model) if encodings else None
    lines = [
        "---", values.to_yaml(), "---", "", f"# {name.split('/')[-1]}", "",
        *(_WITH if encodings else _WITHOUT), "", *([text, ""] if text else []),
        "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows if value), "",
        "## Use", "", "```python", "import irpe", "", f'model = irpe.load("{name}")', f"{use}```", "",
        *([f"The loaders of {library} refuse these files: they would leave the encodings out.", ""] if library else []),
        f"Made with irpe {__version__}.", "",
    ]  # fmt: skip
    return ModelCard("\n".join(lines))


def _encodings(model: nn.Module) -> list[str]:
    """The string forms of a model's encodings; none where it has none."""
    from .config_io import rpe_config_to_string
    from .integrations.timm_record import config_of
    from .irpe import RPEConfig

    found = set()
    for config in {config_of(module) for module in model.modules()} - {RPEConfig()}:
        try:
            found.add(rpe_config_to_string(config))
        except ValueError:
            found.add("without a string form (see config.json)")
    return sorted(found)


def _refusing(model: nn.Module) -> str | None:
    """The library whose own loaders refuse an equipped model's files; None where it has none, or none that refuses."""
    from .integrations.timm_record import RECORD

    if "transformers" in {cls.__module__.split(".")[0] for cls in type(model).__mro__}:
        return "transformers"
    # the released DeiTs are models of timm that have their encodings from their name
    return "timm" if RECORD in vars(model).get("_model_args", {}) else None


def facts_of_run(folder: Path) -> dict[str, Any]:
    """What the card says of a run: its data, model, encoding, and what its best weights were measured at."""
    from .detect.settings import is_record
    from .runs.files import read_json
    from .runs.folder import SETTINGS
    from .runs.logs import measured_at
    from .runs.report import RESULT

    if not all((folder / name).exists() for name in (SETTINGS, RESULT)):
        return {}
    settings, result = read_json(folder / SETTINGS), read_json(folder / RESULT)
    best, names = result["best"], {"AP": "AP in percent", "AP50": "AP50 in percent"}
    if not is_record(settings):
        settings = settings["settings"]
        names = {"top1": "top-1 accuracy in percent", "top5": "top-5 accuracy in percent"}
        base = str(settings["model"])
    else:
        base = _name_of(settings["pretrained"]) or str(settings["model"])
        if not isinstance(best, dict):  # of a version that wrote the best AP alone
            best = measured_at(folder, result["best_step"])
    results = {words: float(best["val"][key]) for key, words in names.items() if best["val"].get(key) is not None}
    return {"results": results, "data": Path(settings["data"]).name, "base": base, "rpe": str(settings["rpe"] or "")}


def _name_of(pretrained: str | None) -> str:
    """A name on the hub as it is; of a path on this machine the last part that says something."""
    if pretrained is None:
        return ""
    path = Path(pretrained)
    if not (path.is_absolute() or path.exists() or len(path.parts) > 2):
        return pretrained
    return next((part for part in reversed(path.resolve().parts) if part not in ("best", "model")), "")


def _slug(words: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())


def _cell(value: str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
