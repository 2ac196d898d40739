"""Many runs that differ in some keys: each in a process of its own, and a table of what they came to.

Every point that is known is validated before the first one starts. A point that fails stops no other. Started again
with the same file, a sweep goes on: points with a row are done, and a run that was cut off goes on from its last
checkpoint.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from meristem.checkpoint.atomic import write_atomic
from meristem.checkpoint.run import RunLock
from meristem.config import dump_yaml, fingerprint
from meristem.errors import BadRecords, ConflictingKeys, MeristemError, MissingExtra
from meristem.recipes.plan.dry_run import plan
from meristem.recipes.sweeps.config import SweepConfig, read_sweep
from meristem.recipes.sweeps.picture import plot_sweep
from meristem.recipes.sweeps.points import Point, Row, n_points, point_of, points_of, tree
from meristem.recipes.sweeps.prune import Ruling, reports_of
from meristem.recipes.sweeps.search import drawn, require_optuna
from meristem.recipes.sweeps.table import ordered, write_tables
from meristem.recipes.sweeps.work import INTERRUPTED, Processes
from meristem.sinks.jsonl import JsonLines, read_records
from meristem.sinks.records import history

RECORD: Final = "sweep.ndjson"
DRAWN: Final = "points.ndjson"
_FILE: Final = "sweep.yaml"
_ROTATE_BYTES: Final = 1 << 30
_POLL_S: Final = 0.05


def sweep(config: SweepConfig, say: Callable[[str], None]) -> tuple[list[Row], Path, bool]:
    """Make the runs of a sweep that have no row yet: all rows, the directory, and whether it came to its end.

    say: given a line for each point that ends.
    """
    require_optuna(config)
    known, place = points_of(config), config.dir / config.name
    tried = {point.number: _tried(config, point) for point in known}
    place.mkdir(parents=True, exist_ok=True)
    with RunLock(place):
        _require_same(config, place)
        work = _Work(config, place, known, tried, say)
        try:
            work.all()
        except KeyboardInterrupt:
            return ordered(config, work.rows.values()), place, False
        finally:
            work.end()
    found = ordered(config, work.rows.values())
    write_tables(config, place, found)
    try:
        plot_sweep(config, place, found)
    except MissingExtra as error:
        say(f"without a picture: {error}")
    return found, place, True


def read_rows(place: Path) -> list[Row]:
    """The rows that a sweep has so far, in the order in which they came."""
    if not (place / RECORD).exists():
        return []
    try:
        return [_read(record) for record in read_records(place / RECORD)]
    except TypeError as cause:
        raise BadRecords(f"{place / RECORD} holds a line that is none of a sweep: {cause}. Remove it.") from cause


def _read(record: Mapping[str, Any]) -> Row:
    return Row(**{**record, "reports": tuple((step, value) for step, value in record.get("reports", ()))})


class _Work:
    """A sweep from where it stands. rows: of the points that are done, by number."""

    def __init__(
        self,
        config: SweepConfig,
        place: Path,
        known: Sequence[Point],
        tried: Mapping[int, tuple[int | None, int]],
        say: Callable[[str], None],
    ) -> None:
        self.rows = {row.point: row for row in read_rows(place)}
        self._config, self._say, self._n_points = config, say, n_points(config)
        self._settings = {point.number: point.settings for point in known}
        self._tried = dict(tried)
        if (place / DRAWN).exists():
            self._settings |= {each["point"]: each["settings"] for each in read_records(place / DRAWN)}
        self._record = JsonLines(place / RECORD, _ROTATE_BYTES)
        self._drawn = JsonLines(place / DRAWN, _ROTATE_BYTES) if config.search is not None else None
        self._processes = Processes(config, place)
        self._left = [number for number in range(1, self._n_points + 1) if number not in self.rows]

    def all(self) -> None:
        """Make every point that has no row."""
        while self._left or self._processes.working:
            while self._left and self._has_started(self._left[0]):
                del self._left[0]
            for point, code, ruling in self._processes.ended():
                if code == INTERRUPTED and ruling is None:
                    raise KeyboardInterrupt
                self._put(self._row(point, code, ruling))
            time.sleep(_POLL_S)

    def end(self) -> None:
        """End what still works, and let go of the files."""
        self._processes.end()
        self._record.close()
        if self._drawn is not None:
            self._drawn.close()

    def _has_started(self, number: int) -> bool:
        """Whether the point has begun, or has a row already; False where it has to wait."""
        rows = self._known_to(number)
        if rows is None or not self._processes.has_room(0):
            return False
        point = self._point(number, rows)
        if number not in self._tried:
            try:
                self._tried[number] = _tried(self._config, point)
            except MeristemError as error:
                # Only a drawn point: the others were tried before the first one began.
                self._put(Row(number, point.settings, "failed", error.exit_code, None, None, (), str(error)))
                return True
        last_step, needed_bytes = self._tried[number]
        if not self._processes.has_room(needed_bytes):
            return False
        self._processes.start(point, last_step, rows, needed_bytes)
        return True

    def _known_to(self, number: int) -> list[Row] | None:
        """The rows that a point is drawn from and compared with, by number; None while one of them is missing."""
        if not self._config.compares:
            return []
        wanted = range(1, self._config.known_to(number) + 1)
        return [self.rows[each] for each in wanted] if all(each in self.rows for each in wanted) else None

    def _point(self, number: int, rows: Sequence[Row]) -> Point:
        """The point of this number, which is drawn where it is not known yet; it is written down before it begins."""
        search = self._config.search
        if number not in self._settings and search is not None and self._drawn is not None:
            pending = [self._settings[each] for each in range(len(rows) + 1, number)]
            settings = drawn(search, number, rows, pending, lower_is_better=self._config.lower_is_better)
            self._drawn.append({"point": number, "settings": settings})
            self._settings[number] = settings
        return point_of(self._config, number, self._settings[number])

    def _row(self, point: Point, code: int, ruling: Ruling | None) -> Row:
        """What a point that has ended came to. What ended it early says more than how its process ended."""
        run_dir = self._processes.run_dir(point.number)
        if ruling is not None:
            step, value = ruling.reports[-1] if ruling.reports else (None, None)
            return Row(point.number, point.settings, "pruned", 0, value, step, ruling.reports, ruling.why)
        split, _, name = self._config.metric.partition("/")
        value, step = None, None
        try:
            records = [each for each in history(run_dir) if each["split"] == split]
            known = [each for each in records if each["metrics"].get(name) is not None]
            if known:
                value, step = float(known[-1]["metrics"][name]), int(known[-1]["step"])
        except BadRecords:
            pass  # a point that failed before its first record has none
        reports = tuple((step, value) for _, step, value in reports_of(run_dir, self._config.metric, step))
        return Row(point.number, point.settings, "finished" if code == 0 else "failed", code, value, step, reports)

    def _put(self, row: Row) -> None:
        self._record.append(asdict(row))
        self.rows[row.point] = row
        metric = f"{self._config.metric} {row.value}"
        why = f" ({row.why})" if row.why else ""
        self._say(f"point {row.point:03d} {row.status}{why}: {metric} ({len(self.rows)} of {self._n_points})")


def _tried(config: SweepConfig, point: Point) -> tuple[int | None, int]:
    """The step at which a point ends, None where another limit does, and the bytes that it needs by its plan.

    No plan is made where no limit of memory is set. One that never fits is refused, as settings are that are none.
    """
    settings = tree(config, point)
    if config.memory_gib is None:
        return settings.train.steps, 0
    needed = plan(settings, until="steps").needed_bytes or 0
    if needed > config.memory_gib * 2**30:
        raise ConflictingKeys(
            f"point {point.number} needs {needed / 2**30:.2f} GiB by its plan, and memory_gib is "
            f"{config.memory_gib:g}. Raise it, or leave the point out.",
            point=point.number,
        )
    return settings.train.steps, needed


def _require_same(config: SweepConfig, place: Path) -> None:
    """The directory is of this sweep, or of none so far.

    How many run at once may change, unless it decides what a point knows of earlier ones.
    """
    free = {"dir", "memory_gib"} | (set() if config.compares else {"jobs"})
    own = fingerprint(config.model_dump(mode="json", exclude=free))
    path = place / _FILE
    if path.exists():
        before = read_sweep(path)
        if fingerprint(before.model_dump(mode="json", exclude=free)) != own:
            raise ConflictingKeys(f"{place} holds another sweep of this name. Give this one another name.", key="name")
    write_atomic(path, dump_yaml(config).encode())
