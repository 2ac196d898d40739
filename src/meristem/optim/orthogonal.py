"""The nearest orthogonal matrix, nearly: every singular value is brought near one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from meristem.linalg import newton_schulz


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
        made.update(zip(indices, newton_schulz(stacked, n_steps).unbind(), strict=True))
    return [made[index] for index in range(len(matrices))]
