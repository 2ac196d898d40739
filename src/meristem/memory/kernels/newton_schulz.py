"""Newton-Schulz: a matrix with the same singular vectors and all singular values near one."""

from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon (Jordan 2024): singular values above 0.01 |X| land between 0.68 and 1.14 after five steps."""


def newton_schulz(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """``X <- a X + b (X X^T) X + c (X X^T)^2 X`` from ``X / |X|``, over the last two axes; 0 stays 0.

    It does not change when the matrix is scaled. Work is done on the smaller side.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    turned = matrix.mT if is_tall else matrix
    turned = turned / (turned.square().sum(dim=(-2, -1), keepdim=True) + 1e-30).sqrt()
    for _ in range(n_steps):
        gram = turned @ turned.mT
        turned = a * turned + (b * gram + c * gram @ gram) @ turned
    return turned.mT if is_tall else turned
