"""Work in a thread that checks its deadline between its pieces; its caller is back in time whatever it does."""

import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from meristem.errors import WorkerError, WorkerTimeout
from meristem.events import Emit, Event, silent
from meristem.worker.deadline import Deadline

T = TypeVar("T")


def in_thread(
    name: str,
    work: Callable[[Deadline], T],
    deadline: Deadline,
    *,
    expects: type | tuple[type, ...] = object,
    emit: Emit = silent,
) -> T:
    """What ``work`` gives, done in a thread.

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
