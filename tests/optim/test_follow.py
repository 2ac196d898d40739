"""An optimizer that is made anew for the same model takes the place of the old one to the bit (growth.md 10.3, L13)."""

import pytest

from meristem.growth.optimizer import follow
from meristem.growth.plan import Carry
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.schedule import set_rates
from optim.levels import Levelled, equal, step, train, weights

SETTINGS = {kind: {"name": kind} for kind in KINDS} | {"m3_ema": {"name": "m3", "m3_ema": True}}
N_BEFORE = 5
"""Steps before an optimizer follows, between two updates of the levels of period 2 and 3, which have some waiting."""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_l13_the_next_20_updates_are_those_of_the_old_optimizer(settings):
    """Weights, moments, counters and what waits, for every kind, whatever its groups were set to meanwhile."""
    config = OptimConfig.model_validate({"lr": 0.01} | settings)
    made = []
    for _ in range(2):
        model = Levelled(2, 3)
        optimizer = build(model, config)
        train(model, optimizer, range(N_BEFORE))
        for index, group in enumerate(optimizer.param_groups):
            group |= {"rate": 0.002 * (index + 1), "weight_decay": 0.01 * (index + 1)}
        set_rates(optimizer, 0.5)
        made.append((model, optimizer))
    (model, optimizer), (twin, its) = made
    named = dict(model.named_parameters())
    same = {name: Carry(name) for name in named}
    after = follow(optimizer, lambda model: build(model, config), model, old=named, sources=same)
    assert after is not optimizer and optimizer.pending
    for index in range(N_BEFORE, N_BEFORE + 20):
        step(model, after, index)
        step(twin, its, index)
        assert equal(weights(model), weights(twin))
    assert equal(state.tensors(model, after), state.tensors(twin, its))
