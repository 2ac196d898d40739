"""Calls into another process, which can really be stopped: at its deadline the process is killed.

A timeout on a thread stops nothing: the thread goes on, and a pool even waits for it (growth.md section 2). So what may
hang runs in a process of its own, spawned, with JSON and tensors going in and out. Everything about the processes of a
``Worker`` happens on one thread with an event loop of its own; callers only hand calls to it. That is why it can be
used from plain functions, from any thread and inside a running loop alike.

Source: growth.md section 22.
"""

import asyncio
import concurrent.futures
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from meristem.errors import QueueFull, WorkerDied, WorkerError, WorkerTimeout, WrongValue
from meristem.events import Emit, Event, silent
from meristem.worker.deadline import Deadline
from meristem.worker.message import Result, message, tensors_of
from meristem.worker.spawned import Answer, Gone, Spawned, spawn

if TYPE_CHECKING:
    import torch

ENDPOINT = re.compile(r"(?!__main__:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
ECHO = "meristem.worker.child:echo"
START_S = 60.0
"""How long a process may take until it is ready; the modules it imports first are part of it."""
GRACE_S = 0.3
"""How long an idle process may take to end by itself when the worker stops."""
REAP_S = 0.1
"""How long a call waits to see that a killed process is gone. The kernel may need longer; then it goes on behind."""
LOOK_S = 0.05
"""How often the clock is looked at while a restart is put off."""

STOPPED = "its worker was stopped"

_JITTER = random.Random()
"""A generator of its own: a restart must not shift the random numbers of a run."""


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a process is started anew: doubled with each loss in a row, from first to most."""

    first_s: float = 1.0
    most_s: float = 30.0
    jitter: float = 0.25

    def pause_s(self, n_lost: int, draw: float) -> float:
        """Seconds after the ``n_lost``-th loss in a row, 1 the first; ``draw`` in [0, 1) spreads those of many."""
        doubled = self.first_s * 2.0 ** min(n_lost - 1, 60)
        return min(self.most_s, doubled * (1 + self.jitter * draw))


@dataclass(frozen=True)
class Health:
    """What a look at a worker gives. pids: the processes that answered in time."""

    pids: tuple[int, ...]
    is_busy: bool
    n_pending: int


@dataclass(eq=False)
class _Call:
    endpoint: str
    pieces: list[bytes]
    deadline: Deadline
    seconds: float
    phase: str = "in the queue"
    process: Spawned | None = None


class Worker:
    """One call after the other in another process, each with a deadline that holds.

    A spare process is kept warm, so that the call after one that was killed need not wait for an interpreter to start.
    What is lost is replaced after a pause that grows with each loss in a row.

    name: stands in events and messages. imports: modules that every call needs, imported by each process before it is
    ready. n_waiting: calls that may wait while one runs. n_spare: processes beside the one that works. draw: numbers in
    [0, 1) for the jitter. emit: is called from the thread of the worker, and must not call it, with
    ``worker.restarted``, ``worker.late`` and ``worker.failed``, each with the counts so far.
    """

    def __init__(
        self,
        name: str = "worker",
        *,
        imports: Sequence[str] = (),
        n_waiting: int = 16,
        n_spare: int = 1,
        backoff: Backoff = Backoff(),
        draw: Callable[[], float] = _JITTER.random,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = silent,
    ) -> None:
        self.name = name
        self._imports = tuple(imports)
        self._n_waiting, self._n_processes = n_waiting, 1 + n_spare
        self._backoff, self._draw, self._clock, self._emit = backoff, draw, clock, emit
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards the three that callers and the loop share
        self._n_pending = 0
        self._is_stopping = False

        self._live: list[Spawned] = []
        self._idle: list[Spawned] = []
        self._n_lost = 0
        self._lost_at_s = 0.0
        self._cause = ""
        self._loop = asyncio.new_event_loop()
        self._stopping, self._lacking, self._ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._turn = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name=f"worker-{name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def counts(self) -> dict[str, int]:
        """How often each thing happened so far; what never happened is left out."""
        with self._lock:
            return dict(+self._counts)

    def call(
        self,
        endpoint: str,
        payload: object,
        deadline_s: float,
        *,
        tensors: Mapping[str, "torch.Tensor"] | None = None,
        expects: type | tuple[type, ...] = object,
    ) -> Result:
        """What the function ``package.module:function`` gives for ``payload`` in another process.

        The function is called with the payload, and with the tensors by name where there are any; it returns a JSON
        value or a ``Result``. The deadline covers everything: waiting, the start of a process, the work. expects: the
        type, or types, of the value. Raises WorkerTimeout, WorkerDied, QueueFull, and WorkerError for a function that
        raised, a value of the wrong type and a worker that stopped; its field ``reason`` says which.
        """
        future = self.submit(endpoint, payload, deadline_s, tensors=tensors, expects=expects)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._stopped(endpoint) from None
        finally:
            future.cancel()  # an interrupt ends the call; of one that is done this changes nothing

    def submit(
        self,
        endpoint: str,
        payload: object,
        deadline_s: float,
        *,
        tensors: Mapping[str, "torch.Tensor"] | None = None,
        expects: type | tuple[type, ...] = object,
    ) -> concurrent.futures.Future[Result]:
        """The same without waiting. Cancelling the future stops the call, and its process with it.

        Inside a running loop: ``await asyncio.wrap_future(worker.submit(...))``.
        """
        if not ENDPOINT.fullmatch(endpoint):
            raise WrongValue(
                f"'{endpoint}' names no endpoint; expected 'package.module:function', importable in another process.",
                value=endpoint,
            )
        try:
            pieces = message({"endpoint": endpoint, "payload": payload}, tensors or {})
        except (TypeError, ValueError, RuntimeError) as cause:
            raise WrongValue(
                f"the payload for {endpoint} cannot be sent to worker '{self.name}': {cause}. Send plain JSON values, "
                f"and tensors that share no memory.",
                endpoint=endpoint,
            ) from cause
        call = _Call(endpoint, pieces, Deadline.after(deadline_s, self._clock), deadline_s)
        with self._lock:
            if self._is_stopping:
                raise self._stopped(call.endpoint)
            if self._n_pending > self._n_waiting:
                self._counts["n_refused"] += 1
                raise QueueFull(
                    f"worker '{self.name}' has {self._n_waiting} calls waiting, which is all it takes. Wait, or raise "
                    f"n_waiting.",
                    name=self.name,
                    n_waiting=self._n_waiting,
                )
            self._n_pending += 1
            future = asyncio.run_coroutine_threadsafe(self._serve(call, expects), self._loop)
        future.add_done_callback(self._left)
        return future

    def ready(self, deadline_s: float) -> None:
        """Wait until a process stands ready for the next call; raises as ``call`` does."""
        self.call(ECHO, None, deadline_s)

    def health(self, deadline_s: float = 1.0) -> Health:
        """Ask every idle process for a sign of life; one that gives none in time is killed and replaced."""
        with self._lock:
            if self._is_stopping:
                return Health((), is_busy=False, n_pending=0)
            future = asyncio.run_coroutine_threadsafe(self._look(deadline_s), self._loop)
        try:
            return Health(future.result(), self._turn.locked(), self._n_pending)
        except concurrent.futures.CancelledError:
            return Health((), is_busy=False, n_pending=0)

    def stop(self) -> None:
        """End all processes within a second; calls that run or wait end with WorkerError. May be said twice."""
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._lived())
        self._loop.close()

    async def _lived(self) -> None:
        keeper = asyncio.create_task(self._keep(), name="keeper")
        await self._stopping.wait()
        listeners = {process.listener for process in self._live}
        others = asyncio.all_tasks() - listeners - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(keeper, *others, return_exceptions=True)
        for process in list(self._live):
            process.release() if process in self._idle else process.kill(STOPPED)
        for left_s in (GRACE_S, REAP_S):
            if self._live:
                await asyncio.wait([process.listener for process in self._live], timeout=left_s)
            for process in self._live:
                process.kill(STOPPED)

    async def _serve(self, call: _Call, expects: type | tuple[type, ...]) -> Result:
        """One call from the queue to its answer, whatever that is."""
        try:
            async with asyncio.timeout(call.deadline.left_s):
                async with self._turn:
                    answer = await self._asked(call)
            return self._judged(call, answer, expects)
        except TimeoutError:
            await self._killed(call)
            raise self._overdue(call) from None
        except Gone as end:
            self._count("n_died")
            raise WorkerDied(
                f"the process of worker '{self.name}' ended in the middle of {call.endpoint}: {end}. What it wrote "
                f"before stands on stderr.",
                name=self.name,
                endpoint=call.endpoint,
                cause=str(end),
            ) from None
        except asyncio.CancelledError:
            if self._is_stopping:
                raise self._stopped(call.endpoint) from None
            raise

    def _left(self, future: concurrent.futures.Future[Result]) -> None:
        """A call is over, also one that was cancelled before it began."""
        with self._lock:
            self._n_pending -= 1
            self._counts["n_cancelled"] += future.cancelled()

    async def _asked(self, call: _Call) -> Answer:
        call.phase = "waiting for a process"
        while call.process is None or not call.process.is_open:
            while not self._idle:
                self._ready.clear()
                await self._ready.wait()
            call.process = self._idle.pop(0)
        call.phase = "at work"
        try:
            answer = await call.process.ask(call.pieces)
        except asyncio.CancelledError:
            call.process.kill(f"{call.endpoint} was stopped")
            raise
        if call.deadline.is_over:
            call.process.kill(f"{call.endpoint} was late")
            self._late(call.process)
            raise TimeoutError
        self._n_lost = 0
        self._rest(call.process)
        return answer

    def _judged(self, call: _Call, answer: Answer, expects: type | tuple[type, ...]) -> Result:
        """The result in an answer, or the error that it stands for."""
        head, packed = answer
        fields = {"name": self.name, "endpoint": call.endpoint}
        if "raised" in head:
            self._count("n_raised")
            cause = head["raised"]["cause"]
            raise WorkerError(
                f"{call.endpoint} raised {cause} in worker '{self.name}'. The field 'traceback' says where.",
                reason="raised",
                **fields,
                **head["raised"],
            )
        found = head.get("wrong") or type(head["value"]).__name__
        if "wrong" in head or not isinstance(head["value"], expects):
            self._count("n_wrong")
            kinds = expects if isinstance(expects, tuple) else (expects,)
            wanted = "a JSON value" if expects is object else " or ".join(kind.__name__ for kind in kinds)
            raise WorkerError(
                f"{call.endpoint} gave {found} in worker '{self.name}'; expected {wanted}. Mend the endpoint.",
                reason="wrong type",
                found=found,
                expected=wanted,
                **fields,
            )
        self._count("n_answered")
        return Result(head["value"], tensors_of(packed))

    def _overdue(self, call: _Call) -> WorkerTimeout:
        self._count("n_timeouts")
        lost = f" Its last process was lost: {self._cause}." if call.process is None and self._cause else ""
        return WorkerTimeout(
            f"{call.endpoint} was not done after {call.seconds:g} s in worker '{self.name}'; it was {call.phase}."
            f"{lost} Give it more time, or find out what it waits for.",
            name=self.name,
            endpoint=call.endpoint,
            deadline_s=call.seconds,
            phase=call.phase,
            pid=call.process.pid if call.process else None,
        )

    def _stopped(self, endpoint: str) -> WorkerError:
        return WorkerError(
            f"{endpoint} gave no answer, since worker '{self.name}' was stopped. Make calls before it stops.",
            reason="stopped",
            name=self.name,
            endpoint=endpoint,
        )

    async def _killed(self, call: _Call) -> None:
        """Wait until the process of a call is gone, as far as that can be waited for."""
        if call.process:
            await asyncio.wait([call.process.listener], timeout=REAP_S)

    async def _look(self, deadline_s: float) -> tuple[int, ...]:
        """The idle processes that give a sign of life in time."""
        asked, self._idle = self._idle, []
        signs = await asyncio.gather(*(self._sign(process, deadline_s) for process in asked))
        return tuple(process.pid for process, is_alive in zip(asked, signs, strict=True) if is_alive)

    async def _sign(self, process: Spawned, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                await process.ask(message({"endpoint": ECHO, "payload": None}, {}))
        except (TimeoutError, Gone):
            self._count("n_deaf")
            process.kill(f"it gave no sign of life for {deadline_s:g} s")
            return False
        self._rest(process)
        return True

    async def _keep(self) -> None:
        """Hold as many processes as there should be, started one after the other."""
        while True:
            while len(self._live) >= self._n_processes:
                self._lacking.clear()
                await self._lacking.wait()
            pause_s = self._backoff.pause_s(self._n_lost, self._draw()) if self._n_lost else 0.0
            until = Deadline(self._lost_at_s + pause_s, self._clock)
            while not until.is_over:
                await asyncio.sleep(min(until.left_s, LOOK_S))
            is_restart, cause = bool(self._cause), self._cause
            if await self._start() and is_restart:
                self._count("n_restarts")
                self._tell("worker.restarted", cause=cause, pause_s=round(pause_s, 3), severity="warning")

    async def _start(self) -> bool:
        """Start one more process; false when it does not become ready."""
        try:
            process = await spawn(self._imports, self._late)
        except OSError as error:
            self._n_lost, self._lost_at_s, self._cause = self._n_lost + 1, self._clock(), str(error)
        else:
            self._live.append(process)
            process.listener.add_done_callback(partial(self._lose, process))
            if await self._is_ready(process):
                self._rest(process)
                return True
            await asyncio.wait([process.listener])
        self._tell("worker.failed", cause=self._cause, severity="error")
        return False

    async def _is_ready(self, process: Spawned) -> bool:
        """Whether a new process can take calls; if not, it is killed."""
        try:
            async with asyncio.timeout(START_S):
                head, _ = await process.ready()
        except (TimeoutError, Gone):
            process.kill(f"it was not ready after {START_S:g} s")
            return False
        if "raised" in head:
            process.kill(f"its imports raised {head['raised']['cause']}")
        return "raised" not in head

    def _rest(self, process: Spawned) -> None:
        """The process is free; the one that worked last works next, since it has imported most."""
        if process in self._live:
            self._idle.insert(0, process)
            self._ready.set()

    def _lose(self, process: Spawned, listener: asyncio.Task[None]) -> None:
        """The process is gone, for whatever reason."""
        self._live.remove(process)
        if process in self._idle:
            self._idle.remove(process)
        self._n_lost, self._lost_at_s, self._cause = self._n_lost + 1, self._clock(), process.end
        self._lacking.set()

    def _late(self, process: Spawned) -> None:
        """An answer that nobody waits for any more is dropped."""
        self._count("n_late")
        self._tell("worker.late", pid=process.pid, severity="warning")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _tell(self, name: str, *, severity: Any, **payload: object) -> None:
        self._emit(Event(name, {"name": self.name, **payload, "counts": self.counts}, severity))
