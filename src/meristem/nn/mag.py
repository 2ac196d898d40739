"""Memory as a gate on sliding-window attention (Titans 2501.00663, eqs. 26-28)."""

import torch
from torch import nn

from meristem.memory.value import State
from meristem.nn.attention import Attention
from meristem.nn.memory import Recall
from meristem.nn.norm import RMSNorm
from meristem.nn.part import MemoryPart
from meristem.shapes import Hidden


class MemoryAsGate(nn.Module):
    """``o = (RMSNorm(y) * sigmoid(RMSNorm(m) + b)) W``: attention y over a window, scaled by what memory m recalls.

    The paper's raw ``sigmoid(m)`` halves attention while the memory is empty. Here the bias b starts at +2, so the gate
    starts open; both norms have learned gains (memory.md 5.4, ``normalised``). The gate acts before attention's output
    projection W, which mixes the gated heads.
    """

    def __init__(self, width: int, part: MemoryPart, *, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.recall = Recall(width, part)
        self.attention_norm = RMSNorm(width)
        self.memory_norm = RMSNorm(width)
        self.bias_d = nn.Parameter(torch.full((width,), 2.0))

    @property
    def out(self) -> nn.Linear:
        """The last projection of this branch."""
        return self.attention.out

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = {"attention": None, "recall": None} if state is None else state
        attended_btd, attention = self.attention.mix(hidden_btd, state["attention"])
        recalled_btd, recall = self.recall(hidden_btd, state["recall"])
        gate_btd = (self.memory_norm(recalled_btd) + self.bias_d).sigmoid()
        gated_btd = self.attention_norm(attended_btd) * gate_btd
        return self.out(gated_btd), {"attention": attention, "recall": recall}
