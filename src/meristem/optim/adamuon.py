"""AdaMuon: Muon's direction, each element divided by how much it usually moves (Si et al. 2025, 2507.11005)."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from meristem.errors import WrongValue
from meristem.optim.nonfinite import SkippingOptimizer, settle
from meristem.optim.orthogonal import orthogonal

ALIGNED: Final = 0.2
"""Root mean square of a step at learning rate 1: about that of AdamW, so that both can share one."""


class AdaMuon(SkippingOptimizer):
    """Of a matrix W of m rows and n columns with gradient G, at learning rate η, momentum μ, decay λ::

        M <- μ M + G                O = NS(sign M)
        v <- β v + (1 - β) O²       D = O / (√v + ε)
        W <- W - η (0.2 √(mn) D / |D| + λ W)

    The paper's β is μ. A bias correction of v would only scale D, which is normalised. ``is_raw`` takes v of the raw
    gradient and D = NS(m̂) / (√v̂ + ε), where m̂ is M without the sign. It honours ``found_inf``.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        rate: float,
        momentum: float = 0.95,
        beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        is_raw: bool = False,
    ) -> None:
        names = {"lr": rate, "momentum": momentum, "beta": beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, names | {"is_raw": is_raw})
        flat = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        if flat:
            raise WrongValue(f"AdaMuon takes matrices only; found the shapes {flat}. Give the others to AdamW.")

    def _move(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {name: torch.zeros_like(parameter) for name in ("momentum", "square")}
        held = [self.state[parameter]["momentum"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]

        momenta = torch._foreach_mul(held, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        is_raw, beta = group["is_raw"], group["beta"]
        steps = orthogonal(momenta if is_raw else torch._foreach_sign(momenta))
        moved = gradients if is_raw else steps
        variances = torch._foreach_mul(squares, beta)
        torch._foreach_addcmul_(variances, moved, moved, value=1 - beta)
        deviations = torch._foreach_sqrt(variances)
        torch._foreach_add_(deviations, group["eps"])
        steps = list(torch._foreach_div(steps, deviations))
        torch._foreach_mul_(steps, [_alignment(step, group["eps"]) for step in steps])
        weights = torch._foreach_mul(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, steps, alpha=-group["lr"])
        settle([*held, *squares, *parameters], [*momenta, *variances, *weights], found_inf)


def _alignment(step: Tensor, eps: float) -> Tensor:
    aligned: Tensor = ALIGNED * step.numel() ** 0.5 / (torch.linalg.vector_norm(step) + eps)
    return aligned
