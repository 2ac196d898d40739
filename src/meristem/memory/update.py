"""How surprises become change."""

from typing import ClassVar, Protocol

import torch

from meristem.memory.gates import TokenGates
from meristem.memory.retention import per_head
from meristem.memory.value import Memory


class Update(Protocol):
    """From the surprise of a token to the change of the weights, and what is carried to the next token."""

    has_momentum: ClassVar[bool]
    is_linear: ClassVar[bool]
    """The change is ``-write * surprise``, or the momentum recurrence of it: what the linear forms need."""

    def init(self, weights: Memory) -> Memory:
        """First values of what the update carries beside the weights."""
        ...

    def change(self, memory: Memory, surprise: Memory, gates: TokenGates) -> tuple[Memory, Memory]:
        """The change of every weight, and the carried tensors after it."""
        ...


class Plain:
    """Gradient descent: the change is ``-write * surprise``."""

    has_momentum: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    def init(self, weights: Memory) -> Memory:
        return {}

    def change(self, memory: Memory, surprise: Memory, gates: TokenGates) -> tuple[Memory, Memory]:
        return {name: -per_head(gates.write_bh, gradient) * gradient for name, gradient in surprise.items()}, {}


class Momentum:
    """``S <- momentum * S - write * surprise``; the change is S (Titans 2501.00663, eqs. 9-14)."""

    has_momentum: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True

    def init(self, weights: Memory) -> Memory:
        return {momentum_name(name): torch.zeros_like(weight) for name, weight in weights.items()}

    def change(self, memory: Memory, surprise: Memory, gates: TokenGates) -> tuple[Memory, Memory]:
        if gates.momentum_bh is None:
            raise ValueError("a rule with momentum needs momentum gates; they are None. Pass Gates(momentum_bth=...)")
        change = {
            name: per_head(gates.momentum_bh, gradient) * memory[momentum_name(name)]
            - per_head(gates.write_bh, gradient) * gradient
            for name, gradient in surprise.items()
        }
        return change, {momentum_name(name): moved for name, moved in change.items()}


def plain() -> Update:
    """One step of gradient descent per token."""
    return Plain()


def momentum() -> Update:
    """Gradient descent with a decaying sum of past surprises."""
    return Momentum()


def momentum_name(weight_name: str) -> str:
    """Where the momentum of a weight is stored: ``matrix_bhkv`` -> ``matrix_momentum_bhkv``."""
    stem, axes = weight_name.rsplit("_", 1)
    return f"{stem}_momentum_{axes}"
