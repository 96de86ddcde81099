"""What iRPE costs on this machine: attention alone, and a whole model, beside the same without encodings.

All variants take turns in one process, and medians are compared, so a busy machine changes times more than ratios.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_io import rpe_config_from_string
from .equip import equip
from .irpe import RPEConfig, build_rpe, rpe_attention

Run = Callable[[], Any]
PASSES = ("forward", "with backward")


class Row(NamedTuple):
    """Seconds of each variant, medians; the first is without encodings."""

    what: str
    pass_: str
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the ratios."""
        return {"what": self.what, "pass": self.pass_, "seconds": self.seconds, "ratios": self.ratios()}

    def ratios(self) -> dict[str, float]:
        """Times over that of the first variant."""
        base = next(iter(self.seconds.values()))
        return {name: spent / base for name, spent in self.seconds.items()}


def attention(
    sizes: list[tuple[int, int]],
    rpe: list[str],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[Row]:
    """Rows of attention on maps of (height, width) tokens: without encodings, with each of `rpe`, and by the formula.

    Args:
        rpe: configurations as strings.
        seconds: about how long each row takes.
    """
    for height, width in sizes:
        shape = (batch, heads, height * width, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        grad = torch.randn(shape, device=device, dtype=dtype)
        calls: dict[str, Run] = {"without": partial(F.scaled_dot_product_attention, q, k, v)}
        for name, config in named(rpe).items():
            modules = build_rpe(config, head_dim, heads, device=device, dtype=dtype)
            encoded = partial(rpe_attention, q, k, v, *modules, height=height, width=width)
            calls[name] = encoded
            calls[f"{name}, formula"] = partial(encoded, backend="eager")
        forward = {name: partial(_without_graph, call) for name, call in calls.items()}
        backward = {name: partial(_with_gradients, call, (q, k, v), grad) for name, call in calls.items()}
        for name, runs in zip(PASSES, (forward, backward), strict=True):
            yield Row(f"{height}x{width}", name, in_turns(runs, device, seconds))


def model(name: str, rpe: list[str], *, batch: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """Rows of a model of timm: inference, and forward and backward of training.

    Raises:
        ValueError: timm has no such model, or `equip` refuses it.
    """
    import timm

    try:
        models: dict[str, Any] = {"without": timm.create_model(name)}
    except RuntimeError as error:
        raise ValueError(f"--model {name}: {error}") from None
    models |= {short: equip(timm.create_model(name), config) for short, config in named(rpe).items()}
    images = torch.randn(batch, *models["without"].default_cfg["input_size"], device=device)

    for model in models.values():
        model.to(device)
    inference = {name: partial(_without_graph, partial(model.eval(), images)) for name, model in models.items()}
    yield Row(name, "inference", in_turns(inference, device, seconds))
    training = {name: partial(_step, model.train(), images) for name, model in models.items()}
    yield Row(name, "with backward", in_turns(training, device, seconds))


def in_turns(runs: Mapping[str, Run], device: torch.device, seconds: float) -> dict[str, float]:
    """The median seconds of each run: at least three rounds in which all take turns, for about `seconds` in all."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # what a first call builds
    began = time.perf_counter()
    while len(next(iter(spent.values()))) < 3 or time.perf_counter() - began < seconds:
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            spent[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in spent.items()}


def named(rpe: Iterable[str]) -> dict[str, RPEConfig]:
    """{name: configuration}: where the encodings are ("k", "q, k, v"), or the strings where two are at one place.

    Raises:
        ValueError: a string is none of a configuration.
    """
    configs = {text: rpe_config_from_string(text) for text in rpe}
    places = {letters(config): config for config in configs.values()}
    return places if len(places) == len(configs) else configs


def letters(config: RPEConfig) -> str:
    """Where the encodings are: k, or q, k, v."""
    return ", ".join(name[-1] for name, single in vars(config).items() if single is not None)


def _without_graph(call: Run) -> None:
    with torch.no_grad():
        call()


def _with_gradients(call: Run, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(call(), inputs, grad)


def _step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).logsumexp(-1).sum().backward()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
