"""What a memory is trained to do with a pair: the loss, as its gradient at the recalled value ``o``, ``e = o - v``."""

from typing import ClassVar, Protocol

from meristem.shapes import Value


class Bias(Protocol):
    """The gradient of a loss at the recalled value."""

    slope: ClassVar[float | None]
    """a where the gradient is the affine ``a o - v``; None where it is not affine."""

    def gradient(self, recalled_bhv: Value, value_bhv: Value) -> Value:
        """d loss / d o."""
        ...


class Dot:
    """Loss ``-<o, v>``: the write does not look at what the memory already holds."""

    slope: ClassVar[float | None] = 0.0

    def gradient(self, recalled_bhv: Value, value_bhv: Value) -> Value:
        return -value_bhv


class Squared:
    """Loss ``1/2 |o - v|^2``: the write corrects what the memory got wrong."""

    slope: ClassVar[float | None] = 1.0

    def gradient(self, recalled_bhv: Value, value_bhv: Value) -> Value:
        return recalled_bhv - value_bhv


def dot() -> Bias:
    """Similarity without feedback."""
    return Dot()


def squared() -> Bias:
    """Squared error, the default."""
    return Squared()
