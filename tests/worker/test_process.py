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
import torch
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import QueueFull, WorkerDied, WorkerError, WorkerTimeout, WrongValue
from meristem.worker.process import Backoff, Worker

HERE = "worker.endpoints"
AMPLE_S = 60.0
SOON = Backoff(first_s=0.02, most_s=0.05)


@pytest.fixture
def events():
    return []


@pytest.fixture
def worker(events):
    with Worker("test", backoff=SOON, emit=events.append) as worker:
        worker.ready(AMPLE_S)
        yield worker


@pytest.fixture
def full(worker, eventually):
    """A worker whose spare stands ready too."""
    eventually(lambda: len(worker.health(5).pids) == 2)
    return worker


def named(events, name):
    return [event.payload for event in events if event.name == name]


def test_t18_a_call_that_sleeps_is_really_stopped(full, running):
    """Budget 100 ms: back within 300 ms, the process gone, and the next call answered by the spare."""
    begun_s = time.perf_counter()
    with pytest.raises(WorkerTimeout, match=r"endpoints:sleep was not done after 0\.1 s.*it was at work") as caught:
        full.call(f"{HERE}:sleep", 60, 0.1)
    assert time.perf_counter() - begun_s < 0.3
    assert not running(caught.value.fields["pid"])
    assert full.call(f"{HERE}:echo", "next", 5).value == "next"
    assert time.perf_counter() - begun_s < 1.0


@pytest.mark.fault
def test_t18_code_that_never_yields_is_stopped_with_all_it_started(full, gone, running, tmp_path):
    """The interpreter's lock held for ever, and processes started on the way."""
    for endpoint in ("tell_and_keep_lock", "tell_and_sleep"):
        place = tmp_path / endpoint
        with pytest.raises(WorkerTimeout):
            full.call(f"{HERE}:{endpoint}", str(place), 1.5)
        first, *started = map(int, place.read_text().split())
        assert not running(first)
        gone(*started)


def test_t18_time_in_the_queue_counts(full):
    """A call behind a slow one is back at its own deadline, and the slow one goes on."""
    slow = full.submit(f"{HERE}:sleep", 0.5, AMPLE_S)
    begun_s = time.perf_counter()
    with pytest.raises(WorkerTimeout, match="it was in the queue"):
        full.call(f"{HERE}:echo", 1, 0.1)
    assert time.perf_counter() - begun_s < 0.3
    assert slow.result().value == 0.5


def test_t18_an_answer_after_the_deadline_is_dropped_and_counted(events):
    """The clock jumps while the call is at work; its answer comes, and counts for nothing."""
    jump = [0.0]
    with Worker("test", n_spare=0, clock=lambda: time.monotonic() + jump[0], emit=events.append) as worker:
        worker.ready(AMPLE_S)
        future = worker.submit(f"{HERE}:sleep", 0.1, 100)
        time.sleep(0.02)
        jump[0] = 1000.0
        with pytest.raises(WorkerTimeout):
            future.result()
        assert worker.counts["n_late"] == 1 and worker.counts["n_timeouts"] == 1
        assert [payload["name"] for payload in named(events, "worker.late")] == ["test"]


def test_t20_metadata_of_a_locked_library_has_a_hard_deadline(full, tmp_path):
    """A database that somebody else keeps locked; once it is free, the same call is answered."""
    place = tmp_path / "library.sqlite"
    with sqlite3.connect(place) as library:
        library.execute("create table blueprints (name text)")
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("begin exclusive")
    begun_s = time.perf_counter()
    with pytest.raises(WorkerTimeout):
        full.call(f"{HERE}:locked_metadata", str(place), 0.1)
    assert time.perf_counter() - begun_s < 0.3
    other.execute("rollback")
    assert full.call(f"{HERE}:locked_metadata", str(place), AMPLE_S, expects=int).value == 0


@pytest.mark.parametrize(
    "endpoint, end",
    [("leave", "it left with exit code 3"), ("crash", "it was ended by SIGSEGV"), ("close_everything", "SIGKILL")],
)
def test_ta2_a_crash_is_named_and_the_process_replaced(worker, events, eventually, endpoint, end):
    with pytest.raises(WorkerDied, match=f"in the middle of {HERE}:{endpoint}: .*{end}"):
        worker.call(f"{HERE}:{endpoint}", 3, AMPLE_S)
    assert worker.call(f"{HERE}:echo", 1, AMPLE_S).value == 1
    eventually(lambda: named(events, "worker.restarted"))
    told = named(events, "worker.restarted")[0]
    assert end in told["cause"]
    assert told["counts"]["n_died"] == 1 and told["counts"]["n_restarts"] == 1
    eventually(lambda: len(worker.health(5).pids) == 2)


def test_ta2_a_restart_waits_for_the_clock(events, eventually):
    """One second after the first loss, two after the second in a row; not a moment before."""
    jump = [0.0]
    begun_s = time.monotonic()
    with Worker("test", n_spare=0, draw=lambda: 0.0, clock=lambda: begun_s + jump[0], emit=events.append) as worker:
        for pause_s in (1.0, 2.0):
            with pytest.raises(WorkerDied):
                worker.call(f"{HERE}:leave", 1, AMPLE_S)
            jump[0] += pause_s - 0.01
            time.sleep(0.3)
            assert worker.health().pids == ()
            jump[0] += 0.02
            eventually(lambda: worker.health(5).pids)
        assert [told["pause_s"] for told in named(events, "worker.restarted")] == [1.0, 2.0]
        worker.call(f"{HERE}:echo", 1, AMPLE_S)
        with pytest.raises(WorkerDied):
            worker.call(f"{HERE}:leave", 1, AMPLE_S)
        jump[0] += 1.01
        eventually(lambda: len(named(events, "worker.restarted")) == 3)
        assert named(events, "worker.restarted")[2]["pause_s"] == 1.0, "an answer in between ends the row"


@given(n_lost=st.integers(1, 2000), draw=st.floats(0, 1, exclude_max=True))
def test_ta2_back_off_from_one_second_to_thirty(n_lost, draw):
    backoff = Backoff()
    pause_s = backoff.pause_s(n_lost, draw)
    assert 1 <= pause_s <= 30
    assert pause_s <= backoff.pause_s(n_lost + 1, draw)
    assert min(30, 2.0 ** min(n_lost - 1, 60)) <= pause_s <= 1.25 * 2.0 ** min(n_lost - 1, 60)


def test_ta2_a_process_that_cannot_start_is_told(events, eventually):
    with Worker("test", imports=["nowhere_at_all"], n_spare=0, backoff=SOON, emit=events.append) as worker:
        eventually(lambda: len(named(events, "worker.failed")) >= 2)
        assert "No module named 'nowhere_at_all'" in named(events, "worker.failed")[0]["cause"]
        with pytest.raises(
            WorkerTimeout, match=r"waiting for a process\. Its last process was lost: its imports raised"
        ):
            worker.call(f"{HERE}:echo", 1, 0.1)


def test_ta2_more_calls_than_the_queue_takes_are_refused(events):
    with Worker("test", n_waiting=2, n_spare=0, emit=events.append) as worker:
        worker.ready(AMPLE_S)
        first = [worker.submit(f"{HERE}:sleep", 0.3, AMPLE_S) for _ in range(3)]
        with pytest.raises(QueueFull, match="has 2 calls waiting, which is all it takes"):
            worker.call(f"{HERE}:echo", 1, AMPLE_S)
        assert [future.result().value for future in first] == [0.3] * 3
        assert worker.call(f"{HERE}:echo", 1, AMPLE_S).value == 1
        assert worker.counts["n_refused"] == 1


def test_ta2_a_cancelled_call_ends_with_its_process(full, gone, eventually, tmp_path):
    """At work or in the queue; the room it took in the queue is free again."""
    place = tmp_path / "pids"
    future = full.submit(f"{HERE}:tell_and_sleep", str(place), AMPLE_S)
    waiting = [full.submit(f"{HERE}:echo", index, AMPLE_S) for index in range(2)]
    eventually(lambda: place.exists() and place.read_text().endswith("\n"))
    assert waiting[0].cancel() and future.cancel()
    gone(*map(int, place.read_text().split()))
    assert waiting[1].result().value == 1
    eventually(lambda: full.health().n_pending == 0)
    assert full.counts["n_cancelled"] == 2


def test_ta2_cancelled_at_once_leaves_nothing(full, eventually):
    for _ in range(50):
        full.submit(f"{HERE}:echo", 1, AMPLE_S).cancel()
    eventually(lambda: full.health().n_pending == 0)
    assert full.call(f"{HERE}:echo", 1, AMPLE_S).value == 1


def test_ta2_a_deaf_process_is_found_and_replaced(full, running, eventually):
    before = full.health(5).pids
    os.kill(before[0], signal.SIGSTOP)
    assert full.health(0.2).pids == before[1:]
    eventually(lambda: not running(before[0]))
    eventually(lambda: len(full.health(5).pids) == 2)
    assert before[0] not in full.health(5).pids


def test_ta2_a_process_that_dies_idle_is_replaced_unasked(full, eventually):
    before = full.health(5).pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(set(full.health(5).pids) - set(before)) == 2)


def test_ta2_what_a_call_leaves_behind_ends_with_the_worker(gone):
    with Worker("test", n_spare=0) as worker:
        left = worker.call(f"{HERE}:leave_one_behind", None, AMPLE_S).value
    gone(left)


def test_an_endpoint_that_raises_says_where(worker):
    with pytest.raises(WorkerError, match=r"raise_odd raised ValueError: odd .* in worker 'test'") as caught:
        worker.call(f"{HERE}:raise_odd", 1, AMPLE_S)
    assert caught.value.fields["reason"] == "raised" and caught.value.fields["type"] == "ValueError"
    assert "in raise_odd" in caught.value.fields["traceback"]
    with pytest.raises(WorkerError, match="leave_politely raised SystemExit: no more"):
        worker.call(f"{HERE}:leave_politely", 1, AMPLE_S)
    with pytest.raises(WorkerError, match="raised ModuleNotFoundError: No module named 'nowhere'"):
        worker.call("nowhere:at_all", 1, AMPLE_S)
    assert worker.counts == {"n_answered": 1, "n_raised": 3}, "the process goes on"


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


def test_json_and_tensors_come_through_unchanged(worker):
    """Values of every JSON kind; tensors of odd shapes and types, more of them than one read takes."""
    value = {"a": [1, -2.5, None, True, "ä\u2028\x00"], "deep": {"b": {}}, "": []}
    assert worker.call(f"{HERE}:echo", value, AMPLE_S).value == value
    tensors = {
        "wide": torch.randn(3, 500_001),
        "half": torch.randn(7, 3).bfloat16().T,
        "none": torch.zeros(0, 5, dtype=torch.int64),
        "one": torch.tensor(3.5, dtype=torch.float64, requires_grad=True),
    }
    result = worker.call(f"{HERE}:doubled", 1, AMPLE_S, tensors=tensors, expects=list)
    assert result.value == sorted(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(result.tensors[name], 2 * tensor.detach(), rtol=0, atol=0)


def test_what_an_endpoint_prints_stays_out_of_stdout(capfd):
    with Worker("test", n_spare=0) as worker:
        assert worker.call(f"{HERE}:shout", "hello", AMPLE_S).value == 5
    assert capfd.readouterr() == ("", "hello\n")


def test_a_restart_draws_no_number_of_the_run(worker):
    """The global generators are part of a run that must be repeatable."""
    before = random.getstate()
    with pytest.raises(WorkerDied):
        worker.call(f"{HERE}:leave", 1, AMPLE_S)
    worker.call(f"{HERE}:echo", 1, AMPLE_S)
    assert random.getstate() == before


@pytest.mark.fault
def test_an_interrupted_caller_takes_the_process_with_it(full, gone, eventually, tmp_path):
    """Ctrl-C in the main thread: the call does not go on behind the user's back."""
    place = tmp_path / "pids"

    def interrupt():
        eventually(lambda: place.exists() and place.read_text().endswith("\n"))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        full.call(f"{HERE}:tell_and_sleep", str(place), AMPLE_S)
    thread.join()
    gone(*map(int, place.read_text().split()))


def test_losses_leave_no_descriptor_behind(full, eventually):
    """Twenty processes lost and replaced: as many open files and threads as before."""

    def n_open():
        eventually(lambda: len(full.health(5).pids) == 2)
        n_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        return n_files, threading.active_count()

    before = n_open()
    for _ in range(20):
        with pytest.raises(WorkerDied):
            full.call(f"{HERE}:leave", 0, AMPLE_S)
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
