"""Work in a thread: the caller is back at its deadline."""

import threading
import time

import pytest

from meristem.errors import WorkerError, WorkerTimeout
from meristem.worker.deadline import Deadline
from meristem.worker.thread import in_thread


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


def test_ta2_another_type_than_was_expected_is_an_error():
    with pytest.raises(WorkerError, match="sum gave str; expected") as caught:
        in_thread("sum", lambda deadline: "a text", Deadline.after(60), expects=float)
    assert caught.value.fields["reason"] == "wrong type"
