"""Which checkpoints stay: the last, the best, the pinned, and one in so many steps for ever."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from meristem.checkpoint import store
from meristem.checkpoint.store import Entry


def keep(
    entries: Collection[Entry], *, last: int, best: int, metric: str, direction: Literal["min", "max"], every: int
) -> set[Path]:
    """The paths that stay. The newest one always does, since a run resumes from it.

    A metric that is absent or not finite ranks worst; among equals the newer ranks better.
    every: steps at whose multiples a checkpoint stays for ever; 0 for none.
    """
    by_age = sorted(entries, key=store.age_order)
    by_rank = by_age[::-1]
    by_rank.sort(key=lambda entry: _badness(entry, metric, direction))
    kept = by_age[-max(last, 1) :] + by_rank[:best]
    kept += [entry for entry in by_age if entry.pinned or (every and entry.step % every == 0)]
    return {entry.path for entry in kept}


def _badness(entry: Entry, metric: str, direction: Literal["min", "max"]) -> tuple[bool, float]:
    """Sorts the best first, and what was not measured last."""
    value = entry.metrics.get(metric)
    if value is None or not math.isfinite(value):
        return True, 0.0
    return False, value if direction == "min" else -value


def prune(
    root: Path, *, last: int, best: int, metric: str, direction: Literal["min", "max"], every: int
) -> tuple[Path, ...]:
    """Delete what ``keep`` does not name and give the deleted paths. Damaged directories are not touched."""
    found = store.entries(root)
    kept = keep(found, last=last, best=best, metric=metric, direction=direction, every=every)
    deleted = tuple(entry.path for entry in found if entry.path not in kept)
    for path in deleted:
        store.delete(path)
    if deleted:
        store.write_index(root)
    return deleted
