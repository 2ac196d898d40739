"""One place for deadline, retry and giving up: every fault meets every patience, in both makes."""

import threading
import time

import pytest

from meristem.errors import BreakerOpen, WorkerError, WorkerTimeout
from meristem.worker.attempt import Patience, attempt, in_thread
from meristem.worker.breaker import Breaker
from meristem.worker.deadline import Deadline
from meristem.worker.process import Worker

FAILS = "worker.endpoints:fails"
FAULTS = {"slow": WorkerTimeout, "hang": WorkerTimeout, "raise": WorkerError, "wrong type": WorkerError}
LATE, AMPLE_S = ("slow", "hang"), 60.0
"""Faults that take longer than a try; whatever else is called has more time than it needs on any machine."""
GIVE_UP, RETRY, INSIST = Patience(0.3, 1, 0.05), Patience(0.3, 2, 0.05), Patience(0.3, 3, 0.05)


@pytest.fixture(scope="module")
def worker():
    with Worker("test", n_spare=2) as worker:
        worker.ready(60)
        yield worker


@pytest.fixture
def by_process(worker):
    """A call that fails a number of times, in a process."""
    worker.ready(AMPLE_S)

    def make(fault: str, n_failures: int):
        tries: list[int] = []

        def call(deadline: Deadline) -> object:
            tries.append(1)
            is_late = fault in LATE and len(tries) <= n_failures
            now = fault if len(tries) <= n_failures else None
            return worker.call(FAILS, now, deadline.left_s if is_late else AMPLE_S, expects=float)

        return call

    return make


@pytest.fixture
def by_thread():
    """The same in a thread; what hangs is let go when the test is over."""
    over = threading.Event()

    def make(fault: str, n_failures: int):
        marks: list[int] = []

        def work(deadline: Deadline) -> object:
            marks.append(1)
            if len(marks) > n_failures:
                return 7.5
            if fault == "raise":
                raise RuntimeError("not yet")
            if fault in ("slow", "hang"):
                over.wait(2 if fault == "slow" else None)
            return "a text"

        def call(deadline: Deadline) -> object:
            is_late = fault in LATE and len(marks) < n_failures
            return in_thread("work", work, deadline if is_late else Deadline.after(AMPLE_S), expects=float)

        return call

    yield make
    over.set()


@pytest.mark.parametrize("make", ["by_process", "by_thread"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("patience", [GIVE_UP, RETRY, INSIST], ids=["give up", "retry", "insist"])
@pytest.mark.parametrize("n_failures", [1, 9])
def test_la1_every_fault_meets_every_patience(request, make, fault, patience, n_failures):
    """As many tries as patience has, no more than are needed; each failure counted; time bounded; one event."""
    call, events = request.getfixturevalue(make)(fault, n_failures), []
    begun_s = time.perf_counter()
    outcome = attempt("score", call, patience, Breaker(n_failures=4), emit=events.append)
    assert time.perf_counter() - begun_s < AMPLE_S
    n_expected = min(patience.n_tries, n_failures + 1)
    is_good = n_failures < patience.n_tries
    assert outcome.n_tries == n_expected and len(events) == 1
    assert len(outcome.breaker.failed_at) == n_expected - is_good
    told = events[0].payload
    if is_good:
        assert (outcome.value, outcome.error, events[0].name) == (7.5, None, "worker.called")
    else:
        assert outcome.value is None and type(outcome.error) is FAULTS[fault]
        assert events[0].name == "worker.gave_up" and told["error"] == FAULTS[fault].__name__
    assert (told["name"], told["n_tries"], told["breaker"]) == ("score", n_expected, "closed")


def test_la1_an_open_breaker_lets_nothing_through_until_its_pause_is_over():
    """Tries end when it opens; then none is made; half open, one is; good again, it closes."""
    now, made = [0.0], []

    def bad(deadline):
        made.append("bad")
        raise WorkerError("down", reason="raised")

    def go(call, breaker):
        return attempt("score", call, Patience(1, 5, 0.5), breaker, clock=lambda: now[0], sleep=lambda s: None)

    outcome = go(bad, Breaker(n_failures=3, span=60, pause=30, n_successes=1))
    assert made == ["bad"] * 3 and outcome.breaker.state(0) == "open"
    shut = go(bad, outcome.breaker)
    assert isinstance(shut.error, BreakerOpen) and shut.n_tries == 0 and len(made) == 3
    now[0] = 30.0
    again = go(bad, shut.breaker)
    assert again.n_tries == 1 and again.breaker.state(30) == "open"
    now[0] = 60.0
    good = go(lambda deadline: 5, again.breaker)
    assert (good.value, good.n_tries, good.breaker.state(60)) == (5, 1, "closed")


def test_la1_a_stopped_worker_is_asked_once():
    def stopped(deadline):
        raise WorkerError("gone", reason="stopped")

    assert attempt("score", stopped, INSIST, Breaker()).n_tries == 1


def test_la1_what_is_no_fault_of_the_call_is_not_hidden():
    """Only a WorkerError is an outcome; a programmer's mistake comes through."""
    with pytest.raises(ZeroDivisionError):
        attempt("score", lambda deadline: 1 / 0, INSIST, Breaker())


def test_ta2_a_thread_sees_that_its_time_is_over_and_its_answer_is_dropped(eventually):
    """The cooperative make: the caller is back in time, the work finds its deadline over and ends by itself."""
    events, seen, returned = [], [], threading.Event()

    def work(deadline: Deadline) -> int:
        while not deadline.is_over:
            time.sleep(0.01)
        returned.wait()
        seen.append(deadline.left_s)
        return 3

    with pytest.raises(WorkerTimeout, match="tidy was not done at its deadline"):
        in_thread("tidy", work, Deadline.after(0.1), emit=events.append)
    assert not seen
    returned.set()
    eventually(lambda: events)
    assert seen[0] <= 0 and events[0].name == "worker.late" and events[0].payload["name"] == "tidy"


def test_ta2_a_thread_in_time_gives_its_answer_and_its_own_errors():
    assert in_thread("sum", lambda deadline: 3, Deadline.after(60), expects=int) == 3
    with pytest.raises(WorkerError, match=r"sum raised ZeroDivisionError") as caught:
        in_thread("sum", lambda deadline: 1 // 0, Deadline.after(60))
    assert "ZeroDivisionError" in caught.value.fields["traceback"]
