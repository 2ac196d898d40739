"""Two memories for one: a global one with long chunks, and a local one that is reset in each (TNT 2511.07343).

``o_t = f(G, q_t) + f(W_t, P_t q_t)``: G is the global memory as it entered the chunk; W_t the local one, which began at
a learned start with the chunk and has chunks of its own, 16 tokens or fewer; ``P_t q = sum k (k q)`` over the keys of
the chunk so far projects a query on the directions that the local memory was written with. Local memories of different
chunks know nothing of each other, so all whole chunks of a sequence run in parallel.

The memory holds the local start under ``reset`` beside each weight; without one, the first call takes the memory
that entered it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from meristem.memory.bias import dot
from meristem.memory.forms.by_chunk import ByChunk, Inputs, run_chunks
from meristem.memory.forms.exact_chunk import solved
from meristem.memory.forms.frozen_chunk import decay_at_rate_one, frozen_chunk, frozen_step, read_next
from meristem.memory.gates import Gates
from meristem.memory.retention import decay
from meristem.memory.rule import Rule
from meristem.memory.state import Memory, State, beside, map_tensors
from meristem.memory.structure import Live, Pairs, matrix
from meristem.memory.update import plain
from meristem.shapes import Keys, Queries, Values

LOCAL_CHUNK = 16
SHOWN = Rule(structure=matrix(), bias=dot(), retention=decay(), update=plain())
"""The keys of a chunk as a memory from keys to keys: its read is the projected query."""


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its update is not linear in the surprise": rule.update.is_linear,
        "its retention does more than scale what is stored": rule.retention.is_linear,
        "its surprise spans several pairs": rule.span == 1,
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def tnt(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads, and the memories left behind: the global one, and under ``unfinished`` that of a chunk cut short.

    chunk: tokens of a global chunk, after which the local memory starts afresh.
    """
    inputs = keys_bthk, values_bthv, queries_bthk
    memory = _with_reset(rule, memory)
    return run_chunks(ByChunk(_begin, partial(_part, chunk=chunk), _whole), rule, memory, inputs, gates, chunk)


def read(rule: Rule, memory: Memory, queries_bthk: Queries) -> Values:
    """What the next token reads of both memories before it is written."""
    begun: Any = dict(memory).get("unfinished")
    begun = begun or _begin(rule, _with_reset(rule, memory), (queries_bthk, queries_bthk, queries_bthk))
    turned_bthk = read_next(SHOWN, begun["shown"], queries_bthk)
    return read_next(rule, begun["start"], queries_bthk) + read_next(rule, begun["local"], turned_bthk)


def _with_reset(rule: Rule, memory: Memory) -> Memory:
    """The global memory, and beside it what local ones begin with."""
    return {beside(name, "reset"): memory[name] for name in rule.structure.weights} | memory


def _begin(rule: Rule, memory: Memory, inputs: Inputs) -> State:
    """What a chunk carries: the global weights at its start, the local memory, and the keys that it was shown."""
    names = rule.structure.weights
    reset = {name: memory[beside(name, "reset")] for name in names}
    local = reset | rule.retention.carry(reset) | rule.update.carry(reset)
    batch, _, heads, width = inputs[2].shape
    shown = {"matrix_bhkv": inputs[2].new_zeros(batch, heads, width, width)}
    return {"start": {name: memory[name] for name in names}, "local": local, "shown": shown}


def _part(
    rule: Rule, memory: Memory, begun: State, inputs: Inputs, gates: Gates, *, chunk: int
) -> tuple[Tensor, Memory, State]:
    local_bthv, begun = _locally(rule, begun, inputs, gates, chunk)
    global_bthv, memory = _globally(rule, begun["start"], memory, inputs, gates)
    return global_bthv + local_bthv, memory, begun


def _whole(rule: Rule, memory: Memory, inputs: Inputs, gates: Gates, chunk: int) -> tuple[Tensor, Memory]:
    local_bthv = _side_by_side(rule, _begin(rule, memory, inputs), inputs, gates, inputs[0].shape[1] // chunk)
    global_bthv, memory = _one_by_one(rule, memory, inputs, gates, chunk)
    return global_bthv + local_bthv, memory


def _locally(rule: Rule, begun: State, part: Inputs, gates: Gates, chunk: int) -> tuple[Tensor, State]:
    """The local memory's reads for some tokens of one chunk."""
    keys_bthk, values_bthv, queries_bthk = part
    ones_bth = torch.ones_like(gates.write_bth)
    turned_bthk, shown = solved(
        SHOWN, begun["shown"], (keys_bthk, keys_bthk, queries_bthk), Gates(ones_bth, ones_bth), chunk=64
    )
    local_chunk = min(LOCAL_CHUNK, chunk)
    read_bthv, local = frozen_chunk(rule, begun["local"], keys_bthk, values_bthv, turned_bthk, gates, chunk=local_chunk)
    return read_bthv, begun | {"local": local, "shown": shown}


def _side_by_side(rule: Rule, begun: State, part: Inputs, gates: Gates, n_whole: int) -> Tensor:
    """The same for whole chunks, each as rows of a larger batch."""

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(1, (n_whole, -1)).flatten(0, 1)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(n_whole, dim=0)

    folded = Gates(**{name: fold(gate) for name, gate in vars(gates).items() if gate is not None})
    fresh = begun | {"local": map_tensors(spread, begun["local"]), "shown": map_tensors(spread, begun["shown"])}
    inputs = fold(part[0]), fold(part[1]), fold(part[2])
    read_bthv, _ = _locally(rule, fresh, inputs, folded, inputs[0].shape[1])
    return read_bthv.unflatten(0, (-1, n_whole)).flatten(1, 2)


def _one_by_one(rule: Rule, memory: Memory, part: Inputs, gates: Gates, chunk: int) -> tuple[Tensor, Memory]:
    """The global memory's reads for whole chunks."""
    reads = []
    for begin in range(0, part[0].shape[1], chunk):
        keys_bthk, values_bthv, queries_bthk = (x[:, begin : begin + chunk] for x in part)
        inside = keys_bthk, values_bthv, queries_bthk
        read_bthv, memory = _globally(rule, memory, memory, inside, gates.slice_time(begin, begin + chunk))
        reads.append(read_bthv)
    return torch.cat(reads, dim=1), memory


def _globally(rule: Rule, start: Memory, memory: Memory, part: Inputs, gates: Gates) -> tuple[Tensor, Memory]:
    """The reads of the global memory, as the chunk began, for tokens of it; and what they write into it."""
    key_bhck, value_bhcv, query_bhck = (x.movedim(1, 2) for x in part)
    rows = gates.rows(0, key_bhck.shape[2])
    (decay,) = decay_at_rate_one(rule, gates, key_bhck.shape[2])
    step = frozen_step(rule, memory, Pairs(key_bhck, value_bhcv, rows.code_bhcg), rows, decay, start=start)
    read_bhcv = rule.structure.recall(Live(rule.weights(start)), query_bhck)
    return read_bhcv.movedim(1, 2), memory | step.after(rule)
