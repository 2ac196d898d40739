"""A run that is watched: what its files say that was not read before, of the branch that survived."""

import datetime
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from meristem.checkpoint import run as runs
from meristem.errors import BadRecords, MeristemError, WrongValue
from meristem.sinks.cursor import Cursor, Portion, read_portion
from meristem.sinks.records import Return, is_abandoned, return_of

STREAMS: Final = ("metrics", "events", "samples")
MOST_BYTES: Final = 2 << 20
"""What is read of a file for one answer, so that a long run does not hold up the others."""

Record = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """How far somebody has read a run: its id, and a cursor for each of ``STREAMS``."""

    id: str = ""
    cursors: tuple[Cursor, ...] = (Cursor(),) * len(STREAMS)

    @classmethod
    def of(cls, text: str) -> Self:
        """What ``str`` gave; nothing is the beginning. Raises WrongValue for a text that no place has."""
        if not text:
            return cls()
        run_id, *parts = text.rsplit("/", len(STREAMS))
        try:
            numbers = [tuple(map(_count, part.split("."))) for part in parts]
            cursors = tuple(Cursor(file, offset) for file, offset in numbers)
            if len(cursors) != len(STREAMS):
                raise ValueError
        except ValueError:
            expected = "/".join(["RUN", *["FILE.OFFSET"] * len(STREAMS)])
            raise WrongValue(
                f"'{text[:100]}' is no place in a run; expected {expected}, as an earlier answer has it under 'after', "
                f"or nothing for its beginning.",
                key="after",
            ) from None
        return cls(run_id, cursors)

    def __str__(self) -> str:
        return "/".join([self.id, *(f"{cursor.file}.{cursor.offset}" for cursor in self.cursors)])


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(text)
    return int(text)


@dataclass
class _Known:
    """The returns of a run to earlier steps, as far as its events were read."""

    id: str
    events: Cursor = Cursor()
    returns: list[Return] = field(default_factory=list)


class WatchedRun:
    """One run directory. Threads may share it; it keeps no records but the returns to earlier steps."""

    def __init__(self, directory: Path) -> None:
        """Raises RunError for a directory that holds no run."""
        self.directory = runs.run_of(directory)
        runs.read(self.directory)
        self._known = _Known("")
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Of the directory; of a link, as ``latest``, that to which it leads."""
        return os.path.basename(os.path.realpath(self.directory))

    def news(self, place: Place, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
        """What stands in the files behind ``place``.

        after: the place behind it. is_end: there was no more. is_new: the directory holds another run than that of
        ``place``, or its files were written anew; what was read before is void, and this begins at the beginning.
        returns: every ``[seq, step]`` of the run: a record of a later step with a smaller seq was abandoned.
        Those of which that is known now are left out. problem: a sentence where something cannot be read;
        what else could be is there.
        """
        name = self.name
        answer: dict[str, Any] = {"name": name, "path": str(self.directory), "after": str(place), "is_end": True}
        answer |= {"is_new": False, "problem": None}
        try:
            return answer | self._read(place, most_bytes)
        except MeristemError as error:
            is_gone = not os.path.lexists(self.directory / runs.FILE)
            gone = f"{self.directory} is gone: it was deleted or moved. Shown is what was read before."
            return answer | {"problem": gone if is_gone else str(error)}
        except OSError as error:
            return answer | {"problem": f"{self.directory} cannot be read: {error.strerror or error}."}

    def _read(self, place: Place, most_bytes: int) -> dict[str, Any]:
        manifest = runs.read(self.directory)
        run_id = manifest["id"] or ""
        is_new = place.id != run_id
        portions = None if is_new else self._portions(place, most_bytes)
        if portions is None:
            is_new, place = True, Place(run_id)
            portions = self._portions(place, most_bytes)
        if portions is None:
            raise BadRecords(f"the records of {self.directory} change while they are read. It is tried again.")
        # The returns are read last, so that each that is older than a record of the portions is known.
        returns = self._returns(run_id)
        found = {
            stream: _wellformed(portion, SHOWN[stream], returns)
            for stream, portion in zip(STREAMS, portions, strict=True)
        }
        n_unreadable = sum(portion.n_unreadable for portion in portions) + sum(n for _, n in found.values())
        problem = f"{n_unreadable} lines of {self.directory} hold no record and were passed over."
        return {
            **{name: manifest[name] for name in ("id", "status", "started", "ended", "exit")},
            "after": str(replace(place, cursors=tuple(portion.after for portion in portions))),
            "is_end": all(portion.is_end for portion in portions),
            "is_new": is_new,
            "returns": returns,
            **{stream: records for stream, (records, _) in found.items()},
            "problem": problem if n_unreadable else None,
        }

    def _portions(self, place: Place, most_bytes: int) -> list[Portion] | None:
        """The next of each stream; None where one of them was written anew."""
        found = [
            read_portion(self.directory / f"{stream}.ndjson", cursor, most_bytes)
            for stream, cursor in zip(STREAMS, place.cursors, strict=True)
        ]
        whole = [portion for portion in found if portion is not None]
        return whole if len(whole) == len(found) else None

    def _returns(self, run_id: str) -> list[Return]:
        """All there are now."""
        with self._lock:
            if self._known.id != run_id:
                self._known = _Known(run_id)
            is_end = False
            while not is_end:
                portion = read_portion(self.directory / "events.ndjson", self._known.events, MOST_BYTES)
                if portion is None:
                    self._known, is_end = _Known(run_id), False
                    continue
                found = [_tried(return_of, record) for record in portion.records]
                self._known.returns += [each for each in found if each is not None]
                self._known.events, is_end = portion.after, portion.is_end
            return [*self._known.returns]


def _wellformed(
    portion: Portion, shown: Callable[[Record], dict[str, Any]], returns: list[Return]
) -> tuple[list[dict[str, Any]], int]:
    """What is shown of the records that were not abandoned, and how many are none of a run."""
    found, n_strange = [], 0
    for record in portion.records:
        made = _tried(shown, record)
        if made is None:
            n_strange += 1
        elif not is_abandoned(made, returns):
            found.append(made)
    return found, n_strange


def _tried(read: Callable[[Record], T | None], record: Record) -> T | None:
    """What ``read`` makes of a record; None of one that is none of a run."""
    try:
        return read(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _of_all(record: Record) -> dict[str, Any]:
    seconds = datetime.datetime.fromisoformat(record["ts"]).timestamp()
    return {"seq": int(record["seq"]), "step": int(record["step"]), "seconds": seconds}


def _of_metrics(record: Record) -> dict[str, Any]:
    values = {str(name): None if value is None else float(value) for name, value in record["metrics"].items()}
    own = {"tokens": int(record["tokens"]), "split": str(record["split"]), "task": record["task"]}
    return _of_all(record) | own | {"metrics": values}


def _of_event(record: Record) -> dict[str, Any]:
    own = {"name": str(record["name"]), "severity": str(record["severity"]), "payload": dict(record["payload"])}
    return _of_all(record) | own


def _of_sample(record: Record) -> dict[str, Any]:
    return _of_all(record) | {"prompt": str(record["prompt"]), "text": str(record["text"])}


SHOWN: Final[Mapping[str, Callable[[Record], dict[str, Any]]]] = {
    "metrics": _of_metrics,
    "events": _of_event,
    "samples": _of_sample,
}
"""What goes out of a record of each stream."""
