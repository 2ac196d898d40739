"""How several processes share the sessions in a directory: who holds it, whose a session is, whose a file."""

import fcntl
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from meristem.errors import RunError, RunInUse

FILE: Final = ".lock"
STATES: Final = "states"
PLACE: Final = 8
"""Hexadecimal digits at the beginning of an id that say where a session is. A fork is where its source is."""

SESSION_HEADER: Final = "Meristem-Session"
"""The field of a request that names its session where a balancer has to see it; the body may leave it out."""
PLACE_HEADER: Final = "Meristem-Place"
"""The field by which a balancer says where it will look for a new session: how its id begins."""


def new_id(place: str = "") -> str:
    """An id for a session: 128 random bits, or 96 behind the beginning of ``place``, another id or that of one."""
    made = uuid.uuid4().hex
    return place[:PLACE] + made[PLACE:] if place else made


@dataclass(frozen=True)
class Share:
    """Which of how many processes uses a directory.

    A file is named for the process that writes it. What a crash left is deleted by the process that has its number, of
    as many as there are now: no other can be about to name it in a row.
    """

    index: int = 0
    n: int = 1

    def new_file(self) -> str:
        """The name of a new state file."""
        return f"{self.index}-{uuid.uuid4().hex}.session"

    def has(self, name: str) -> bool:
        """Whether a file, whole or partial, would be this process's to delete."""
        writer = name.lstrip(".").partition("-")[0]
        return (int(writer) if writer.isdecimal() else 0) % self.n == self.index

    def hold(self, directory: Path) -> IO[str]:
        """The directory, made if need be and held until what is returned is closed; RunInUse where others have it."""
        try:
            (directory / STATES).mkdir(parents=True, exist_ok=True)
            held = open(directory / FILE, "w")
        except OSError as cause:
            raise RunError(f"{directory} cannot hold sessions: {cause.strerror}. Choose another --data.") from cause
        try:
            _lock(held, directory, fcntl.LOCK_EX if self.n == 1 else fcntl.LOCK_SH)
        except BaseException:
            held.close()
            raise
        return held


def hold_for_workers(directory: Path) -> IO[str]:
    """The directory, of which nobody had a share, held so that workers, and nobody else, can take one."""
    held = Share().hold(directory)
    _lock(held, directory, fcntl.LOCK_SH)
    return held


def _lock(held: IO[str], directory: Path, how: int) -> None:
    try:
        fcntl.flock(held, how | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        raise RunInUse(
            f"another server uses the sessions in {directory}. Stop it, or choose another --data.", path=str(directory)
        ) from cause
