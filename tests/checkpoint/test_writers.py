"""Two writers of one file: nobody fails, a reader meets one of the two whole, and nothing is left behind."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from meristem.checkpoint import atomic
from meristem.checkpoint.atomic import write_atomic
from meristem.checkpoint.store import INDEX, entries, pin, save, unpin
from meristem.data.tokenizer import byte_tokenizer
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.serve.session import Session

N_WRITES = 200
WRITER = """
import sys
from pathlib import Path
from meristem.checkpoint.atomic import write_atomic
for number in range(int(sys.argv[3])):
    write_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 65537)
"""
KILLED = """
import os, sys
from pathlib import Path
from meristem.checkpoint.atomic import replacing
with replacing(Path(sys.argv[1])) as descriptor:
    os.write(descriptor, b"half")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Nothing here takes the power away, so waiting for the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def at_once(*actions):
    """Run the actions in a thread each, and raise what any of them failed with."""
    failures, start = [], threading.Barrier(len(actions))

    def guarded(action):
        start.wait()
        try:
            action()
        except BaseException as failure:  # noqa: BLE001 - raised below
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_gr11_threads_that_write_one_file(tmp_path):
    """Four threads write, one reads: every read is whole, nobody fails, and one name is left."""
    path = tmp_path / "run.json"
    contents = [letter * 65537 for letter in (b"a", b"b", b"c", b"d")]
    write_atomic(path, contents[0])
    torn = []

    def write(content):
        for _ in range(N_WRITES):
            write_atomic(path, content)

    def read():
        torn.extend(found for _ in range(N_WRITES) if (found := path.read_bytes()) not in contents)

    at_once(*[lambda content=content: write(content) for content in contents], read)
    assert torn == []
    assert os.listdir(tmp_path) == ["run.json"]


def test_gr11_processes_that_write_one_file(tmp_path):
    """Processes as well."""
    path = tmp_path / "run.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, letter, str(N_WRITES)]) for letter in "ab"]
    found = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            found.add(path.read_bytes())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert found <= {b"a" * 65537, b"b" * 65537}
    assert os.listdir(tmp_path) == ["run.json"]


def test_gr11_the_last_to_end_wins(tmp_path):
    """Not the last to begin."""
    path = tmp_path / "a"
    with atomic.replacing(path) as slow:
        os.write(slow, b"slow")
        write_atomic(path, b"quick")
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["a"]


def test_gr11_what_a_dead_writer_left_is_taken_over(tmp_path):
    """A killed writer leaves a temporary; the next write of that file leaves none."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["a"])


def test_gr11_sessions_saved_to_one_path(tmp_path):
    """Two sessions of one name: the file is one of them, whole, at every moment."""
    model = build(
        ModelConfig(dim=12, n_layers=1, n_heads=2, sliding_window=5), MemoryConfig(head_dim=6, chunk=7), 256, 0
    )
    tokenizer, path = byte_tokenizer(), tmp_path / "ada"
    sessions = [Session(model, tokenizer, name=name) for name in ("one", "two")]
    for session in sessions:
        session.feed(session.name)
    sessions[0].save(path)

    def save_often(session):
        for _ in range(40):
            session.save(path)

    def load_often():
        for _ in range(40):
            assert Session.load(path, model, tokenizer).name in ("one", "two")

    at_once(*[lambda session=session: save_often(session) for session in sessions], load_often)
    assert os.listdir(tmp_path) == ["ada"]


def test_gr11_pin_beside_the_saver(tmp_path):
    """Pins set and taken away while checkpoints are saved: all are whole, the index can be read, nobody fails."""

    def save_one(step):
        return save(tmp_path, step=step, trees={"model": {"w": torch.ones(7)}}, values={}, files={}, header={})

    first = save_one(1)

    def save_often():
        for step in range(2, 40):
            save_one(step)

    def pin_often():
        for _ in range(60):
            pin(first)
            unpin(first)

    at_once(save_often, pin_often)
    assert [entry.step for entry in entries(tmp_path)] == list(range(1, 40))
    assert (tmp_path / INDEX).read_bytes().startswith(b"{")
    assert not list(tmp_path.rglob(".*"))
