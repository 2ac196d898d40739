"""M3: momentum at several time scales (Behrouz et al., Nested Learning, 2512.24695, algorithm 1)."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from meristem.optim.nonfinite import SkippingOptimizer, settle
from meristem.optim.orthogonal import orthogonal

EMA_PERIODS: Final = (1, 8, 64, 512)
EMA_KEPT: Final = (0.9, 0.95, 0.99, 0.999)
EMA_WRITTEN: Final = (0.1, 0.05, 0.01, 0.001)


class M3(SkippingOptimizer):
    """A fast momentum m₁ of every gradient g and a slow one m₂ of what f steps gathered; at learning rate η, decay λ::

        m₁ <- m₁ + β₁ g        V <- V + β₂ g²        b <- b + g
        w <- w (1 - η λ) - η (O₁ + α O₂) / (√V + ε)
        every f steps, then: m₂ <- m₂ + β₃ b, b <- 0

    with O = Newton-Schulz of a momentum that is a matrix, else the momentum itself. O₂ acts from the next step on. The
    accumulators add without decay, as printed; of eq. 75 the minus before m₂ is a misprint. A step that ``found_inf``
    skips changes nothing but the count of steps; a slow momentum that was due in it waits for its next turn.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        rate: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.99),
        alpha: float = 0.5,
        every: int = 8,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        names = {"lr": rate, "betas": betas, "alpha": alpha, "every": every, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, names)

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        names = ("fast", "square", "gathered", "slow", "slow_direction")
        states = [_counted(self.state[parameter], names, parameter) for parameter in parameters]
        fast, square, gathered, slow, slow_direction = ([state[name] for state in states] for name in names)
        beta_fast, beta_square, beta_slow = group["betas"]

        new_fast = torch._foreach_add(fast, gradients, alpha=beta_fast)
        new_square = torch._foreach_addcmul(square, gradients, gradients, value=beta_square)
        directions = torch._foreach_add(_directions(new_fast), slow_direction, alpha=group["alpha"])
        deviations = torch._foreach_sqrt(new_square)
        torch._foreach_add_(deviations, group["eps"])
        torch._foreach_div_(directions, deviations)
        weights = torch._foreach_mul(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"])
        new_gathered = torch._foreach_add(gathered, gradients)
        settle([*fast, *square, *gathered, *parameters], [*new_fast, *new_square, *new_gathered, *weights], found_inf)

        due = [state for state in states if state["n_steps"] % group["every"] == 0]
        if due:
            slow, gathered = [state["slow"] for state in due], [state["gathered"] for state in due]
            new_slow = torch._foreach_add(slow, gathered, alpha=beta_slow)
            settle([*slow, *gathered], [*new_slow, *map(torch.zeros_like, gathered)], found_inf)
            settle([state["slow_direction"] for state in due], _directions(slow), found_inf)


class EmaM3(SkippingOptimizer):
    """Decaying momenta at several periods, their sum the step: ``w <- w (1 - η λ) - η Σ S``.

    Every ``period`` steps ``S <- kept S + written (b + g)`` and b <- 0, where b gathered the gradients between. With
    one momentum of period 1 it is SGD with momentum. What is skipped is as with M3.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        rate: float,
        periods: tuple[int, ...] = EMA_PERIODS,
        kept: tuple[float, ...] = EMA_KEPT,
        written: tuple[float, ...] = EMA_WRITTEN,
        weight_decay: float = 0.0,
    ) -> None:
        scales = tuple(zip(periods, kept, written, strict=True))
        super().__init__(parameters, {"lr": rate, "scales": scales, "weight_decay": weight_decay})

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        levels = range(len(group["scales"]))
        names = [f"{word}_{level}" for level in levels for word in ("mean", "gathered")]
        states = [_counted(self.state[parameter], names, parameter) for parameter in parameters]
        weights = list(torch._foreach_mul(parameters, 1 - group["lr"] * group["weight_decay"]))
        for level, (period, kept, written) in enumerate(group["scales"]):
            for index, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
                mean, gathered = state[f"mean_{level}"], state[f"gathered_{level}"]
                new_mean, new_gathered = mean, gathered + gradient
                if state["n_steps"] % period == 0:
                    new_mean, new_gathered = kept * mean + written * new_gathered, torch.zeros_like(gathered)
                settle([mean, gathered], [new_mean, new_gathered], found_inf)
                weights[index] = weights[index] - group["lr"] * mean
        settle(parameters, weights, found_inf)


def _counted(state: dict[str, Any], names: Iterable[str], parameter: Tensor) -> dict[str, Any]:
    """What is gathered for a parameter, one step later; zeros before the first."""
    if not state:
        state |= {"n_steps": 0} | {name: torch.zeros_like(parameter) for name in names}
    state["n_steps"] += 1
    return state


def _directions(momenta: Iterable[Tensor]) -> list[Tensor]:
    """Matrices orthogonalised, everything else as it is."""
    momenta = list(momenta)
    matrices = iter(orthogonal([momentum for momentum in momenta if momentum.dim() == 2]))
    return [next(matrices) if momentum.dim() == 2 else momentum for momentum in momenta]
