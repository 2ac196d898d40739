"""A short convolution over time, one filter per channel, and the vectors that a memory makes of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meristem.linalg import inverse_length, precise, unit
from meristem.memory.kernels.select import fuses
from meristem.memory.state import Memory
from meristem.native.layers import MOST_TAPS, MOST_WIDTH, memory_vectors
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

    def init_state(self, hidden_btd: Hidden) -> Memory:
        """Zeros in the place of what came before the first token."""
        width, kernel = self.weight_dc.shape
        return {"tail_bsd": hidden_btd.new_zeros(hidden_btd.shape[0], kernel - 1, width)}

    def forward(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Hidden, Memory]:
        padded_bsd, state = self._padded(hidden_btd, state)
        return ShortFilter.apply(padded_bsd, self.weight_dc.to(padded_bsd.dtype)), state

    def project(
        self, hidden_btd: Hidden, state: Memory | None, *, n_vectors: int, heads: int, n_units: int
    ) -> tuple[tuple[Tensor, ...], Memory]:
        """``silu(y)`` as so many vectors for every head, ``b t h k``; the first ``n_units`` of them of length one.

        Lengths are found in float32, where a tiny vector keeps its direction.
        """
        width, kernel = hidden_btd.shape[-1] // (n_vectors * heads), self.weight_dc.shape[1]
        if fuses(hidden_btd, width=width) and width <= MOST_WIDTH and kernel <= MOST_TAPS:
            tail_bsd = self._tail(hidden_btd, state)
            found = memory_vectors(hidden_btd, tail_bsd, self.weight_dc, n_vectors, heads, n_units)
            return tuple(found), {"tail_bsd": _last(tail_bsd, hidden_btd)}
        padded_bsd, state = self._padded(hidden_btd, state)
        weight_dc = self.weight_dc.to(padded_bsd.dtype)
        return FilteredVectors.apply(padded_bsd, weight_dc, (n_vectors, heads), n_units), state

    def _padded(self, hidden_btd: Hidden, state: Memory | None) -> tuple[Tensor, Memory]:
        """The inputs after those before them, and the state that they leave."""
        padded_bsd = torch.cat([self._tail(hidden_btd, state), hidden_btd], dim=1)
        # A copy, so that the state does not keep the whole sequence in memory.
        return padded_bsd, {"tail_bsd": padded_bsd[:, hidden_btd.shape[1] :].clone()}

    def _tail(self, hidden_btd: Hidden, state: Memory | None) -> Tensor:
        tail_bsd: Tensor = (self.init_state(hidden_btd) if state is None else state)["tail_bsd"]
        return tail_bsd.to(hidden_btd.dtype)


def _last(tail_bsd: Tensor, hidden_btd: Hidden) -> Tensor:
    """The last inputs, as many as in ``tail_bsd``, of those and the ones after them."""
    n_kept, n_time = tail_bsd.shape[1], hidden_btd.shape[1]
    if n_time >= n_kept:
        return hidden_btd[:, n_time - n_kept :].clone()
    return torch.cat([tail_bsd[:, n_time:], hidden_btd], dim=1)


class ShortFilter(torch.autograd.Function):
    """``apply(padded_bsd, weight_dc) -> mixed_btd``; autograd would keep one whole tensor per tap."""

    @staticmethod
    def forward(ctx: Any, padded_bsd: Tensor, weight_dc: Tensor) -> Tensor:
        ctx.save_for_backward(padded_bsd, weight_dc)
        return _filtered(padded_bsd, weight_dc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed_btd: Tensor) -> tuple[Tensor, Tensor]:
        padded_bsd, weight_dc = ctx.saved_tensors
        return _filtered_back(padded_bsd, weight_dc, d_mixed_btd)


class FilteredVectors(torch.autograd.Function):
    """``apply(padded_bsd, weight_dc, (n_vectors, heads), n_units)``: as ``CausalConv.vectors`` has them.

    The backward pass filters once more: only the inputs are saved, where autograd would save all intermediate results.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        padded_bsd, weight_dc, parts, n_units = inputs
        ctx.save_for_backward(padded_bsd, weight_dc)
        ctx.parts, ctx.n_units = parts, n_units
        found = list(_parted(functional.silu(_filtered(padded_bsd, weight_dc)), parts))
        for index in range(n_units):
            vector_bthk = precise(found[index])
            found[index] = unit(vector_bthk)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor | None, ...]:
        padded_bsd, weight_dc = ctx.saved_tensors
        d_mixed_btd = _found_back(_filtered(padded_bsd, weight_dc), sent, ctx.parts, ctx.n_units)
        return *_filtered_back(padded_bsd, weight_dc, d_mixed_btd), None, None


def _found_back(mixed_btd: Tensor, sent: tuple[Tensor, ...], parts: tuple[int, int], n_units: int) -> Tensor:
    """The gradient of what was filtered, from those of the vectors made of it."""
    d_found_btd = torch.empty_like(mixed_btd)
    mixed, d_found = _parted(mixed_btd, parts), _parted(d_found_btd, parts)
    for index, d_vector_bthk in enumerate(sent):
        if index < n_units:
            d_vector_bthk = _unit_back(precise(functional.silu(mixed[index])), d_vector_bthk)
        d_found[index].copy_(d_vector_bthk)
    return torch.ops.aten.silu_backward(d_found_btd, mixed_btd)


def _parted(found_btd: Tensor, parts: tuple[int, int]) -> tuple[Tensor, ...]:
    """The channels as vectors, so many and of so many heads."""
    return found_btd.unflatten(-1, (*parts, -1)).unbind(2)


def _unit_back(vector_bthk: Tensor, d_unit_bthk: Tensor) -> Tensor:
    """``(dU - u <u, dU>) / |x|``: what lies along the vector changes its length alone."""
    scale_bth1 = inverse_length(vector_bthk)
    unit_bthk = vector_bthk * scale_bth1
    along_bth1 = (unit_bthk * d_unit_bthk).sum(dim=-1, keepdim=True)
    return torch.addcmul(d_unit_bthk, unit_bthk, along_bth1, value=-1).mul_(scale_bth1)


def _filtered_back(padded_bsd: Tensor, weight_dc: Tensor, d_mixed_btd: Tensor) -> tuple[Tensor, Tensor]:
    kernel, n_time = weight_dc.shape[1], d_mixed_btd.shape[1]
    # Under autocast float32 inputs are filtered to half precision, and their gradient comes back in it.
    d_mixed_btd = d_mixed_btd.to(padded_bsd.dtype)
    taps = [(d_mixed_btd * padded_bsd[:, c : c + n_time]).sum(dim=(0, 1)) for c in range(kernel)]
    return _filtered(d_mixed_btd, weight_dc.flip(1), n_zeros=kernel - 1), torch.stack(taps, dim=-1)


def _filtered(padded_bsd: Tensor, weight_dc: Tensor, n_zeros: int = 0) -> Tensor:
    """The weighted sum of the last inputs, with so many zeros before and after them.

    On a CPU ``conv2d`` with one group per channel and channels last takes a quarter of the time of one product per tap
    (``conv1d``, which lays channels first, twice as long). The compiler makes one loop of the products.
    """
    if padded_bsd.is_cpu and padded_bsd.dtype != torch.float64 and not torch.compiler.is_compiling():
        padded_bd1s, weight_d11c = padded_bsd.mT[:, :, None], weight_dc[:, None, None]
        mixed_bd1t = functional.conv2d(padded_bd1s, weight_d11c, padding=(0, n_zeros), groups=len(weight_dc))
        return mixed_bd1t[:, :, 0].mT
    padded_bsd = functional.pad(padded_bsd, (0, 0, n_zeros, n_zeros)) if n_zeros else padded_bsd
    kernel = weight_dc.shape[1]
    n_time = padded_bsd.shape[1] - kernel + 1
    mixed_btd = padded_bsd[:, :n_time] * weight_dc[:, 0]
    for c in range(1, kernel):
        mixed_btd = torch.addcmul(mixed_btd, padded_bsd[:, c : c + n_time], weight_dc[:, c])
    return mixed_btd
