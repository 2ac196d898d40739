"""Memory as a layer, the memory that its settings compose, and how a reader of it begins."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from meristem.linalg import precise
from meristem.memory.kernels.select import fuses
from meristem.memory.state import State
from meristem.native import layers as native
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.config import MemoryConfig
from meristem.nn.documents import Documents, Read, read_documents
from meristem.nn.memory_cache import MemoryCache, with_cache
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm, inverse_size
from meristem.shapes import Hidden, Mixed


def build_memory(
    width: int, config: MemoryConfig, *, is_queried: bool = False
) -> NeuralMemory | MemoryCache | CMSMemory:
    """A module ``(hidden_btd, state) -> (recalled_btf, state)``: one memory, one with a cache, or several levels.

    is_queried: the layer also reads the memory without writing; where outputs of levels are mixed by learned shares,
    these have shares of their own.
    """
    if config.levels.count > 1 or config.levels.reset_after is not None:
        return CMSMemory(width, config, is_queried=is_queried)
    return with_cache(width, config)


def initial_state(recall: nn.Module, persistent_gd: Float[Tensor, "g d"] | None, hidden_btd: Hidden) -> State | None:
    """The state after the persistent vectors only; None, a fresh one, where there are none.

    Memory reads and writes them in front of the text (Titans 2501.00663, eq. 19).
    """
    if persistent_gd is None:
        return None
    _, state = recall(persistent_gd.to(hidden_btd.dtype).expand(hidden_btd.shape[0], -1, -1), None)
    met: State = state
    return met


def begun_with(recall: Any, persistent_gd: Float[Tensor, "g d"] | None, *, is_writing: bool) -> Read:
    """``recall``, or what it reads unwritten, as a function that begins after the persistent vectors."""
    forward = recall if is_writing else recall.forward_frozen

    def read(hidden_btd: Hidden, state: State | None) -> tuple[Mixed, State]:
        state = initial_state(recall, persistent_gd, hidden_btd) if state is None else state
        found: tuple[Mixed, State] = forward(hidden_btd, state)
        return found

    return read


class MemoryLayer(nn.Module):
    """Memory alone as a mixer: what is recalled, normalised per head, gated and projected (memory.md 5.1)."""

    matrices: ClassVar = frozenset({"out.weight"})
    is_writing = True
    """False in a frozen reader (``models.online.frozen``)."""

    def __init__(self, width: int, config: MemoryConfig, recall: Any = None) -> None:
        """recall: what is read instead of a single memory, as ``build_memory`` composes it."""
        super().__init__()
        self.recall = NeuralMemory.from_config(width, config) if recall is None else recall
        self.norm = RMSNorm(config.head_dim)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width, bias=False)
        # The output gate starts open: sigmoid(2) = 0.88.
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        recall = self.recall if self.is_writing else self.recall.forward_frozen
        recalled_btf, state = recall(hidden_btd, state)
        return self._gated(recalled_btf, hidden_btd), state

    def forward_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """The same of packed documents, each of which the memory reads by itself."""
        return self.read_documents(hidden_btd, state, documents, None)

    def read_documents(
        self,
        hidden_btd: Hidden,
        state: State | None,
        documents: Documents,
        persistent_gd: Float[Tensor, "g d"] | None,
    ) -> tuple[Hidden, State]:
        """``forward_documents`` of a memory that every document finds with the persistent vectors written into it."""
        read = begun_with(self.recall, persistent_gd, is_writing=self.is_writing)
        recalled_btf, state = read_documents(read, hidden_btd, state, documents)
        return self._gated(recalled_btf, hidden_btd), state

    def _gated(self, recalled_btf: Mixed, hidden_btd: Hidden) -> Hidden:
        gain_k, gate_btf = self.norm.gain_d, self.gate(hidden_btd)
        if fuses(recalled_btf, gate_btf, width=len(gain_k)):
            gated_btf = native.norm(recalled_btf, gain_k, gate_btf, None, self.norm.eps)
        else:
            gated_btf = GatedNorm.apply(recalled_btf, gate_btf, gain_k.to(recalled_btf.dtype), self.norm.eps)
        gated_btd: Hidden = self.out(gated_btf)
        return gated_btd


class GatedNorm(torch.autograd.Function):
    """``apply(recalled_btf, gate_btd, gain_k, eps)``: ``RMSNorm`` of every head times ``sigmoid(gate)``.

    Autograd would keep three tensors as large as these two beside them, and pass seventeen times over such.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        recalled_btf, gate_btd, gain_k, eps = inputs
        ctx.save_for_backward(recalled_btf, gate_btd, gain_k)
        ctx.eps = eps
        recalled_bthk = precise(recalled_btf).unflatten(-1, (-1, len(gain_k)))
        open_bthk = precise(gate_btd).sigmoid().view_as(recalled_bthk)
        gained_bthk = open_bthk.mul_(recalled_bthk).mul_(inverse_size(recalled_bthk, eps)).mul_(gain_k)
        return gained_bthk.flatten(2).to(recalled_btf.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gained_btd: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x / size: ``dx = (dn - n mean(n dn)) / size``."""
        recalled_btf, gate_btd, gain_k = ctx.saved_tensors
        recalled_bthk = precise(recalled_btf).unflatten(-1, (-1, len(gain_k)))
        scale_bth1, open_btd = inverse_size(recalled_bthk, ctx.eps), precise(gate_btd).sigmoid()
        normed_bthk = recalled_bthk * scale_bth1
        d_normed_bthk = (d_gained_btd * open_btd).view_as(recalled_bthk)
        weighed_bthk = normed_bthk * d_normed_bthk
        d_gain_k = weighed_bthk.flatten(0, 2).sum(dim=0)
        weighed_bthk.mul_(gain_k)
        d_gate_btd = torch.addcmul(weighed_bthk.flatten(2), weighed_bthk.flatten(2), open_btd, value=-1)
        along_bth1 = weighed_bthk.mean(dim=-1, keepdim=True)
        d_recalled_bthk = d_normed_bthk.mul_(gain_k).addcmul_(normed_bthk, along_bth1, value=-1).mul_(scale_bth1)
        d_recalled_btf = d_recalled_bthk.flatten(2).to(recalled_btf.dtype)
        return d_recalled_btf, d_gate_btd.to(gate_btd.dtype), d_gain_k.to(gain_k.dtype), None
