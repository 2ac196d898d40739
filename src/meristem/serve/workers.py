"""Several processes that serve one model: started, watched, started again, and ended together."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, TypeAlias

from meristem.errors import WorkerDied
from meristem.events import Emit, Event
from meristem.serve.front import Front
from meristem.worker.breaker import Breaker

Run: TypeAlias = Callable[[int, Path], None]

IMPORTED: Final = ("meristem.runs.open", "meristem.serve.http", "uvicorn")
"""What every worker needs: imported once, by the process from which they are forked."""
LAST_S: Final = 20.0
"""How long a worker whose parent is gone may take to end, and what the workers said last to reach its readers."""
LOST: Final = 255
"""The exit code of a worker of which nobody knows, since the process that forked it has ended."""


class Workers:
    """One process for each of some sockets.

    run: called in each process with its number and the socket at which it has to listen; it, or what it is a partial
    of, is a function of a module. grace_s: how long they may take to end what they are at; then they are killed.
    """

    def __init__(self, run: Run, sockets: Sequence[Path], *, grace_s: float, emit: Emit) -> None:
        self.run, self.sockets, self.grace_s, self.emit = run, sockets, grace_s, emit
        # Elsewhere the libraries of the system do not outlive a fork.
        context = multiprocessing.get_context
        self._context = context("forkserver") if sys.platform == "linux" else context("spawn")
        self._context.set_forkserver_preload(list(IMPORTED))
        self._processes: dict[int, BaseProcess] = {}
        self._is_ending = False

    async def start(self) -> None:
        """Start them all, and return when they listen. WorkerDied, with its ``exit_code``, where one ends before.

        The first is alone for as long: it makes the databases, or brings them to today's version.
        """
        await self._begin(0)
        await asyncio.gather(*(self._begin(index) for index in range(1, len(self.sockets))))

    async def keep(self) -> None:
        """Start again whichever ends, for good; one that ends again and again, with pauses."""
        await asyncio.gather(*(self._keep(index) for index in range(len(self.sockets))))

    async def end(self) -> None:
        """Let them end what they are at, and kill what does not."""
        self._is_ending = True
        for process in self._processes.values():
            process.terminate()
        until = time.monotonic() + self.grace_s
        for process in self._processes.values():
            await asyncio.to_thread(process.join, max(0.0, until - time.monotonic()))
            process.kill()

    async def _begin(self, index: int) -> None:
        name = f"meristem-worker-{index}"
        process = self._context.Process(target=_work, args=(self.run, index, self.sockets[index]), name=name)
        process.daemon = True
        await asyncio.to_thread(process.start)
        self._processes[index] = process
        while not _listens(self.sockets[index]):
            if process.exitcode is not None:
                raise WorkerDied(
                    f"worker {index} ended with the code {process.exitcode} before it listened; what it says of that "
                    f"stands above.",
                    exit_code=process.exitcode,
                )
            await asyncio.sleep(0.05)

    async def _keep(self, index: int) -> None:
        breaker = Breaker(n_failures=5, span=60.0, pause=30.0)
        while True:
            process = self._processes[index]
            await _end_of(process)
            if self._is_ending:
                return
            if process.exitcode == LOST and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            self.emit(Event("worker.restarted", {"worker": index, "exit_code": process.exitcode}, "warning"))
            breaker = breaker.failed(time.monotonic())
            while breaker.state(time.monotonic()) == "open":
                await asyncio.sleep(0.5)
            with contextlib.suppress(WorkerDied):  # it has ended again, which is seen above
                await self._begin(index)


async def serve_together(
    listening: socket.socket, front: Front, workers: Workers, started: Callable[[], None]
) -> signal.Signals | None:
    """Serve until a signal comes, and give it. started: called when all workers listen."""
    loop, stop, caught = asyncio.get_running_loop(), asyncio.Event(), list[signal.Signals]()

    def leave(number: signal.Signals) -> None:
        caught.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave, number)
    stopping, starting = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(workers.start())
    tasks = {stopping, starting}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            starting.result()
            server = await asyncio.start_server(front.connected, sock=listening, backlog=2048)
            keeping = asyncio.ensure_future(workers.keep())
            tasks.add(keeping)
            started()
            await asyncio.wait({stopping, keeping}, return_when=asyncio.FIRST_COMPLETED)
            server.close()
            if keeping.done():
                keeping.result()
    finally:
        await workers.end()
        # What the workers said last is on its way.
        if front.at_work:
            await asyncio.wait(front.at_work, timeout=LAST_S)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return caught[0] if caught else None


def _work(run: Run, index: int, place: Path) -> None:
    """The life of a worker. Ctrl-C is for the process that started it, and where that one ends, so does this one."""
    os.setsid()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    run(index, place)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_S)
        os.kill(os.getpid(), signal.SIGKILL)


def _listens(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        try:
            attempt.connect(str(place))
        except OSError:
            return False
    return True


async def _end_of(process: BaseProcess) -> None:
    """Return when a process has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()
