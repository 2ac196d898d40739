"""A memory as a module: projections, gates and a rule."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Final, Self

import torch
from torch import nn
from torch.nn import functional

from meristem.errors import CapabilityError, ConflictingKeys, WrongValue
from meristem.linalg import unit
from meristem.memory import Rule
from meristem.memory.features import Drawn
from meristem.memory.forms import choose, forms, read_trusted, require, run_trusted
from meristem.memory.state import Memory, State, beside, full_precision, rows_apart
from meristem.memory.structure import Live
from meristem.nn.config import MemoryConfig
from meristem.nn.conv import CausalConv
from meristem.nn.decode import can_decode, decode
from meristem.nn.documents import Documents, Mask, read_documents
from meristem.nn.gates import GateMap
from meristem.nn.precision import KeepsFloat32
from meristem.nn.rule import rule_of
from meristem.nn.write import can_write, write
from meristem.shapes import Gate, Hidden, Keys, Mixed, Queries, Values


class Initial(KeepsFloat32):
    """The memory that a reader starts with: a learned value of every weight, the same for all rows of a batch.

    What the rule carries beside the weights, such as momentum, starts at zero and is not learned, unless it has to
    start elsewhere.

    has_local: the start of the local memories of the form ``tnt`` is learned beside it.
    """

    def __init__(self, rule: Rule, heads: int, widths: tuple[int, int], *, has_local: bool = False) -> None:
        """widths: of keys and values."""
        super().__init__()
        self.rule = rule
        first = rule.init(1, heads, *widths)
        weights = {name: first[name] for name in rule.structure.weights}
        learned = [*weights, *(rule.update.carry(weights) if rule.update.is_learned else ())]
        if has_local:
            first |= {beside(name, "reset"): weight.clone() for name, weight in weights.items()}
            learned += [beside(name, "reset") for name in weights]
        self.learned = nn.ParameterDict({name: nn.Parameter(first.pop(name)) for name in learned})
        for name, carried in first.items():
            self.register_buffer(name, carried, persistent=False)
        self.carried = tuple(first)
        self.float32 = frozenset({"learned", *self.carried})

    def forward(self, batch: int) -> Memory:
        weights = self.rule.structure.weights
        stored = {*weights, *(beside(name, "reset") for name in weights)}
        settled = {name: self.rule.retention.settle(x) if name in stored else x for name, x in self.learned.items()}
        value = settled | {name: self.get_buffer(name) for name in self.carried}
        return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in value.items()}


class RandomMap(KeepsFloat32):
    """The tensors that the features of a rule are made of: drawn once, saved with the weights, never trained."""

    float32 = frozenset({"weight_kf", "shift_f"})

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        for name, part in drawn.items():
            self.register_buffer(name, part.float())

    def drawn(self) -> Drawn:
        return dict(self.named_buffers())


class NeuralMemory(nn.Module):
    """A memory's output for each token, after that token was written into it (memory.md 5.1, up to the read).

    Queries, keys and values, as far as the rule uses them, are linear in the hidden vector, mixed with the few tokens
    before by a short convolution, and passed through SiLU; queries and keys have unit length, without which the
    surprise grows with the width and training ends in NaN. A rule that writes what it makes of key and value alone
    needs no such bound.

    State: the memory, float32 whatever the autocast, and the convolution's tail. A fresh memory is a learned parameter.
    ``memory.state`` has what can be done with it: ``detach``, ``clone``, ``select_rows``, ``join_rows``.

    Its reads are neither normed nor gated: a layer adds ``out(norm(read))`` to its hidden vectors, as ``MemoryLayer``.
    Backward passes are written by hand: ``torch.func.functional_call`` runs, the transforms of ``torch.func`` raise.
    """

    matrices: ClassVar = frozenset({"qkv.weight"})

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        rule: str = "titans",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        """
        dim: of the hidden vectors; n_heads divides it, and each head has a memory of its own.
        settings: other keys of ``memory`` in a configuration, such as ``form``, ``chunk``, ``conv``, ``half_life``.
        dtype: of the projections; memories and gates are float32, or float64 if the input is.
        Raises WrongValue for settings that one memory does not read, ConflictingKeys for those that do not go together.
        """
        super().__init__()
        with torch.device(device) if device is not None else nullcontext():
            self._build(dim, _settings(dim, n_heads, settings | {"rule": rule}))
        if dtype is not None:
            for module in (self,) if dtype == torch.float64 else (self.qkv, self.conv):
                module.to(dtype)

    @classmethod
    def from_config(cls, dim: int, config: MemoryConfig) -> Self:
        """The memory that a section ``memory`` of a configuration describes."""
        return cls(dim, config.n_heads_in(dim), **{name: getattr(config, name) for name in SETTINGS})

    def _build(self, width: int, config: MemoryConfig) -> None:
        self._rule = rule_of(config)
        drawn = self._rule.features.draw(config.head_dim)
        self.random_map = RandomMap(drawn) if drawn else None
        require(self.rule, config.form)
        self.form, self.chunk = choose(self.rule) if config.form == "auto" else config.form, config.chunk
        self.heads = config.n_heads_in(width)
        self.used = self.rule.structure.used
        self.qkv = nn.Linear(width, len(self.used) * width, bias=False)
        self.conv = CausalConv(len(self.used) * width, config.conv)
        # With gates for every channel, each value channel is a head of its own, which shares the keys of its head.
        self.channels = config.head_dim if config.gates == "channel" else 1
        if self.channels > 1:
            _require_channels(self.rule)
        self.gates = GateMap(width, self.heads * self.channels, self.rule, config)
        self.mix = ValueMix(self.heads, config.head_dim) if self.rule.values == "mixed" else None
        widths = config.head_dim, config.head_dim // self.channels
        self.initial = Initial(self.rule, self.heads * self.channels, widths, has_local=self.form == "tnt")
        self.is_induction = config.init == "induction"
        if self.is_induction:
            _require_induction(self.used, config)
        self.draw_keys()
        # What ``decode`` takes: all else goes token by token like sequences.
        is_exact = forms.get(self.form).is_exact
        is_usual = self.rule.structure.kind == "matrix" and self.rule.features.name == "identity" and self.mix is None
        is_usual = is_usual and self.channels == 1 and config.gate_rank is None
        self.is_plain = self.rule.is_linear and is_exact and is_usual

    @torch.no_grad()
    def draw_keys(self) -> None:
        """With ``init`` induction: the first keys are made as queries are, of the token before.

        What a token writes is then found by the next token that is like the one before it: the memory starts as an
        induction head (Olsson et al. 2209.11895). To be called again when ``qkv`` is drawn anew.
        """
        if self.is_induction:
            width = self.qkv.in_features
            query, key = (slice(at * width, (at + 1) * width) for at in map(self.used.index, ("query", "key")))
            self.qkv.weight[key] = self.qkv.weight[query]
            self.conv.weight_dc[key] = self.conv.weight_dc[query].roll(-1, dims=1)

    @property
    def rule(self) -> Rule:
        """The rule, with the features that this layer drew or loaded."""
        if self.random_map is None:
            return self._rule
        return replace(self._rule, features=replace(self._rule.features, drawn=self.random_map.drawn()))

    def forward(
        self,
        hidden_btd: Hidden,
        state: State | None = None,
        *,
        reset_mask: Mask | None = None,
        padding_mask: Mask | None = None,
    ) -> tuple[Mixed, State]:
        """What every token reads, after it was written, and the state after the sequence; None begins one.

        reset_mask: ``(b, t)``, True where a document begins: it reads as if it stood alone, from a fresh memory
            (``nn.documents.reset_mask`` makes it of ``cu_seqlens``).
        padding_mask: ``(b, t)``, True for tokens, False for padding, which is never read and given 0.
        Raises ShapeError for masks that do not fit, and CapabilityError inside ``torch.func.grad``, ``vmap`` and kin.
        """
        if torch._C._are_functorch_transforms_active():
            raise CapabilityError(
                "a memory was called inside a transform of torch.func (grad, vmap, jvp ...), which cannot pass through "
                "its hand-written backward passes. Call torch.func.functional_call outside of one, differentiate with "
                "torch.autograd.grad, and put what vmap would map over into the batch.",
                operation="torch.func transform",
                reason="hand-written backward passes",
            )
        if reset_mask is None and padding_mask is None:
            return self._read(hidden_btd, state)
        documents = Documents.packed(hidden_btd, reset_mask_bt=reset_mask, padding_mask_bt=padding_mask)
        return read_documents(self._read, hidden_btd, state, documents, self.init_state)

    @rows_apart
    def _read(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Mixed, State]:
        if state is not None and can_decode(self, hidden_btd, state):
            return decode(self, hidden_btd, state)
        state = self.init_state(hidden_btd) if state is None else state
        if can_write(self, hidden_btd, state):
            return write(self, hidden_btd, state)
        query_bthk, key_bthk, value_bthv, tail = self.project(hidden_btd, state["conv"])
        read_bthv, memory = run_trusted(
            self.rule,
            state["memory"],
            (key_bthk, value_bthv, query_bthk),
            self.gates(hidden_btd),
            form=self.form,
            chunk=self.chunk,
        )
        return read_bthv.flatten(2).to(tail["tail_bsd"].dtype), {"memory": memory, "conv": tail}

    @rows_apart
    def forward_frozen(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Mixed, State]:
        """The same of a memory that is not written: each token reads it as it stands. The convolution moves on."""
        state = self.init_state(hidden_btd) if state is None else state
        query_bthk, _, _, tail = self.project(hidden_btd, state["conv"])
        read_bthv = read_trusted(self.rule, state["memory"], query_bthk, form=self.form)
        return read_bthv.flatten(2).to(tail["tail_bsd"].dtype), state | {"conv": tail}

    def init_state(self, hidden_btd: Hidden) -> State:
        """The state of a reader that has read nothing; ``hidden_btd`` gives batch, dtype and device."""
        return {"memory": self.initial(hidden_btd.shape[0]), "conv": self.conv.init_state(hidden_btd)}

    def read(self, query_btd: Hidden, state: State) -> Hidden:
        """What the memory, as it stands, recalls of the given vectors; nothing is written."""
        return self.read_state(self.to_queries(query_btd), state["memory"]).flatten(2).to(query_btd.dtype)

    def to_queries(self, query_btd: Hidden) -> Queries:
        """Vectors as queries: one for every head, of length one where the rule's are."""
        asked_bthk = query_btd.unflatten(-1, (self.heads, -1))
        query_bthk = asked_bthk if self.mix is not None else unit(asked_bthk)
        return query_bthk.repeat_interleave(self.channels, dim=2)

    def retain_at_rest(self) -> Gate:
        """The retain factors that a hidden vector of zeros gets: what the gates are by themselves."""
        return self.gates(torch.zeros_like(self.qkv.weight[:1])[None]).retain_bth

    def read_state(self, query_bthk: Queries, memory: Memory) -> Values:
        """What a memory recalls for queries, unwritten. A chunk that is not finished is not yet in its weights."""
        weights = self.rule.weights(memory)
        with full_precision(query_bthk.device):
            query_bhtk = self.rule.features.apply(query_bthk.to(next(iter(weights.values())).dtype)).movedim(1, 2)
            return self.rule.structure.recall(Live(weights), query_bhtk).movedim(1, 2)

    def project(self, hidden_btd: Hidden, tail: State | None) -> tuple[Queries, Keys, Values, State]:
        """Queries, keys and values of a sequence as the rule takes them, and what the convolution carries on.

        The last is of the model's dtype, in which reads are to come back; the first may be wider.
        """
        # Queries and keys stand before values.
        n_units = 0 if self.mix is not None else sum(name != "value" for name in self.used)
        sizes = {"n_vectors": len(self.used), "heads": self.heads, "n_units": n_units}
        found, tail = self.conv.project(self.qkv(hidden_btd), tail, **sizes)
        vectors = dict(zip(self.used, found, strict=True))
        # A rule ignores what it does not use, but its forms take three vectors all the same.
        query_bthk, key_bthk, value_bthv = (vectors.get(name, found[0]) for name in ("query", "key", "value"))
        if self.mix is not None:
            return query_bthk, key_bthk, self.mix(key_bthk, value_bthv.to(tail["tail_bsd"].dtype)), tail
        if self.channels > 1:
            query_bthk, key_bthk = (x.repeat_interleave(self.channels, dim=2) for x in (query_bthk, key_bthk))
            value_bthv = value_bthv.flatten(2)[..., None]
        return query_bthk, key_bthk, value_bthv, tail


SETTINGS: Final = tuple(sorted(set(MemoryConfig.model_fields) - {"head_dim", "levels", "cache", "self_reference"}))
"""What a single memory reads of the section ``memory``, beside its heads."""


def _settings(dim: int, n_heads: int, settings: dict[str, Any]) -> MemoryConfig:
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown or n_heads < 1 or dim % n_heads:
        found = f"found {', '.join(unknown)}" if unknown else f"found {n_heads} heads for a width of {dim}"
        raise WrongValue(
            f"{found}; a memory takes a number of heads that divides its width, and the settings "
            f"{', '.join(SETTINGS)}. Change what was found.",
            value=unknown or n_heads,
        )
    return MemoryConfig.model_validate(settings | {"head_dim": dim // n_heads})


def _require_induction(used: Sequence[str], config: MemoryConfig) -> None:
    if not {"query", "key"} <= set(used) or config.conv < 2:
        raise ConflictingKeys(
            f"memory.init is 'induction', which makes keys of the token before as queries are made: it needs a rule "
            f"that uses both and memory.conv of at least 2; found {', '.join(used)} and memory.conv={config.conv}. Set "
            f"memory.init=random, or change these.",
            path="memory.init",
        )


def _require_channels(rule: Rule) -> None:
    """Raises ConflictingKeys where the channels of a value do not go their own ways."""
    apart = ("dot", "squared", "absolute", "power", "huber_coordinate")
    if rule.structure.kind != "matrix" or rule.bias.name not in apart or rule.retention.name not in ("decay", "local"):
        raise ConflictingKeys(
            f"memory.gates is 'channel', and this rule joins the channels of a value (structure "
            f"'{rule.structure.kind}', bias '{rule.bias.name}', retention '{rule.retention.name}'). Take the structure "
            f"'matrix', a bias of {', '.join(apart)} and the retention 'decay' or 'local', or memory.gates=head."
        )


class ValueMix(nn.Module):
    """``-W silu([k; v])`` per head: what the rule ``omega`` writes in the place of a surprise (memory.md 3.8)."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        weight_hfv = torch.empty(heads, 2 * head_width, head_width)
        for weight_fv in weight_hfv:
            nn.init.xavier_uniform_(weight_fv)
        self.weight_hfv = nn.Parameter(weight_hfv)

    def forward(self, key_bthk: Keys, value_bthv: Values) -> Values:
        joined_bthf = functional.silu(torch.cat([key_bthk, value_bthv], dim=-1))
        return -torch.einsum("bthf,hfv->bthv", joined_bthf, self.weight_hfv.to(joined_bthf.dtype))
