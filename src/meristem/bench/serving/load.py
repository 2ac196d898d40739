"""What a server bears: a long text beside many replies, many requests, and many sessions that nobody uses."""

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final

from meristem.bench.measure import Row
from meristem.bench.serving.client import Connection, Heard
from meristem.bench.serving.server import Server, serving
from meristem.bench.serving.speed import new_session, percentile, prose
from meristem.errors import DiskFull
from meristem.models.load import Loaded
from meristem.serve.moment import portion, read
from meristem.serve.sessions import Said, Sessions

EVERY_S: Final = 0.02
"""Between two questions to /healthz."""

ENDLESS: Final = 100_000
N_CLIENTS: Final = 8
N_TURNS: Final = 50
"""Turns of a session, after which it is deleted and another begins."""

N_RESUMED: Final = 200
KEPT_TOKENS: Final = 2000
"""Tokens that every idle session has read."""

MB: Final = 1e6
Say = Callable[[str], object]


def health(server: Server, n_sessions: int, n_bytes: int) -> Iterator[Row]:
    """/healthz, and the waits of sessions that write, while one more reads a long text."""
    waits_s, gaps_s, seconds = asyncio.run(_beside_a_text(server, n_sessions, n_bytes))
    beside = f"while {n_bytes:,} bytes are read and {n_sessions} sessions write"
    p99_s = percentile(waits_s, 0.99)
    median = f"median {1e3 * statistics.median(waits_s):.1f} ms, of {len(waits_s)}"
    yield Row(f"p99 of /healthz {beside}", 1e3 * p99_s, "ms", 100.0, "<=", median)
    yield Row("the longest wait for a token meanwhile", max(gaps_s), "s", 0.5, "<=", f"of {len(gaps_s):,} waits")
    yield Row("the text is read at", n_bytes / seconds, "bytes/s")


async def _beside_a_text(server: Server, n_sessions: int, n_bytes: int) -> tuple[list[float], list[float], float]:
    """Seconds of each answer of /healthz, between tokens, and of the whole text."""
    writing = [await Connection.to(server.address) for _ in range(n_sessions)]
    heard = [Heard() for _ in writing]
    asked = {"prompt": "Ada lives in Oslo.", "max_tokens": ENDLESS}
    streams = [
        asyncio.ensure_future(each.stream("/v1/completions", asked, own))
        for each, own in zip(writing, heard, strict=True)
    ]
    while not all(each.times for each in heard):
        await asyncio.sleep(EVERY_S)
    # Not before: a server gives idle connections up after half a minute.
    asking, reading = [await Connection.to(server.address) for _ in range(2)]
    session_id = str((await reading.ask("POST", "/v1/sessions", {}))["id"])
    began, waits_s = time.perf_counter(), []
    text = asyncio.ensure_future(reading.ask("POST", f"/v1/sessions/{session_id}/feed", {"text": prose(n_bytes)}))
    while not text.done():
        sent = time.perf_counter()
        await asking.ask("GET", "/healthz")
        waits_s.append(time.perf_counter() - sent)
        await asyncio.sleep(EVERY_S)
    await text
    ended = time.perf_counter()
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await asking.ask("DELETE", f"/v1/sessions/{session_id}")
    for connection in (asking, reading, *writing):
        connection.close()
    inside = [[at for at in each.times if began <= at <= ended] for each in heard]
    # Whoever got nothing waited all the time.
    gaps_s = [
        after - before for times in inside for before, after in zip([began, *times], [*times, ended], strict=True)
    ]
    return waits_s, gaps_s, ended - began


def requests(server: Server, n_requests: int, say: Say) -> Iterator[Row]:
    """Resident memory of the server over many requests of several kinds."""
    began = time.perf_counter()
    memory = asyncio.run(_many(server, n_requests, say))
    seconds = time.perf_counter() - began
    after_tenth, at_end = memory[len(memory) // 10], memory[-1]
    note = f"{after_tenth / MB:.1f} and {at_end / MB:.1f} MB"
    name = f"memory of the server after {n_requests:,} requests to that after a tenth of them"
    yield Row(name, at_end / after_tenth, "x", 1.05, "<=", note, {"memory_bytes": memory})
    yield Row(f"requests of {N_CLIENTS} clients", n_requests / seconds, "/s")


async def _many(server: Server, n_requests: int, say: Say) -> list[int]:
    """Memory at the beginning, and after each fiftieth of the requests."""
    n_done, memory = 0, [server.memory_bytes]

    async def ask(number: int) -> None:
        nonlocal n_done
        connection, n_turns, session_id = await Connection.to(server.address), 0, None
        while n_done < n_requests:
            if session_id is None or n_turns >= N_TURNS:
                if session_id is not None:
                    await connection.ask("DELETE", f"/v1/sessions/{session_id}")
                    n_done += 1
                session_id, n_turns = await new_session(connection, f"Client {number} lives in Oslo."), 0
                n_done += 2
            await connection.ask("POST", f"/v1/sessions/{session_id}/generate", {"prompt": " So", "max_tokens": 1})
            await connection.ask("POST", "/v1/completions", {"prompt": "Ada lives in", "max_tokens": 1})
            await connection.ask("GET", f"/v1/sessions/{session_id}/memory")
            await connection.ask("GET", "/healthz")
            n_turns, n_done = n_turns + 1, n_done + 4
            while n_done >= len(memory) * n_requests / 50:
                memory.append(server.memory_bytes)
                if len(memory) % 5 == 1:
                    say(f"{n_done:,} requests, {memory[-1] / MB:.1f} MB")
        if session_id is not None:
            await connection.ask("DELETE", f"/v1/sessions/{session_id}")
        connection.close()

    await asyncio.gather(*(ask(number) for number in range(N_CLIENTS)))
    return memory


def idle(directory: Path, checkpoint: Path | None, loaded: Loaded, n_sessions: int, say: Say) -> Iterator[Row]:
    """A server with many sessions on its disk: how long it takes to begin, and to go on with one of them."""
    ids, size_bytes = _sessions_on_disk(directory, loaded, n_sessions, say)
    with serving(directory, checkpoint) as server:
        yield Row(f"the server begins with {n_sessions:,} sessions on the disk in", server.begun_s, "s")
        note = f"{n_sessions * size_bytes / MB:,.0f} MB on the disk, {size_bytes:,} bytes each"
        yield Row("its memory then", server.memory_bytes / MB, "MB", note=note)
        chosen = Random(0).sample(ids, min(N_RESUMED, len(ids)))
        fresh_s, again_s = asyncio.run(_resume(server, chosen))
    note = f"median {1e3 * statistics.median(fresh_s):.1f} ms, of {len(chosen)}; their next turns, from memory: "
    note += f"p99 {1e3 * percentile(again_s, 0.99):.1f} ms"
    yield Row(
        "p99 from a request to an idle session to its first token",
        1e3 * percentile(fresh_s, 0.99),
        "ms",
        50.0,
        "<=",
        note,
    )


def _sessions_on_disk(directory: Path, loaded: Loaded, n_sessions: int, say: Say) -> tuple[list[str], int]:
    """The ids of as many sessions, each with a file of its own, and the bytes of each."""
    sessions = Sessions(directory, loaded.model, loaded.tokenizer)
    try:
        first = sessions.create()
        ids, at_once = loaded.tokenizer.encode(prose(4 * KEPT_TOKENS))[:KEPT_TOKENS], portion(loaded.model)
        moment = sessions.moment(first)
        for begin in range(0, len(ids), at_once):
            moment, _ = read(sessions.reader(), moment, ids[begin : begin + at_once])
        with sessions.writing(first.id):
            sessions.add(first, moment, Said(n_read=len(ids)))
        content = sessions.export(first.id)
        free = shutil.disk_usage(directory).free
        if free < n_sessions * len(content):
            raise DiskFull(
                f"{n_sessions} sessions of {len(content)} bytes need more than the {free} bytes that are free in "
                f"{directory}. Set TMPDIR to a directory on a larger disk, or --idle to fewer.",
                path=str(directory),
            )
        found = [first.id]
        while len(found) < n_sessions:
            found.append(sessions.put(content).id)
            if len(found) % max(1, n_sessions // 10) == 0:
                say(f"{len(found):,} sessions on the disk")
        return found, len(content)
    finally:
        sessions.close()


async def _resume(server: Server, ids: list[str]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each session, and the same once more when it is in memory."""
    connection, found = await Connection.to(server.address), []
    for _ in range(2):
        seconds = []
        for session_id in ids:
            heard = Heard()
            await connection.stream(f"/v1/sessions/{session_id}/generate", {"max_tokens": 4, "temperature": 0}, heard)
            seconds.append(heard.times[0] - heard.asked_at)
        found.append(seconds)
    connection.close()
    return found[0], found[1]
