"""Calls into another process, which can really be stopped: at its deadline the process is killed.

A timeout on a thread stops nothing: the thread goes on, and a pool even waits for it (growth.md section 2). So what may
hang runs in a process of its own, spawned, with JSON going in and out.

Source: growth.md section 22.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Final, Self

import orjson

from meristem.errors import WorkerDied, WorkerError, WorkerTimeout, WrongValue
from meristem.events import Emit, Event, silent
from meristem.worker.child import LENGTH, message
from meristem.worker.deadline import Deadline

ENDPOINT: Final = re.compile(r"(?!__main__:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
GRACE_S: Final = 0.3
"""How long an idle process may take to end by itself when the worker stops."""
REAP_S: Final = 0.1
"""How long is waited to see that a killed process is gone. The kernel may need longer; then it goes on behind."""
ENDED_S: Final = 10.0
"""The same for a process that closed its line by itself: only its exit code says why."""
READ_BYTES: Final = 1 << 20
"""How much of an answer is taken at once."""
PROGRAM: Final = """
import json, sys
sys.path[:], messages, lifeline, imports = json.loads(sys.argv[1])
from meristem.worker.child import serve
serve(messages, lifeline, imports)
"""
"""It looks for modules where its parent does, and never runs the parent's main program again."""


class Worker:
    """One call after the other in another process, each with a deadline that holds. Threads may share it.

    A spare process is kept warm, so that the call after one that was killed need not wait for an interpreter to start.
    What is lost is replaced at once, as the event ``worker.restarted``.

    name: stands in events and messages. imports: modules that every call needs, imported by each process before it is
    ready. n_spare: processes beside the one that works.
    """

    def __init__(
        self, name: str = "worker", *, imports: Sequence[str] = (), n_spare: int = 1, emit: Emit = silent
    ) -> None:
        self.name = name
        self._imports, self._n_processes, self._emit = tuple(imports), 1 + n_spare, emit
        self._turn = threading.Lock()
        self._is_stopping = False
        self._processes = [_Process(self._imports) for _ in range(self._n_processes)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def call(
        self, endpoint: str, payload: object, deadline_s: float, *, expects: type | tuple[type, ...] = object
    ) -> Any:
        """The JSON value that the function ``package.module:function`` gives for ``payload`` in another process.

        The deadline covers everything: waiting, the start of a process, the work. expects: the type, or types, of the
        value. Raises WorkerTimeout, WorkerDied, and WorkerError for a function that raised, a value of the wrong type
        and a worker that stopped; its field ``reason`` says which.
        """
        if not ENDPOINT.fullmatch(endpoint):
            raise WrongValue(
                f"'{endpoint}' names no endpoint; expected 'package.module:function', importable in another process.",
                value=endpoint,
            )
        try:
            question = message({"endpoint": endpoint, "payload": payload})
        except (TypeError, ValueError) as cause:
            raise WrongValue(
                f"the payload for {endpoint} cannot be sent to worker '{self.name}': {cause}. Send plain JSON values.",
                endpoint=endpoint,
            ) from cause
        return self._judged(endpoint, self._asked(endpoint, question, Deadline.after(deadline_s), deadline_s), expects)

    def ready(self, deadline_s: float) -> None:
        """Wait until all processes stand ready for a call; raises as ``call`` does."""
        self._asked("its start", b"", Deadline.after(deadline_s), deadline_s)

    def stop(self) -> None:
        """End all processes within a second; calls that run or wait end with WorkerError. May be said twice."""
        self._is_stopping = True
        is_idle = self._turn.acquire(blocking=False)
        for process in self._processes[:]:
            if is_idle:
                process.release()
            process.end("its worker was stopped")
        if is_idle:
            self._turn.release()

    def _asked(self, endpoint: str, question: bytes, deadline: Deadline, seconds: float) -> dict[str, Any]:
        """The answer to a question; to none, what all processes said when they were ready."""
        if not self._turn.acquire(timeout=max(deadline.left_s, 0)):
            raise self._overdue(endpoint, seconds, "in the queue", None)
        with ExitStack() as ends:
            ends.callback(self._turn.release)
            ends.callback(self._fill)
            return self._answered(endpoint, question, deadline, seconds)

    def _answered(self, endpoint: str, question: bytes, deadline: Deadline, seconds: float) -> dict[str, Any]:
        process, phase, answer = self._processes[0], "waiting for a process", dict[str, Any]()
        try:
            for place in range(1 if question else self._n_processes):
                process = self._living(place)
                answer = process.ready(deadline)
                if "raised" in answer:
                    process.end(f"its imports raised {answer['raised']['cause']}")
                self._judged("the import of what it needs", answer, list)
            if question:
                phase = "at work"
                answer = process.ask(question, deadline)
            return answer
        except TimeoutError:
            process.end(f"{endpoint} was late")
            raise self._overdue(endpoint, seconds, phase, process.pid) from None
        except OSError:
            process.end()
            if self._is_stopping:
                raise self._stopped(endpoint) from None
            raise WorkerDied(
                f"the process of worker '{self.name}' ended in the middle of {endpoint}: {process.cause}. What it "
                f"wrote before stands on stderr.",
                name=self.name,
                endpoint=endpoint,
                cause=process.cause,
            ) from None
        except BaseException:  # an interrupt of the caller ends the call
            process.end(f"{endpoint} was stopped")
            raise

    def _fill(self) -> None:
        """Replace what was lost; what cannot be started now is tried again at the next call."""
        with suppress(OSError):
            for place in range(self._n_processes):
                self._living(place)

    def _living(self, place: int) -> "_Process":
        """The process at that place; another in place of one that is gone, which comes last."""
        if self._is_stopping:
            raise ConnectionAbortedError
        if not self._processes[place].is_gone:
            return self._processes[place]
        self._processes.append(_Process(self._imports))
        lost = self._processes.pop(place)
        self._emit(Event("worker.restarted", {"name": self.name, "cause": lost.cause}, "warning"))
        if self._is_stopping:
            self._processes[-1].end()
        return self._living(place)

    def _judged(self, endpoint: str, answer: dict[str, Any], expects: type | tuple[type, ...]) -> Any:
        """The value in an answer; raises the error that it stands for."""
        fields = {"name": self.name, "endpoint": endpoint}
        if "raised" in answer:
            raise WorkerError(
                f"{endpoint} raised {answer['raised']['cause']} in worker '{self.name}'. The field 'traceback' says "
                f"where.",
                reason="raised",
                **fields,
                **answer["raised"],
            )
        found = answer.get("wrong") or type(answer["value"]).__name__
        if "wrong" in answer or not isinstance(answer["value"], expects):
            kinds = expects if isinstance(expects, tuple) else (expects,)
            wanted = "a JSON value" if expects is object else " or ".join(kind.__name__ for kind in kinds)
            raise WorkerError(
                f"{endpoint} gave {found} in worker '{self.name}'; expected {wanted}. Mend the endpoint.",
                reason="wrong type",
                found=found,
                expected=wanted,
                **fields,
            )
        return answer["value"]

    def _overdue(self, endpoint: str, seconds: float, phase: str, pid: int | None) -> WorkerTimeout:
        return WorkerTimeout(
            f"{endpoint} was not done after {seconds:g} s in worker '{self.name}'; it was {phase}. Give it more time, "
            f"or find out what it waits for.",
            name=self.name,
            endpoint=endpoint,
            deadline_s=seconds,
            phase=phase,
            pid=pid,
        )

    def _stopped(self, endpoint: str) -> WorkerError:
        return WorkerError(
            f"{endpoint} gave no answer, since worker '{self.name}' was stopped. Make calls before it stops.",
            reason="stopped",
            name=self.name,
            endpoint=endpoint,
        )


class _Process:
    """A spawned process in a session of its own, with a line to it. ``cause``: how it ended."""

    def __init__(self, imports: Sequence[str]) -> None:
        self.cause = ""
        self._greeting: dict[str, Any] | None = None
        self._ending = threading.Lock()
        self._line, theirs = socket.socketpair()
        their_end, self._lifeline = os.pipe()
        start = json.dumps([[str(place) for place in sys.path], theirs.fileno(), their_end, list(imports)])
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, start],
                pass_fds=(theirs.fileno(), their_end),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            self._line.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(their_end)
        self.pid = self._popen.pid

    @property
    def is_gone(self) -> bool:
        """Whether it takes no more calls."""
        if not self.cause:
            try:
                self._line.setblocking(False)
                is_open = bool(self._line.recv(1, socket.MSG_PEEK))
            except OSError as error:
                is_open = isinstance(error, BlockingIOError)  # nothing to read
            if not is_open:
                self.end()
        return bool(self.cause)

    def ready(self, deadline: Deadline) -> dict[str, Any]:
        """The first answer, which comes without a question."""
        if self._greeting is None:
            self._greeting = self._answer(deadline)
        return self._greeting

    def ask(self, question: bytes, deadline: Deadline) -> dict[str, Any]:
        """Send a message and wait for its answer. Raises TimeoutError, and another OSError when none can come."""
        self._line.settimeout(max(deadline.left_s, 1e-3))
        self._line.sendall(question)
        return self._answer(deadline)

    def release(self) -> None:
        """Let an idle process end by itself."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
            self._line.settimeout(GRACE_S)
            while self._line.recv(READ_BYTES):
                pass

    def end(self, why: str = "") -> None:
        """End the process and whatever it started, and say how it ended: ``why``, or what its exit code says."""
        with self._ending:
            if self.cause:
                return
            if self._popen.returncode is None:  # it is not reaped, so nobody else can have its number
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(REAP_S if why else ENDED_S)
            self.cause = why or _end(self._popen.returncode)
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer in another thread waits no more
            self._line.close()
            os.close(self._lifeline)

    def _answer(self, deadline: Deadline) -> dict[str, Any]:
        (n_bytes,) = LENGTH.unpack(self._exactly(LENGTH.size, deadline))
        answer: dict[str, Any] = orjson.loads(self._exactly(n_bytes, deadline))
        return answer

    def _exactly(self, n_bytes: int, deadline: Deadline) -> bytes:
        found = bytearray()
        while len(found) < n_bytes:
            if deadline.is_over:
                raise TimeoutError
            self._line.settimeout(deadline.left_s)
            piece = self._line.recv(min(n_bytes - len(found), READ_BYTES))
            if not piece:
                raise ConnectionResetError
            found += piece
        return bytes(found)


def _end(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"it left with exit code {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"
