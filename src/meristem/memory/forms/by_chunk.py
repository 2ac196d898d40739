"""Forms that approximate inside a chunk: how they run over a sequence, and how a chunk continues in the next call.

Where the sequence of a call ends inside a chunk, the memory carries under ``unfinished`` what the rest of the chunk
goes on from: the weights at its start, at which all its surprises are taken, and ``n_tokens``, how many of its tokens
were read. The memory itself is the live copy, from which the recurrences run on. So a text may be cut anywhere without
changing what is read (memory.md 4.4; law 3), no token is stored, and none is read twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meristem.errors import ShapeError
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule, scan
from meristem.memory.state import Memory, State
from meristem.shapes import Values

Inputs = tuple[Tensor, Tensor, Tensor]
"""keys_bthk, values_bthv, queries_bthk."""


@dataclass(frozen=True)
class ByChunk:
    """What a form does with a chunk.

    begin: what a chunk of which nothing was read carries beside the memory, from rule, memory and inputs.
    part: the next tokens of a chunk: reads, the memory and what the chunk carries, after them.
    whole: reads and the memory after several whole chunks; None where ``part`` is as fast.
    """

    begin: Callable[[Rule, Memory, Inputs], State]
    part: Callable[[Rule, Memory, State, Inputs, Gates], tuple[Values, Memory, State]]
    whole: Callable[[Rule, Memory, Inputs, Gates, int], tuple[Values, Memory]] | None = None


def run_chunks(
    form: ByChunk, rule: Rule, memory: Memory, inputs: Inputs, gates: Gates, chunk: int
) -> tuple[Values, Memory]:
    """Reads and the memory left behind. Chunks of one token are ``scan``.

    Raises ShapeError where the unfinished chunk of the memory is not one that this form began.
    """
    if chunk == 1:
        return scan(rule, finished(memory), *inputs, gates)
    begun, memory = _begun(form, rule, memory, inputs, chunk), finished(memory)
    n_time, at, reads = inputs[0].shape[1], 0, []
    while at < n_time:
        n_before = begun["n_tokens"] if begun else 0
        n_whole = 0 if begun or form.whole is None else (n_time - at) // chunk
        stop = at + n_whole * chunk if n_whole else min(n_time, at + chunk - n_before)
        # A token alone needs no slicing, which would cost as many calls as a small memory takes.
        is_all = stop - at == n_time
        inside, gates_inside = (inputs, gates) if is_all else (_part(inputs, at, stop), gates.slice_time(at, stop))
        if n_whole and form.whole:
            read_bthv, memory = form.whole(rule, memory, inside, gates_inside, chunk)
        else:
            begun = begun or form.begin(rule, memory, inputs)
            read_bthv, memory, begun = form.part(rule, memory, begun, inside, gates_inside)
            n_tokens = n_before + stop - at
            begun = begun | {"n_tokens": n_tokens} if n_tokens < chunk else {}
        reads.append(read_bthv)
        at = stop
    left: Any = {"unfinished": begun} if begun else {}
    return torch.cat(reads, dim=1), memory | left


def finished(memory: Memory) -> Memory:
    """The memory without what an unfinished chunk carries: what every other form goes on from."""
    return {name: value for name, value in memory.items() if name != "unfinished"}


def _begun(form: ByChunk, rule: Rule, memory: Memory, inputs: Inputs, chunk: int) -> State:
    """What the unfinished chunk carries; empty where there is none, or where it has as many tokens as a chunk."""
    carried: Any = dict(memory).get("unfinished")
    if carried is None:
        return {}
    expected = {"n_tokens", *form.begin(rule, finished(memory), inputs)}
    if carried.keys() != expected:
        raise ShapeError(
            f"the memory is inside a chunk that carries {', '.join(sorted(carried))}; this form goes on from "
            f"{', '.join(sorted(expected))}. Run the form that began it; take it for finished, with "
            f"forms.by_chunk.finished; or, if an earlier version saved it, make it today's with forms.replay.replayed."
        )
    return carried if carried["n_tokens"] < chunk else {}


def _part(inputs: Inputs, begin: int, stop: int) -> Inputs:
    keys_bshk, values_bshv, queries_bshk = (x[:, begin:stop] for x in inputs)
    return keys_bshk, values_bshv, queries_bshk
