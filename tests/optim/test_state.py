"""Saving what the optimizer has gathered."""

import copy
import math

import pytest
import torch
from torch import nn

from meristem.errors import CheckpointMismatch
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from optim.levels import Levelled, copied, equal, train, weights


def trained(n_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    optimizer = build(model, OptimConfig())
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
    other_optimizer = build(other, OptimConfig())
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
        state.restore(wide, build(wide, OptimConfig()), saved)


def test_missing_parameter_is_refused():
    """A8.4."""
    model, optimizer = trained(1)
    saved = {name: tensor for name, tensor in state.tensors(model, optimizer).items() if not name.startswith("1.bias")}
    with pytest.raises(CheckpointMismatch, match=r"nothing for \['1.bias'\]"):
        state.restore(model, optimizer, saved)


FOUR = (2, 3, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 3, 8, 15])
def test_resuming_across_fires_changes_nothing(kind, cut):
    """20 steps over levels of (1, 2, 3, 5), one of them spoilt: cut and restored anywhere they are the same to the bit.

    What was saved goes into a new model and a new optimizer; the old ones go on meanwhile and must not reach it.
    """
    whole, spoil = Levelled(*FOUR), lambda index: math.nan if index in (6, 10) else 1.0
    optimizer = build(whole, OptimConfig(name=kind, lr=0.01))
    train(whole, optimizer, range(20), spoil)
    first = Levelled(*FOUR)
    optimizer_before = build(first, OptimConfig(name=kind, lr=0.01))
    train(first, optimizer_before, range(cut), spoil)
    saved, saved_weights = copied(state.tensors(first, optimizer_before)), weights(first)
    train(first, optimizer_before, range(cut, cut + 2))
    second = Levelled(*FOUR)
    second.load_state_dict(saved_weights)
    optimizer_after = build(second, OptimConfig(name=kind, lr=0.01))
    state.restore(second, optimizer_after, saved)
    assert optimizer_after.clock.count == cut
    train(second, optimizer_after, range(cut, 20), spoil)
    optimizer.flush()
    optimizer_after.flush()
    assert equal(weights(whole), weights(second))
    assert equal(state.tensors(whole, optimizer), state.tensors(second, optimizer_after))


def test_decaying_momenta_are_saved():
    """The other form of m3 gathers under other names."""
    whole, part = Levelled(2), OptimConfig(name="m3", m3_ema=True, lr=0.1)
    optimizer = build(whole, part)
    train(whole, optimizer, range(9))
    second = Levelled(2)
    second.load_state_dict(weights(whole))
    restored = build(second, part)
    state.restore(second, restored, copied(state.tensors(whole, optimizer)))
    for model, its in ((whole, optimizer), (second, restored)):
        train(model, its, range(9, 18))
    assert equal(weights(whole), weights(second))


def test_a_run_that_was_flushed_has_nothing_waiting_when_restored():
    """A finished run that is opened again does not move: what waited was used up."""
    model = Levelled(8)
    optimizer = build(model, OptimConfig())
    train(model, optimizer, range(5))
    optimizer.flush()
    second = Levelled(8)
    second.load_state_dict(weights(model))
    restored = build(second, OptimConfig())
    state.restore(second, restored, copied(state.tensors(model, optimizer)))
    restored.flush()
    assert equal(weights(model), weights(second))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_nothing_gathered_is_restored_as_nothing(kind):
    """Saved before the first step: the restored one begins as a fresh one does."""
    model = Levelled(2)
    part = OptimConfig(name=kind)
    saved = copied(state.tensors(model, build(model, part)))
    optimizer = build(model, part)
    state.restore(model, optimizer, saved)
    train(model, optimizer, range(3))
    other = Levelled(2)
    train(other, build(other, part), range(3))
    assert equal(weights(model), weights(other))


def test_other_levels_are_refused():
    """Counts of other periods mean nothing here, and nothing is changed."""
    model, other = Levelled(2), Levelled(3)
    optimizer, saved = build(other, OptimConfig()), state.tensors(model, build(model, OptimConfig()))
    with pytest.raises(CheckpointMismatch, match=r"has levels of the periods \(1, 2\); this model has \(1, 3\)"):
        state.restore(other, optimizer, saved)
    assert optimizer.clock.count == 0
