"""Memory as a layer below sliding-window attention (Titans 2501.00663, eqs. 29-31)."""

from torch import nn

from meristem.memory.state import State
from meristem.nn.attention import Attention
from meristem.nn.config import MemoryConfig
from meristem.nn.documents import Documents
from meristem.nn.memory import MemoryLayer, build_memory, initial_state
from meristem.shapes import Hidden


class MemoryAsLayer(nn.Module):
    """``o = attention(m(x) + x)``; the paper's ``attention(m(x))`` with ``is_residual=False``.

    An empty memory recalls nothing, and attention to nothing starves at the start: hence the residual. Persistent
    vectors, which every query sees, are written into a fresh memory first.
    """

    def __init__(self, width: int, config: MemoryConfig, *, attention: Attention, is_residual: bool = True) -> None:
        super().__init__()
        self.memory = MemoryLayer(width, config, build_memory(width, config))
        self.attention = attention
        self.is_residual = is_residual

    @property
    def out(self) -> nn.Linear:
        """The last projection of this branch."""
        return self.attention.out

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        if state is None:
            met = initial_state(self.memory.recall, self.attention.persistent_gd, hidden_btd)
            state = {"recall": met, "attention": None}
        read_btd, recall = self.memory(hidden_btd, state["recall"])
        layered_btd = read_btd + hidden_btd if self.is_residual else read_btd
        mixed_btd, attention = self.attention(layered_btd, state["attention"])
        return mixed_btd, {"recall": recall, "attention": attention}

    def forward_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """The same of packed documents: the memory reads each by itself, attention hides the others by a mask."""
        before = state or {"recall": None, "attention": None}
        persistent_gd = self.attention.persistent_gd
        read_btd, recall = self.memory.read_documents(hidden_btd, before["recall"], documents, persistent_gd)
        layered_btd = read_btd + hidden_btd if self.is_residual else read_btd
        mixed_btd, attention = self.attention.forward_documents(layered_btd, before["attention"], documents)
        return mixed_btd, {"recall": recall, "attention": attention}
