"""What is drawn, and who draws it: random numbers as functions of where a run is, and the share of one process.

Nothing here keeps random state, so that a run that goes on draws what it would have drawn.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def mixed(*parts: Any) -> int:
    """A number of 63 bits that depends on all parts."""
    text = ",".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(*parts: Any) -> None:
    """Python's, numpy's and torch's random numbers start from a function of the parts."""
    number = mixed(*parts)
    random.seed(number)
    np.random.seed(number % 2**32)
    # torch.manual_seed does the same half a millisecond slower where a GPU has not been used yet
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@dataclass(frozen=True)
class Share:
    """What one process takes of every step: batch `micro` has the places rank, rank + size, ... of its images."""

    rank: int
    size: int
    batch_size: int  # of all processes and accumulated batches
    accumulate: int

    def __post_init__(self) -> None:
        parts = self.size * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be shared by {self.size} processes x {self.accumulate} "
                f"accumulated batches; expected a multiple of {parts}"
            )

    @property
    def local(self) -> int:
        """Images of one batch of one process."""
        return self.batch_size // (self.size * self.accumulate)

    def places(self, step: int) -> list[range]:
        """For each accumulated batch of a step of the epoch, the places in the epoch."""
        mine = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.size)
        return [mine[k * self.local : (k + 1) * self.local] for k in range(self.accumulate)]
