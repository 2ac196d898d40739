"""Saving what the optimizer has gathered."""

import copy

import pytest
import torch
from torch import nn

from meristem.errors import CheckpointMismatch
from meristem.optim import state
from meristem.optim.groups import build
from meristem.optim.part import OptimPart


def trained(n_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    optimizer = build(model, OptimPart())
    for index in range(n_steps):
        step(model, optimizer, index)
    return model, optimizer


def step(model, optimizer, index):
    optimizer.zero_grad()
    model(torch.randn(2, 3, generator=torch.Generator().manual_seed(index))).square().sum().backward()
    optimizer.step()


def test_restored_optimizer_goes_on_to_the_bit():
    """Two steps after a restore equal the same two steps without it."""
    model, optimizer = trained(3)
    other = copy.deepcopy(model)
    other_optimizer = build(other, OptimPart())
    state.restore(other, other_optimizer, {k: v.clone() for k, v in state.tensors(model, optimizer).items()})
    for index in (3, 4):
        step(model, optimizer, index)
        step(other, other_optimizer, index)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_restored_tensors_are_copies():
    """A step must not write into the checkpoint that it came from."""
    model, optimizer = trained(2)
    saved = {name: tensor.clone() for name, tensor in state.tensors(model, optimizer).items()}
    truth = copy.deepcopy(saved)
    state.restore(model, optimizer, saved)
    step(model, optimizer, 2)
    assert all(torch.equal(saved[name], truth[name]) for name in saved)


def test_other_shape_is_refused():
    model, optimizer = trained(1)
    saved = state.tensors(model, optimizer)
    wide = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7))
    with pytest.raises(CheckpointMismatch, match=r"'0.weight/exp_avg' of shape \(5, 3\).*a parameter of \(7, 3\)"):
        state.restore(wide, build(wide, OptimPart()), saved)


def test_missing_parameter_is_refused():
    model, optimizer = trained(1)
    saved = {name: tensor for name, tensor in state.tensors(model, optimizer).items() if not name.startswith("1.bias")}
    with pytest.raises(CheckpointMismatch, match=r"nothing for \['1.bias'\]"):
        state.restore(model, optimizer, saved)
