"""`meristem serve` as a process, and what it refuses."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from meristem.cli import run
from meristem.cli.serve import listen_at
from meristem.errors import KeyRefused
from meristem.serve.keys import Keys


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::"])
def test_without_a_key_it_listens_on_this_machine_alone(host, tmp_path, capsys):
    """Also with one that opens nothing any more."""
    assert run(["serve", "--host", host, "--data", str(tmp_path)]) == 2
    assert "listens at 127.0.0.1 alone" in capsys.readouterr().err
    assert run(["keys", "add", "ada", "--data", str(tmp_path)]) == 0
    assert run(["keys", "revoke", "ada", "--data", str(tmp_path)]) == 0
    assert run(["serve", "--host", host, "--data", str(tmp_path)]) == 2


def test_cx_11_4_a_model_that_cannot_be_loaded_is_no_server(make_run, tmp_path, capsys):
    """CX-11.4: the command ends with the file that is damaged; no other model answers in its place."""
    broken = make_run("broken")
    for weights in broken.rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    assert run(["serve", str(broken), "--port", "0", "--data", str(tmp_path / "data")]) == 4
    assert "model.safetensors" in capsys.readouterr().err


def test_a_key_is_printed_once(tmp_path, capsys):
    """It is the whole of stdout when it is made; the list has its name alone."""
    place = ["--data", str(tmp_path)]
    assert run(["keys", "ls", *place]) == 0 and "no keys" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run(["keys", "add", "ada", *place]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys(tmp_path).check(key).name == "ada"
    assert run(["keys", "add", "prometheus", "--metrics", *place, "--json"]) == 0
    assert Keys(tmp_path).check(json.loads(capsys.readouterr().out)["key"]).opens == "metrics"
    assert run(["keys", "ls", *place, "--json"]) == 0
    listed = capsys.readouterr().out
    assert [(each["name"], each["revoked"]) for each in json.loads(listed)] == [("ada", None), ("prometheus", None)]
    assert key.rpartition("_")[2] not in listed
    assert run(["keys", "add", "ada", *place]) == 2
    assert run(["keys", "add", "ada", "--replace", *place]) == 0
    with pytest.raises(KeyRefused):
        Keys(tmp_path).check(key)


ASKED_WHEN_IT_BEGINS = """
import gc, pathlib, sys
from meristem.cli import serve
serve.json_line = lambda said: sys.exit(f"{gc.get_freeze_count()} {len(gc.get_objects())}")
serve.serve(port=0, data=pathlib.Path(sys.argv[1]), as_json=True)
"""


@pytest.mark.slow
def test_collections_pass_over_what_was_there_at_the_beginning(tmp_path):
    """A full one would walk through libraries and model, and hold up every reply for as long."""
    command = [sys.executable, "-c", ASKED_WHEN_IT_BEGINS, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    n_passed_over, n_walked = map(int, found.stderr.split())
    assert n_walked < n_passed_over / 100


@contextlib.contextmanager
def started(*words):
    """A server as a process, and its address."""
    command = [sys.executable, "-m", "meristem", "serve", "--port", "0", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server, json.loads(server.stdout.readline())["url"]
        finally:
            server.kill()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=300)


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_a_server_comes_up_and_ends_on_a_signal(tmp_path):
    """Without a checkpoint it serves the model that comes along. A reply that is written when SIGTERM comes ends in
    time or is given up, and the exit code is 0. Every turn that was acknowledged is there in the next server; one on
    the same directory is refused meanwhile."""
    place = ["--data", str(tmp_path)]
    with started(*place, "--grace", "0") as (server, url):
        session = json.load(post(f"{url}/v1/sessions", {}))["id"]
        post(f"{url}/v1/sessions/{session}/feed", {"text": "Ada lives in Oslo.\n"})
        command = [sys.executable, "-m", "meristem", "serve", "--port", "0", *place, "--json"]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 3 and "another server uses" in refused.stdout
        long = {"prompt": "x", "max_tokens": 100_000, "stream": True, "session": session}
        with post(f"{url}/v1/completions", long) as stream:
            stream.readline()
            server.send_signal(signal.SIGTERM)
            assert b'"error"' in stream.read(), "the last event says that the reply was given up"
        assert server.wait(60) == 0
    with started(*place, "--grace", "300", "--access-log", "-") as (server, url):
        said = {"messages": [{"role": "user", "content": "Where does Ada live?"}], "temperature": 0, "session": session}
        with post(f"{url}/v1/chat/completions", said | {"stream": True}) as stream:
            stream.readline()
            server.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in stream.read().splitlines() if line.startswith(b"data: {")]
        assert "Oslo" in "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        assert server.wait(60) == 0
        (line,) = [json.loads(each) for each in server.stderr]
        assert (line["route"], line["status"]) == ("/v1/chat/completions", 200)
    with started(*place) as (server, url):
        with urllib.request.urlopen(f"{url}/v1/sessions/{session}/turns", timeout=300) as found:
            assert [turn["text"] for turn in json.load(found)["data"]] == [
                "Ada lives in Oslo.\n",
                "Where does Ada live?",
            ]
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130


def test_no_answer_waits_for_that_to_the_piece_before() -> None:
    """Small pieces leave at once (TCP_NODELAY), on the connections of one process and of workers, both asyncio's."""

    async def is_sent_at_once() -> bool:
        listening, _ = listen_at("127.0.0.1", 0)
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            is_on = bool(await found)
            writer.close()
        return is_on

    assert asyncio.run(is_sent_at_once())
