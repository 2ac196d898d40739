"""SIGKILL of a server at work: every turn that it acknowledged is there afterwards, and everything opens."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from meristem.serve import store

pytestmark = pytest.mark.fault

N_KILLS = 50
N_WRITERS = 4
MOST_ANSWERS = 16
"""After how many answers to all writers a server is killed at the latest."""
LONGEST_S = 0.05
"""How long after that answer at most: some part of the requests that are then at work."""


class Writer:
    """One client, which says what it knows of its sessions.

    known: by session, what was acknowledged of each turn. unsure: the session that a request without an answer was
    for, and what that request would have left of its turns: a number of them, None where it would have deleted it.
    """

    def __init__(self, number: int, answered: threading.Semaphore) -> None:
        self.draw, self.answered = random.Random(number), answered
        self.known: dict[str, list[tuple[str, str]]] = {}
        self.unsure: tuple[str, int | None] | None = None

    def work(self, url: str) -> None:
        """Requests one after the other, until the server is gone."""
        with httpx.Client(base_url=url, timeout=60) as web, contextlib.suppress(httpx.TransportError):
            while True:
                self._request(web)
                self.answered.release()

    def _request(self, web: httpx.Client) -> None:
        self.unsure = None
        if len(self.known) < 2:
            self.known[_answer(web.post("/v1/sessions", json={}))["id"]] = []
            return
        session = self.draw.choice(list(self.known))
        turns, path = self.known[session], f"/v1/sessions/{session}"
        kind = self.draw.choices(("feed", "reply", "stream", "fork", "rollback", "delete"), (4, 4, 4, 1, 2, 1))[0]
        text = f"{self.draw.random()}: Ada lives in Oslo.\n"
        if kind == "delete":
            self.unsure = session, None
            _answer(web.delete(path))
            del self.known[session]
        elif kind == "rollback":
            to = max(0, len(turns) - self.draw.randint(1, 3))
            self.unsure = session, to
            _answer(web.post(f"{path}/rollback", json={"to": to}))
            del turns[to:]
        elif kind == "fork" and len(self.known) < 4:
            self.known[_answer(web.post(f"{path}/fork", json={}))["id"]] = list(turns)
        else:
            self.unsure = session, len(turns) + 1
            if kind == "feed":
                _answer(web.post(f"{path}/feed", json={"text": text}))
                turns.append((text, ""))
            else:
                reply = self._reply if kind == "reply" else self._stream
                turns.append((text, reply(web, path, {"prompt": text, "max_tokens": 4})))

    def _reply(self, web: httpx.Client, path: str, body: dict[str, object]) -> str:
        return _answer(web.post(f"{path}/generate", json=body))["choices"][0]["text"]

    def _stream(self, web: httpx.Client, path: str, body: dict[str, object]) -> str:
        """A turn is acknowledged by the chunk with a finish_reason; what comes behind it may be lost."""
        text, is_done = "", False
        try:
            with web.stream("POST", f"{path}/generate", json=body | {"stream": True}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))["choices"][0]
                        text, is_done = text + chunk["text"], chunk["finish_reason"] is not None
        except httpx.TransportError:
            if not is_done:
                raise
        assert is_done
        return text

    def check(self, web: httpx.Client) -> None:
        """What was acknowledged is there; of what was not, the whole or nothing; and each memory opens."""
        for session, turns in list(self.known.items()):
            answer = web.get(f"/v1/sessions/{session}/turns")
            about, left = self.unsure or ("", None)
            if answer.status_code == 404:
                assert (about, left) == (session, None), f"session {session} with {len(turns)} turns is lost"
                del self.known[session]
                continue
            found = [(turn["text"], turn["reply"]) for turn in _answer(answer)["data"]]
            assert [turn["turn"] for turn in answer.json()["data"]] == list(range(1, len(found) + 1))
            allowed = {len(turns)} | ({left} if about == session and left is not None else set())
            assert len(found) in allowed and all(a == b for a, b in zip(found, turns, strict=False))
            self.known[session] = found
            memory, record = (_answer(web.get(f"/v1/sessions/{session}{path}")) for path in ("/memory", ""))
            assert memory["n_tokens"] == record["n_tokens"]
        self.unsure = None


def _answer(answer: httpx.Response) -> dict:
    assert answer.is_success, answer.text
    return answer.json()


@contextlib.contextmanager
def forked(words: list[str]) -> Iterator[subprocess.Popen]:
    program = [sys.executable, str(Path(__file__).with_name("forked_servers.py")), *words]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            yield parent
        finally:
            parent.kill()


@pytest.mark.timeout(3600)
def test_every_acknowledged_turn_outlives_sigkill(finished, tmp_path):
    """At fifty moments, each under the requests of four clients; after each, all that they know is compared."""
    draw = random.Random(3)
    data = tmp_path / "data"
    answered = threading.Semaphore(0)
    writers = [Writer(number, answered) for number in range(N_WRITERS)]
    words = ["serve", str(finished), "--port", "0", "--max-rows", "4", "--data", str(data), "--json"]
    with forked(words) as parent:
        for _ in range(N_KILLS):
            print("", file=parent.stdin, flush=True)
            server = json.loads(parent.stdout.readline())["pid"]
            url = json.loads(parent.stdout.readline())["url"]
            with httpx.Client(base_url=url, timeout=60) as web:
                for writer in writers:
                    writer.check(web)
            threads = [threading.Thread(target=writer.work, args=(url,)) for writer in writers]
            for thread in threads:
                thread.start()
            for _ in range(draw.randint(0, MOST_ANSWERS)):
                assert answered.acquire(timeout=120)
            time.sleep(draw.uniform(0, LONGEST_S))
            os.kill(server, signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert json.loads(parent.stdout.readline()) == {"status": signal.SIGKILL}
    database = sqlite3.connect(data / "sessions.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    for (name,) in database.execute("SELECT DISTINCT file FROM turns WHERE file IS NOT NULL").fetchall():
        assert store.read(data / "states" / name).header["turn"] > 0
    database.close()
