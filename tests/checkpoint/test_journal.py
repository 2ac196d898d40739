"""What the journal was told it tells, whatever was cut off it; and no byte of it changes unnoticed."""

import errno
import os
import struct
import subprocess
import sys
import threading
import zlib

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from meristem.checkpoint.journal import LARGEST_BYTES, Journal, read, rotated, uncommitted
from meristem.errors import CheckpointCorrupt, CheckpointTooNew, DiskFull

NOON = 1_800_000_000.0


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Nothing here takes the power away, so waiting for the disk would only take time; the call itself stays."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tell(path, n_changes=3):
    """A journal of some changes: all but the last two of them ended. Gives where each record begins, and the end."""
    starts = [0]
    with Journal(path, clock=lambda: NOON) as journal:
        for number in range(1, n_changes + 1):
            assert journal.begin("save", {"step": number * 500, "reason": "é" * number}) == number
            starts.append(path.stat().st_size)
            if number <= n_changes - 2:
                journal.commit(number, {"checkpoint": f"step-{number * 500:08d}"})
                starts.append(path.stat().st_size)
    return starts


def told(records):
    return [(record.seq, record.number, record.what, record.kind) for record in records]


def test_what_was_told_is_read(tmp_path):
    """Begin, commit and undo with their fields, in order; the two left open, and their ends told by another process."""
    path = tmp_path / "journal"
    tell(path)
    expected = [(1, 1, "begin", "save"), (2, 1, "commit", "save"), (3, 2, "begin", "save"), (4, 3, "begin", "save")]
    records = read(path)
    assert told(records) == expected
    assert records[0].fields == {"step": 500, "reason": "é"} and records[0].ts == "2027-01-15T08:00:00.000+00:00"
    assert [record.number for record in uncommitted(records)] == [2, 3]
    with Journal(path) as journal:
        assert [record.fields["step"] for record in journal.uncommitted()] == [1000, 1500]
        journal.undo(2, "the process died")
        assert journal.begin("rollback", {}) == 4
        journal.commit(4, {})
        with pytest.raises(ValueError, match=r"commit of 2, which is not open; open are \[3\]"):
            journal.commit(2, {})
        with pytest.raises(ValueError, match="undo of 9"):
            journal.undo(9, "never begun")
    assert told(read(path))[4:] == [(5, 2, "undo", "save"), (6, 4, "begin", "rollback"), (7, 4, "commit", "rollback")]
    assert read(path)[4].fields == {"reason": "the process died"}


def test_the_bytes_are_those_of_the_spec(tmp_path):
    """u32 little-endian length, u32 CRC32 of the JSON, JSON (growth.md section 12)."""
    path = tmp_path / "journal"
    tell(path, n_changes=1)
    content = path.read_bytes()
    size_bytes, crc = struct.unpack("<II", content[:8])
    assert size_bytes == len(content) - 8 and crc == zlib.crc32(content[8:])
    assert orjson.loads(content[8:])["schema"] == "meristem.journal/1"


def test_no_journal_is_no_records(tmp_path):
    assert read(tmp_path / "journal") == [] and uncommitted([]) == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cut_leaves_a_prefix(tmp_path_factory, data):
    """Cut anywhere, with or without room that was reserved behind: whole records stay, and the journal goes on."""
    path = tmp_path_factory.mktemp("cut") / "journal"
    starts = tell(path, data.draw(st.integers(1, 5)))
    content, whole = path.read_bytes(), told(read(path))
    cut = data.draw(st.integers(0, len(content)))
    reserved = data.draw(st.sampled_from([0, 0, 2, 512, 5000])) if cut < len(content) else 0
    n_left = sum(start <= cut for start in starts[1:])
    path.write_bytes(content[:cut] + bytes(reserved))
    events = []
    assert told(read(path, events.append)) == whole[:n_left]
    n_torn_bytes = cut + reserved - starts[n_left]
    assert [event.payload["n_bytes"] for event in events] == ([n_torn_bytes] if n_torn_bytes else [])
    with Journal(path) as journal:
        assert journal.n_cut_bytes == n_torn_bytes and path.stat().st_size == starts[n_left]
        number = journal.begin("after", {})
    assert told(read(path)) == [*whole[:n_left], (n_left + 1, number, "begin", "after")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory, data, change):
    """In a length, a sum or the text, of the last record too: refused by reader and writer, with the record's place."""
    path = tmp_path_factory.mktemp("flip") / "journal"
    starts = tell(path, data.draw(st.integers(1, 4)))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= change
    path.write_bytes(content)
    begin = max(start for start in starts if start <= place)
    for use in (read, Journal):
        with pytest.raises(CheckpointCorrupt, match=f"journal is damaged at byte {begin}: ") as raised:
            use(path)
        assert raised.value.fields["position"] == begin
    assert path.read_bytes() == content


def test_every_byte_and_every_cut_of_one_journal(tmp_path):
    """The same without chance: each byte changed in one bit, and each length."""
    path = tmp_path / "journal"
    starts = tell(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointCorrupt, match="is damaged at byte"):
            read(path)
        path.write_bytes(content[:place])
        assert len(read(path)) == sum(start <= place for start in starts[1:])


def framed(content):
    return struct.pack("<II", len(content), zlib.crc32(content)) + content


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[]", "not one of meristem.journal/1"),
        (b"nonsense", "not one of meristem.journal/1"),
        (b'{"schema":"meristem.journal/1","seq":1}', "not one of meristem.journal/1"),
        (
            b'{"schema":"meristem.journal/1","seq":1,"number":1,"what":"end","kind":"","ts":"","fields":{}}',
            "says 'end'",
        ),
    ],
)
def test_records_of_another_kind_are_damage(tmp_path, content, message):
    (tmp_path / "journal").write_bytes(framed(content))
    with pytest.raises(CheckpointCorrupt, match=f"at byte 0: .*{message}"):
        read(tmp_path / "journal")


def test_a_newer_journal_is_refused(tmp_path):
    (tmp_path / "journal").write_bytes(framed(b'{"schema":"meristem.journal/9"}'))
    with pytest.raises(CheckpointTooNew, match=r"meristem\.journal/9 at byte 0; this meristem reads .*Update"):
        Journal(tmp_path / "journal")


def test_a_record_that_was_lost_whole_is_noticed(tmp_path):
    """Each is sound and one is missing between them."""
    path = tmp_path / "journal"
    starts = tell(path)
    content = path.read_bytes()
    path.write_bytes(content[: starts[1]] + content[starts[2] :])
    with pytest.raises(CheckpointCorrupt, match=f"at byte {starts[1]}: record 3 stands where 2 should be"):
        read(path)


def test_a_full_file_is_set_aside(tmp_path):
    """Numbers and open changes run through all files; each stays below the limit; a torn one in between is damage."""
    path = tmp_path / "journal"
    with Journal(path, rotate_size_bytes=400) as journal:
        journal.begin("growth", {})
        for number in range(2, 12):
            journal.commit(journal.begin("save", {"number": number}), {})
    assert len(rotated(path)) >= 5
    assert all(file.stat().st_size <= 400 for file in [*rotated(path), path])
    with Journal(path, rotate_size_bytes=400) as journal:
        assert [record.number for record in journal.uncommitted()] == [1]
        journal.undo(1, "after all")
        assert journal.begin("save", {}) == 12
    records = read(path)
    assert [record.seq for record in records] == list(range(1, 24)) and len(uncommitted(records)) == 1
    content = rotated(path)[1].read_bytes()
    rotated(path)[1].write_bytes(content[:-1])
    with pytest.raises(
        CheckpointCorrupt, match=r"journal\.0002 is damaged at byte .* later ones follow in another file"
    ):
        read(path)


def test_numbers_that_are_none_and_records_too_large_are_refused(tmp_path):
    """Before anything is written."""
    path = tmp_path / "journal"
    with Journal(path) as journal:
        with pytest.raises(ValueError, match=r"value 'journal\.fields\.loss' is inf"):
            journal.begin("save", {"loss": float("inf")})
        with pytest.raises(ValueError, match="too large for a journal"):
            journal.begin("save", {"text": "x" * LARGEST_BYTES})
        assert path.read_bytes() == b"" and journal.begin("save", {}) == 1


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("number, error", [(errno.ENOSPC, DiskFull), (errno.EIO, OSError)])
def test_a_failed_record_leaves_no_trace(tmp_path, monkeypatch, call, number, error):
    """Half of it was written: it is cut off, the number is not used up, and the next record is whole."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin("save", {})
    before = path.read_bytes()
    write, n_calls = os.write, []

    def fail(descriptor, *content):
        n_calls.append(call)
        if call == "write" and len(n_calls) == 1:
            return write(descriptor, content[0][:20])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error):
            journal.commit(1, {})
    assert path.read_bytes() == before and [record.number for record in journal.uncommitted()] == [1]
    journal.commit(1, {})
    journal.close()
    assert told(read(path)) == [(1, 1, "begin", "save"), (2, 1, "commit", "save")]


def test_what_could_not_be_cut_is_cut_before_the_next(tmp_path, monkeypatch):
    """The disk refuses the cut as well: then it is made up for, or the journal would be damaged in the middle."""
    path = tmp_path / "journal"
    journal, write = Journal(path), os.write

    def fail(*_args):
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:20]) and fail())
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="broken"):
            journal.begin("save", {})
    assert path.stat().st_size == 20
    journal.begin("save", {})
    journal.close()
    assert told(read(path)) == [(1, 1, "begin", "save")]


@pytest.mark.parametrize("call", ["rename", "open"])
def test_a_file_that_cannot_be_set_aside_goes_on(tmp_path, monkeypatch, call):
    """No room for a second file: the record fails, and the next one finds everything as it was."""
    path = tmp_path / "journal"
    journal = Journal(path, rotate_size_bytes=200)
    journal.begin("save", {})

    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskFull, match="write .*journal"):
            journal.begin("save", {})
    assert rotated(path) == [] and len(read(path)) == 1
    journal.begin("save", {})
    journal.close()
    assert len(rotated(path)) == 1 and told(read(path)) == [(1, 1, "begin", "save"), (2, 2, "begin", "save")]


def test_every_record_waits_for_the_disk(tmp_path, monkeypatch):
    """When the call returns, the file was synced after the last write; a new file and its name too."""
    trail, paths, open_, write = [], {}, os.open, os.write

    def opened(path, *args):
        descriptor = open_(path, *args)
        paths[descriptor] = os.path.basename(path)
        return descriptor

    def written(descriptor, content):
        trail.append("write")
        return write(descriptor, content)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", written)
    monkeypatch.setattr(os, "fsync", lambda descriptor: trail.append(f"sync {paths[descriptor]}"))
    with Journal(tmp_path / "run" / "journal") as journal:
        assert trail == ["sync run"]
        number = journal.begin("save", {})
        assert trail == ["sync run", "write", "sync journal"]
        journal.commit(number, {})
        assert trail[3:] == ["write", "sync journal"]


def test_threads_share_it(tmp_path):
    """The thread that writes checkpoints ends what the one that trains began."""
    path = tmp_path / "journal"
    with Journal(path) as journal:

        def changing():
            for _ in range(40):
                journal.commit(journal.begin("save", {}), {})

        threads = [threading.Thread(target=changing) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = read(path)
    assert len(records) == 320 and uncommitted(records) == [] and {r.number for r in records} == set(range(1, 161))


KILLED = """
import os, sys
from pathlib import Path
from meristem.checkpoint.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
while True:
    number = journal.begin("save", {"text": "x" * 3000})
    journal.commit(number, {})
    os.write(1, b"%d\\n" % number)
"""


@pytest.mark.fault
@pytest.mark.parametrize("n_records", [1, 4, 9])
def test_a_killed_process_loses_nothing_it_was_told_of(tmp_path, n_records):
    """SIGKILL at any moment: every change whose commit returned is there, and at most one is open."""
    path = tmp_path / "journal"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(n_records + 1)]
        process.kill()
        lines += process.stdout.readlines()
    n_said = int(lines[-1])
    with Journal(path) as journal:
        left = journal.uncommitted()
    ended = {record.number for record in read(path) if record.what == "commit"}
    assert set(range(1, n_said + 1)) <= ended <= set(range(1, n_said + 2))
    assert len(left) <= 1


class JournalMachine(RuleBasedStateMachine):
    """Any order of changes, restarts and crashes in the middle of a record: the journal tells what a list would."""

    @initialize(rotate_size_bytes=st.sampled_from([300, 2000, 10**8]))
    def start(self, rotate_size_bytes):
        self.directory = self.root.mktemp("journal")
        self.settings = {"rotate_size_bytes": rotate_size_bytes, "clock": lambda: NOON}
        self.journal = Journal(self.directory / "journal", **self.settings)
        self.said, self.open = [], {}

    @rule(kind=st.sampled_from(["save", "rollback"]), value=st.integers())
    def begin(self, kind, value):
        number = max([0, *(number for number, *_ in self.said)]) + 1
        assert self.journal.begin(kind, {"value": str(value)}) == number
        self.said.append((number, "begin", kind, {"value": str(value)}))
        self.open[number] = kind

    @precondition(lambda self: self.open)
    @rule(data=st.data(), is_done=st.booleans())
    def end(self, data, is_done):
        number = data.draw(st.sampled_from(sorted(self.open)))
        if is_done:
            self.journal.commit(number, {"a": 1})
        else:
            self.journal.undo(number, "why")
        fields = {"a": 1} if is_done else {"reason": "why"}
        self.said.append((number, "commit" if is_done else "undo", self.open.pop(number), fields))

    @rule(torn=st.binary(max_size=7))
    def restart(self, torn):
        self.journal.close()
        with open(self.directory / "journal", "ab") as file:
            file.write(torn)
        self.journal = Journal(self.directory / "journal", **self.settings)
        assert self.journal.n_cut_bytes == len(torn)

    @invariant()
    def it_tells_the_same(self):
        if not hasattr(self, "journal"):
            return
        records = read(self.directory / "journal")
        assert [(r.number, r.what, r.kind, r.fields) for r in records] == self.said
        assert [record.number for record in uncommitted(records)] == sorted(self.open)
        assert uncommitted(records) == self.journal.uncommitted()

    def teardown(self):
        self.journal.close()


def test_journal_machine(tmp_path_factory):
    """The machine needs a place for its files."""
    kind = type("Placed", (JournalMachine,), {"root": tmp_path_factory})
    run_state_machine_as_test(kind, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
