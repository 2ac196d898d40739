"""A tracker holds each step once, with the value of the branch that survived, whatever happened on the way."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

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


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("return"), st.integers(0, 12)),
        st.tuples(st.just("kill"), st.integers(0, 12)),
        st.tuples(st.just("leave"), st.just(0)),
        st.tuples(st.just("come back"), st.just(0)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("holds_back", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@settings(max_examples=30)
@given(acts=ACTS)
def test_t2_each_step_once_with_the_value_that_survived(holds_back, keeps, acts):
    """Rollbacks, kills that lose what was waiting, servers that go and come back: in the end it is the history."""
    tracker, now_s = Memory(holds_back=holds_back, keeps=keeps), [0.0]
    with TemporaryDirectory() as folder:
        place, step, begun = Path(folder), 0, Event("run.started")

        def process() -> tuple[Records, Follower]:
            records = Records(place, "run")
            follower = Follower(place, tracker, clock=lambda: now_s[0])

            def show(record: Record) -> None:
                try:
                    follower(record)
                except ConnectionError:
                    assert tracker.is_away

            records.listen(show)
            return records, follower

        records, follower = process()
        records.event(begun)
        for act, number in acts:
            if act == "steps":
                for _ in range(number):
                    step += 1
                    records.metrics(step, step, 0.0, "train", {"nats": records.seq + 0.5})
                records.metrics(step, step, 0.0, "val", {"nats": records.seq + 0.5})
            elif act == "save":
                records.event(Event("checkpoint.saved"))
            elif act == "return":
                step = min(step, number)
                records.event(Event("rollback.done", {"resumed_from": step}))
            elif act == "kill":
                records.close()
                records, follower = process()
                step = min(step, number)
                records.event(Event("run.resumed", {"resumed_from": step}))
                records.metrics(step, step, 0.0, "val", {"nats": records.seq + 0.5})
            else:
                tracker.is_away = act == "leave"
                now_s[0] += LONGEST_REST_S
        tracker.is_away = False
        records.event(Event("run.ended", {"status": "finished", "exit": 0}))
        follower.close()
        records.close()
        found = {(r["step"], r["split"]): r["metrics"] for r in tracker.records}
        truth = history(place)
        assert len(tracker.records) == len(found) and found.keys() == {(r["step"], r["split"]) for r in truth}
        assert [v for (_, split), v in found.items() if split == "train"] == [
            r["metrics"] for r in truth if r["split"] == "train"
        ]
        assert tracker.status == "finished"


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
    records.event(Event("checkpoint.saved"))
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
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[mlflow\]'"):
        start.require(["mlflow"], {})


def test_cx6_4_question_mark(monkeypatch, tmp_path):
    """A tracker with ``?`` that is not there is one event."""
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
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
