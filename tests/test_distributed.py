"""Equipped models in two processes (DDP, FSDP2): the losses and weights of one process that has the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from irpe.equip import equip, rpe_parameters, unequip

pytest.importorskip("timm")

from families import FAMILIES, images, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"),
]
WORLD, STEPS = 2, 4
# the images of the steps; where the model takes several sizes, two that give maps of 16 tokens in turns
SIZES = {name: ([(8, 32), (16, 16)] if one.dynamic else [one.sizes[0][0]]) for name, one in FAMILIES.items()}

# timm resamples positions in float32, and what it rounds depends on the number of images
OPTIONS = {"registers dynamic": dict(pos_embed="none")}


def build(family):
    return make(family, **OPTIONS.get(family, {}))


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    blocks = model.blocks if hasattr(model, "blocks") else [block for stage in model.layers for block in stage.blocks]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_attentions(model):
    """Sharded by attention, so that the class of each is once more another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block.attn, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": ddp, "fsdp": fsdp, "fsdp attentions": fsdp_attentions}


def train(model, family, checkpointing, part=slice(None)):
    """The losses of a few steps on a part of each batch, and the tables in the end."""
    getattr(model, "module", model).set_grad_checkpointing(checkpointing)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        size = SIZES[family][step % len(SIZES[family])]
        loss = model(images(*size, batch=2 * WORLD)[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tables = rpe_parameters(model)["params"]
    return losses, [getattr(one, "full_tensor", lambda one=one: one)().detach().clone() for one in tables]


CASES = [
    ("ddp", "registers dynamic", False),
    ("ddp", "registers dynamic", True),
    ("fsdp", "registers dynamic", False),
    ("fsdp", "registers dynamic", True),
    ("fsdp attentions", "registers dynamic", False),
    ("fsdp", "rope mixed", True),
    ("fsdp", "beit both biases", True),
    ("fsdp", "swin dynamic", True),
]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        part = slice(2 * rank, 2 * rank + 2)
        results = [train(WRAPPERS[name](build(one)), one, often, part) for name, one, often in CASES]
        torch.save(results, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each process the results of all cases: starting the processes is what takes long."""
    folder = str(tmp_path_factory.mktemp("processes"))
    mp.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{a}, {b}{', checkpointed' * c}" for a, b, c in CASES])
def test_two_processes_train_as_one(case, results):
    _, family, _ = CASES[case]
    losses, tables = train(build(family), family, False)
    assert losses[2] < losses[0]  # of the same images
    for step, expected in enumerate(losses):
        assert abs(sum(one[case][0][step] for one in results) / WORLD - expected) <= 1e-12 * max(1.0, expected)
    for one in results:
        assert all((got - table).abs().max() <= 1e-12 for got, table in zip(one[case][1], tables, strict=True))
    before = rpe_parameters(build(family))["params"]
    assert all((one - other).abs().max() > 1e-9 for one, other in zip(tables, before, strict=True))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_models_that_are_shared_already_are_refused(name, tmp_path, monkeypatch):
    """A table that is added later would be in no process's bucket of gradients."""
    monkeypatch.setitem(globals(), "WORLD", 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for equipped in (False, True):
            model = build("registers dynamic")
            shared = WRAPPERS[name](model if equipped else unequip(model))
            before = [key for key, _ in shared.named_parameters()]
            for change in (unequip, lambda one: equip(one, "rpe-1.9-product-ctx-1-k")):
                with pytest.raises(ValueError, match="shared between processes .* call equip or unequip first"):
                    change(shared)
            assert [key for key, _ in shared.named_parameters()] == before
    finally:
        dist.destroy_process_group()
