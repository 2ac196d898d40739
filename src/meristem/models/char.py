"""Three small models to compare with: a plain transformer and two recurrent stacks (platform.md 6.1)."""

import math
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from meristem.memory.state import State, rows_apart
from meristem.models.config import ModelConfig
from meristem.models.init import seeded
from meristem.models.validate import check_tokens
from meristem.nn.attention import Attention
from meristem.nn.config import MemoryConfig
from meristem.nn.documents import Mask, documents_in, read_documents
from meristem.nn.mlp import Feedforward
from meristem.nn.recurrent import RecurrentStack, elman_stack, gru_stack
from meristem.shapes import Hidden, Logits, Tokens

WAVELENGTH: Final = 10_000.0


class CharFormer(nn.Module):
    """A transformer over the last ``window`` tokens, with absolute positions.

    State: the tokens read so far, and the keys and values of every layer. A call that would pass the window first
    forgets: of the tokens before it the last half window stays, less where the call itself needs the room, and is read
    again from position 0. So a call sees all of a text up to ``window``, and a long text, token by token, at least its
    last half window.
    """

    matrices: ClassVar = frozenset({"head.weight"})

    def __init__(self, model: ModelConfig, memory: MemoryConfig, vocabulary: int, random_seed: int) -> None:
        super().__init__()
        self.window = model.max_seq_len
        with seeded(random_seed, "model.ends"):
            self.embedding = nn.Embedding(vocabulary, model.dim)
            self.head = nn.Linear(model.dim, vocabulary)
            if model.init == "unscaled":
                _unscale(self.head)
            if model.positions == "learned":
                self.position_td = nn.Parameter(torch.randn(model.max_seq_len, model.dim) * 0.02)
            else:
                self.register_buffer("position_td", sinusoids(model.max_seq_len, model.dim), persistent=False)
        self.blocks = nn.ModuleList()
        for layer in range(model.n_layers):
            with seeded(random_seed, "model.layer", layer):
                block = CharBlock(model)
                if model.init == "unscaled":
                    _unscale(block.mlp.up, block.mlp.out)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(model.dim) if model.order == "pre" else nn.Identity()

    def forward(
        self, tokens_bt: Tokens, state: State | None = None, reset_mask_bt: Mask | None = None
    ) -> tuple[Logits, State]:
        """reset_mask_bt: ``(b, t)``, True where a document begins, which is read by itself."""
        check_tokens(tokens_bt, self.window)
        documents = documents_in(tokens_bt, state, reset_mask_bt)
        if documents is None:
            return self._read_on(tokens_bt, state)
        return read_documents(self._read_on, tokens_bt, state, documents)

    @rows_apart
    def _read_on(self, tokens_bt: Tokens, state: State | None) -> tuple[Logits, State]:
        carried: dict[str, Any] = state or {"tokens_bt": tokens_bt[:, :0], "layer": {}}
        room = self.window - tokens_bt.shape[1]
        if carried["tokens_bt"].shape[1] > room:
            n_kept = min(self.window // 2, room)
            kept_bt = carried["tokens_bt"][:, carried["tokens_bt"].shape[1] - n_kept :]
            _, carried = self._read(kept_bt, {"tokens_bt": kept_bt[:, :0], "layer": {}})
        return self._read(tokens_bt, carried)

    def _read(self, tokens_bt: Tokens, carried: dict[str, Any]) -> tuple[Logits, State]:
        n_before, after = carried["tokens_bt"].shape[1], {}
        hidden_btd = self.embedding(tokens_bt) + self.position_td[n_before : n_before + tokens_bt.shape[1]]
        for layer, block in enumerate(self.blocks):
            hidden_btd, after[str(layer)] = block(hidden_btd, carried["layer"].get(str(layer)))
        read_bt = torch.cat([carried["tokens_bt"], tokens_bt], dim=1)
        return self.head(self.norm(hidden_btd)), {"tokens_bt": read_bt, "layer": after}


class CharBlock(nn.Module):
    """One layer. ``post``: ``y = norm(x + attention x)``, ``norm(y + mlp y)``; ``pre`` normalises inside."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.is_pre = model.order == "pre"
        self.mixer_norm = nn.LayerNorm(model.dim)
        self.mixer = Attention(model.dim, model.n_heads, span=None, rope=False, bias=True)
        self.mlp_norm = nn.LayerNorm(model.dim)
        self.mlp = Feedforward(model.dim, model.mlp_dim or 4 * model.dim, F.relu)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        if self.is_pre:
            mixed_btd, state = self.mixer(self.mixer_norm(hidden_btd), state)
            hidden_btd = hidden_btd + mixed_btd
            return hidden_btd + self.mlp(self.mlp_norm(hidden_btd)), state
        mixed_btd, state = self.mixer(hidden_btd, state)
        hidden_btd = self.mixer_norm(hidden_btd + mixed_btd)
        return self.mlp_norm(hidden_btd + self.mlp(hidden_btd)), state


def sinusoids(window: int, width: int) -> Float[Tensor, "t d"]:
    """P[p, 2i] = sin(p 10000^(-2i/d)), P[p, 2i+1] = cos of the same (Vaswani et al. 1706.03762)."""
    pair_d = torch.arange(width) // 2 * 2
    angle_td = torch.arange(window)[:, None] * torch.exp(-math.log(WAVELENGTH) * pair_d / width)
    return torch.where(torch.arange(width) % 2 == 0, angle_td.sin(), angle_td.cos())


def _unscale(*linears: nn.Linear) -> None:
    """Weights and biases N(0, 1): a start at 26 nats, only for the baseline of a lesson."""
    for linear in linears:
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)


class CharRecurrent(nn.Module):
    """Embedding, a recurrent stack, head; its state is that of the stack."""

    matrices: ClassVar = frozenset({"head.weight"})
    window: int | None = None

    def __init__(self, vocabulary: int, width: int, stack: RecurrentStack) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.stack = stack
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, tokens_bt: Tokens, state: State | None = None, reset_mask_bt: Mask | None = None
    ) -> tuple[Logits, State]:
        """reset_mask_bt: ``(b, t)``, True where a document begins, which is read by itself."""
        check_tokens(tokens_bt)
        hidden_btd, documents = self.embedding(tokens_bt), documents_in(tokens_bt, state, reset_mask_bt)
        if documents is None:
            hidden_btd, state = self.stack(hidden_btd, state)
        else:
            hidden_btd, state = read_documents(self.stack, hidden_btd, state, documents)
        return self.head(hidden_btd), state


def char_rnn(model: ModelConfig, memory: MemoryConfig, vocabulary: int, random_seed: int) -> CharRecurrent:
    """Plain recurrent cells."""
    with seeded(random_seed, "model"):
        return CharRecurrent(vocabulary, model.dim, elman_stack(model.dim, model.n_layers))


def char_gru(model: ModelConfig, memory: MemoryConfig, vocabulary: int, random_seed: int) -> CharRecurrent:
    """Gated recurrent cells."""
    with seeded(random_seed, "model"):
        return CharRecurrent(vocabulary, model.dim, gru_stack(model.dim, model.n_layers))
