"""Loader processes: what they raise, and that they end or do not answer, as sentences about a picture."""

import functools
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

S = TypeVar("S")


class RunError(ValueError):
    """Something on the way of a run that no option was wrong about."""


class BadImageError(RunError):
    """An image that cannot be read."""


class Careful(Dataset[S]):
    """A dataset whose RunError takes the place of a batch; see `Loader`."""

    def name_of(self, key: Any) -> str:
        """What a message calls the picture of a key."""
        raise NotImplementedError

    def __getitems__(self, keys: Sequence[Any]) -> list[S] | RunError:
        try:
            return [self[key] for key in keys]
        except RunError as error:
            return error


@dataclass(frozen=True)
class Reading:
    """How a training process reads images: by so many processes (0: by itself), for which it waits so many seconds."""

    workers: int
    timeout: int  # 0 is for ever


class Loader(DataLoader[Any]):
    """A DataLoader of a `Careful` dataset that raises its RunError as it is.

    An error that a worker raises would come with torch's words around it, and a traceback. A worker that has ended, or
    that does not answer, is one of a picture too.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[Sequence[Any]], Any], reading: Reading, **options: Any
    ) -> None:
        super().__init__(
            dataset, collate_fn=functools.partial(_unless_error, collate), num_workers=reading.workers,
            timeout=reading.timeout if reading.workers else 0, pin_memory=torch.cuda.is_available(), **options,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before, done = set(multiprocessing.active_children()), 0
        batches = super().__iter__()
        mine = set(multiprocessing.active_children()) - before
        ended = ""
        while not ended:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                ended = self._reason(str(error))
                continue
            if isinstance(batch, RunError):
                raise batch
            done += 1
            yield batch
        with _unwatched():
            for worker in mine:
                worker.kill()  # one that is stopped would not end by itself, and neither would this process
                worker.join()
            del batches
        raise RunError(ended + self._awaited(done))

    def _reason(self, words: str) -> str:
        if "timed out" in words:
            return f"no picture came from the loader processes for {self.timeout:g} seconds (--loader-timeout)"
        return "a loader process was ended from outside (where memory is short, fewer --loader-workers need less)"

    def _awaited(self, done: int) -> str:
        """Which picture the next batch begins with, where the order is known."""
        if not isinstance(self.dataset, Careful) or self.batch_sampler is None:
            return ""
        keys = next(itertools.islice(iter(self.batch_sampler), done, None), None)
        return f"; the batch that was awaited begins with {self.dataset.name_of(keys[0])}" if keys else ""


@contextmanager
def _unwatched() -> Iterator[None]:
    """While the block runs, torch does not tell of its processes that end."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _unless_error(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any] | RunError) -> Any:
    return samples if isinstance(samples, RunError) else collate(samples)
