"""Records arrive whole, in order, and tell what a run really did."""

import errno
import math
import os
import threading
from datetime import datetime
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import BadRecords, DiskFull
from meristem.events import Event
from meristem.sinks.config import SinksConfig
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import RETURNS, Records, history


def write_steps(records, steps, value=0.0):
    for step in steps:
        records.metrics(step, step * 7, step / 10, "train", {"loss": value + step})


def test_envelope_and_fields_come_back(tmp_path):
    """Each kind goes to its own file with the envelope; ``seq`` rises over all of them."""
    records = Records(tmp_path, "r1")
    records.metrics(3, 21, 0.5, "val", {"loss": 2.5}, task="copy", tags={"level": 1})
    records.event(Event("checkpoint.saved", {"path": Path("a/b")}), step=3)
    records.sample(4, "Once", "upon a\ntime é", {"temperature": 0.8})
    records.system({"source": "psutil"})
    records.close()
    (metrics,), (event,), (sample,), (system,) = (
        list(read_records(tmp_path / f"{name}.ndjson")) for name in ("metrics", "events", "samples", "system")
    )
    assert [r["seq"] for r in (metrics, event, sample, system)] == [1, 2, 3, 4]
    assert [r["step"] for r in (metrics, event, sample, system)] == [3, 3, 4, 4]
    assert {r["run"] for r in (metrics, event, sample, system)} == {"r1"}
    assert metrics["schema"] == "meristem.metrics/1"
    assert (metrics["tokens"], metrics["task"], metrics["metrics"], metrics["tags"]) == (
        21,
        "copy",
        {"loss": 2.5},
        {"level": 1},
    )
    assert event["payload"] == {"path": "a/b"}
    assert sample["text"] == "upon a\ntime é"
    assert datetime.fromisoformat(metrics["ts"]).utcoffset().total_seconds() == 0


@given(value=st.floats() | st.integers() | st.booleans() | st.none())
def test_number_that_json_cannot_hold_is_named(tmp_path_factory, value):
    """CX-5.5: NaN and infinity become null and are named, integers beyond 2^53 - 1 text; all else is unchanged."""
    run_dir = tmp_path_factory.mktemp("run")
    records = Records(run_dir, "r")
    records.event(Event("x", {"deep": {"er": [0, value]}}), step=0)
    records.close()
    (record,) = read_records(run_dir / "events.ndjson")
    found = record["payload"]["deep"]["er"][1]
    if isinstance(value, float) and not math.isfinite(value):
        assert found is None
        assert record["nonfinite"] == {"deep.er.1": {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")}
    else:
        expected = str(value) if type(value) is int and abs(value) > 2**53 - 1 else value
        assert (type(found), found) == (type(expected), expected)
        assert "nonfinite" not in record


def test_scalars_of_torch_are_numbers(tmp_path):
    """A zero-dimensional tensor is its number, and what JSON does not know is its text."""
    records = Records(tmp_path, "r")
    records.metrics(1, 1, 0.0, "train", {"a": torch.tensor(2.5), "b": torch.tensor(math.nan)})
    records.event(Event("x", {"device": torch.device("cpu"), 3: {1}, "broken": "\ud800"}), step=1)
    records.close()
    (metrics,) = read_records(tmp_path / "metrics.ndjson")
    assert metrics["metrics"] == {"a": 2.5, "b": None}
    assert metrics["nonfinite"] == {"b": "nan"}
    (event,) = read_records(tmp_path / "events.ndjson")
    assert event["payload"] == {"device": "cpu", "3": [1], "broken": "?"}


@pytest.mark.parametrize("big", [list(range(1001)), "x" * 65_600])
def test_payload_beyond_the_limits_says_so(tmp_path, big):
    """An entry that is too much is left out by name; the others stay."""
    records = Records(tmp_path, "r")
    records.event(Event("x", {"before": 1, "big": big, "after": 2}), step=0)
    records.close()
    (record,) = read_records(tmp_path / "events.ndjson")
    assert record["payload"] == {"before": 1, "after": 2, "truncated": ["big"], "n_truncated": 1}


def test_seq_goes_on_after_a_restart(tmp_path):
    """A new writer continues after the highest number of any file, even one that was rotated away."""
    records = Records(tmp_path, "r", rotate_size_bytes=150)
    write_steps(records, range(5))
    records.close()
    (tmp_path / "metrics.ndjson").write_bytes(b"")
    n_whole = len(list(read_records(tmp_path / "metrics.ndjson")))
    again = Records(tmp_path, "r")
    assert again.seq == n_whole
    assert Records(tmp_path, "r", seq=77).seq == 77


def test_rotation_loses_nothing(tmp_path):
    """Past the limit a new file is begun; reading gives every record once and in order."""
    records = Records(tmp_path, "r", rotate_size_bytes=500)
    write_steps(records, range(23))
    records.close()
    files = sorted(path.name for path in tmp_path.glob("metrics.*"))
    assert files[:2] == ["metrics.0001.ndjson", "metrics.0002.ndjson"]
    assert all((tmp_path / name).stat().st_size <= 500 for name in files)
    assert [r["step"] for r in read_records(tmp_path / "metrics.ndjson")] == list(range(23))


def test_threads_do_not_mix_lines(tmp_path):
    """Records of several threads arrive whole, each number once, in the order of the file."""
    records = Records(tmp_path, "r")
    threads = [threading.Thread(target=write_steps, args=(records, range(50), n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records.close()
    assert [r["seq"] for r in read_records(tmp_path / "metrics.ndjson")] == list(range(1, 201))


@settings(max_examples=40)
@given(n_cut=st.integers(0, 400))
def test_torn_end_is_passed_over_and_then_cut(tmp_path_factory, n_cut):
    """Wherever the file was torn: a reader gives the whole lines and says so; the next writer goes on after them.

    CX-5.4.
    """
    run_dir = tmp_path_factory.mktemp("run")
    records = Records(run_dir, "r")
    write_steps(records, range(3))
    records.close()
    path = run_dir / "metrics.ndjson"
    lines = path.read_bytes().splitlines(keepends=True)
    content = b"".join(lines)[: max(0, sum(map(len, lines)) - n_cut)]
    path.write_bytes(content)
    whole = content.count(b"\n")
    is_torn = not content.endswith(b"\n") and content != b""
    events = []
    assert [r["step"] for r in read_records(path, events.append)] == list(range(whole))
    assert [(e.payload["what"], e.payload["line"]) for e in events] == [("torn last line", whole + 1)] * is_torn
    again = Records(run_dir, "r")
    write_steps(again, [9])
    again.close()
    found = list(read_records(path))
    assert [r["step"] for r in found] == [*range(whole), 9]
    assert [e["payload"]["what"] for e in read_records(run_dir / "events.ndjson")] == ["torn end cut off"] * is_torn
    assert sorted({r["seq"] for r in found}) == [r["seq"] for r in found]


def test_zeros_after_a_power_cut_are_cut(tmp_path):
    """Some file systems leave zeros at the end, more than one block of them here; they go like any torn end."""
    records = Records(tmp_path, "r")
    write_steps(records, range(2))
    records.close()
    with open(tmp_path / "metrics.ndjson", "ab") as file:
        file.write(bytes(200_001))
    again = Records(tmp_path, "r")
    write_steps(again, [2])
    again.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.ndjson")] == [0, 1, 2]


def test_damage_in_the_middle_is_an_error(tmp_path):
    """A broken line that others follow was not torn by a crash: the file and line are named."""
    records = Records(tmp_path, "r")
    write_steps(records, range(3))
    records.close()
    path = tmp_path / "metrics.ndjson"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"step": 1\n' + third)
    with pytest.raises(BadRecords, match=r"line 2 of .*metrics\.ndjson is no JSON record"):
        list(read_records(path))


def test_absent_file_is_an_error(tmp_path):
    """Records that are not there are not the same as no records."""
    with pytest.raises(BadRecords, match="no file of records"):
        list(read_records(tmp_path / "metrics.ndjson"))


@pytest.mark.parametrize("n_taken", [None, 5])
def test_full_disk_leaves_the_file_whole(tmp_path, monkeypatch, n_taken):
    """No room, or room for five bytes: ``DiskFull``, and every line before it can be read."""
    records = Records(tmp_path, "r")
    write_steps(records, range(2))
    write = os.write

    def full(descriptor, content):
        if n_taken is None:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, content[:n_taken])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull, match=r"no space is left to add a record to .*metrics\.ndjson"):
            write_steps(records, [2])
    write_steps(records, [3])
    records.close()
    events = []
    assert [r["step"] for r in read_records(tmp_path / "metrics.ndjson", events.append)] == [0, 1, 3]
    assert events == []


@settings(max_examples=60)
@given(
    legs=st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1), st.sampled_from(RETURNS)), min_size=1, max_size=5),
    n_evaluations=st.integers(1, 3),
)
def test_history_is_what_was_kept(tmp_path_factory, legs, n_evaluations):
    """Through any resumes and rollbacks to any earlier step, history is the steps of the branch that survived, once."""
    run_dir = tmp_path_factory.mktemp("run")
    expected: list[tuple[int, int]] = []
    records = Records(run_dir, "r")
    for leg, (n_steps, where, back) in enumerate(legs):
        if leg:
            expected = expected[: round(where * len(expected))]
            if back == "run.resumed":
                records.close()
                records = Records(run_dir, "r")
            resumed_from = expected[-1][0] if expected else 0
            records.event(Event(back, {"resumed_from": resumed_from}))
            assert records.step == resumed_from
        start = expected[-1][0] if expected else 0
        for step in range(start + 1, start + n_steps + 1):
            for _ in range(n_evaluations):
                records.metrics(step, 0, 0.0, "val", {"leg": leg})
            expected.append((step, leg))
    records.close()
    assert [(r["step"], r["metrics"]["leg"]) for r in history(run_dir)] == expected


def test_cx5_4_duplicates_collapse_and_are_counted(tmp_path):
    """Of equal step, split, task and metric the last value counts, and a metric that comes once stays."""
    records = Records(tmp_path, "r")
    for metrics in ({"a": math.nan, "b": 1.0, "c": math.nan}, {"a": 2.0, "b": 3.0}, {"a": 4.0}):
        records.metrics(1, 1, 0.0, "val", metrics)
    records.metrics(1, 1, 0.0, "train", {"a": 5.0})
    records.metrics(1, 1, 0.0, "val", {"a": 6.0}, task="copy")
    records.close()
    events = []
    first, *others = history(tmp_path, emit=events.append)
    assert (first["seq"], first["metrics"], first["nonfinite"]) == (3, {"a": 4.0, "b": 3.0, "c": None}, {"c": "nan"})
    assert [record["metrics"] for record in others] == [{"a": 5.0}, {"a": 6.0}]
    assert [(event.name, event.payload["n"]) for event in events] == [("records.replaced", 3)]


def test_what_happens_after_a_return_stands_at_its_step(tmp_path):
    """After going back, events and readings belong to the branch that survives until a step is recorded again."""
    records = Records(tmp_path, "r")
    write_steps(records, [1, 2, 3])
    records.event(Event("guard.verdict"))
    records.event(Event("rollback.done", {"resumed_from": 1}))
    records.event(Event("checkpoint.saved"))
    records.system({})
    write_steps(records, [2])
    records.event(Event("rollback.done", {"why": "there was nothing to go back to"}))
    records.close()
    told = [(event["name"], event["step"]) for event in read_records(tmp_path / "events.ndjson")]
    assert told == [("guard.verdict", 3), ("rollback.done", 1), ("checkpoint.saved", 1), ("rollback.done", 2)]
    assert [event["name"] for event in history(tmp_path, "events")] == [name for name, _ in told[1:]]
    assert [record["step"] for record in read_records(tmp_path / "system.ndjson")] == [1]


def test_part_has_the_limits_of_the_sampler():
    """Half a second is the shortest interval of readings."""
    with pytest.raises(ValueError, match="system_every_s"):
        SinksConfig(system_every_s=0.4)


def test_one_line_is_one_json_object(tmp_path):
    """Line ends inside texts stay inside their line."""
    records = Records(tmp_path, "r")
    records.sample(0, "a\nb\r\n\u2028", "\x00", {})
    records.close()
    content = (tmp_path / "samples.ndjson").read_bytes()
    assert content.count(b"\n") == 1
    assert orjson.loads(content)["prompt"] == "a\nb\r\n\u2028"


def test_a_run_may_be_read_while_it_writes(tmp_path):
    """Whatever moment a reader comes, it gets the whole records so far; a line in the making is no bad record."""
    path = tmp_path / "metrics.ndjson"
    path.touch()

    def write():
        with path.open("ab", buffering=0) as file:
            for step in range(3000):
                line = b'{"step": %d, "text": "%s"}\n' % (step, b"x" * (step % 97))
                file.write(line[:5])
                file.write(line[5:])

    writer = threading.Thread(target=write)
    writer.start()
    seen = [0]
    while writer.is_alive():
        steps = [record["step"] for record in read_records(path)]
        assert steps == list(range(len(steps)))
        seen.append(len(steps))
    writer.join()
    assert seen == sorted(seen)
    assert len(list(read_records(path))) == 3000
