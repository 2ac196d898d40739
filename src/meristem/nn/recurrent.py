"""Recurrent stacks: the plain and the gated cell, as torch computes them."""

from torch import nn

from meristem.memory.state import Memory
from meristem.shapes import Hidden


class RecurrentStack(nn.Module):
    """Layers of one recurrent cell, each reading the one below. State: the last hidden vector of each."""

    def __init__(self, cells: nn.RNN | nn.GRU) -> None:
        super().__init__()
        self.cells = cells
        self.matrices = frozenset(f"cells.{name}" for name, _ in cells.named_parameters() if "weight" in name)

    def forward(self, hidden_btd: Hidden, state: Memory | None = None) -> tuple[Hidden, Memory]:
        hidden_btd, hidden_lbd = self.cells(hidden_btd, None if state is None else state["hidden_lbd"])
        return hidden_btd, {"hidden_lbd": hidden_lbd}


def elman_stack(width: int, n_layers: int) -> RecurrentStack:
    """h_t = tanh(W_i x_t + b_i + W_h h_(t-1) + b_h) (Elman 1990)."""
    return RecurrentStack(nn.RNN(width, width, n_layers, batch_first=True))


def gru_stack(width: int, n_layers: int) -> RecurrentStack:
    """r, z = sigmoid(..), n = tanh(W_n x + b_n + r (U_n h + c_n)), h = (1 - z) n + z h (Cho et al. 1406.1078)."""
    return RecurrentStack(nn.GRU(width, width, n_layers, batch_first=True))
