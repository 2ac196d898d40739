"""A tracker holds each step once, with the value of the branch that survived, whatever happened on the way."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import MissingExtra, SinkError, WrongValue
from meristem.events import Event
from meristem.sinks.records import Records, history
from meristem.sinks.trackers import start
from meristem.sinks.trackers.follow import LONGEST_REST_S, Followed, Follower, Record, scalars


class Memory:
    """A tracker of which one run outlives the processes that write to it."""

    def __init__(self, *, holds_back: bool, keeps: bool) -> None:
        self.id = "here"
        self.holds_back, self._keeps = holds_back, keeps
        self.records: list[Record] = []
        self.is_away, self.status, self.n_restarts = False, "unsaid", 0

    def open(self) -> int:
        self._reach()
        if not self._keeps:
            self.records = []
        return self.records[-1]["seq"] if self.records else 0

    def write(self, records: Sequence[Record]) -> None:
        self._reach()
        self.records += records

    def restart(self) -> None:
        self._reach()
        self.records, self.n_restarts = [], self.n_restarts + 1

    def close(self, status: str | None) -> None:
        self._reach()
        self.status = status

    def _reach(self) -> None:
        if self.is_away:
            raise ConnectionError("nobody answers")


class Run:
    """A run that is acted on, and the tracker that follows it on what stands for its thread."""

    def __init__(self, place: Path, tracker: Memory) -> None:
        self.place, self.tracker, self.now_s = place, tracker, 0.0
        self.step = self.saved = 0
        self.queue: list[Record] = []
        self.is_behind = False
        self.begin()
        self.records.event(Event("run.started"))

    def begin(self) -> None:
        """A process of the run; what waited in another is lost."""
        self.records, self.queue = Records(self.place, "run"), []
        self.follower = Follower(self.place, self.tracker, clock=lambda: self.now_s)
        self.records.listen(self.show)

    def show(self, record: Record) -> None:
        self.queue.append(record)
        if not self.is_behind:
            self.catch_up()

    def catch_up(self) -> None:
        while self.queue:
            try:
                self.follower(self.queue.pop(0))
            except ConnectionError:
                assert self.tracker.is_away

    def measure(self, split: Literal["train", "val"]) -> None:
        self.records.metrics(self.step, self.step, 0.0, split, {"nats": self.records.seq + 0.5})

    def act(self, name: str, number: int) -> None:
        if name == "steps":
            for _ in range(number):
                self.step += 1
                self.measure("train")
            self.measure("val")
        elif name in ("save", "save unsound"):
            step = max(self.step - number, self.saved)
            self.records.event(saved(step, is_sound=name == "save"))
            self.saved = step if name == "save" else self.saved
        elif name == "return":
            self.step = min(self.step, number)
            self.records.event(Event("rollback.done", {"resumed_from": self.step}))
        elif name in ("kill", "kill and resume elsewhere"):
            self.records.close()
            self.begin()
            self.step = min(self.step, number) if name != "kill" else self.saved
            self.records.event(Event("run.resumed", {"resumed_from": self.step}))
            self.measure("val")
        elif name in ("fall behind", "catch up"):
            self.is_behind = name == "fall behind"
            self.catch_up()
        else:
            self.tracker.is_away = name == "leave"
            self.now_s += LONGEST_REST_S

    def end(self) -> None:
        """The tracker has the history, each step once."""
        self.tracker.is_away = False
        self.act("catch up", 0)
        self.records.event(Event("run.ended", {"status": "finished", "exit": 0}))
        self.follower.close()
        self.records.close()
        found = {(r["step"], r["split"]): r["metrics"] for r in self.tracker.records}
        truth = history(self.place)
        assert len(self.tracker.records) == len(found) and found.keys() == {(r["step"], r["split"]) for r in truth}
        assert [v for (_, split), v in found.items() if split == "train"] == [
            r["metrics"] for r in truth if r["split"] == "train"
        ]
        assert self.tracker.status == "finished"


def saved(step: int, *, is_sound: bool = True) -> Event:
    """What a run says once a checkpoint of that step is on the disk."""
    return Event("checkpoint.saved", {"checkpoint": f"step-{step:08d}", "step": step, "is_sound": is_sound})


def acts(*names: str, number: int = 12) -> st.SearchStrategy[list[tuple[str, int]]]:
    numbers = {"steps": st.integers(1, 4), "save": st.integers(0, 3), "save unsound": st.integers(0, 3)}
    return st.lists(
        st.one_of(*(st.tuples(st.just(name), numbers.get(name, st.integers(0, number))) for name in names)), max_size=14
    )


PLAIN = ("steps", "save", "save unsound", "fall behind", "catch up", "kill")


@pytest.mark.parametrize("holds_back", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@settings(max_examples=25)
@given(acts=acts(*PLAIN, "return", "kill and resume elsewhere", "leave", "come back"))
def test_t2_each_step_once_with_the_value_that_survived(holds_back, keeps, acts):
    """Rollbacks, kills that lose what was waiting, servers that go and come back: in the end it is the history."""
    with TemporaryDirectory() as folder:
        run = Run(Path(folder), Memory(holds_back=holds_back, keeps=keeps))
        for act in acts:
            run.act(*act)
        run.end()


@settings(max_examples=60)
@given(acts=acts(*PLAIN))
def test_t1_a_kill_at_any_moment_leaves_what_the_tracker_has(acts):
    """The run goes on from its newest sound checkpoint, and nothing has to be taken back.

    A checkpoint may be done steps after the one that it is of, one saved while the guard was counting is passed over,
    and the step resumed from may have been measured again before the tracker is opened.
    """
    with TemporaryDirectory() as folder:
        run = Run(Path(folder), Memory(holds_back=True, keeps=True))
        for act in acts:
            run.act(*act)
        run.end()
        assert run.tracker.n_restarts == 0


def test_t1_while_nobody_answers_it_is_left_alone(tmp_path):
    """It raises at each try and not in between, keeps what waits within bounds, and tells all later."""
    tracker, now_s, n_failures = Memory(holds_back=False, keeps=True), 0.0, 0
    tracker.is_away = True
    records = Records(tmp_path, "run")
    follower = Follower(tmp_path, tracker, clock=lambda: now_s)

    def show(record: Record) -> None:
        nonlocal n_failures
        try:
            follower(record)
        except ConnectionError:
            n_failures += 1

    records.listen(show)
    for step in range(1, 12_001):
        records.metrics(step, step, 0.0, "train", {"nats": float(step)})
        now_s += 1.0
    assert 5 < n_failures < 60
    assert len(follower._waiting) <= 10_000
    tracker.is_away = False
    now_s += LONGEST_REST_S
    records.metrics(12_001, 12_001, 0.0, "train", {"nats": 1.0})
    records.close()
    assert [record["step"] for record in tracker.records] == list(range(1, 12_002))


def test_a_step_is_held_back_until_a_checkpoint_covers_it(tmp_path):
    tracker = Memory(holds_back=True, keeps=True)
    records = Records(tmp_path, "run")
    records.listen(Follower(tmp_path, tracker))
    for step in (1, 2, 3):
        records.metrics(step, step, 0.0, "train", {"nats": float(step)})
    assert tracker.records == []
    records.event(saved(3))
    records.metrics(4, 4, 0.0, "train", {"nats": 4.0})
    records.event(Event("rollback.done", {"resumed_from": 3}))
    records.close()
    assert [record["step"] for record in tracker.records] == [1, 2, 3] and tracker.n_restarts == 0


def test_values_that_are_no_numbers_stay_what_they_are():
    record = {
        "split": "val",
        "task": "likelihood",
        "metrics": {"a": 1, "b": None, "c": None},
        "nonfinite": {"c": "-inf"},
    }
    assert scalars(record) == {"val/likelihood/a": 1.0, "val/likelihood/c": float("-inf")}


def test_cx6_4_missing_extra(monkeypatch):
    """It names the command that installs it, before anything is made."""
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[mlflow\]'"):
        start.require(["mlflow"], {})


def test_cx6_4_question_mark(monkeypatch, tmp_path):
    """A tracker with ``?`` that is not there is one event."""
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    start.require(["mlflow?"], {})
    told: list[Event] = []
    run = Followed(tmp_path, "id", "name", "project", None, {})
    assert start.followers(["mlflow?"], run, {}, told.append) == {}
    assert [event.name for event in told] == ["degraded"]


def test_a_tracker_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    """CX-13.3: unless it has a ``?``; then it is one event."""

    def broken(run: Followed) -> Memory:
        raise OSError("no room")

    monkeypatch.setitem(start.trackers._entries, "broken", broken)
    monkeypatch.setattr(start, "_require_library", lambda name: None)
    run = Followed(tmp_path, "id", "name", "project", None, {})
    with pytest.raises(SinkError, match=r"the sink 'broken' cannot start: OSError: no room\. .*'broken\?'"):
        start.followers(["broken"], run, {}, lambda event: None)
    told: list[Event] = []
    assert start.followers(["broken?"], run, {}, told.append) == {} and len(told) == 1


@pytest.mark.parametrize(
    ("use", "places"), [(["wandb", "wandb"], {}), (["wandb", "wandb?"], {}), (["wandb"], {"mlflow": "http://here"})]
)
def test_names_and_places_fit_each_other(use, places):
    with pytest.raises(WrongValue, match="once in sinks.use"):
        start.require(use, places)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(WrongValue, match="no sink is called 'tensorbord'. Nearest: tensorboard"):
        start.require(["tensorbord"], {})
