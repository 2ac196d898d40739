"""One way from a run to its listeners: the files are complete, what is critical comes first, nothing is lost unsaid."""

import errno
import os
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import DiskFull, SinkError
from meristem.events import Event
from meristem.sinks.emitter import TELL_EVERY_S, Emitter, Limit
from meristem.sinks.jsonl import read_records
from meristem.sinks.queue import RateLimit
from meristem.sinks.records import Records

QUICK = RateLimit(rest_s=0.01, longest_rest_s=0.02, close_s=0.3)


class Tracker:
    """A sink that remembers what it got and when. While ``gate`` is closed it hangs in its first call."""

    def __init__(self, each_s: float = 0.0, is_open: bool = True) -> None:
        self.each_s, self.gate = each_s, threading.Event()
        self.got: list[dict] = []
        self.at_s: list[float] = []
        self.is_called, self.is_closed = threading.Event(), False
        if is_open:
            self.gate.set()

    def __call__(self, record):
        self.is_called.set()
        self.gate.wait()
        self.at_s.append(time.monotonic())
        self.got.append(record)
        time.sleep(self.each_s)

    def close(self):
        self.is_closed = True

    def names(self):
        return [record["name"] for record in self.got if "name" in record]


def events(place: Path, *names: str):
    return [event for event in read_records(place / "events.ndjson") if not names or event["name"] in names]


def end(emitter: Emitter):
    told = {each.name: each for each in emitter.close()}
    emitter.records.close()
    return told


def wait_for(is_there):
    deadline = time.monotonic() + 10
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_la5_every_record_reaches_every_sink_in_order_with_what_all_share(tmp_path):
    """Metrics, events, samples and readings, with run, seq, step and rank, exactly as the files hold them."""
    trackers = {"a": Tracker(), "b": Tracker(each_s=0.001)}
    records = Records(tmp_path, "r1", rank=3)
    emitter = Emitter(records, trackers, pace=QUICK)
    records.metrics(1, 7, 0.1, "train", {"nats": 2.5})
    emitter.emit(Event("checkpoint.saved", {"checkpoint": "step-1"}))
    records.sample(2, "a", "b", {})
    records.system({"source": "psutil"})
    emitter.emit(Event("degraded", {"what": "x"}, "warning"))
    told = end(emitter)
    written = sorted(
        (r for name in ("metrics", "events", "samples", "system") for r in read_records(tmp_path / f"{name}.ndjson")),
        key=lambda record: record["seq"],
    )
    assert [(r["run"], r["rank"], r["seq"], r["step"]) for r in written] == [
        ("r1", 3, seq, step) for seq, step in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 2))
    ]
    for name, tracker in trackers.items():
        assert orjson.loads(orjson.dumps(tracker.got)) == written
        assert tracker.is_closed
        assert (told[name].status, told[name].dropped) == ("ok", 0)


def test_la5_slow_sink_does_not_slow_the_run(tmp_path):
    """A sink that takes 50 ms for a record costs the run as much as one that takes none."""

    def median_s(place, tracker):
        records = Records(tmp_path / place, "r")
        emitter = Emitter(records, {"t": tracker}, pace=RateLimit(n_waiting=100, close_s=0.2))
        spent = []
        for step in range(500):
            begun_s = time.perf_counter()
            records.metrics(step, 0, 0.0, "train", {"nats": 1.0})
            emitter.emit(Event("evaluation.done", {"nats": 1.0}))
            spent.append(time.perf_counter() - begun_s)
        end(emitter)
        return statistics.median(spent), sum(spent)

    free_s, _ = median_s("free", Tracker())
    slow_s, whole_s = median_s("slow", Tracker(each_s=0.05))
    assert slow_s < 5 * free_s
    assert whole_s < 500 * 0.05 / 2


def test_la5_dropped_count_is_reported_and_critical_passes(tmp_path):
    """With a sink that hangs and a queue that is full, what was dropped is told to the last one; critical stays."""
    tracker = Tracker(is_open=False)
    records = Records(tmp_path, "r")
    emitter = Emitter(records, {"t": tracker}, pace=RateLimit(n_waiting=10))
    emitter.emit(Event("first", {}, "warning"))
    tracker.is_called.wait()
    for step in range(50):
        records.metrics(step, 0, 0.0, "train", {})
    for number in range(30):
        emitter.emit(Event("emergency.raised", {"number": number}, "critical"))
    tracker.gate.set()
    wait_for(lambda: len(tracker.got) == 1 + 30 + 10)
    told = end(emitter)
    assert told["t"].dropped == 40
    assert [e["payload"] for e in events(tmp_path, "sink.dropped")] == [{"sink": "t", "dropped": 40, "in_all": 40}]
    passed = [r["payload"]["number"] for r in tracker.got if r.get("severity") == "critical"]
    assert passed == list(range(30))
    assert tracker.names()[:31] == ["first"] + ["emergency.raised"] * 30
    assert len(list(read_records(tmp_path / "metrics.ndjson"))) == 50


def test_la5_losses_are_told_while_the_run_goes_on(tmp_path):
    """Not only at the end: with the first event after a minute by a clock that is given."""
    now = [100.0]
    tracker = Tracker(is_open=False)
    emitter = Emitter(Records(tmp_path, "r"), {"t": tracker}, pace=RateLimit(n_waiting=1), clock=lambda: now[0])
    emitter.emit(Event("first", {}, "warning"))
    tracker.is_called.wait()
    for _ in range(4):
        emitter.emit(Event("x", {}, "warning"))
    assert events(tmp_path, "sink.dropped") == []
    now[0] += TELL_EVERY_S
    emitter.emit(Event("y", {}, "warning"))
    assert [e["payload"]["dropped"] for e in events(tmp_path, "sink.dropped")] == [4]
    tracker.gate.set()
    end(emitter)


def test_la5_a_name_that_comes_too_often_is_limited_and_told(tmp_path):
    """Sinks get sixty of a name in a minute; files get all, and one event says how many the sinks did not get."""
    now = [0.0]
    tracker = Tracker()
    emitter = Emitter(Records(tmp_path, "r"), {"t": tracker}, pace=QUICK, minor_per_minute=60, clock=lambda: now[0])
    for _ in range(1000):
        emitter.emit(Event("step.done", {}, "debug"))
        emitter.emit(Event("loss.nonfinite", {}, "warning"))
    emitter.emit(Event("checkpoint.saved"))
    now[0] = 30.0
    for _ in range(100):
        emitter.emit(Event("step.done", {}, "debug"))
    end(emitter)
    assert Counter(tracker.names()) == {
        "step.done": 60 + 30,
        "loss.nonfinite": 1000,
        "checkpoint.saved": 1,
        "events.limited": 1,
    }
    assert Counter(e["name"] for e in events(tmp_path))["step.done"] == 1100
    (limited,) = events(tmp_path, "events.limited")
    assert limited["payload"] == {"n": 1010, "by_name": {"step.done": 1010}}


@given(
    asked=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 40)), max_size=60),
    per_minute=st.integers(1, 7),
)
def test_la5_limit_loses_no_count(asked, per_minute):
    """Passed and counted are together all; at once at most a minute's worth passes, and in a minute twice that."""
    now = [0.0]
    limit = Limit(per_minute, lambda: now[0])
    passed: list[tuple[str, float]] = []
    for name, after_s in asked:
        now[0] += after_s
        if limit.passes(name):
            passed.append((name, now[0]))
    assert Counter(name for name, _ in passed) + Counter(limit.take_counts()) == Counter(name for name, _ in asked)
    assert limit.take_counts() == {}
    for name, at_s in passed:
        within = [s for other, s in passed if other == name and at_s <= s < at_s + 60]
        assert len(within) <= 2 * per_minute
        assert sum(s == at_s for s in within) <= per_minute


def test_ka2_critical_within_50_ms_in_order_though_the_queue_is_full(tmp_path):
    """Ten thousand records wait at a sink that takes 2 ms for each; the critical ones come next, in their order."""
    tracker = Tracker(each_s=0.002)
    records = Records(tmp_path, "r")
    emitter = Emitter(records, {"t": tracker}, pace=RateLimit(close_s=0.05))
    for step in range(10_500):
        records.metrics(step, 0, 0.0, "train", {})
    wait_for(lambda: len(tracker.got) > 3)
    assert len(tracker.got) < 5000
    emitted_s = []
    for number in range(12):
        emitter.emit(Event("emergency.raised", {"number": number}, "critical"))
        emitted_s.append(time.monotonic())
        time.sleep(0.003)
    wait_for(lambda: tracker.names().count("emergency.raised") == 12)
    criticals = [
        (r["payload"]["number"], at_s) for r, at_s in zip(tracker.got, tracker.at_s, strict=True) if "name" in r
    ]
    assert [number for number, _ in criticals] == list(range(12))
    assert max(at_s - then_s for (_, at_s), then_s in zip(criticals, emitted_s, strict=True)) < 0.05
    end(emitter)


def test_ka2_critical_is_on_the_disk_when_emit_returns(tmp_path, monkeypatch):
    """Written and synced in this call; other events leave the disk its time."""
    synced: list[tuple[str, bytes]] = []
    sync = os.fsync

    def watched(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.read_bytes()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    emitter = Emitter(Records(tmp_path, "r"))
    emitter.emit(Event("degraded", {}, "error"))
    assert synced == []
    emitter.emit(Event("emergency.raised", {"level": 4}, "critical"))
    ((name, content),) = synced
    assert name == "events.ndjson"
    assert [orjson.loads(line)["name"] for line in content.splitlines()] == ["degraded", "emergency.raised"]
    end(emitter)


def test_ka2_critical_reaches_the_sinks_of_a_full_disk(tmp_path, monkeypatch):
    """The run learns of the disk, and whoever listens of the emergency."""
    tracker = Tracker()
    emitter = Emitter(Records(tmp_path, "r"), {"t": tracker}, pace=QUICK)

    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull):
            emitter.emit(Event("emergency.raised", {}, "critical"))
        wait_for(lambda: tracker.got)
    assert tracker.names() == ["emergency.raised"]
    emitter.emit(Event("later"))
    end(emitter)
    assert [e["name"] for e in events(tmp_path)] == ["later"]
    assert [r["seq"] for r in tracker.got] == [1, 2]


def test_ka2_threads_keep_the_order_of_critical_events(tmp_path):
    """Sinks get them by rising seq, whichever thread emitted them."""
    tracker = Tracker()
    emitter = Emitter(Records(tmp_path, "r"), {"t": tracker}, pace=QUICK)

    def emit_some():
        for _ in range(25):
            emitter.emit(Event("emergency.raised", {}, "critical"))

    threads = [threading.Thread(target=emit_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end(emitter)
    assert [r["seq"] for r in tracker.got] == list(range(1, 101))


def test_cx6_1_sink_that_always_raises_is_one_warning_and_a_count(tmp_path):
    """It is tried now and then, so that one which recovers goes on; what it missed is told."""

    def broken(record):
        raise SystemExit(7) if record["seq"] % 2 else RuntimeError("no route to host")

    broken.close = None
    other = Tracker()
    emitter = Emitter(Records(tmp_path, "r"), {"broken": broken, "other": other}, pace=QUICK)
    for number in range(50):
        emitter.emit(Event(f"e{number}"))
        time.sleep(0.001)
    told = end(emitter)
    (failed,) = events(tmp_path, "sink.failed")
    assert (failed["severity"], failed["payload"]["sink"]) == ("warning", "broken")
    assert "SystemExit" in failed["payload"]["cause"] or "no route" in failed["payload"]["cause"]
    assert told["broken"].status == "failed" and told["broken"].dropped >= 50
    assert sum(e["payload"]["dropped"] for e in events(tmp_path, "sink.dropped")) == told["broken"].dropped
    assert [name for name in other.names() if name[0] == "e"] == [f"e{number}" for number in range(50)]


def test_cx6_1_sink_that_recovers_has_missed_nothing(tmp_path):
    """A call that failed is made again, up to three times, after growing rests."""
    got, n_left = [], [3]

    def shaky(record):
        if n_left[0]:
            n_left[0] -= 1
            raise OSError("connection reset")
        got.append(record["name"])

    emitter = Emitter(Records(tmp_path, "r"), {"t": shaky}, pace=QUICK)
    for name in ("a", "b", "c"):
        emitter.emit(Event(name))
    wait_for(lambda: "c" in got)
    told = end(emitter)
    assert [name for name in got if name in "abc"] == ["a", "b", "c"]
    assert (told["t"].status, told["t"].dropped) == ("ok", 0)


class HangsAtItsEnd(Tracker):
    def close(self):
        self.is_called.set()
        threading.Event().wait(30)


@pytest.mark.parametrize("tracker", [Tracker(is_open=False), HangsAtItsEnd()], ids=["in a call", "at its end"])
def test_cx6_2_hanging_sink_ends_within_its_time(tmp_path, tracker):
    """The end of a run waits for it so long and no longer, says so, and the sinks after it still get their end."""
    other = Tracker()
    emitter = Emitter(Records(tmp_path, "r"), {"hangs": tracker, "other": other}, pace=QUICK)
    for number in range(9):
        emitter.emit(Event(f"e{number}"))
    begun_s = time.monotonic()
    told = end(emitter)
    assert QUICK.close_s <= time.monotonic() - begun_s < 25
    assert (told["hangs"].status, told["other"].status) == ("hung", "ok")
    assert other.is_closed and len(other.names()) >= 9
    assert other.names().count("sink.failed") == 1
    (failed,) = events(tmp_path, "sink.failed")
    assert failed["payload"] == {"sink": "hangs", "cause": "it did not end within 0.3 s"}


def test_cx6_2_sink_that_comes_back_after_the_end_touches_no_file(tmp_path):
    """When a listener that was left behind fails at last, the closed files of records stay as they are."""
    tracker = Tracker(is_open=False)

    def close():
        raise RuntimeError("too late")

    tracker.close = close
    emitter = Emitter(Records(tmp_path, "r"), {"late": tracker}, pace=QUICK)
    emitter.emit(Event("x", {}, "warning"))
    tracker.is_called.wait()
    end(emitter)
    size_bytes = (tmp_path / "events.ndjson").stat().st_size
    (thread,) = (t for t in threading.enumerate() if t.name == "sink-late")
    tracker.gate.set()
    thread.join()
    assert (tmp_path / "events.ndjson").stat().st_size == size_bytes
    with pytest.raises(OSError, match="Bad file descriptor"):
        emitter.emit(Event("too late"))


def test_name_of_the_screen_is_taken(tmp_path):
    """A sink that would take the place of the screen is refused."""
    with pytest.raises(SinkError, match="Give it another name"):
        Emitter(Records(tmp_path, "r"), {"console": Tracker()}, screen=Tracker())


def test_la5_common_event_fits_its_size(tmp_path):
    """What comes often stays within 280 bytes (growth.md 4.1)."""
    records = Records(tmp_path, "20260101-000000-abcdef")
    records.metrics(1_000_000, 10**9, 1.0, "train", {})
    emitter = Emitter(records)
    emitter.emit(Event("loss.nonfinite", {"step": 1_000_000, "in_row": 1, "count": 12}, "warning"))
    emitter.emit(Event("checkpoint.saved", {"checkpoint": "step-01000000", "reason": "interval", "metrics": {}}))
    end(emitter)
    assert max(len(line) for line in (tmp_path / "events.ndjson").read_bytes().splitlines()) <= 280


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(
        st.sampled_from(["debug", "info", "warning", "error", "critical", "metrics"]), min_size=1, max_size=40
    ),
    n_waiting=st.integers(0, 5),
)
def test_la5_written_is_delivered_limited_or_dropped(tmp_path_factory, script, n_waiting):
    """Whatever comes: every record is in the files, and at the sink or in a count, the critical ones at the sink."""
    place = tmp_path_factory.mktemp("run")
    tracker = Tracker()
    records = Records(place, "r")
    emitter = Emitter(records, {"t": tracker}, pace=RateLimit(n_waiting=n_waiting), minor_per_minute=3)
    for step, kind in enumerate(script):
        if kind == "metrics":
            records.metrics(step, 0, 0.0, "train", {})
        else:
            emitter.emit(Event("name", {}, kind))
    told = end(emitter)
    written = events(place)
    n_limited = sum(e["payload"]["n"] for e in written if e["name"] == "events.limited")
    n_metrics = script.count("metrics")
    n_late = sum(e["name"] == "sink.dropped" for e in written)  # told when the sink had ended
    assert len(list(read_records(place / "metrics.ndjson"))) == n_metrics
    assert sum(e["name"] == "name" for e in written) == len(script) - n_metrics
    n_known = len(tracker.got) + n_limited + told["t"].dropped
    assert len(written) + n_metrics - n_late <= n_known <= len(written) + n_metrics
    assert [r["severity"] for r in tracker.got if r.get("severity") == "critical"] == ["critical"] * script.count(
        "critical"
    )
