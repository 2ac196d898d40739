"""The short way of a stream into its connection: every byte of the answer, once, in order, however it is read."""

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from meristem.serve import connection
from meristem.serve.access import Access
from meristem.serve.access_log import AccessLog
from meristem.serve.http import _events, _Short
from meristem.serve.openai import Shape
from meristem.serve.replies import Piece
from serving import TOKENIZER, serving, wait_for

ASKED = {"prompt": "Ada", "max_tokens": 200, "seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("connections")
    log = directory / "access.log"
    access = Access(max_bytes=1 << 20)
    with serving(directory, access=access, access_log=AccessLog(str(log))) as (url, served):
        yield url, served, log


@pytest.fixture
def written(monkeypatch):
    """What went the short way."""
    found, write = [], connection.Outlet.write
    monkeypatch.setattr(connection.Outlet, "write", lambda self, data: (found.append(data), write(self, data)))
    return found


def raw(url: str, version: str, *, pause_s: float = 0.0, **asked) -> bytes:
    """Everything that the server sends on a connection for one request, which is read in small portions."""
    place = urlsplit(url)
    body = json.dumps(ASKED | asked | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((place.hostname, place.port))
        client.sendall(head.encode() + body)
        client.settimeout(60)
        parts = []
        while part := client.recv(2048):
            parts.append(part)
            time.sleep(pause_s)
    return b"".join(parts)


def content_of(answer: bytes) -> bytes:
    """The body of an answer, out of its chunks where it comes in some."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        n_bytes = int(size, 16)
        assert body[n_bytes : n_bytes + 2] == b"\r\n"
        parts.append(body[:n_bytes])
        body = body[n_bytes + 2 :]
        if not n_bytes:
            assert not body
    return b"".join(parts)


def text_of(content: bytes) -> str:
    events = [event.removeprefix(b"data: ") for event in content.split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_pieces_that_go_the_short_way_are_framed_as_the_others(server, written, version):
    """HTTP/1.0 has no chunks."""
    truth = httpx.post(f"{server[0]}/v1/completions", json=ASKED, timeout=60).json()["choices"][0]["text"]
    answer = raw(server[0], version)
    assert (b"chunked" in answer.lower()) == (version == "1.1")
    assert text_of(content_of(answer)) == truth
    assert written  # how many pieces there are says how fast the machine is


def test_a_slow_reader_gets_every_piece_in_order(server, written, monkeypatch):
    """Pieces change from one way to the other when the connection takes no more, and back."""
    open_again, is_open = iter([True, True, False, False, True, False] * 1000), connection.Outlet.is_open
    monkeypatch.setattr(connection.Outlet, "is_open", property(lambda self: next(open_again) and is_open.fget(self)))
    asked = {"logprobs": 5, "max_tokens": 400}
    truth = httpx.post(f"{server[0]}/v1/completions", json=ASKED | asked, timeout=60).json()["choices"][0]
    content = content_of(raw(server[0], "1.1", pause_s=0.001, **asked))
    assert text_of(content) == truth["text"] and written
    chunks = [json.loads(event[6:]) for event in content.split(b"\n\n")[:-2]]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [value for each in found for value in each[key]] == truth["logprobs"][key]


def test_the_access_log_counts_both_ways(server, written):
    answer = raw(server[0], "1.1")
    named = dict(line.split(b": ", 1) for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:])
    request = named[b"x-request-id"].decode()
    wait_for(lambda: request in server[2].read_text())
    lines = [json.loads(line) for line in server[2].read_text().splitlines()]
    (n_bytes,) = [line["bytes_out"] for line in lines if line["request"] == request]
    assert n_bytes == len(content_of(answer)) > sum(map(len, written)) > 0


def test_nothing_overtakes_what_is_being_sent():
    """While an event is on its way through the layers, the short way is closed."""

    class Open:
        is_open = True

    shape = Shape("small", TOKENIZER, is_chat=False, has_logprobs=False)
    short = _Short(Open(), shape, has_usage=False)

    async def come():
        assert short.is_open
        yield [Piece(0, "two", ())]
        assert short.is_open

    async def sent() -> list[bool]:
        return [short.is_open async for _ in _events(shape, [Piece(0, "one", ())], come(), False, short)]

    assert asyncio.run(sent()) == [False, False, False]
