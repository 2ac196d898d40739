"""The plain meaning of a self-reference, token by token: the truth that its chunked form is tested against."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from meristem.linalg import unit
from meristem.memory.bias import dot, squared
from meristem.memory.gates import LOG_FLOOR
from meristem.memory.state import Memory
from meristem.memory.structure import Live, Pairs, Structure, outer
from meristem.nn.self_chunk import GATES

Rows = Float[Tensor, "b h t k"]
HeadBias = Float[Tensor, " h"]


@dataclass(frozen=True)
class Meaning:
    """What a self-reference is made of.

    structures: of each memory by name: key, value, rate, retain, memory, and query where it adapts. One layer or two.
    is_static: only the memory that is read is ever written.
    rate_bias_h, retain_bias_h: what is added to what the memories of gates recall.
    """

    structures: dict[str, Structure]
    is_static: bool
    is_generated: bool
    is_squared: bool
    eta_scale: float
    unit_value: bool
    rate_bias_h: HeadBias
    retain_bias_h: HeadBias

    def recall(self, memories: dict[str, Memory], name: str, row: Tensor) -> Tensor:
        """What a memory makes of a row; the memories of gates say one number, the mean of what they recall."""
        recalled = self.structures[name].recall(Live(memories[name]), row)
        return recalled.mean(dim=-1, keepdim=True) if name in GATES else recalled

    def goal(self, memories: dict[str, Memory], name: str, value: Tensor) -> Tensor:
        """A memory's target for a token of that value; where it recalls one number only, the mean."""
        if self.is_generated:
            return self.structures[name].recall(Live(memories[name]), value)
        is_number = next(reversed(memories[name].values())).shape[-1] == 1
        return value.mean(dim=-1, keepdim=True) if is_number else value


def scan(
    meaning: Meaning, memories: dict[str, Memory], rows_bhtk: Rows, queries_bhtk: Rows | None
) -> tuple[Rows, dict[str, Memory]]:
    """What every token recalls before it is written, and the memories left behind.

    ``k = unit(M_k x)``, ``v = M_v x`` (of length one where so chosen), ``q`` static or ``unit(M_q x)``,
    ``eta = scale softplus(M_eta x + b)``,
    ``alpha = sigmoid(M_alpha x + b)``, ``o = M_mem q``; then for every memory, also mem,
    ``M <- M (alpha - eta k k^T) - eta grad L(M; k, M v)``, with ``L = -<M k, v>`` or ``1/2 |M k - v|^2`` and its goal
    frozen (Nested Learning 2512.24695, eqs. 83-93; memory.md 7.1). In two layers ``k k^T`` acts on the first.
    """
    reads = []
    for t in range(rows_bhtk.shape[2]):
        row = rows_bhtk[:, :, t : t + 1]
        key, value = unit(meaning.recall(memories, "key", row)), meaning.recall(memories, "value", row)
        value = unit(value) if meaning.unit_value else value
        query = queries_bhtk[:, :, t : t + 1] if queries_bhtk is not None else meaning.recall(memories, "query", row)
        rate = meaning.recall(memories, "rate", row) + meaning.rate_bias_h[:, None, None]
        rate = meaning.eta_scale * functional.softplus(rate)
        retain = meaning.recall(memories, "retain", row) + meaning.retain_bias_h[:, None, None]
        retain = functional.logsigmoid(retain).clamp_min(LOG_FLOOR).exp()
        reads.append(meaning.recall(memories, "memory", unit(query)))
        written = {
            name: descended(meaning, name, memories, (key, value, rate, retain))
            for name in memories
            if name == "memory" or not meaning.is_static
        }
        memories = memories | written
    return torch.cat(reads, dim=2), memories


def descended(
    meaning: Meaning, name: str, memories: dict[str, Memory], token: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Memory:
    """One memory after one step of delta descent on one token: key, value, rate and retain, ``b h 1 k``."""
    key, value, rate, retain = token
    structure, weights = meaning.structures[name], memories[name]
    bias = squared() if meaning.is_squared else dot()
    recalled, goal, pull = structure.vjp(Live(weights), Pairs(key, meaning.goal(memories, name, value)))
    surprise = pull(bias.gradient(recalled, goal, None))
    erased = outer((key, key @ weights[structure.weights[0]]))
    after = {part: retain * weight - rate * outer(surprise[part]) for part, weight in weights.items()}
    after[structure.weights[0]] = after[structure.weights[0]] - rate * erased
    return after
