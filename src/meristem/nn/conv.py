"""A short convolution over time, one filter per channel."""

import torch
import torch.nn.functional as F
from torch import nn

from meristem.memory.value import Memory
from meristem.shapes import Hidden

NOISE = 0.02
"""Deviation of the first weights from the identity tap."""


class CausalConv(nn.Module):
    """y_t = sum_i weight_i * x_(t - kernel + 1 + i): each channel mixes its own last ``kernel`` inputs.

    It starts near the identity: weight 1 on the present, small noise elsewhere.
    State: the last kernel - 1 inputs; zeros at the start.
    """

    def __init__(self, width: int, kernel: int = 4) -> None:
        super().__init__()
        weight_dc = torch.randn(width, kernel) * NOISE
        weight_dc[:, -1] = 1.0
        self.weight_dc = nn.Parameter(weight_dc)

    def forward(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Hidden, Memory]:
        width, kernel = self.weight_dc.shape
        tail_bsd = hidden_btd.new_zeros(hidden_btd.shape[0], kernel - 1, width) if state is None else state["tail_bsd"]
        padded_bsd = torch.cat([tail_bsd, hidden_btd], dim=1)
        weight_dc = self.weight_dc.to(padded_bsd.dtype)
        mixed_bdt = F.conv1d(padded_bsd.transpose(1, 2), weight_dc.unsqueeze(1), groups=width)
        # A copy, so that the state does not keep the whole window alive.
        return mixed_bdt.transpose(1, 2), {"tail_bsd": padded_bsd[:, hidden_btd.shape[1] :].clone()}
