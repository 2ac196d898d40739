"""A memory rule is a value made of four parts; ``scan`` is its one plain meaning."""

from dataclasses import dataclass
from typing import Literal

import torch

from meristem.memory.bias import Bias
from meristem.memory.gates import Gates, TokenGates
from meristem.memory.retention import Retention
from meristem.memory.structure import Structure
from meristem.memory.update import Update
from meristem.memory.value import Memory
from meristem.shapes import Key, Keys, Queries, Query, Value, Values


@dataclass(frozen=True)
class Rule:
    """How a memory learns: structure x bias x retention x update (MIRAS 2504.13173, section 3).

    reads: whether the query of a token meets the memory after or before that token is written.
    probe: whether the surprise is measured at the old memory ("cold") or at what is kept of it ("warm").
    """

    structure: Structure
    bias: Bias
    retention: Retention
    update: Update
    reads: Literal["after", "before"] = "after"
    probe: Literal["cold", "warm"] = "cold"

    @property
    def is_linear(self) -> bool:
        """The memory after a token is affine in the memory and momentum before it, with known coefficients."""
        return (
            self.structure.is_matrix
            and self.bias.slope is not None
            and self.retention.is_linear
            and self.update.is_linear
        )

    def init(
        self, batch: int, heads: int, key_width: int, value_width: int, *, like: torch.Tensor | None = None
    ) -> Memory:
        """A fresh memory: float32 on the CPU, or as ``like``."""
        like = torch.empty(0) if like is None else like
        weights = self.structure.init(batch, heads, key_width, value_width, like)
        return weights | self.update.init(weights)


def write(rule: Rule, memory: Memory, key_bhk: Key, value_bhv: Value, gates: TokenGates) -> Memory:
    """The memory after one pair is written."""
    weights = {name: memory[name] for name in rule.structure.weights}
    probed = rule.retention.keep(weights, gates) if rule.probe == "warm" else weights
    recalled_bhv, pull = rule.structure.linearise(probed, key_bhk)
    surprise = pull(rule.bias.gradient(recalled_bhv, value_bhv))
    change, carried = rule.update.change(memory, surprise, gates)
    return memory | rule.retention.apply(weights, change, gates) | carried


def read(rule: Rule, memory: Memory, query_bhk: Query) -> Value:
    """What the memory recalls; it does not change."""
    return rule.structure.recall(memory, query_bhk)


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
