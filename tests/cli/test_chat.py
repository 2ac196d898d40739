"""``meristem chat``: the session behind it, every command, and a reply that can be stopped."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from meristem.cli import run
from meristem.data.chat import END_OF_REPLY
from meristem.models.config import LearnConfig
from meristem.models.generate import Sampling
from meristem.models.load import load
from meristem.serve.session import Session

PROGRAM = [sys.executable, "-c", "from meristem.cli import main; main()"]


@pytest.fixture
def chatted(finished, capsys, monkeypatch):
    """Sends lines to a chat and gives what it answered, one value for each."""

    def send(*lines, words=()):
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert run(["chat", str(finished), "--max-tokens", "9", "--json", *words]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return send


def replies(finished, *lines):
    session = Session(*load(finished), sampling=Sampling(temperature=0.2))
    found = []
    for line in lines:
        session.feed(line + "\n")
        found.append(session.generate(9, until=END_OF_REPLY))
    return found


def test_replies_are_those_of_a_session(finished, chatted):
    """Each line is read with its end, then the model writes; empty lines say nothing."""
    found = chatted("My name is Ada.", "", "What is my name?")
    assert [each["reply"] for each in found] == replies(finished, "My name is Ada.", "What is my name?")
    assert not any(each["stopped"] for each in found)


def test_words_are_plain(finished, capsys, monkeypatch):
    """Without --json the reply stands alone, with no decoration in a pipe."""
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\nnever read\n"))
    assert run(["chat", str(finished), "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == replies(finished, "Hello")[0].rstrip("\n")


def test_rollback_takes_exchanges_back(finished, chatted):
    """What follows is as if they had not been."""
    found = chatted("one", "two", "three", "/rollback 2", "four")
    assert found[3] == {"command": "/rollback", "taken_back": 2, "n_tokens": found[0]["n_tokens"]}
    assert found[4]["reply"] == replies(finished, "one", "four")[1]


def test_forget_begins_afresh(finished, chatted):
    """The same words get the first answer again."""
    found = chatted("one", "/forget", "one")
    assert found[0]["reply"] == found[2]["reply"]


def test_a_file_is_read_without_a_reply_and_taken_back(finished, chatted, tmp_path):
    """The next reply is that of a session that was given the text; bits per byte are those of its surprise."""
    path = tmp_path / "text"
    path.write_bytes(b"Ada lives in Oslo.\n\xff\n")
    read, reply, back, again = chatted(f"/read {path}", "one", "/rollback 2", "one")
    session = Session(*load(finished), sampling=Sampling(temperature=0.2))
    turn = session.feed(path.read_bytes().decode("utf-8", "surrogateescape"))
    assert (read["n_tokens"], read["bits_per_byte"]) == (turn.n_tokens, pytest.approx(turn.nats / math.log(2) / 21))
    session.feed("one\n")
    assert reply["reply"] == session.generate(9, until=END_OF_REPLY)
    assert back["taken_back"] == 2 and again["reply"] == replies(finished, "one")[0]


def test_a_saved_session_goes_on(finished, chatted, tmp_path):
    """Also in another process, under the name of its file."""
    path = tmp_path / "ada.session"
    saved = chatted("one", f"/save {path}")[1]
    assert saved["size_bytes"] == path.stat().st_size
    loaded, two = chatted(f"/load {path}", "two")
    assert (loaded["session"], two["session"]) == ("ada", "ada")
    assert two["reply"] == replies(finished, "one", "two")[1]


def test_forks_go_their_own_ways(finished, chatted):
    """A copy goes on by itself; /go returns to where the first one stands."""
    found = chatted("one", "/fork b", "two", "/go main", "three", "/go")
    assert [each.get("session") for each in found] == ["main", "b", "b", "main", "main", "main"]
    assert found[2]["reply"] == replies(finished, "one", "two")[1]
    assert found[4]["reply"] == replies(finished, "one", "three")[1]
    assert found[5]["sessions"] == {"main": found[4]["n_tokens"], "b": found[2]["n_tokens"]}


def test_weights_learn_in_a_chat(finished, chatted, tmp_path):
    """At the rate and of the kind given; a chat in which something else learns does not take the session over."""
    path, words = tmp_path / "ada.session", ("--learn", "weights", "--which", "head", "--lr", "0.5")
    chatted("one", f"/save {path}", words=words)
    session = Session.load(path, *load(finished))
    assert (session.learn, session.learning) == ("weights", LearnConfig(which="head", lr=0.5))
    error, reply = chatted(f"/load {path}", "one")
    assert error["error"]["type"] == "CheckpointMismatch" and "begin another" in error["error"]["message"]
    assert (reply["session"], reply["reply"]) == ("main", replies(finished, "one")[0])


@pytest.mark.parametrize(
    "words, message",
    [(["--which", "head"], "--learn is memory"), (["--learn", "weights", "--lr", "inf"], "--lr is inf")],
)
def test_options_of_learning_that_mean_nothing_are_refused(finished, words, message, capsys):
    assert run(["chat", str(finished), *words]) == 2
    assert message in capsys.readouterr().err


def test_memory_is_shown(chatted):
    """Layer by layer, and looking costs nothing."""
    found = chatted("one", "/memory", "two")
    assert found[1]["memory"]["n_tokens"] == found[0]["n_tokens"]
    assert set(found[1]["memory"]["layers"]) == {"layer.0.recall", "layer.1.recall"}


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("/memroy", "WrongValue", "nearest is /memory"),
        ("/save", "WrongValue", "/save FILE"),
        ("/load nowhere.session", "NoCheckpoint", "nowhere.session"),
        ("/save /dev/null/a.session", "RunError", "could not be written"),
        ("/read nowhere.txt", "DataError", "nowhere.txt"),
        ("/read", "WrongValue", "/read FILE"),
        ("/rollback 1", "WrongValue", "there were 0"),
        ("/rollback two", "WrongValue", "'two' exchanges"),
        ("/go away", "WrongValue", "there are main"),
        ("/fork main", "WrongValue", "already"),
    ],
)
def test_a_wrong_command_is_an_answer(finished, chatted, line, kind, message):
    """It says what is wrong, and the chat goes on as if it had not been."""
    error, reply = chatted(line, "one")
    assert (error["error"]["type"], message in error["error"]["message"]) == (kind, True)
    assert reply["reply"] == replies(finished, "one")[0]


def read_until(stream, mark: bytes, timeout_s: float = 60) -> bytes:
    """What comes from a pipe up to ``mark``."""
    found, until = b"", time.monotonic() + timeout_s
    while mark not in found:
        assert select.select([stream], [], [], max(0, until - time.monotonic()))[0], f"no {mark!r} after {found!r}"
        piece = os.read(stream.fileno(), 4096)
        assert piece, f"ended after {found!r}"
        found += piece
    return found


@pytest.mark.fault
def test_ctrl_c_stops_the_reply_and_not_the_program(finished):
    """A reply without end is stopped; the next line is answered; the program ends as asked."""
    chat = subprocess.Popen(
        [*PROGRAM, "chat", str(finished), "--max-tokens", "1000000", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(2):
            chat.stdin.write(b"one\n")
            chat.stdin.flush()
            assert select.select([chat.stdout], [], [], 60)[0]
            chat.send_signal(signal.SIGINT)
            read_until(chat.stdout, b"(stopped)\n")
        chat.stdin.write(b"/quit\n")
        chat.stdin.flush()
        assert chat.wait(timeout=60) == 0
        assert b"Traceback" not in chat.stderr.read()
    finally:
        chat.kill()
        chat.communicate()


@pytest.mark.fault
def test_ctrl_c_between_replies_ends_with_130(finished):
    """Where there is nothing to stop, the program is."""
    chat = subprocess.Popen(
        [*PROGRAM, "chat", str(finished), "--max-tokens", "3", "--json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        chat.stdin.write(b"/go\n")
        chat.stdin.flush()
        read_until(chat.stdout, b"\n")
        chat.send_signal(signal.SIGINT)
        assert chat.wait(timeout=60) == 130
    finally:
        chat.kill()
        chat.communicate()
