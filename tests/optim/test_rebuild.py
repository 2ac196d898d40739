"""An optimizer made anew takes the old one's place to the bit, or the old one stays; and when that is not tried."""

import copy
import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meristem.errors import BreakerOpen, StateTransferFailed, WrongValue
from meristem.events import silent
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.rebuild import Trial, rebuild
from meristem.optim.schedule import set_rates
from meristem.optim.view import edit, view
from meristem.worker.breaker import Breaker
from optim.levels import Levelled, copied, equal, step, train, weights

SETTINGS = {kind: {"name": kind} for kind in KINDS} | {"m3_ema": {"name": "m3", "m3_ema": True}}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
N_BEFORE = 5
"""Steps before a rebuild, between two updates of the levels of period 2 and 3, which have something waiting."""


def trained(settings):
    """A model whose groups were all set to something of their own after a few steps."""
    model, part = Levelled(2, 3), OptimConfig.model_validate({"lr": 0.01} | settings)
    optimizer = build(model, part)
    assert len(view(optimizer)) >= 3
    train(model, optimizer, range(N_BEFORE))
    for index, name in enumerate(view(optimizer)):
        edit(optimizer, name, silent, rate=0.002 * (index + 1), weight_decay=0.01 * (index + 1))
    set_rates(optimizer, 0.5)
    return model, optimizer, partial(build, config=part)


def rebuilt(optimizer, factory, model):
    """As a run does it when it has no other rebuild behind it."""
    return rebuild(optimizer, factory, model, trial=Trial(), step=N_BEFORE, emit=silent)[0]


@every_setting
def test_l13_the_next_20_updates_are_those_of_the_old_optimizer(settings):
    """Weights, moments, counters, what waits and the clock to the bit, for every kind, at every one of 20 steps."""
    model, optimizer, factory = trained(settings)
    twin, its, _ = trained(settings)
    after = rebuilt(optimizer, factory, model)
    assert after is not optimizer and optimizer.pending and equal(state.tensors(model, after), state.tensors(twin, its))
    assert view(after) == view(its) and after.clip == its.clip
    for index in range(N_BEFORE, N_BEFORE + 20):
        step(model, after, index)
        step(twin, its, index)
        assert equal(weights(model), weights(twin))
    assert equal(state.tensors(model, after), state.tensors(twin, its))


@every_setting
def test_l13_names_count_and_not_parameters(settings):
    """A model of other tensors under the same names, in another order: the same updates to the bit."""
    model, optimizer, factory = trained(settings)
    moved = copy.deepcopy(model)
    moved._modules = dict(reversed(moved._modules.items()))
    after = rebuilt(optimizer, factory, moved)
    train(model, optimizer, range(N_BEFORE, N_BEFORE + 20))
    train(moved, after, range(N_BEFORE, N_BEFORE + 20))
    assert equal(weights(model), weights(moved))


def test_l13_settings_are_the_old_ones_whatever_the_factory_says():
    """Its rates, decays, betas, clipping, the sum over processes: all are those that the run has."""
    model, optimizer, _ = trained({"grad_clip": 0.7})
    optimizer.reduce = lambda tensors, what: None
    other = OptimConfig(lr=3.0, weight_decay=0.9, beta1=0.1, eps=0.1, grad_clip=None)
    after = rebuilt(optimizer, partial(build, config=other), model)
    assert view(after) == view(optimizer) and after.clip == 0.7 and after.reduce is optimizer.reduce
    assert [group["eps"] for group in after.param_groups] == [1e-8] * len(after.param_groups)


def test_l13_a_rebuild_is_told():
    model, optimizer, factory = trained({})
    told = []
    _, trial = rebuild(optimizer, factory, model, trial=Trial(), step=N_BEFORE, emit=told.append)
    payload = {"step": 5, "n_groups": 5, "n_parameters": 7}
    assert [(event.name, event.severity, event.payload) for event in told] == [("optimizer.rebuilt", "info", payload)]
    assert trial == Trial(since=5)


# What does not fit


def wider(model):
    model.layers[1] = nn.Linear(5, 6)
    model.layers[1].period = 3


def renamed(model):
    model.gain = model.scale
    del model.scale


def slower(model):
    model.layers[1].period = 4


def no_longer_decayed(model):
    model.matrices = model.matrices - {"layers.1.weight"}


def frozen(model):
    model.norm.bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (wider, {}, r"parameter layers.1.weight was \(5, 5\) and is now \(6, 5\)"),
        (renamed, {}, r"parameter scale is gone; parameter gain is new \(2 reasons in all\)"),
        (frozen, {}, r"parameter norm.bias is gone"),
        (slower, {}, r"layers.1.weight was in group level:3:decay and is in level:4:decay; .* \(3 reasons in all\)"),
        (no_longer_decayed, {}, r"layers.1.weight was in group level:3:decay and is in level:3:no_decay"),
        (lambda model: None, {"name": "sgd"}, r"parameter scale was moved by AdamW and is now moved by SGD"),
        (lambda model: None, {"name": "muon"}, r"layers.0.weight was in group level:2:decay and is in level:2:matrix"),
        (
            lambda model: None,
            {"level_rates": {7: 1.0}},
            r"making it gave ConflictingKeys: optim.level_rates.7: no level",
        ),
    ],
)
def test_l14_what_does_not_fit_is_told_and_the_old_optimizer_goes_on(change, settings, reason):
    """Model and optimizer are as they were to the bit, and go on as if nothing had been tried."""
    model, optimizer, _ = trained({})
    twin, its, _ = trained({})
    was, changed, told = copied(state.tensors(model, optimizer)), copy.deepcopy(model), []
    change(changed)
    factory = partial(build, config=OptimConfig.model_validate({"lr": 0.01} | settings))
    with pytest.raises(StateTransferFailed, match=f"was not rebuilt at step 5: .*{reason}.* stays in use") as caught:
        rebuild(optimizer, factory, changed, trial=Trial(), step=N_BEFORE, emit=told.append)
    (event,) = told
    assert (event.name, event.severity) == ("optimizer.rebuild_failed", "error")
    assert event.payload["reasons"] == caught.value.fields["reasons"] and json.dumps(event.payload)
    assert caught.value.fields["trial"] == Trial(breaker=Trial().breaker.failed(5))
    assert equal(state.tensors(model, optimizer), was) and view(optimizer) == view(its)
    train(model, optimizer, range(N_BEFORE, N_BEFORE + 20))
    train(twin, its, range(N_BEFORE, N_BEFORE + 20))
    assert equal(weights(model), weights(twin))


def test_l14_a_factory_may_fail_as_it_likes():
    """Anybody's error is the cause of ours."""
    model, optimizer, _ = trained({})
    wrong = WrongValue("no such thing")

    def factory(_):
        raise wrong

    with pytest.raises(StateTransferFailed, match="making it gave WrongValue: no such thing") as caught:
        rebuilt(optimizer, factory, model)
    assert caught.value.__cause__ is wrong


def test_l14_an_optimizer_without_names_is_refused():
    model, optimizer, _ = trained({})
    bare = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 0.01}])
    factory = lambda model: MultiPeriodOptimizer([bare], {1: list(model.parameters())}, clip=None)  # noqa: E731
    with pytest.raises(
        StateTransferFailed, match=r"groups of the new one lack a name, .* optim.groups.build gives both"
    ):
        rebuilt(optimizer, factory, model)


def test_l14_in_the_middle_of_a_step_nothing_is_rebuilt():
    model, optimizer, factory = trained({})
    model.scale.grad = torch.ones_like(model.scale)
    with pytest.raises(StateTransferFailed, match="a step is half made, for gradients are there"):
        rebuilt(optimizer, factory, model)
    optimizer.zero_grad()
    rebuilt(optimizer, factory, model)


# When it is not tried


def test_l16_failing_steps_after_a_good_rebuild_open_the_breaker():
    """Real steps, spoilt: a good rebuild and a failing step count 1; two more, and rebuild refuses."""
    model, optimizer, factory = trained({})
    optimizer, trial = rebuild(optimizer, factory, model, trial=Trial(), step=N_BEFORE, emit=silent)
    counts = []
    for index in range(N_BEFORE, N_BEFORE + 5):
        spoilt = float("nan") if index % 2 else 1.0
        update = step(model, optimizer, index, spoilt)
        trial = trial.stepped(index + 1, is_good=not update.is_skipped)
        counts.append((len(trial.breaker.failed_at), trial.breaker.state(index + 1)))
    assert counts == [(1, "closed"), (1, "closed"), (2, "closed"), (2, "closed"), (0, "open")]
    made = []
    with pytest.raises(
        BreakerOpen, match=r"not rebuilt at step 10: 3 rebuilds, or steps soon after one, failed within"
    ):
        rebuild(optimizer, made.append, model, trial=trial, step=10, emit=silent)
    assert not made, "nothing is tried"


def test_l16_rebuilds_that_fail_and_steps_that_fail_count_alike():
    model, optimizer, factory = trained({})
    wide, trial = copy.deepcopy(model), Trial()
    wider(wide)
    with pytest.raises(StateTransferFailed) as caught:
        rebuild(optimizer, factory, wide, trial=trial, step=5, emit=silent)
    optimizer, trial = rebuild(optimizer, factory, model, trial=caught.value.fields["trial"], step=6, emit=silent)
    trial = trial.stepped(7, is_good=False)
    told = []
    with pytest.raises(StateTransferFailed) as caught:
        rebuild(optimizer, factory, wide, trial=trial, step=8, emit=told.append)
    assert told[0].payload["breaker"] == "open"
    with pytest.raises(BreakerOpen):
        rebuild(optimizer, factory, model, trial=caught.value.fields["trial"], step=9, emit=silent)


def opened() -> Trial:
    trial = Trial(breaker=Breaker(n_failures=3, span=100, pause=50, n_successes=1), n_steps=4).rebuilt(0)
    for number in (1, 2, 3):
        trial = trial.stepped(number, is_good=False)
    return trial


def test_l16_after_a_pause_one_more_rebuild_is_tried():
    """Half open: a trial without a failure closes the breaker, one failing step opens it again."""
    model, optimizer, factory = trained({})
    with pytest.raises(BreakerOpen):
        rebuild(optimizer, factory, model, trial=opened(), step=52, emit=silent)
    _, trial = rebuild(optimizer, factory, model, trial=opened(), step=53, emit=silent)
    assert trial.breaker.state(53) == "half-open"
    good = trial
    for number in (54, 55, 56, 57):
        good = good.stepped(number, is_good=True)
    assert (good.breaker.state(57), good.since) == ("closed", None)
    bad = trial.stepped(54, is_good=True).stepped(55, is_good=False)
    assert bad.breaker.state(56) == "open"


@given(st.integers(0, 50), st.integers(1, 30), st.lists(st.booleans(), max_size=80))
def test_l16_only_steps_within_the_trial_count(rebuilt_at, n_steps, goods):
    """However steps go, the failures that are counted are those of the first n steps after the rebuild."""
    breaker = Breaker(n_failures=1000, span=1000)
    trial = Trial(breaker=breaker, n_steps=n_steps).stepped(rebuilt_at, is_good=False).rebuilt(rebuilt_at)
    for number, is_good in enumerate(goods, rebuilt_at + 1):
        trial = Trial.from_json(json.loads(json.dumps(trial.to_json()))).stepped(number, is_good=is_good)
    assert list(trial.breaker.failed_at) == [
        number for number, is_good in enumerate(goods[:n_steps], rebuilt_at + 1) if not is_good
    ]
    assert (trial.since is None) == (len(goods) >= n_steps)
