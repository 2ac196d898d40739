"""What blueprints build: layers whose last projection is zero, so that at first they add nothing.

Formulas give parameters, and FLOPs per token of matrix products, forward, two for each product of numbers; d is the
width of the host. ``growth.cost`` counts both, and bytes, of the module itself.
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from meristem.memory.state import State
from meristem.nn.config import MemoryConfig
from meristem.nn.conv import CausalConv
from meristem.nn.documents import Documents
from meristem.nn.memory import MemoryLayer, build_memory
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.norm import RMSNorm


class LowRank(nn.Module):
    """``out(down(x))``, linear in x: what low-rank adaptation adds (Hu et al. 2106.09685), without its scale.

    Parameters r (d_read + d_added), FLOPs 2 r (d_read + d_added).
    """

    matrices: ClassVar = frozenset({"down.weight", "out.weight"})

    def __init__(self, read: int, added: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(read, rank, bias=False)
        self.out = nn.Linear(rank, added, bias=False)
        nn.init.normal_(self.down.weight, std=1 / math.sqrt(read))
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.down(hidden))


class Normed(nn.Module):
    """``layer(norm(x))`` for a layer without a state."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = RMSNorm(width), layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(self.norm(hidden))


def norm(width: int) -> nn.Module:
    """``gain x / size(x)`` with a gain of zero. Parameters d, no matrix product."""
    made = RMSNorm(width)
    nn.init.zeros_(made.gain_d)
    return made


def bottleneck(width: int, hidden: int) -> nn.Module:
    """``out(gelu(up(norm x)))``, with biases. Parameters 2 d m + 2 d + m, FLOPs 4 d m, for m = ``hidden``."""
    layer = Feedforward(width, hidden, F.gelu)
    nn.init.zeros_(layer.out.weight)
    nn.init.zeros_(layer.out.bias)
    return Normed(width, layer)


def gated_feedforward(width: int, hidden: int) -> nn.Module:
    """``out(silu(gate n) * up(n))`` of n = norm x. Parameters 3 d m + d, FLOPs 6 d m, for m = ``hidden``."""
    layer = SwiGLU(width, hidden)
    nn.init.zeros_(layer.out.weight)
    return Normed(width, layer)


class Convolution(nn.Module):
    """``out(conv(norm x))``: each channel mixes its last k inputs, then channels are mixed.

    Parameters d^2 + d k + d, FLOPs 2 d^2 + 2 d k. State: the last k - 1 inputs of the convolution.
    """

    matrices: ClassVar = frozenset({"out.weight"})

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm, self.conv = RMSNorm(width), CausalConv(width, kernel)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden_btd: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        mixed_btd, state = self.conv(self.norm(hidden_btd), state)
        return self.out(mixed_btd), state


class Memory(nn.Module):
    """``layer(norm x)`` for a layer with a memory, which is written while it reads. State: that of the layer."""

    def __init__(self, width: int, layer: MemoryLayer) -> None:
        super().__init__()
        self.norm, self.layer = RMSNorm(width), layer

    def forward(self, hidden_btd: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.layer(self.norm(hidden_btd), state)

    def forward_documents(self, hidden_btd: Tensor, state: State | None, documents: Documents) -> tuple[Tensor, State]:
        """The same of packed documents, each of which the memory reads by itself."""
        return self.layer.forward_documents(self.norm(hidden_btd), state, documents)


def memory(width: int, settings: MemoryConfig) -> nn.Module:
    """What a memory recalls, normed and gated as in ``nn.memory.MemoryLayer``. Parameters and FLOPs by its rule."""
    layer = MemoryLayer(width, settings, build_memory(width, settings))
    nn.init.zeros_(layer.out.weight)
    return Memory(width, layer)
