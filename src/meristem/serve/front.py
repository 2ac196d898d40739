"""One address before several workers: each request goes to the worker that its session is pinned to.

A session belongs to the worker that the first eight hexadecimal digits of its id name, so that one process alone holds
its memory; a fork has those of its source. Requests that name no session go to the workers in turn. What a worker
answers is handed on as it comes, byte by byte: nothing of it is parsed but its head.
"""

import asyncio
import contextlib
import http
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote

import h11
import orjson
from fastapi import Response
from fastapi.responses import JSONResponse, PlainTextResponse

from meristem.serve.failures import failure
from meristem.serve.sharing import PLACE, SESSION_HEADER

P = TypeVar("P", bound=asyncio.BaseProtocol)
READ_BYTES: Final = 1 << 16
IDLE_S: Final = 75.0
"""How long a client may keep a connection on which it sends nothing."""
WAIT_S: Final = 60.0
"""How long a request waits for a worker that is being started again."""
HEALTH_S: Final = 5.0
"""How long a worker may take to say how it is."""
TRUSTED: Final = "127.0.0.1,::1"
"""Proxies, where the environment names none in FORWARDED_ALLOW_IPS, which uvicorn reads as well."""

_SESSION: Final = re.compile(rf"([0-9a-f]{{{PLACE}}})[0-9a-f]{{{32 - PLACE}}}")
_PATH: Final = re.compile(rf"/v1/sessions/{_SESSION.pattern}(?:/|$)")
_COMPLETIONS: Final = ("/v1/completions", "/v1/chat/completions")
_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"expect")
    + (b"transfer-encoding", b"content-length", b"x-forwarded-for")
)
_SAMPLE: Final = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (.*)")


class Unavailable(Exception):
    """A worker that does not answer."""


@dataclass(frozen=True)
class Asked:
    """A request that was read whole.

    left: what the client has sent behind it. address: of the client. is_trusted: it is a proxy, which says for whom it
    asks; what others say of that is not believed.
    """

    head: h11.Request
    body: bytes
    left: bytes
    address: str
    is_trusted: bool

    @property
    def path(self) -> str:
        """As routes see it: without a query, with its escapes undone."""
        return unquote(self.head.target.decode("latin-1").partition("?")[0])

    @property
    def session(self) -> str | None:
        """What the head names; of several the first, as the workers have it."""
        wanted = SESSION_HEADER.lower().encode()
        return next((value.decode("latin-1") for name, value in self.head.headers if name == wanted), None)

    @property
    def keeps_connection(self) -> bool:
        wishes = dict(self.head.headers).get(b"connection", b"").lower()
        return self.head.http_version == b"1.1" and b"close" not in wishes

    def raw(self) -> bytes:
        """The request for a worker, which is to close the connection after its answer."""
        named = dict(self.head.headers)
        seen = named.get(b"x-forwarded-for") if self.is_trusted else None
        lines = [b"%b %b HTTP/%b" % (self.head.method, self.head.target, self.head.http_version)]
        lines += [b"%b: %b" % pair for pair in self.head.headers if pair[0] not in _HOP_BY_HOP]
        lines += [b"x-forwarded-for: " + (seen or self.address.encode())]
        return b"\r\n".join([*lines, b"content-length: %d" % len(self.body), b"connection: close", b"", self.body])


def place_of(path: str, body: bytes, named: str | None = None) -> int | None:
    """The number that says whose a request is, out of the id of its session; None where it names none.

    The body is read as the workers read it: JSON in any encoding, of a repeated key the last. named: the session in the
    head of the request, for one whose body may leave it out.
    """
    found = _PATH.match(path)
    if not found and path in _COMPLETIONS:
        with contextlib.suppress(ValueError, RecursionError):
            asked = json.loads(body)
            session = asked.get("session") if isinstance(asked, dict) else None
            session = named if session is None else session
            found = _SESSION.fullmatch(session) if isinstance(session, str) else None
    return int(found[1], 16) if found else None


class _Answer(asyncio.Protocol):
    """What a worker sends, handed on to the client as it comes, with a head that says what becomes of its connection.

    named: the fields of the head, once it came. ended: done when the worker has closed the connection.
    """

    def __init__(self, client: asyncio.StreamWriter, asked: Asked) -> None:
        self.client, self.asked = client, asked
        self.named: dict[bytes, bytes] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head, self._n_bytes, self._last = b"", 0, b""
        self._resuming: asyncio.Future[None] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of it came. Where a worker died it did not, and only the end of the connection says so."""
        named = self.named or {}
        if b"transfer-encoding" in named:
            return self._last == b"0\r\n\r\n"
        return named.get(b"content-length") == b"%d" % self._n_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._worker = transport

    def data_received(self, data: bytes) -> None:
        if self.named is None:
            self._head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                return
            self.named = self._begin(self._head)
        self._n_bytes += len(data)
        self._last = (self._last + data)[-5:]
        self.client.write(data)
        if self.client.transport.get_write_buffer_size() > READ_BYTES and isinstance(self._worker, asyncio.Transport):
            # A slow reader: the worker waits as well, and gives the reply up if it takes too long.
            self._worker.pause_reading()
            self._resuming = asyncio.ensure_future(self._resume(self._worker))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _begin(self, head: bytes) -> dict[bytes, bytes]:
        lines = head.split(b"\r\n")
        sent = [line for line in lines if not line.lower().startswith(b"connection:")]
        sent += [] if self.asked.keeps_connection else [b"connection: close"]
        self.client.write(b"\r\n".join([*sent, b"", b""]))
        return {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}

    async def _resume(self, worker: asyncio.Transport) -> None:
        with contextlib.suppress(OSError):
            await self.client.drain()
        worker.resume_reading()


class Front:
    """Answers connections with what the workers answer that listen at ``sockets``.

    most_bytes: of the body of a request. at_work: answers under way.
    """

    def __init__(self, sockets: Sequence[Path], *, most_bytes: int) -> None:
        self.sockets, self.most_bytes = sockets, most_bytes
        self.at_work: set[asyncio.Future[bool]] = set()
        self._trusted = {each.strip() for each in os.environ.get("FORWARDED_ALLOW_IPS", TRUSTED).split(",")}
        self._turns = itertools.cycle(range(len(sockets)))

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, until it or the client has had enough."""
        peer, left, is_open = writer.get_extra_info("peername"), b"", True
        address = peer[0] if isinstance(peer, tuple) else ""
        try:
            while is_open:
                asked = await self._read(reader, writer, left, address)
                if asked is None:
                    break
                left, is_open = await self._answer(asked, reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass
        except h11.RemoteProtocolError as error:
            refused = failure(400, f"this is no request of HTTP/1.1: {error}.", "invalid_request_error")
            await _write(writer, refused, is_last=True)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: bytes, address: str
    ) -> Asked | None:
        """The next request of a connection; None where there is none, or where it was too long."""
        connection, head, body = h11.Connection(h11.SERVER), None, bytearray()
        if left:
            connection.receive_data(left)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                is_trusted = not self._trusted.isdisjoint((address, "*"))
                return Asked(head, bytes(body), connection.trailing_data[0], address, is_trusted)
            elif isinstance(event, h11.ConnectionClosed):
                return None
            elif event is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                connection.receive_data(await asyncio.wait_for(reader.read(READ_BYTES), IDLE_S))
            if len(body) > self.most_bytes:
                text = f"the body is longer than {self.most_bytes} bytes, the most that a request may send."
                await _write(writer, failure(413, text, "invalid_request_error", code="too_long"), is_last=True)
                return None

    async def _answer(
        self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[bytes, bool]:
        """Answer a request; what the client has sent behind it, and whether it may send more."""
        whole = {"/healthz": self._health, "/readyz": self._readiness, "/metrics": self._metrics}.get(asked.path)
        if whole is not None and asked.head.method == b"GET":
            await _write(writer, await whole(asked), is_last=not asked.keeps_connection)
            return asked.left, asked.keeps_connection
        place = place_of(asked.path, asked.body, asked.session)
        index = next(self._turns) if place is None else place % len(self.sockets)
        copying = asyncio.ensure_future(self._forward(index, asked, writer))
        leaving = asyncio.ensure_future(reader.read(READ_BYTES))
        self.at_work.add(copying)
        copying.add_done_callback(self.at_work.discard)
        try:
            await asyncio.wait({copying, leaving}, return_when=asyncio.FIRST_COMPLETED)
            sent = leaving.result() if leaving.done() else b""
            if not copying.done() and not sent:  # the client has gone; so does its request
                return b"", False
            return asked.left + sent, await copying
        except Unavailable:
            text = f"worker {index} of {len(self.sockets)} is being started again; what it acknowledged is kept."
            refused = failure(503, f"{text} Try again.", "server_error", code="unavailable")
            await _write(writer, refused, is_last=True)
            return b"", False
        finally:
            for task in (copying, leaving):
                task.cancel()
            await asyncio.gather(copying, leaving, return_exceptions=True)

    async def _forward(self, index: int, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        """Hand a request to a worker and its answer to the client; whether the connection can go on."""
        worker, answer = await self._connect(index, lambda: _Answer(writer, asked), WAIT_S)
        try:
            worker.write(asked.raw())
            await answer.ended
            if answer.named is None:
                raise Unavailable
            await writer.drain()
            return answer.is_whole and asked.keeps_connection
        finally:
            worker.close()

    async def _connect(self, index: int, protocol: Callable[[], P], wait_s: float) -> tuple[asyncio.WriteTransport, P]:
        """A connection to a worker, which may be about to start."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            try:
                return await loop.create_unix_connection(protocol, str(self.sockets[index]))
            except OSError as cause:
                if loop.time() > until:
                    raise Unavailable from cause
                await asyncio.sleep(0.05)

    async def _from_all(self, asked: Asked) -> list[tuple[int, bytes] | None]:
        """The status and body that each worker answers with; None of one that does not answer."""
        head = asked.head
        # A worker does not answer in chunks where HTTP/1.0 is spoken.
        plain = h11.Request(method=head.method, target=head.target, headers=head.headers, http_version=b"1.0")
        raw = replace(asked, head=plain, body=b"").raw()

        async def one(index: int) -> tuple[int, bytes]:
            reader, worker = await asyncio.open_unix_connection(self.sockets[index])
            try:
                worker.write(raw)
                answer, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
                return int(answer.split(b" ", 2)[1]), body
            finally:
                worker.close()

        async def within(index: int) -> tuple[int, bytes] | None:
            try:
                return await asyncio.wait_for(one(index), HEALTH_S)
            except (OSError, TimeoutError, LookupError, ValueError):
                return None

        return await asyncio.gather(*(within(index) for index in range(len(self.sockets))))

    async def _health(self, asked: Asked) -> Response:
        """200 while every worker runs; what they do in all, where they say it: with keys they do not."""
        found = await self._from_all(asked)
        if refused := _refusal(found):
            return refused
        said = [orjson.loads(each[1]) for each in found if each]
        requests = [each["requests"] for each in said if "requests" in each]
        if not requests:
            return JSONResponse({"status": "ok"})
        working, waiting = (sum(each[key] for each in requests) for key in ("working", "waiting"))
        in_all = {"working": working, "waiting": waiting}
        return JSONResponse({"status": "ok", "requests": in_all, "workers": requests})

    async def _readiness(self, asked: Asked) -> Response:
        """200 once every worker is ready."""
        found = await self._from_all(asked)
        return _refusal(found) or JSONResponse(orjson.loads((found[0] or (0, b"{}"))[1]) | {"workers": len(found)})

    async def _metrics(self, asked: Asked) -> Response:
        """The metrics of all workers, each with the label ``worker``; those of a worker that does not answer lack."""
        found = await self._from_all(asked)
        texts = {index: each[1].decode() for index, each in enumerate(found) if each and each[0] == 200}
        if not texts:
            return _refusal(found) or failure(404, "there are no metrics.", "invalid_request_error")
        return PlainTextResponse(labelled(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


def labelled(texts: Mapping[int, str]) -> str:
    """One text of metrics from those of several workers: every sample says of which, and each metric stands once."""
    families: dict[str, dict[str, None]] = {}
    for index, text in texts.items():
        family: dict[str, None] = {}
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = families.setdefault(line.split(" ", 3)[2], {})
                family[line] = None
            elif found := _SAMPLE.fullmatch(line):
                labels = ",".join(filter(None, (found[2], f'worker="{index}"')))
                family[f"{found[1]}{{{labels}}} {found[3]}"] = None
    return "".join(f"{line}\n" for family in families.values() for line in family)


def _refusal(found: Sequence[tuple[int, bytes] | None]) -> Response | None:
    """What stands for the answers of all workers where one of them is not 200."""
    silent = [index for index, each in enumerate(found) if each is None]
    if silent:
        text = f"of {len(found)} workers {', '.join(map(str, silent))} do not answer."
        return failure(503, text, "server_error", code="unavailable")
    refused = next((each for each in found if each and each[0] != 200), None)
    return Response(refused[1], refused[0], media_type="application/json") if refused else None


async def _write(writer: asyncio.StreamWriter, answer: Response, *, is_last: bool) -> None:
    """An answer of our own."""
    phrase = http.HTTPStatus(answer.status_code).phrase.encode()
    lines = [b"HTTP/1.1 %d %b" % (answer.status_code, phrase)]
    lines += [b"%b: %b" % pair for pair in answer.raw_headers] + ([b"connection: close"] if is_last else [])
    writer.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
    await writer.drain()
