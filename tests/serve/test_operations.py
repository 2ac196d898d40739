"""What an operator sees of a server, and what it does not wait for."""

import asyncio
import json
import socket
import threading
from types import SimpleNamespace

import httpx2 as httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from meristem.errors import DiskFull, RunError
from meristem.serve import failures
from meristem.serve.access import Access
from meristem.serve.access_log import AccessLog
from meristem.serve.connection import WatchedProtocol
from meristem.serve.keys import Keys
from meristem.serve.metrics import _Histogram
from serving import error_of, new_session, serving, wait_for

SECRET = "Ada was born in Oslo"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A server with a key and an access log, a client with the key, and one for metrics."""
    directory = tmp_path_factory.mktemp("watched")
    keys = Keys(directory)
    key, metrics = keys.add("ada"), keys.add("prometheus", opens="metrics")
    log = directory / "access.log"
    access = Access(keys, hosts=None, max_bytes=1 << 20)
    with serving(directory, access=access, access_log=AccessLog(str(log))) as (url, served):
        with (
            httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"}) as client,
            httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {metrics}"}) as reader,
        ):
            yield SimpleNamespace(url=url, served=served, client=client, reader=reader, log=log, key=key)


def measured(reader) -> dict[tuple[str, ...], float]:
    """All samples by name and labels."""
    answer = reader.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def lines_of(watched, request_id):
    """The line of a request, which is written when the answer has gone."""

    def found():
        lines = [json.loads(each) for each in watched.log.read_text().splitlines()]
        return [each for each in lines if each["request"] == request_id]

    wait_for(found)
    return found()


def test_metrics_count_what_was_done(watched):
    """Tokens, replies, latencies, sessions, bytes and surprise, each once."""
    before = measured(watched.reader)
    session = new_session(watched.client)
    asked = {"prompt": "Hello", "max_tokens": 7, "session": session}
    assert watched.client.post("/v1/completions", json=asked).status_code == 200
    wait_for(lambda: measured(watched.reader)["meristem_http_request_seconds_count", "/v1/completions"])
    after = measured(watched.reader)
    rose = {name: after[name] - before.get(name, 0.0) for name in after}
    assert rose["meristem_tokens_total", "drawn"] == 7 and rose["meristem_tokens_total", "read"] == 5
    assert rose["meristem_first_token_seconds_count",] == 1 and rose["meristem_token_gap_seconds_count",] == 6
    assert rose["meristem_orders_total", "length"] == 1 and rose["meristem_order_seconds_count",] == 1
    assert rose["meristem_sessions",] == rose["meristem_sessions_live",] == 1
    (turn,) = watched.client.get(f"/v1/sessions/{session}/turns").json()["data"]
    assert rose["meristem_surprise_nats_count",] == 5
    assert rose["meristem_surprise_nats_sum",] == pytest.approx(turn["nats"])
    assert rose["meristem_sessions_live_bytes",] == rose["meristem_sessions_stored_bytes",] == turn["size_bytes"] > 0
    assert rose["meristem_http_requests_total", "POST", "/v1/completions", "200"] == 1
    assert after["meristem_ready",] == 1 and after["meristem_requests_waiting",] == 0
    assert after["meristem_token_gap_seconds_bucket", "+Inf"] == after["meristem_token_gap_seconds_count",]


def test_many_values_are_counted_as_one_by_one():
    """A bound holds what is equal to it, as Prometheus has it."""
    at_once, alone = (_Histogram("x", "x", (1.0, 2.0)) for _ in range(2))
    for value, n in ((0.5, 3), (1.0, 2), (1.5, 1), (2.5, 4)):
        at_once.add(value, n)
        for _ in range(n):
            alone.add(value)
    assert at_once.family().samples == alone.family().samples
    assert [each.value for each in at_once.family().samples if each.name == "x_bucket"] == [5, 6, 10]


def test_what_others_do_is_not_said_to_everybody(watched):
    """With keys, neither the health of the server nor its numbers tell one owner what another does."""
    assert httpx.get(f"{watched.url}/healthz").json() == {"status": "ok"}
    error_of(httpx.get(f"{watched.url}/metrics"), 401)
    error_of(watched.client.get("/metrics"), 403)


def test_a_request_leaves_a_line_without_its_text_and_key(watched):
    session = new_session(watched.client)
    answer = watched.client.post(f"/v1/sessions/{session}/feed?x={SECRET}", json={"text": SECRET})
    (line,) = lines_of(watched, answer.headers["x-request-id"])
    told = {name: line[name] for name in ("key", "method", "route", "session", "status", "bytes_out", "address")}
    assert told == {
        "key": "ada",
        "method": "POST",
        "route": "/v1/sessions/{session_id}/feed",
        "session": session,
        "status": 200,
        "bytes_out": len(answer.content),
        "address": "127.0.0.1",
    }
    assert line["bytes_in"] == len(answer.request.content) and line["seconds"] > 0 and line["time"].endswith("+00:00")
    odd = httpx.request("BREW", f"{watched.url}/v1/{SECRET}", headers={"authorization": f"Bearer {watched.key}x"})
    (line,) = lines_of(watched, odd.headers["x-request-id"])
    assert (line["key"], line["method"], line["route"], line["session"], line["status"]) == ("", "other", "", "", 401)
    written = watched.log.read_text()
    assert SECRET not in written and "Oslo" not in written and watched.key.rpartition("_")[2] not in written


def test_a_full_disk_costs_lines_and_no_requests(watched, monkeypatch):
    """Each lost line is counted."""

    def full(line):
        raise DiskFull("no space is left")

    log = watched.served.access_log
    monkeypatch.setattr(log._lines, "append", full)
    assert watched.client.get("/v1/models").status_code == 200
    wait_for(lambda: log.n_lost)
    assert measured(watched.reader)["meristem_access_log_lost_total",] >= 1


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot be written: .*--access-log"):
        AccessLog(str(tmp_path / "absent" / "access.log"))


def test_an_owner_has_so_many_sessions_and_no_more(watched, monkeypatch):
    """Made, forked or imported; what another has does not count."""
    monkeypatch.setattr(watched.served.sessions, "most_sessions", 2)
    keys = watched.served.access.keys
    with httpx.Client(
        base_url=watched.url, timeout=60, headers={"authorization": f"Bearer {keys.add('bob')}"}
    ) as client:
        first, second = new_session(client), new_session(client)
        content = client.get(f"/v1/sessions/{first}/export").content
        for answer in (
            client.post("/v1/sessions", json={}),
            client.post(f"/v1/sessions/{first}/fork", json={}),
            client.post("/v1/sessions/import", content=content),
        ):
            assert error_of(answer, 403)["code"] == "too_many_sessions"
        assert client.delete(f"/v1/sessions/{second}").status_code == 200
        assert client.post("/v1/sessions/import", content=content).status_code == 201


def test_a_body_that_does_not_come_is_not_waited_for(watched, monkeypatch):
    monkeypatch.setattr(failures, "MOST_BODY_S", 0.2)
    url = httpx.URL(watched.url)
    with socket.create_connection((url.host, url.port), timeout=60) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {watched.key}\r\ncontent-length: 9\r\n"
        )
        client.sendall(f"{head}\r\n{{".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.fixture
def endless(monkeypatch):
    """A server whose answers do not end, and the list of the connections that it gave up."""
    monkeypatch.setattr(WatchedProtocol, "stall_s", 0.2)
    gone = []

    async def app(scope, receive, send):
        async def leave():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.append(True)

        leaving = asyncio.ensure_future(leave())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=WatchedProtocol, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    yield listening.getsockname(), gone
    server.should_exit = True
    thread.join()


def test_whoever_does_not_read_is_let_go(endless):
    """A bounded part of the answer waits, and then the connection ends, so that nothing of it is held for ever."""
    place, gone = endless
    with socket.create_connection(place) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_for(lambda: gone)


def test_whoever_sends_no_request_is_let_go(endless):
    place, _ = endless
    for head in (b"", b"GET / HT"):
        with socket.create_connection(place, timeout=60) as client:
            client.sendall(head)
            assert client.recv(1) == b""


def test_whoever_reads_and_sends_on_is_kept():
    """The time runs while something is awaited, and begins anew with it."""
    timers = []

    class Loop:
        def call_later(self, delay, call):
            timers.append(SimpleNamespace(is_on=True, call=call))
            timers[-1].cancel = lambda timer=timers[-1]: setattr(timer, "is_on", False)
            return timers[-1]

    transport = SimpleNamespace(
        get_extra_info=lambda name: None, abort=None, pause_reading=lambda: None, resume_reading=lambda: None
    )
    config = uvicorn.Config(lambda scope: None, http=WatchedProtocol, lifespan="off")
    config.load()
    connection = WatchedProtocol(config, uvicorn.server.ServerState(), {}, Loop())
    connection.connection_made(transport)
    assert [timer.is_on for timer in timers] == [True], "for the head of a request"
    connection.cycle = SimpleNamespace(response_complete=False)
    connection.handle_events = lambda: None
    connection.data_received(b"")
    assert [timer.is_on for timer in timers] == [False], "it is here"
    connection.pause_writing()
    connection.resume_writing()
    connection.pause_writing()
    assert [timer.is_on for timer in timers] == [False, False, True]
    connection.resume_writing()
    connection.cycle.response_complete = True
    connection.data_received(b"")
    assert [timer.is_on for timer in timers] == [False, False, False, True], "for the head of the next request"
