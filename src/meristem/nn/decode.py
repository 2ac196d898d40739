"""A memory that reads one token: what ``NeuralMemory`` does in a fourth of the time, for rules of the linear family.

A session that generates reads one token after another, and there the cost is the number of operations, not their size.
Nothing here is learned or decided: the same numbers, fewer calls.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.linalg import unit
from meristem.memory.forms.exact_chunk import one_token
from meristem.memory.region import within
from meristem.memory.rule import Rule
from meristem.memory.state import State
from meristem.nn.conv import CausalConv
from meristem.nn.gates import GateMap
from meristem.shapes import Hidden, Mixed


@runtime_checkable
class Decodable(Protocol):
    """What is read here of a ``NeuralMemory``."""

    heads: int
    is_plain: bool
    qkv: nn.Linear
    conv: CausalConv
    gates: GateMap

    @property
    def rule(self) -> Rule: ...


def can_decode(recall: Decodable, hidden_btd: Hidden, state: State | None) -> bool:
    """One token, in full precision, outside training, and a rule with a memory of one matrix."""
    if hidden_btd.shape[1] != 1 or state is None or torch.is_grad_enabled() or not recall.is_plain:
        return False
    is_cast = torch.is_autocast_enabled(hidden_btd.device.type)
    is_full = hidden_btd.dtype in (torch.float32, torch.float64)
    return is_full and not is_cast and "unfinished" not in state["memory"]


def decode(recall: Decodable, hidden_btd: Hidden, state: State) -> tuple[Mixed, State]:
    """The memory's output for one token, and the state after it; the state that came in is unchanged."""
    read_bh1v, _, after = decode_heads(recall, hidden_btd, state)
    return read_bh1v.view(hidden_btd.shape[0], 1, -1), after


def decode_heads(recall: Decodable, hidden_btd: Hidden, state: State) -> tuple[Tensor, Tensor, State]:
    """The same head by head, ``b h 1 v``, and the query of each head, ``b h 1 k``."""
    rule, memory = recall.rule, state["memory"]
    padded_bsd = torch.cat([state["conv"]["tail_bsd"], functional.linear(hidden_btd, recall.qkv.weight)], dim=1)
    mixed_bd = functional.silu((padded_bsd.mT * recall.conv.weight_dc).sum(dim=-1))
    vectors_blhk = mixed_bd.view(mixed_bd.shape[0], 3, recall.heads, -1)
    query_bh1k, key_bh1k = unit(vectors_blhk[:, :2]).unsqueeze(-2).unbind(1)
    log_blh11 = functional.logsigmoid(recall.gates.logits(hidden_btd))
    log_blh11 = log_blh11.view(mixed_bd.shape[0], -1, recall.heads, 1, 1)
    factors_bh11 = _factors(recall, dict(zip(recall.gates.names, log_blh11.unbind(1), strict=True)))
    rows = key_bh1k, vectors_blhk[:, 2].unsqueeze(-2), query_bh1k
    read_bh1v, after = one_token(rule, memory, rows, factors_bh11)
    return read_bh1v, query_bh1k, {"memory": after, "conv": {"tail_bsd": padded_bsd[:, 1:]}}


def _factors(recall: Decodable, logs_bh11: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gates of a token, of the logarithms of their sigmoids, as ``GateMap`` makes them."""
    gates, write_bh11 = recall.gates, logs_bh11["write"].exp()
    log_momentum_bh11, most_h = logs_bh11.get("momentum"), gates.most_momentum()
    if gates.write_limit != 1:
        write_bh11 = gates.write_limit * write_bh11
    if log_momentum_bh11 is not None and gates.is_scaled:
        write_bh11 = torch.addcmul(write_bh11, write_bh11, log_momentum_bh11.exp(), value=-1)
    most_h11 = None if most_h is None else most_h.view(-1, 1, 1)
    log_retain_bh11 = logs_bh11["retain"] if recall.rule.has_retain_gate else torch.zeros_like(write_bh11)
    kept = within(recall.rule, log_retain_bh11, write_bh11, log_momentum_bh11, most_h11)
    moving = {} if kept.momentum is None else {"momentum": kept.momentum}
    return {"retain": kept.retain, "write": kept.write} | moving
