"""A change of structure, made whole or not at all: refuse, apply, verify, commit, else undo (growth.md 11.1).

A plan (``growth.plan``, ``growth.surgery``) says what will be there; what is there afterwards has to be that.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meristem.device.random import random_state, restore_random_state
from meristem.errors import CapabilityError, OverBudget, StateTransferFailed, TransactionUndone, WrongValue
from meristem.events import Emit, Event, silent
from meristem.growth.attach import require_unwrapped
from meristem.growth.fuse import shares
from meristem.growth.optimizer import follow, follow_in_place
from meristem.growth.plan import EVERYTHING, Plan, shapes_of
from meristem.growth.snapshot import ModelSnapshot, OptimizerSnapshot
from meristem.growth.topology import topology
from meristem.growth.verify import Probe, said, verify
from meristem.models.topology import Topology
from meristem.optim.multi_period import MultiPeriodOptimizer

Rebuild = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Limits:
    """What a change may add at most, None for no bound, and whether the model after it has to be causal.

    is_causal: that a later token changes no earlier output is probed, with what is new moved off its first values.
    """

    n_parameters: int | None = None
    size_bytes: int | None = None
    flops_per_token: float | None = None
    is_causal: bool = True


@dataclass(frozen=True)
class Receipt:
    """A change that was made.

    optimizer: the one to use from now on; of ours it is a new one, of torch's the same, of None None.
    topology: the log of the model. max_error: the largest change of an output on the probe, as a share of the largest
    output. seconds: from the first check to the last, without planning. before: what there was.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    topology: Topology
    plan: Plan
    seconds: float
    max_error: float
    before: "Before" = field(repr=False)

    def undo(self) -> None:
        """Put the model, and an optimizer of torch, back to the bit, as long as nothing was trained since; an optimizer
        of ours from before the change is as it was."""
        self.before.put_back()


def transaction(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Plan,
    probe: Probe,
    *,
    rebuild: Rebuild | None = None,
    limits: Limits = Limits(),
    emit: Emit = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> Receipt:
    """Make the change that ``plan`` describes, between two steps; a model of ours or any other, in place.

    Verified are names, shapes, dtypes and devices, that what is new is finite, that the model computes on ``probe``
    what it did as far as the plan says so, that every parameter is in one group of the optimizer under its name, that
    nothing else was written, and that no output depends on a later token. Generators are put back in any case.

    probe: a small batch: tokens ``(b, t)``, or what else the model takes first, or a mapping of its arguments.
    rebuild: makes an optimizer of ours for a model, ``lambda model: optim.groups.build(model, config)``; an optimizer
    of torch is changed in place instead.

    Raises before anything is touched: OverBudget beyond ``limits``; CapabilityError for a model that is wrapped, and
    for a weight to be changed that has two names; WrongValue for a plan of another model, a step that is half made, and
    an optimizer of ours without ``rebuild``. Raises TransactionUndone, after the event ``graft.undone``, where
    something fails later: model, optimizer and generators are then to the bit what they were, and the error has the
    cause. The event of a change is ``graft.done``.
    """
    began = clock()
    _refuse(model, optimizer, plan, rebuild, limits)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    generators = random_state(device)
    before = Before.of(model, optimizer, plan)
    try:
        wanted = said(model, probe)
        after = plan.apply(model).model
        follower = _followed(optimizer, rebuild, after, plan, before.parameters)
        checks: dict[str, Any] = {"untouched": before.untouched, "moved": before.moved, "is_causal": limits.is_causal}
        max_error = verify(after, follower, plan, probe, wanted=wanted, **checks)
    except BaseException as cause:
        before.put_back()
        _refuse_broken(model, plan)
        payload = {"operation": plan.operation, **plan.fields, "cause": f"{type(cause).__name__}: {cause}"}
        emit(Event("graft.undone", payload, "error"))
        if not isinstance(cause, Exception):
            raise
        raise TransactionUndone(
            f"'{plan.operation}' was undone: {cause} Model and optimizer are what they were; mend the cause, or go on "
            f"without it.",
            operation=plan.operation,
            cause=type(cause).__name__,
        ) from cause
    finally:
        restore_random_state(*generators, device=device)
    receipt = Receipt(after, follower, topology(after), plan, clock() - began, max_error, before)
    payload = {"operation": plan.operation, **plan.fields, "n_parameters": plan.n_parameters, "added": plan.added}
    payload |= {"removed": plan.removed, "resized": plan.resized, "preserves": plan.preserves}
    emit(Event("graft.done", payload | {"max_error": max_error, "seconds": receipt.seconds}))
    return receipt


@dataclass(frozen=True)
class Before:
    """What there was before a change: to put it back, and to see what was touched.

    untouched: tensors that have to be where they were and as they were, with how often they had been written.
    moved: names of the parameters that the optimizer moves.
    """

    model: ModelSnapshot
    optimizer: OptimizerSnapshot | None
    parameters: Mapping[str, nn.Parameter]
    untouched: list[tuple[str, Tensor, int]]
    moved: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, plan: Plan) -> "Before":
        named: dict[str, Any] = model.state_dict(keep_vars=True)
        may_write = set(named) if plan.writes is EVERYTHING else set(plan.writes)
        resized = set(plan.resized)
        goes_on = {carry.source for name, carry in plan.sources.items() if name not in resized}
        untouched = [(name, named[name], named[name]._version) for name in named if name in goes_on - may_write]
        groups = [] if optimizer is None else optimizer.param_groups
        moved = {id(each) for group in groups for each in group["params"]}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        is_ours = isinstance(optimizer, MultiPeriodOptimizer)
        return cls(
            ModelSnapshot.of(model, [named[name] for name in named if name in may_write]),
            None if optimizer is None or is_ours else OptimizerSnapshot.of(optimizer),
            parameters,
            untouched,
            frozenset(name for name, each in parameters.items() if id(each) in moved),
        )

    def put_back(self) -> None:
        self.model.put_back()
        if self.optimizer is not None:
            self.optimizer.put_back()


def _followed(
    optimizer: torch.optim.Optimizer | None,
    rebuild: Rebuild | None,
    model: nn.Module,
    plan: Plan,
    old: Mapping[str, nn.Parameter],
) -> torch.optim.Optimizer | None:
    if optimizer is None:
        return None
    if isinstance(optimizer, MultiPeriodOptimizer) and rebuild is not None:
        return follow(optimizer, rebuild, model, old=old, sources=plan.sources)
    follow_in_place(optimizer, model, old=old, sources=plan.sources)
    return optimizer


def _refuse(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, plan: Plan, rebuild: Rebuild | None, limits: Limits
) -> None:
    """Raise for what can be known before anything is touched."""
    require_unwrapped(model)
    if shapes_of(model) != plan.before:
        raise WrongValue(
            f"the plan of '{plan.operation}' was made for a model with other names or shapes than this one has. Plan "
            f"it anew, for the model as it is now.",
            value=plan.operation,
        )
    if isinstance(optimizer, MultiPeriodOptimizer) and rebuild is None:
        raise WrongValue(
            "an optimizer of ours is made anew for the model after a change, and rebuild= was not given. Pass "
            "rebuild=lambda model: build(model, config), with meristem.optim.groups.build.",
            value="rebuild",
        )
    half = [name for name, each in model.named_parameters() if each.grad is not None]
    if half and optimizer is not None:
        raise WrongValue(
            f"a step is half made: {half[0]} has a gradient ({len(half)} in all). Change the structure between two "
            f"steps, after optimizer.step() and zero_grad().",
            value=half[0],
        )
    for what in ("n_parameters", "size_bytes", "flops_per_token"):
        cap, needed = getattr(limits, what), getattr(plan, what)
        if cap is not None and (needed is None or needed > cap):
            raise OverBudget(
                f"'{plan.operation}' needs {'an unknown number of' if needed is None else f'{needed:g}'} {what}, and "
                f"{cap:g} are left. Choose something smaller, or raise the budget.",
                needed=needed,
                limit=cap,
            )
    _refuse_shared(model, plan)


def _refuse_shared(model: nn.Module, plan: Plan) -> None:
    """Raise CapabilityError where a weight that changes has another name, whose owner would not change with it."""
    sources = plan.sources
    changing = {sources[name].source for name in plan.resized}
    if plan.writes is not EVERYTHING:
        changing |= plan.writes
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name in changing & named.keys():
        other = next((each for each in named if each not in changing and shares(named[name], named[each])), None)
        if other is not None:
            raise CapabilityError(
                f"'{plan.operation}' would change '{name}', which is '{other}' too. Untie them first, or leave both.",
                operation=plan.operation,
                reason="shared weight",
            )


def _refuse_broken(model: nn.Module, plan: Plan) -> None:
    """What was put back has to be what the plan began with."""
    if shapes_of(model) != plan.before:
        raise StateTransferFailed(
            f"undoing '{plan.operation}' left other names or shapes than there were. Load the last checkpoint.",
            reasons=[plan.operation],
        )
