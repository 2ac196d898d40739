"""What is made of keys and queries before a memory sees them (memory.md 2.9)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from meristem.plugins import Registry

Drawn = dict[str, Tensor]
"""The tensors of a random map, by name."""


def _nothing(width: int) -> Drawn:
    return {}


@dataclass(frozen=True)
class Features:
    """A map of vectors along the last axis, the same for keys and queries.

    width: what a key's width becomes.
    draw: the tensors that a random map is made of, in float64, for keys of a width; empty where nothing is random.
    mapped: rows by the map that is made of such tensors, in the dtype of the rows.
    drawn: the tensors that ``apply`` takes, as a layer saves them; None: those that ``draw`` gives.
    width: what a key's width becomes. square: the greatest squared length of what a unit vector becomes; None where it
    grows with the width.
    """

    name: str
    mapped: Callable[[Tensor, Drawn], Tensor]
    width: Callable[[int], int]
    draw: Callable[[int], Drawn] = _nothing
    drawn: Drawn | None = field(default=None, compare=False)
    square: float | None = None

    def apply(self, rows: Tensor) -> Tensor:
        """The rows, mapped."""
        drawn = self.draw(rows.shape[-1]) if self.drawn is None else self.drawn
        return self.mapped(rows, {name: part.to(rows) for name, part in drawn.items()})


def identity() -> Features:
    """The vectors themselves."""
    return Features("identity", lambda rows, drawn: rows, lambda width: width, square=1.0)


def elu1() -> Features:
    """``ELU(x) + 1``: positive, as linear attention wants them (Katharopoulos 2006.16236, eq. 7)."""
    return Features("elu1", lambda rows, drawn: functional.elu(rows) + 1, lambda width: width)


def fourier(n_features: int = 64, deviation: float = 1.0, random_seed: int = 0) -> Features:
    """``sqrt(2 / m) cos(W x + b)``: inner products near the Gaussian kernel (Rahimi 2007); ``|phi|^2 <= 2``.

    W and b are drawn once for each width, from the seed, and a layer saves them with its weights. With a squared length
    of up to 2 every limit of stability of the write rate halves.
    """

    @cache
    def draw(width: int) -> Drawn:
        generator = torch.Generator().manual_seed(random_seed)
        weight_kf = deviation * _normal(width, n_features, generator)
        shift_f = 2 * math.pi * torch.rand(n_features, generator=generator, dtype=torch.float64, device="cpu")
        return {"weight_kf": weight_kf, "shift_f": shift_f}

    def mapped(rows: Tensor, drawn: Drawn) -> Tensor:
        return math.sqrt(2 / n_features) * torch.cos(rows @ drawn["weight_kf"] + drawn["shift_f"])

    return Features("fourier", mapped, lambda width: n_features, square=2.0, draw=draw)


def polynomial() -> Features:
    """x joined with its products of two, each pair once, over sqrt(2!) (Atlas 2505.23735, section 3.1).

    Inner products are those of ``<x, y> + <x, y>^2 / 2``, the beginning of the exponential series; a width k becomes
    ``k + k (k + 1) / 2``.
    """

    def mapped(rows: Tensor, drawn: Drawn) -> Tensor:
        width = rows.shape[-1]
        first, second = torch.triu_indices(width, width, device=rows.device)
        # Off the diagonal each product stands for two equal terms of the square.
        weight = torch.ones_like(first, dtype=rows.dtype).masked_fill(first == second, math.sqrt(0.5))
        return torch.cat([rows, weight * rows[..., first] * rows[..., second]], dim=-1)

    return Features("polynomial", mapped, lambda width: width + width * (width + 1) // 2, square=1.5)


def exponential(n_features: int = 64, random_seed: int = 0) -> Features:
    """Positive random features of ``exp(<x, y>)``: ``exp(W x - |x|^2 / 2) / sqrt(m)`` (Performer 2009.14794).

    W is drawn and saved as that of ``fourier`` is.
    """

    @cache
    def draw(width: int) -> Drawn:
        return {"weight_kf": _normal(width, n_features, torch.Generator().manual_seed(random_seed))}

    def mapped(rows: Tensor, drawn: Drawn) -> Tensor:
        return torch.exp(rows @ drawn["weight_kf"] - rows.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(
            n_features
        )

    return Features("exponential", mapped, lambda width: n_features, draw)


def _normal(width: int, n_features: int, generator: torch.Generator) -> Tensor:
    # On the CPU whatever the default device: under ``meta`` there would be no numbers to keep.
    return torch.randn(width, n_features, generator=generator, dtype=torch.float64, device="cpu")


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
