"""A stack of residual layers that reads tokens and says what may come next."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import nn

from meristem.memory.state import State
from meristem.models.aggregate import JOINS
from meristem.models.config import ModelConfig
from meristem.models.init import seeded
from meristem.models.layers import of_layer
from meristem.models.validate import check_tokens
from meristem.nn.attention import Attention
from meristem.nn.cms_mlp import CMSMLP, build_cms_mlp
from meristem.nn.config import MemoryConfig
from meristem.nn.documents import Documents, Mask, ReadsDocuments, documents_in, read_documents
from meristem.nn.mac import MemoryAsContext
from meristem.nn.mag import MemoryAsGate
from meristem.nn.mal import MemoryAsLayer
from meristem.nn.memory import MemoryLayer, build_memory
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.nn.self_reference import SelfReference
from meristem.plugins import Registry
from meristem.shapes import Hidden, Logits, Tokens

EMBEDDING: Final = 0.3
"""Deviation of the first embedding: small enough for the branches to add to it, large enough to be heard under them."""

HEAD: Final = 0.6
"""Deviation of the head's first logits: the first loss is near that of a uniform guess, and yet a gradient comes back.
At a tenth of it a model learns little but the frequencies of tokens for hundreds of steps."""


def attention(model: ModelConfig, memory: MemoryConfig) -> Attention:
    """Sliding-window attention alone: the baseline without memory."""
    return Attention(
        model.dim, model.n_heads, span=model.sliding_window, rope=model.rope, n_persistent=model.n_persistent_tokens
    )


def memory_as_gate(model: ModelConfig, memory: MemoryConfig) -> MemoryAsGate:
    """Sliding-window attention, scaled by what the memory recalls."""
    return MemoryAsGate(model.dim, memory, attention=attention(model, memory), combine=model.combine)


def memory_as_context(model: ModelConfig, memory: MemoryConfig) -> MemoryAsContext:
    """Attention inside a segment, to the segment and to what the memory of earlier ones recalls for it."""
    whole = Attention(model.dim, model.n_heads, span=None, rope=model.rope, n_persistent=model.n_persistent_tokens)
    return MemoryAsContext(model.dim, memory, attention=whole, segment=model.segment, combine=model.combine)


def memory_as_layer(model: ModelConfig, memory: MemoryConfig) -> MemoryAsLayer:
    """A memory, and sliding-window attention to what it gives."""
    return MemoryAsLayer(model.dim, memory, attention=attention(model, memory), is_residual=model.is_residual)


def memory_alone(model: ModelConfig, memory: MemoryConfig) -> MemoryLayer:
    """A memory without attention."""
    return MemoryLayer(model.dim, memory, build_memory(model.dim, memory))


def self_reference(model: ModelConfig, memory: MemoryConfig) -> SelfReference:
    """Memories that make the keys, values and gates by which they are written."""
    return SelfReference(model.dim, memory)


mixers: Registry[Callable[[ModelConfig, MemoryConfig], nn.Module]] = Registry(
    "mixer",
    {
        "attention": attention,
        "mag": memory_as_gate,
        "mac": memory_as_context,
        "mal": memory_as_layer,
        "memory": memory_alone,
        "self_reference": self_reference,
    },
)
"""What mixes tokens: modules with ``forward(hidden_btd, state) -> (hidden_btd, state)``."""

MLPS: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "swiglu": SwiGLU,
    "gelu": partial(Feedforward, activation=F.gelu),
}


class Block(nn.Module):
    """One residual layer: ``x + mixer(norm x)``, then ``x + mlp(norm x)``, or a chain of such.

    Its state is that of the mixer, and under ``levels`` that of the chain where it carries any.
    """

    m3_every: int | None = None
    joined: str | None = None

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        # By which growth makes another one like it.
        self.settings = model, memory
        self.mixer_norm = RMSNorm(model.dim)
        self.mixer = mixers.get(model.mixer)(model, memory)
        hidden = model.mlp_dim or _derived_hidden(model)
        is_chain = model.mlp == "levels"
        self.mlp_norm = None if is_chain else RMSNorm(model.dim)
        self.mlp = build_cms_mlp(model.dim, hidden, model.levels) if is_chain else MLPS[model.mlp](model.dim, hidden)
        self._draw_weights()
        self._shrink_outputs(1 / math.sqrt(2 * model.n_layers))

    def forward(
        self, hidden_btd: Hidden, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Hidden, State]:
        """documents: how the rows are packed; None where they go on as they are."""
        if documents is not None:
            return self._read_documents(hidden_btd, state, documents)
        carried = None if state is None else {name: leaf for name, leaf in state.items() if name != "levels"}
        mixed_btd, after = self.mixer(self.mixer_norm(hidden_btd), carried)
        hidden_btd = hidden_btd + mixed_btd
        if self.mlp_norm is not None:
            return hidden_btd + self.mlp(self.mlp_norm(hidden_btd)), after
        added_btd, levels = self.mlp(hidden_btd, None if state is None else state.get("levels"))
        return hidden_btd + added_btd, after | ({"levels": levels} if levels else {})

    @torch.compiler.disable
    def _read_documents(self, hidden_btd: Hidden, state: State | None, documents: Documents) -> tuple[Hidden, State]:
        """A mixer that has no way of its own reads document by document. Not compiled: each window is cut otherwise."""
        carried = None if state is None else {name: leaf for name, leaf in state.items() if name != "levels"}
        normed_btd = self.mixer_norm(hidden_btd)
        if isinstance(self.mixer, ReadsDocuments):
            mixed_btd, after = self.mixer.forward_documents(normed_btd, carried, documents)
        else:
            mixed_btd, after = read_documents(self.mixer, normed_btd, carried, documents)
        hidden_btd = hidden_btd + mixed_btd
        if self.mlp_norm is not None:
            return hidden_btd + self.mlp(self.mlp_norm(hidden_btd)), after
        if not isinstance(self.mlp, CMSMLP) or not self.mlp.is_carrying:
            return hidden_btd + self.mlp(hidden_btd)[0], after
        added_btd, levels = read_documents(self.mlp, hidden_btd, None if state is None else state["levels"], documents)
        return hidden_btd + added_btd, after | {"levels": levels}

    def _draw_weights(self) -> None:
        """Every projection keeps the size of what it is given."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                module.draw_keys()

    def _shrink_outputs(self, factor: float) -> None:
        """All branches of a stack together add as much as one would: their last projections, ``out``, start small."""
        outs = [getattr(self.mixer, "out", None), getattr(self.mlp, "out", None)]
        with torch.no_grad():
            for out in outs:
                if isinstance(out, nn.Linear):
                    out.weight.mul_(factor)
            levels = self.mlp.outs if isinstance(self.mlp, CMSMLP) else []
            for out in levels:
                out.weight.mul_(factor / math.sqrt(len(levels)))


def _derived_hidden(model: ModelConfig) -> int:
    """4 widths, or, where a gate takes a third of the weights, 8/3 of them, in whole multiples of 32."""
    return 4 * model.dim if model.mlp in ("gelu", "levels") else 32 * math.ceil(model.dim / 12)


class LM(nn.Module):
    """Embedding, ``blocks``, norm, head. The blocks stand on each other, or side by side and are joined.

    State: what each block carries, ``{"layer": {"0": ..., "1": ...}}``.

    n_masked: so many tokens at the end of the vocabulary are not in use yet, and have the least logit there is.
    """

    matrices: ClassVar = frozenset({"head.weight"})
    window: int | None = None
    n_masked: int = 0

    def __init__(self, model: ModelConfig, memory: MemoryConfig, vocabulary: int, random_seed: int) -> None:
        super().__init__()
        with seeded(random_seed, "model.ends"):
            self.embedding = nn.Embedding(vocabulary, model.dim)
            self.head = None if model.tied else nn.Linear(model.dim, vocabulary, bias=False)
            nn.init.normal_(self.embedding.weight, std=EMBEDDING)
            head_od = self.embedding.weight if self.head is None else self.head.weight
            nn.init.normal_(head_od, std=HEAD / math.sqrt(model.dim))
        self.blocks = nn.ModuleList()
        for layer in range(model.n_layers):
            with seeded(random_seed, "model.layer", layer):
                block = Block(*of_layer(model, memory, layer))
            # Where each layer has an m3 of its own, ``optim.groups`` reads its speed here.
            block.m3_every = model.of_layer(layer).m3_every
            self.blocks.append(block)
        with seeded(random_seed, "model.aggregate"):
            self.join = None if model.aggregate == "stack" else JOINS[model.aggregate](model.dim, model.n_layers)
        self.norm = RMSNorm(model.dim)

    def forward(
        self,
        tokens_bt: Tokens,
        state: State | None = None,
        reset_mask_bt: Mask | None = None,
        attend_mask_bt: Mask | None = None,
    ) -> tuple[Logits, State]:
        """The logits of every token, and the state after the sequence; None begins one.

        reset_mask_bt: ``(b, t)``, True where a document begins: it reads as if it stood alone, from a fresh state.
            Best on the host, where it is read. Raises ShapeError where it does not fit the tokens.
        attend_mask_bt: in its place, True where a document begins over whose beginning attention does not look back,
            while memories read on (``models.validate.require_masks`` says of which models).
        """
        check_tokens(tokens_bt)
        documents = documents_in(tokens_bt, state, reset_mask_bt, attend_mask_bt)
        packing = () if documents is None else (documents,)
        carried: dict[str, Any] = state or {"layer": {}}
        after: State = {}
        hidden_btd = embedded_btd = self.embedding(tokens_bt)
        beside: list[Hidden] = []
        for layer, block in enumerate(self.blocks):
            seen_btd = hidden_btd if self.join is None else embedded_btd
            hidden_btd, after[str(layer)] = block(seen_btd, carried["layer"].get(str(layer)), *packing)
            beside.append(hidden_btd)
        if self.join is not None:
            hidden_btd = self.join(torch.stack(beside))
        return self.readout(hidden_btd), {"layer": after}

    def readout(self, hidden_btd: Hidden) -> Logits:
        """What hidden vectors of the residual stream say of the next token: norm and head."""
        hidden_btd = self.norm(hidden_btd)
        if not self.n_masked:
            return F.linear(hidden_btd, self.embedding.weight) if self.head is None else self.head(hidden_btd)
        head_od = self.embedding.weight if self.head is None else self.head.weight
        used_bto = F.linear(hidden_btd, head_od[: -self.n_masked])
        return F.pad(used_bto, (0, self.n_masked), value=torch.finfo(used_bto.dtype).min)
