"""``meristem chat --url``: the commands of a chat, with the sessions of a server."""

import asyncio
import io
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import uvicorn

from meristem.cli import run
from meristem.data.chat import END_OF_REPLY
from meristem.models.generate import Sampling
from meristem.models.load import load
from meristem.serve.engine import Engine
from meristem.serve.http import Served, make_app
from meristem.serve.remote import open_remote
from meristem.serve.session import Session
from meristem.serve.sessions import Sessions


@pytest.fixture(scope="module")
def url(finished, tmp_path_factory):
    """A server of the model of ``finished``, row by row: which batches are exact is no question here."""
    loaded = load(finished)
    sessions = Sessions(tmp_path_factory.mktemp("data"), loaded.model, loaded.tokenizer)
    served = Served("ada", Engine(loaded.tokenizer.vocab_size, most_rows=1), sessions)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(served), log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture
def chatted(url, capsys, monkeypatch):
    """Sends lines to a chat and gives what it answered, one value for each, and what it said on stderr."""

    def send(*lines, words=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert run(["chat", "--url", url, "--temperature", "0", "--max-tokens", "9", "--json", *words]) == 0
        shown = capsys.readouterr()
        return [json.loads(line) for line in shown.out.splitlines()], shown.err

    return send


def test_it_talks_as_here(finished, chatted):
    """At temperature 0 the replies are those of a session of this process, without the blank line that ends one."""
    session = Session(*load(finished), sampling=Sampling(temperature=0))
    found, _ = chatted("My name is Ada.", "", "What is my name?")
    here = "".join(session.reply("My name is Ada.", 9))
    assert found[0]["reply"] == here.lstrip().partition(END_OF_REPLY)[0]
    assert found[1]["n_tokens"] > found[0]["n_tokens"] > 0 and not found[1]["stopped"]


def test_commands_do_what_they_do_here(chatted, tmp_path):
    """Sessions are forked, rolled back, saved, loaded and forgotten by the server."""
    path, text = tmp_path / "ada.session", tmp_path / "text"
    text.write_text("Ada lives in Oslo.\n")
    lines = ["one", "/fork b", "two", "/rollback 1", "two", "/go main", f"/read {text}", f"/save {path}", "/memory"]
    found, _ = chatted(*lines, f"/load {path}", "three", "/go main", "three", "/forget", "one")
    one, fork, two, back, again, go, read, saved, memory, loaded, three, _, main, forgotten, first = found
    assert (fork["session"], fork["sessions"]["b"]) == ("b", one["n_tokens"])
    assert back == {"command": "/rollback", "taken_back": 1, "n_tokens": one["n_tokens"]}
    assert (two["reply"], two["n_tokens"]) == (again["reply"], again["n_tokens"])
    assert go["sessions"] == {"main": one["n_tokens"], "b": two["n_tokens"]}
    assert read["n_tokens"] == 19 and read["bits_per_byte"] > 0
    assert saved["size_bytes"] == path.stat().st_size
    assert memory["memory"]["n_tokens"] == one["n_tokens"] + 19
    assert (loaded["session"], loaded["sessions"]["ada"]) == ("ada", one["n_tokens"] + 19)
    assert (three["session"], main["session"]) == ("ada", "main")
    assert (three["reply"], three["n_tokens"]) == (main["reply"], main["n_tokens"])
    assert forgotten["forgotten"] and (first["reply"], first["n_tokens"]) == (one["reply"], one["n_tokens"])


def test_a_session_is_gone_on_with(chatted):
    """By the id that is said at the beginning, in another process; the server keeps it."""
    found, said = chatted("one")
    session_id = said.split()[1]
    (more,), _ = chatted("/go", words=("--session", session_id))
    assert more["sessions"] == {"main": found[0]["n_tokens"]}


def test_a_reply_that_is_left_leaves_nothing(url):
    """The session stands where it stood, and can be gone on with at once."""
    with open_remote(url, None, session_id=None, settings={"learn": "none"}, drawing={"temperature": 0}) as session:
        pieces = session.reply("one", 100_000)
        next(pieces)
        pieces.close()
        assert len("".join(session.reply("one", 3))) <= 3
        assert session.turn == session.server.json("GET", f"/v1/sessions/{session.id}")["turn"] == 1


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("/load {tmp}/nowhere", "RunError", "cannot be read"),
        ("/load {tmp}/wrong", "CheckpointError", "server at"),
        ("/save /dev/null/a", "RunError", "could not be written"),
        ("/rollback 1", "WrongValue", "there were 0"),
        ("one\udcff", "WrongValue", "not UTF-8"),
    ],
)
def test_a_wrong_command_is_an_answer(chatted, tmp_path, line, kind, message):
    """One sentence, and the chat goes on."""
    (tmp_path / "wrong").write_bytes(b"no session")
    (error, reply), _ = chatted(line.format(tmp=tmp_path), "one")
    assert (error["error"]["type"], message in error["error"]["message"]) == (kind, True)
    assert reply["n_tokens"] > 0


@contextmanager
def answering(status, body, headers=()):
    """A server that gives every request the same answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps(body).encode() if not isinstance(body, bytes) else body
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", str(len(content)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def refused(capsys, *words) -> tuple[int, str]:
    code = run(["chat", *words])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return code, said


def error_body(message, code):
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


@pytest.mark.parametrize(
    "status, body, message",
    [
        (401, error_body("this key is not known.", "invalid_api_key"), "Give --key, or set MERISTEM_KEY"),
        (404, error_body("Not Found", None), "says: Not Found"),
        (429, error_body("too many requests.", "rate_limit"), "takes requests again in 7 s"),
        (502, b"<html>", "502 Bad Gateway"),
        (200, b"<html>", "is no server of meristem"),
        (200, {"data": [{"id": "x", "owned_by": "somebody"}]}, "is no server of meristem"),
    ],
)
def test_what_a_server_refuses_is_one_sentence(capsys, status, body, message):
    with answering(status, body, [("Retry-After", "7")]) as url:
        code, said = refused(capsys, "--url", url)
    assert message in said and url in said and code in (2, 3)


def test_where_no_server_is(capsys):
    """A port that nobody listens at, an address that is none, a session that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    code, said = refused(capsys, "--url", f"http://127.0.0.1:{port}")
    assert (code, "no server answers at" in said, "meristem serve" in said) == (3, True, True)
    assert refused(capsys, "--url", "localhost:8000")[0] == 2


def test_what_does_not_go_together_is_refused(url, capsys):
    assert "there is no session 'x'" in refused(capsys, "--url", url, "--session", "x")[1]
    assert "It serves 'ada'" in refused(capsys, "--url", url, "--session", "x")[1]
    assert "CKPT and --url" in refused(capsys, "runs/ada", "--url", url)[1]
    assert "--device and --url" in refused(capsys, "--device", "cuda", "--url", url)[1]
    assert "Add --url" in refused(capsys, "--session", "x")[1]


def test_the_key_is_sent(capsys, monkeypatch):
    """From the environment as well; it is in no message."""
    seen = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(401)
            self.end_headers()

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert "sk-1" not in refused(capsys, "--url", url, "--key", "sk-1")[1]
        monkeypatch.setenv("MERISTEM_KEY", "sk-2")
        refused(capsys, "--url", url)
        server.shutdown()
        thread.join()
    assert seen == ["Bearer sk-1", "Bearer sk-2"]
