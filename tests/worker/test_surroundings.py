"""A worker can be used from anywhere, stops when told, and outlives nobody."""

import ast
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import house
from meristem.errors import WorkerError
from meristem.worker.process import Worker

HERE = "worker.endpoints"
AMPLE_S = 60.0
SOURCES = house.modules(Path(__file__).parents[2] / "src" / "meristem", "meristem")


@pytest.fixture(scope="module")
def worker():
    with Worker("test") as worker:
        yield worker


def test_k16_from_a_plain_function(worker):
    assert worker.call(f"{HERE}:echo", 1, AMPLE_S) == 1


def test_k16_k17_inside_a_running_loop(worker):
    """In a thread, the loop goes on meanwhile; called plainly, nothing locks up; many at once are served."""

    async def use() -> tuple[list[object], object, int]:
        n_beats = 0

        async def beat() -> None:
            nonlocal n_beats
            while True:
                n_beats += 1
                await asyncio.sleep(0.01)

        beating = asyncio.create_task(beat())
        await asyncio.to_thread(worker.call, f"{HERE}:sleep", 0.3, AMPLE_S)
        calls = [asyncio.to_thread(worker.call, f"{HERE}:echo", index, AMPLE_S) for index in range(10)]
        found = await asyncio.gather(*calls)
        plain = worker.call(f"{HERE}:echo", "plain", AMPLE_S)
        beating.cancel()
        return found, plain, n_beats

    found, plain, n_beats = asyncio.run(use())
    assert found == list(range(10)) and plain == "plain"
    assert n_beats > 5


def test_k16_from_many_threads(worker):
    """Each gets its own answer."""
    found = {}

    def use(index: int) -> None:
        found[index] = [worker.call(f"{HERE}:echo", [index, turn], AMPLE_S) for turn in range(20)]

    threads = [threading.Thread(target=use, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [[index, turn] for turn in range(20)] for index in range(8)}


def test_k17_the_package_runs_no_loop_of_its_own_over_another():
    """``asyncio.run`` and ``run_until_complete`` fail inside a running loop; verbs and their clients are in none."""
    verbs = ("meristem.cli.", "meristem.bench.serving.")
    found = [
        source.at(node, node.attr)
        for source in SOURCES
        if not source.name.startswith(verbs)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
        and (node.attr in ("run_until_complete", "run_forever") or ast.unparse(node) == "asyncio.run")
    ]
    assert found == []


def test_k18_an_idle_worker_stops_within_a_second_a_hundred_times(gone, n_open):
    """Waiting for a call that never comes, just begun or ready: closed and joined at once, its processes gone."""
    before, pids, spent_s = n_open(), [], []
    for turn in range(100):
        worker = Worker("test", n_spare=turn % 2)
        if turn % 5 == 3:
            pids.append(worker.call(f"{HERE}:pid", None, AMPLE_S))
        begun_s = time.perf_counter()
        worker.stop()
        spent_s.append(time.perf_counter() - begun_s)
    assert statistics.median(spent_s) < 1
    gone(*pids)
    assert n_open() == before


def test_k18_a_blocked_worker_stops_at_once(eventually, gone, tmp_path):
    """At work, in the queue, and stopped a second time: every caller learns why it got nothing."""
    worker, place, said = Worker("test"), tmp_path / "pids", []

    def use(endpoint: str, payload: object) -> None:
        try:
            worker.call(endpoint, payload, AMPLE_S)
        except WorkerError as error:
            said.append((error.fields["reason"], str(error)))

    plans = [(f"{HERE}:tell_and_sleep", str(place)), (f"{HERE}:echo", 1), (f"{HERE}:echo", 2)]
    threads = [threading.Thread(target=use, args=plan) for plan in plans]
    for thread in threads:
        thread.start()
    eventually(lambda: place.exists() and place.read_text().endswith("\n"))
    begun_s = time.perf_counter()
    worker.stop()
    worker.stop()
    assert time.perf_counter() - begun_s < AMPLE_S / 2
    for thread in threads:
        thread.join()
    assert [reason for reason, _ in said] == ["stopped"] * 3
    assert all("worker 'test' was stopped" in text for _, text in said)
    gone(*map(int, place.read_text().split()))
    with pytest.raises(WorkerError, match="was stopped"):
        worker.call(f"{HERE}:echo", 1, AMPLE_S)


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from meristem.worker.process import Worker
worker = Worker("doomed")
print(worker.call("worker.endpoints:pid", None, 60), flush=True)
worker.ready(60)
print(*[process.pid for process in worker._processes], flush=True)
if sys.argv[2]:
    worker.call("worker.endpoints:" + sys.argv[2], sys.argv[3], 60)
sys.stdin.read()
"""


@pytest.mark.fault
@pytest.mark.parametrize("endpoint", ["", "tell_and_sleep", "tell_and_keep_lock"])
def test_ta2_no_process_outlives_a_parent_that_is_killed(gone, eventually, tmp_path, endpoint):
    """Idle, asleep with a child of its own, or holding the interpreter's lock: all gone soon after the parent."""
    place = tmp_path / "pids"
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parents[1]), endpoint, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        first, both = parent.stdout.readline(), parent.stdout.readline()
        pids = {int(word) for word in (first + both).split()}
        if endpoint:
            eventually(lambda: place.exists() and place.read_text().endswith("\n"))
            pids |= set(map(int, place.read_text().split()))
        os.kill(parent.pid, signal.SIGKILL)
    assert len(pids) >= 2
    gone(*pids)


def test_ta2_a_parent_that_forgets_to_stop_still_ends(gone):
    """The program ends with its last line, and its processes with it."""
    program = (
        "from meristem.worker.process import Worker\n"
        "worker = Worker('forgotten')\n"
        "print(worker.call('os:getpgid', 0, 60))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    gone(int(done.stdout))


def test_a_process_starts_without_torch(worker):
    """What a call does not need is not imported: that is why a process is ready soon."""
    assert worker.call("worker.endpoints:loaded", ["torch", "asyncio", "pydantic"], AMPLE_S) == []
