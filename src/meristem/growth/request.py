"""What somebody outside of a run asks of its growth: files in its directory, read at boundaries (growth.md 15).

A request is pending until a seed was put in at the boundary that first saw it, or later. That step is written into the
file, so that a run which is resumed from before sees it there again, and goes the same way to the bit.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import orjson

from meristem.checkpoint.atomic import write_atomic
from meristem.errors import WrongValue
from meristem.events import Emit, Event, silent
from meristem.growth.garden import Garden
from meristem.growth.observe import Record

FOLDER: Final = "growth_requests"
"""In a run directory; one file for each request, under its own number."""


@dataclass(frozen=True)
class Request(Record):
    """A seed is wanted. number: no other request has it. seen: the step of the boundary that saw it first."""

    number: str
    issued_at: str
    why: str = ""
    seen: int | None = None


def request(run_dir: Path, *, why: str = "") -> Request:
    """Ask the run in a directory for a seed; what was asked. Raises RunError where it cannot be written."""
    made = Request(f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}", datetime.now(UTC).isoformat(), why)
    _write(run_dir, made)
    return made


def pending(run_dir: Path, garden: Garden, step: int, *, emit: Emit = silent) -> Sequence[Request]:
    """Requests that no seed has answered, as of a boundary at ``step``. A file that is no request is reported as
    ``request.corrupt`` and left alone."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            each = Request.from_json(orjson.loads(path.read_bytes()))
        except (OSError, ValueError, WrongValue) as cause:
            emit(Event("request.corrupt", {"path": str(path), "step": step, "why": str(cause)}, "warning"))
            continue
        if each.seen is None:
            each = replace(each, seen=step)
            _write(run_dir, each)
            emit(Event("growth.requested", {"number": each.number, "step": step, "reason": each.why}))
        if each.seen is not None and each.seen <= step and all(life.born < each.seen for life in garden.lives):
            found.append(each)
    return found


def _write(run_dir: Path, made: Request) -> None:
    (run_dir / FOLDER).mkdir(exist_ok=True)
    write_atomic(run_dir / FOLDER / f"{made.number}.json", orjson.dumps(made.to_json()))
