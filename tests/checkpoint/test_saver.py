"""A checkpoint written beside the training is the one that was asked for, and no failure of it stays in its thread."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from meristem.checkpoint.saver import Saver
from meristem.checkpoint.snapshots import SnapshotBuffer, needed_bytes
from meristem.checkpoint.store import entries, newest, open_checkpoint, save
from meristem.errors import DiskFull
from meristem.events import silent

from .sample import number_of, save_sample


def fail(message="broken"):
    raise OSError(errno.EIO, message)


def ignore(path):
    """A ``done`` with nothing to do."""


class Gate:
    """A write that lasts until it is let through."""

    def __init__(self, path=Path("written")):
        self.begun, self.opened, self.path = threading.Event(), threading.Event(), path

    def __call__(self):
        self.begun.set()
        assert self.opened.wait(60)
        return self.path


def test_training_goes_on_while_it_is_written(tmp_path):
    """``submit`` returns before the write has ended; ``done`` hears of the path once it has, in the same thread."""
    gate, heard = Gate(tmp_path), []
    with Saver() as saver:
        saver.submit(gate, done=lambda path: heard.append((path, threading.current_thread().name)))
        assert gate.begun.wait(60) and saver.is_busy and heard == []
        saver.poll()
        gate.opened.set()
        saver.wait()
        assert heard == [(tmp_path, "saver")] and not saver.is_busy


def test_one_at_a_time():
    """A second one waits for the first: nothing piles up."""
    first, trail = Gate(), []
    with Saver() as saver:
        saver.submit(first, done=lambda path: trail.append("first"))
        assert first.begun.wait(60)
        threading.Timer(0.05, first.opened.set).start()
        saver.submit(lambda: trail.append("second") or Path("b"), done=ignore)
        saver.wait()
    assert trail == ["first", "second"]


@pytest.mark.parametrize("meet", ["wait", "close", "submit", "poll", "the end of the block"])
@pytest.mark.parametrize("where", ["write", "done"])
def test_a_failure_is_raised_once_where_the_run_is(meet, where):
    """In the main thread, at the next call, with its own type; after that the saver can be used again."""
    saver, written = Saver(), []
    write, done = (fail, ignore) if where == "write" else (lambda: Path("a"), lambda path: fail())
    saver.submit(write, done=done)
    while saver.is_busy:
        pass
    calls = {
        "wait": saver.wait,
        "close": saver.close,
        "poll": saver.poll,
        "submit": lambda: saver.submit(lambda: written.append(1), done=ignore),
        "the end of the block": lambda: saver.__exit__(None, None, None),
    }
    with pytest.raises(OSError, match="broken"):
        calls[meet]()
    assert written == []
    for call in calls.values():
        call()
    saver.wait()
    assert written == [1]


def test_a_failure_at_the_end_hides_no_other():
    """The block has failed for a reason of its own: both are told, one as the context of the other."""
    with pytest.raises(OSError, match="broken") as raised, Saver() as saver:
        saver.submit(fail, done=ignore)
        raise ValueError("the run's own")
    assert str(raised.value.__context__) == "the run's own"


def test_what_is_read_is_held_from_the_submission_on():
    """Were it held only when the thread begins to write, the next snapshot might already lie in its place."""
    trees = {"model": {"a": torch.ones(64, dtype=torch.uint8)}}
    buffer = SnapshotBuffer(n_snapshots=2, capacity_bytes=needed_bytes(trees), max_bytes=1 << 10)

    def take(step):
        trees["model"]["a"].fill_(step)
        return buffer.take(trees, {}, step=step, tag="save", is_valid=True)

    gate, saver = Gate(), Saver()
    snapshot = take(1)
    saver.submit(gate, done=ignore, reading=buffer.pinned(snapshot))
    for step in range(2, 6):
        take(step)
    assert snapshot.trees["model"]["a"].eq(1).all()
    gate.opened.set()
    saver.wait()
    for step in range(6, 8):
        take(step)
    assert snapshot not in buffer.snapshots()


@pytest.mark.parametrize("broken", ["write", "thread"])
def test_what_is_read_is_let_go_whatever_fails(monkeypatch, broken):
    """A failed write, or no thread to write in, leaves nothing held."""
    trees = {"model": {"a": torch.ones(3)}}
    buffer, saver = SnapshotBuffer(n_snapshots=1, capacity_bytes=64, max_bytes=64), Saver()
    snapshot = buffer.take(trees, {}, step=1, tag="save", is_valid=True)
    if broken == "thread":
        monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises((OSError, RuntimeError), match="broken"):
        saver.submit(fail, done=ignore, reading=buffer.pinned(snapshot))
        saver.wait()
    monkeypatch.undo()
    saver.wait()
    assert buffer.take(trees, {}, step=2, tag="save", is_valid=True) is buffer.latest()


def test_a_checkpoint_from_the_ring_is_that_of_its_step(tmp_path):
    """The weights move on while it is written; on the disk is what they were, to the bit."""
    weight = torch.zeros(1 << 20)
    trees = {"model": {"w": weight}}
    buffer = SnapshotBuffer(n_snapshots=2, capacity_bytes=needed_bytes(trees), max_bytes=1 << 24)
    with Saver() as saver:
        for step in range(1, 6):
            weight.fill_(step)
            taken = buffer.take(trees, {"step": step}, step=step, tag="save", is_valid=True)

            def write(taken=taken):
                named = {"trees": taken.trees, "values": taken.values}
                return save(tmp_path, step=taken.step, files={}, header={}, **named)

            saver.submit(write, done=ignore, reading=buffer.pinned(taken))
            weight.fill_(-1)
    assert [entry.step for entry in entries(tmp_path)] == [1, 2, 3, 4, 5]
    for entry in entries(tmp_path):
        checkpoint = open_checkpoint(entry.path)
        assert checkpoint.value("step") == entry.step and checkpoint.tree("model")["w"].eq(entry.step).all()


def test_a_full_disk_reaches_the_run(tmp_path, monkeypatch):
    """``DiskFull`` with its advice, in the thread that trains; the checkpoint before is whole."""
    save_sample(tmp_path, 3, number=1)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Saver() as saver:
        monkeypatch.setattr(os, "write", full)
        saver.submit(lambda: save_sample(tmp_path, 5, number=2), done=ignore)
        with pytest.raises(DiskFull, match="no space is left to write .*step-00000005"):
            saver.wait()
        monkeypatch.undo()
    assert number_of(newest(tmp_path, silent)) == 1


UNCLOSED = """
import sys, time
from pathlib import Path
from meristem.checkpoint.saver import Saver
def write():
    time.sleep(0.3)
    Path(sys.argv[1]).write_text("whole")
    return Path(sys.argv[1])
Saver().submit(write, done=lambda path: None)
"""


def test_the_process_does_not_end_before_the_write(tmp_path):
    """Even where nobody has closed it."""
    subprocess.run([sys.executable, "-c", UNCLOSED, str(tmp_path / "a")], check=True, timeout=60)
    assert (tmp_path / "a").read_text() == "whole"


def test_no_thread_is_left():
    """After a hundred writes there are as many threads as before the first."""
    before = threading.active_count()
    with Saver() as saver:
        for _ in range(100):
            saver.submit(lambda: Path("a"), done=ignore)
            assert threading.active_count() <= before + 1
    assert threading.active_count() == before
