"""Memory as a gate on sliding-window attention (Titans 2501.00663, eqs. 26-28)."""

from torch import nn

from meristem.memory.state import State
from meristem.nn.attention import Attention
from meristem.nn.combine import COMBINATIONS
from meristem.nn.config import MemoryConfig
from meristem.nn.documents import Documents, read_documents
from meristem.nn.memory import begun_with, build_memory, initial_state
from meristem.shapes import Hidden


class MemoryAsGate(nn.Module):
    """``o = (y x m) W``: attention y over a sliding window, combined with what memory m recalls (``nn.combine``).

    They are combined before attention's output projection W, which mixes the heads. Persistent vectors, which every
    query sees, are written into a fresh memory first.
    """

    is_writing = True
    """False in a frozen reader (``models.online.frozen``)."""

    def __init__(self, width: int, config: MemoryConfig, *, attention: Attention, combine: str = "gated") -> None:
        super().__init__()
        self.attention = attention
        self.recall = build_memory(width, config)
        self.combine = COMBINATIONS[combine](width, config.head_dim)

    @property
    def out(self) -> nn.Linear:
        """The last projection of this branch."""
        return self.attention.out

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        if state is None:
            state = {"attention": None, "recall": initial_state(self.recall, self.attention.persistent_gd, hidden_btd)}
        attended_btf, attention = self.attention.mix(hidden_btd, state["attention"])
        read = self.recall if self.is_writing else self.recall.forward_frozen
        recalled_btf, recall = read(hidden_btd, state["recall"])
        combined_btf = self.combine(attended_btf, recalled_btf, hidden_btd)
        return self.out(combined_btf), {"attention": attention, "recall": recall}

    def forward_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """The same of packed documents: attention hides the others by a mask, the memory reads each by itself."""
        before = state or {"attention": None, "recall": None}
        attended_btf, attention = self.attention.mix_documents(hidden_btd, before["attention"], documents)
        read = begun_with(self.recall, self.attention.persistent_gd, is_writing=self.is_writing)
        recalled_btf, recall = read_documents(read, hidden_btd, before["recall"], documents)
        combined_btf = self.combine(attended_btf, recalled_btf, hidden_btd)
        return self.out(combined_btf), {"attention": attention, "recall": recall}
