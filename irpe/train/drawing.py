"""Text in pictures as it is: names of classes and of runs are no mathematics."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib


@contextmanager
def plain_text() -> Iterator[None]:
    """While the block runs, `$` in a text is a dollar, and letters that the font lacks are no warning."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield
