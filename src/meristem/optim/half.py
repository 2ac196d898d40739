"""What half precision asks of an optimizer: moments and steps in float32, and for fp16 a scaled loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

HALF: Final = (torch.bfloat16, torch.float16)


@contextmanager
def stepped_in_float32(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While it lasts, parameters of half precision stand in the groups as float32 copies, and are rounded afterwards.

    Moments are therefore made, stored and used in float32. In bfloat16 a mean that keeps 0.999 would not move: that
    factor rounds to 1. What is rounded is the weight alone: a step below 1/512 of it may be lost.
    """
    stand_ins: list[tuple[list[Tensor], int, Tensor]] = []
    state = optimizer.state
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None or parameter.dtype not in HALF:
                continue
            copy = parameter.detach().float()
            copy.grad = parameter.grad.float()
            group["params"][index] = copy
            stand_ins.append((group["params"], index, parameter))
            if parameter in state:
                state[copy] = state.pop(parameter)
    try:
        yield
    finally:
        for parameters, index, parameter in stand_ins:
            copy, parameters[index] = parameters[index], parameter
            parameter.detach().copy_(copy)
            if copy in state:
                state[parameter] = state.pop(copy)


class LossScale:
    """The factor on a loss whose gradients are fp16, which cannot hold what is below 6e-8; as of ``GradScaler``.

    A step whose gradients are not finite halves it, ``n_steady`` steps without one double it. It never falls below 1,
    where a gradient that is not finite is no fault of the scale. It lives on the device: the host never waits.

    scale, n_good: the factor, and the steps since it last changed; saved with the moments (``optim.state``).
    """

    def __init__(self, device: torch.device, *, first: float = 65536.0, n_steady: int = 2000) -> None:
        self.scale = torch.full((), first, device=device)
        self.n_good = torch.zeros((), dtype=torch.int32, device=device)
        self.n_steady = n_steady

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """The gradients of the loss itself, in place. Powers of two round nothing."""
        if gradients:
            torch._foreach_mul_(list(gradients), self.scale.reciprocal())

    def update(self, is_skipped: Tensor) -> Tensor:
        """Take a step into account; 1 where it was skipped and the scale could still be lowered for it, else 0."""
        is_lowered = is_skipped * (self.scale > 1)
        torch._amp_update_scale_(self.scale, self.n_good, is_skipped, 2.0, 0.5, self.n_steady)
        self.scale.clamp_(min=1.0)
        return is_lowered
