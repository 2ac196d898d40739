"""A memory rule is a value made of four parts; ``scan`` is the reference for all forms."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from meristem.errors import ConflictingKeys
from meristem.memory.bias import Bias
from meristem.memory.features import Features, identity
from meristem.memory.gates import Gates, RowGates
from meristem.memory.retention import Retention
from meristem.memory.state import Memory
from meristem.memory.structure import Live, Pairs, Structure, Surprise
from meristem.memory.update import Update
from meristem.shapes import Key, Keys, Queries, Query, Value, Values

LONGEST = 2.0**14
"""How long the surprise of a pair may be, over all weights of the memory, where nothing else bounds the memory."""


@dataclass(frozen=True)
class Rule:
    """How a memory learns: structure x bias x retention x update (MIRAS 2504.13173, section 3).

    reads: whether the query of a token meets the memory after or before that token is written.
    probe: whether the surprise is measured at the old memory ("cold") or at what is retained of it ("warm").
    span: how many pairs, the present one last, the surprise of a token is about (Atlas 2505.23735, eq. 9).
    features: what is made of keys and queries first.
    values: whether values are written as they are given, or mixed of key and value by a matrix that does not see the
    memory. That matrix is a parameter of the layer, which mixes; without one ``write``, ``scan`` and ``run`` refuse.
    form: the form that the rule is usually trained with where no fast one is exact; what ``auto`` then runs. A rule
    that declares none is run by ``scan``.
    """

    structure: Structure
    bias: Bias
    retention: Retention
    update: Update
    reads: Literal["after", "before"] = "after"
    probe: Literal["cold", "warm"] = "cold"
    span: int = 1
    features: Features = identity()
    values: Literal["given", "mixed"] = "given"
    form: str = "scan"

    @property
    def has_retain(self) -> bool:
        """Old memory fades; without it the retain factor of the gates does nothing."""
        return self.has_retain_gate or self.update.is_discounted

    @property
    def has_retain_gate(self) -> bool:
        """How fast old memory fades is learned; else it fades, if at all, only as ``memory.region`` asks."""
        return self.retention.has_retain and self.update.has_retain

    @property
    def slope(self) -> float | None:
        """a, where the change is the pair's address times ``a M k - v``, at the update's rate; None where it is not."""
        is_affine = self.bias.slope is not None and self.structure.kind in ("matrix", "vector") and self.span == 1
        return self.bias.slope + self.update.erase if is_affine and self.bias.slope is not None else None

    @property
    def is_linear(self) -> bool:
        """The memory after a token is affine in the memory and momentum before it, with known coefficients."""
        is_plain = self.retention.is_linear and not self.retention.is_mapped
        return self.slope is not None and is_plain and self.update.is_linear

    @property
    def is_limited(self) -> bool:
        """No surprise is longer than LONGEST: in its usual form nothing else bounds the memory (``memory.region``)."""
        return not self.is_linear and not self.retention.is_bounding

    def init(self, batch: int, heads: int, key_width: int, value_width: int, *, like: Tensor | None = None) -> Memory:
        """A fresh memory: float32 on the CPU, or where ``like`` is; float64 if that is, and never narrower."""
        like = torch.empty(0) if like is None else like
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        key_width = self.features.width(key_width)
        drawn = self.structure.init(batch, heads, key_width, value_width, like)
        # The rows of a batch begin alike, whatever is random in a component.
        stored = {name: self.retention.first(weight[:1]).expand_as(weight).clone() for name, weight in drawn.items()}
        memory = stored | self.retention.carry(stored) | self.update.carry(stored)
        if self.span > 1:
            before = self.span - 1
            memory["span_keys_bhck"] = like.new_zeros(batch, heads, before, key_width)
            memory["span_values_bhcv"] = like.new_zeros(batch, heads, before, value_width)
            memory["span_weights_bhc"] = like.new_zeros(batch, heads, before)
        return memory

    def weights(self, memory: Memory) -> Memory:
        """The weights that are read, of what is stored."""
        return {name: self.retention.weights(memory[name]) for name in self.structure.weights}

    def in_effect(self, gates: RowGates) -> RowGates:
        """The gates with retain at 1 where old memory does not fade."""
        return gates if self.has_retain else replace(gates, retain_bhc=torch.ones_like(gates.retain_bhc))

    def without_features(self) -> "Rule":
        """The rule for keys and queries that were mapped already, and values that were mixed."""
        return replace(self, features=identity(), values="given")

    def require_given(self) -> None:
        """Raises ConflictingKeys where the rule mixes its values by a matrix: its layer learns that, no call has it."""
        if self.values != "given":
            raise ConflictingKeys(
                f"the values of this rule are '{self.values}': what it writes is mixed of key and value by a matrix "
                "that its layer learns, and this call has none. Build the layer, MemoryLayer(width, "
                "MemoryConfig(rule=...)); or mix the values yourself and take replace(rule, values='given').",
                values=self.values,
            )


def write(rule: Rule, memory: Memory, key_bhk: Key, value_bhv: Value, gates: RowGates) -> Memory:
    """The memory after one pair is written.

    gates: one row, as ``Gates.at`` gives it. Raises ConflictingKeys where the rule's layer has to mix the values first.
    """
    rule.require_given()
    gates = rule.in_effect(gates)
    change, carried = change_by(rule, memory, memory, (key_bhk, value_bhv), gates)
    return memory | rule.retention.apply(memory, change, gates) | carried


def change_by(
    rule: Rule, memory: Memory, start: Memory, pair: tuple[Key, Value], gates: RowGates
) -> tuple[Memory, Memory]:
    """What one pair adds to every stored tensor, and what is carried beside them to the next token.

    start: the stored tensors at which the surprise is taken: those of ``memory``, or of an earlier moment.
    gates: one row, in effect.
    """
    pairs = Pairs(rule.features.apply(pair[0])[:, :, None], pair[1][:, :, None], gates.code_bhcg)
    weights = rule.weights(start)
    counts_bhc: Tensor | None = None
    remembered: Memory = {}
    if rule.span > 1:
        pairs, counts_bhc, remembered = _remembered(memory, pairs, gates)
    probed = weights
    if rule.probe == "warm":
        probed = {name: gates.retain_bhc[..., None] * weight for name, weight in weights.items()}
    recalled, target, pull = rule.structure.vjp(Live(probed), pairs)
    gradient = rule.bias.gradient(recalled, target, gates.threshold_bhc)
    surprise = limited(rule, pull(gradient))
    if counts_bhc is not None:
        surprise = {name: (rows, counts_bhc[..., None] * part) for name, (rows, part) in surprise.items()}
    held = memory | {name: start[name] for name in rule.structure.weights}
    change, carried = rule.update.change(held, weights, surprise, gates)
    return change, carried | remembered


def limited(rule: Rule, surprise: Surprise) -> Surprise:
    """Every pair's surprise at most LONGEST long: ``g min(1, LONGEST / |g|)``, g over all weights.

    A shorter one keeps its bits. Backwards the factor is a constant (memory.md 2.5).
    """
    if not rule.is_limited:
        return surprise
    norm = torch.linalg.vector_norm
    with torch.no_grad():
        length_bhc, *others = (norm(a, dim=-1) * norm(d, dim=-1) for a, d in surprise.values())
        for other_bhc in others:
            length_bhc = torch.hypot(length_bhc, other_bhc)
        share_bhc = LONGEST / length_bhc.clamp_min_(LONGEST)
    return {name: (rows, share_bhc[..., None] * gradient) for name, (rows, gradient) in surprise.items()}


def _remembered(memory: Memory, pairs: Pairs, gates: RowGates) -> tuple[Pairs, Tensor, Memory]:
    """The pairs that the surprise is about, how much each counts, and those in the span of the next token."""
    if gates.weight_bhc is None:
        raise ValueError("a rule with a span needs weight gates; they are None. Pass Gates(weight_bth=...)")
    keys_bhck = torch.cat([memory["span_keys_bhck"], pairs.key_bhck], dim=2)
    values_bhcv = torch.cat([memory["span_values_bhcv"], pairs.value_bhcv], dim=2)
    counts_bhc = torch.cat([memory["span_weights_bhc"], gates.weight_bhc], dim=2)
    following = {
        "span_keys_bhck": keys_bhck[:, :, 1:],
        "span_values_bhcv": values_bhcv[:, :, 1:],
        "span_weights_bhc": counts_bhc[:, :, 1:],
    }
    return Pairs(keys_bhck, values_bhcv), counts_bhc, following


def read(rule: Rule, memory: Memory, query_bhk: Query) -> Value:
    """What the memory recalls; it does not change."""
    query_bhck = rule.features.apply(query_bhk)[:, :, None]
    return rule.structure.recall(Live(rule.weights(memory)), query_bhck)[:, :, 0]


def scan(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
) -> tuple[Values, Memory]:
    """Write and read token by token: the truth that every other form is tested against."""
    reads: list[torch.Tensor] = []
    for index in range(keys_bthk.shape[1]):
        query_bhk = queries_bthk[:, index]
        if rule.reads == "before":
            reads.append(read(rule, memory, query_bhk))
        memory = write(rule, memory, keys_bthk[:, index], values_bthv[:, index], gates.at(index))
        if rule.reads == "after":
            reads.append(read(rule, memory, query_bhk))
    return torch.stack(reads, dim=1), memory
