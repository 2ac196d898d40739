"""The nearest orthogonal matrix, nearly: every singular value is brought near one."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Of Muon (Jordan 2024): singular values above 0.01 |X| land between 0.68 and 1.14 after five steps."""


def orthogonal(matrices: Sequence[Tensor], n_steps: int = 5) -> list[Tensor]:
    """Newton-Schulz of each matrix: ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` from ``X / |X|``; 0 stays 0.

    Matrices of one shape are taken together: a stack of layers costs the launches of one.
    """
    alike: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(index)
    made: dict[int, Tensor] = {}
    for indices in alike.values():
        stacked = torch.stack([matrices[index] for index in indices])
        made.update(zip(indices, _newton_schulz(stacked, n_steps).unbind(), strict=True))
    return [made[index] for index in range(len(matrices))]


def _newton_schulz(stacked: Tensor, n_steps: int) -> Tensor:
    """Over the last two axes, with the smaller side inside the products."""
    a, b, c = QUINTIC
    is_tall = stacked.shape[-2] > stacked.shape[-1]
    turned = stacked.mT if is_tall else stacked
    turned = turned / (turned.square().sum(dim=(-2, -1), keepdim=True) + 1e-30).sqrt()
    for _ in range(n_steps):
        gram = turned @ turned.mT
        turned = a * turned + (b * gram + c * gram @ gram) @ turned
    return turned.mT if is_tall else turned
