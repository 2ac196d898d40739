"""A tokenizer of the hub is fetched over HTTP by the library's own code, from a server on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

pytestmark = [pytest.mark.extras, pytest.mark.timeout(120)]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/small"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two addresses of a hub that are asked: what a revision holds, and a file of it."""

    files: dict[str, bytes]
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            found = [{"type": "file", "path": name, **_sizes(content)} for name, content in self.files.items()]
            self._answer(json.dumps(found).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and path.rpartition("/")[2] in self.files:
            content = self.files[path.rpartition("/")[2]]
            self._answer(content, {"ETag": f'"{_sizes(content)["oid"]}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _sizes(content: bytes) -> dict[str, str | int]:
    """As git has them."""
    return {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub that holds one tokenizer, and weights that nobody has asked for."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<end>"])
    model.train_from_iterator(["a small text with small words\n"] * 20, trainer)
    Hub.files = {
        "tokenizer.json": model.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<end>"}).encode(),
        "model.safetensors": b"not to be fetched",
    }
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def prepared(place: Path, endpoint: str, *words: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    """``meristem data prepare`` in a process that has never heard of another hub."""
    (place / "text.txt").write_text("small words, and a few of them\n" * 50)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "meristem", "data", "prepare", f"data.source={place / 'text.txt'}"]
    command += [f"data.root={place / 'store'}", "tokenizer.kind=hf", f"tokenizer.path={name}@{COMMIT}", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_cx_1_a_tokenizer_of_the_hub_is_fetched_only_when_allowed_and_kept(hub, tmp_path):
    """By its commit; its files alone; and then it is here, whether the hub is or not."""
    refused = prepared(tmp_path, hub)
    assert refused.returncode == 4 and "data.download=true" in refused.stderr and Hub.asked == []
    fetched = prepared(tmp_path, hub, "data.download=true", "--json")
    assert fetched.returncode == 0, (fetched.stdout, Hub.asked)
    assert {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = prepared(tmp_path, "http://127.0.0.1:9", "--json")
    assert again.returncode == 0, again.stderr
    one, two = (json.loads(done.stdout)["fingerprint"] for done in (fetched, again))
    assert one == two


def test_cx_1_a_hub_without_the_name_is_one_sentence(hub, tmp_path):
    done = prepared(tmp_path, hub, "data.download=true", name="somebody/else")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "the tokenizer of somebody/else" in done.stderr and "Check the name and the network." in done.stderr
