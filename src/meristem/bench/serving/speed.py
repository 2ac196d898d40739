"""Tokens/s of one session and of many, beside the same batch without a server; and whether a long past costs time."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from random import Random
from typing import Any, Final

import torch

from meristem.bench.measure import Row
from meristem.bench.serving.client import Connection, Heard
from meristem.bench.serving.server import Server
from meristem.memory.state import join_rows
from meristem.models.decoding import Decoding
from meristem.models.generate import Sampling
from meristem.models.load import Loaded
from meristem.serve.draw import Drawn, Draws, Wanted
from meristem.serve.moment import FRESH, read

TEMPERATURE: Final = 0.8
N_WARM: Final = 8
"""Rounds in process before those that are timed."""

SHORTEST_S: Final = 1.0
"""All sessions write side by side for so long at least: replies are sent at most every 50 ms."""

N_FEEDS: Final = 100
"""Texts that a long session reads."""

N_WRITTEN: Final = 32
"""Tokens that it writes after each."""

BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True)
class Spell:
    """What sessions wrote while all of them were writing. gaps_s: between two tokens of one session."""

    seconds: float
    tokens_per_s: float
    gaps_s: tuple[float, ...]


def prose(n_bytes: int, *, first: int = 0) -> str:
    """Text of Python's manual, from a byte of it on, repeated as often as it takes."""
    whole = "\n\n".join(text for _, text in sorted(topics.items())).encode("ascii", "ignore").decode()
    first %= len(whole)
    return (whole[first:] + whole * (n_bytes // len(whole) + 1))[:n_bytes]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def new_session(connection: Connection, text: str) -> str:
    """The id of a session that has read a text."""
    session_id = str((await connection.ask("POST", "/v1/sessions", {}))["id"])
    await connection.ask("POST", f"/v1/sessions/{session_id}/feed", {"text": text})
    return session_id


async def write(server: Server, n_sessions: int, n_tokens: int) -> Spell:
    """Sessions that write side by side, each after a text of its own; they are deleted behind it.

    Where that took less than ``SHORTEST_S``, they write again, twice as much.
    """
    found = spell_of(await _heard(server, n_sessions, n_tokens))
    return found if found.seconds >= SHORTEST_S else await write(server, n_sessions, 2 * n_tokens)


async def _heard(server: Server, n_sessions: int, n_tokens: int) -> list[Heard]:
    connections = [await Connection.to(server.address) for _ in range(n_sessions)]
    try:
        ids = [await new_session(each, prose(300, first=1000 * at)) for at, each in enumerate(connections)]
        heard = [Heard() for _ in ids]
        asked = {"max_tokens": n_tokens, "temperature": TEMPERATURE}
        streams = zip(connections, ids, heard, strict=True)
        await asyncio.gather(
            *(each.stream(f"/v1/sessions/{session_id}/generate", asked, own) for each, session_id, own in streams)
        )
        for session_id in ids:
            await connections[0].ask("DELETE", f"/v1/sessions/{session_id}")
    finally:
        for each in connections:
            each.close()
    return heard


def spell_of(heard: Sequence[Heard]) -> Spell:
    """From the first token of the session that began last to the last token of the one that ended first."""
    began, ended = max(each.times[0] for each in heard), min(each.times[-1] for each in heard)
    inside = [[at for at in each.times if began <= at <= ended] for each in heard]
    # A token that completes no character has no chunk.
    per_chunk = sum(each.n_tokens for each in heard) / sum(len(each.times) for each in heard)
    n_chunks = sum(len(times) - 1 for times in inside)
    gaps = tuple(after - before for times in inside for before, after in zip(times, times[1:], strict=False))
    return Spell(ended - began, per_chunk * n_chunks / max(ended - began, 1e-9), gaps)


def alone(loaded: Loaded, n_rows: int, n_tokens: int) -> float:
    """Tokens/s of a batch of so many rows that are read and drawn in this process, and nothing else."""
    states, logits = [], []
    for at in range(n_rows):
        moment, logits_bto = read(loaded.model, FRESH, loaded.tokenizer.encode(prose(300, first=1000 * at)))
        states.append(moment.state or {})
        logits.append(logits_bto[:, -1])
    rows, randoms = Decoding(loaded.model, join_rows(states)), [Random(at) for at in range(n_rows)]
    logits_bo, sampling, began = torch.cat(logits), Sampling(temperature=TEMPERATURE), 0.0
    draws = Draws([Wanted(sampling, own, None) for own in randoms])
    for step in range(N_WARM + n_tokens):
        if step == N_WARM:
            began = time.perf_counter()
        found = draws.draw(logits_bo)
        logits_bo = rows.step([token.token_id for token in found if isinstance(token, Drawn)])
    return n_rows * n_tokens / (time.perf_counter() - began)


def speeds(
    server: Server, single: Server, loaded: Loaded, sizes: Sequence[int], n_tokens: int, n_repeats: int
) -> Iterator[Row]:
    """Sessions that write together, in every number of ``sizes``; and the largest number in process and at ``single``,
    a server of one thread: interleaved."""
    spells: dict[int, list[Spell]] = {size: [] for size in sizes}
    in_process, of_single = list[float](), list[float]()
    for _ in range(n_repeats):
        for size in sizes:
            spells[size].append(asyncio.run(write(server, size, n_tokens)))
        in_process.append(alone(loaded, sizes[-1], n_tokens))
        of_single.append(asyncio.run(write(single, sizes[-1], n_tokens)).tokens_per_s)
    rates = {size: statistics.median(each.tokens_per_s for each in own) for size, own in spells.items()}
    for size in sizes:
        gaps_s = [gap for each in spells[size] for gap in each.gaps_s]
        p50_s, p99_s = percentile(gaps_s, 0.5), percentile(gaps_s, 0.99)
        figures = {"sessions": size, "rates": [each.tokens_per_s for each in spells[size]]}
        yield Row(f"sessions that write together: {size}", rates[size], "tokens/s", figures=figures)
        yield Row(f"from token to token, median of {size}", 1e3 * p50_s, "ms")
        yield Row(f"from token to token, p99 of {size}", 1e3 * p99_s, "ms")
        if size == sizes[-1] > 1:
            yield Row("that to the median", p99_s / p50_s, "x", 3.0, "<=")
    if len(sizes) > 1:
        name = f"tokens/s of {sizes[-1]} sessions to those of {sizes[0]}"
        target, note = (8.0, "the aim is 16") if (sizes[0], sizes[-1]) == (1, 64) else (None, "")
        yield Row(name, rates[sizes[-1]] / rates[sizes[0]], "x", target, ">=", note)
    for who, found in (("a server of one thread", of_single), ("one thread in process, without a server", in_process)):
        yield Row(f"{sizes[-1]} by {who}", statistics.median(found), "tokens/s", figures={"rates": found})
    share = statistics.median(rate / alone for rate, alone in zip(of_single, in_process, strict=True))
    yield Row("tokens/s of that server to those in process", share, "x", 0.9, ">=")


def long_session(server: Server, n_tokens: int) -> Iterator[Row]:
    """One session that reads so many tokens: time per token and bytes in its last tenth and in its first."""
    found = asyncio.run(_read_on(server, n_tokens))
    tenth = max(1, len(found) // 10)
    first, last = found[:tenth], found[-tenth:]
    for what, key in (("read", "read_s"), ("written", "write_s")):
        before, after = (statistics.median(each[key] for each in part) for part in (first, last))
        name = f"seconds per token {what} in the last tenth of {found[-1]['n_tokens']:,} to those in the first"
        yield Row(name, after / before, "x", 1.2, "<=", f"{1e3 * before:.3f} and {1e3 * after:.3f} ms")
    before, after = first[-1]["size_bytes"], last[-1]["size_bytes"]
    yield Row(
        "bytes of its state at the end to those after a tenth", after / before, "x", 1.0, "<=", f"{after:,} bytes"
    )


async def _read_on(server: Server, n_tokens: int) -> list[dict[str, Any]]:
    """After every text: tokens read so far, bytes, and seconds per token read and per token written."""
    connection, n_bytes = await Connection.to(server.address), BYTES_PER_TOKEN * n_tokens // N_FEEDS
    found: list[dict[str, Any]] = []
    session_id = str((await connection.ask("POST", "/v1/sessions", {}))["id"])
    path, n_read = f"/v1/sessions/{session_id}", 0
    while n_read < n_tokens:
        text = prose(n_bytes, first=n_bytes * len(found))
        fed = await connection.ask("POST", f"{path}/feed", {"text": text})
        began = time.perf_counter()
        await connection.ask("POST", f"{path}/generate", {"max_tokens": N_WRITTEN, "temperature": TEMPERATURE})
        write_s = (time.perf_counter() - began) / N_WRITTEN
        session = fed["session"]
        n_read = session["n_tokens"]
        read_s = fed["seconds"] / fed["n_read"]
        found.append({key: session[key] for key in ("n_tokens", "size_bytes")} | {"read_s": read_s, "write_s": write_s})
    await connection.ask("DELETE", path)
    connection.close()
    return found
