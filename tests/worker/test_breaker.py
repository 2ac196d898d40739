"""The breaker agrees with a naive one that remembers everything, and survives being written down."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.worker.breaker import Breaker
from meristem.worker.deadline import Deadline


class Naive:
    """A breaker told as a story: it keeps all that happened and changes itself as time goes by."""

    def __init__(self, n_failures, span, pause, n_successes):
        self.n_failures, self.span, self.pause, self.n_successes = n_failures, span, pause, n_successes
        self.mode, self.since, self.log = "closed", None, []

    def look(self, now):
        if self.mode == "open" and now - self.since >= self.pause:
            self.mode, self.log = "half-open", []
        return self.mode

    def happen(self, now, is_good):
        mode = self.look(now)
        if mode == "open":
            return
        self.log.append((now, is_good))
        failures = [at for at, good in self.log if not good and now - at < self.span]
        if not is_good and (mode == "half-open" or len(failures) >= self.n_failures):
            self.mode, self.since = "open", now
        elif mode == "half-open" and len(self.log) >= self.n_successes:
            self.mode, self.log = "closed", []


SETTINGS = st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
HAPPENINGS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40)


@given(settings=SETTINGS, happenings=HAPPENINGS)
def test_ta2_breaker_agrees_with_the_naive_one(settings, happenings):
    """State for state, whatever fails when; written down and read again after each step."""
    naive, breaker, now = Naive(*settings), Breaker(*settings), 0
    for wait, is_good in happenings:
        now += wait
        assert breaker.state(now) == naive.look(now)
        naive.happen(now, is_good)
        breaker = breaker.succeeded(now) if is_good else breaker.failed(now)
        assert breaker.state(now) == naive.look(now)
        assert Breaker.from_json(orjson.loads(orjson.dumps(breaker.to_json()))) == breaker
        assert len(breaker.failed_at) < breaker.n_failures


def test_a_breaker_through_its_life():
    breaker = Breaker(n_failures=2, span=10, pause=5, n_successes=2)
    assert breaker.failed(0).failed(11).state(11) == "closed", "the first failure is too long ago"
    opened = breaker.failed(0).failed(9)
    assert [opened.state(now) for now in (9, 13, 14)] == ["open", "open", "half-open"]
    assert opened.succeeded(14).state(14) == "half-open"
    assert opened.succeeded(14).succeeded(15).state(15) == "closed"
    assert opened.succeeded(14).failed(15).state(15) == "open"
    assert opened.succeeded(10) == opened == opened.failed(10), "while it is open nothing counts"
    assert breaker == Breaker(n_failures=2, span=10, pause=5, n_successes=2), "a value does not change"


def test_what_is_written_down_must_be_known():
    with pytest.raises(TypeError):
        Breaker.from_json({**Breaker().to_json(), "patience": 3})


def test_a_deadline_is_a_moment_on_a_clock():
    now = [100.0]
    deadline = Deadline.after(2.5, lambda: now[0])
    assert (deadline.at_s, deadline.left_s, deadline.is_over) == (102.5, 2.5, False)
    now[0] = 102.5
    assert (deadline.left_s, deadline.is_over) == (0.0, True)
    now[0] = 104.0
    assert deadline.left_s == -1.5
