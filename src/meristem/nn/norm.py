"""Normalisation over the width of one token, never over time."""

import torch
import torch.nn.functional as F
from torch import nn

from meristem.shapes import Hidden


class RMSNorm(nn.Module):
    """x / sqrt(mean_d(x^2) + eps) times a learned gain: every token has unit size, whatever its neighbours are."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain_d = nn.Parameter(torch.ones(width))

    def forward(self, hidden_btd: Hidden) -> Hidden:
        return F.rms_norm(hidden_btd, (hidden_btd.shape[-1],), self.gain_d.to(hidden_btd.dtype), self.eps)
