"""What came of each decision, appended to a file from which a library gathers it (growth.md 18).

append_report("reports.log", Report("r1", "run", "blocks.1#3", "small", "blocks.1", "success", time(), 400))

A record is its length and its CRC-32, four bytes each, little-endian, and JSON. What was cut off or altered is skipped
and counted, and all else is read.
"""

import dataclasses
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from meristem.checkpoint.atomic import disk_full, write_all
from meristem.errors import ReportInvalid, RunError
from meristem.events import Emit, Event, silent

Outcome = Literal["success", "neutral", "regression", "aborted"]

FRAME: Final = struct.Struct("<II")
LONGEST: Final = 1 << 20
"""No report is longer, in bytes: a length above it is no length."""
VERSION: Final = 1


@dataclass(frozen=True)
class Report:
    """What one change of the structure gave, over the span of steps in which it was watched.

    report_id: no other report has it. seed, blueprint, slot: what was changed and where. issued_at: seconds since 1970.
    metrics: what was measured, None where something could not be. flops_spent: on probes, second passes, ablations.
    """

    report_id: str
    run_id: str
    seed: str
    blueprint: str
    slot: str
    outcome: Outcome
    issued_at: float
    span_steps: int
    flops_spent: float | None = None
    policy: str = ""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        missing = [name for name in ("report_id", "run_id", "seed", "blueprint", "slot") if not getattr(self, name)]
        is_timed = isinstance(self.issued_at, int | float) and math.isfinite(self.issued_at) and self.issued_at > 0
        if missing or not is_timed or self.outcome not in get_args(Outcome):
            wrong = ", ".join([*missing, *([] if is_timed else ["issued_at"])]) or f"the outcome '{self.outcome}'"
            raise ReportInvalid(
                f"a report lacks a valid value of {wrong}; expected ids, a time in seconds since 1970, and one of "
                f"{', '.join(get_args(Outcome))}. Give what was measured."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        return {"version": VERSION, **vars(self), "metrics": dict(self.metrics)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave. Raises ReportInvalid for another version, and missing or unknown fields."""
        given = {name: value for name, value in saved.items() if name != "version"}
        wrong = sorted({each.name for each in dataclasses.fields(cls)} ^ given.keys())
        if saved.get("version") != VERSION or wrong:
            raise ReportInvalid(
                f"a report of version {saved.get('version')} was found, with wrong or missing fields: "
                f"{', '.join(wrong) or 'none'}; expected version {VERSION}. Leave it out, or use the meristem that "
                f"wrote it."
            )
        return cls(**given)


def append_report(path: str | Path, report: Report) -> None:
    """Put a report to the end of a log and wait for the disk.

    Raises ReportInvalid for what JSON cannot hold, DiskFull and RunError where it cannot be written.
    """
    try:
        body = json.dumps(report.to_json(), allow_nan=False).encode()
    except (TypeError, ValueError) as cause:
        raise ReportInvalid(
            f"report '{report.report_id}' cannot be written: {cause}. Give plain, finite values."
        ) from cause
    if len(body) > LONGEST:
        raise ReportInvalid(
            f"report '{report.report_id}' has {len(body)} bytes; expected at most {LONGEST}. Shorten it."
        )
    try:
        with disk_full(Path(path)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                write_all(descriptor, FRAME.pack(len(body), zlib.crc32(body)) + body)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as cause:
        raise RunError(f"{path} cannot be written: {cause.strerror}. Choose another path.", path=str(path)) from cause


def read_reports(path: str | Path, *, emit: Emit = silent) -> tuple[list[Report], int]:
    """The reports of a log in order, and how many places were skipped, each as the event ``report.corrupt``.

    After a record that is broken the next one is looked for byte by byte: its length has to be possible and its
    checksum right. Raises RunError where there is no such file.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as cause:
        raise RunError(f"the log {path} cannot be read: {cause.strerror}. Name another.", path=str(path)) from cause
    found: list[Report] = []
    at, broken_at, n_skipped = 0, -1, 0
    while at < len(content):
        body = _body(content, at)
        report = None if body is None else _report(body)
        is_first = report is None and broken_at < 0
        if is_first:
            broken_at, n_skipped = at, n_skipped + 1
            emit(Event("report.corrupt", {"path": str(path), "offset": at}, "warning"))
        if report is not None:
            found.append(report)
            broken_at = -1
        at += 1 if body is None else FRAME.size + len(body)
    return found, n_skipped


def _body(content: bytes, at: int) -> bytes | None:
    """The record that begins there, or None."""
    if at + FRAME.size > len(content):
        return None
    n_bytes, crc = FRAME.unpack_from(content, at)
    body = content[at + FRAME.size : at + FRAME.size + n_bytes]
    is_whole = 0 < n_bytes <= LONGEST and len(body) == n_bytes and zlib.crc32(body) == crc
    return body if is_whole else None


def _report(body: bytes) -> Report | None:
    try:
        return Report.from_json(json.loads(body))
    except (ValueError, TypeError, AttributeError, ReportInvalid):
        return None
