"""`meristem serve --workers`: several processes, one address, and sessions that outlive each of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import psutil
import pytest

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1800)]


@contextlib.contextmanager
def started(*words):
    """The process of a server, and its address; afterwards none of its processes is left."""
    command = [sys.executable, "-m", "meristem", "serve", *map(str, words), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        family = []
        try:
            url = json.loads(server.stdout.readline())["url"]
            family = psutil.Process(server.pid).children(recursive=True)
            yield server, url
        finally:
            server.kill()
            left = psutil.wait_procs(family, timeout=60)[1]
            for process in left:
                process.kill()
    assert left == []


def workers_of(server) -> list[psutil.Process]:
    """The processes that serve; each is the first of its group."""
    found = psutil.Process(server.pid).children(recursive=True)
    return [each for each in found if os.getpgid(each.pid) == each.pid]


def got(answer):
    assert answer.is_success, answer.text
    return answer.json()


def new_sessions(web) -> list[str]:
    """Two sessions, one for each worker."""
    found = {}
    while len(found) < 2:
        session = got(web.post("/v1/sessions", json={}))["id"]
        found[int(session[:8], 16) % 2] = session
    return [found[0], found[1]]


def say(web, session, text):
    """A turn, and what the session has read then."""
    answer = got(web.post("/v1/completions", json={"prompt": text, "session": session, "max_tokens": 3}))
    return answer["session"]["n_tokens"]


def test_sessions_outlive_their_worker(finished, tmp_path):
    """Both workers serve, each its own sessions; both die; what they acknowledged is there and goes on."""
    words = (finished, "--workers", 2, "--max-rows", 4, "--grace", 1, "--data", tmp_path)
    with started(*words) as (server, url), httpx.Client(base_url=url, timeout=300) as web:
        sessions = new_sessions(web)
        n_tokens = {session: say(web, session, "Ada lives in Oslo.\n") for session in sessions}
        forks = [got(web.post(f"/v1/sessions/{session}/fork", json={}))["id"] for session in sessions]
        assert [fork[:8] for fork in forks] == [session[:8] for session in sessions]
        assert got(web.get("/healthz"))["requests"] == {"working": 0, "waiting": 0}
        assert {each["id"] for each in got(web.get("/v1/sessions"))["data"]} >= {*sessions, *forks}
        before = workers_of(server)
        assert len(before) == 2
        for worker in before:
            worker.kill()
        psutil.wait_procs(before, timeout=60)
        for session, fork in zip(sessions, forks, strict=True):
            assert got(web.get(f"/v1/sessions/{session}"))["n_tokens"] == n_tokens[session]
            assert say(web, fork, "And Ben?\n") == say(web, session, "And Ben?\n") > n_tokens[session]
        after = workers_of(server)
        assert len(after) == 2 and not {each.pid for each in after} & {each.pid for each in before}
        refused = subprocess.run(
            [sys.executable, "-m", "meristem", "serve", str(finished), "--port", "0", "--data", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 3 and "another server uses" in refused.stderr
        # A reply under way when the signal comes is given up by its worker, which says so.
        long = {"prompt": "x", "max_tokens": 100_000, "stream": True, "session": sessions[0]}
        with web.stream("POST", "/v1/completions", json=long) as answer:
            events = answer.iter_lines()
            next(events)
            server.send_signal(signal.SIGTERM)
            assert any('"error"' in event for event in events)
        assert server.wait(120) == 0
        assert server.stderr.read().count("worker.restarted") == 2


def test_turns_of_many_are_kept_while_workers_die(finished, tmp_path):
    """Clients go on through it; each turn that was acknowledged is there, once, and no other."""
    words = (finished, "--workers", 2, "--max-rows", 4, "--grace", 1, "--data", tmp_path)
    with started(*words) as (server, url), httpx.Client(base_url=url, timeout=300) as web:

        def talk(session):
            acknowledged, n_lost = [], 0
            for number in range(12):
                with contextlib.suppress(httpx.TransportError):
                    answer = web.post(f"/v1/sessions/{session}/feed", json={"text": f"{number}\n"})
                    if answer.is_success:
                        acknowledged.append(f"{number}\n")
                        continue
                    assert answer.status_code == 503, answer.text
                n_lost += 1
            return session, acknowledged, n_lost

        sessions = [session for _ in range(3) for session in new_sessions(web)]
        with ThreadPoolExecutor(len(sessions)) as pool:
            talks = [pool.submit(talk, session) for session in sessions]
            for worker in workers_of(server):
                worker.kill()
            for session, acknowledged, n_lost in (each.result() for each in talks):
                found = [turn["text"] for turn in got(web.get(f"/v1/sessions/{session}/turns"))["data"]]
                assert len(found) == len(set(found)) and set(acknowledged) <= set(found)
                assert len(found) <= len(acknowledged) + n_lost


def test_what_keeps_workers_from_starting_is_said_once(tmp_path):
    """With the exit code of a server that is alone."""
    command = [sys.executable, "-m", "meristem", "serve", str(tmp_path / "nowhere"), "--workers", "2", "--port", "0"]
    found = subprocess.run([*command, "--data", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr.count("nowhere")) == (4, "", 1)


def test_workers_end_with_the_process_before_them(finished, tmp_path):
    """Also where that one is killed; another server can use the sessions afterwards."""
    for _ in range(2):
        with started(finished, "--workers", 2, "--max-rows", 4, "--data", tmp_path) as (server, url):
            assert got(httpx.get(f"{url}/healthz", timeout=300))["status"] == "ok"
