"""Memories that make the keys, values, write rates and retain factors by which all of them are written."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.linalg import unit
from meristem.memory.gates import LOG_FLOOR
from meristem.memory.state import Memory, State, full_precision, rows_apart
from meristem.nn.config import MemoryConfig
from meristem.nn.conv import CausalConv
from meristem.nn.norm import RMSNorm
from meristem.nn.precision import KeepsFloat32
from meristem.nn.self_chunk import ChunkForm, Projections, WriteSystem, chunk_form, write_system
from meristem.nn.self_matrix import Matrices
from meristem.nn.self_mlp import Networks
from meristem.nn.token_pooling import spans
from meristem.shapes import Hidden


class Memories(Protocol):
    """Memories of one structure that share keys and gates, as one value."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def is_generated(self) -> bool: ...

    @property
    def is_squared(self) -> bool: ...

    def first(self, heads: int, width: int) -> Memory: ...

    def joined(self, values: Mapping[str, Tensor]) -> Memory: ...

    def project(self, weights: Memory, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]: ...

    def write(self, start: Memory, live: Memory, rows: WriteSystem) -> Memory: ...

    def read(self, start: Memory, live: Memory, rows: WriteSystem) -> tuple[Tensor, Memory]: ...

    def read_chunks(self, live: Memory, chunks: ChunkForm) -> tuple[Tensor, Memory]: ...


STRUCTURES: Final[dict[str, Callable[[tuple[str, ...], bool, bool], Memories]]] = {"matrix": Matrices, "mlp": Networks}


class SelfReference(KeepsFloat32):
    """Self-referential Titans: ``conv(x)`` -> makers -> memory -> norm, gate and projection (memory.md 7).

    The makers are the memories M_k, M_v, M_eta, M_alpha, and M_q where the query adapts; the memory that is read is
    written with what they make. Each is read before it is written, and all are written by delta descent,
    ``M <- M (alpha - eta k k^T) - eta grad L`` (Nested Learning 2512.24695, eqs. 83-93). What a chunk is written with
    comes from the memories that begin it: ``chunk_other`` tokens for the makers, ``chunk_memory`` for the memory (eq.
    97). Heads are memories of their own, each of its own channels; the paper has one, ``head_width`` = width.

    A memory that makes its own values is multiplied by about ``alpha + eta (v k - 1)`` along k with every token. As
    printed, v is as long as the root of the width, and one token said often ends in NaN; values of length one
    (``unit_value``) cannot grow. What is left is that ``alpha`` fades all memories, keys included, hence the long
    ``half_life``.

    State: the short convolution's tail, and under ``memory`` how many tokens were read and, of the makers that adapt
    and of the memory that is read (``asked``), the values that began the unfinished chunk (``start``) and those that
    its tokens have left (``live``). Fresh memories are learned parameters.
    """

    matrices: ClassVar = frozenset({"query.weight", "out.weight"})
    float32 = frozenset({"initial", "bias_hl"})
    is_writing = True
    """False in a frozen reader (``models.online.frozen``)."""

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        own = config.self_reference
        self.heads, self.is_static = config.n_heads_in(width), own.setting == "static"
        self.chunk_memory, self.chunk_other = own.chunk_memory, own.chunk_other
        self.eta_scale, self.unit_value = own.eta_scale, own.unit_value
        names = ("key", "value", *(("query",) if own.adaptive_query else ()), "rate", "retain")
        kind, how = STRUCTURES[own.structure], (own.setting == "self_generated", own.loss == "squared")
        self.is_matrix = own.structure == "matrix"
        self.makers: Memories = kind(names, *how)
        self.memory: Memories = kind(("memory",), *how)
        self.conv = CausalConv(width, config.conv)
        self.query = None if own.adaptive_query else nn.Linear(width, width, bias=False)
        first = self.makers.first(self.heads, config.head_dim) | self.memory.first(self.heads, config.head_dim)
        self.initial = nn.ParameterDict({name: nn.Parameter(value) for name, value in first.items()})
        # softplus of the first is 1: the write rate starts at eta_scale; retain starts with its half-life.
        kept = 2 ** (-1 / own.half_life)
        bias_l = torch.tensor([math.log(math.e - 1), math.log(kept / (1 - kept))])
        self.bias_hl = nn.Parameter(bias_l.repeat(self.heads, 1))
        self.norm = RMSNorm(config.head_dim)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width, bias=False)
        # The output gate starts open: sigmoid(2) = 0.88.
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        if state is not None and self.is_writing and can_decode(self, hidden_btd, state):
            return decode(self, hidden_btd, state)
        return self._read(hidden_btd, state)

    @rows_apart
    def _read(self, hidden_btd: Hidden, state: State | None) -> tuple[Hidden, State]:
        state = {"memory": self.fresh(hidden_btd.shape[0]), "conv": None} if state is None else state
        mixed_btd, tail = self.conv(hidden_btd, state["conv"])
        query_btd = None if self.query is None else self.query(mixed_btd)
        with full_precision(hidden_btd.device):
            queries = None if query_btd is None else unit(self._heads(query_btd))
            read_htk, memory = self.recall(self._heads(mixed_btd), queries, state["memory"])
            read_bthk = self.norm(read_htk.unflatten(0, (len(hidden_btd), self.heads)).transpose(1, 2))
        gate_btd = self.gate(hidden_btd).sigmoid()
        gated_btd = read_bthk.flatten(2).to(gate_btd.dtype) * gate_btd
        return self.out(gated_btd), {"memory": memory, "conv": tail}

    @property
    def values(self) -> dict[str, Tensor]:
        """The first value of every memory, one tensor for each of its layers."""
        return dict(self.initial.items())

    def retain_at_rest(self) -> Tensor:
        """The retain factors that makers which say nothing give."""
        return self.bias_hl[:, 1].sigmoid()

    def fresh(self, batch: int) -> State:
        """Every memory at its learned first value."""
        state: State = {"n_tokens": 0, "asked": _first(_expanded(self.memory.joined(self.values), batch))}
        if not self.is_static:
            state["makers"] = _first(_expanded(self.makers.joined(self.values), batch))
        return state

    def recall(self, rows: Tensor, queries: Tensor | None, memory: State) -> tuple[Tensor, State]:
        """The memory's output for each token, and all memories after them.

        rows: ``(b h) t k``, as all that is computed here. queries: of length one; None where a memory makes them.
        """
        if not self.is_writing:
            return self._frozen(rows, queries, memory), memory
        n_before, n_time = memory["n_tokens"], rows.shape[1]
        batch = len(rows) // self.heads
        after: State = {"n_tokens": n_before + n_time}
        if self.is_static:
            projections = self._projections(_folded(_expanded(self.makers.joined(self.values), batch)), rows, queries)
        else:
            projections, after["makers"] = self._make(rows, queries, memory)
        read, after["asked"] = self._read_memory(projections, memory["asked"], n_before)
        return read, after

    def _frozen(self, rows: Tensor, queries: Tensor | None, memory: State) -> Tensor:
        """Outputs of memories that are not written: for each token as for the next one."""
        if self.is_static:
            start = _folded(_expanded(self.makers.joined(self.values), len(rows) // self.heads))
        else:
            start, _ = _running(memory["makers"], memory["n_tokens"] % self.chunk_other == 0)
        projections, live = self._projections(start, rows, queries), _folded(memory["asked"]["live"])
        void = replace(
            projections, log_retain=torch.zeros_like(projections.log_retain), rate=torch.zeros_like(projections.rate)
        )
        return self.memory.read(live, live, write_system(void))[0]

    def _make(self, rows: Tensor, queries: Tensor | None, memory: State) -> tuple[Projections, State]:
        """What the makers say of each token, and the makers after them."""
        n_before, chunk = memory["n_tokens"], self.chunk_other
        start, live = _running(memory["makers"], n_before % chunk == 0)
        parts = []
        for begin, stop in spans(n_before, rows.shape[1], chunk):
            asked = None if queries is None else queries[:, begin:stop]
            parts.append(self._projections(start, rows[:, begin:stop], asked))
            live = self.makers.write(start, live, write_system(parts[-1]))
            start = live if (n_before + stop) % chunk == 0 else start
        return Projections.joined(parts), _kept(start, live, len(rows) // self.heads)

    def _projections(self, makers: Memory, rows: Tensor, queries: Tensor | None) -> Projections:
        projections, gates_htl = self.makers.project(makers, rows)
        gates_htl = gates_htl + self.bias_hl.repeat(len(rows) // self.heads, 1)[:, None]
        log_retain_ht = functional.logsigmoid(gates_htl[..., 1]).clamp_min(LOG_FLOOR)
        rate_ht = self.eta_scale * functional.softplus(gates_htl[..., 0])
        return Projections(
            key=unit(projections["key"]),
            value=unit(projections["value"]) if self.unit_value else projections["value"],
            query=unit(projections["query"]) if queries is None else queries,
            log_retain=log_retain_ht,
            rate=rate_ht,
        )

    def _read_memory(self, projections: Projections, memory: State, n_before: int) -> tuple[Tensor, State]:
        """The memory's output for each token before it is written, and the memory after them."""
        n_time, chunk = projections.key.shape[1], self.chunk_memory
        start, live = _running(memory, n_before % chunk == 0)
        reads, at = [], 0
        for begin, stop in spans(n_before, n_time, chunk):
            if begin < at:
                continue
            if chunk > 1 and stop - begin == chunk:
                at = begin + (n_time - begin) // chunk * chunk
                read, live = self.memory.read_chunks(live, chunk_form(projections.window(begin, at).chunks(chunk)))
                start = live
            else:
                read, live = self.memory.read(start, live, write_system(projections.window(begin, stop)))
                start = live if (n_before + stop) % chunk == 0 else start
            reads.append(read)
        batch = len(projections.key) // self.heads
        return torch.cat(reads, dim=1) if len(reads) > 1 else reads[0], _kept(start, live, batch)

    def _heads(self, mixed_btd: Hidden) -> Tensor:
        """b t (h k) -> (b h) t k, in the precision of the memories."""
        return mixed_btd.to(self.bias_hl.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)


def _expanded(weights: Memory, batch: int) -> Memory:
    """One value for all rows of a batch."""
    return {name: x.expand(batch, *x.shape[1:]) for name, x in weights.items()}


def _folded(weights: Memory) -> Memory:
    """b h ... -> (b h) ..."""
    return {name: x.flatten(0, 1) for name, x in weights.items()}


def _first(weights: Memory) -> State:
    return {"start": weights, "live": weights}


def _running(memory: State, is_at_start: bool) -> tuple[Memory, Memory]:
    """The memories that began the chunk, and those that its tokens so far have left; one value where it begins."""
    live = _folded(memory["live"])
    return live if is_at_start else _folded(memory["start"]), live


def _kept(start: Memory, live: Memory, batch: int) -> State:
    """What is carried to the next sequence; a chunk that begins has one value under both names."""
    after = {name: x.unflatten(0, (batch, -1)) for name, x in live.items()}
    if start is live:
        return _first(after)
    return {"start": {name: x.unflatten(0, (batch, -1)) for name, x in start.items()}, "live": after}


def can_decode(layer: SelfReference, hidden_btd: Hidden, state: State | None) -> bool:
    """One token, in full precision, outside training, and memories of one matrix that are all written.

    A session that generates reads one token after another, and there the cost is the number of operations, not their
    size: ``decode`` gives the same numbers in fewer calls, a third of the time.
    """
    if hidden_btd.shape[1] != 1 or state is None or torch.is_grad_enabled():
        return False
    is_usual = layer.is_matrix and layer.query is not None and not layer.is_static
    return (
        is_usual and hidden_btd.dtype is layer.bias_hl.dtype and not torch.is_autocast_enabled(hidden_btd.device.type)
    )


def decode(layer: SelfReference, hidden_btd: Hidden, state: State) -> tuple[Hidden, State]:
    """The layer's output for one token, and the state after it; the state that came in is unchanged."""
    batch, heads = len(hidden_btd), layer.heads
    query_dd: Tensor = layer.query.weight  # type: ignore[union-attr]
    memory, n_after = state["memory"], state["memory"]["n_tokens"] + 1
    padded_bsd = torch.cat([state["conv"]["tail_bsd"], hidden_btd], dim=1)
    mixed_bd = (padded_bsd.mT * layer.conv.weight_dc).sum(dim=-1)
    # From here on h is rows of the batch and heads together.
    row_h1k = mixed_bd.view(batch * heads, 1, -1)
    width = row_h1k.shape[-1]
    names = ("makers", "asked")
    starts, lives = ([memory[name][at]["matrix_bhkv"].flatten(0, 1) for name in names] for at in ("start", "live"))
    made_h1v = torch.bmm(row_h1k, starts[0])
    value_h1k = made_h1v[..., width : 2 * width]
    vectors = [functional.linear(mixed_bd, query_dd).view_as(row_h1k), made_h1v[..., :width]]
    found_hlk = unit(torch.cat([*vectors, value_h1k] if layer.unit_value else vectors, dim=1))
    query_h1k, key_h1k, value_h1k = (*found_hlk.split(1, dim=1), value_h1k)[:3]
    gate_bhl = made_h1v[..., 2 * width :].view(batch, heads, 2, width).mean(dim=-1) + layer.bias_hl
    gate_hl1 = gate_bhl.view(-1, 2, 1)
    rate_h1k = layer.eta_scale * functional.softplus(gate_hl1[:, :1]) * key_h1k
    retain_h11 = gate_hl1[:, 1:].sigmoid()
    read_h1k = torch.bmm(query_h1k, lives[1])
    normed_bd = functional.rms_norm(read_h1k, (width,), layer.norm.gain_d, layer.norm.eps).view(batch, -1)
    gate_bd = functional.linear(hidden_btd[:, 0], layer.gate.weight, layer.gate.bias).sigmoid()
    out_bd = functional.linear(normed_bd * gate_bd, layer.out.weight)
    after: State = {"n_tokens": n_after}
    for name, start_hkv, live_hkv in zip(names, starts, lives, strict=True):
        teach, chunk = (layer.makers, layer.chunk_other) if name == "makers" else (layer.memory, layer.chunk_memory)
        new_h1v = torch.baddbmm(_wanted(teach, start_hkv, key_h1k, value_h1k), key_h1k, live_hkv, alpha=-1)
        live_hkv = torch.addcmul(rate_h1k.mT * new_h1v, retain_h11, live_hkv)
        live_bhkv = live_hkv.unflatten(0, (batch, heads))
        start_bhkv = _began(live_bhkv, memory[name]["start"]["matrix_bhkv"], n_after % chunk == 0)
        after[name] = {"start": {"matrix_bhkv": start_bhkv}, "live": {"matrix_bhkv": live_bhkv}}
    return out_bd[:, None], {"memory": after, "conv": {"tail_bsd": padded_bsd[:, 1:]}}


def _began(live_bhkv: Tensor, start_bhkv: Tensor, is_over: bool | Tensor) -> Tensor:
    """What the chunk of the next token began with; of every row by itself where rows have read differently."""
    if isinstance(is_over, Tensor):
        return torch.where(is_over.to(live_bhkv.device)[:, None, None, None], live_bhkv, start_bhkv)
    return live_bhkv if is_over else start_bhkv


def _wanted(teach: Memories, start_hkv: Tensor, key_h1k: Tensor, value_h1k: Tensor) -> Tensor:
    """What the memories are to recall for the key."""
    if teach.is_generated:
        return torch.bmm(value_h1k - key_h1k if teach.is_squared else value_h1k, start_hkv)
    wanted_h1v = value_h1k.repeat(1, 1, len(teach.names))
    return torch.baddbmm(wanted_h1v, key_h1k, start_hkv, alpha=-1) if teach.is_squared else wanted_h1v
