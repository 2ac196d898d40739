"""`meristem serve` as a process, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from meristem.cli import run


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::"])
def test_it_listens_on_this_machine_alone(host, capsys):
    assert run(["serve", "--host", host]) == 2
    assert "listens at 127.0.0.1 alone" in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_a_server_comes_up_and_ends_on_a_signal(tmp_path):
    """Without a checkpoint it serves the model that comes along; a turn that it acknowledged is there after SIGTERM in
    the middle of a reply, and a second server on the same directory is refused."""
    command = [sys.executable, "-m", "meristem", "serve", "--port", "0", "--data", str(tmp_path), "--json"]

    def post(url, body):
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    sessions = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
            try:
                url = json.loads(server.stdout.readline())["url"]
                if not sessions:
                    sessions.append(json.load(post(f"{url}/v1/sessions", {}))["id"])
                    post(f"{url}/v1/sessions/{sessions[0]}/feed", {"text": "Ada lives in Oslo.\n"})
                    refused = subprocess.run(command, capture_output=True, text=True, check=False)
                    assert refused.returncode == 3 and "another server uses" in refused.stdout
                said = {"messages": [{"role": "user", "content": "Where does Ada live?"}], "temperature": 0}
                reply = json.load(post(f"{url}/v1/chat/completions", said | {"session": sessions[0]}))
                assert "Oslo" in reply["choices"][0]["message"]["content"]
                long = {"prompt": "x", "max_tokens": 100_000, "stream": True, "session": sessions[0]}
                with post(f"{url}/v1/completions", long) as stream:
                    stream.readline()
                    server.send_signal(signal.SIGTERM)
                    # The last event says that the reply was given up.
                    assert b'"error"' in stream.read()
                assert server.wait(60) == -signal.SIGTERM
            finally:
                server.kill()
