"""Whether a run of a sweep is to be ended early, by what it has recorded.

A decision is a function of the records up to it, and records are only added to. So it is the same whenever they are
read, while the run is at work, after its end, or after a kill, when some of them stand there twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.errors import BadRecords
from meristem.recipes.sweeps.config import PruneConfig, SweepConfig
from meristem.recipes.sweeps.points import Row
from meristem.recipes.sweeps.search import pruned_at
from meristem.sinks.jsonl import read_records

Reports = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Ruling:
    """That a run is to be ended. reports: its evaluations up to then. why: in words."""

    reports: Reports
    why: str


def reports_of(run_dir: Path, metric: str, last_step: int | None = None) -> list[tuple[int, int, float]]:
    """``seq``, step and value of each evaluation below ``last_step``; of several at one step the first."""
    split, _, name = metric.partition("/")
    found: dict[int, tuple[int, float]] = {}
    for record in _records(run_dir, "metrics"):
        value, step = record["metrics"].get(name), int(record["step"])
        is_one = record["split"] == split and record["task"] is None and value is not None
        if is_one and step not in found and (last_step is None or step < last_step):
            found[step] = int(record["seq"]), float(value)
    return [(seq, step, value) for step, (seq, value) in sorted(found.items(), key=lambda each: each[1][0])]


def ruling(config: SweepConfig, run_dir: Path, last_step: int | None, rows: Sequence[Row]) -> Ruling | None:
    """What is to be done with a run; None lets it go on.

    last_step: at which it ends by itself. rows: the points that it is compared with.
    """
    prune = config.prune
    if prune is None:
        return None
    reports = reports_of(run_dir, config.metric, last_step)
    values = [(step, value) for _, step, value in reports]
    alarm = _guard(prune, run_dir)
    if alarm is not None:
        values = [(step, value) for seq, step, value in reports if seq < alarm[0]]
    step = pruned_at(prune, values, rows, lower_is_better=config.lower_is_better)
    if step is not None:
        n_seen = [each for each, _ in values].index(step) + 1
        why = f"not among the best {prune.percentile:g} % at step {step}"
        return Ruling(tuple(values[:n_seen]), why)
    return None if alarm is None else Ruling(tuple(values), alarm[1])


def _guard(prune: PruneConfig, run_dir: Path) -> tuple[int, str] | None:
    """``seq`` and name of the event of the guard at which the run is to be ended."""
    limits = {"rollbacks": prune.rollbacks, "warnings": prune.warnings}
    counted: dict[str, list[int]] = {kind: [] for kind in limits}
    for event in _records(run_dir, "events"):
        name, seq, payload = event["name"], int(event["seq"]), event["payload"]
        if name == "run.resumed":
            # What came after the checkpoint comes again.
            counted = {kind: [each for each in seqs if each <= payload["seq"]] for kind, seqs in counted.items()}
        elif name == "rollback.done":
            counted["rollbacks"].append(seq)
        elif name == "guard.verdict" and payload["level"] == "warn":
            counted["warnings"].append(seq)
        for kind, most in limits.items():
            if most is not None and len(counted[kind]) >= most:
                return seq, f"{kind} of its guard: {most}"
    return None


def _records(run_dir: Path, stream: str) -> Iterator[dict[str, Any]]:
    """The records of a run; none of one that has not begun."""
    path = run_dir / f"{stream}.ndjson"
    if not path.exists():
        return
    try:
        yield from read_records(path)
    except BadRecords:
        return  # what stands before a broken line counts; the run itself says more of it
