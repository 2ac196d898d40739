"""Forms that approximate inside a chunk: how they walk a window, and how a chunk survives the window's end.

Where the window ends inside a chunk, the memory carries under ``unfinished`` what it was at the chunk's start and the
tokens written since. The next window begins by reading them again, so a text may be cut anywhere without changing
what is read (memory.md, law 3).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meristem.memory.gates import Gates
from meristem.memory.rule import Rule, scan
from meristem.memory.state import Memory
from meristem.shapes import Keys, Queries, Values

Window = tuple[Tensor, Tensor, Tensor]
"""keys_bthk, values_bthv, queries_bthk."""
RunChunk = Callable[[Rule, Memory, Keys, Values, Queries, Gates], tuple[Values, Memory]]
"""One chunk: reads, and the memory after it."""
RunChunks = Callable[[Rule, Memory, Window, Gates, int], tuple[Values, Memory]]
"""Several whole chunks at once."""


def run_chunks(
    run_chunk: RunChunk,
    rule: Rule,
    memory: Memory,
    window: Window,
    gates: Gates,
    chunk: int,
    run_whole: RunChunks | None = None,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind. Chunks of one token are ``scan``. run_whole: a faster way for whole chunks."""
    if chunk == 1:
        return scan(rule, finished(memory), *window, gates)
    window, gates, memory, n_again = _begun(memory, window, gates)
    n_time, at, reads = window[0].shape[1], 0, []
    if run_whole and n_time >= chunk:
        at = n_time // chunk * chunk
        read_bthv, memory = run_whole(rule, memory, _part(window, 0, at), gates.window(0, at), chunk)
        reads.append(read_bthv)
    start = memory
    for begin in range(at, n_time, chunk):
        start, stop = memory, min(begin + chunk, n_time)
        read_bthv, memory = run_chunk(rule, memory, *_part(window, begin, stop), gates.window(begin, stop))
        reads.append(read_bthv)
    left: Any = {}
    if n_time % chunk:
        begin = n_time // chunk * chunk
        kept = {name: gate[:, begin:] for name, gate in vars(gates).items() if gate is not None}
        tokens = {"keys_bthk": window[0][:, begin:], "values_bthv": window[1][:, begin:]}
        left = {"unfinished": {"start": start, "gates": kept, **tokens}}
    return torch.cat(reads, dim=1)[:, n_again:], memory | left


def finished(memory: Memory) -> Memory:
    """The memory without what an unfinished chunk carries: what every other form goes on from."""
    return {name: value for name, value in memory.items() if name != "unfinished"}


def _begun(memory: Memory, window: Window, gates: Gates) -> tuple[Window, Gates, Memory, int]:
    """The window with the tokens of the unfinished chunk before it, the memory at their start, and their number."""
    carried: Any = dict(memory).get("unfinished")
    if carried is None:
        return window, gates, memory, 0
    before: dict[str, Tensor] = carried["gates"]
    present = {name: gate for name, gate in vars(gates).items() if gate is not None}
    joined = Gates(**{name: torch.cat([before[name].to(gate), gate], dim=1) for name, gate in present.items()})
    keys_bthk = torch.cat([carried["keys_bthk"], window[0]], dim=1)
    values_bthv = torch.cat([carried["values_bthv"], window[1]], dim=1)
    # Nobody asks these tokens again.
    queries_bthk = torch.cat([torch.zeros_like(carried["keys_bthk"]), window[2]], dim=1)
    n_again = carried["keys_bthk"].shape[1]
    return (keys_bthk, values_bthv, queries_bthk), joined, carried["start"], n_again


def _part(window: Window, begin: int, stop: int) -> Window:
    keys_bshk, values_bshv, queries_bshk = (x[:, begin:stop] for x in window)
    return keys_bshk, values_bshv, queries_bshk
