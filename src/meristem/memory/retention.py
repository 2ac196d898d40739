"""What happens to the old memory when something is written."""

from typing import ClassVar, Protocol

import torch

from meristem.memory.gates import TokenGates
from meristem.memory.value import Memory
from meristem.shapes import Rate


class Retention(Protocol):
    """How old weights and a change become new weights."""

    is_linear: ClassVar[bool]
    """New weights are ``retain * old + change``: what the linear forms need."""

    def keep(self, weights: Memory, gates: TokenGates) -> Memory:
        """The old weights as they are after keeping and before the change: where a warm probe measures."""
        ...

    def apply(self, weights: Memory, change: Memory, gates: TokenGates) -> Memory:
        """The new weights."""
        ...


class Decay:
    """``W <- retain * W + change``."""

    is_linear: ClassVar[bool] = True

    def keep(self, weights: Memory, gates: TokenGates) -> Memory:
        return {name: per_head(gates.retain_bh, weight) * weight for name, weight in weights.items()}

    def apply(self, weights: Memory, change: Memory, gates: TokenGates) -> Memory:
        return {name: kept + change[name] for name, kept in self.keep(weights, gates).items()}


def decay() -> Retention:
    """Old memory fades by the retain factor of each token."""
    return Decay()


def per_head(gate_bh: Rate, weight: torch.Tensor) -> torch.Tensor:
    """A gate with as many axes as the weight that it scales."""
    return gate_bh[(...,) + (None,) * (weight.dim() - 2)]
