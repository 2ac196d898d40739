"""The outer optimizer: parameters in levels, each of which moves at its own period."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meristem.optim.clock import Clock


@dataclass(frozen=True)
class Update:
    """What one step was, on the device.

    norm: of the gradients of this step, all levels together, before clipping.
    is_skipped: 1 where loss or norm was not finite and nothing was changed, else 0.
    """

    norm: Tensor
    is_skipped: Tensor


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


class Outer(torch.optim.Optimizer):
    """Torch optimizers behind one clock, which counts steps.

    A level of period C has its gradients summed, in float32 or better, and moves on every C-th step, the first
    included: the sum, this step in it, is clipped for itself and taken for the gradient, then the sum is 0 again. A
    level of period 1 needs no sum; alone it is clipped and moved as torch would.

    Of a step with a loss or a gradient that is not finite nothing is kept: weights, moments and sums stay to the bit.
    The clock goes on, for the host does not know of it; a level that was due in it waits for its next turn.

    pending: the sums, by parameter. They and the clock are saved with the moments (``optim.state``).
    """

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
        """Move the levels that are due by the gradients that there are; ``loss`` is what these are gradients of."""
        norms = {period: get_total_norm(_gradients(level)) for period, level in self.levels.items()}
        norm = get_total_norm(list(norms.values())) if len(norms) > 1 else next(iter(norms.values()))
        is_finite = torch.isfinite(norm) if loss is None else torch.isfinite(loss) & torch.isfinite(norm)
        is_skipped = (~is_finite).float()
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
        return Update(norm, is_skipped)

    @torch.no_grad()
    def flush(self) -> None:
        """Move the levels that still have something waiting: what a run ends with shall not be lost.

        The clock stays, and a second call does nothing. The host waits to learn which levels these are.
        """
        self.zero_grad()
        owed = [period for period in self.levels if any(pending.any() for pending in self._waiting(period))]
        for period in owed:
            norm = self._offer(period)
            if self.clip is not None:
                clip_grads_with_norm_(self.levels[period], self.clip, norm)
        if owed:
            self._move(None)
        for parameter in (parameter for period in owed for parameter in self.levels[period]):
            self.pending.pop(parameter, None)
        self.zero_grad()

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
        """Make copies of what is pending the gradients of a level; their norm."""
        for parameter in self.levels[period]:
            if parameter in self.pending:
                parameter.grad = self.pending[parameter].to(parameter.dtype, copy=True)
        return get_total_norm(_gradients(self.levels[period]))

    def _move(self, is_skipped: Tensor | None) -> None:
        """Step whatever has a gradient."""
        for part in self.parts:
            part.found_inf = is_skipped  # type: ignore[attr-defined]
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
