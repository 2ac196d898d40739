"""``meristem sample`` writes what the session writes, as it writes it."""

import io
import json
import re
import sys

import pytest
import torch

from meristem.cli import main, run
from meristem.cli.sample import open_session
from meristem.device.resolve import available
from meristem.models.generate import Sampling
from meristem.models.load import load
from meristem.serve.session import Session


def continuation(finished, prompt, max_tokens, **sampling):
    session = Session(*load(finished), sampling=Sampling(**sampling), random_seed=5)
    if prompt:
        session.feed(prompt)
    return session.generate(max_tokens)


@pytest.mark.parametrize("prompt", ["", "def main("])
def test_text_is_that_of_a_session(finished, prompt, capsys):
    """The prompt is read, what follows is printed, and nothing else is."""
    assert run(["sample", str(finished), "--prompt", prompt, "--max-tokens", "31", "--seed", "5"]) == 0
    assert capsys.readouterr().out == continuation(finished, prompt, 31) + "\n"


def test_prompt_from_stdin(finished, monkeypatch, answered):
    """--stdin reads all of it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    code, value = answered("sample", finished, "--stdin", "--max-tokens", 7, "--seed", 5, "--top-k", 3)
    assert (code, value["prompt"], value["n_read"], value["n_written"]) == (0, "two\nlines", 9, 7)
    assert value["text"] == continuation(finished, "two\nlines", 7, top_k=3)


def test_settings_act(finished, answered):
    """A8.11: Cold sampling is greedy, hot sampling is not; top-k 1 is greedy at any temperature."""

    def text(*words):
        return answered("sample", finished, "--prompt", "a", "--max-tokens", 12, *words)[1]["text"]

    greedy = text("--temperature", 0)
    assert text("--temperature", 1e-6, "--seed", 1) == greedy == text("--temperature", 5, "--top-k", 1)
    assert text("--temperature", 5, "--seed", 1) != greedy
    assert text("--temperature", 5, "--seed", 1) != text("--temperature", 5, "--seed", 2)


def test_a_terminal_is_not_driven(finished, capsys, monkeypatch):
    """Control characters that a model writes are shown, where a person looks, and passed on, where a program reads."""
    words = ["sample", str(finished), "--prompt", "a", "--max-tokens", "60", "--temperature", "9"]
    run(words)
    written = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(words)
    shown = capsys.readouterr().out
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", written)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown)


@pytest.fixture
def piped(capfdbinary, monkeypatch):
    """Runs the installed program's entry point with bytes in its pipe; gives the exit code and what it printed."""

    def ask(content: bytes, *words: object) -> tuple[object, bytes]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        monkeypatch.setattr("sys.argv", ["meristem", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capfdbinary.readouterr().out

    return ask


def test_gr3_a_pipe_is_read_as_bytes(finished, piped):
    """No UTF-8, half a character at the end, carriage returns: a byte-level tokenizer knows every byte."""
    code, out = piped(b"a\377b\r\n\xc3", "data", "tokenizer", "encode", finished, "--json")
    assert (code, json.loads(out)) == (0, [97, 255, 98, 13, 10, 195])
    code, out = piped("wäh".encode()[:2], "sample", finished, "--stdin", "--max-tokens", 5, "--json")
    assert (code, json.loads(out)["prompt"], json.loads(out)["n_read"]) == (0, "w\ufffd", 2)
    code, out = piped(b"a\xff\r\n/memory\r\n", "chat", finished, "--max-tokens", 1, "--json")
    replied, looked_at = map(json.loads, out.splitlines())
    assert (code, replied["n_tokens"], looked_at["memory"]["n_tokens"]) == (0, 4, 4)


def test_gr3_an_argument_is_read_as_bytes(finished, answered):
    """A shell may hand over any bytes; Python carries those that are no UTF-8 as U+DC80 to U+DCFF."""
    assert answered("data", "tokenizer", "encode", finished, "a\udcff") == (0, [97, 255])
    code, value = answered("sample", finished, "--prompt", "a\udcff", "--max-tokens", 3)
    assert (code, value["prompt"], value["n_read"], value["n_written"]) == (0, "a\ufffd", 2, 3)


@pytest.mark.parametrize("max_tokens", [1, 5])
@pytest.mark.parametrize("words", [["--prompt", ""], [], ["--stdin"]])
def test_gr2_no_more_is_written_than_was_asked_for(finished, answered, monkeypatch, words, max_tokens):
    """Without a prompt a line end is read before the first token, and counts as read."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, value = answered("sample", finished, *words, "--max-tokens", max_tokens, "--seed", 5)
    assert (code, value["prompt"], value["n_read"], value["n_written"]) == (0, "", 1, max_tokens)
    assert value["text"] == continuation(finished, "", max_tokens)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--prompt", "a", "--stdin"], 2, "both --prompt and --stdin"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--top-p", "0"], 2, "top_p is 0"),
        (["--max-tokens", "0"], 2, "max-tokens"),
    ],
)
def test_wrong_settings_are_refused(finished, words, code, message, capsys):
    """Before anything is written."""
    assert run(["sample", str(finished), *words]) == code
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("gpu", 2, "device.device: found 'gpu'"),
        ("cuda:99", 3, "there is no device 'cuda:99' here; found .*cpu. Set device.device to one of these or auto"),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "chat", "eval"])
def test_device_is_checked_as_the_setting_is(verb, name, code, message, finished, monkeypatch, capsys):
    """Every verb that runs a model takes --device, and says of a wrong one what device.device says."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run([verb, str(finished), "--device", name]) == code
    assert re.search(message, capsys.readouterr().err)


def test_device_holds_the_model(finished):
    """CX-7.5: The session reads where --device says; ``auto`` is the best device of this machine."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    for name, expected in (("cpu", "cpu"), ("auto", available()[0])):
        session = open_session(finished, device=name, **settings)
        assert next(session.model.parameters()).device == torch.device(expected)
