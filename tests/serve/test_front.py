"""What stands before several workers: whose a request is, and that an answer comes through as it is."""

import asyncio
import contextlib
import json

import pytest

from meristem.serve.front import Front, labelled, place_of
from meristem.serve.sharing import Share, new_id

IDS = [f"{place:08x}" + "5" * 24 for place in (0, 1)]
"""Sessions of the first and of the second worker."""
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


def test_a_request_is_whose_its_session_is():
    """By the path or the body, however they are written; a fork is where its source is."""
    one = IDS[1]
    for path in (f"/v1/sessions/{one}", f"/v1/sessions/{one}/turns", f"/v1/sessions/{one}/"):
        assert place_of(path, b"") == 1
    for path in ("/v1/sessions", "/v1/sessions/import", f"/v1/sessions/{one}x", f"/v1/sessions/{one.upper()}F", "/"):
        assert place_of(path, json.dumps({"session": one}).encode()) is None
    for path in ("/v1/completions", "/v1/chat/completions"):
        for encoding in ("utf-8", "utf-16", "utf-32"):
            assert place_of(path, json.dumps({"prompt": "x", "session": one}).encode(encoding)) == 1
        assert place_of(path, b'{"session": "%b", "\\u0073ession": "%b"}' % (IDS[0].encode(), one.encode())) == 1
        for body in (b"", b"{", b"[]", b"{}", b'{"session": 3}', b'{"session": "x"}', b"[" * 100_000):
            assert place_of(path, body) is None
    assert place_of("/v1/completions", b'{"session": null}', one) == 1 and place_of("/v1/sessions", b"", one) is None
    assert place_of("/v1/completions", json.dumps({"session": IDS[0]}).encode(), one) == 0
    made = new_id()
    assert place_of(f"/v1/sessions/{new_id(made)}", b"") == place_of(f"/v1/sessions/{made}", b"")
    assert len({made, new_id(made), new_id(made), new_id()}) == 4 and len(new_id(made)) == 32


def test_what_a_crash_left_has_one_owner():
    """Whatever the number of processes was before; a file of before there were several is the first one's."""
    names = [Share(index, 5).new_file() for index in range(5)] + ["0123abcd.session", ".3-ab.session.partial"]
    for n in (1, 2, 4):
        for name in names:
            assert sum(Share(index, n).has(name) for index in range(n)) == 1
    assert Share(3, 5).has(names[3]) and Share(3, 5).has(names[-1]) and Share(0, 5).has(names[-2])


class Worker:
    """A worker that keeps what it is sent and answers what it is given, in portions."""

    def __init__(self):
        self.requests, self.portions, self.gone, self.goes_on = [], [OK], asyncio.Event(), asyncio.Event()
        self.goes_on.set()
        self.n_sent = 0

    async def connected(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        named = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
        self.requests.append((head, await reader.readexactly(int(named[b"content-length"]))))
        for portion in self.portions:
            writer.write(portion)
            await writer.drain()
            self.n_sent += 1
            await self.goes_on.wait()
        if not self.portions:
            await reader.read()
            self.gone.set()
        writer.close()


def fronted(tmp_path, talk, n=2, **settings):
    """Runs ``talk(connect, workers, front)`` with a front before some workers."""

    async def main():
        workers, sockets = [Worker() for _ in range(n)], [tmp_path / str(index) for index in range(n)]
        front = Front(sockets, **{"most_bytes": 1000} | settings)
        async with contextlib.AsyncExitStack() as stack:
            for worker, place in zip(workers, sockets, strict=True):
                await stack.enter_async_context(await asyncio.start_unix_server(worker.connected, place))
            server = await stack.enter_async_context(await asyncio.start_server(front.connected, "127.0.0.1", 0))
            port = server.sockets[0].getsockname()[1]
            await asyncio.wait_for(talk(lambda: asyncio.open_connection("127.0.0.1", port), workers, front), 60)

    asyncio.run(main())


def request(path, body=b"", method=b"POST", version=b"1.1", headers=b""):
    return b"%b %b HTTP/%b\r\nhost: a\r\ncontent-length: %d\r\n%b\r\n%b" % (
        method,
        path.encode(),
        version,
        len(body),
        headers,
        body,
    )


def test_requests_go_where_their_session_is(tmp_path):
    """One connection after the other request, whoever sent the one before; without a session in turn."""

    async def talk(connect, workers, front):
        reader, writer = await connect()
        for path, body in [
            (f"/v1/sessions/{IDS[1]}/feed?x=1", b'{"text": "x"}'),
            (f"/v1/sessions/%30{IDS[1][1:]}%2Ffeed", b""),
            ("/v1/completions", json.dumps({"session": IDS[1]}).encode()),
            (f"/v1/sessions/{IDS[0]}", b""),
        ]:
            head = b"Meristem-Session: %b\r\n" % IDS[0].encode()
            writer.write(request(path, body, headers=head))
            assert await reader.readuntil(b"ok") == OK.replace(b"connection: close\r\n", b"")
        assert [len(worker.requests) for worker in workers] == [1, 3]
        assert workers[1].requests[0][1] == b'{"text": "x"}'
        for _ in range(4):
            writer.write(request("/v1/sessions", b"{}"))
            await reader.readuntil(b"ok")
        assert [len(worker.requests) for worker in workers] == [3, 5]
        writer.close()

    fronted(tmp_path, talk)


def test_heads_are_of_the_client_and_no_more(tmp_path, monkeypatch):
    """What a client says of its connection, or of whom it speaks for, stays here; its address is said."""

    async def talk(connect, workers, front):
        reader, writer = await connect()
        spoofed = b"X-Forwarded-For: 10.1.1.1\r\nAuthorization: Bearer k\r\nConnection: keep-alive\r\nTE: x\r\n"
        writer.write(request("/", headers=spoofed))
        await reader.readuntil(b"ok")
        head = workers[0].requests[0][0].lower()
        assert b"authorization: bearer k\r\n" in head and b"\r\nconnection: close\r\n" in head
        # This client is on this machine, as a proxy would be.
        assert b"x-forwarded-for: 10.1.1.1\r\n" in head and b"\r\nte:" not in head
        assert head.count(b"content-length") == head.count(b"x-forwarded-for") == 1
        writer.close()

    async def talk_from_afar(connect, workers, front):
        reader, writer = await connect()
        writer.write(request("/", headers=b"X-Forwarded-For: 10.1.1.1\r\n"))
        await reader.readuntil(b"ok")
        assert b"x-forwarded-for: 127.0.0.1\r\n" in workers[0].requests[0][0].lower()
        writer.close()

    fronted(tmp_path, talk)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1, 10.0.0.2")
    fronted(tmp_path, talk_from_afar)


def test_a_stream_comes_as_it_is_made(tmp_path):
    """Each chunk before the next, and the connection can be used again."""

    async def talk(connect, workers, front):
        chunks = [b"5\r\ndata1\r\n", b"5\r\ndata2\r\n", b"0\r\n\r\n"]
        workers[0].portions = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *chunks]
        workers[0].goes_on.clear()
        reader, writer = await connect()
        for _ in range(2):
            writer.write(request(f"/v1/sessions/{IDS[0]}"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
            for chunk in chunks:
                workers[0].goes_on.set()
                workers[0].goes_on.clear()
                assert await reader.readexactly(len(chunk)) == chunk
            workers[0].goes_on.set()
        writer.close()

    fronted(tmp_path, talk)


@pytest.mark.parametrize(
    "portions",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"half"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4\r\nhalf\r\n"],
    ],
)
def test_an_answer_that_breaks_off_ends_the_connection(tmp_path, portions):
    """So that the client knows that it is not whole."""

    async def talk(connect, workers, front):
        workers[0].portions = portions
        reader, writer = await connect()
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        assert b"half" in await reader.read(-1)
        writer.close()

    fronted(tmp_path, talk)


def test_a_slow_reader_holds_its_worker_back(tmp_path):
    """Instead of filling memory; when it reads again, all comes."""
    portion, n = b"x" * (1 << 16), 200

    async def talk(connect, workers, front):
        workers[0].portions = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (n * len(portion)), *[portion] * n]
        reader, writer = await connect()
        writer.transport.pause_reading()
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        n_sent = -1
        while n_sent != workers[0].n_sent or not n_sent:
            n_sent = workers[0].n_sent
            await asyncio.sleep(0.5)
        assert n_sent < n
        writer.transport.resume_reading()
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(n):
            assert await reader.readexactly(len(portion)) == portion
        writer.close()

    fronted(tmp_path, talk)


def test_a_client_that_goes_ends_its_request(tmp_path):
    """The worker sees it at once, so that it stops to draw."""

    async def talk(connect, workers, front):
        workers[0].portions = []
        _, writer = await connect()
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        while not workers[0].requests:
            await asyncio.sleep(0.01)
        writer.close()
        await workers[0].gone.wait()

    fronted(tmp_path, talk)


def test_a_worker_that_is_not_there_is_waited_for(tmp_path, monkeypatch):
    """A request that comes while it starts is answered by it; one that it died of, or that waits in vain, by a 503."""

    async def talk(connect, workers, front):
        (tmp_path / "0").rename(tmp_path / "away")
        reader, writer = await connect()
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        await asyncio.sleep(0.1)
        (tmp_path / "away").rename(tmp_path / "0")
        await reader.readuntil(b"ok")
        workers[0].portions = [b"HTTP/1.1 2"]
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        died = await reader.read(-1)
        assert died.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"retry-after: 1\r\n" in died
        assert b"what it acknowledged is kept" in died
        monkeypatch.setattr("meristem.serve.front.WAIT_S", 0.1)
        (tmp_path / "0").unlink()
        reader, writer = await connect()
        writer.write(request(f"/v1/sessions/{IDS[0]}"))
        assert b'"code":"unavailable"' in await reader.read(-1)

    fronted(tmp_path, talk)


def test_what_is_no_request_is_refused(tmp_path):
    """Too long, or not HTTP; a request of HTTP/1.0 is handed on as one, and its connection ends."""

    async def talk(connect, workers, front):
        for sent, found in [
            (request("/", b"x" * 1001), b"HTTP/1.1 413 "),
            (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n", b"HTTP/1.1 400 "),
            (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"HTTP/1.1 400 "),
            (request("/", version=b"1.0"), b"HTTP/1.1 200 OK\r\n"),
            (b"", b""),
        ]:
            reader, writer = await connect()
            writer.write(sent)
            if not sent:
                writer.write_eof()
            assert (await reader.read(-1)).startswith(found)
            writer.close()
        assert [b" HTTP/1.0\r\n" in head for worker in workers for head, _ in worker.requests] == [True]
        reader, writer = await connect()
        writer.write(request("/", headers=b"Expect: 100-continue\r\n", body=b"x")[:-1])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"x")
        await reader.readuntil(b"ok")
        writer.close()

    fronted(tmp_path, talk)


def test_health_is_of_all(tmp_path):
    """What they do in all; with one that does not answer, or is not ready, the whole is not."""

    def answer(status, body, kind=b"application/json"):
        return b"HTTP/1.0 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)

    async def talk(connect, workers, front):
        async def get(path):
            reader, writer = await connect()
            writer.write(request(path, method=b"GET", headers=b"connection: close\r\n"))
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            writer.close()
            return int(head.split()[1]), body

        for number, worker in enumerate(workers):
            worker.portions = [answer(b"200 OK", b'{"requests": {"working": %d, "waiting": 1}}' % number)]
        status, body = await get("/healthz")
        assert (status, json.loads(body)["requests"]) == (200, {"working": 1, "waiting": 2})
        for worker in workers:  # as they answer where there are keys
            worker.portions = [answer(b"200 OK", b'{"status": "ok"}')]
        assert await get("/healthz") == (200, b'{"status":"ok"}')
        workers[0].portions = [answer(b"200 OK", b'{"status": "ready", "model": "ada"}')]
        workers[1].portions = [answer(b"503 Service Unavailable", b'{"error": {}}')]
        assert await get("/readyz") == (503, b'{"error": {}}')
        workers[1].portions = workers[0].portions
        assert json.loads((await get("/readyz"))[1]) == {"status": "ready", "model": "ada", "workers": 2}
        for worker in workers:
            worker.portions = [answer(b"200 OK", b"# TYPE a counter\na_total 1\n", b"text/plain")]
        assert await get("/metrics") == (
            200,
            b'# TYPE a counter\na_total{worker="0"} 1\na_total{worker="1"} 1\n',
        )
        (tmp_path / "1").unlink()
        assert (await get("/healthz"))[0] == (await get("/readyz"))[0] == 503
        assert (await get("/metrics"))[1] == b'# TYPE a counter\na_total{worker="0"} 1\n'

    fronted(tmp_path, talk)


def test_metrics_of_workers_stand_together():
    """Each family once, as the format wants it, whatever its labels hold."""
    text = (
        '# HELP a what {it} is\n# TYPE a histogram\na_bucket{le="+Inf",x="} 1"} 3\na_sum 2.5\n# TYPE b gauge\nb NaN\n'
    )
    assert labelled({0: text, 2: text}).splitlines() == [
        "# HELP a what {it} is",
        "# TYPE a histogram",
        'a_bucket{le="+Inf",x="} 1",worker="0"} 3',
        'a_sum{worker="0"} 2.5',
        'a_bucket{le="+Inf",x="} 1",worker="2"} 3',
        'a_sum{worker="2"} 2.5',
        "# TYPE b gauge",
        'b{worker="0"} NaN',
        'b{worker="2"} NaN',
    ]
