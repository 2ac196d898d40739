"""The system's time may jump by a day and back: nothing that a run decides hangs on it."""

import datetime
import io
import time
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import rich.console
import torch

from meristem.checkpoint import manifest as manifests
from meristem.checkpoint import run as runs
from meristem.checkpoint.store import entries, newest
from meristem.data import prepare
from meristem.events import Event, silent
from meristem.recipes.pretrain import Result, pretrain
from meristem.sinks import records as records_of_a_run
from meristem.sinks.console import Console
from meristem.sinks.emitter import Emitter
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import Records, history
from recipes.small import config, write_text

pytestmark = pytest.mark.fault

DAY = datetime.timedelta(days=1)
SETTINGS = ("train.steps=24", "checkpoint.every=3", "checkpoint.best=0", "eval.every=1000", "eval.n_samples=0")
IN_A_HURRY = ("train.log_every=3", "checkpoint.every=1000000", "checkpoint.every_s=0.2", "eval.every_s=0.3")


class Wall:
    """What time the system says it is: ``jumps`` holds steps of the run, and by how much the time is then off."""

    def __init__(self, jumps: dict[int, datetime.timedelta]) -> None:
        self.jumps, self.step = jumps, 0
        self.now, self.time = datetime.datetime.now, time.time

    @property
    def off(self) -> datetime.timedelta:
        reached = [step for step in self.jumps if step <= self.step]
        return self.jumps[max(reached)] if reached else datetime.timedelta()


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wall]:
    """Every clock of the system that can jump, in every module that reads one; the monotonic ones go on."""
    wall = Wall({8: -DAY, 16: DAY})

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return wall.now(tz) + wall.off

    written = Records._write

    def write(self, stream, kind, step, *more, **named):
        wall.step = wall.step if step is None else step
        written(self, stream, kind, step, *more, **named)

    jumping = types.SimpleNamespace(datetime=Jumping, UTC=datetime.UTC)
    for module in (records_of_a_run, runs, manifests, prepare):
        monkeypatch.setattr(module, "datetime", jumping)
    monkeypatch.setattr(time, "time", lambda: wall.time() + wall.off.total_seconds())
    monkeypatch.setattr(Records, "_write", write)
    yield wall


def run(text: Path, name: str, *settings: str) -> Result:
    view = Console(screen=rich.console.Console(file=io.StringIO()))
    return pretrain(config(text, *SETTINGS, *settings), run_dir=text.parent / name, view=view)


def losses(result: Result) -> list[tuple[int, float]]:
    return [(r["step"], r["metrics"]["nats"]) for r in history(result.run_dir) if r["split"] == "train"]


def all_records(place: Path) -> list[dict]:
    found = [record for name in ("metrics", "events", "system") for record in read_records(place / f"{name}.ndjson")]
    return sorted(found, key=lambda record: record["seq"])


def names(records: list[dict]) -> list[str]:
    """The events of a run; only the first one prepares its text."""
    return [record["name"] for record in records if "name" in record and not record["name"].startswith("data.")]


@pytest.fixture
def truth(tmp_path: Path) -> Result:
    """The run under a clock that does not jump; asked for before ``wall``."""
    return run(write_text(tmp_path), "truth")


def test_clock_jump_changes_nothing_of_a_run(truth, wall):
    """A day back, then two forth: same losses and weights to the bit, complete records, the right newest checkpoint."""
    result = run(truth.run_dir.parent / "text.txt", "jumping")
    found = all_records(result.run_dir)
    times = [datetime.datetime.fromisoformat(record["ts"]) for record in found]
    between = [after - before for before, after in pairwise(times)]
    assert any(step < -DAY / 2 for step in between) and any(step > DAY for step in between)

    assert losses(result) == losses(truth) and len(losses(truth)) == 24
    assert [record["seq"] for record in found] == list(range(1, len(found) + 1))
    assert names(found) == names(all_records(truth.run_dir))
    ours, theirs = (newest(each.run_dir / "checkpoints", silent) for each in (result, truth))
    assert ours and theirs and ours.step == theirs.step == 24
    for name, tensor in theirs.tree("model").items():
        assert torch.equal(ours.tree("model")[name], tensor)
    assert runs.read(result.run_dir)["status"] == "finished"


def test_clock_jump_leaves_the_order_of_checkpoints(truth, wall):
    """Saved a day "before" the ones that it follows, the newest is the newest, the last three stay, a run goes on."""
    text = truth.run_dir.parent / "text.txt"
    wall.jumps = {13: -DAY}
    first = run(text, "jumping", "train.steps=14")
    kept = entries(first.run_dir / "checkpoints")
    assert [entry.step for entry in kept] == [9, 12, 14]
    assert kept[0].created > kept[-1].created
    wall.jumps = {0: -2 * DAY}
    again = run(text, "jumping")
    (resumed,) = [r for r in read_records(again.run_dir / "events.ndjson") if r["name"] == "run.resumed"]
    assert resumed["payload"]["resumed_from"] == 14
    assert losses(again) == losses(truth)


def test_clock_jump_leaves_alarms_their_time(truth, wall):
    """What is due every so many seconds of training comes neither at once nor never."""
    text = truth.run_dir.parent / "text.txt"
    wall.jumps = {4: -DAY, 8: DAY}
    result = run(text, "timed", *IN_A_HURRY, "train.steps=null", "train.max_time=1.5s")
    assert result.step > 8 and result.seconds_used >= 1.5
    n_evaluations = sum(record["split"] == "val" for record in history(result.run_dir)) - 2  # two at the end
    saved = [e for e in read_records(result.run_dir / "events.ndjson") if e["name"] == "checkpoint.saved"]
    n_saved = sum(event["payload"]["reason"] == "interval" for event in saved)
    assert 1 <= n_evaluations <= 1 + result.seconds_used / 0.3
    assert 1 <= n_saved <= 1 + result.seconds_used / 0.2


def test_clock_jump_leaves_the_heart_beating(tmp_path, wall):
    """The thread beats by a clock that does not jump, and the manifest carries the time that the system says."""
    manifest = runs.RunManifest.create(tmp_path)
    events: list[Event] = []
    wall.jumps = {1: -DAY, 2: DAY}
    with manifest.beating(events.append, every_s=0.01):
        for step in range(3):
            wall.step = step
            before = manifest.content["heartbeat"]
            deadline = time.monotonic() + 10
            n_seen = 0
            while n_seen < 3:
                assert time.monotonic() < deadline
                time.sleep(0.002)
                if manifest.content["heartbeat"] != before:
                    before, n_seen = manifest.content["heartbeat"], n_seen + 1
            assert runs.read(tmp_path)["status"] == "running"
    assert events == []


def test_clock_jump_limits_no_event(tmp_path, wall):
    """The limit of events goes by the monotonic clock: two days are no minute."""
    emitter = Emitter(Records(tmp_path, "r"), {"t": lambda record: None}, minor_per_minute=5)
    for step in range(20):
        wall.step = step
        emitter.emit(Event("x"))
    emitter.close()
    emitter.records.close()
    (limited,) = [e for e in read_records(tmp_path / "events.ndjson") if e["name"] == "events.limited"]
    assert limited["payload"] == {"n": 15, "by_name": {"x": 15}}
