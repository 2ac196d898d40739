"""A small value kept beside a run in a file of its own, written every so often and whole or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson

from meristem.checkpoint.atomic import write_atomic
from meristem.errors import CheckpointCorrupt, RunError
from meristem.events import Emit, Event, silent


@dataclass(frozen=True)
class SideFile:
    """Where a value is kept, and when it was written last.

    every: the least between two writes, in the unit of the caller's clock, steps or seconds. written_at: the last that
    succeeded, on that clock; None before it. failed: the name of the event that says that one did not.
    """

    path: Path
    failed: str
    every: float = 0.0
    written_at: float | None = None

    def age(self, now: float) -> float | None:
        """How old what the file holds is; None of a file that was not written yet."""
        return None if self.written_at is None else now - self.written_at

    def flush(self, value: Mapping[str, Any], *, now: float, is_strict: bool = False, emit: Emit = silent) -> Self:
        """Write a value of JSON if it is due, atomically; the file as it is then.

        Where it cannot be written the old one stays, and the event ``failed`` says why and how old that is. Strict, it
        raises RunError (DiskFull where no space is left) after it; otherwise it is tried again at the next call.
        """
        age = self.age(now)
        if age is not None and age < self.every:
            return self
        try:
            write_atomic(self.path, orjson.dumps(value))
        except (OSError, RunError) as cause:
            emit(Event(self.failed, {"path": str(self.path), "age": age, "why": str(cause)}, "error"))
            if is_strict and isinstance(cause, RunError):
                raise
            if is_strict:
                raise RunError(
                    f"{self.path} cannot be written: {cause}. Make its folder writable; the old file is untouched.",
                    path=str(self.path),
                ) from cause
            return self
        return replace(self, written_at=now)

    def read(self) -> dict[str, Any] | None:
        """The value, or None where there is none yet. Raises CheckpointCorrupt for a file that is no JSON object, and
        RunError for one that cannot be read."""
        try:
            found = orjson.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as cause:
            raise RunError(
                f"{self.path} cannot be read: {cause}. Name a file that can, or one that is not there yet.",
                path=str(self.path),
            ) from cause
        except orjson.JSONDecodeError as cause:
            raise CheckpointCorrupt(f"{self.path} is no JSON: {cause}. Delete it; it is written anew.") from cause
        if not isinstance(found, dict):
            raise CheckpointCorrupt(f"{self.path} holds no JSON object. Delete it; it is written anew.")
        return found
