"""One SQLite file of ours: opened in today's version, written in transactions, its errors as ours.

It is for a local disk, which is what the write-ahead log of SQLite needs. A transaction that ended is on the disk.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from meristem.errors import CheckpointCorrupt, CheckpointTooNew, DiskFull, RunError, RunInUse

Run: TypeAlias = Callable[..., sqlite3.Cursor]
BUSY_S: Final = 10.0
"""How long a transaction waits for that of another process."""


class Database:
    """Calls come from any thread, one after the other.

    what: what the file is, for messages. application: the number by which SQLite knows files of this kind. migrations:
    scripts; number n, counted from 1, leads from version n - 1 to n. forgets: whether what is deleted is overwritten.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        application: int,
        migrations: Sequence[str],
        *,
        busy_s: float = BUSY_S,
        forgets: bool = False,
    ) -> None:
        self.path, self.what, self._forgets = path, what, forgets
        self._lock = threading.RLock()
        with self._explained():
            self._connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        try:
            with self._explained():
                self._prepare(application, migrations)
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, application: int, migrations: Sequence[str]) -> None:
        run = self._connection.execute
        self._connection.row_factory = sqlite3.Row
        found = run("PRAGMA user_version").fetchone()[0]
        is_new = run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not is_new and run("PRAGMA application_id").fetchone()[0] != application:
            raise CheckpointCorrupt(
                f"{self.path} is a file of another program; expected {self.what}. Choose another place.",
                path=str(self.path),
            )
        if found > len(migrations):
            raise CheckpointTooNew(
                f"{self.path} is of version {found}; this meristem reads up to {len(migrations)}. Update meristem.",
                path=str(self.path),
                version=found,
                supported=len(migrations),
            )
        if run("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its pages do not fit together")
        run("PRAGMA foreign_keys = ON")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA secure_delete = {'ON' if self._forgets else 'OFF'}")
        for number, script in enumerate(migrations[found:], start=found + 1):
            numbers = f"PRAGMA user_version = {number}; PRAGMA application_id = {application};"
            try:
                self._connection.executescript(f"BEGIN IMMEDIATE; {script} {numbers} COMMIT;")
            except BaseException:
                if self._connection.in_transaction:
                    run("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file; calls afterwards raise RunError."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Run]:
        """A transaction: all of it or nothing."""
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """The rows of a query."""
        with self._lock, self._explained():
            return self._connection.execute(query, values).fetchall()

    def empty_log(self) -> None:
        """Put the log into the file and empty it, so that what was deleted is nowhere any more."""
        with self._lock, self._explained():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite raises into an error of ours."""
        path = self.path
        try:
            yield
        except sqlite3.ProgrammingError as cause:
            raise RunError(f"{path} is closed: {cause}. Open it again.") from cause
        except sqlite3.DatabaseError as cause:
            code = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise in_use(path) from cause
            if code == sqlite3.SQLITE_FULL:
                raise DiskFull(f"no space is left to write {path}. Nothing was changed: free space.") from cause
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
                raise RunError(f"{path} cannot be used: {cause}. See to its rights and its disk.") from cause
            raise CheckpointCorrupt(
                f"{path}, {self.what}, is broken: {cause}. Take it from a copy, or move it away.", path=str(path)
            ) from cause


def in_use(path: Path) -> RunInUse:
    """What is raised where another process does not let go of a file."""
    return RunInUse(
        f"another process has been writing to {path} for too long. Let it end, and try again.", path=str(path)
    )
