"""What the tests of equipped models of every library share."""

import torch
from torch import nn

from irpe import get_rpe_config

QKV = get_rpe_config(ratio=1.9, method="product", rpe_on="qkv")


def fill(model):
    """The model, with random tables."""
    torch.manual_seed(1)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    return model


def tables_of(model):
    return {name: one for name, one in model.named_parameters() if "lookup_table" in name}


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def spread(features):
    """A number that every token has a say in: the class token alone sees one bucket on keys in the last block."""
    return (features * torch.arange(features.numel(), dtype=features.dtype).view_as(features).cos()).sum()


def assert_same(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name in (name for name in expected if expected[name].numel()):  # no register tokens: an empty parameter
        scale = max(1.0, expected[name].abs().max().item())
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale, name
