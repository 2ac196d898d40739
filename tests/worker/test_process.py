"""A call in another process: stopped at its deadline, told apart in its failures, replaced after a loss."""

import concurrent.futures
import os
import random
import signal
import sqlite3
import statistics
import threading
import time

import pytest

from meristem.errors import WorkerDied, WorkerError, WorkerTimeout, WrongValue
from meristem.worker.process import Worker

HERE = "worker.endpoints"
AMPLE_S = 60.0
HANG_S = 60.0
"""How long the endpoints sleep that hang."""


@pytest.fixture
def events():
    return []


@pytest.fixture
def worker(events):
    with Worker("test", emit=events.append) as worker:
        worker.ready(AMPLE_S)
        yield worker


def named(events, name):
    return [event.payload for event in events if event.name == name]


def test_t18_a_call_that_sleeps_is_really_stopped(worker, gone):
    """Back long before the call would be, the process gone, and the next call answered by the spare."""
    begun_s = time.perf_counter()
    with pytest.raises(WorkerTimeout, match=r"endpoints:sleep was not done after 0\.1 s.*it was at work") as caught:
        worker.call(f"{HERE}:sleep", 60, 0.1)
    gone(caught.value.fields["pid"])
    assert worker.call(f"{HERE}:echo", "next", AMPLE_S) == "next"
    assert time.perf_counter() - begun_s < HANG_S


@pytest.mark.fault
def test_t18_code_that_never_yields_is_stopped_with_all_it_started(worker, gone, running, tmp_path):
    """The interpreter's lock held for ever, and processes started on the way."""
    for endpoint in ("tell_and_keep_lock", "tell_and_sleep"):
        place = tmp_path / endpoint
        with pytest.raises(WorkerTimeout):
            worker.call(f"{HERE}:{endpoint}", str(place), 1.5)
        first, *started = map(int, place.read_text().split())
        assert not running(first)
        gone(*started)


def test_t18_time_in_the_queue_counts(worker, eventually, tmp_path):
    """A call behind a slow one is back at its own deadline, and the slow one goes on."""
    place, found = tmp_path / "begun", []
    payload = {"place": str(place), "seconds": 3}
    slow = threading.Thread(target=lambda: found.append(worker.call(f"{HERE}:tell_and_nap", payload, AMPLE_S)))
    slow.start()
    eventually(place.exists)
    with pytest.raises(WorkerTimeout, match="it was in the queue"):
        worker.call(f"{HERE}:echo", 1, 0.1)
    assert not found
    slow.join()
    assert found == [3]


def test_t20_metadata_of_a_locked_library_has_a_hard_deadline(worker, tmp_path):
    """A database that somebody else keeps locked; once it is free, the same call is answered."""
    place = tmp_path / "library.sqlite"
    with sqlite3.connect(place) as library:
        library.execute("create table blueprints (name text)")
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("begin exclusive")
    begun_s = time.perf_counter()
    with pytest.raises(WorkerTimeout):
        worker.call(f"{HERE}:locked_metadata", str(place), 0.1)
    assert time.perf_counter() - begun_s < HANG_S
    other.execute("rollback")
    assert worker.call(f"{HERE}:locked_metadata", str(place), AMPLE_S, expects=int) == 0


@pytest.mark.parametrize(
    "endpoint, end",
    [("leave", "it left with exit code 3"), ("crash", "it was ended by SIGSEGV"), ("close_everything", "SIGKILL")],
)
def test_ta2_a_crash_is_named_and_the_process_replaced(worker, events, endpoint, end):
    with pytest.raises(WorkerDied, match=f"in the middle of {HERE}:{endpoint}: .*{end}"):
        worker.call(f"{HERE}:{endpoint}", 3, AMPLE_S)
    assert worker.call(f"{HERE}:echo", 1, AMPLE_S) == 1
    (told,) = named(events, "worker.restarted")
    assert end in told["cause"] and told["name"] == "test"


def test_ta2_a_process_that_cannot_start_is_told(events):
    """Each time, and at once: no deadline has to go by."""
    with Worker("test", imports=["nowhere_at_all"], n_spare=0, emit=events.append) as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"import of what it needs raised .*No module named 'nowhere_at_all'"):
                worker.call(f"{HERE}:echo", 1, AMPLE_S)
    assert "No module named 'nowhere_at_all'" in named(events, "worker.restarted")[0]["cause"]


def test_ta2_a_process_that_dies_idle_is_replaced_by_the_next_call(worker, events, gone):
    dead = worker.call(f"{HERE}:pid", None, AMPLE_S)
    os.kill(dead, signal.SIGKILL)
    gone(dead)
    assert worker.call(f"{HERE}:pid", None, AMPLE_S) != dead
    assert [told["cause"] for told in named(events, "worker.restarted")] == ["it was ended by SIGKILL"]


def test_ta2_what_a_call_leaves_behind_ends_with_the_worker(gone):
    with Worker("test", n_spare=0) as worker:
        left = worker.call(f"{HERE}:leave_one_behind", None, AMPLE_S)
    gone(left)


def test_an_endpoint_that_raises_says_where(worker, events):
    with pytest.raises(WorkerError, match=r"raise_odd raised ValueError: odd .* in worker 'test'") as caught:
        worker.call(f"{HERE}:raise_odd", 1, AMPLE_S)
    assert caught.value.fields["reason"] == "raised" and caught.value.fields["type"] == "ValueError"
    assert "in raise_odd" in caught.value.fields["traceback"]
    with pytest.raises(WorkerError, match="leave_politely raised SystemExit: no more"):
        worker.call(f"{HERE}:leave_politely", 1, AMPLE_S)
    with pytest.raises(WorkerError, match="raised ModuleNotFoundError: No module named 'nowhere'"):
        worker.call("nowhere:at_all", 1, AMPLE_S)
    assert named(events, "worker.restarted") == [], "the process goes on"


def test_a_value_of_the_wrong_type_is_an_error(worker):
    with pytest.raises(WorkerError, match=r"gave lock \(TypeError: .*expected a JSON value"):
        worker.call(f"{HERE}:give_object", 1, AMPLE_S)
    with pytest.raises(WorkerError, match=r"gave dict \(TypeError: a number is infinite or not a number"):
        worker.call(f"{HERE}:give_infinite", 1, AMPLE_S)
    with pytest.raises(WorkerError, match="gave str in worker 'test'; expected int or float") as caught:
        worker.call(f"{HERE}:echo", "text", AMPLE_S, expects=(int, float))
    assert caught.value.fields["reason"] == "wrong type"


@pytest.mark.parametrize("payload", [threading.Lock(), {1: 2}, float("inf"), {"a": [float("nan")]}, b"bytes"])
def test_a_payload_that_cannot_be_sent_is_refused(worker, payload):
    with pytest.raises(WrongValue, match="cannot be sent to worker 'test'"):
        worker.call(f"{HERE}:echo", payload, AMPLE_S)


@pytest.mark.parametrize("endpoint", ["sleep", "__main__:sleep", "a b:c", "a:b.c", ":c", "a:"])
def test_an_endpoint_that_no_other_process_knows_is_refused(worker, endpoint):
    with pytest.raises(WrongValue, match="names no endpoint"):
        worker.call(endpoint, 1, AMPLE_S)


def test_json_comes_through_unchanged(worker):
    """Values of every kind, and more than one read takes."""
    value = {"a": [1, -2.5, None, True, "ä\u2028\x00"], "deep": {"b": {}}, "": [], "long": "x" * 3_000_001}
    assert worker.call(f"{HERE}:echo", value, AMPLE_S) == value


def test_what_an_endpoint_prints_stays_out_of_stdout(capfd):
    with Worker("test", n_spare=0) as worker:
        assert worker.call(f"{HERE}:shout", "hello", AMPLE_S) == 5
    assert capfd.readouterr() == ("", "hello\n")


def test_a_restart_draws_no_number_of_the_run(worker):
    """The global generators are part of a run that must be repeatable."""
    before = random.getstate()
    with pytest.raises(WorkerDied):
        worker.call(f"{HERE}:leave", 1, AMPLE_S)
    worker.call(f"{HERE}:echo", 1, AMPLE_S)
    assert random.getstate() == before


@pytest.mark.fault
def test_an_interrupted_caller_takes_the_process_with_it(worker, gone, eventually, tmp_path):
    """Ctrl-C in the main thread: the call does not go on behind the user's back."""
    place = tmp_path / "pids"

    def interrupt():
        eventually(lambda: place.exists() and place.read_text().endswith("\n"))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        worker.call(f"{HERE}:tell_and_sleep", str(place), AMPLE_S)
    thread.join()
    gone(*map(int, place.read_text().split()))


def test_losses_leave_no_descriptor_behind(worker, n_open):
    """Twenty processes lost and replaced: as many open files and threads as before."""
    worker.ready(AMPLE_S)
    before = n_open()
    for _ in range(20):
        with pytest.raises(WorkerDied):
            worker.call(f"{HERE}:leave", 0, AMPLE_S)
    worker.ready(AMPLE_S)
    assert n_open() == before


def test_a_warm_call_takes_less_than_a_step(worker):
    """The round trip itself is small: its median stays below two milliseconds on a busy machine."""
    taken_s = []
    for _ in range(101):
        begun_s = time.perf_counter()
        worker.call(f"{HERE}:echo", {"a": 1}, AMPLE_S)
        taken_s.append(time.perf_counter() - begun_s)
    assert statistics.median(taken_s) < 0.002


def test_fact_a_pool_of_threads_waits_for_its_thread():
    """Why there are processes here (growth.md section 2): leaving the pool takes as long as the call it gave up."""
    begun_s = time.perf_counter()
    with pytest.raises(concurrent.futures.TimeoutError), concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 0.5).result(timeout=0.05)
    assert time.perf_counter() - begun_s > 0.45
