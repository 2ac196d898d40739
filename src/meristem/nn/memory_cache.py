"""Memories of earlier segments, cached and read beside the running one (Memory Caching 2602.24281, section 3).

A memory of fixed size forgets. Here the text is cut into segments, the memory that each one ends with is cached, and
every token reads all of them: between a recurrent memory, which has one, and attention, which keeps every token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meristem.errors import ConflictingKeys
from meristem.memory import Gates, Rule
from meristem.memory.forms import read_trusted, run_trusted
from meristem.memory.forms.by_chunk import Inputs, finished
from meristem.memory.forms.frozen_chunk import memory_read
from meristem.memory.state import Memory, State, full_precision, rows_apart
from meristem.memory.structure import Live, Pairs, Pullback, Structure, Weights
from meristem.nn.config import MemoryConfig
from meristem.nn.decode import can_decode, decode_heads
from meristem.nn.gates import GateMap
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.token_pooling import spans
from meristem.shapes import Hidden, Keys, Queries, Values

Descriptors = Float[Tensor, "b n d"]

MIXED_BY = ("scan", "frozen_chunk", "refined")
"""Forms that show a query the weights themselves, so that others can be mixed in."""


def with_cache(width: int, config: MemoryConfig) -> "NeuralMemory | MemoryCache":
    """One memory, with a cache of those of earlier segments if ``config.cache`` says so."""
    return NeuralMemory.from_config(width, config) if config.cache.read == "none" else MemoryCache(width, config)


class Shares(nn.Module):
    """How much a token takes of each cached memory and, last, of the running one: ``softmax_i(u m_i / sqrt(width))``,
    ``u = x W_u``, m the descriptors; with ``top`` over that many cached memories which score highest, the others 0."""

    matrices: ClassVar = frozenset({"ask.weight"})

    def __init__(self, width: int, top: int | None) -> None:
        super().__init__()
        self.top = top
        self.ask = nn.Linear(width, width, bias=False)

    def forward(self, inputs_btd: Hidden, mean_btd: Hidden, descriptor_bnd: Descriptors) -> Tensor:
        """mean_btd: the descriptor of the running memory, as each token sees it."""
        ask_btd = functional.linear(inputs_btd, self.ask.weight.to(inputs_btd.dtype)) / math.sqrt(mean_btd.shape[-1])
        past_btn = torch.einsum("btd,bnd->btn", ask_btd, descriptor_bnd)
        if self.top is not None and self.top < past_btn.shape[-1]:
            best_btn = past_btn.topk(self.top, dim=-1).indices
            is_left_btn = torch.ones_like(past_btn, dtype=torch.bool).scatter(-1, best_btn, value=False)
            past_btn = past_btn.masked_fill(is_left_btn, -math.inf)
        now_btn = (ask_btd * mean_btd).sum(dim=-1, keepdim=True)
        return torch.cat([past_btn, now_btn], dim=-1).softmax(dim=-1)


class MemoryCache(nn.Module):
    """Reads of the running memory and of those cached at the ends of earlier segments (memory.md 5.7).

    ``M_t`` runs, ``M_i`` was cached at the end of segment i; ``u_t = x_t W_u``; the descriptor ``m_i`` is the mean of
    the inputs x of segment i, and that of the current one the mean of its inputs up to t:

    - ``sum``: ``M_t(q_t) + sum_i M_i(q_t)``
    - ``gated``: ``g_s M_t(q_t) + sum_i g_i M_i(q_t)``, ``g = softmax_i(u_t m_i / sqrt(width))``
    - ``soup``: one read of the memory whose weights are ``g_s W_t + sum_i g_i W_i``; of a linear memory it is ``gated``
    - ``sparse``: ``gated`` over the running memory and the ``top`` cached ones that score highest

    The root of the width is not in the paper; it keeps the first softmax soft, and W_u can undo it. A mean over the
    whole current segment would not be causal.

    A segment ends after ``length`` tokens of a text, wherever calls begin and end, and the next token already reads
    what was cached. The running memory then continues, or, with ``write=fresh``, is reset. A chunk of an approximate
    form
    ends where its segment ends: with a length that is a multiple of the chunk this changes nothing.

    With logarithmic segments two neighbours of one size become one of twice the size, for which the memory of the later
    stands, as in a binary counter: after n segments there are as many as n has ones, at most ``log2(n) + 1``. Over
    ``limit`` the oldest is dropped; how many were ever finished is in the state.

    State: that of ``NeuralMemory``, and under ``cached`` weights and descriptors of cached memories, stacked, the
    oldest first, the sum of the inputs of the current segment, the tokens in it, and the segments finished.
    """

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        self.recall = NeuralMemory.from_config(width, config)
        self.config = config.cache
        self.mapped_rule = self.recall.rule.without_features()
        structure = self.mapped_rule.structure
        self.is_linear = structure.kind in ("matrix", "vector")
        self.is_souped = self.config.read == "soup" and not self.is_linear
        if self.is_souped:
            _require_mixing(self.recall)
        self.stacked = {name: _stacked(name) for name in structure.weights}
        top = self.config.top if self.config.read == "sparse" else None
        self.shares = None if self.config.read == "sum" else Shares(width, top)

    @property
    def rule(self) -> Rule:
        """That of the running memory, as are form, chunk, heads and gates."""
        return self.recall.rule

    @property
    def form(self) -> str:
        return self.recall.form

    @property
    def chunk(self) -> int:
        return self.recall.chunk

    @property
    def heads(self) -> int:
        return self.recall.heads

    @property
    def gates(self) -> GateMap:
        return self.recall.gates

    def project(self, hidden_btd: Hidden, tail: State | None) -> tuple[Queries, Keys, Values, State]:
        """Queries, keys and values of a sequence as the rule takes them, and what the convolution carries on."""
        return self.recall.project(hidden_btd, tail)

    def init_state(self, hidden_btd: Hidden) -> State:
        """The state of a reader that has read nothing; ``hidden_btd`` gives batch, dtype and device."""
        begun = self.recall.init_state(hidden_btd)
        weights = self.rule.weights(begun["memory"])
        cached: State = {name: weights[source][:, None][:, :0] for source, name in self.stacked.items()}
        if self.shares is not None:
            like = next(iter(weights.values()))
            batch, _, width = hidden_btd.shape
            cached |= {"descriptor_bnd": like.new_zeros(batch, 0, width), "sum_bd": like.new_zeros(batch, width)}
        return begun | {"kept": cached | {"n_tokens": 0, "n_segments": 0}}

    @rows_apart
    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        state = self.init_state(hidden_btd) if state is None else state
        if can_decode(self.recall, hidden_btd, state):
            return self._decode(hidden_btd, state)
        query_bthk, key_bthk, value_bthv, tail = self.recall.project(hidden_btd, state["conv"])
        gates = self.gates(hidden_btd)
        memory, cached = state["memory"], state["kept"]
        reads: list[Tensor] = []
        with full_precision(hidden_btd.device):
            dtype = memory[self.rule.structure.weights[0]].dtype
            query_bthk, key_bthk = (self.rule.features.apply(x.to(dtype)) for x in (query_bthk, key_bthk))
            inputs = key_bthk, value_bthv.to(dtype), query_bthk
            ends = spans(cached["n_tokens"], hidden_btd.shape[1], self.config.length)
            lengths = [stop - begin for begin, stop in ends]
            segments = zip(_cut(inputs, lengths), _cut_gates(gates.to(dtype), lengths), strict=True)
            for inputs_btd, (part, inside) in zip(hidden_btd.to(dtype).split(lengths, dim=1), segments, strict=True):
                share_btn, cached = self._heard(inputs_btd, cached)
                read_bthv, memory = self._read(part, inside, memory, cached, share_btn)
                memory, cached = (
                    self._ended(memory, cached) if cached["n_tokens"] == self.config.length else (memory, cached)
                )
                reads.append(read_bthv)
        read_btd = torch.cat(reads, dim=1).flatten(2).to(tail["tail_bsd"].dtype)
        return read_btd, {"memory": memory, "conv": tail, "kept": cached}

    @rows_apart
    def forward_frozen(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        """The same of memories that are not written, cached or counted: each token reads as the next of the segment."""
        state = self.init_state(hidden_btd) if state is None else state
        query_bthk, _, _, tail = self.recall.project(hidden_btd, state["conv"])
        with full_precision(hidden_btd.device):
            memory = state["memory"]
            read_bthv = read_trusted(self.rule, memory, query_bthk, form=self.form)
            read = state | {"memory": memory_read(self.rule, memory)}
            read_bthv = self._with_cached(read_bthv, query_bthk, hidden_btd, read, n_present=1)
        return read_bthv.flatten(2).to(tail["tail_bsd"].dtype), state | {"conv": tail}

    def _decode(self, hidden_btd: Hidden, state: State) -> tuple[Hidden, State]:
        """One token outside training, in fewer operations."""
        read_bh1v, query_bh1k, after = decode_heads(self.recall, hidden_btd, state)
        share_btn, cached = self._heard(hidden_btd, state["kept"])
        read_b1hv = self._joined(read_bh1v.movedim(1, 2), query_bh1k.movedim(1, 2), cached, share_btn)
        if cached["n_tokens"] == self.config.length:
            after["memory"], cached = self._ended(after["memory"], cached)
        return read_b1hv.flatten(2), after | {"kept": cached}

    def read(self, query_btd: Hidden, state: State) -> Hidden:
        """What running and cached memories recall for the given vectors; nothing is written.

        The vectors are the inputs as well: ``u = query W_u``. The descriptor of the current segment is the mean of
        what it has read, 0 before its first token.
        """
        with full_precision(query_btd.device):
            query_bthk = self.recall.to_queries(query_btd)
            read_bthv = self.recall.read_state(query_bthk, state["memory"])
            read_bthv = self._with_cached(read_bthv, query_bthk, query_btd, state, n_present=0)
        return read_bthv.flatten(2).to(query_btd.dtype)

    def _with_cached(
        self, read_bthv: Values, query_bthk: Queries, inputs_btd: Hidden, state: State, *, n_present: int
    ) -> Values:
        """What running and cached memories recall, unwritten; the running one alone recalls ``read_bthv``.

        n_present: 1 where the descriptor of the current segment is the mean of its inputs and the token's own.
        """
        cached, dtype, share_btn = state["kept"], read_bthv.dtype, None
        if not self._n_cached(cached):
            return read_bthv
        query_bthk, inputs_btd = self.rule.features.apply(query_bthk.to(dtype)), inputs_btd.to(dtype)
        if self.shares is not None:
            sum_btd = cached["sum_bd"][:, None] + n_present * inputs_btd
            share_btn = self.shares(
                inputs_btd, sum_btd / max(1, cached["n_tokens"] + n_present), cached["descriptor_bnd"]
            )
        if self.is_souped and share_btn is not None:
            running = Live(self.rule.weights(state["memory"]))
            mixed = Mixed(running, self._weights(cached), share_btn[:, None])
            return self.rule.structure.recall(mixed, query_bthk.movedim(1, 2)).movedim(1, 2)
        return self._joined(read_bthv, query_bthk, cached, share_btn)

    def _n_cached(self, cached: State) -> int:
        return int(cached[next(iter(self.stacked.values()))].shape[1])

    def _weights(self, cached: State) -> Memory:
        """Weights of cached memories under the names of the structure, with an axis n behind the batch."""
        return {source: cached[name] for source, name in self.stacked.items()}

    def _heard(self, inputs_btd: Tensor, cached: State) -> tuple[Tensor | None, State]:
        """How much each token takes of each memory, the running one last, and the count with these tokens in it."""
        n_before, n_time = cached["n_tokens"], inputs_btd.shape[1]
        counted = cached | {"n_tokens": n_before + n_time}
        if self.shares is None:
            return None, counted
        sum_btd = cached["sum_bd"][:, None] + inputs_btd.cumsum(dim=1)
        counted["sum_bd"] = sum_btd[:, -1]
        if not self._n_cached(cached):
            return None, counted
        n_read_t1 = torch.arange(n_before + 1, n_before + n_time + 1, device=inputs_btd.device)[:, None]
        return self.shares(inputs_btd, sum_btd / n_read_t1, cached["descriptor_bnd"]), counted

    def _read(
        self, inputs: Inputs, gates: Gates, memory: Memory, cached: State, share_btn: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Tokens of one segment: what they read, and the running memory after them."""
        rule, form, chunk = self.mapped_rule, self.form, self.chunk
        if self.is_souped and share_btn is not None:
            rule, inputs = _souped(rule, inputs, self._weights(cached), share_btn)
            return run_trusted(rule, memory, inputs, gates, form=form, chunk=chunk)
        read_bthv, memory = run_trusted(rule, memory, inputs, gates, form=form, chunk=chunk)
        return self._joined(read_bthv, inputs[2], cached, share_btn), memory

    def _joined(self, read_bthv: Tensor, query_bthk: Tensor, cached: State, share_btn: Tensor | None) -> Tensor:
        """Reads of the running memory, and of the cached ones."""
        if not self._n_cached(cached):
            return read_bthv
        weights, recall = self._weights(cached), self.rule.structure.recall
        query_bhtk = query_bthk.movedim(1, 2)
        if share_btn is None and self.is_linear:
            summed = Live({name: weight.sum(dim=1) for name, weight in weights.items()})
            return read_bthv + recall(summed, query_bhtk).movedim(1, 2)
        # To the structure, cached memories are heads.
        asked_bhtk = query_bhtk.repeat(1, self._n_cached(cached), 1, 1)
        kept_bhtv = recall(Live({name: weight.flatten(1, 2) for name, weight in weights.items()}), asked_bhtk)
        cached_bnhtv = kept_bhtv.unflatten(1, (-1, query_bhtk.shape[1]))
        if share_btn is None:
            return read_bthv + cached_bnhtv.sum(dim=1).movedim(1, 2)
        # Not an einsum, which would put time before the memories, and copy.
        past_bn1t1 = share_btn[:, None, :, :-1, None].movedim(3, 1)
        return torch.addcmul((past_bn1t1 * cached_bnhtv).sum(dim=1).movedim(1, 2), share_btn[..., -1:, None], read_bthv)

    def _ended(self, memory: Memory, cached: State) -> tuple[Memory, State]:
        """The running memory and the cached ones at the end of a segment."""
        memory = finished(memory)
        ending = self.rule.weights(memory)
        n_joined = min(_trailing_ones(cached["n_segments"]), self._n_cached(cached)) if self._is_joining else 0
        n_left = self._n_cached(cached) - n_joined
        first = max(0, n_left + 1 - self.config.limit)
        after: State = {"n_tokens": 0, "n_segments": cached["n_segments"] + 1}
        for source, name in self.stacked.items():
            after[name] = torch.cat([cached[name][:, first:n_left], ending[source][:, None]], dim=1)
        if self.shares is not None:
            mean_bd = cached["sum_bd"] / self.config.length
            # The newest of those that are joined is one segment long, the one before it two, then four.
            for power in range(n_joined):
                mean_bd = (mean_bd + cached["descriptor_bnd"][:, -1 - power]) / 2
            after["descriptor_bnd"] = torch.cat([cached["descriptor_bnd"][:, first:n_left], mean_bd[:, None]], dim=1)
            after["sum_bd"] = torch.zeros_like(mean_bd)
        if self.config.write == "fresh":
            memory = self.recall.initial(next(iter(ending.values())).shape[0])
        return memory, after

    @property
    def _is_joining(self) -> bool:
        return self.config.segments == "logarithmic"


@dataclass(frozen=True)
class Mixed:
    """Weights mixed for every row from the running and the cached ones: ``g_s W + sum_i g_i W_i``.

    cached: with an axis n behind the batch. share: ``b h c n``, or with one head for all; the running weights come
    last. Products are mixed, so that no weights per row ever exist.
    """

    running: Weights
    cached: Memory
    share: Tensor

    def matmul(self, name: str, rows: Tensor) -> Tensor:
        return self._mixed(self.running.matmul(name, rows), rows, self.cached[name])

    def matmul_t(self, name: str, rows: Tensor) -> Tensor:
        return self._mixed(self.running.matmul_t(name, rows), rows, self.cached[name].mT)

    def _mixed(self, running_bhcv: Tensor, rows_bhck: Tensor, cached_bnhkv: Tensor) -> Tensor:
        # One product with all cached weights stacked.
        spread = self.share[..., :-1, None] * rows_bhck[..., None, :]
        return self.share[..., -1:] * running_bhcv + spread.flatten(-2) @ cached_bnhkv.transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class Souped:
    """A structure that is read with cached weights mixed in, and written without. The last channels of a query are its
    shares, and keys are as wide as queries."""

    kind: ClassVar[str] = "souped"
    inner: Structure
    cached: Memory
    n_shares: int

    @property
    def weights(self) -> tuple[str, ...]:
        return self.inner.weights

    @property
    def n_codes(self) -> int:
        return self.inner.n_codes

    @property
    def used(self) -> tuple[str, ...]:
        return self.inner.used

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        return self.inner.init(batch, heads, key_width - self.n_shares, value_width, like)

    def address(self, key: Tensor) -> Tensor:
        return self.inner.address(key[..., : -self.n_shares])

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        mixed = Mixed(weights, self.cached, query[..., -self.n_shares :])
        return self.inner.recall(mixed, query[..., : -self.n_shares])

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        return self.inner.vjp(weights, replace(pairs, key_bhck=pairs.key_bhck[..., : -self.n_shares]))


def _cut(inputs: Inputs, lengths: list[int]) -> Iterator[Inputs]:
    """The slices of a sequence, whose gradients come back as one tensor."""
    yield from zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)


def _cut_gates(gates: Gates, lengths: list[int]) -> Iterator[Gates]:
    present = {name: gate.split(lengths, dim=1) for name, gate in vars(gates).items() if gate is not None}
    for parts in zip(*present.values(), strict=True):
        yield Gates(**dict(zip(present, parts, strict=True)))


def _souped(rule: Rule, inputs: Inputs, cached: Memory, share_btn: Tensor) -> tuple[Rule, Inputs]:
    """The rule and the inputs, with which any form of ``MIXED_BY`` reads mixed weights."""
    keys_bthk, values_bthv, queries_bthk = inputs
    n_shares = share_btn.shape[-1]
    share_bthn = share_btn[:, :, None].expand(-1, -1, keys_bthk.shape[2], -1)
    wide = functional.pad(keys_bthk, (0, n_shares)), values_bthv, torch.cat([queries_bthk, share_bthn], dim=-1)
    return replace(rule, structure=Souped(rule.structure, cached, n_shares)), wide


def _require_mixing(recall: NeuralMemory) -> None:
    """Raises ConflictingKeys where the weights that a token meets never stand by themselves."""
    reasons = {
        f"the form '{recall.form}' never shows them (take memory.form={', '.join(MIXED_BY)})": recall.form in MIXED_BY,
        "pairs are remembered beside the weights (take a span of 1)": recall.rule.span == 1,
    }
    found = [reason for reason, is_met in reasons.items() if not is_met]
    if found:
        raise ConflictingKeys(
            f"memory.cache.read is 'soup', which mixes the weights that each token meets, and of a memory of the "
            f"structure '{recall.rule.structure.kind}' {'; '.join(found)}. Change that, or memory.cache.read to gated.",
            reasons=found,
        )


def _stacked(name: str) -> str:
    """The name of a weight with an axis n behind the batch: ``matrix_bhkv`` -> ``matrix_bnhkv``."""
    stem, axes = name.rsplit("_", 1)
    return f"{stem}_{axes[0]}n{axes[1:]}"


def _trailing_ones(number: int) -> int:
    """Of a binary number: how many carries adding one to it takes."""
    return ((number + 1) & -(number + 1)).bit_length() - 1
