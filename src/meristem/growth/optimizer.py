"""Optimizers that follow a model as it grows: what they have gathered for the other parameters stays (growth.md 10)."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import nn

from meristem.errors import StateTransferFailed
from meristem.events import Emit, Event, silent
from meristem.growth.plan import Carry
from meristem.optim.config import OptimConfig
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import SeedSettings
from meristem.optim.surgery import carried, keep_settings, lay_beside, state_of, transferred

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


def follow(
    optimizer: MultiPeriodOptimizer,
    rebuild: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    *,
    old: Mapping[str, nn.Parameter],
    sources: Mapping[str, Carry],
) -> MultiPeriodOptimizer:
    """An optimizer of ours over a model after a change of structure; the one before stays as it is.

    Each parameter goes on from that of ``old`` which ``sources`` leads to, with its moments, counter and pending sum,
    resized as it was itself; the new ones begin with nothing. Groups of the same name keep their settings.
    rebuild: makes one for a model, as it was made before.

    Raises StateTransferFailed where something that was gathered has no place.
    """
    after = rebuild(model)
    if not isinstance(after, MultiPeriodOptimizer):
        raise StateTransferFailed(
            f"rebuild= gave a {type(after).__name__} for the {type(optimizer).__name__} there is. Make the same kind, "
            f"with optim.groups.build.",
            reasons=[type(after).__name__],
        )
    now = {name: each for name, each in model.named_parameters() if each.requires_grad}
    pairs = {name: (each, old[sources[name].source]) for name, each in now.items() if name in sources}
    pairs = {name: pair for name, pair in pairs.items() if pair[1].requires_grad}
    left = transferred(optimizer, after, pairs, {name: sources[name].places for name in pairs})
    reasons = [f"{name} {why}" for name, why in left.unfit.items()]
    reasons += [f"gradients wait for {name}, which now moves at every step" for name in left.stranded]
    if reasons:
        raise StateTransferFailed(
            f"the optimizer cannot follow the model: {'; '.join(reasons[:3])} ({len(reasons)} reasons in all). The old "
            f"one stays in use. Rebuild with the settings that it was made with.",
            reasons=reasons,
        )
    _lay_beside(optimizer.state, after.state, now, old, sources)
    keep_settings(optimizer, after)
    return after


def follow_in_place(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    old: Mapping[str, nn.Parameter],
    sources: Mapping[str, Carry],
) -> None:
    """The same for an optimizer of torch, which is changed itself: what is gone is dropped, what was resized stands in
    its place, and what is new is a group with the settings of the first.

    Raises StateTransferFailed where something that was gathered has no place.
    """
    now, gathered_before = dict(model.named_parameters()), dict(optimizer.state)
    heirs = {id(old[sources[name].source]): name for name in now if name in sources}
    stays = {id(each) for each in now.values()}
    for group in optimizer.param_groups:
        kept = [each for each in group["params"] if id(each) in stays or id(each) in heirs]
        group["params"] = [each if id(each) in stays else now[heirs[id(each)]] for each in kept]
        if "param_names" in group:
            names = {id(each): name for name, each in now.items()}
            group["param_names"] = [names[id(each)] for each in group["params"]]
    for before in [each for each in optimizer.state if id(each) not in stays]:
        gathered = optimizer.state.pop(before)
        if id(before) not in heirs:
            continue
        name = heirs[id(before)]
        places = sources[name].places
        odd = [key for key, value in gathered.items() if _is_odd(value, before, has_rule=bool(places))]
        if odd:
            raise StateTransferFailed(
                f"{type(optimizer).__name__} gathered {', '.join(odd)} for {name}, which was resized, and there is no "
                f"rule for their shape. Leave {name} as it is, or use an optimizer whose moments have the shape of "
                f"their parameter.",
                reasons=odd,
            )
        optimizer.state[now[name]] = state_of(gathered, now[name], places)
    _lay_beside(gathered_before, optimizer.state, now, old, sources)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    moved = {id(each) for group in optimizer.param_groups for each in group["params"]}
    fresh = {name: each for name, each in now.items() if name not in sources and each.requires_grad}
    fresh = {name: each for name, each in fresh.items() if id(each) not in moved}
    if fresh:
        like = optimizer.param_groups[0] if optimizer.param_groups else {}
        settings = {key: value for key, value in like.items() if key not in ("params", "param_names")}
        given = [*fresh.items()] if "param_names" in like else [*fresh.values()]
        optimizer.add_param_group(settings | {"params": given})


def _lay_beside(
    before: Mapping[torch.Tensor, dict[str, Any]],
    after: MutableMapping[torch.Tensor, dict[str, Any]],
    now: Mapping[str, nn.Parameter],
    old: Mapping[str, nn.Parameter],
    sources: Mapping[str, Carry],
) -> None:
    """Where entries of several parameters became one, their moments do too."""
    for name, parameter in now.items():
        for other, places in sources[name].beside.items() if name in sources else ():
            if old[other] in before and parameter in after:
                after[parameter] = lay_beside(after[parameter], before[old[other]], places)


def _is_odd(value: object, parameter: torch.Tensor, *, has_rule: bool) -> bool:
    """Whether something that was gathered cannot be resized as its parameter was."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and not (has_rule and value.shape == parameter.shape)
