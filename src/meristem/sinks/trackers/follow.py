"""What all trackers have in common: each step stands in them once, with the value of the branch that survived.

A run can return to an earlier step, by a resume or by a rollback, and makes the steps after it again. Trackers take
what they get as final, and most cannot take it back. So the files of records stay the truth: a tracker gets the metrics
of a step once a checkpoint covers it, or at the end, and where the run returns to a step before what it has, it begins
anew and gets the whole history again.
"""

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from meristem.sinks.records import RETURNS, history, surviving

Record = Mapping[str, Any]

MOST_WAITING: Final = 10_000
"""Records that wait in memory; beyond that they are read from the files again when the tracker can be reached."""

FIRST_REST_S: Final = 5.0
LONGEST_REST_S: Final = 300.0
"""How long a tracker that failed is left alone: doubled at each failure, from the first to the second."""


@dataclass(frozen=True)
class Followed:
    """The run that a tracker follows.

    project: under which its runs stand together. place: where the tracker is, if the user named a place.
    settings: those of the run, by dotted key.
    """

    directory: Path
    id: str
    name: str
    project: str
    place: str | None
    settings: Mapping[str, object]


class Tracker(Protocol):
    """One run in one tracker. Its calls come from one thread, and may raise whatever its library raises.

    id: of the run there, empty before it is known. holds_back: a step is written only when a checkpoint covers it,
    because the tracker cannot take one back while somebody looks on.

    It may have ``begun_seq``: after ``open``, the ``seq`` up to which an earlier process had begun to write, where that
    can be more than what ``open`` gave. What lies between is written once more, so it must be the same to the tracker.
    """

    id: str
    holds_back: bool

    def open(self) -> int:
        """Begin its run, or go on with the one that is there: the ``seq`` of the last record in it, or 0."""

    def write(self, records: Sequence[Record]) -> None:
        """Take metrics records, in order of step."""

    def restart(self) -> None:
        """Forget all that was written."""

    def close(self, status: str | None) -> None:
        """End its run: ``finished``, ``interrupted``, ``failed``, or None where nobody said how."""


class Follower:
    """A sink that feeds one tracker. While the tracker cannot be reached nothing is lost: it gets it later.

    clock: monotonic seconds.
    """

    close_s: Final = 30.0
    """How long the end of a run waits for it."""

    def __init__(self, run_dir: Path, tracker: Tracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._tracker, self._clock = run_dir, tracker, clock
        self._waiting: list[Record] = []
        self._is_open = self._must_restart = self._must_reread = False
        self._seen_seq = self._seen_step = 0
        self._covered_step = self._written_step = -1
        self._written_seq = 0
        self._at_written_step: set[object] = set()
        self._begun_at: dict[tuple[int, str, str | None], str] = {}
        self._status: str | None = None
        self._rest_s, self._rest_until_s = 0.0, -math.inf

    @property
    def id(self) -> str:
        return self._tracker.id

    def __call__(self, record: Record) -> None:
        """Take a record of any kind. Raises what the tracker raises, and leaves it alone for a while then."""
        if record["seq"] > self._seen_seq:
            self._take(record)
        if self._clock() >= self._rest_until_s:
            self._pass_on()

    def close(self) -> None:
        """Pass on all that waits, and end the tracker's run."""
        self._covered_step = self._seen_step
        self._pass_on()
        self._tracker.close(self._status)

    def _take(self, record: Record) -> None:
        self._seen_seq, self._seen_step = int(record["seq"]), int(record["step"])
        name = record.get("name")
        if "metrics" in record:
            self._waiting.append(record)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.clear()
                self._must_reread = True
        elif name == "checkpoint.saved":
            # Written beside the training: the step that it covers lies before that of its record. One that a resume
            # would pass over covers nothing.
            if record["payload"]["is_sound"]:
                self._covered_step = max(self._covered_step, int(record["payload"]["step"]))
        elif name == "run.ended":
            self._status = str(record["payload"]["status"])
        elif name in RETURNS:
            step = int(record["payload"]["resumed_from"])
            self._waiting = [record for record in self._waiting if record["step"] <= step]
            self._begun_at = {same: at for same, at in self._begun_at.items() if same[0] <= step}
            self._covered_step = min(self._covered_step, step)
            self._must_restart |= self._written_step > step

    def _pass_on(self) -> None:
        try:
            if not self._is_open:
                self._open()
            if self._must_restart:
                self._tracker.restart()
                self._written(())
            self._write()
        except BaseException:
            self._rest_s = min(2 * self._rest_s or FIRST_REST_S, LONGEST_REST_S)
            self._rest_until_s = self._clock() + self._rest_s
            raise
        self._rest_s = 0.0

    def _open(self) -> None:
        """Open the tracker, and see whether what it holds from an earlier process has survived."""
        seq = self._tracker.open()
        self._is_open = self._must_reread = True
        begun = max(seq, getattr(self._tracker, "begun_seq", 0))
        if begun:
            # Not of the history, where a step that was measured again since has the ``seq`` of the later record.
            records = surviving(self._run_dir)
            self._written([record for record in records if record["seq"] <= seq])
            # What was begun may not survive either: at its end a run writes also what no checkpoint covers.
            ends = {seq, begun} - {0}
            self._must_restart |= not ends <= {record["seq"] for record in records}

    def _write(self) -> None:
        if self._must_reread:
            # The files hold each record before a sink is shown it; what came after is taken when its turn comes.
            found = [record for record in history(self._run_dir) if record["seq"] <= self._seen_seq]
            self._waiting = [record for record in found if record["seq"] > self._written_seq]
            written = [record for record in surviving(self._run_dir) if record["seq"] > self._written_seq]
            self._begun_at = {_same(record): record["ts"] for record in reversed(written)}
            self._must_reread = False
        ready = [record for record in self._waiting if self._is_ready(record)]
        # A resume may measure a step again that was measured before it, and was perhaps written: to a tracker it is the
        # same value if it has the same time.
        new = {
            _same(record): {**record, "ts": self._begun_at.get(_same(record), record["ts"])}
            for record in ready
            if _same(record) not in self._at_written_step
        }
        if new:
            self._tracker.write(list(new.values()))
        if ready:
            self._waiting = [record for record in self._waiting if not self._is_ready(record)]
            self._written(ready)

    def _is_ready(self, record: Record) -> bool:
        return not self._tracker.holds_back or bool(record["step"] <= self._covered_step)

    def _written(self, records: Sequence[Record]) -> None:
        """Remember how far the tracker is; nothing: at its beginning."""
        if not records:
            self._written_seq, self._written_step, self._at_written_step = 0, -1, set()
            self._must_restart, self._must_reread = False, True
            return
        self._written_seq = max(int(record["seq"]) for record in records)
        step = max(int(record["step"]) for record in records)
        if step != self._written_step:
            self._written_step, self._at_written_step = step, set()
        self._at_written_step |= {_same(record) for record in records if record["step"] == step}


def _same(record: Record) -> tuple[int, str, str | None]:
    return record["step"], record["split"], record["task"]


def scalars(record: Record) -> dict[str, float]:
    """The values of a metrics record as ``split/name`` or ``split/task/name``, NaN and infinities as such."""
    head = "/".join(part for part in (record["split"], record["task"]) if part)
    values = record["metrics"] | {name: float(text) for name, text in record.get("nonfinite", {}).items()}
    return {f"{head}/{name}": float(value) for name, value in values.items() if value is not None}


def seconds(record: Record) -> float:
    """When a record was written, in seconds since 1970."""
    return datetime.datetime.fromisoformat(record["ts"]).timestamp()
