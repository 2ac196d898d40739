"""Feed-forward layers: what a token does alone. The last projection is called ``out``, as in every residual branch."""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from meristem.memory.kernels.select import fuses
from meristem.native import layers as native
from meristem.shapes import Hidden


class SwiGLU(nn.Module):
    """out(silu(gate x) * (up x)), without biases (Shazeer 2002.05202)."""

    matrices: ClassVar = frozenset({"gate_up.weight", "out.weight"})

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden_btd: Hidden) -> Hidden:
        return self.out(self.inner(self.gate_up(hidden_btd)))

    def inner(self, projected: Tensor) -> Tensor:
        """What the last projection is given, from what the first gives."""
        if fuses(projected, width=projected.shape[-1] // 2):
            fused: Tensor = native.swiglu(projected)
            return fused
        gate_btf, up_btf = projected.chunk(2, dim=-1)
        return F.silu(gate_btf) * up_btf


class Feedforward(nn.Module):
    """out(activation(up x)), with biases: the layer of the first transformers."""

    matrices: ClassVar = frozenset({"up.weight", "out.weight"})

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, hidden_btd: Hidden) -> Hidden:
        return self.out(self.inner(self.up(hidden_btd)))

    def inner(self, projected: Tensor) -> Tensor:
        """What the last projection is given, from what the first gives."""
        return self.activation(projected)
