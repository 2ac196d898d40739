"""The journal of a run: what was begun, what of it was done, and what was left in the middle by a crash.

Each record is its length as u32 little-endian, the CRC32 of its JSON as u32, and the JSON (growth.md section 12). It is
on the disk before the call returns. A save, a rollback or a structural change is ``begin`` before it and ``commit`` or
``undo`` after it; what has neither was cut off, and whoever resumes undoes it.

A crash can tear the last record, and only that one: a torn end is cut off when the journal is opened. Bytes that were
written and are others now are damage, wherever they stand.
"""

import contextlib
import datetime
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import orjson

from meristem.checkpoint.atomic import disk_full, sync_directory, write_all
from meristem.checkpoint.values import to_json
from meristem.errors import CheckpointCorrupt, CheckpointTooNew
from meristem.events import Emit, Event, silent

SCHEMA: Final = "meristem.journal/1"
ROTATE_SIZE_BYTES: Final = 100_000_000
LARGEST_BYTES: Final = 1 << 20
"""What the JSON of one record may take. A larger length is no length."""

_HEAD: Final = struct.Struct("<II")
_WHATS: Final = ("begin", "commit", "undo")
_RESERVED: Final = b"\0\0"
"""JSON has no byte 0. A file ends in two where the system had made it longer and not yet written what belongs there."""


@dataclass(frozen=True)
class Record:
    """One line of the story.

    seq: rises by one from record to record. number: that of the change, given by ``begin`` and repeated at its end.
    kind: of the change, as ``save`` or ``rollback``. ts: when it was written, in UTC. fields: plain values.
    """

    seq: int
    number: int
    what: Literal["begin", "commit", "undo"]
    kind: str
    ts: str
    fields: Mapping[str, Any]


def read(path: Path, emit: Emit = silent) -> list[Record]:
    """All records, those of files set aside first; none where there is no journal.

    A torn end is passed over as an event. CheckpointCorrupt names the byte at which another record is damaged.
    """
    return list(_read(path, emit)[0])


def uncommitted(records: Iterable[Record]) -> list[Record]:
    """The beginnings of what was neither committed nor undone, oldest first."""
    begun: dict[int, Record] = {}
    for record in records:
        if record.what == "begin":
            begun[record.number] = record
        else:
            begun.pop(record.number, None)
    return list(begun.values())


class Journal:
    """Appends to ``path`` and is the only one that does. Threads may share it.

    clock: seconds since the epoch, for the time in the records.
    n_cut_bytes: how many bytes of a torn record were cut off the end when it was opened.
    """

    def __init__(
        self, path: Path, *, rotate_size_bytes: int = ROTATE_SIZE_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._rotate_size_bytes, self._clock = rotate_size_bytes, clock
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        records, self.n_cut_bytes = _read(path, silent)
        self._open = {record.number: record for record in uncommitted(records)}
        self._seq = max((record.seq for record in records), default=0)
        self._number = max((record.number for record in records), default=0)
        self._start()
        if self.n_cut_bytes:
            self._size_bytes -= self.n_cut_bytes
            self._cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; the disk holds every record already."""
        os.close(self._descriptor)

    def begin(self, kind: str, fields: Mapping[str, object]) -> int:
        """Say that a change begins, and give the number for its end."""
        with self._lock:
            number = self._number + 1
            self._open[number] = self._append(number, "begin", kind, fields)
            self._number = number
        return number

    def commit(self, number: int, fields: Mapping[str, object]) -> None:
        """Say that a change is done."""
        self._end(number, "commit", fields)

    def undo(self, number: int, reason: str) -> None:
        """Say that a change was taken back; also one that an earlier process left in the middle."""
        self._end(number, "undo", {"reason": reason})

    def uncommitted(self) -> list[Record]:
        """The beginnings of what has no end yet, those left by earlier processes included; oldest first."""
        with self._lock:
            return list(self._open.values())

    def _end(self, number: int, what: Literal["commit", "undo"], fields: Mapping[str, object]) -> None:
        with self._lock:
            if number not in self._open:
                raise ValueError(f"{what} of {number}, which is not open; open are {sorted(self._open)}")
            self._append(number, what, self._open[number].kind, fields)
            del self._open[number]

    def _append(
        self, number: int, what: Literal["begin", "commit", "undo"], kind: str, fields: Mapping[str, object]
    ) -> Record:
        """Write one record and wait for the disk. Where that fails the file ends as it did before."""
        record = Record(self._seq + 1, number, what, kind, _text(self._clock()), dict(fields))
        content = to_json("journal", {"schema": SCHEMA} | asdict(record))
        if len(content) > LARGEST_BYTES:
            raise ValueError(f"a record of {len(content)} bytes is too large for a journal; it takes {LARGEST_BYTES}")
        framed = _HEAD.pack(len(content), zlib.crc32(content)) + content
        with disk_full(self.path):
            if self._size_bytes and self._size_bytes + len(framed) > self._rotate_size_bytes:
                self._rotate()
            try:
                self._cut()
                write_all(self._descriptor, framed)
                os.fsync(self._descriptor)
            except BaseException:
                # Should this fail too, the cut before the next record makes up for it.
                with contextlib.suppress(OSError):
                    self._cut()
                raise
        self._size_bytes += len(framed)
        self._seq = record.seq
        return record

    def _cut(self) -> None:
        """Make the file end after the last whole record."""
        if os.fstat(self._descriptor).st_size != self._size_bytes:
            os.ftruncate(self._descriptor, self._size_bytes)
            os.fsync(self._descriptor)

    def _start(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size_bytes = os.fstat(descriptor).st_size
            sync_directory(self.path.parent)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._size_bytes = descriptor, size_bytes

    def _rotate(self) -> None:
        """Set the file aside and begin a new one; where there is no room for a new one, the old one goes on."""
        full, aside = self._descriptor, self.path.with_name(f"{self.path.name}.{len(rotated(self.path)) + 1:04d}")
        os.rename(self.path, aside)
        try:
            self._start()
        except OSError:
            os.rename(aside, self.path)
            raise
        os.close(full)


def rotated(path: Path) -> list[Path]:
    """The files set aside from ``path``, oldest first."""
    return sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9]"))


def _read(path: Path, emit: Emit) -> tuple[list[Record], int]:
    """All records, and how many bytes of a torn one stand at the end of ``path``."""
    records: list[Record] = []
    n_torn_bytes = 0
    for file in [*rotated(path), *([path] if path.exists() else [])]:
        content, at = file.read_bytes(), 0
        while at < len(content):
            payload = _payload(file, content, at)
            if payload is None and file == path:
                n_torn_bytes = len(content) - at
                break
            if payload is None:
                raise _corrupt(file, at, "a record ends in the middle, and later ones follow in another file")
            record = _record(file, at, payload)
            if records and record.seq != records[-1].seq + 1:
                raise _corrupt(file, at, f"record {record.seq} stands where {records[-1].seq + 1} should be")
            records.append(record)
            at += _HEAD.size + len(payload)
    if n_torn_bytes:
        emit(Event("degraded", {"what": "torn end of journal", "path": path.name, "n_bytes": n_torn_bytes}, "warning"))
    return records, n_torn_bytes


def _payload(file: Path, content: bytes, at: int) -> bytes | None:
    """The JSON of the record that begins at byte ``at``; None where it is torn. Damage raises."""
    begin = at + _HEAD.size
    if len(content) < begin:
        return None
    size_bytes, crc = _HEAD.unpack_from(content, at)
    payload = content[begin : begin + min(size_bytes, LARGEST_BYTES)]
    if size_bytes and len(payload) == size_bytes and zlib.crc32(payload) == crc:
        return payload
    if size_bytes <= LARGEST_BYTES and _is_torn(content, begin, size_bytes, crc):
        return None
    raise _corrupt(file, at, "a record has other bytes than were written (its CRC32 differs)")


def _is_torn(content: bytes, begin: int, size_bytes: int, crc: int) -> bool:
    """Whether what is here of the JSON that begins at ``begin`` is its first part, of which no more was written.

    A length that was changed may look the same. Then the bytes with the right CRC32 are here, and end before it says.
    """
    end = begin + size_bytes
    if content.endswith(_RESERVED):
        return len(content.rstrip(b"\0")) <= end
    if len(content) >= end:
        return False
    running = 0
    for place in range(begin, len(content)):
        running = zlib.crc32(content[place : place + 1], running)
        if running == crc:
            return False
    return True


def _record(file: Path, at: int, payload: bytes) -> Record:
    """The record that ``payload`` tells. Nothing may be missing, unknown or of another version."""
    try:
        said = orjson.loads(payload)
        schema = said.pop("schema")
        record = Record(**said) if schema == SCHEMA else None
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as cause:
        raise _corrupt(file, at, f"a record is not one of {SCHEMA}: {cause}") from cause
    if record is None:
        raise CheckpointTooNew(
            f"the journal {file} has a record of {schema} at byte {at}; this meristem reads {SCHEMA}. Update meristem.",
            path=str(file),
            position=at,
        )
    if record.what not in _WHATS:
        raise _corrupt(file, at, f"a record says '{record.what}', which is none of {', '.join(_WHATS)}")
    return record


def _corrupt(file: Path, at: int, reason: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"the journal {file} is damaged at byte {at}: {reason}. Put a copy of the file in its place; or move it away, "
        f"which loses the knowledge of what a crash left in the middle, and nothing else.",
        path=str(file),
        position=at,
        reason=reason,
    )


def _text(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="milliseconds")
