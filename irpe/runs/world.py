"""The processes of a run: one alone, or those that torchrun started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`; tensors of the model live on `device`, agreements are made on the CPU."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in float64 on the CPU."""
        values = values.detach().to("cpu", torch.float64)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: int) -> int:
        """The largest flag of all processes."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return int(flags)

    def gathered(self, values: list[T]) -> list[T]:
        """The lists of all processes in a row."""
        if self.size == 1:
            return values
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, values)
        return [value for part in found for value in part]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises is raised in all of them too."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except (ValueError, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


@contextmanager
def started(device: str) -> Iterator[World]:
    """The world of this process; the process group that torchrun asks for lives as long as the block.

    Raises:
        ValueError: the device is not there, or there are fewer GPUs than processes on this machine.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = device_of(device, local)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "mps":
        raise ValueError("--device mps runs in one process only; leave torchrun out, or use --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    yield World(rank, size, chosen)
    # not after an error: the others may be waiting for this process, until torchrun ends them
    dist.destroy_process_group()


def device_of(name: str, local: int = 0) -> torch.device:
    """The device of an option --device, of the process `local` of this machine; ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}; expected auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}, but torch sees no CUDA device")
        index = local if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine needs GPU {index}; there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but torch sees no MPS device")
    return device


def wrapped(model: nn.Module, world: World, parallel: str) -> nn.Module:
    """The model as `forward` and `backward` have to call it: itself, in DDP, or sharded in place by FSDP2."""
    if parallel == "fsdp":
        shard(model, world)
        return model
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def shard(model: nn.Module, world: World) -> None:
    """FSDP2 in place: each block of the model by itself, then the rest."""
    if world.size == 1:
        raise ValueError("--parallel fsdp shares a model between processes; start them with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
