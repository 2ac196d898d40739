"""Where a memory keeps what it knows, and how it recalls."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from meristem.memory.value import Memory
from meristem.shapes import Key, Value

Pullback = Callable[[torch.Tensor], Memory]
"""From the gradient at the recalled value to the gradient at every weight tensor: the surprise."""


class Structure(Protocol):
    """The weight tensors of a memory. Their names carry their axes and are their names in checkpoints."""

    weights: tuple[str, ...]
    """Names of the tensors that surprise, retention and update act on; a memory may carry others beside them."""
    is_matrix: ClassVar[bool]
    """Recall is linear in one matrix: what the exact chunk form needs."""

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: torch.Tensor) -> Memory:
        """First weights, in the dtype and on the device of ``like``."""
        ...

    def recall(self, memory: Memory, key_bhk: Key) -> Value:
        """What the memory answers to a key."""
        ...

    def linearise(self, memory: Memory, key_bhk: Key) -> tuple[Value, Pullback]:
        """The recalled value, and the map from a gradient at it to the surprise."""
        ...


class Matrix:
    """One matrix per head: recall is ``M k``; the stored tensor is M transposed, so that keys contract its first
    axis."""

    weights: tuple[str, ...] = ("matrix_bhkv",)
    is_matrix: ClassVar[bool] = True

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: torch.Tensor) -> Memory:
        return {"matrix_bhkv": like.new_zeros(batch, heads, key_width, value_width)}

    def recall(self, memory: Memory, key_bhk: Key) -> Value:
        return torch.einsum("bhk,bhkv->bhv", key_bhk, memory["matrix_bhkv"])

    def linearise(self, memory: Memory, key_bhk: Key) -> tuple[Value, Pullback]:
        def pull(gradient_bhv: torch.Tensor) -> Memory:
            return {"matrix_bhkv": torch.einsum("bhk,bhv->bhkv", key_bhk, gradient_bhv)}

        return self.recall(memory, key_bhk), pull


def matrix() -> Structure:
    """A linear associative memory."""
    return Matrix()
