"""The records of a run: metrics, events, samples and measurements of the machine, as JSON lines (spec 17).

``seq`` rises over all four files and goes on after a resume. An event of ``RETURNS`` says that the run stands at an
earlier step again: its payload holds ``resumed_from``, and records of later steps with a smaller ``seq`` were
abandoned. So one process may write the same step twice.
"""

import datetime
import importlib.resources
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import orjson

from meristem.config.text import LARGEST_EXACT
from meristem.errors import BadRecords
from meristem.events import Emit, Event, silent
from meristem.sinks.jsonl import JsonLines, read_records

STREAMS = ("metrics", "events", "samples", "system")
ROTATE_SIZE_BYTES = 256 * 1024 * 1024
RETURNS = ("run.resumed", "rollback.done")
LARGEST_PAYLOAD_ITEMS = 1_000
LARGEST_PAYLOAD_BYTES = 65_536

Split = Literal["train", "val", "test", "gen"]
Listener = Callable[[Mapping[str, Any]], None]
Return = tuple[int, int]
"""The ``seq`` of an event of ``RETURNS``, and the step at which the run stands again."""


class Records:
    """Writes the records of one run. Threads may share it.

    rank: stands in every record where it is given, as in a run of several processes.
    redact: what every text of a record goes through, whoever wrote it; by default it stays as it is.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        seq: int = 0,
        *,
        rotate_size_bytes: int = ROTATE_SIZE_BYTES,
        rank: int | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.run_id = run_id
        self.step = 0
        self._rank = {} if rank is None else {"rank": rank}
        self._redact = redact
        self._listener: Listener | None = None
        self._lock = threading.RLock()
        self._lines = {name: JsonLines(run_dir / f"{name}.ndjson", rotate_size_bytes) for name in STREAMS}
        self.seq = max([seq, *(lines.last["seq"] for lines in self._lines.values() if lines.last)])
        for name, lines in self._lines.items():
            if lines.n_cut_bytes:
                payload = {"what": "torn end cut off", "path": f"{name}.ndjson", "n_bytes": lines.n_cut_bytes}
                self.event(Event("degraded", payload, "warning"), step=0)

    def listen(self, listener: Listener) -> None:
        """Show every record to ``listener`` from now on, in order. The run waits for it, so it has to be quick."""
        self._listener = listener

    def metrics(
        self,
        step: int,
        tokens: int,
        epoch: float,
        split: Split,
        metrics: Mapping[str, float | None],
        task: str | None = None,
        tags: Mapping[str, object] | None = None,
    ) -> None:
        """All scalars of one step and split."""
        fields = {
            "tokens": tokens,
            "epoch": epoch,
            "split": split,
            "task": task,
            "metrics": metrics,
            "tags": tags or {},
        }
        self._write("metrics", "metrics", step, fields, odd_below="metrics")

    def event(self, event: Event, step: int | None = None) -> None:
        """One thing that happened. A payload beyond the limits is cut and says so.

        A critical event is on the disk when this returns.
        step: by default the step of the last record, and for a return the one returned to.
        """
        if step is None:
            step = _returned_to(event.name, event.payload)
        fields = {"name": event.name, "severity": event.severity, "payload": _limited(event.payload)}
        self._write("events", "event", step, fields, odd_below="payload")

    def sample(self, step: int, prompt: str, text: str, settings: Mapping[str, object]) -> None:
        """One text that the model wrote."""
        self._write("samples", "sample", step, {"prompt": prompt, "text": text, "settings": settings}, "settings")

    def system(self, fields: Mapping[str, object]) -> None:
        """One measurement of the machine, at the last step of any record."""
        self._write("system", "system", None, fields)

    def close(self) -> None:
        """Wait until the disk holds every record."""
        for lines in self._lines.values():
            lines.close()

    def _write(
        self, stream: str, kind: str, step: int | None, fields: Mapping[str, object], odd_below: str = ""
    ) -> None:
        odd: dict[str, str] = {}
        plain = _plain(fields, "", odd, self._redact)
        if odd:
            plain["nonfinite"] = {path.removeprefix(f"{odd_below}."): value for path, value in odd.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        is_critical = fields.get("severity") == "critical"
        with self._lock:
            self.seq += 1
            self.step = self.step if step is None else step
            envelope = {
                "schema": f"meristem.{kind}/1",
                "run": self.run_id,
                "seq": self.seq,
                "ts": now,
                "step": self.step,
            }
            record = envelope | self._rank | plain
            if is_critical:  # emitted before the disk is waited for, and also where it has no room
                self._show(record)
            self._lines[stream].append(record)
            if is_critical:
                self._lines[stream].sync()
            else:
                self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener(record)


def _returned_to(name: str, payload: Mapping[str, object]) -> int | None:
    """The step at which an event says that the run stands again; None for an event that is no return."""
    step = payload.get("resumed_from") if name in RETURNS else None
    return step if isinstance(step, int) else None


def _plain(value: object, path: str, odd: dict[str, str], redact: Callable[[str], str] = str) -> Any:
    """``value`` as JSON can hold it. What is not finite becomes null, and ``odd`` gets its path and what it was."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{path}.{key}".lstrip("."), odd, redact) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner, f"{path}.{index}", odd, redact) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        odd[path] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= LARGEST_EXACT else str(value)
    if isinstance(value, str):
        return redact(value.encode("utf-8", "replace").decode())
    item = getattr(value, "item", None)
    # A number of numpy or torch; anything else is recorded by its text, since a record may not stop what it records.
    return _plain(item(), path, odd, redact) if item and getattr(value, "ndim", 1) == 0 else redact(str(value))


def _limited(payload: Mapping[str, object]) -> dict[str, object]:
    """The payload within its limits: entries that go beyond are left out and named under ``truncated``."""
    kept: dict[str, object] = {}
    left_out: list[str] = []
    n_items, size_bytes = 0, 0
    for key, value in payload.items():
        n_more, more_bytes = _count(value), len(orjson.dumps(_plain({key: value}, "", {})))
        if n_items + n_more <= LARGEST_PAYLOAD_ITEMS and size_bytes + more_bytes <= LARGEST_PAYLOAD_BYTES:
            kept[key] = value
            n_items, size_bytes = n_items + n_more, size_bytes + more_bytes
        else:
            left_out.append(str(key)[:100])
    return kept | ({"truncated": left_out[:10], "n_truncated": len(left_out)} if left_out else {})


def _count(value: object) -> int:
    """How many single values are inside."""
    if isinstance(value, Mapping):
        return sum(_count(inner) for inner in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(_count(inner) for inner in value)
    return 1


def history(run_dir: Path, stream: str = "metrics", emit: Emit = silent) -> list[dict[str, Any]]:
    """What a run really did: its records without those of abandoned steps, and of equal ones only the last.

    Two metrics records are equal when step, split and task are; of each metric the last value counts. How many values
    were replaced is the event ``records.replaced``.
    """
    found: dict[object, dict[str, Any]] = {}
    n_replaced = 0
    try:
        for record in _surviving(run_dir, stream, emit):
            same = (record["step"], record["split"], record["task"]) if stream == "metrics" else record["seq"]
            if stream == "metrics" and same in found:
                n_replaced += len(found[same]["metrics"].keys() & record["metrics"].keys())
                record = _joined(found[same], record)
            found[same] = record
        if n_replaced:
            emit(Event("records.replaced", {"n": n_replaced, "path": f"{stream}.ndjson"}))
        return sorted(found.values(), key=lambda record: int(record["seq"]))
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise _no_records(run_dir, cause) from cause


def surviving(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics records of a run without those of abandoned steps, each as it was written and in that order.

    Where ``history`` holds one record of a step that a resume measured again, with the later ``seq``, this holds both.
    Raises BadRecords where a file holds what is no record.
    """
    try:
        return list(_surviving(run_dir, "metrics", silent))
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise _no_records(run_dir, cause) from cause


def _surviving(run_dir: Path, stream: str, emit: Emit) -> Iterator[dict[str, Any]]:
    events = read_records(run_dir / "events.ndjson", emit)
    returns = [each for event in events if (each := return_of(event)) is not None]
    for record in read_records(run_dir / f"{stream}.ndjson", emit):
        if not is_abandoned(record, returns):
            yield record


def _no_records(run_dir: Path, cause: Exception) -> BadRecords:
    return BadRecords(
        f"{run_dir} holds a record that is none of a run: {cause!r}. Remove its line to read the rest.",
        path=str(run_dir),
    )


def _joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The later of two equal metrics records, with the metrics that only the earlier one has."""
    alone = earlier["metrics"].keys() - later["metrics"].keys()
    odd = {path: value for path, value in earlier.get("nonfinite", {}).items() if path in alone}
    odd |= later.get("nonfinite", {})
    joined = {**later, "metrics": {**earlier["metrics"], **later["metrics"]}}
    return joined | ({"nonfinite": odd} if odd else {})


def return_of(event: Mapping[str, Any]) -> Return | None:
    """The return that an event record reports; None for an event that reports none."""
    step = _returned_to(event["name"], event["payload"])
    return None if step is None else (int(event["seq"]), step)


def is_abandoned(record: Mapping[str, Any], returns: Iterable[Return]) -> bool:
    """Whether the run returned, after this record was written, to a step before that of the record."""
    return any(record["seq"] < seq and record["step"] > step for seq, step in returns)


def schema(name: str) -> dict[str, Any]:
    """The published JSON Schema of what is written: a stream of a run, or a file, by its name in ``schemas``."""
    return dict(orjson.loads((importlib.resources.files("meristem.sinks") / "schemas" / f"{name}.json").read_bytes()))
