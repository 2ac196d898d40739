"""What more than one room computes: unit vectors, triangular systems, near-orthogonal matrices, an interval."""

import math
from typing import Final

import torch
from torch import Tensor

TINY: Final = 1e-12
"""Added to the squared length of what is made a unit, so that zero stays zero."""

QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Of Muon (Jordan 2024): singular values above 0.01 |X| land between 0.68 and 1.14 after five steps."""

T_975: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def student_t(freedom: int) -> float:
    """Student's t, exceeded in one case of forty, by degrees of freedom from 1; beyond 20 it is a little wide."""
    return T_975[min(freedom, len(T_975)) - 1]


def student_p(t: float, freedom: int) -> float:
    """How often Student's t lies further from 0 than ``t`` on either side, by whole degrees of freedom from 1.

    Abramowitz and Stegun 26.7.3 and 26.7.4, exact.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2
    terms, term = 0.0, cosine if is_odd else 1.0
    for n in range(3 if is_odd else 2, freedom + 1, 2):
        terms += term
        term *= cosine**2 * (n - 1) / n
    inside = math.sin(angle) * terms
    return 1 - (2 / math.pi * (angle + inside) if is_odd else inside)


def precise(vector: Tensor) -> Tensor:
    """In float32 what is of half precision."""
    return vector.float() if vector.dtype in (torch.bfloat16, torch.float16) else vector


def inverse_length(vector: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """What makes a vector, or what lies along ``axes``, one of length one."""
    length: Tensor = torch.linalg.vector_norm(vector, dim=axes, keepdim=True)
    return (length.square() + TINY).rsqrt()


def unit(vector: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """Vectors of length one; in float32, where a tiny vector keeps its direction."""
    vector = precise(vector)
    return vector * inverse_length(vector, axes)


def solve_unit_lower(strict_cs: Tensor, rows: Tensor) -> Tensor:
    """``(I + strict)^-1 rows`` by substitution; what stands on and above the diagonal is not read.

    A product of powers would lose all digits when keys are alike.
    """
    solved: Tensor = torch.linalg.solve_triangular(strict_cs, rows, upper=False, unitriangular=True)
    return solved


def newton_schulz(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """``X <- a X + b (X X^T) X + c (X X^T)^2 X`` from ``X / |X|``, over the last two axes; 0 stays 0.

    The same singular vectors with all singular values near one, whatever the scale. Work is done on the smaller side.
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if is_tall else matrix
    wide = wide / (wide.square().sum(dim=(-2, -1), keepdim=True) + 1e-30).sqrt()
    for _ in range(n_steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT if is_tall else wide
