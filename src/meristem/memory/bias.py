"""What a memory is trained to do with a pair: the loss, as its gradient at the recalled value ``o``, ``e = o - v``.

Every gradient is a transform of ``e`` (memory.md 2.5), so the surprise of a memory is this gradient pulled back to its
weights. Rows are tokens; sums run over the last axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meristem.errors import WrongValue
from meristem.plugins import Registry

SHARPNESS = 10.0
"""a of ``tanh(a e)``, the smooth sign of the published rules."""
TINY = 1e-12


@dataclass(frozen=True)
class Bias:
    """The gradient of a loss at the recalled value.

    gradient: from recalled and target rows, and the threshold of each row or None, to d loss / d recalled.
    slope: a where the gradient is the affine ``a o - v``; None where it is not affine.
    has_threshold: the loss goes from quadratic to linear at a threshold, which is a gate.
    """

    name: str
    gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    slope: float | None = None
    has_threshold: bool = False


def dot() -> Bias:
    """Loss ``-<o, v>``: the write does not depend on what the memory already holds."""
    return Bias("dot", lambda recalled, target, _: -target, slope=0.0)


def squared() -> Bias:
    """Loss ``1/2 |e|^2``: the write corrects what the memory got wrong."""
    return Bias("squared", lambda recalled, target, _: recalled - target, slope=1.0)


def absolute() -> Bias:
    """Loss ``sum |e|``, the sign smoothed to ``tanh(10 e)``: direction without size (MIRAS 2504.13173, eq. 16)."""
    return Bias("absolute", lambda recalled, target, _: _sign(recalled - target))


def power(p: float) -> Bias:
    """Loss ``sum |e|^p``: ``p tanh(a e) (e^2 + 1e-6)^((p-1)/2)`` (MIRAS 2504.13173, eq. 11); p = 2 is exactly 2 e."""
    if p < 1:
        raise WrongValue(f"the power of a bias is {p}; expected 1 or more. Below 1 the loss has no descent at 0.")
    if p == 2:
        return Bias("power", lambda recalled, target, _: 2 * (recalled - target))

    def gradient(recalled: Tensor, target: Tensor, _: Tensor | None) -> Tensor:
        residual = recalled - target
        return p * _sign(residual) * (residual.square() + 1e-6) ** ((p - 1) / 2)

    return Bias("power", gradient)


def huber_coordinate(threshold: float = 1.0) -> Bias:
    """Huber's loss of every coordinate: ``clip(e, -threshold, threshold)``."""
    return Bias("huber_coordinate", lambda recalled, target, _: (recalled - target).clamp(-threshold, threshold))


def huber_norm(threshold: float = 1.0) -> Bias:
    """Huber's loss of the length of e: ``e min(1, threshold / |e|)``, which is a clip of the error."""

    def gradient(recalled: Tensor, target: Tensor, _: Tensor | None) -> Tensor:
        residual = recalled - target
        return residual * (threshold / _length(residual)).clamp(max=1.0)

    return Bias("huber_norm", gradient)


def huber_switch() -> Bias:
    """e where ``|e|`` is at most the threshold of the token, else ``threshold * tanh(a e)`` (MIRAS, section 5.3)."""

    def gradient(recalled: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
        if threshold is None:
            raise ValueError("huber_switch needs threshold gates; they are None. Pass Gates(threshold_bth=...)")
        residual, limit = recalled - target, threshold[..., None]
        return torch.where(_length(residual) <= limit, residual, limit * _sign(residual))

    return Bias("huber_switch", gradient, has_threshold=True)


def shift_robust(shift: float = 0.1) -> Bias:
    """The worst case over values shifted by at most ``shift``: ``(1 + shift / |e|) e`` (MIRAS, section 5.2)."""

    def gradient(recalled: Tensor, target: Tensor, _: Tensor | None) -> Tensor:
        residual = recalled - target
        return residual * (1 + shift / _length(residual))

    return Bias("shift_robust", gradient)


def kl(target: Literal["simplex", "softmax", "one_hot", "smoothed"] = "softmax", temperature: float = 1.0) -> Bias:
    """``KL(p | softmax(o))``: ``softmax(o) - p``, which sums to 0.

    target: how p is made of the value: it is one already, its softmax at ``temperature``, the place of its greatest
    coordinate, or 0.9 of that and the rest spread evenly.
    """

    def distribution(value: Tensor) -> Tensor:
        if target == "simplex":
            return value
        if target == "softmax":
            return (value / temperature).softmax(dim=-1)
        chosen = torch.zeros_like(value).scatter(-1, value.argmax(dim=-1, keepdim=True), 1.0)
        return chosen if target == "one_hot" else 0.9 * chosen + 0.1 / value.shape[-1]

    return Bias("kl", lambda recalled, value, _: recalled.softmax(dim=-1) - distribution(value))


biases: Registry[Callable[..., Bias]] = Registry(
    "bias",
    {
        "dot": dot,
        "squared": squared,
        "absolute": absolute,
        "power": power,
        "huber_coordinate": huber_coordinate,
        "huber_norm": huber_norm,
        "huber_switch": huber_switch,
        "shift_robust": shift_robust,
        "kl": kl,
    },
)


def _sign(residual: Tensor) -> Tensor:
    return torch.tanh(SHARPNESS * residual)


def _length(residual: Tensor) -> Tensor:
    return (residual.square().sum(dim=-1, keepdim=True) + TINY).sqrt()
