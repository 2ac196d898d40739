"""How much is wrong with a run, as a level that rises at once and falls slowly; who is notified, and where it can be
read.

now = raised(now, Level.CONSERVATIVE, reason="diverged", origin="guard")

The level is a value. Signals record what raised it, and none of them is lost; a small file shows it to other processes
(growth.md 19).
"""

import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from meristem.checkpoint.atomic import write_atomic
from meristem.errors import RunError, WrongValue
from meristem.events import Emit, Event, Severity

Clock: TypeAlias = Callable[[], int]
"""Nanoseconds of a monotonic clock, as of ``time.monotonic_ns``."""


class Level(IntEnum):
    """How careful the run must be.

    NOTICE: something odd was recorded. ELEVATED: too little time; fewer evaluations and probes. CONSERVATIVE: no
    change of structure is begun, and the blend weights of seeds stay as they are. HALT: stop at the next step, save.
    """

    NONE = 0
    NOTICE = 1
    ELEVATED = 2
    CONSERVATIVE = 3
    HALT = 4


@dataclass(frozen=True)
class Emergency:
    """The level that a run is at.

    reason, origin: why, and which part of the run said so; of the signal that brought it to this level.
    triggered_ns: when that was, on the clock of this machine since it was started; None at level NONE.
    n_signals: since the level was NONE. n_quiet: steps since the last of them, or since the level last fell.
    """

    level: Level = Level.NONE
    reason: str = ""
    origin: str = ""
    triggered_ns: int | None = None
    n_signals: int = 0
    n_quiet: int = 0

    def to_json(self) -> dict[str, object]:
        """Plain values; ``from_json`` makes the same of them."""
        return vars(self) | {"level": int(self.level)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "level": Level(values.get("level", Level.NONE))})


def raised(now: Emergency, level: int, *, reason: str, origin: str, clock: Clock = time.monotonic_ns) -> Emergency:
    """``now`` after a signal of this level.

    A signal below the level in force, or at it, changes neither that nor what is said of its cause; but it was no quiet
    step. Raises WrongValue for a level that there is not, level 0 among them, and where reason or origin are missing.
    """
    wanted = _wanted(level, reason, origin)
    heard = replace(now, n_signals=now.n_signals + 1, n_quiet=0)
    if wanted <= now.level:
        return heard
    return replace(heard, level=wanted, reason=reason, origin=origin, triggered_ns=clock())


def quiet(now: Emergency) -> Emergency:
    """``now`` after one step in which nothing was wrong."""
    return replace(now, n_quiet=now.n_quiet + 1) if now.level else now


def downgraded(now: Emergency, level: int, *, after: int) -> Emergency:
    """``now`` at a lower level, if the last ``after`` steps were quiet; else ``now`` as it is.

    Reason, origin and time stay until level 0, and the quiet steps are counted anew: each way down has to be earned.
    """
    if now.n_quiet < after:
        return now
    return replace(now, level=Level(level), n_quiet=0) if level else Emergency()


def _wanted(level: int, reason: str, origin: str) -> Level:
    """The level of a signal, if it is one that can be sent."""
    if level not in _SEVERITY or not reason.strip() or not origin.strip():
        raise WrongValue(
            f"an emergency of level {int(level)}, reason '{reason}', origin '{origin}' cannot be raised; expected a "
            "level from 1 to 4, and a word or two of reason and origin.",
            found=[int(level), reason, origin],
            expected=[int(known) for known in _SEVERITY],
        )
    return Level(level)


PER_MINUTE: Final = 60
"""Signals that are recorded at once in any minute (growth.md 19)."""

_MINUTE_NS: Final = 60_000_000_000

_SEVERITY: Final[Mapping[int, Severity]] = {
    Level.NOTICE: "info",
    Level.ELEVATED: "warning",
    Level.CONSERVATIVE: "error",
    Level.HALT: "critical",
}


@dataclass(frozen=True)
class Signal:
    """What is recorded: one emergency, or ``count`` of the same origin and level in one.

    level: at least the requested one; one more where signals came too fast. reason: of the last of them.
    first_ns, last_ns: when the first and the last of them came.
    """

    level: Level
    origin: str
    reason: str
    first_ns: int
    last_ns: int
    count: int = 1

    @property
    def event(self) -> Event:
        """The signal as a record."""
        return Event("emergency.raised", vars(self) | {"level": int(self.level)}, _SEVERITY[self.level])


class Signals:
    """Records signals in the very call that sends them.

    Not more than ``per_minute`` are recorded in any minute. Those beyond it wait, joined by origin and level and
    counted, and stand one level higher, for so many are a trouble of their own; but only a requested halt halts a
    run. What waits is recorded when a minute allows it, by the next ``send`` or ``flush``, highest level first. What
    could not be recorded, since ``emit`` raised, waits as well: no signal is ever dropped.
    """

    def __init__(self, emit: Emit, *, per_minute: int = PER_MINUTE, clock: Clock = time.monotonic_ns) -> None:
        self._emit, self._per_minute, self._clock = emit, per_minute, clock
        self._waiting: dict[tuple[str, Level], Signal] = {}
        self._recorded_ns: deque[int] = deque()

    def send(self, level: int, *, origin: str, reason: str) -> Level:
        """Record it; gives the level that the run is to be raised to, one higher where the signal has to wait."""
        wanted, now_ns = _wanted(level, reason, origin), self._clock()
        key = (origin, wanted)
        signal = Signal(wanted, origin, reason, now_ns, now_ns)
        if (there := self._waiting.get(key)) is not None:
            signal = replace(there, reason=reason, last_ns=now_ns, count=there.count + 1)
        self._waiting[key] = signal
        self.flush()
        if key in self._waiting and wanted < Level.CONSERVATIVE:  # no halt without a request
            signal = self._waiting[key] = replace(signal, level=Level(wanted + 1))
        return signal.level

    def flush(self, *, is_end: bool = False) -> int:
        """Record what the minute allows, at the end of a run everything; gives how many signals still wait.

        To be called at every step: it costs nothing while nothing waits.
        """
        now_ns = self._clock()
        while self._recorded_ns and now_ns - self._recorded_ns[0] >= _MINUTE_NS:
            self._recorded_ns.popleft()
        while self._waiting and (is_end or len(self._recorded_ns) < self._per_minute):
            key, signal = max(self._waiting.items(), key=lambda item: (item[1].level, -item[1].first_ns))
            self._emit(signal.event)
            del self._waiting[key]
            self._recorded_ns.append(now_ns)
        return sum(signal.count for signal in self._waiting.values())


FILE: Final = "emergency.state"
"""The shared level in a run directory."""

_MAGIC: Final = int.from_bytes(b"MEMG", "little")
_VERSION: Final = 1
_IS_CUT: Final = 1
"""Flag: origin or reason had more than 16 bytes, and ends in an ellipsis."""

_RECORD: Final = struct.Struct("<IHBBQQ16s16sI4x")
_CHECKED: Final = slice(0, 56)
_PATIENCE_S: Final = 1.0
"""How long a reader waits for a whole record; a writer that was put aside by the system needs some time."""


class SharedLevel:
    """The level of a run in a file of 64 bytes, written by the run and read by any other process.

    Little-endian: u32 magic, u16 version, u8 level, u8 flags, u64 triggered_ns, u64 zero, 16 bytes origin, 16 bytes
    reason, u32 CRC32 of all before it, 4 bytes zero. It is written in one call, over itself; a reader that meets a
    write in its middle sees a wrong checksum, and looks again.

    Level, reason, origin and time are shared; the counters of an Emergency are the run's own. Times compare between
    processes of one machine.
    """

    def __init__(self, path: Path) -> None:
        """Open the file for writing, and make it if it is not there.

        One that is there is kept, for others may have it open. A new one appears whole, with its blocks on the disk:
        a level is shown on a full disk too.
        """
        self.path = path
        if not path.exists() or path.stat().st_size != _RECORD.size:
            write_atomic(path, _packed(Emergency()))
        self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, now: Emergency) -> None:
        """Show ``now`` to all readers."""
        os.pwrite(self._descriptor, _packed(now), 0)

    def close(self) -> None:
        """Let the file go; what was written last stays in it."""
        os.close(self._descriptor)


def read_shared(
    path: Path,
    *,
    patience_s: float = _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Emergency:
    """The level in the file at ``path``, with its counters at 0.

    Raises RunError where there is no such file, it is none of ours, or holds no whole record for ``patience_s``.
    """
    deadline = clock() + patience_s
    while True:
        record = _read(path)
        *fields, crc = _RECORD.unpack(record)
        if zlib.crc32(record[_CHECKED]) == crc:
            break
        if clock() >= deadline:
            raise RunError(
                f"{path} holds no whole record, also after {patience_s:g} s: the checksum does not fit. The file was "
                "damaged. Resume the run: it writes the record anew.",
                path=str(path),
            )
        sleep(0.0001)
    magic, version, level, _, triggered_ns, _, origin, reason = fields
    if (magic, version) != (_MAGIC, _VERSION):
        raise RunError(
            f"{path} begins with {magic:#010x} and version {version}; expected {_MAGIC:#010x} and version {_VERSION}. "
            "It was written by another program or a newer meristem; use the one that wrote it.",
            path=str(path),
        )
    return Emergency(Level(level), _text(reason), _text(origin), triggered_ns) if level else Emergency()


def _read(path: Path) -> bytes:
    try:
        record = path.read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"there is no {path}. Expected the file that a run writes when it starts; give the directory of a run.",
            path=str(path),
        ) from None
    if len(record) != _RECORD.size:
        raise RunError(
            f"{path} has {len(record)} bytes; an emergency record has {_RECORD.size}. Remove the file: the run "
            "makes a new one when it is resumed.",
            path=str(path),
        )
    return record


def _packed(now: Emergency) -> bytes:
    origin, reason = _short(now.origin), _short(now.reason)
    flags = _IS_CUT if (origin, reason) != (_utf8(now.origin), _utf8(now.reason)) else 0
    fields = (_MAGIC, _VERSION, now.level, flags, now.triggered_ns or 0, 0, origin, reason)
    crc = zlib.crc32(_RECORD.pack(*fields, 0)[_CHECKED])
    return _RECORD.pack(*fields, crc)


def _short(text: str) -> bytes:
    """At most 16 bytes of UTF-8; an ellipsis stands for what was cut off."""
    whole, mark = _utf8(text), _utf8("…")
    return whole if len(whole) <= 16 else whole[: 16 - len(mark)].decode(errors="ignore").encode() + mark


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()
