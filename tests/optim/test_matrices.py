"""Which parameters of every model are matrices, as its modules say; and an optimizer's state from before they did."""

import re

import pytest
import torch
from torch import nn

from meristem.config import preset_names
from meristem.errors import WrongValue
from meristem.events import silent
from meristem.models.build import build as build_model
from meristem.optim import state as optim_state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build, split
from meristem.runs.config import load_config
from zoo import VOCABULARY, ZOO

GROUPS = {
    "matrix": (
        r"(recall|mixer|attention)\.qkv\.weight",
        r"(mixer|attention|memory|join)\.out\.weight",
        r"(mixer\.query|mixer\.ask|shares\.ask|combine\.gate)\.weight",
        r"mlp\.(gate_up|up|out)\.weight",
        r"feedforward\.(up|out)\.weight",
        r"stack\.cells\.weight_[ih]h_l\d",
    ),
    "decay": (r"^head\.weight",),
    "no_decay": (
        r"^embedding\.weight",
        r"^position_td",
        r"^join\.query_d",
        r"bias(_\w+)?$",
        r"norm\.(gain_d|weight)$",
        r"conv\.weight_dc$",
        r"gates\.(weight_hd|down_rd|code\.weight)$",
        r"(mixer|memory)\.gate\.weight$",
        r"combine\.gate\.weight$",  # of the combination ``additive``; that of ``projected`` is a matrix
        r"mix\.weight_hfv$",
        r"mix_l$",
        r"initial\.",
        r"persistent_gd$",
        r"frequency\.weight_ld$",
    ),
}
"""The last word of a group's name, to patterns of the names of what is in it: every parameter is in one of them."""


def group_by_name(model, kind="muon"):
    optimizer = build(model, OptimConfig(name=kind))
    return {name: group["name"].split(":")[2] for group in optimizer.param_groups for name in group["param_names"]}


def disagreements(model):
    """Parameters that are in another group than the one they are listed in, or are not listed."""
    return {
        name: group
        for name, group in group_by_name(model).items()
        if not any(re.search(each, name) for each in GROUPS[group])
        or (not name.endswith("combine.gate.weight") and len(listed(name)) > 1)
    }


def listed(name):
    return {group for group, patterns in GROUPS.items() if any(re.search(each, name) for each in patterns)}


@pytest.mark.parametrize("preset", preset_names())
def test_groups_of_every_preset_by_name(preset):
    """At its own sizes, as listed above: neither gain nor bias, tap, gate, embedding or first memory is a matrix."""
    config = load_config(preset, (), {}).tree
    with torch.device("meta"):
        model = build_model(config.model, config.memory, 256, random_seed=0)
    assert disagreements(model) == {}


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_every_model_by_name(name):
    with torch.device("meta"):
        model = build_model(*ZOO[name], VOCABULARY, random_seed=3)
    assert disagreements(model) == {}


@pytest.mark.parametrize("kind", ["muon", "adamuon", "adamuon_raw", "m3"])
def test_taps_of_convolutions_reach_no_matrix_optimizer(kind):
    with torch.device("meta"):
        model = build_model(*ZOO["preset-titans-mag"], VOCABULARY, random_seed=3)
    groups = group_by_name(model, kind)
    assert {groups[name] for name in groups if name.endswith("weight_dc")} == {"no_decay"}


def test_a_module_that_says_nothing_has_no_matrix():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    assert [len(side) for side in split(model)] == [0, 3]
    model.matrices = {"1.weight"}
    assert [len(side) for side in split(model)] == [1, 2]


def test_what_is_no_matrix_is_not_declared_one():
    model = nn.Sequential(nn.Linear(5, 3))
    model.matrices = {"0.bias"}
    with pytest.raises(WrongValue, match=r"Sequential.matrices names '0.bias', of the shape \(3,\); a matrix has two"):
        split(model)


class WithTaps(nn.Module):
    """A matrix and the taps of a filter, which once were moved as one."""

    def __init__(self, *matrices):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.taps = nn.Linear(5, 5, bias=False), nn.Parameter(torch.randn(5, 4))
        self.matrices = set(matrices)

    def step(self, optimizer):
        loss = self.mix(torch.ones(2, 5)).square().sum() + self.taps.square().sum()
        loss.backward()
        optimizer.step(loss.detach())
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["muon", "adamuon", "m3"])
@pytest.mark.parametrize("is_back", [False, True])
def test_moments_of_what_another_optimizer_moved_begin_afresh(kind, is_back):
    """An optimizer saved while taps were matrices goes on: everything else as it was, the taps from zero, and an event
    says which; and so for what became one."""
    sides = [("mix.weight", "taps"), ("mix.weight",)]
    before, after = (WithTaps(*names) for names in (sides[::-1] if is_back else sides))
    old = build(before, OptimConfig(name=kind))
    for _ in range(3):
        before.step(old)
    saved = {name: tensor.clone() for name, tensor in optim_state.tensors(before, old).items()}
    after.load_state_dict(before.state_dict())
    optimizer, events = build(after, OptimConfig(name=kind)), []
    optim_state.restore(after, optimizer, saved, events.append)
    assert [(event.name, event.payload) for event in events] == [
        ("optimizer.begun_afresh", {"parameters": ["taps"]}),
    ]
    kept = optim_state.tensors(after, optimizer)
    assert {name for name in kept if name.startswith("taps/")} == {"taps/nothing"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in kept.items() if not name.startswith("taps/"))
    taps = after.taps.detach().clone()
    after.step(optimizer)
    assert not torch.equal(taps, after.taps)
    again = build(after, OptimConfig(name=kind))
    optim_state.restore(after, again, optim_state.tensors(after, optimizer), silent)
