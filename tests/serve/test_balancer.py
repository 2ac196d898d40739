"""nginx before two servers, with the configuration of docs/deployment.md."""

import itertools
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from serving import error_of, new_session, serving

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed: apt-get install nginx-light"),
]
PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
MACHINES = ("10.0.0.11:8000", "10.0.0.12:8000")


def configuration(place: Path, urls: list[str]) -> str:
    """That of the page, with addresses of this machine, in a frame for a process without rights."""
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for machine, url in zip(MACHINES, urls, strict=True):
        assert machine in text
        text = text.replace(machine, url.removeprefix("http://"))
    assert "listen 8080;" in text
    text = text.replace("listen 8080;", f"listen unix:{place}/socket;")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {place}/{kind};" for kind in kinds)
    head = f"daemon off; master_process off; pid {place}/pid; error_log {place}/errors; events {{}}\n"
    return f"{head}http {{ access_log off; {paths}\n{text}\n}}\n"


@pytest.fixture
def balanced(tmp_path):
    """A client of the balancer, clients of the servers behind it, and their engines."""
    with serving(tmp_path / "a") as (a, at_a), serving(tmp_path / "b") as (b, at_b):
        (tmp_path / "nginx.conf").write_text(configuration(tmp_path, [a, b]))
        command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-e", str(tmp_path / "errors")]
        with subprocess.Popen(command) as nginx:
            try:
                until = time.monotonic() + 60
                while not (tmp_path / "socket").exists():
                    assert nginx.poll() is None and time.monotonic() < until, (tmp_path / "errors").read_text()
                    time.sleep(0.02)
                through = httpx.HTTPTransport(uds=str(tmp_path / "socket"))
                with httpx.Client(transport=through, base_url="http://127.0.0.1", timeout=120) as web:
                    machines = [httpx.Client(base_url=url, timeout=120) for url in (a, b)]
                    yield web, machines, (at_a.engine, at_b.engine)
            finally:
                nginx.terminate()
    assert (tmp_path / "errors").read_text() == ""


def test_each_session_stays_with_one_machine(balanced):
    """Whichever it was made on: by its path, and where the body alone names it by its header; forks and imports too."""
    web, machines, _ = balanced
    sessions = [new_session(web) for _ in range(16)]
    for session in sessions:
        assert web.post(f"/v1/sessions/{session}/feed", json={"text": "Ada lives in Oslo.\n"}).status_code == 200
        fork = web.post(f"/v1/sessions/{session}/fork", json={}).json()["id"]
        assert web.get(f"/v1/sessions/{fork}/turns").json()["data"][0]["text"] == "Ada lives in Oslo.\n"
        head = {"Meristem-Session": session}
        reply = web.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=head).json()
        assert reply["session"]["id"] == session
    content = web.get(f"/v1/sessions/{sessions[0]}/export").content
    put = web.post("/v1/sessions/import", content=content).json()["id"]
    assert web.get(f"/v1/sessions/{put}").json()["n_tokens"] > 0
    # Each machine has its share, and none has what another has.
    owned = [{each["id"] for each in machine.get("/v1/sessions").json()["data"]} for machine in machines]
    assert owned[0] and owned[1] and not owned[0] & owned[1] and {*sessions, put} <= owned[0] | owned[1]


def test_a_stream_comes_as_it_is_made(balanced):
    """Its first event is here before the last token is drawn; leaving ends it, and nothing of the turn is kept."""
    web, machines, engines = balanced
    may_end = threading.Event()

    def hold_up(engine):
        rounds, step = itertools.count(), engine.step

        def held_up():
            if next(rounds) == 3:
                assert may_end.wait(120)
            step()

        engine.step = held_up

    for engine in engines:
        hold_up(engine)
    session = new_session(web)
    body = {"prompt": "x", "max_tokens": 20, "stream": True}
    with web.stream("POST", f"/v1/sessions/{session}/generate", json=body) as answer:
        events = answer.iter_lines()
        assert json.loads(next(events).removeprefix("data: "))["choices"]
        may_end.set()
        assert list(events)[-2] == "data: [DONE]"
    with web.stream("POST", f"/v1/sessions/{session}/generate", json=body | {"max_tokens": 100_000}) as answer:
        next(answer.iter_lines())
    while any(machine.get("/healthz").json()["requests"]["working"] for machine in machines):
        time.sleep(0.02)
    assert web.get(f"/v1/sessions/{session}").json()["turn"] == 1


def test_headers_of_balancers_are_checked(balanced):
    """Also where none stands before the server."""
    _, (machine, _), _ = balanced
    place = {"Meristem-Place": "0123abcd"}
    made = machine.post("/v1/sessions", json={}, headers=place).json()["id"]
    assert made.startswith("0123abcd") and len(made) == 32
    for wrong in ("0123", "0123ABCD", "../../..", "0123abcd0"):
        error_of(machine.post("/v1/sessions", json={}, headers={"Meristem-Place": wrong}), 400)
    said = {"prompt": "x", "session": made}
    error_of(machine.post("/v1/completions", json=said, headers={"Meristem-Session": "5" * 32}), 400)
    error_of(machine.post("/v1/completions", json={"prompt": "x"}, headers={"Meristem-Session": "5" * 32}), 404)
