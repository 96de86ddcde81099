"""irpe.push_to_hub(model, "user/name"): a model with iRPE on the hub, with a card that says what it is."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ._version import __version__
from .saving import load, save

_TASKS = {"Classifier": "image-classification", "Detector": "object-detection"}


def push_to_hub(
    model: nn.Module | str | Path, name: str, *, private: bool = False, token: str | None = None,
    license: str | None = None, text: str = "", results: dict[str, float] | None = None, **options: Any,
) -> str:  # fmt: skip
    """Writes a model, or that of a run, as `irpe.save` does, adds a model card, and uploads it; returns its address.

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
        facts = _facts_of_run(source) if source is not None else {}
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
    figures = [
        EvalResult(
            task_type=task or "image-feature-extraction", dataset_type=_slug(data) or "unknown",
            dataset_name=data or "unknown", metric_type=_slug(metric), metric_name=metric, metric_value=value,
        )
        for metric, value in (results or {}).items()
    ]  # fmt: skip
    values = ModelCardData(
        model_name=name.split("/")[-1], library_name="irpe", pipeline_tag=task, license=license,
        tags=["irpe", "relative-position-encoding", "vision-transformer"], eval_results=figures or None,
    )  # fmt: skip
    count = sum(one.numel() for one in model.parameters())
    rows = [
        ("model", base or type(model).__name__), ("encoding", rpe or _encoding(model)), ("parameters", f"{count:,}"),
        ("data", data), *((metric, f"{value:g}") for metric, value in (results or {}).items()),
    ]  # fmt: skip
    use = 'found = model.predict("picture.jpg")\n' if task else ""
    lines = [
        "---", values.to_yaml(), "---", "", f"# {name.split('/')[-1]}", "",
        "A vision transformer with image relative position encoding (iRPE, Wu et al., ICCV 2021,",
        "[arXiv 2107.14222](https://arxiv.org/abs/2107.14222)).", "", *([text, ""] if text else []),
        "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows if value), "",
        "## Use", "", "```python", "import irpe", "", f'model = irpe.load("{name}")', f"{use}```", "",
        "The loaders of timm and transformers refuse these files: they would leave the encodings out.", "",
        f"Made with irpe {__version__}.", "",
    ]  # fmt: skip
    return ModelCard("\n".join(lines))


def _encoding(model: nn.Module) -> str:
    """The string form of a model's encodings, or what else can be said of them."""
    from .config_io import rpe_config_to_string
    from .integrations.timm_record import config_of
    from .irpe import RPEConfig

    found = {config for one in model.modules() if (config := config_of(one)) != RPEConfig()}
    try:
        return ", ".join(sorted(map(rpe_config_to_string, found))) or "none"
    except ValueError:
        return "of several kinds; see the configuration"


def _facts_of_run(folder: Path) -> dict[str, Any]:
    """What the card says of a run: its data, model, encoding, and what it was measured at."""
    from .runs.files import read_json

    if not all((folder / name).exists() for name in ("settings.json", "result.json")):
        return {}
    settings, result = read_json(folder / "settings.json"), read_json(folder / "result.json")
    if "settings" in settings:
        settings, score = settings["settings"], result["best"]["val"]
        names = {"top1": "top-1 accuracy in percent", "top5": "top-5 accuracy in percent"}
    else:
        score, names = result["score"], {"AP": "AP in percent", "AP50": "AP50 in percent"}
    results = {words: float(score[key]) for key, words in names.items() if score.get(key) is not None}
    base, rpe = str(settings["model"]), str(settings["rpe"] or "")
    return {"results": results, "data": Path(str(settings["data"])).name, "base": base, "rpe": rpe}


def _slug(words: str) -> str:
    return "-".join("".join(one if one.isalnum() else " " for one in words.lower()).split())


def _cell(value: str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
