"""What is made of keys and queries before a memory sees them (memory.md 2.9)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.plugins import Registry


@dataclass(frozen=True)
class Features:
    """A map of vectors along the last axis, the same for keys and queries.

    width: what a key's width becomes. square: the greatest squared length of what a unit vector becomes; None where it
    grows with the width.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    width: Callable[[int], int]
    square: float | None = None


def identity() -> Features:
    """The vectors themselves."""
    return Features("identity", lambda rows: rows, lambda width: width, square=1.0)


def elu1() -> Features:
    """``ELU(x) + 1``: positive, as linear attention wants them (Katharopoulos 2006.16236, eq. 7)."""
    return Features("elu1", lambda rows: functional.elu(rows) + 1, lambda width: width)


def fourier(n_features: int = 64, deviation: float = 1.0, random_seed: int = 0) -> Features:
    """``sqrt(2 / m) cos(W x + b)``: inner products near the Gaussian kernel (Rahimi 2007); ``|phi|^2 <= 2``.

    W and b follow from the seed alone, so they are the same in every process and need no place in a checkpoint. With
    a squared length of up to 2 every limit of stability of the write rate halves.
    """

    def apply(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(random_seed)
        weight = deviation * torch.randn(rows.shape[-1], n_features, generator=generator, dtype=torch.float64)
        shift = 2 * math.pi * torch.rand(n_features, generator=generator, dtype=torch.float64)
        return math.sqrt(2 / n_features) * torch.cos(rows @ weight.to(rows) + shift.to(rows))

    return Features("fourier", apply, lambda width: n_features, square=2.0)


def polynomial() -> Features:
    """x joined with its products of two, each pair once, over sqrt(2!) (Atlas 2505.23735, section 3.1).

    Inner products are those of ``<x, y> + <x, y>^2 / 2``, the beginning of the exponential series; a width k becomes
    ``k + k (k + 1) / 2``.
    """

    def apply(rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        first, second = torch.triu_indices(width, width, device=rows.device)
        # Off the diagonal each product stands for two equal terms of the square.
        weight = torch.ones_like(first, dtype=rows.dtype).masked_fill(first == second, math.sqrt(0.5))
        return torch.cat([rows, weight * rows[..., first] * rows[..., second]], dim=-1)

    return Features("polynomial", apply, lambda width: width + width * (width + 1) // 2, square=1.5)


def exponential(n_features: int = 64, random_seed: int = 0) -> Features:
    """Positive random features of ``exp(<x, y>)``: ``exp(W x - |x|^2 / 2) / sqrt(m)`` (Performer 2009.14794)."""

    def apply(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(random_seed)
        weight = torch.randn(rows.shape[-1], n_features, generator=generator, dtype=torch.float64).to(rows)
        return torch.exp(rows @ weight - rows.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(n_features)

    return Features("exponential", apply, lambda width: n_features)


features: Registry[Callable[..., Features]] = Registry(
    "features",
    {
        "identity": identity,
        "elu1": elu1,
        "fourier": fourier,
        "polynomial": polynomial,
        "exponential": exponential,
    },
)
