"""Levels that rise at once and fall slowly, signals that no one loses, and a level that other processes see whole."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import DiskFull, RunError, WrongValue
from meristem.events import Event
from meristem.train.emergency import (
    FILE,
    Emergency,
    Level,
    SharedLevel,
    Signal,
    Signals,
    downgraded,
    quiet,
    raised,
    read_shared,
)

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS
Show = Callable[[Emergency], Emergency]


@pytest.fixture(params=["local", "shared"])
def show(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Show]:
    """What somebody sees of a level: the value itself, or what stands in the shared file. They are to be alike."""
    if request.param == "local":
        yield lambda now: now
        return
    shared = SharedLevel(tmp_path / FILE)

    def through_the_file(now: Emergency) -> Emergency:
        shared.write(now)
        return read_shared(shared.path)

    yield through_the_file
    shared.close()


def seen(now: Emergency) -> tuple[Level, str, str, int | None]:
    """What is shared; how many signals and quiet steps there were is the run's own."""
    return now.level, now.reason, now.origin, now.triggered_ns


def calm(now: Emergency, n_steps: int) -> Emergency:
    for _ in range(n_steps):
        now = quiet(now)
    return now


# Levels


def test_l3_clearing_resets_all(show):
    """Level, reason, origin and time are as if nothing had ever been."""
    now = raised(Emergency(), Level.CONSERVATIVE, reason="diverged", origin="guard")
    assert seen(show(now))[:3] == (Level.CONSERVATIVE, "diverged", "guard")
    cleared = downgraded(now, Level.NONE, after=0)
    assert cleared == show(cleared) == Emergency()
    assert seen(show(cleared)) == (Level.NONE, "", "", None)


def test_l4_every_trigger_has_a_monotonic_time(show):
    """On the clock that never goes back, and the same for whoever looks."""
    before_ns = time.monotonic_ns()
    now = raised(Emergency(), Level.NOTICE, reason="spike", origin="guard")
    assert now.triggered_ns is not None
    assert before_ns <= now.triggered_ns <= time.monotonic_ns()
    assert show(now).triggered_ns == now.triggered_ns
    assert show(raised(now, Level.HALT, reason="x", origin="y", clock=lambda: 9)).triggered_ns == 9


def test_l5_going_down_is_asked_for(show):
    """From 3 to 1 by ``downgraded`` alone: no signal, and no number of quiet steps, lowers a level."""
    now = raised(Emergency(), 3, reason="breaker open", origin="library", clock=lambda: 5)
    lower = raised(now, 1, reason="spike", origin="guard")
    assert seen(show(lower)) == seen(now)
    now = calm(lower, 1_000)
    assert seen(show(now)) == seen(lower)
    assert seen(show(downgraded(now, 1, after=200))) == (Level.NOTICE, "breaker open", "library", 5)


def test_l5_hysteresis(show):
    """Only after so many quiet steps without a break, counted anew for each way down."""
    now = raised(Emergency(), Level.CONSERVATIVE, reason="diverged", origin="guard")
    now = calm(now, 9)
    assert downgraded(now, Level.ELEVATED, after=10) == now
    interrupted = raised(now, Level.NOTICE, reason="spike", origin="guard")
    assert show(downgraded(quiet(interrupted), Level.ELEVATED, after=10)).level == Level.CONSERVATIVE
    now = downgraded(quiet(now), Level.ELEVATED, after=10)
    assert show(now).level == Level.ELEVATED
    assert downgraded(calm(now, 9), Level.NONE, after=10).level == Level.ELEVATED
    assert show(downgraded(calm(now, 10), Level.NONE, after=10)) == Emergency()


def test_raising_never_lowers_and_keeps_the_first_cause():
    """What is told is what brought the run to its level; what came later is counted."""
    now = raised(Emergency(), 2, reason="slow step", origin="loop", clock=lambda: 1)
    now = raised(now, 2, reason="slow slot", origin="slots", clock=lambda: 2)
    now = raised(now, 1, reason="spike", origin="guard", clock=lambda: 3)
    assert now == Emergency(Level.ELEVATED, "slow step", "loop", 1, n_signals=3)
    now = raised(quiet(now), 4, reason="panics in a row", origin="guard", clock=lambda: 4)
    assert now == Emergency(Level.HALT, "panics in a row", "guard", 4, n_signals=4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        *(({"level": level}, f"level {level}, .* expected a level from 1 to 4") for level in (0, 5, 7, -1)),
        ({"reason": ""}, "reason '', .* cannot be raised"),
        ({"origin": "  "}, "origin '  ' cannot be raised"),
    ],
)
def test_signal_without_sense_is_refused(wrong, message):
    given = {"level": 3, "reason": "diverged", "origin": "guard"} | wrong
    with pytest.raises(WrongValue, match=message):
        raised(Emergency(), **given)
    sent: list[Event] = []
    with pytest.raises(WrongValue, match=message):
        Signals(sent.append).send(**given)
    assert sent == []


words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=4)
acts = st.lists(
    st.one_of(
        st.builds(
            lambda level, reason, origin, at_ns: (
                lambda now: raised(now, level, reason=reason, origin=origin, clock=lambda: at_ns)
            ),
            st.integers(1, 4),
            words,
            words,
            st.integers(0, 2**64 - 1),
        ),
        st.just(quiet),
        st.builds(
            lambda level, after: lambda now: downgraded(now, level, after=after) if now.level > level else now,
            st.integers(0, 3),
            st.integers(0, 3),
        ),
    ),
    max_size=12,
)


@given(acts)
@settings(max_examples=50, deadline=None)
def test_whatever_happens_local_and_shared_agree(tmp_path_factory, sequence):
    """And level, cause and time are there together or not at all; JSON gives the same value back."""
    shared, now = SharedLevel(tmp_path_factory.mktemp("level") / FILE), Emergency()
    for act in sequence:
        now = act(now)
        shared.write(now)
        assert seen(read_shared(shared.path)) == seen(now)
        assert bool(now.level) == bool(now.reason) == bool(now.origin) == (now.triggered_ns is not None)
        assert Emergency.from_json(json.loads(json.dumps(now.to_json()))) == now
    shared.close()


# Signals


class Clock:
    """Nanoseconds that go by when they are told to."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class Ear:
    """Takes down what is recorded; while it is deaf it raises, as a disk without room does."""

    def __init__(self) -> None:
        self.heard: list[Mapping[str, Any]] = []
        self.is_deaf = False

    def __call__(self, event: Event) -> None:
        if self.is_deaf:
            raise DiskFull("no room")
        self.heard.append(event.payload)

    @property
    def n_heard(self) -> int:
        return sum(told["count"] for told in self.heard)


def test_l2_the_bypass_has_a_cap():
    """Of 61 in a minute the 61st waits, is counted and stands a level higher; a minute later it is there."""
    clock, ear = Clock(), Ear()
    signals = Signals(ear, clock=clock)
    got = []
    for number in range(61):
        clock.now_ns = number * SECOND_NS // 2
        got.append(signals.send(Level.NOTICE, origin="guard", reason=f"spike {number}"))
    assert got == [Level.NOTICE] * 60 + [Level.ELEVATED]
    assert [told["reason"] for told in ear.heard] == [f"spike {number}" for number in range(60)]
    clock.now_ns = MINUTE_NS - 1
    assert signals.flush() == 1
    clock.now_ns = MINUTE_NS
    assert signals.flush() == 0
    times = {"first_ns": 30 * SECOND_NS, "last_ns": 30 * SECOND_NS}
    assert ear.heard[60] == {"level": 2, "origin": "guard", "reason": "spike 60", "count": 1} | times


def test_l2_beyond_the_cap_signals_are_joined_and_counted():
    """By origin and level; the highest comes first when there is room, and nothing was lost."""
    clock, ear = Clock(), Ear()
    signals = Signals(ear, per_minute=1, clock=clock)
    for number in range(10):
        clock.now_ns = number
        for level, origin in ((1, "guard"), (1, "loop"), (3, "guard"), (4, "rollback")):
            signals.send(level, origin=origin, reason=str(number))
    assert ear.n_heard == 1
    clock.now_ns = 5 * MINUTE_NS
    for _ in range(4):
        clock.now_ns += MINUTE_NS
        signals.flush()
    names = ("level", "origin", "count", "first_ns", "last_ns")
    assert [tuple(told[name] for name in names) for told in ear.heard[1:]] == [
        (Level.HALT, "rollback", 10, 0, 9),
        (Level.CONSERVATIVE, "guard", 10, 0, 9),
        (Level.ELEVATED, "loop", 10, 0, 9),
        (Level.ELEVATED, "guard", 9, 1, 9),
    ]
    assert ear.n_heard == 40
    assert {told["reason"] for told in ear.heard[1:]} == {"9"}


def test_too_many_signals_halt_no_run():
    """They raise the level by one at most, up to conservative; a halt is only what asks for it."""
    signals = Signals(Ear(), per_minute=1, clock=Clock())
    signals.send(1, origin="a", reason="b")
    got = [[signals.send(level, origin="a", reason="b") for level in (1, 2, 3, 4)] for _ in range(20)]
    assert got == [[Level.ELEVATED, Level.CONSERVATIVE, Level.CONSERVATIVE, Level.HALT]] * 20


def test_l24_a_signal_that_could_not_be_recorded_waits():
    """What hindered it is raised; later the highest level comes first, and all that was missed is counted."""
    clock, ear = Clock(), Ear()
    signals = Signals(ear, clock=clock)
    ear.is_deaf = True
    for number in range(100):
        clock.now_ns += SECOND_NS
        level = Level.HALT if number == 50 else Level.NOTICE if number % 2 else Level.CONSERVATIVE
        with pytest.raises(DiskFull):
            signals.send(level, origin="guard", reason=f"reason {number}")
    ear.is_deaf = False
    assert signals.flush() == 0
    assert [(told["level"], told["count"], told["reason"]) for told in ear.heard] == [
        (Level.HALT, 1, "reason 50"),
        (Level.CONSERVATIVE, 49, "reason 98"),
        (Level.NOTICE, 50, "reason 99"),
    ]


def test_end_of_a_run_waits_for_no_minute():
    ear = Ear()
    signals = Signals(ear, per_minute=2, clock=Clock())
    for level in (1, 1, 1, 2, 4):
        signals.send(level, origin="guard", reason="x")
    assert signals.flush() == 3
    assert signals.flush(is_end=True) == 0
    assert [told["level"] for told in ear.heard] == [1, 1, 4, 3, 2]


def test_event_of_a_signal():
    event = Signal(Level.HALT, "rollback", "no way back", 3, 9, count=2).event
    assert (event.name, event.severity) == ("emergency.raised", "critical")
    assert event.payload == {
        "level": 4,
        "origin": "rollback",
        "reason": "no way back",
        "first_ns": 3,
        "last_ns": 9,
        "count": 2,
    }


sending = st.tuples(st.just("send"), st.integers(1, 4), st.sampled_from("abc"))
passing = st.tuples(st.just("wait"), st.integers(0, 40), st.just(""))
failing = st.tuples(st.just("turn"), st.integers(0, 1), st.just(""))


@given(st.lists(st.one_of(sending, sending, sending, passing, failing), max_size=60))
@settings(max_examples=150, deadline=None)
def test_l24_every_signal_arrives_once_in_any_history(history):
    """Whatever the order of signals, time and failures: recorded and waiting together are what was sent.

    The cap holds in every minute, levels never fall on the way, and in the end all are there.
    """
    clock, ear = Clock(), Ear()
    signals, sent, passed_ns = Signals(ear, per_minute=3, clock=clock), [], []
    for what, number, origin in history:
        if what == "turn":
            ear.is_deaf = bool(number)
            continue
        clock.now_ns += number * SECOND_NS if what == "wait" else 0
        with contextlib.suppress(DiskFull):
            if what == "send":
                sent.append([origin, number])
                sent[-1].append(signals.send(number, origin=origin, reason="x"))
            assert signals.flush() + ear.n_heard == len(sent)
        passed_ns += [clock.now_ns] * (len(ear.heard) - len(passed_ns))
    assert all(later - earlier >= MINUTE_NS for earlier, later in zip(passed_ns, passed_ns[3:], strict=False))
    ear.is_deaf = False
    assert signals.flush(is_end=True) == 0
    assert ear.n_heard == len(sent)
    for origin in "abc":
        told = [told["level"] for told in ear.heard if told["origin"] == origin]
        assert max(told, default=0) >= max((levels[-1] for its, *levels in sent if its == origin), default=0)


# The shared level


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a run that is at level 3."""
    shared = SharedLevel(tmp_path / FILE)
    shared.write(Emergency(Level.CONSERVATIVE, "diverged", "guard", 123_456_789))
    shared.close()
    return tmp_path / FILE


def test_record_is_laid_out_as_it_is_written_down(path):
    """Growth.md 19, byte by byte: others read it without this package."""
    record = path.read_bytes()
    assert len(record) == 64
    assert record[0:4] == b"MEMG"
    assert int.from_bytes(record[4:6], "little") == 1
    assert (record[6], record[7]) == (3, 0)
    assert int.from_bytes(record[8:16], "little") == 123_456_789
    assert record[16:24] == bytes(8)
    assert record[24:40] == b"guard".ljust(16, b"\0")
    assert record[40:56] == b"diverged".ljust(16, b"\0")
    assert record[60:64] == bytes(4)


def test_torn_or_altered_record_is_noticed(path):
    """Any single byte that is not as the writer left it, and any half of a write."""
    whole = path.read_bytes()
    assert read_shared(path, patience_s=0).level == Level.CONSERVATIVE
    for place in range(60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        with pytest.raises(RunError, match="holds no whole record"):
            read_shared(path, patience_s=0)


def test_reader_waits_for_a_writer(path):
    """It looks again while a writer is inside, for as long as its patience lasts."""
    whole = path.read_bytes()
    inside = whole[:24] + b"loop".ljust(16, b"\0") + whole[40:]
    path.write_bytes(inside)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            path.write_bytes(whole)

    assert read_shared(path, patience_s=60, sleep=sleep).level == Level.CONSERVATIVE
    path.write_bytes(inside)
    slept.clear()
    with pytest.raises(RunError, match="also after 0.01 s: the checksum does not fit"):
        read_shared(path, patience_s=0.01, clock=lambda: len(slept) * 0.001, sleep=lambda seconds: slept.append(1.0))


def test_run_that_goes_on_mends_the_record(path):
    """One that was damaged; the file stays where readers have it open."""
    whole, inode = path.read_bytes(), path.stat().st_ino
    path.write_bytes(whole[:16] + (7).to_bytes(8, "little") + whole[24:])
    shared = SharedLevel(path)
    shared.write(raised(Emergency(), 1, reason="spike", origin="guard"))
    shared.close()
    assert read_shared(path).level == Level.NOTICE
    assert path.stat().st_ino == inode


def test_long_names_are_cut_and_say_so(tmp_path):
    """At a whole character, with an ellipsis and the flag."""
    shared = SharedLevel(tmp_path / FILE)
    shared.write(
        raised(Emergency(), 2, reason="a step took far too long", origin="straßenbahnverkehr", clock=lambda: 1)
    )
    now = read_shared(shared.path)
    assert (now.reason, now.origin) == ("a step took f…", "straßenbahnv…")
    assert shared.path.read_bytes()[7] == 1
    shared.write(raised(Emergency(), 2, reason="exactly-sixteen!", origin="guard", clock=lambda: 1))
    assert (read_shared(shared.path).reason, shared.path.read_bytes()[7]) == ("exactly-sixteen!", 0)
    shared.close()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no .*emergency.state. Expected the file that a run writes"),
        (b"", "has 0 bytes; an emergency record has 64"),
        (bytes(63), "has 63 bytes; an emergency record has 64"),
        (bytes(64), "holds no whole record"),
    ],
)
def test_file_that_is_no_record_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_shared(tmp_path / FILE, patience_s=0)
    SharedLevel(tmp_path / FILE).close()
    if content != bytes(64):
        assert read_shared(tmp_path / FILE) == Emergency()


def test_record_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("meristem.train.emergency._VERSION", 2)
    shared = SharedLevel(tmp_path / FILE)
    shared.write(Emergency())
    shared.close()
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"version 2; expected 0x474d454d and version 1"):
        read_shared(shared.path)


READER = """
import sys
from pathlib import Path
from meristem.train.emergency import read_shared

path, number, seen = Path(sys.argv[1]), 0, set()
while True:
    now = read_shared(path, patience_s=60)
    if now.triggered_ns is None:
        continue
    number = now.triggered_ns
    expected = (number % 4 + 1, f"origin {number}", f"reason {number}")
    if (now.level, now.origin, now.reason) != expected:
        sys.exit(print("mixed:", now, expected))
    if number not in seen and len(seen) == 500:
        print("enough", flush=True)
    seen.add(number)
    if now.reason == "reason 0":
        sys.exit(print("end", flush=True))
"""


@pytest.mark.fault
def test_another_process_never_sees_a_mixed_record(tmp_path):
    """It reads while ten thousand records and more are written, until it has seen five hundred different ones."""
    shared = SharedLevel(tmp_path / FILE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READER, str(shared.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as reader:
        assert reader.stdout
        lines: list[str] = []
        listener = threading.Thread(target=lambda: [lines.append(line) for line in reader.stdout], daemon=True)
        listener.start()
        number = 0
        while number < 10_000 or not lines and reader.poll() is None:
            number += 1
            shared.write(Emergency(Level(number % 4 + 1), f"reason {number}", f"origin {number}", number))
            if number % 50 == 0:
                time.sleep(0.0005)  # on a machine with one free core the reader must get its turn
        shared.write(Emergency(Level.NOTICE, "reason 0", "origin 0", 0))
        reader.wait(timeout=60)
        listener.join()
    assert lines == ["enough\n", "end\n"]
    shared.close()


WRITER = """
import sys
from itertools import count
from pathlib import Path
from meristem.train.emergency import Emergency, Level, SharedLevel

shared = SharedLevel(Path(sys.argv[1]))
for number in count(1):
    shared.write(Emergency(Level(number % 4 + 1), f"reason {number}", f"origin {number}", number))
    if number == 100:
        print("begun", flush=True)
"""


@pytest.mark.fault
def test_writer_that_is_killed_leaves_a_whole_record_or_one_that_is_noticed(tmp_path):
    """SIGKILL in the middle of writing, ten times; and the run that goes on has no trouble with what it finds."""
    path = tmp_path / FILE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for wait_s in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as writer:
            assert writer.stdout and writer.stdout.readline() == "begun\n"
            time.sleep(wait_s / 1000)
            writer.kill()
        try:
            now = read_shared(path, patience_s=0)
        except RunError as error:
            assert "holds no whole record" in str(error)
        else:
            number = now.triggered_ns
            assert number is not None
            assert (now.level, now.reason) == (number % 4 + 1, f"reason {number}")
        shared = SharedLevel(path)
        shared.write(Emergency())
        assert read_shared(path, patience_s=0) == Emergency()
        shared.close()


def test_readers_that_keep_the_file_open_see_what_is_new(path):
    """A resumed run writes into the same file; it is not replaced under those who look at it."""
    shared = SharedLevel(path)
    with open(path, "rb") as file:
        levels = []
        for level in (1, 2, 4):
            shared.write(raised(Emergency(), level, reason="x", origin="y", clock=lambda level=level: level))
            file.seek(0)
            levels.append(file.read(64)[6])
    shared.close()
    assert levels == [1, 2, 4] and all(before < after for before, after in pairwise(levels))
