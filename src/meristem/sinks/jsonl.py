"""One file of JSON lines: each record arrives whole or not at all, and a reader gets over a torn end."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from meristem.errors import BadRecords, DiskFull
from meristem.events import Emit, Event, silent

_BLOCK_BYTES = 1 << 16


class JsonLines:
    """Appends lines to ``path``, one system call for each, so that a kill cannot tear what was written.

    At ``rotate_size_bytes`` the file is set aside as ``name.0001.ndjson`` and a new one begun. An end that a crash of
    the machine tore is cut off when the file is opened; ``n_cut_bytes`` says how much that was.
    """

    def __init__(self, path: Path, rotate_size_bytes: int) -> None:
        self.path = path
        self.last, self.n_cut_bytes = _cut_torn_end(path)
        self._rotate_size_bytes = rotate_size_bytes
        self._descriptor = -1
        self._open()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; a disk without room for it is ``DiskFull`` and leaves the file as it was."""
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if self._size_bytes and self._size_bytes + len(line) > self._rotate_size_bytes:
            self._rotate()
        with self._disk_full():
            n_written = os.write(self._descriptor, line)
            if n_written < len(line):
                os.ftruncate(self._descriptor, self._size_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size_bytes += len(line)
        self.last = record

    def sync(self) -> None:
        """Wait until the disk holds every line."""
        with self._disk_full():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Wait until the disk holds every line, and let the file go; an append after that is an error."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1  # the system may give the number to another file

    @contextlib.contextmanager
    def _disk_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(
                f"no space is left to add a record to {self.path}. Everything before it is safe. "
                f"Free space there and resume the run.",
                path=str(self.path),
            ) from cause

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size_bytes = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        number = len(rotated(self.path)) + 1
        os.rename(self.path, self.path.with_suffix(f".{number:04d}{self.path.suffix}"))
        self._open()


def rotated(path: Path) -> list[Path]:
    """The files set aside from ``path``, oldest first."""
    return sorted(path.parent.glob(f"{path.stem}.[0-9][0-9][0-9][0-9]{path.suffix}"))


def read_records(path: Path, emit: Emit = silent) -> Iterator[dict[str, Any]]:
    """The records of ``path``, those set aside from it first. A torn last line is passed over as an event.

    A run may write on meanwhile; what stands there when reading begins is read.
    """
    with contextlib.ExitStack() as opened:
        for file, lines in _opened(path, opened):
            size_bytes, end = os.fstat(lines.fileno()).st_size, 0
            for number, line in enumerate(lines, start=1):
                record, end = parsed(line), end + len(line)
                if record is not None:
                    yield record
                elif file == path and end >= size_bytes:
                    # The last line when reading began; a run that is alive may have written on since.
                    emit(Event("degraded", {"what": "torn last line", "path": path.name, "line": number}, "warning"))
                    return
                else:
                    raise BadRecords(
                        f"line {number} of {file} is no JSON record: {line[:60]!r}. Remove that line to read the rest.",
                        path=str(file),
                        line=number,
                    )


def _opened(path: Path, opened: contextlib.ExitStack) -> list[tuple[Path, BinaryIO]]:
    """The files that hold the records of ``path``, open, in their order."""
    while True:
        aside = rotated(path)
        found: list[tuple[Path, BinaryIO]] = []
        for file in [*aside, path]:
            # Between setting a file aside and beginning the next one, a run has none of that name.
            with contextlib.suppress(FileNotFoundError):
                found.append((file, opened.enter_context(open(file, "rb"))))
        if rotated(path) == aside:
            break
    if not found:
        raise BadRecords(f"there is no file of records {path}. Expected the records of a run.", path=str(path))
    return found


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record on a whole line, its end included; None where it holds none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _cut_torn_end(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last whole record of a file and its rotated predecessors, and how many bytes after it were cut off."""
    n_cut_bytes = 0
    if path.exists():
        with open(path, "r+b") as file:
            end = size_bytes = file.seek(0, os.SEEK_END)
            while end:
                start = _line_start(file, end)
                file.seek(start)
                record = parsed(file.read(end - start))
                if record is not None:
                    break
                end = start
            n_cut_bytes = size_bytes - end
            if n_cut_bytes:
                file.truncate(end)
            if end:
                return record, n_cut_bytes
    for older in reversed(rotated(path)):
        *_, last = read_records(older)
        return last, n_cut_bytes
    return None, n_cut_bytes


def _line_start(file: Any, end: int) -> int:
    """Where the line that ends at byte ``end`` begins."""
    start = end - 1
    while start:
        size_bytes = min(_BLOCK_BYTES, start)
        file.seek(start - size_bytes)
        found = file.read(size_bytes).rfind(b"\n")
        if found >= 0:
            return int(start - size_bytes + found + 1)
        start -= size_bytes
    return 0
