"""A short convolution over time, one filter per channel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

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

    def begin(self, hidden_btd: Hidden) -> Memory:
        """Zeros in the place of what came before the first token."""
        width, kernel = self.weight_dc.shape
        return {"tail_bsd": hidden_btd.new_zeros(hidden_btd.shape[0], kernel - 1, width)}

    def forward(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Hidden, Memory]:
        tail_bsd = (self.begin(hidden_btd) if state is None else state)["tail_bsd"]
        padded_bsd = torch.cat([tail_bsd.to(hidden_btd.dtype), hidden_btd], dim=1)
        mixed_btd = ShortFilter.apply(padded_bsd, self.weight_dc.to(padded_bsd.dtype).mT.contiguous())
        # A copy, so that the state does not keep the whole window alive.
        return mixed_btd, {"tail_bsd": padded_bsd[:, hidden_btd.shape[1] :].clone()}


class ShortFilter(torch.autograd.Function):
    """``apply(padded_bsd, weight_cd) -> mixed_btd``: one shifted product per tap, and so are its gradients.

    ``conv1d`` with one group per channel takes twice as long on a CPU, nearly all of it in the backward pass; autograd
    of these products keeps and passes over one whole tensor per tap.
    """

    @staticmethod
    def forward(ctx: Any, padded_bsd: Tensor, weight_cd: Tensor) -> Tensor:
        ctx.save_for_backward(padded_bsd, weight_cd)
        return _shifted_sum(padded_bsd, weight_cd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed_btd: Tensor) -> tuple[Tensor, Tensor]:
        padded_bsd, weight_cd = ctx.saved_tensors
        kernel, n_time = weight_cd.shape[0], d_mixed_btd.shape[1]
        d_padded_bsd = _shifted_sum(functional.pad(d_mixed_btd, (0, 0, kernel - 1, kernel - 1)), weight_cd.flip(0))
        taps = [(d_mixed_btd * padded_bsd[:, c : c + n_time]).sum(dim=(0, 1)) for c in range(kernel)]
        return d_padded_bsd, torch.stack(taps)


def _shifted_sum(padded_bsd: Tensor, weight_cd: Tensor) -> Tensor:
    kernel = weight_cd.shape[0]
    n_time = padded_bsd.shape[1] - kernel + 1
    mixed_btd = padded_bsd[:, :n_time] * weight_cd[0]
    for c in range(1, kernel):
        mixed_btd = torch.addcmul(mixed_btd, padded_bsd[:, c : c + n_time], weight_cd[c])
    return mixed_btd
