"""The command `irpe`: inspect, train, evaluate, predict, export, compare, sweep, detect, bench, show and info."""

import importlib.metadata
import io
import platform
import sys
from typing import Annotated

REMEDY = 'install what the command `irpe` needs, in the folder of irpe: pip install ".[train]"'
try:
    import typer
    from rich.table import Table

    from ._version import __version__
    from .cli import bench, compare, detect, export, inspect, predict, show, sweep, train
    from .cli.common import console, new_folder
    from .cli.torchrun import Commands
except ImportError as error:
    raise SystemExit(f"irpe: {error}; {REMEDY}") from None
except KeyboardInterrupt:
    raise SystemExit(130) from None

__all__ = ["app", "main", "new_folder"]

app = typer.Typer(
    name="irpe",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # an unexpected error shows Python's own traceback
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irpe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Image relative position encoding (iRPE) for vision transformers."""


app.command()(inspect.inspect)
app.command()(train.train)
app.command()(train.evaluate)
app.command()(predict.predict)
app.command()(export.export)
app.command()(compare.compare)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sweep.sweep)
app.command()(detect.detect)
app.command()(bench.bench)
app.command()(show.show)


def main() -> None:
    """Runs the command; a missing package is one sentence, wrong input one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a locale without the letters of a name is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("irpe", "rpe_ops"):
            raise
        raise SystemExit(f"irpe: {error}; {REMEDY}") from None


@app.command()
def info() -> None:
    """Print versions, the device, and which backends run here and why the others do not."""
    import torch

    import rpe_ops

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("irpe", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "timm", "torchvision", "transformers", "triton", "scikit-learn", "matplotlib"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "absent")
    cuda = torch.cuda.is_available()
    device = (
        torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads; no CUDA device is visible"
    )
    table.add_row("device", device)
    console.print(table)
    console.print()
    console.print("backends")
    backends = Table(show_header=False, box=None, pad_edge=False)
    for name, words in rpe_ops.backends(compile=True).items():
        backends.add_row(f"  {name}", words)
    console.print(backends)


if __name__ == "__main__":
    main()
