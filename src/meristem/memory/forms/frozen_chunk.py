"""The frozen chunk form: every surprise of a chunk is taken at the memory that enters it, then all is linear.

Source: Titans 2501.00663, section 3.2; MIRAS 2504.13173, section 5.4; TTT 2407.04620. It is an approximation that ends
in ``scan`` as chunks or write rates shrink, and with chunks of one token is ``scan``. For one matrix it is a closed
form; for networks of any depth it is ``dual``: a layer's weights at token t are the entering ones less a sum of outer
products, so what a query meets there is ``A_t q W + c_t q S - (q a^T * reach) d``, and no tensor holds weights per
token (memory.md 4.4, 4.5).

Where a retention maps or projects what is stored, it acts when a chunk ends, and queries meet the entering memory.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meristem.memory.forms.by_chunk import Window, walk
from meristem.memory.forms.exact_chunk import flow_of, solved
from meristem.memory.forms.flow import Flow, cut, flow
from meristem.memory.gates import Gates, RowGates
from meristem.memory.rule import Rule
from meristem.memory.structure import Live, Pairs, Surprise, Weights
from meristem.memory.update import momentum_name
from meristem.memory.value import Memory
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
    window = keys_bthk, values_bthv, queries_bthk
    return walk(_chunk, rule, memory, window, gates, chunk, _whole_chunks if rule.is_linear else None)


def _whole_chunks(rule: Rule, memory: Memory, window: Window, gates: Gates, chunk: int) -> tuple[Values, Memory]:
    return solved(rule, memory, window, gates, chunk=chunk, is_frozen=True)


def _chunk(
    rule: Rule, memory: Memory, keys_bthk: Keys, values_bthv: Values, queries_bthk: Queries, gates: Gates
) -> tuple[Values, Memory]:
    key_bhck, value_bhcv, query_bhck = (x.movedim(1, 2) for x in (keys_bthk, values_bthv, queries_bthk))
    rows = gates.rows(0, key_bhck.shape[2])
    step = frozen_step(rule, memory, Pairs(key_bhck, value_bhcv, rows.code_bhcg), rows, gates)
    if rule.retention.is_linear and not rule.retention.is_mapped:
        read_bhcv = rule.structure.recall(step.moving(rule.reads), query_bhck)
    else:
        read_bhcv = rule.structure.recall(Live(rule.weights(memory)), query_bhck)
    after = step.after(rule) if rule.retention.is_linear else _at_the_end(rule, memory, step, rows)
    return read_bhcv.movedim(1, 2), memory | after | step.remembered


@dataclass(frozen=True)
class FrozenStep:
    """The surprises of rows at one memory, and how they flow into the memory while the rows are read.

    reach_bhcs: with which weight row s of the factors is in the memory at token c; before_bhcs: just before token c.
    """

    memory: Memory
    factors: Surprise
    flowing: Flow
    reach_bhcs: Tensor
    before_bhcs: Tensor
    arriving_bhsl: Tensor
    remembered: Memory

    def moving(self, reads: str) -> "Moving":
        """The weights as each token meets them."""
        if reads == "before":
            return Moving(self.memory, self.factors, self.flowing.before()[0], self.before_bhcs)
        return Moving(self.memory, self.factors, self.flowing.entering_nhcl, self.reach_bhcs)

    def after(self, rule: Rule) -> Memory:
        """What is stored after the rows, and the momentum with it, where the retention only scales what is stored."""
        return {name: rule.retention.settle(x) if name in self.factors else x for name, x in self.summed().items()}

    def summed(self) -> Memory:
        """What flows into the stored tensors and the momentum, added up."""
        after: Memory = {}
        for name, factor in self.factors.items():
            names = [name, momentum_name(name)][: self.arriving_bhsl.shape[-1]]
            for index, stored in enumerate(names):
                carried_bhl = self.flowing.carried_nhll[..., index, :]
                kept = sum(carried_bhl[..., at, None, None] * self.memory[source] for at, source in enumerate(names))
                arriving_bhs = self.arriving_bhsl[..., index]
                after[stored] = kept - (factor[0] * arriving_bhs[..., None]).mT @ factor[1]
        return after


@dataclass(frozen=True)
class Moving:
    """Weights that change from row to row: the entering ones, less what the rows before have written."""

    memory: Memory
    factors: Surprise
    entering_bhcl: Tensor
    reach_bhcs: Tensor

    def times(self, name: str, rows: Tensor) -> Tensor:
        addresses, gradients = self.factors[name]
        return self._entering(name, rows, is_turned=False) - ((rows @ addresses.mT) * self.reach_bhcs) @ gradients

    def against(self, name: str, rows: Tensor) -> Tensor:
        addresses, gradients = self.factors[name]
        return self._entering(name, rows, is_turned=True) - ((rows @ gradients.mT) * self.reach_bhcs) @ addresses

    def _entering(self, name: str, rows: Tensor, *, is_turned: bool) -> Tensor:
        names = [name, momentum_name(name)][: self.entering_bhcl.shape[-1]]
        weights = [self.memory[source].mT if is_turned else self.memory[source] for source in names]
        met = self.entering_bhcl[..., 0:1] * (rows @ weights[0])
        for index, weight in enumerate(weights[1:], start=1):
            met = met + self.entering_bhcl[..., index : index + 1] * (rows @ weight)
        return met


def frozen_step(
    rule: Rule, memory: Memory, pairs: Pairs, rows: RowGates, gates: Gates, met: Weights | None = None
) -> FrozenStep:
    """Surprises of all rows at the memory, or at the weights as the rows ``met`` them, and how they flow into it."""
    counts_bhs: Tensor | None = None
    remembered: Memory = {}
    if rule.span > 1:
        pairs, counts_bhs, remembered = _looking_back(memory, pairs, rows)
    weights = rule.weights(memory)
    probed = Scaled(weights, rows.retain_bhc[..., None]) if rule.probe == "warm" else Live(weights)
    recalled, target, pull = rule.structure.linearise(met or probed, pairs)
    gradient = rule.bias.gradient(recalled, target, rows.threshold_bhc)
    factors = pull(gradient)
    write_bhc = rows.write_bhc
    if rule.update.erase or rule.update.rate(write_bhc, pairs.key_bhck) is not write_bhc:
        (name,) = rule.structure.weights
        addresses, gradients = factors[name]
        erased = (met or Live(memory)).times(name, addresses)
        factors = {name: (addresses, gradients + rule.update.erase * erased)}
        write_bhc = rule.update.rate(write_bhc, addresses)
    flowing = _flowing(rule, gates, write_bhc)
    reach_bhcs, before_bhcs, arriving_bhsl = flowing.reach_nhcs, flowing.before()[1], flowing.arriving_nhcl
    if counts_bhs is not None:
        band_cs = _band(rule.span, write_bhc.shape[-1], write_bhc)
        counts_bh1s = counts_bhs[..., None, :]
        reach_bhcs, before_bhcs = (x @ band_cs * counts_bh1s for x in (reach_bhcs, before_bhcs))
        arriving_bhsl = (band_cs.mT @ arriving_bhsl) * counts_bhs[..., None]
    return FrozenStep(memory, factors, flowing, reach_bhcs, before_bhcs, arriving_bhsl, remembered)


def _flowing(rule: Rule, gates: Gates, write_bhc: Tensor) -> Flow:
    log_retain_bhc = gates.log_retain().movedim(1, 2)
    if not (rule.has_retain and rule.retention.is_linear):
        # What the retention does when the chunk ends is its own; until then changes are only gathered.
        log_retain_bhc = torch.zeros_like(log_retain_bhc)
    log_momentum = gates.log_momentum() if rule.update.has_momentum else None
    return flow(log_retain_bhc, None if log_momentum is None else log_momentum.movedim(1, 2), write_bhc)


@dataclass(frozen=True)
class Scaled:
    """Weights that every row meets at a scale of its own: a warm probe, measured at what each token keeps."""

    memory: Memory
    scale_bhc1: Tensor

    def times(self, name: str, rows: Tensor) -> Tensor:
        return self.scale_bhc1 * (rows @ self.memory[name])

    def against(self, name: str, rows: Tensor) -> Tensor:
        return self.scale_bhc1 * (rows @ self.memory[name].mT)


def _looking_back(memory: Memory, pairs: Pairs, rows: RowGates) -> tuple[Pairs, Tensor, Memory]:
    """The pairs of the chunk after those that its first tokens look back at, and what the next chunk looks back at."""
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


def _band(span: int, chunk: int, like: Tensor) -> Tensor:
    """1 where the objective of token c is about pair s, the pairs before the chunk first."""
    ones_cs = torch.ones(chunk, chunk + span - 1, dtype=like.dtype, device=like.device)
    return ones_cs.triu().tril(span - 1)


def _at_the_end(rule: Rule, memory: Memory, step: FrozenStep, rows: RowGates) -> Memory:
    """What is stored where the retention is applied once, to the change that the chunk made."""
    change: Memory = {}
    carried: Memory = {}
    for name, factor in step.factors.items():
        # What a memory that began at 0 and forgets nothing would hold is the sum of the changes.
        source = momentum_name(name)
        empty = {name: torch.zeros_like(memory[name])} | ({source: memory[source]} if source in memory else {})
        moved = replace(step, memory=empty, factors={name: factor}).summed()
        change[name] = moved.pop(name)
        carried |= moved
    # The product of factors and the sum of rates are the gates of one write as large as all of these.
    total = replace(
        rows, retain_bhc=rows.retain_bhc.prod(-1, keepdim=True), write_bhc=rows.write_bhc.sum(-1, keepdim=True)
    )
    return rule.retention.apply(memory, change, rule.in_effect(total)) | carried


@torch.no_grad()
def overshoot(rule: Rule, keys_bthk: Keys, gates: Gates, chunk: int) -> Tensor:
    """How far frozen chunks overshoot: the greatest of every whole chunk and head, ``n h``.

    ``lambda_max(K^T diag(w) K)``, w the weight with which each write leaves the chunk: how many times a residual along
    the worst direction is corrected before it is measured again. Below 1 nothing overshoots; from 2 on the memory
    diverges along that direction, with momentum sooner (memory.md 4.4).
    """
    address_bthk = rule.structure.address(keys_bthk.float())
    n_whole = keys_bthk.shape[1] // chunk * chunk
    whole = gates.window(0, n_whole).to(torch.float32)
    write_nhc = cut(rule.update.rate(whole.write_bth, address_bthk[:, :n_whole]), chunk)
    flowing = flow_of(rule, whole, write_nhc, n_whole)
    root_nhc1 = (abs(rule.slope or 0.0) * flowing.arriving_nhcl[..., :1]).clamp(min=0).sqrt()
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

    def chunk_of(
        rule: Rule, memory: Memory, keys_bthk: Keys, values_bthv: Values, queries_bthk: Queries, gates: Gates
    ) -> tuple[Values, Memory]:
        key_bhck, value_bhcv, query_bhck = (x.movedim(1, 2) for x in (keys_bthk, values_bthv, queries_bthk))
        rows = gates.rows(0, key_bhck.shape[2])
        pairs = Pairs(key_bhck, value_bhcv, rows.code_bhcg)
        step = frozen_step(rule, memory, pairs, rows, gates)
        for _ in range(min(n_passes, key_bhck.shape[2] - 1)):
            step = frozen_step(rule, memory, pairs, rows, gates, met=step.moving("before"))
        read_bhcv = rule.structure.recall(step.moving(rule.reads), query_bhck)
        return read_bhcv.movedim(1, 2), memory | step.after(rule)

    return walk(chunk_of, rule, memory, (keys_bthk, values_bthv, queries_bthk), gates, chunk)


def refined_refusals(rule: Rule) -> list[str]:
    """Why ``refined`` cannot run the rule; empty when it can."""
    reasons = {
        "its retention does more than scale the old memory": rule.retention.is_linear and not rule.retention.is_mapped,
        "its surprise spans several pairs": rule.span == 1,
        "it measures at retained weights": rule.probe == "cold",
    }
    return refusals(rule) + [reason for reason, is_met in reasons.items() if not is_met]
