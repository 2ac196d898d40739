"""How much is wrong with a run, as a level that rises at once and falls slowly; who is told, and who can look it up.

now = raised(now, Level.CONSERVATIVE, reason="diverged", origin="guard")

The level is a value. Signals carry it to those who must hear of it, and none of them is lost; a small mapped file
shows it to other processes (growth.md 19).
"""

import contextlib
import mmap
import struct
import threading
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
from meristem.events import Emit, Event, Severity, silent

Clock: TypeAlias = Callable[[], int]
"""Nanoseconds that never go back, as of ``time.monotonic_ns``."""


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


def raised(
    now: Emergency,
    level: int,
    *,
    reason: str,
    origin: str,
    at_ns: int | None = None,
    clock: Clock = time.monotonic_ns,
) -> Emergency:
    """``now`` after a signal of this level.

    A signal below the level in force, or at it, changes neither that nor what is said of its cause; but it was no quiet
    step. at_ns: when it came, by default now. Raises WrongValue for a level that there is not, level 0 among them, and
    where reason or origin are missing.
    """
    wanted = _wanted(level, reason, origin)
    heard = replace(now, n_signals=now.n_signals + 1, n_quiet=0)
    if wanted <= now.level:
        return heard
    triggered_ns = clock() if at_ns is None else at_ns
    return replace(heard, level=wanted, reason=reason, origin=origin, triggered_ns=triggered_ns)


def quiet(now: Emergency) -> Emergency:
    """``now`` after one step in which nothing was wrong."""
    return replace(now, n_quiet=now.n_quiet + 1) if now.level else now


def downgraded(now: Emergency, level: int, *, after: int) -> Emergency:
    """``now`` at a lower level, if the last ``after`` steps were quiet; else ``now`` as it is.

    Reason, origin and time stay, and the quiet steps are counted anew: each way down has to be earned. Level 0 is the
    same as ``cleared``. Raises WrongValue for a level that is not lower.
    """
    wanted = _known(level)
    if wanted >= now.level:
        raise WrongValue(
            f"emergency level {int(wanted)} is not below {int(now.level)}, the one in force; going down needs a lower "
            "level. Use raised to go up.",
            found=int(wanted),
            expected=f"below {int(now.level)}",
        )
    if now.n_quiet < after:
        return now
    return replace(now, level=wanted, n_quiet=0) if wanted else cleared()


def cleared() -> Emergency:
    """Nothing is wrong: no level, no reason, no origin, no time."""
    return Emergency()


def _known(level: int) -> Level:
    try:
        return Level(level)
    except ValueError:
        names = ", ".join(f"{known.value} ({known.name.lower()})" for known in Level)
        raise WrongValue(
            f"there is no emergency level {level}; expected one of {names}. Give one of these.",
            found=level,
            expected=[int(known) for known in Level],
        ) from None


def _wanted(level: int, reason: str, origin: str) -> Level:
    """The level of a signal, if it is one that can be sent."""
    wanted = _known(level)
    if wanted is Level.NONE:
        raise WrongValue(
            "emergency level 0 cannot be raised; expected 1 to 4. Use downgraded or cleared to go down.",
            found=0,
            expected=[1, 2, 3, 4],
        )
    for name, text in (("reason", reason), ("origin", origin)):
        if not text.strip():
            raise WrongValue(
                f"an emergency of level {int(wanted)} without {name}; say in a word or two what it is.",
                found=text,
                expected=name,
            )
    return wanted


PER_MINUTE: Final = 60
"""Signals that are passed on at once in any minute (growth.md 19)."""

_MINUTE_NS: Final = 60_000_000_000

_SEVERITY: Final[Mapping[Level, Severity]] = {
    Level.NOTICE: "info",
    Level.ELEVATED: "warning",
    Level.CONSERVATIVE: "error",
    Level.HALT: "critical",
}


@dataclass(frozen=True)
class Signal:
    """What somebody is told: one emergency, or ``count`` of the same origin and level in one.

    level: at least that which was asked for; one more where signals came too fast. reason: of the last of them.
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


Sink: TypeAlias = Callable[[Signal], None]
"""Whoever is told. To return is to acknowledge; whatever it raises, it is told again."""

_Key: TypeAlias = tuple[str, Level]
_Box: TypeAlias = dict[_Key, Signal]


@dataclass(frozen=True)
class Counts:
    """What became of signals.

    n_sent: in all. n_held: those that came too fast and had to wait. n_delivered: calls that a sink acknowledged.
    n_failed: calls that one did not. n_waiting: signals that the sink which lacks most has not heard yet.
    """

    n_sent: int = 0
    n_held: int = 0
    n_delivered: int = 0
    n_failed: int = 0
    n_waiting: int = 0


class Signals:
    """Passes signals on to all sinks in the very call that sends them, past every batch and queue.

    Not more than ``per_minute`` are passed on in any minute. Those beyond it wait, joined by origin and level and
    counted, and stand one level higher, for so many are a trouble of their own; but only what asks for a halt halts a
    run. What waits is passed on when a minute allows it, by the next ``send`` or ``flush``, highest level first.

    A sink that raises keeps what it was told in a box of its own, joined and counted in the same way, and is told again
    at the next call. It holds up no other, and no signal is ever dropped. What it missed comes at once when it is back,
    one call for each origin and level.

    Threads may share it. Sinks are called in the thread that sends, and should not take long.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        *,
        per_minute: int = PER_MINUTE,
        clock: Clock = time.monotonic_ns,
        emit: Emit = silent,
    ) -> None:
        """sinks: by the name under which ``emit`` is told that one does not listen."""
        self._sinks, self._per_minute, self._clock, self._emit = dict(sinks), per_minute, clock, emit
        self._lock = threading.RLock()
        self._held: _Box = {}
        self._boxes: dict[str, _Box] = {name: {} for name in sinks}
        self._passed_ns: deque[int] = deque()
        self._deaf: set[str] = set()
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """The counters as they stand."""
        with self._lock:
            n_held = sum(signal.count for signal in self._held.values())
            n_missed = [sum(signal.count for signal in box.values()) for box in self._boxes.values()]
            return replace(self._counts, n_waiting=n_held + max(n_missed, default=0))

    @property
    def waiting(self) -> dict[str, tuple[Signal, ...]]:
        """What each sink has not heard yet, highest level first."""
        with self._lock:
            found = {name: [*box.values(), *self._held.values()] for name, box in self._boxes.items()}
            return {name: tuple(sorted(signals, key=_urgency, reverse=True)) for name, signals in found.items()}

    def send(self, level: int, *, origin: str, reason: str, at_ns: int | None = None) -> Level:
        """Tell every sink; gives the level that the run is to be raised to, one higher where the signal has to wait."""
        wanted = _wanted(level, reason, origin)
        key = (origin, wanted)
        with self._lock:
            now_ns = self._clock()
            sent_ns = now_ns if at_ns is None else at_ns
            signal = _put(self._held, key, Signal(wanted, origin, reason, sent_ns, sent_ns))
            self._count(n_sent=1)
            self._pass_on(now_ns)
            if key in self._held:
                signal = self._held[key] = replace(signal, level=_escalated(wanted))
                self._count(n_held=1)
            self._tell()
            return signal.level

    def flush(self) -> int:
        """Pass on what the minute allows and tell deaf sinks again; gives how many signals still wait.

        To be called at every step: it costs nothing while nothing waits.
        """
        with self._lock:
            self._pass_on(self._clock())
            self._tell()
            return self.counts.n_waiting

    def drain(self) -> dict[str, tuple[Signal, ...]]:
        """At the end of a run, tell everything whatever the minute allows; gives what sinks still did not take."""
        with self._lock:
            while self._held:
                self._pass_highest(self._clock())
            self._tell()
            return self.waiting

    def _pass_on(self, now_ns: int) -> None:
        """Give what is held to the boxes of all sinks, as long as the minute before now has room."""
        while self._passed_ns and now_ns - self._passed_ns[0] >= _MINUTE_NS:
            self._passed_ns.popleft()
        while self._held and len(self._passed_ns) < self._per_minute:
            self._pass_highest(now_ns)

    def _pass_highest(self, now_ns: int) -> None:
        key = _most_urgent(self._held)
        signal = self._held.pop(key)
        self._passed_ns.append(now_ns)
        for box in self._boxes.values():
            _put(box, key, signal)

    def _tell(self) -> None:
        for name, sink in self._sinks.items():
            box = self._boxes[name]
            while box:
                key = _most_urgent(box)
                # Taken out before the call: a sink may itself send, and that is then a signal of its own.
                signal = box.pop(key)
                is_heard = False
                try:
                    is_heard = self._is_heard(name, sink, signal)
                finally:
                    if not is_heard:
                        _put(box, key, signal)
                if not is_heard:
                    break

    def _is_heard(self, name: str, sink: Sink, signal: Signal) -> bool:
        """Whether the sink acknowledged the signal. Of a row of failures the first is an event."""
        try:
            sink(signal)
        except Exception as error:  # noqa: BLE001 - a sink is foreign code, and must not end the run it is told about
            self._count(n_failed=1)
            if name not in self._deaf:
                self._deaf.add(name)
                payload = {"sink": name, "reason": f"{type(error).__name__}: {error}", "level": int(signal.level)}
                self._emit(Event("emergency.unheard", payload, "warning"))
            return False
        self._deaf.discard(name)
        self._count(n_delivered=1)
        return True

    def _count(self, **more: int) -> None:
        old = vars(self._counts)
        self._counts = replace(self._counts, **{name: old[name] + number for name, number in more.items()})


def _escalated(level: Level) -> Level:
    """One more, but no halt that nobody asked for."""
    return level if level >= Level.CONSERVATIVE else Level(level + 1)


def _put(box: _Box, key: _Key, signal: Signal) -> Signal:
    """Add a signal to those of its origin and level in the box."""
    there = box.get(key)
    if there is not None:
        later = max(there, signal, key=lambda one: one.last_ns)
        signal = Signal(
            level=max(there.level, signal.level),
            origin=signal.origin,
            reason=later.reason,
            first_ns=min(there.first_ns, signal.first_ns),
            last_ns=later.last_ns,
            count=there.count + signal.count,
        )
    box[key] = signal
    return signal


def _urgency(signal: Signal) -> tuple[Level, int]:
    """Higher levels first, and of equal ones the oldest."""
    return signal.level, -signal.first_ns


def _most_urgent(box: _Box) -> _Key:
    return max(box, key=lambda key: _urgency(box[key]))


FILE: Final = "emergency.state"
"""The shared level in a run directory."""

_MAGIC: Final = int.from_bytes(b"MEMG", "little")
_VERSION: Final = 1
_IS_CUT: Final = 1
"""Flag: origin or reason had more than 16 bytes, and ends in an ellipsis."""

_RECORD: Final = struct.Struct("<IHBBQQ16s16sI4x")
_SEQUENCE: Final = struct.Struct("<Q")
_SEQUENCE_AT: Final = slice(16, 24)
_CHECKED: Final = slice(0, 56)
_PATIENCE_S: Final = 1.0
"""How long a reader waits for a writer to come to an end: one that was put aside by the system needs some time."""


class SharedLevel:
    """The level of a run in a mapped file of 64 bytes, written by the run and read by any other process.

    Little-endian: u32 magic, u16 version, u8 level, u8 flags, u64 triggered_ns, u64 sequence, 16 bytes origin, 16 bytes
    reason, u32 CRC32 of all before it, 4 bytes zero. The sequence is odd while the writer is inside and even when it is
    done. A reader takes the record when the sequence was the same even number before and after, and the checksum is
    right, and looks again otherwise. So it sees whole records only, also where stores arrive out of order.

    Level, reason, origin and time are shared; the counters of an Emergency are the run's own. Times compare between
    processes of one machine.
    """

    def __init__(self, path: Path) -> None:
        """Map the file for writing, and make it if it is not there.

        One that is there is kept, for others may have it mapped. A new one appears whole, with its blocks on the disk:
        writing into a mapped file that lacks them would kill the process on a full disk.
        """
        self.path = path
        if not path.exists() or path.stat().st_size != _RECORD.size:
            write_atomic(path, _packed(Emergency(), sequence=0))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        (found,) = _SEQUENCE.unpack(self._map[_SEQUENCE_AT])
        # A writer that died inside left an odd number, and a damaged file may hold any.
        self._sequence = (found - found % 2) % 2**62

    def write(self, now: Emergency) -> None:
        """Show ``now`` to all readers."""
        done = self._sequence + 2
        record = _packed(now, sequence=done)
        self._map[_SEQUENCE_AT] = _SEQUENCE.pack(done - 1)
        self._map[: _SEQUENCE_AT.start] = record[: _SEQUENCE_AT.start]
        self._map[_SEQUENCE_AT.stop :] = record[_SEQUENCE_AT.stop :]
        self._map[_SEQUENCE_AT] = record[_SEQUENCE_AT]
        self._sequence = done

    def close(self) -> None:
        """Let the file go; what was written last stays in it."""
        self._map.close()


def read_shared(
    path: Path,
    *,
    patience_s: float = _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Emergency:
    """The level in the file at ``path``, with its counters at 0.

    Raises RunError where there is no such file, it is none of ours, or holds no whole record for ``patience_s``, as
    after a writer that was killed inside.
    """
    with contextlib.closing(_mapped(path)) as mapped:
        deadline = clock() + patience_s
        while True:
            before = mapped[_SEQUENCE_AT]
            record = mapped[:]
            if before == record[_SEQUENCE_AT] == mapped[_SEQUENCE_AT] and _is_whole(record):
                return _unpacked(record, path)
            if clock() >= deadline:
                raise RunError(
                    f"{path} holds no whole record, also after {patience_s:g} s: the sequence is "
                    f"{_SEQUENCE.unpack(before)[0]}, even when a writer is done, or the checksum does not fit. The run "
                    "that wrote it has died, or the file was damaged. Resume the run: it writes the record anew.",
                    path=str(path),
                )
            sleep(0.0001)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), _RECORD.size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise RunError(
            f"there is no {path}. Expected the file that a run writes when it starts; give the directory of a run.",
            path=str(path),
        ) from None
    except ValueError:
        raise RunError(
            f"{path} has {path.stat().st_size} bytes; an emergency record has {_RECORD.size}. Remove the file: the run "
            "makes a new one when it is resumed.",
            path=str(path),
        ) from None


def _packed(now: Emergency, *, sequence: int) -> bytes:
    origin, reason = _short(now.origin), _short(now.reason)
    flags = _IS_CUT if (origin, reason) != (_utf8(now.origin), _utf8(now.reason)) else 0
    fields = (_MAGIC, _VERSION, now.level, flags, now.triggered_ns or 0, sequence, origin, reason)
    crc = zlib.crc32(_RECORD.pack(*fields, 0)[_CHECKED])
    return _RECORD.pack(*fields, crc)


def _short(text: str) -> bytes:
    """At most 16 bytes of UTF-8; an ellipsis stands for what was cut off."""
    whole, mark = _utf8(text), _utf8("…")
    if len(whole) <= 16:
        return whole
    return whole[: 16 - len(mark)].decode(errors="ignore").encode() + mark


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _is_whole(record: bytes) -> bool:
    *_, sequence, _, _, crc = _RECORD.unpack(record)
    return sequence % 2 == 0 and zlib.crc32(record[_CHECKED]) == crc


def _unpacked(record: bytes, path: Path) -> Emergency:
    magic, version, level, _, triggered_ns, _, origin, reason, _ = _RECORD.unpack(record)
    if (magic, version) != (_MAGIC, _VERSION):
        raise RunError(
            f"{path} begins with {magic:#010x} and version {version}; expected {_MAGIC:#010x} and version {_VERSION}. "
            "It was written by another program or a newer meristem; use the one that wrote it.",
            path=str(path),
        )
    if not level:
        return Emergency()
    return Emergency(_known(level), _text(reason), _text(origin), triggered_ns)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()
