"""The outer optimizer: parameters in levels, each of which moves at its own period."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meristem.optim.half import LossScale, stepped_in_float32
from meristem.optim.period_clock import Clock

Reduce: TypeAlias = Callable[[Sequence[Tensor], str], None]
"""Puts into each tensor its sum over all processes. The text says what for: ``period 8``, or ``control``."""


@dataclass(frozen=True)
class Update:
    """What one step was, on the device.

    norm: of the gradients of this step, all levels together, before clipping.
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

    pending: the sums, by parameter. They and the clock are saved with the moments (``optim.state``).
    reduce: how processes sum; None for a single one.
    loss_scale: the factor on the loss (``scale_loss``) that gradients come with; None for 1.
    """

    reduce: Reduce | None = None
    loss_scale: LossScale | None = None

    def __init__(
        self, parts: Sequence[torch.optim.Optimizer], levels: Mapping[int, list[nn.Parameter]], *, clip: float | None
    ) -> None:
        """parts: each parameter in one of them. levels: period to parameters. clip: largest norm of a level, or None.

        What ``parts`` hold, groups and state, is from now on seen and changed through this one as well.
        """
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state
        self.parts, self.clip = tuple(parts), clip
        self.levels = {period: levels[period] for period in sorted(levels)}
        self.clock = Clock(0, tuple(self.levels), "steps")
        self.pending: dict[Tensor, Tensor] = {}
        self._gradient_norms: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Update:  # type: ignore[override]
        """Move the levels that are due by the gradients that there are; ``loss`` is what these are gradients of.

        With a loss scale they are those of ``scale_loss(loss)``.
        """
        if self.loss_scale is not None:
            self.loss_scale.unscale([gradient for level in self.levels.values() for gradient in _gradients(level)])
        norms = {period: _norm(_gradients(level)) for period, level in self.levels.items()}
        norm = get_total_norm(list(norms.values())) if len(norms) > 1 else next(iter(norms.values()))
        is_finite = torch.isfinite(norm) if loss is None else torch.isfinite(loss) & torch.isfinite(norm)
        update = Update(norm, (~is_finite).float(), loss)
        if self.reduce is not None:
            update = _agreed(update, norms, self.reduce)
        is_skipped = update.is_skipped
        if self.loss_scale is not None:
            update = replace(update, is_rescaled=self.loss_scale.update(is_skipped))
        self._gradient_norms = {period: norms[period] for period in self.levels if period > 1}
        due = [period for period, fires in zip(self.levels, self.clock.pulse(), strict=True) if fires]
        for period in self.levels:
            if period > 1:
                self._wait(period, is_skipped)
                norms[period] = self._offer(period) if period in due else norms[period]
            if self.clip is not None and period in due:
                clip_grads_with_norm_(self.levels[period], self.clip, norms[period])
        self._move(is_skipped)
        self._spend(due, is_skipped)
        self.clock = self.clock.advanced(1)
        return update

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
        for period in owed:
            norm = self._offer(period)
            if self.clip is not None:
                clip_grads_with_norm_(self.levels[period], self.clip, norm)
        if owed:
            self._move(None)
        for parameter in (parameter for period in owed for parameter in self.levels[period]):
            self.pending.pop(parameter, None)
        self.zero_grad()

    @torch.no_grad()
    def gather_pending(self, *, is_first: bool) -> None:
        """Bring what waits in all processes into the first one, whose state then is that of the run; alone, nothing.

        It is what a checkpoint needs: the sum over all processes stays what it was. All of them must call it.
        """
        if self.reduce is None:
            return
        for period in self.levels:
            waiting = self._waiting(period)
            if waiting:
                self.reduce(waiting, f"period {period}")
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
            pending_norm = get_total_norm(self._waiting(period)).to(gradient_norm)
            norms = torch.stack([pending_norm, gradient_norm]).tolist()
            found[period] = Health(norms[0], norms[1], n_steps=(self.clock.count - 1) % period)
        return found

    def _wait(self, period: int, is_skipped: Tensor) -> None:
        """Take the gradients of a level off its parameters and add them to what is pending, unless they are spoilt."""
        for parameter in self.levels[period]:
            if parameter.grad is None:
                continue
            gradient = torch.where(is_skipped.bool(), 0, parameter.grad)
            parameter.grad = None
            if parameter not in self.pending:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                self.pending[parameter] = torch.zeros_like(gradient, dtype=dtype)
            self.pending[parameter].add_(gradient)

    def _offer(self, period: int) -> Tensor:
        """Make copies of what is pending, summed over all processes, the gradients of a level; their norm."""
        parameters = [parameter for parameter in self.levels[period] if parameter in self.pending]
        sums = [self.pending[parameter].clone() for parameter in parameters]
        if self.reduce is not None:
            self.reduce(sums, f"period {period}")
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        return _norm(_gradients(self.levels[period]))

    def _owed(self) -> list[int]:
        """The levels that have something waiting, in whichever process."""
        periods = [period for period in self.levels if self._waiting(period)]
        if not periods:
            return []
        counts = [torch.stack([pending.any() for pending in self._waiting(period)]).sum() for period in periods]
        count = torch.stack(counts).float()
        if self.reduce is not None:
            self.reduce([count], "control")
        return [period for period, n_waiting in zip(periods, count.tolist(), strict=True) if n_waiting]

    def _move(self, is_skipped: Tensor | None) -> None:
        """Step whatever has a gradient."""
        for part in self.parts:
            part.found_inf = is_skipped  # type: ignore[attr-defined]
            with stepped_in_float32(part):
                part.step()

    def _spend(self, periods: Iterable[int], is_skipped: Tensor) -> None:
        """What was applied waits no longer; what was skipped waits on."""
        spent = [pending for period in periods for pending in self._waiting(period)]
        if spent:
            torch._foreach_mul_(spent, is_skipped)

    def _waiting(self, period: int) -> list[Tensor]:
        """The sums of a level; 0 right after it has moved."""
        return [self.pending[parameter] for parameter in self.levels[period] if parameter in self.pending]


def _gradients(level: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in level if parameter.grad is not None]


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together; where each process holds a part of each, of the whole ones."""
    norm = get_total_norm(gradients)
    full_tensor: Callable[[], Tensor] | None = getattr(norm, "full_tensor", None)  # a DTensor: its module loads slowly
    return norm if full_tensor is None else full_tensor()


def _agreed(own: Update, norms: Mapping[int, Tensor], reduce: Reduce) -> Update:
    """One update for all processes, by one small sum: skipped if in any of them.

    What waits is not summed before its level moves. Of its gradients the norm is the root of the squares of all
    processes: exact where theirs are orthogonal, as those of noise nearly are.
    """
    dtype = torch.promote_types(own.norm.dtype, torch.float32)
    slow = [norm.to(dtype).square() for period, norm in norms.items() if period > 1]
    loss = torch.zeros_like(own.norm) if own.loss is None else own.loss
    told = torch.stack([own.is_skipped.to(dtype), loss.to(dtype), *slow])
    reduce([told], "control")
    fast = [norm.to(dtype) for period, norm in norms.items() if period == 1]
    return Update(
        norm=get_total_norm([*fast, *told[2:].sqrt()]) if slow else own.norm,
        is_skipped=(told[0] > 0).float(),
        loss=None if own.loss is None else told[1],
    )
