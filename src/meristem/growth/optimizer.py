"""Optimizers that follow a model as it grows: what they have gathered for the other parameters stays (growth.md 10)."""

import torch
from torch import nn

from meristem.optim.config import OptimConfig
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.surgery import carried


def carry_on(optimizer: MultiPeriodOptimizer, model: nn.Module, config: OptimConfig) -> MultiPeriodOptimizer:
    """An optimizer of ours over the model as it is now, which goes on where the old one stands.

    Parameters that both have keep their moments, counters and pending sums, by name; those of new seeds begin with
    nothing, so that the correction of their first steps is right; those of seeds that were removed are left out.
    Call it between two steps. Raises what ``optim.surgery.carried`` raises; the old optimizer is as it was then.
    """
    held = {
        id(each): name
        for group in optimizer.param_groups
        for name, each in zip(group["param_names"], group["params"], strict=True)
    }
    names = {name: name for name, each in model.named_parameters() if held.get(id(each)) == name and each.requires_grad}
    return carried(optimizer, old=model, model=model, names=names, config=config)


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
