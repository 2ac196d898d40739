"""One place for deadline, retry, giving up and telemetry, whichever make of worker does the work.

    outcome = attempt("score", lambda deadline: worker.call(SCORE, plan, deadline.left_s), patience, breaker)
    breaker = outcome.breaker
    score = outcome.value if outcome.error is None else 0.0

Source: growth.md section 22 and requirement LA1.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from meristem.errors import BreakerOpen, WorkerError, WorkerTimeout
from meristem.events import Emit, Event, silent
from meristem.worker.breaker import Breaker
from meristem.worker.deadline import Deadline

T = TypeVar("T")

FINAL = ("stopped",)
"""Reasons of a WorkerError after which another try is of no use."""


@dataclass(frozen=True)
class Patience:
    """How long one try may take, how many are made, and the pause between two. A single try gives up at once."""

    try_s: float = 1.0
    n_tries: int = 1
    pause_s: float = 0.1


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of it: a value, or the error of the last try; and the breaker for the next time."""

    breaker: Breaker
    n_tries: int
    seconds: float
    value: T | None = None
    error: WorkerError | None = None


def attempt(
    name: str,
    call: Callable[[Deadline], T],
    patience: Patience,
    breaker: Breaker,
    *,
    emit: Emit = silent,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome[T]:
    """Make a call until it gives something, patience ends or the breaker opens. A WorkerError is part of the outcome.

    Each attempt is one event, ``worker.called`` or ``worker.gave_up``: name, tries, seconds, the breaker's state, the
    error if any.

    call: is given the deadline of its try. breaker: its times are seconds of ``clock``.
    """
    begun_s, n_tries = clock(), 0
    error: WorkerError = BreakerOpen(
        f"{name} is not tried, since it failed too often. It will be again {breaker.pause:g} s after the last failure.",
        name=name,
    )
    while n_tries < patience.n_tries and breaker.state(clock()) != "open":
        if n_tries:
            sleep(patience.pause_s)
        n_tries += 1
        try:
            value = call(Deadline.after(patience.try_s, clock))
        except WorkerError as cause:
            error, breaker = cause, breaker.failed(clock())
            if cause.fields.get("reason") in FINAL:
                break
        else:
            breaker = breaker.succeeded(clock())
            outcome = Outcome(breaker, n_tries, clock() - begun_s, value=value)
            emit(Event("worker.called", _told(name, outcome, breaker.state(clock())), "debug"))
            return outcome
    lost: Outcome[T] = Outcome(breaker, n_tries, clock() - begun_s, error=error)
    emit(Event("worker.gave_up", _told(name, lost, breaker.state(clock())), "warning"))
    return lost


def _told(name: str, outcome: Outcome[Any], state: str) -> dict[str, object]:
    error = type(outcome.error).__name__ if outcome.error else None
    seconds = round(outcome.seconds, 6)
    return {"name": name, "n_tries": outcome.n_tries, "seconds": seconds, "breaker": state, "error": error}


def in_thread(
    name: str,
    work: Callable[[Deadline], T],
    deadline: Deadline,
    *,
    expects: type | tuple[type, ...] = object,
    emit: Emit = silent,
) -> T:
    """What ``work`` gives, done in a thread that checks its deadline between its pieces: the cooperative make.

    At the deadline WorkerTimeout is raised whatever the thread does; it is not stopped, but left alone with a deadline
    that is over. If it comes to an end after all, its answer is dropped, as the event ``worker.late``. Work that may
    never look belongs into a process. Work that raises, or gives another type than ``expects``, is a WorkerError.
    """
    lock, done = threading.Lock(), threading.Event()
    answers: list[T] = []
    errors: list[BaseException] = []
    is_given_up = False

    def run() -> None:
        try:
            answers.append(work(deadline))
        except BaseException as cause:  # noqa: BLE001 - it is raised where the work was called
            errors.append(cause)
        with lock:
            done.set()
            is_late = is_given_up
        if is_late:
            emit(Event("worker.late", {"name": name, "seconds_over": round(-deadline.left_s, 3)}, "warning"))

    threading.Thread(target=run, name=f"worker-{name}", daemon=True).start()
    done.wait(max(deadline.left_s, 0))
    with lock:
        is_given_up = not done.is_set()
    if is_given_up:
        raise WorkerTimeout(
            f"{name} was not done at its deadline. Give it more time, check the deadline between smaller pieces, or "
            f"run it in a process.",
            name=name,
        )
    return _judged(name, answers, errors, expects)


def _judged(name: str, answers: list[T], errors: list[BaseException], expects: type | tuple[type, ...]) -> T:
    """What a thread gave, or the error that says why it is of no use."""
    if errors and isinstance(errors[0], WorkerError):
        raise errors[0]
    if errors:
        kind, text = type(errors[0]).__name__, "".join(traceback.format_exception(errors[0]))
        raise WorkerError(
            f"{name} raised {kind}: {errors[0]}. The field 'traceback' says where.",
            reason="raised",
            name=name,
            type=kind,
            traceback=text,
        ) from errors[0]
    if not isinstance(answers[0], expects):
        found = type(answers[0]).__name__
        raise WorkerError(
            f"{name} gave {found}; expected {expects}. Mend it.", reason="wrong type", name=name, found=found
        )
    return answers[0]
