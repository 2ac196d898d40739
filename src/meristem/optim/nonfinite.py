"""Steps that change nothing where the loss was not finite, without the host having to know.

Torch's fused optimizers leave everything untouched where their attribute ``found_inf`` is 1, a number on the device.
What stands here gives the same to the others.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def moving(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
    """Each group with those of its parameters that this step moves, and their gradients."""
    for group in optimizer.param_groups:
        pairs = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
        if pairs:
            yield group, [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


class SkippingOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimizer whose step moves one group after the other and honours ``found_inf``."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group, parameters, gradients in moving(self):
            self._move(parameters, gradients, group, found_inf)

    @abc.abstractmethod
    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Move the parameters of one group by their gradients; where ``found_inf`` is 1, change nothing."""


def settle(held: Sequence[Tensor], new: Sequence[Tensor], found_inf: Tensor | None) -> None:
    """Write ``new`` into ``held`` unless ``found_inf`` is 1; then ``held`` stays to the bit, whatever ``new`` is."""
    if found_inf is not None:
        new = [torch.where(found_inf.bool(), old, value) for old, value in zip(held, new, strict=True)]
    if held:
        torch._foreach_copy_(list(held), list(new))


def begin_momentum(optimizer: torch.optim.Optimizer, *args: object) -> None:
    """Before a step of torch's SGD or Muon: momentum that is not yet there is 0, and so has a value to stay at."""
    for _, parameters, _ in moving(optimizer):
        for parameter in parameters:
            if "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def skippable_muon(muon: torch.optim.Muon) -> torch.optim.Muon:
    """Torch's Muon, which knows no ``found_inf``, with it.

    Its momentum ``B <- B + (1 - m) (G - B)`` stays to the bit when it is given B for G; the weights, which its
    normalised step moves whatever the gradient, are put back from a copy. The copy is all that it costs.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *args: object) -> None:
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return
        for _, parameters, gradients in moving(optimizer):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                momentum = optimizer.state[parameter]["momentum_buffer"]
                parameter.grad = torch.where(found_inf.bool(), momentum, gradient)
                before.append((parameter.detach(), parameter.detach().clone()))

    def put_back(optimizer: torch.optim.Optimizer, *args: object) -> None:
        for weight, old in before:
            weight.copy_(torch.where(optimizer.found_inf.bool(), old, weight))  # type: ignore[attr-defined]
        before.clear()

    muon.register_step_pre_hook(begin_momentum)
    muon.register_step_pre_hook(keep)
    muon.register_step_post_hook(put_back)
    return muon
