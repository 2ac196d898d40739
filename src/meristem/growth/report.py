"""How seeds ended, as records in a log that survives what a crash or a disk does to it (growth.md 18).

A record is its length as u32 little-endian, the CRC32 of its JSON as u32, and the JSON, as in the journal of a run. Who
reads goes on behind a damaged record at the next whole one; a record without a time is no record.
"""

import datetime
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias

import orjson

from meristem.errors import ReportInvalid
from meristem.events import Emit, Event, silent
from meristem.growth.stage import Life, Stage

FILE: Final = "growth.log"
"""The log of a run, in its directory."""

LARGEST_BYTES: Final = 1 << 20
TOLERANCE_NATS: Final = 0.02
"""By how much evaluations together may lie above what was expected before that is a regression."""

_HEAD: Final = struct.Struct("<II")

Outcome: TypeAlias = Literal["success", "neutral", "regression", "aborted"]


@dataclass(frozen=True)
class GrowthReport:
    """How one seed ended. born, ended: steps. metrics: what was measured of it; None was not measured.

    flops_spent: on comparing and recovering for it. issued_at: in UTC, ISO 8601; it is put in where
    the report is written, and a report without it is refused.
    """

    seed: str
    slot: str
    blueprint: str
    run_id: str
    outcome: Outcome
    born: int
    ended: int
    flops_spent: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    issued_at: str = ""

    @property
    def report_id(self) -> str:
        """The same for a report that is written again after a rollback."""
        return f"{self.run_id}/{self.seed}@{self.ended}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        return vars(self) | {"version": 1, "report_id": self.report_id}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave. Raises ReportInvalid for one without a time."""
        fields = {name: value for name, value in saved.items() if name not in ("version", "report_id")}
        found = cls(**fields)
        found.require_time()
        return found

    def require_time(self) -> None:
        """Raise ReportInvalid unless it says when it was issued."""
        if not self.issued_at:
            raise ReportInvalid(
                f"a report of the seed '{self.seed}' has no issued_at. Every report says when it was issued, in UTC.",
                seed=self.seed,
            )

    def issued(self, now: datetime.datetime) -> Self:
        """The report with its time."""
        return replace(self, issued_at=now.astimezone(datetime.UTC).isoformat(timespec="milliseconds"))


def outcome_of(life: Life, differences: Sequence[float]) -> Outcome:
    """What a seed came to. differences: evaluations since its graft less what the run would have come to, in nats.

    A seed that was culled on trial, before the model used it, changed nothing: neutral.
    """
    if life.stage is not Stage.FOSSILIZED and not any(each.after is Stage.BLENDING for each in life.history):
        return "neutral"
    total = sum(differences)
    if life.stage is Stage.FOSSILIZED and total < 0:
        return "success"
    return "regression" if total > TOLERANCE_NATS else "neutral"


def append(path: Path, report: GrowthReport) -> None:
    """Write one report to the end of a log, on the disk when this returns. Raises ReportInvalid without a time."""
    report.require_time()
    body = orjson.dumps(report.to_json())
    with path.open("ab") as file:
        file.write(_HEAD.pack(len(body), zlib.crc32(body)) + body)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, emit: Emit = silent) -> list[GrowthReport]:
    """The reports of a log, of equal ones only the last; none where there is no log.

    What is damaged or torn is passed over as the event ``report.corrupt`` with its offset; so is a record that is whole
    and no report.
    """
    text = path.read_bytes() if path.exists() else b""
    found: dict[str, GrowthReport] = {}
    at = 0
    while at < len(text):
        body = _body(text, at)
        if body is None:
            start, at = at, _next(text, at + 1)
            emit(Event("report.corrupt", {"offset": start, "n_bytes": at - start}, "warning"))
            continue
        try:
            report = GrowthReport.from_json(orjson.loads(body))
            found.pop(report.report_id, None)
            found[report.report_id] = report
        except (ReportInvalid, TypeError, ValueError) as cause:
            emit(Event("report.corrupt", {"offset": at, "n_bytes": len(body), "why": str(cause)}, "warning"))
        at += _HEAD.size + len(body)
    return list(found.values())


def _body(text: bytes, at: int) -> bytes | None:
    """The record that begins here, if one does."""
    if at + _HEAD.size > len(text):
        return None
    length, checksum = _HEAD.unpack_from(text, at)
    body = text[at + _HEAD.size : at + _HEAD.size + length]
    is_whole = 0 < length <= LARGEST_BYTES and len(body) == length and zlib.crc32(body) == checksum
    return body if is_whole else None


def _next(text: bytes, at: int) -> int:
    """Where the next whole record begins, or the end."""
    while at < len(text) and _body(text, at) is None:
        at += 1
    return at
