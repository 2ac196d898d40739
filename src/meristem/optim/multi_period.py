"""The outer optimizer: parameters in levels, each of which moves at its own period."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meristem.optim.half import LossScale, stepped_in_float32
from meristem.optim.origins import FROM_THE_START, HOST, SeedSettings
from meristem.optim.period_clock import Clock

Reduce: TypeAlias = Callable[[Sequence[Tensor], str], None]
"""Puts into each tensor its sum over all processes. The text says what for: ``period 8``, or ``control``."""

Unit: TypeAlias = tuple[str, int]
"""An origin and a period: parameters that are clipped, and wait, together."""


@dataclass(frozen=True)
class Update:
    """What one step was, on the device.

    norm: of the gradients of this step, all levels of the host together, before clipping; of all seeds where the host
        has no gradient.
    is_skipped: 1 where loss or norm was not finite and nothing was changed, else 0.
    loss: the one that was given; of several processes, the sum of theirs.
    is_rescaled: 1 where that happened in fp16 and the loss scale was lowered for it, which is no fault of the run.
    """

    norm: Tensor
    is_skipped: Tensor
    loss: Tensor | None = None
    is_rescaled: Tensor | None = None


@dataclass(frozen=True)
class Health:
    """How the waiting gradients of a level grow.

    ratio: |pending| / |gradient of the last step|. Near the root of n_steps the gradients are a random walk, near
        n_steps they agree; a level whose ratio falls below the first fights itself.
    n_steps: how many steps have gone by since the level was last due, skipped ones included.
    """

    pending_norm: float
    gradient_norm: float
    n_steps: int

    @property
    def ratio(self) -> float:
        return self.pending_norm / self.gradient_norm if self.gradient_norm else 0.0


class MultiPeriodOptimizer(torch.optim.Optimizer):
    """Torch optimizers behind one clock, which counts steps.

    A level of period C has its gradients summed, in float32 or better, and moves on every C-th step, the first
    included: the sum, this step in it, is clipped for itself and taken for the gradient, then the sum is 0 again. A
    level of period 1 needs no sum; alone it is clipped and moved as torch would.

    Of a step with a loss or a gradient that is not finite nothing is used: weights, moments and sums stay to the bit.
    The clock goes on, for the host does not know of it; a level that was due in it waits for its next turn.

    Of several processes each gives its share of loss and gradient. Those of period 1 come summed, by the engine that
    makes them; a slower level gathers in each process for itself and is summed once, when it moves. Whether a step is
    skipped is the same in all of them (memory.md 6.4, 9.6).

    What a seed holds is an origin of its own: its gradients are clipped by their own norm, and where they are not
    finite they alone are dropped, and counted. So a host moves as it would without its seeds, to the bit, wherever its
    gradients are the same (growth.md 9.1, 10.1). A parameter without a gradient is not touched; of a seed this holds
    of a slow level too, of which nothing waits.

    settings: of every seed, by its origin, as ``seed:blocks.1``. joined: of every part of the host that came later, by
    what its groups say; its gradients are clipped with those of the host. Both are saved with the moments.
    pending: the sums, by parameter. They and the clock are saved with the moments (``optim.state``).
    reduce: how processes sum; None for a single one.
    loss_scale: the factor on the loss (``scale_loss``) that gradients come with; None for 1.
    """

    reduce: Reduce | None = None
    loss_scale: LossScale | None = None

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        levels: Mapping[int, list[nn.Parameter]],
        *,
        clip: float | None,
        settings: SeedSettings = FROM_THE_START,
    ) -> None:
        """parts: each parameter in one of them, each with groups of one ``origin``, which is the host unless they say.
        levels: period to parameters. clip: largest norm of a level, or None. settings: of every seed.

        What ``parts`` hold, groups and state, is from now on seen and changed through this one as well.
        """
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state
        self.parts, self.clip = tuple(parts), clip
        self.levels = {period: levels[period] for period in sorted(levels)}
        self.units = _units(self.param_groups, self.levels)
        self.settings = {origin: settings for origin, _ in self.units if origin != HOST}
        self.joined = {group["joined"]: FROM_THE_START for group in self.param_groups if "joined" in group}
        self.clock = Clock(0, tuple(self.levels), "steps")
        self.pending: dict[Tensor, Tensor] = {}
        self._gradient_norms: dict[int, Tensor] = {}
        self._n_dropped: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Update:  # type: ignore[override]
        """Move the levels that are due by the gradients that there are; ``loss`` is what these are gradients of.

        With a loss scale they are those of ``scale_loss(loss)``.
        """
        if self.loss_scale is not None:
            self.loss_scale.unscale([gradient for level in self.levels.values() for gradient in _gradients(level)])
        norms = {unit: _norm(_gradients(parameters), parameters[0].device) for unit, parameters in self.units.items()}
        update, dropped = self._judged(loss, norms)
        if self.loss_scale is not None:
            update = replace(update, is_rescaled=self.loss_scale.update(update.is_skipped))
        skipped = {HOST: update.is_skipped} | {
            origin: update.is_skipped.maximum(is_dropped) for origin, is_dropped in dropped.items()
        }
        self._gradient_norms = {
            period: norm for (origin, period), norm in norms.items() if origin == HOST and period > 1
        }
        due = [period for period, fires in zip(self.levels, self.clock.pulse(), strict=True) if fires]
        for unit, parameters in self.units.items():
            (origin, period), norm = unit, norms[unit]
            if period > 1:
                self._wait(unit, skipped[origin])
                norm = self._offer(unit) if period in due else norm
            clip = self.clip if origin == HOST else self.settings[origin].grad_clip
            if clip is not None and period in due:
                clip_grads_with_norm_(parameters, clip, norm)
        self._move(skipped)
        self._spend(due, update.is_skipped)
        self.clock = self.clock.advanced(1)
        return update

    def rate_scale(self, group: Mapping[str, Any]) -> float:
        """The factor on the learning rate of a group in the next step, beside that of the schedule."""
        settings = self.settings.get(group.get("origin", HOST)) or self.joined.get(group.get("joined", ""))
        return 1.0 if settings is None else settings.factor(self.clock.count)

    def n_dropped(self) -> dict[str, int]:
        """How many gradients of each seed were not finite and were dropped; the host waits for the numbers."""
        return {origin: int(self._n_dropped.get(origin, 0)) for origin in self.settings}

    def count_dropped(self, counts: Mapping[str, int]) -> None:
        """Go on counting from there."""
        device = self.param_groups[0]["params"][0].device
        self._n_dropped = {
            origin: torch.tensor(float(count), device=device) for origin, count in counts.items() if count
        }

    def scale_loss(self, loss: Tensor) -> Tensor:
        """What to take gradients of."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    @torch.no_grad()
    def flush(self) -> None:
        """Move the levels that still have something waiting: what a run ends with shall not be lost.

        The clock stays, and a second call does nothing. The host waits to learn which levels these are.
        """
        self.zero_grad()
        owed = self._owed()
        for unit in owed:
            norm = self._offer(unit)
            clip = self.clip if unit[0] == HOST else self.settings[unit[0]].grad_clip
            if clip is not None:
                clip_grads_with_norm_(self.units[unit], clip, norm)
        if owed:
            self._move({})
        for parameter in (parameter for unit in owed for parameter in self.units[unit]):
            self.pending.pop(parameter, None)
        self.zero_grad()

    @torch.no_grad()
    def gather_pending(self, *, is_first: bool) -> None:
        """Bring what waits in all processes into the first one, whose state then is that of the run; alone, nothing.

        It is what a checkpoint needs: the sum over all processes stays what it was. All of them must call it.
        """
        if self.reduce is None:
            return
        for unit in self.units:
            waiting = self._waiting(unit)
            if waiting:
                self.reduce(waiting, f"period {unit[1]}")
        if not is_first:
            self.leave_to_first()

    def leave_to_first(self) -> None:
        """Let go of what waits here: in a process that restored what another one will offer."""
        if self.pending:
            torch._foreach_zero_(list(self.pending.values()))

    def health(self) -> dict[int, Health]:
        """How what waits compares with the gradient of the last step, by period; the host waits for the numbers."""
        found = {}
        for period, gradient_norm in self._gradient_norms.items():
            pending_norm = get_total_norm(self._waiting((HOST, period))).to(gradient_norm)
            norms = torch.stack([pending_norm, gradient_norm]).tolist()
            found[period] = Health(norms[0], norms[1], n_steps=(self.clock.count - 1) % period)
        return found

    def _judged(self, loss: Tensor | None, norms: Mapping[Unit, Tensor]) -> tuple[Update, dict[str, Tensor]]:
        """What the step is for the host, and by seed 1 where its own gradient is to be dropped, else 0."""
        own = [norm for (origin, _), norm in norms.items() if origin == HOST]
        of_seeds = [[norm for (each, _), norm in norms.items() if each == origin] for origin in self.settings]
        if not any(
            parameter.grad is not None for unit in self.units if unit[0] == HOST for parameter in self.units[unit]
        ):
            own = [norm for each in of_seeds for norm in each] or own
        norm = get_total_norm(own) if len(own) > 1 else own[0]
        is_finite = torch.isfinite(norm) if loss is None else torch.isfinite(loss) & torch.isfinite(norm)
        flags = [(~torch.isfinite(torch.stack(each)).all()).float() for each in of_seeds]
        update = Update(norm, (~is_finite).float(), loss)
        if self.reduce is not None:
            update, flags = _agreed(update, norms, flags, self.reduce)
        dropped = dict(zip(self.settings, flags, strict=True))
        for origin, is_dropped in dropped.items():
            self._n_dropped[origin] = self._n_dropped.get(origin, 0) + is_dropped
        return update, dropped

    def _wait(self, unit: Unit, is_skipped: Tensor) -> None:
        """Take the gradients of a level off its parameters and add them to what is pending, unless they are spoilt."""
        for parameter in self.units[unit]:
            if parameter.grad is None:
                continue
            gradient = torch.where(is_skipped.bool(), 0, parameter.grad)
            parameter.grad = None
            if parameter not in self.pending:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                self.pending[parameter] = torch.zeros_like(gradient, dtype=dtype)
            self.pending[parameter].add_(gradient)

    def _offer(self, unit: Unit) -> Tensor:
        """Make copies of what is pending, summed over all processes, the gradients of a level; their norm."""
        parameters = [parameter for parameter in self.units[unit] if parameter in self.pending]
        sums = [self.pending[parameter].clone() for parameter in parameters]
        if self.reduce is not None:
            self.reduce(sums, f"period {unit[1]}")
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        return _norm(_gradients(self.units[unit]), self.units[unit][0].device)

    def _owed(self) -> list[Unit]:
        """The levels that have something waiting, in whichever process."""
        units = [unit for unit in self.units if self._waiting(unit)]
        if not units:
            return []
        counts = [torch.stack([pending.any() for pending in self._waiting(unit)]).sum() for unit in units]
        count = torch.stack(counts).float()
        if self.reduce is not None:
            self.reduce([count], "control")
        return [unit for unit, n_waiting in zip(units, count.tolist(), strict=True) if n_waiting]

    def _move(self, skipped: Mapping[str, Tensor]) -> None:
        """Step whatever has a gradient, but for the origins that are skipped."""
        for part in self.parts:
            part.found_inf = skipped.get(part.param_groups[0].get("origin", HOST))  # type: ignore[attr-defined]
            with stepped_in_float32(part):
                part.step()

    def _spend(self, periods: Iterable[int], is_skipped: Tensor) -> None:
        """What was applied waits no longer; what was skipped waits on, but in a seed, where it is let go."""
        spent = []
        for origin, period in self.units:
            if period not in periods:
                continue
            if origin == HOST:
                spent += self._waiting((origin, period))
                continue
            for parameter in self.units[origin, period]:
                self.pending.pop(parameter, None)
        if spent:
            torch._foreach_mul_(spent, is_skipped)

    def _waiting(self, unit: Unit) -> list[Tensor]:
        """The sums of a level; 0 right after it has moved."""
        return [self.pending[parameter] for parameter in self.units[unit] if parameter in self.pending]


def _units(
    groups: Iterable[Mapping[str, Any]], levels: Mapping[int, list[nn.Parameter]]
) -> dict[Unit, list[nn.Parameter]]:
    """The parameters of each level by their origin, in the order of the level; those of the host first."""
    owners = {id(each): group.get("origin", HOST) for group in groups for each in group["params"]}
    found: dict[Unit, list[nn.Parameter]] = {}
    for origin in sorted(set(owners.values()), key=lambda each: (each != HOST, each)):
        for period, parameters in levels.items():
            own = [each for each in parameters if owners[id(each)] == origin]
            found |= {(origin, period): own} if own else {}
    return found


def _gradients(level: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in level if parameter.grad is not None]


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Of all of them together; where each process holds a part of each, of the whole ones."""
    if not gradients:
        return torch.zeros((), device=device)
    norm = get_total_norm(gradients)
    full_tensor: Callable[[], Tensor] | None = getattr(norm, "full_tensor", None)  # a DTensor: its module loads slowly
    return norm if full_tensor is None else full_tensor()


def _agreed(
    own: Update, norms: Mapping[Unit, Tensor], flags: Sequence[Tensor], reduce: Reduce
) -> tuple[Update, list[Tensor]]:
    """One update for all processes, by one small sum: skipped if in any of them, and so with the flags of seeds.

    What waits is not summed before its level moves. Of its gradients the norm is the root of the squares of all
    processes: exact where theirs are orthogonal, as those of noise nearly are.
    """
    dtype = torch.promote_types(own.norm.dtype, torch.float32)
    hosts = {period: norm for (origin, period), norm in norms.items() if origin == HOST}
    slow = [norm.to(dtype).square() for period, norm in hosts.items() if period > 1]
    loss = torch.zeros_like(own.norm) if own.loss is None else own.loss
    told = torch.stack([own.is_skipped.to(dtype), loss.to(dtype), *slow, *(each.to(dtype) for each in flags)])
    reduce([told], "control")
    n_slow = len(slow)
    fast = [norm.to(dtype) for period, norm in hosts.items() if period == 1]
    update = Update(
        norm=get_total_norm([*fast, *told[2 : 2 + n_slow].sqrt()]) if slow else own.norm,
        is_skipped=(told[0] > 0).float(),
        loss=None if own.loss is None else told[1],
    )
    return update, [(each > 0).float() for each in told[2 + n_slow :]]
