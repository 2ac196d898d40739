"""Normalisation over the width of one token, never over time."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean_d(x^2) + eps) times a learned gain: every token has unit size, whatever its neighbours are."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain_d = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(hidden, self.gain_d.shape, self.gain_d.to(hidden.dtype), self.eps)
