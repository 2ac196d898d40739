"""Checkpoints written beside the training: the loop goes on while a thread waits for the disk."""

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self


class Saver:
    """Writes one checkpoint at a time in a thread of its own.

    What fails there is raised once in the thread that trains, at its next call of whichever method; at the end of the
    block or in ``close`` at the latest. Nothing is thrown away: the process does not end before a write has.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self,
        write: Callable[[], Path],
        *,
        done: Callable[[Path], None],
        reading: AbstractContextManager[object] | None = None,
    ) -> None:
        """Have ``write`` called in the thread, and then ``done`` with what it gave; waits for the one before.

        holding: what the write needs until it has ended, as ``SnapshotBuffer.pinned`` of a snapshot. It is entered
            here, before anything can overwrite the snapshot, and left by the thread.
        Raises what the one before has failed with; then nothing is begun.
        """
        self.wait()
        held = contextlib.ExitStack()
        if reading is not None:
            held.enter_context(reading)
        thread = threading.Thread(target=self._run, args=(write, done, held), name="saver")
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            held.close()
            raise
        self._thread = thread

    def wait(self) -> None:
        """Until nothing is being written. Raises what the last write failed with."""
        self._join()
        self._raise_failure()

    def poll(self) -> None:
        """Raises what the last write failed with, if it has; does not wait."""
        if not self.is_busy:
            self._raise_failure()

    def close(self) -> None:
        """The same as ``wait``: what was begun is finished, and failures are raised."""
        self.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, write: Callable[[], Path], done: Callable[[Path], None], held: contextlib.ExitStack) -> None:
        try:
            with held:
                path = write()
            done(path)
        except BaseException as failure:  # noqa: BLE001 - it goes on in the thread that waits for it
            self._failure = failure
