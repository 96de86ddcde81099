"""Processes of torchrun that fail: one speaks, and its sentence is the last thing that is read.

torchrun prints a traceback of its own about any process that ends with a status, and at the end of it what the first
failed process has left in its error file.
"""

import json
import os
import time
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from .common import ClickException, sentence

_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun, a file for each process
_PATIENCE = 3.0  # seconds in which torchrun ends the others, once the first has failed


def failing(words: str) -> None:
    """Leaves `words` for torchrun to end with; nothing is done where it has not started this process.

    An error of all processes is the first one's to tell: the others wait, and go on where the error is their own.
    """
    if _FILE not in os.environ:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE)
    # the form of torch.distributed.elastic's own handler; torchrun prints what is at the place of the traceback
    more = {"py_callstack": words, "timestamp": str(int(time.time()))}
    with open(os.environ[_FILE], "w", encoding="utf-8") as file:
        json.dump({"message": {"message": words, "extraInfo": more}}, file)


class Commands(TyperGroup):
    """The commands, whose errors go to torchrun where it has started them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except ClickException as error:
            failing(f"irpe: {sentence(error.format_message())}")
            raise
        except SystemExit as error:  # a package is missing
            if isinstance(error.code, str):
                failing(error.code)
            raise
        except Exception:
            failing(traceback.format_exc())
            raise
