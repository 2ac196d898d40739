"""How what attention gathered and what a memory recalled become one: the sign that Titans writes as a circled cross."""

from collections.abc import Callable
from typing import ClassVar, Final

import torch
from torch import nn

from meristem.memory.kernels.select import fuses
from meristem.native import layers as native
from meristem.nn.norm import RMSNorm
from meristem.shapes import Hidden, Mixed

OPEN: Final = 2.0
"""First bias of a gate: sigmoid(2) = 0.88. A raw sigmoid of an empty memory halves attention and adds nothing."""


class Normalised(nn.Module):
    """``RMSNorm(y) * sigmoid(RMSNorm(m) + b)``, both norms with learned gains, b per channel (memory.md 5.4)."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.memory_norm = RMSNorm(width)
        self.bias_d = nn.Parameter(torch.full((width,), OPEN))

    def forward(self, attended_btf: Mixed, recalled_btf: Mixed, hidden_btd: Hidden) -> Mixed:
        return self.attention_norm(attended_btf) * (self.memory_norm(recalled_btf) + self.bias_d).sigmoid()


class Gated(nn.Module):
    """``y * sigmoid(RMSNorm(m) + b)``, b per channel: the gate alone is normalised, and attention keeps its size.

    The default. With attention normalised as well (``Normalised``) what it has not learned yet is as loud as what it
    has: 2.08 bits per byte where this has 1.96, after 700,000 tokens of ``titans-mag`` (dev/LOG.md).
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.memory_norm = RMSNorm(width)
        self.bias_d = nn.Parameter(torch.full((width,), OPEN))

    def forward(self, attended_btf: Mixed, recalled_btf: Mixed, hidden_btd: Hidden) -> Mixed:
        return attended_btf * (self.memory_norm(recalled_btf) + self.bias_d).sigmoid()


class Projected(nn.Module):
    """``RMSNorm(y) * sigmoid(W RMSNorm(m) + b)``: channels of the memory may open others than their own."""

    matrices: ClassVar = frozenset({"gate.weight"})

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.memory_norm = RMSNorm(width)
        self.gate = nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, OPEN)

    def forward(self, attended_btf: Mixed, recalled_btf: Mixed, hidden_btd: Hidden) -> Mixed:
        return self.attention_norm(attended_btf) * self.gate(self.memory_norm(recalled_btf)).sigmoid()


class Sigmoid(nn.Module):
    """``y * sigmoid(m)``, as the paper prints it (Titans 2501.00663, eqs. 25 and 28): an empty memory halves y."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()

    def forward(self, attended_btf: Mixed, recalled_btf: Mixed, hidden_btd: Hidden) -> Mixed:
        return attended_btf * recalled_btf.sigmoid()


QUIET: Final = 0.1
"""First gain of a memory that is added: what it recalls before it has learned to is noise beside attention."""


class Additive(nn.Module):
    """``y + RMSNorm(m) * sigmoid(W x + b)``, the norm per head. Sums without norm and gate grow to norms of 800.

    What was recalled is handed on as it is: the others only scale what attention gathered. The gain of the norm starts
    at ``QUIET``, and an empty memory adds nothing.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.memory_norm = RMSNorm(head_width)
        nn.init.constant_(self.memory_norm.gain_d, QUIET)
        self.gate = nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, OPEN)

    def forward(self, attended_btf: Mixed, recalled_btf: Mixed, hidden_btd: Hidden) -> Mixed:
        gate_btf, gain_k = self.gate(hidden_btd), self.memory_norm.gain_d
        if fuses(recalled_btf, gate_btf, attended_btf, width=self.head_width):
            combined_btf: Mixed = native.norm(recalled_btf, gain_k, gate_btf, attended_btf, self.memory_norm.eps)
            return combined_btf
        normed_btf = self.memory_norm(recalled_btf.unflatten(-1, (-1, self.head_width))).flatten(2)
        return attended_btf + normed_btf * gate_btf.sigmoid()


COMBINATIONS: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "gated": Gated,
    "normalised": Normalised,
    "projected": Projected,
    "sigmoid": Sigmoid,
    "additive": Additive,
}
"""Name to maker: ``(width, head width)`` to a module that takes attended, recalled and hidden vectors."""
