"""The frozen chunk form: every surprise of a chunk is taken at the memory that enters it, then all is linear.

Source: Titans 2501.00663, section 3.2; MIRAS 2504.13173, section 5.4; TTT 2407.04620. It is an approximation that ends
in ``scan`` as chunks or write rates shrink, and with chunks of one token is ``scan``. For one matrix it is a closed
form; for networks of any depth it is ``dual``: a layer's weights at token t are the entering ones less a sum of outer
products, so what a query reads there is ``A_t q W + c_t q S - (q a^T * intra) d``, and no tensor holds weights per
token (memory.md 4.4, 4.5).

Decays are computed for all chunks at once; surprises, reads and writes go chunk after chunk, where the
matrices of one chunk stay in a processor's cache.

Where a retention maps or projects what is stored, it acts when a chunk ends, and queries read the entering memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from meristem.memory.forms.by_chunk import ByChunk, Inputs, run_chunks
from meristem.memory.forms.decay import Decay, compute_decay, cut
from meristem.memory.forms.exact_chunk import decay_of, solved
from meristem.memory.gates import Gates, RowGates
from meristem.memory.kernels.frozen_kernel import FrozenRead, FrozenWrite
from meristem.memory.rule import Rule, change_by, limited, read
from meristem.memory.state import Memory, State
from meristem.memory.structure import Live, Pairs, Surprise, Weights
from meristem.memory.update import momentum_name
from meristem.shapes import Keys, Queries, Values


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its update is not linear in the surprise": rule.update.is_linear,
        "it measures several pairs at what each token retains": rule.span == 1 or rule.probe == "cold",
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def frozen_chunk(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, with surprises frozen at chunk starts.

    chunk: tokens that share one memory for their surprises. With C tokens of write rate w on one key the residual is
    multiplied by ``1 - C w``, which must stay above -1.
    """
    inputs = keys_bthk, values_bthv, queries_bthk
    return run_chunks(ByChunk(_begin, _part, _whole_chunks), rule, memory, inputs, gates, chunk)


def _begin(rule: Rule, memory: Memory, inputs: Inputs, n_passes: int = 0) -> State:
    """What a chunk carries: the stored tensors at its start, and the memory as each pass but the last left it.

    Where the retention is applied once, to all that the chunk changed: the change so far, and the gates of it.
    """
    stored = {name: memory[name] for name in rule.structure.weights}
    if n_passes:
        return {"start": stored, "passes": {str(index): _flowing_in(rule, memory) for index in range(n_passes)}}
    if rule.retention.is_linear:
        return {"start": stored}
    some = next(iter(stored.values()))
    return {
        "start": stored | {name: memory[name] for name in rule.retention.carry(stored)},
        "change": {name: torch.zeros_like(weight) for name, weight in stored.items()},
        "retain_bhc": some.new_ones(*some.shape[:2], 1),
        "write_bhc": some.new_zeros(*some.shape[:2], 1),
    }


def _flowing_in(rule: Rule, memory: Memory) -> Memory:
    """The stored tensors and their momenta."""
    names = (each for name in rule.structure.weights for each in (name, momentum_name(name)))
    return {name: memory[name] for name in names if name in memory}


def is_moving(rule: Rule) -> bool:
    """A query meets what the tokens before it wrote; where a retention maps or projects, the start of the chunk."""
    return rule.retention.is_linear and not rule.retention.is_mapped


def memory_read(rule: Rule, memory: Memory) -> Memory:
    """The memory that the next token reads before it is written, in an unfinished chunk or at the start of one."""
    unfinished: Any = dict(memory).get("unfinished")
    return memory if is_moving(rule) or unfinished is None else unfinished["start"]


def read_next(rule: Rule, memory: Memory, queries_bthk: Queries) -> Values:
    """What the next token reads before it is written."""
    live = Live(rule.weights(memory_read(rule, memory)))
    return rule.structure.recall(live, queries_bthk.movedim(1, 2)).movedim(1, 2)


def _whole_chunks(rule: Rule, memory: Memory, inputs: Inputs, gates: Gates, chunk: int) -> tuple[Values, Memory]:
    if rule.is_linear:
        return solved(rule, memory, inputs, gates, chunk=chunk, is_frozen=True)
    return _in_order(rule, memory, inputs, gates, chunk)


def _part(rule: Rule, memory: Memory, begun: State, inputs: Inputs, gates: Gates) -> tuple[Values, Memory, State]:
    n_time = inputs[0].shape[1]
    if n_time == 1 and "passes" not in begun:
        return _one_token(rule, memory, begun, inputs, gates)
    ((chunk, decay),) = _cut_up(rule, inputs, gates, n_time)
    read_bhcv, memory, begun = _go_on(rule, memory, begun, chunk, decay)
    return read_bhcv.movedim(1, 2), memory, begun


def _one_token(rule: Rule, memory: Memory, begun: State, inputs: Inputs, gates: Gates) -> tuple[Values, Memory, State]:
    """The next token of a chunk, at the cost of a token of ``scan``."""
    key_bhk, value_bhv, query_bhk = (x[:, 0] for x in inputs)
    start, rows = begun["start"], rule.in_effect(gates.at(0))
    change, carried = change_by(rule, memory, start, (key_bhk, value_bhv), rows)
    if rule.retention.is_linear:
        after = memory | rule.retention.apply(memory, change, rows) | carried
    else:
        change = {name: begun["change"][name] + part for name, part in change.items()}
        stored, begun = _retained(rule, begun, change, rows)
        after = memory | stored | carried
    read_from = (memory if rule.reads == "before" else after) if is_moving(rule) else start
    return read(rule, read_from, query_bhk)[:, None], after, begun


def _in_order(
    rule: Rule, memory: Memory, inputs: Inputs, gates: Gates, chunk: int, n_passes: int = 0
) -> tuple[Values, Memory]:
    """Whole chunks, one after the other.

    n_passes: how often the surprises of a chunk are taken anew, at the weights that its tokens met.
    """
    reads = []
    for each, decay in _cut_up(rule, inputs, gates, chunk):
        begun = _begin(rule, memory, inputs, min(n_passes, chunk - 1))
        read_bhcv, memory, _ = _go_on(rule, memory, begun, each, decay)
        reads.append(read_bhcv)
    return torch.cat(reads, dim=2).movedim(1, 2), memory


class ChunkRows(NamedTuple):
    """Tokens of one chunk: what is written, the queries, and the gates."""

    pairs: Pairs
    query_bhck: Tensor
    rows: RowGates


def _cut_up(rule: Rule, inputs: Inputs, gates: Gates, chunk: int) -> Iterator[tuple[ChunkRows, Decay]]:
    """The tokens of every chunk, and the decay of what they write at write rate 1."""
    windows = zip(*(_heads_first(x, chunk).unbind(2) for x in inputs), _rows(gates, chunk), strict=True)
    for (key_bhck, value_bhcv, query_bhck, rows), decay in zip(
        windows, decay_at_rate_one(rule, gates, chunk), strict=True
    ):
        yield ChunkRows(Pairs(key_bhck, value_bhcv, rows.code_bhcg), query_bhck, rows), decay


def _go_on(rule: Rule, memory: Memory, begun: State, part: ChunkRows, decay: Decay) -> tuple[Tensor, Memory, State]:
    """The next tokens of a chunk: reads, the memory, and what the chunk carries."""
    pairs, query_bhck, rows = part
    passes = [*begun.get("passes", {}).values(), memory if rule.retention.is_linear else memory | begun["change"]]
    earlier = _earlier(decay) if len(passes) > 1 or rule.reads == "before" else decay
    step = frozen_step(rule, passes[0], pairs, rows, decay, start=begun["start"])
    if len(passes) > 1:
        lives: State = {}
        for index, live in enumerate(passes[1:]):
            lives[str(index)] = step.after(rule)
            step = frozen_step(rule, live, pairs, rows, decay, read_from=step.moving(earlier))
        begun = begun | {"passes": lives}
    read_from = step.moving(decay if rule.reads == "after" else earlier) if is_moving(rule) else Live(step.weights)
    read_bhcv = rule.structure.recall(read_from, query_bhck)
    if rule.retention.is_linear:
        after = step.after(rule)
    else:
        after = step.summed()
        stored, begun = _retained(rule, begun, {name: after.pop(name) for name in rule.structure.weights}, rows)
        after |= stored
    return read_bhcv, memory | after | step.remembered, begun


def _retained(rule: Rule, begun: State, change: Memory, rows: RowGates) -> tuple[Memory, State]:
    """What is stored where the retention is applied once, to all that the chunk changed; and what the chunk carries.

    The product of factors and the sum of write rates are the gates of one write as large as all of these.
    """
    rows = rule.in_effect(rows)
    retain_bhc = begun["retain_bhc"] * rows.retain_bhc.prod(-1, keepdim=True)
    write_bhc = begun["write_bhc"] + rows.write_bhc.sum(-1, keepdim=True)
    total = replace(rows, retain_bhc=retain_bhc, write_bhc=write_bhc)
    gathered = {"change": change, "retain_bhc": retain_bhc, "write_bhc": write_bhc}
    return rule.retention.apply(begun["start"], change, total), begun | gathered


@dataclass(frozen=True)
class FrozenStep:
    """The surprises of rows at one memory, and how they decay while the rows are read.

    weights: of the memory, as they are read. decay: at write rate 1; rate_bhc is the rate in effect.
    counts_bhs: how much each pair counts, for a rule whose surprise spans several: those before the rows come first.
    """

    memory: Memory
    weights: Memory
    factors: Surprise
    decay: Decay
    rate_bhc: Tensor
    counts_bhs: Tensor | None
    remembered: Memory

    def moving(self, decay: Decay) -> "Moving":
        """The weights as each token reads them, by this decay."""
        intra_bhcs = decay.intra_nhcs * self.rate_bhc[..., None, :]
        if self.counts_bhs is not None:
            intra_bhcs = intra_bhcs @ self._band(self.counts_bhs) * self.counts_bhs[..., None, :]
        return Moving(self.memory, self.factors, decay.entering_nhcl, intra_bhcs)

    def after(self, rule: Rule) -> Memory:
        """What is stored after the rows, and the momentum with it, where the retention only scales what is stored."""
        return {name: rule.retention.settle(x) if name in self.factors else x for name, x in self.summed().items()}

    def summed(self) -> Memory:
        """The stored tensors and the momentum after all writes, by their decays."""
        write_bhsl = self.decay.write_nhcl * self.rate_bhc[..., None]
        if self.counts_bhs is not None:
            write_bhsl = (self._band(self.counts_bhs).mT @ write_bhsl) * self.counts_bhs[..., None]
        after: Memory = {}
        for name, factor in self.factors.items():
            names = _stored(name, write_bhsl)
            stored = [self.memory[source] for source in names]
            left = FrozenWrite.apply(*factor, write_bhsl, self.decay.carry_nhll, *stored)
            after |= dict(zip(names, left, strict=True))
        return after

    def _band(self, counts_bhs: Tensor) -> Tensor:
        """1 where the objective of token c is about pair s."""
        n_rows, n_pairs = self.rate_bhc.shape[-1], counts_bhs.shape[-1]
        return counts_bhs.new_ones(n_rows, n_pairs).triu().tril(n_pairs - n_rows)


@dataclass(frozen=True)
class Moving:
    """Weights that change from row to row: the entering ones, less what the rows before have written."""

    memory: Memory
    factors: Surprise
    entering_bhcl: Tensor
    intra_bhcs: Tensor

    def matmul(self, name: str, rows: Tensor) -> Tensor:
        addresses, gradients = self.factors[name]
        return self._read(rows, addresses, gradients, [self.memory[source] for source in self._sources(name)])

    def matmul_t(self, name: str, rows: Tensor) -> Tensor:
        addresses, gradients = self.factors[name]
        return self._read(rows, gradients, addresses, [self.memory[source].mT for source in self._sources(name)])

    def _sources(self, name: str) -> list[str]:
        return _stored(name, self.entering_bhcl)

    def _read(self, rows: Tensor, inward: Tensor, outward: Tensor, stored: list[Tensor]) -> Tensor:
        # A view, for rows may be one of the sides, and torch.compile refuses to see one tensor in two places.
        sides = rows.view_as(rows), inward, outward
        return cast(Tensor, FrozenRead.apply(*sides, self.intra_bhcs, self.entering_bhcl, *stored))


def frozen_step(
    rule: Rule,
    memory: Memory,
    pairs: Pairs,
    rows: RowGates,
    decay: Decay,
    *,
    start: Memory | None = None,
    read_from: Weights | None = None,
) -> FrozenStep:
    """Surprises of all rows, and their decay.

    start: the stored tensors at which the surprises are taken; None: those of ``memory``.
    read_from: the weights as the rows met them, in the place of ``start``.
    decay: at write rate 1, as ``decay_at_rate_one`` gives it.
    """
    start = memory if start is None else start
    counts_bhs: Tensor | None = None
    remembered: Memory = {}
    if rule.span > 1:
        pairs, counts_bhs, remembered = _looking_back(memory, pairs, rows)
    weights = rule.weights(start)
    probed = Scaled(weights, rows.retain_bhc[..., None]) if rule.probe == "warm" else Live(weights)
    recalled, target, pull = rule.structure.vjp(read_from or probed, pairs)
    factors = limited(rule, pull(rule.bias.gradient(recalled, target, rows.threshold_bhc)))
    rate_bhc = rows.write_bhc
    if rule.update.erase or rule.update.rate(rate_bhc, pairs.key_bhck) is not rate_bhc:
        (name,) = rule.structure.weights
        addresses, gradients = factors[name]
        erased = (read_from or Live(start)).matmul(name, addresses)
        factors = {name: (addresses, gradients + rule.update.erase * erased)}
        rate_bhc = rule.update.rate(rate_bhc, addresses)
    return FrozenStep(memory, weights, factors, decay, rate_bhc, counts_bhs, remembered)


def decay_at_rate_one(rule: Rule, gates: Gates, chunk: int) -> list[Decay]:
    """The decay of each chunk at write rate 1."""
    return _unbind(_decaying(rule, gates, chunk))


def _decaying(rule: Rule, gates: Gates, chunk: int) -> Decay:
    """The same for all chunks, ``b h n``."""
    log_retain_bhnc = _heads_first(gates.log_retain(), chunk)
    if not (rule.has_retain and rule.retention.is_linear):
        # What the retention does when the chunk ends is its own; until then changes are only gathered.
        log_retain_bhnc = torch.zeros_like(log_retain_bhnc)
    log_momentum_bth = gates.log_momentum() if rule.update.has_momentum else None
    log_momentum_bhnc = None if log_momentum_bth is None else _heads_first(log_momentum_bth, chunk)
    return compute_decay(log_retain_bhnc, log_momentum_bhnc, torch.ones_like(log_retain_bhnc))


def _earlier(decay: Decay) -> Decay:
    """The decay up to the token before."""
    entering_nhcl, intra_nhcs = decay.before()
    return replace(decay, entering_nhcl=entering_nhcl, intra_nhcs=intra_nhcs)


def _unbind(decay: Decay) -> list[Decay]:
    """The decay of every chunk, from decays ``b h n``."""
    return [Decay(*parts) for parts in zip(*(x.unbind(2) for x in vars(decay).values()), strict=True)]


def _heads_first(x: Tensor, chunk: int) -> Tensor:
    """b (n c) h ... -> b h n c ..."""
    return x.unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()


def _rows(gates: Gates, chunk: int) -> list[RowGates]:
    """The gates of every chunk."""
    rows = {name: x for name, x in vars(gates.rows(0, gates.write_bth.shape[1])).items() if x is not None}
    parts = (x.unflatten(2, (-1, chunk)).unbind(2) for x in rows.values())
    return [RowGates(**dict(zip(rows, part, strict=True))) for part in zip(*parts, strict=True)]


def _stored(name: str, weights: Tensor) -> list[str]:
    """The weight, and its momentum where there are weights for two."""
    return [name, momentum_name(name)][: weights.shape[-1]]


@dataclass(frozen=True)
class Scaled:
    """Weights that every row meets at a scale of its own: a warm probe, measured at what each token keeps."""

    memory: Memory
    scale_bhc1: Tensor

    def matmul(self, name: str, rows: Tensor) -> Tensor:
        return self.scale_bhc1 * (rows @ self.memory[name])

    def matmul_t(self, name: str, rows: Tensor) -> Tensor:
        return self.scale_bhc1 * (rows @ self.memory[name].mT)


def _looking_back(memory: Memory, pairs: Pairs, rows: RowGates) -> tuple[Pairs, Tensor, Memory]:
    """The pairs of the chunk after those before it in the span of its first tokens, and those in the span of the next
    chunk."""
    if rows.weight_bhc is None:
        raise ValueError("a rule with a span needs weight gates; they are None. Pass Gates(weight_bth=...)")
    n_before = memory["span_weights_bhc"].shape[-1]
    keys_bhsk = torch.cat([memory["span_keys_bhck"], pairs.key_bhck], dim=2)
    values_bhsv = torch.cat([memory["span_values_bhcv"], pairs.value_bhcv], dim=2)
    counts_bhs = torch.cat([memory["span_weights_bhc"], rows.weight_bhc], dim=2)
    following = {
        "span_keys_bhck": keys_bhsk[:, :, -n_before:],
        "span_values_bhcv": values_bhsv[:, :, -n_before:],
        "span_weights_bhc": counts_bhs[:, :, -n_before:],
    }
    return Pairs(keys_bhsk, values_bhsv), counts_bhs, following


@torch.no_grad()
def overshoot(rule: Rule, keys_bthk: Keys, gates: Gates, chunk: int) -> Tensor:
    """How far frozen chunks overshoot: the greatest of every whole chunk and head, ``n h``.

    ``lambda_max(K^T diag(w) K)``, w the weight with which each write leaves the chunk: how many times a residual along
    the worst direction is corrected before it is measured again. Below 1 nothing overshoots; from 2 on the memory
    diverges along that direction, with momentum sooner (memory.md 4.4).
    """
    address_bthk = rule.structure.address(keys_bthk.float())
    n_whole = keys_bthk.shape[1] // chunk * chunk
    whole = gates.slice_time(0, n_whole).to(torch.float32)
    write_nhc = cut(rule.update.rate(whole.write_bth, address_bthk[:, :n_whole]), chunk)
    decay = decay_of(rule, whole, write_nhc, n_whole)
    root_nhc1 = (abs(rule.slope or 0.0) * decay.write_nhcl[..., :1]).clamp(min=0).sqrt()
    weighed_nhck = root_nhc1 * cut(address_bthk[:, :n_whole], chunk)
    return torch.linalg.eigvalsh(weighed_nhck @ weighed_nhck.mT)[..., -1]


def refined(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 16,
    n_passes: int = 2,
) -> tuple[Values, Memory]:
    """``frozen_chunk`` refined: each pass takes the surprises anew, at the weights that the last pass gave each token.

    After chunk - 1 passes it is ``scan`` (Trellis 2512.23852, section 4).
    """
    form = ByChunk(partial(_begin, n_passes=n_passes), _part, partial(_in_order, n_passes=n_passes))
    return run_chunks(form, rule, memory, (keys_bthk, values_bthv, queries_bthk), gates, chunk)


def refined_refusals(rule: Rule) -> list[str]:
    """Why ``refined`` cannot run the rule; empty when it can."""
    reasons = {
        "its retention does more than scale the old memory": rule.retention.is_linear and not rule.retention.is_mapped,
        "its surprise spans several pairs": rule.span == 1,
        "it measures at retained weights": rule.probe == "cold",
    }
    return refusals(rule) + [reason for reason, is_met in reasons.items() if not is_met]
