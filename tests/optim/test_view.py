"""Who may look at the groups of an optimizer, and how one is changed."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import WrongValue
from meristem.events import silent
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.schedule import set_rates
from meristem.optim.view import GroupRecord, edit, view
from optim.levels import Levelled, equal, train, weights

NAMES = ["level:1:no_decay", "level:2:decay", "level:2:no_decay"]


def made(kind="adamw", **settings):
    model = Levelled(2)
    return model, build(model, OptimConfig(name=kind, lr=0.01, **settings))


def test_l15_a_view_says_how_every_group_is_set():
    _, optimizer = made(level_rates={2: 3.0}, level_betas={2: (0.5, 0.6)}, weight_decay=0.2)
    set_rates(optimizer, 0.5)
    assert list(view(optimizer)) == NAMES
    assert view(optimizer)["level:2:decay"] == GroupRecord(
        "level:2:decay", 2, rate=0.03, rate_now=0.015, weight_decay=0.2, betas=(0.5, 0.6), n_parameters=25
    )
    assert [record.n_parameters for record in view(optimizer).values()] == [15, 25, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_l15_every_group_of_every_kind_has_a_name_of_its_own(kind):
    """Names, and the names of parameters, are in the order of what they name; none is told twice."""
    model, optimizer = made(kind)
    assert len(view(optimizer)) == len(optimizer.param_groups)
    by_name = dict(model.named_parameters())
    members = [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    assert all(by_name[name] is parameter for name, parameter in members)
    assert sorted(name for name, _ in members) == sorted(by_name)


def test_l15_a_view_cannot_be_assigned_to():
    """Nor does the optimizer change when something of the view was taken and changed elsewhere."""
    model, optimizer = made()
    seen = view(optimizer)
    with pytest.raises(TypeError, match="does not support item assignment"):
        seen["level:2:decay"] = None
    with pytest.raises(TypeError, match="does not support item deletion"):
        del seen["level:2:decay"]
    for field in dataclasses.fields(GroupRecord):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{field.name}'"):
            setattr(seen["level:2:decay"], field.name, 0)
    assert view(optimizer) == seen
    train(model, optimizer, range(1))
    set_rates(optimizer, 0.25)
    assert seen["level:2:decay"].rate_now != view(optimizer)["level:2:decay"].rate_now


@pytest.mark.parametrize("kind", KINDS)
def test_l15_an_edit_is_told_and_holds_from_the_next_step_on(kind):
    """The same steps as of an optimizer that was built so; the other groups are as they were."""
    model, optimizer = made(kind)
    twin, built = made(kind, level_rates={2: 5.0})
    told = []
    for name in [name for name in view(optimizer) if name.startswith("level:2:")]:
        edit(optimizer, name, told.append, rate=0.05)
    assert view(optimizer) == view(built)
    for each, its in ((model, optimizer), (twin, built)):
        set_rates(its, 0.5)
        train(each, its, range(5))
    assert equal(weights(model), weights(twin))
    changed = {"rate": [pytest.approx(0.01 * 2**0.5), 0.05]}
    groups = [name for name in view(optimizer) if name.startswith("level:2:")]
    assert [(event.name, event.payload) for event in told] == [
        ("optimizer.edited", {"group": name, "changed": changed}) for name in groups
    ]


def test_l15_several_values_are_edited_and_told_together():
    _, optimizer = made()
    told = []
    found = edit(optimizer, "level:1:no_decay", told.append, weight_decay=0.3, betas=(0.7, 0.8))
    assert (found.weight_decay, found.betas, found.rate, found.rate_now) == (0.3, (0.7, 0.8), 0.01, 0.01)
    (event,) = told
    expected = {"weight_decay": [0.0, 0.3], "betas": [[0.9, 0.95], [0.7, 0.8]]}
    assert json.loads(json.dumps(event.payload)) == {"group": "level:1:no_decay", "changed": expected}


@given(st.floats(1e-6, 10), st.floats(0, 1), st.floats(0, 1))
def test_an_edit_moves_the_rate_of_now_in_the_same_ratio(rate, factor, later):
    """Between two settings of the schedule as well as after the next one."""
    _, optimizer = made()
    set_rates(optimizer, factor)
    found = edit(optimizer, "level:1:no_decay", silent, rate=rate)
    assert (found.rate, found.rate_now) == (rate, pytest.approx(rate * factor))
    set_rates(optimizer, later)
    assert view(optimizer)["level:1:no_decay"].rate_now == rate * later


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("level:1:decay", {"rate": 1.0}, r"no group .* is called 'level:1:decay'. Nearest: level:2:decay"),
        (
            "level:2:decay",
            {"rate": 0.0},
            "group level:2:decay .* stays as it is: rate is 0.0; expected a number above 0",
        ),
        ("level:2:decay", {"rate": float("nan")}, "rate is nan"),
        ("level:2:decay", {"weight_decay": float("inf"), "rate": 1.0}, "weight_decay is inf; expected .* at least 0"),
        (
            "level:2:decay",
            {"betas": (0.1, 1.0), "rate": 1.0},
            r"betas are \(0.1, 1.0\); expected 2 numbers in \[0, 1\)",
        ),
        ("level:2:decay", {"betas": (0.1,)}, "expected 2 numbers"),
        ("level:2:decay", {"betas": (1.0,), "rate": -1.0}, r"rate is -1.0; .* betas are \(1.0,\)"),
    ],
)
def test_l15_an_edit_that_means_nothing_changes_nothing(name, values, message):
    _, optimizer = made()
    before, told = view(optimizer), []
    with pytest.raises(WrongValue, match=message):
        edit(optimizer, name, told.append, **values)
    assert view(optimizer) == before and not told


def test_l15_betas_of_a_group_that_has_none_are_refused():
    _, optimizer = made("sgd")
    assert view(optimizer)["level:2:decay"].betas is None
    with pytest.raises(WrongValue, match=r"betas are \(0.1, 0.2\), but what moves it has none"):
        edit(optimizer, "level:2:decay", silent, betas=(0.1, 0.2))
