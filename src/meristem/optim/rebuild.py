"""An optimizer made anew that goes on where the old one stands, and when to stop trying that.
A part for growth: nothing calls it yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import nn

from meristem.errors import BreakerOpen, StateTransferFailed
from meristem.events import Emit, Event
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.surgery import keep_settings, transferred
from meristem.worker.breaker import Breaker


@dataclass(frozen=True)
class Trial:
    """Whether an optimizer may be rebuilt, by how the rebuilds before went, as a value.

    After a rebuild the optimizer is on trial for ``n_steps``: each of these that fails, its loss or gradient not finite
    or an exception, counts as much as a rebuild that fails, and a trial without one is a success.

    breaker: counts in steps. since: the step after which the optimizer on trial was rebuilt, None while none is on
    trial. is_clean: no step of this trial failed.
    """

    breaker: Breaker = Breaker(n_failures=3, span=1000, pause=1000, n_successes=1)
    n_steps: int = 20
    since: int | None = None
    is_clean: bool = True

    def rebuilt(self, step: int) -> Self:
        """The optimizer was rebuilt when ``step`` steps were made."""
        return replace(self, since=step, is_clean=True)

    def failed(self, step: int) -> Self:
        """A rebuild failed."""
        return replace(self, breaker=self.breaker.failed(step))

    def stepped(self, step: int, *, is_good: bool) -> Self:
        """Step number ``step`` was made, well or not; outside a trial it counts for nothing."""
        if self.since is None or step > self.since + self.n_steps:
            return replace(self, since=None)
        trial = self if is_good else replace(self, breaker=self.breaker.failed(step), is_clean=False)
        if step < self.since + self.n_steps:
            return trial
        breaker = trial.breaker.succeeded(step) if trial.is_clean else trial.breaker
        return replace(trial, breaker=breaker, since=None)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "breaker": self.breaker.to_json()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        return cls(**{**saved, "breaker": Breaker.from_json(saved["breaker"])})


def rebuild(
    optimizer: MultiPeriodOptimizer,
    factory: Callable[[nn.Module], MultiPeriodOptimizer],
    model: nn.Module,
    *,
    trial: Trial,
    step: int,
    emit: Emit,
) -> tuple[MultiPeriodOptimizer, Trial]:
    """What ``factory`` makes for ``model``, set as ``optimizer`` is and with what it has gathered; now on trial.

    Groups keep their settings by name, parameters their moments, counters and pending sums; the clock and the norm of
    clipping are kept as well. The next steps are those of the old optimizer to the bit. Names must be the same before
    and after: for a model that has grown there is ``surgery.carried``. Call it between two steps, when no gradient is
    there. ``optimizer`` is left as it is; once another was given it is to be used no more.

    step: how many steps the run has made. Raises BreakerOpen, with nothing tried, while too many rebuilds have failed.
    Raises StateTransferFailed where something does not fit: ``optimizer`` stays the one to use, and the field ``trial``
    holds the trial with this failure in it. The events are ``optimizer.rebuilt`` and ``optimizer.rebuild_failed``.
    """
    if trial.breaker.state(step) == "open":
        raise BreakerOpen(
            f"the optimizer is not rebuilt at step {step}: {trial.breaker.n_failures} rebuilds, or steps soon after "
            f"one, failed within {trial.breaker.span:g} steps. Go on with the optimizer as it is; the next try is "
            f"allowed {trial.breaker.pause:g} steps after the last failure.",
            step=step,
        )
    cause: Exception | None = None
    after: MultiPeriodOptimizer | None = None
    try:
        after = factory(model)
    except Exception as error:  # noqa: BLE001 - a factory may be anybody's, and the run must keep its optimizer
        cause = error
    reasons = [f"making it gave {type(cause).__name__}: {cause}"] if after is None else _given(optimizer, after)
    if after is None or reasons:
        failed = trial.failed(step)
        payload = {"step": step, "n_reasons": len(reasons), "reasons": reasons[:10]}
        emit(Event("optimizer.rebuild_failed", payload | {"breaker": failed.breaker.state(step)}, "error"))
        raise StateTransferFailed(
            f"the optimizer was not rebuilt at step {step}: {'; '.join(reasons[:3])} ({len(reasons)} reasons in all). "
            f"The old one is untouched and stays in use. Rebuild it for a model of the same parameters, between two "
            f"steps and with the settings that it was built with.",
            step=step,
            reasons=reasons,
            trial=failed,
        ) from cause
    n_parameters = sum(len(group["params"]) for group in after.param_groups)
    emit(Event("optimizer.rebuilt", {"step": step, "n_groups": len(after.param_groups), "n_parameters": n_parameters}))
    return after, trial.rebuilt(step)


class Member(NamedTuple):
    """A parameter in the group that it is in."""

    parameter: nn.Parameter
    group: str


def _members(optimizer: MultiPeriodOptimizer) -> dict[str, Member]:
    """Every parameter by its name."""
    return {
        name: Member(parameter, group["name"])
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _given(before: MultiPeriodOptimizer, after: MultiPeriodOptimizer) -> list[str]:
    """Give ``after`` the settings and the gathered state of ``before``; why that cannot be, or nothing."""
    if not all(group.keys() >= {"name", "param_names"} for group in after.param_groups):
        return ["groups of the new one lack a name, or those of their parameters; optim.groups.build gives both"]
    was, now = _members(before), _members(after)
    reasons = [f"parameter {name} is gone" for name in was if name not in now]
    reasons += [f"parameter {name} is new" for name in now if name not in was]
    moved = [name for name in now if name in was and now[name].group != was[name].group]
    reasons += [f"parameter {name} was in group {was[name].group} and is in {now[name].group}" for name in moved]
    if before.clock.periods != after.clock.periods:
        reasons.append(f"levels had the periods {before.clock.periods} and have {after.clock.periods}")
    if any(member.parameter.grad is not None for member in was.values()):
        reasons.append("a step is half made, for gradients are there")
    if reasons:
        return reasons
    left = transferred(before, after, {name: (now[name].parameter, was[name].parameter) for name in now})
    reasons = [f"parameter {name} {why}" for name, why in left.unfit.items()]
    reasons += [f"gradients wait for {name}, which now moves at every step" for name in left.stranded]
    if reasons:
        return reasons
    keep_settings(before, after)
    return []
