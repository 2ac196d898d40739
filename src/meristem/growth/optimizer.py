"""Optimizers that follow a model as it grows: what they have gathered for the other parameters stays (growth.md 10)."""

from typing import Final

import torch
from torch import nn

from meristem.errors import StateTransferFailed
from meristem.events import Emit, Event, silent
from meristem.optim.config import OptimConfig
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.surgery import carried

JOINING: Final = SeedSettings()


def carry_on(
    optimizer: MultiPeriodOptimizer,
    model: nn.Module,
    config: OptimConfig,
    *,
    settings: SeedSettings = JOINING,
    emit: Emit = silent,
) -> MultiPeriodOptimizer:
    """An optimizer of ours over the model as it is now, which goes on where the old one stands.

    Parameters that both have keep their moments, counters and pending sums, by name; those of new seeds begin with
    nothing, so that the correction of their first steps is right; those of seeds that were removed are left out. What a
    frozen host has gathered stays too.

    settings: how new seeds are moved; their warm-up begins with the next step. Call it between two steps. Raises what
    ``optim.surgery.carried`` raises, and StateTransferFailed where ``config`` has another optimizer move a parameter,
    which could not use what was gathered; the old optimizer is as it was then. The events are ``optimizer.carried`` and
    ``optimizer.carry_failed``.
    """
    held = {
        id(each): name
        for group in optimizer.param_groups
        for name, each in zip(group["param_names"], group["params"], strict=True)
    }
    kept = {name: each for name, each in model.named_parameters() if held.get(id(each)) == name}
    frozen = [each for each in kept.values() if not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        names = {name: name for name in kept}
        after = carried(optimizer, old=model, model=model, names=names, config=config, joining=settings)
    finally:
        for each in frozen:
            each.requires_grad_(False)
    lost = [name for name, each in kept.items() if each in optimizer.state and each not in after.state]
    if lost:
        emit(Event("optimizer.carry_failed", {"n_parameters": len(lost), "parameters": lost[:10]}, "error"))
        raise StateTransferFailed(
            f"what was gathered for {', '.join(lost[:3])} ({len(lost)} parameters in all) is of no use to the "
            f"optimizer '{config.name}', which would move them from now on. The old one is untouched and stays in use; "
            f"carry on with the settings that it was built with.",
            parameters=lost,
        )
    origins = [sorted(each.settings) for each in (optimizer, after)]
    emit(Event("optimizer.carried", {"before": origins[0], "after": origins[1]}))
    return after


def forget(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Take the parameters of a module, as a seed that was removed, out of an optimizer of torch, in place.

    Their state is dropped; a group that is left without parameters is dropped with them. Add those of a new seed with
    ``optimizer.add_param_group({"params": [*seed.parameters()]})``.
    """
    gone = {id(each) for each in module.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for each in module.parameters():
        optimizer.state.pop(each, None)
