"""What blueprints build: layers whose last projection is zero, so that at first they add nothing.

Formulas give parameters, and FLOPs per token of matrix products, forward, two for each product of numbers; d is the
width of the host. ``growth.cost`` counts both, and bytes, of the module itself.
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from meristem.memory.state import State
from meristem.nn.attention import Attention
from meristem.nn.config import MemoryConfig
from meristem.nn.conv import CausalConv
from meristem.nn.documents import Documents
from meristem.nn.memory import MemoryLayer, build_memory
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.norm import RMSNorm
from meristem.shapes import Hidden


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


def bottleneck(width: int, hidden: int, *, is_normed: bool) -> nn.Module:
    """``out(gelu(up(norm x)))``, with biases. Parameters 2 d m + 2 d + m, FLOPs 4 d m, for m = ``hidden``."""
    layer = Feedforward(width, hidden, F.gelu)
    nn.init.zeros_(layer.out.weight)
    nn.init.zeros_(layer.out.bias)
    return Normed(width, layer) if is_normed else layer


def gated_feedforward(width: int, hidden: int, *, is_normed: bool) -> nn.Module:
    """``out(silu(gate n) * up(n))`` of n = norm x. Parameters 3 d m + d, FLOPs 6 d m, for m = ``hidden``."""
    layer = SwiGLU(width, hidden)
    nn.init.zeros_(layer.out.weight)
    return Normed(width, layer) if is_normed else layer


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


class Carrying(nn.Module):
    """``layer(norm x)`` for a layer with a state, which is that of the whole."""

    def __init__(self, width: int, layer: MemoryLayer | Attention) -> None:
        super().__init__()
        self.norm, self.layer = RMSNorm(width), layer

    def forward(self, hidden_btd: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.layer(self.norm(hidden_btd), state)

    def forward_documents(self, hidden_btd: Tensor, state: State | None, documents: Documents) -> tuple[Tensor, State]:
        """The same of packed documents, which know nothing of each other."""
        return self.layer.forward_documents(self.norm(hidden_btd), state, documents)


def memory(width: int, settings: MemoryConfig) -> nn.Module:
    """What a memory recalls, normed and gated as in ``nn.memory.MemoryLayer``. Parameters and FLOPs by its rule."""
    layer = MemoryLayer(width, settings, build_memory(width, settings))
    nn.init.zeros_(layer.out.weight)
    return Carrying(width, layer)


def _silent_heads(width: int, n_heads: int, head_dim: int, window: int | None, *, rope: bool) -> Attention:
    """Attention whose output projection is zero."""
    heads = Attention(width, n_heads, head_dim=head_dim, span=window, rope=rope)
    nn.init.normal_(heads.qkv.weight, std=1 / math.sqrt(width))
    nn.init.zeros_(heads.out.weight)
    return heads


def attention(width: int, n_heads: int, head_dim: int, window: int | None, *, rope: bool, is_normed: bool) -> nn.Module:
    """Heads of attention on norm x, over a sliding window or all before. Parameters 4 d e + d, FLOPs 8 d e + 4 t e for
    n_heads * head_dim = e and t tokens seen. State: keys and values of the window."""
    heads = _silent_heads(width, n_heads, head_dim, window, rope=rope)
    return Carrying(width, heads) if is_normed else heads


class SilentBlock(nn.Module):
    """What a whole block adds: ``a + mlp(norm(x + a))`` with ``a = attention(norm x)``.

    Parameters and FLOPs: those of attention and of a gated feed-forward layer. State: that of attention.
    """

    def __init__(self, width: int, mixer: Attention, hidden: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(width), mixer
        self.mlp_norm, self.mlp = RMSNorm(width), SwiGLU(width, hidden)
        nn.init.zeros_(self.mlp.out.weight)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        mixed_btd, state = self.mixer(self.mixer_norm(hidden_btd), state)
        return mixed_btd + self.mlp(self.mlp_norm(hidden_btd + mixed_btd)), state

    def forward_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """The same of packed documents, which know nothing of each other."""
        mixed_btd, state = self.mixer.forward_documents(self.mixer_norm(hidden_btd), state, documents)
        return mixed_btd + self.mlp(self.mlp_norm(hidden_btd + mixed_btd)), state


def block(width: int, mixer_sizes: tuple[int, int], window: int | None, *, rope: bool, hidden: int) -> nn.Module:
    """Attention and a gated feed-forward layer after it, with zero outputs both. mixer_sizes: heads and their width."""
    return SilentBlock(width, _silent_heads(width, *mixer_sizes, window, rope=rope), hidden)
