"""A run says what it is and whether it lives, and one process at a time writes into its directory."""

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from meristem.checkpoint.run import RunLock, RunManifest, read
from meristem.errors import DiskFull, RunError, RunInUse
from meristem.events import silent

HOLDER = """
import sys, time
from pathlib import Path
from meristem.checkpoint.run import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def age(directory, seconds):
    """Make the last sign of life ``seconds`` old."""
    content = json.loads((directory / "run.json").read_text())
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    (directory / "run.json").write_text(json.dumps(content | {"heartbeat": then.isoformat()}))


def test_fields_come_back(tmp_path):
    """What is set is read, ids differ, and the file lives in a directory that is made for it."""
    manifest = RunManifest.create(tmp_path / "a" / "b", name="first", random_seed=7)
    manifest.update(best={"metric": "val/bits_per_byte", "value": 2.5, "step": 30})
    content = read(tmp_path / "a" / "b")
    assert (content["name"], content["random_seed"], content["best"]["step"]) == ("first", 7, 30)
    assert content["status"] == "created"
    assert content == manifest.content
    assert RunManifest.create(tmp_path / "c").content["id"] != content["id"]


def test_second_run_in_a_directory_is_refused(tmp_path):
    """Two runs never share a directory."""
    RunManifest.create(tmp_path)
    with pytest.raises(RunError, match=r"already holds the run \d{8}-.*--resume auto"):
        RunManifest.create(tmp_path)


def test_unknown_field_is_refused(tmp_path):
    """A misspelt field is a defect of the caller."""
    with pytest.raises(ValueError, match="unknown run fields \\['stauts'\\]"):
        RunManifest.create(tmp_path).update(stauts="running")


@pytest.mark.parametrize("silent_s, status", [(100, "running"), (121, "died"), (-3600, "running")])
def test_silent_run_has_died(tmp_path, silent_s, status):
    """CX-13.1: Two minutes without a sign of life is death; a clock that jumped back is not."""
    RunManifest.create(tmp_path, status="running")
    age(tmp_path, silent_s)
    assert read(tmp_path)["status"] == status


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_ended_run_does_not_die(tmp_path, status):
    """However long ago it ended, it ended; going on makes it run again with the same id."""
    manifest = RunManifest.create(tmp_path)
    manifest.end(status, 3)
    age(tmp_path, 10_000)
    content = read(tmp_path)
    assert (content["status"], content["exit"]) == (status, 3)
    assert content["ended"] is not None
    again = RunManifest.reopen(tmp_path).content
    assert (again["status"], again["exit"], again["ended"], again["id"]) == ("running", None, None, content["id"])


def test_heart_beats_while_a_step_takes_long(tmp_path):
    """Inside the block the heartbeat goes on without help of the step; after it no thread is left."""
    manifest = RunManifest.create(tmp_path)
    beaten = threading.Event()
    beat = manifest.heartbeat
    manifest.heartbeat = lambda: (beat(), beaten.set())
    with manifest.beating(silent, every_s=0.01):
        assert beaten.wait(10)
        assert read(tmp_path)["status"] == "running"
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_missed_heartbeat_is_said_once(tmp_path):
    """A heart that cannot beat is one event, and the run goes on."""
    manifest = RunManifest.create(tmp_path)
    events, beats = [], []

    def fail():
        beats.append(None)
        raise DiskFull("full")

    manifest.heartbeat = fail
    with manifest.beating(events.append, every_s=0.001):
        while len(beats) < 3:
            pass
    assert [(e.name, e.payload["what"]) for e in events] == [("degraded", "heartbeat")]


def test_no_run_and_torn_run_are_errors(tmp_path):
    """A directory without a run, and one whose manifest is broken, are told apart."""
    with pytest.raises(RunError, match="holds no run.json"):
        read(tmp_path)
    for content in ("{", "[]", "{}", '{"status": "running"}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunError, match="cannot be read as a run manifest"):
            read(tmp_path)


def test_lock_names_its_holder(tmp_path):
    """The second to come learns the process and the host that were first; afterwards it gets in."""
    me = re.escape(f"process {os.getpid()} on {socket.gethostname()}")
    with RunLock(tmp_path), pytest.raises(RunInUse, match=f"in use by {me}.*--run-dir"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_killed_holder_frees_the_lock(tmp_path):
    """Another process that holds it is named; once it is killed we get in without any clean-up."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"process {holder.pid} on"), RunLock(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(tmp_path):
        pass
