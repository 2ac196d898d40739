"""What a sweep came to: the best first, as Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.checkpoint.atomic import write_atomic
from meristem.recipes.sweeps.config import SweepConfig
from meristem.recipes.sweeps.points import Row

_RANKS: Final = {"finished": 0, "pruned": 1, "failed": 2}


def ordered(config: SweepConfig, rows: Iterable[Row]) -> list[Row]:
    """The best first; after them those that were ended early, those without a value and those that failed."""

    def rank(row: Row) -> tuple[int, bool, float, int]:
        value = 0.0 if row.value is None else row.value
        return _RANKS[row.status], row.value is None, value if config.lower_is_better else -value, row.point

    return sorted(rows, key=rank)


def table(config: SweepConfig, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Titles and cells of a sweep's table: point, the keys that differ, metric, step, status, exit code, and why."""
    keys, has_why = keys_of(rows), any(row.why for row in rows)
    cells = [
        [
            row.point,
            *(row.settings.get(key) for key in keys),
            row.value,
            row.step,
            row.status,
            row.exit,
            *([row.why] if has_why else []),
        ]
        for row in rows
    ]
    return ["point", *keys, config.metric, "step", "status", "exit", *(["why"] if has_why else [])], cells


def write_tables(config: SweepConfig, place: Path, rows: Sequence[Row]) -> None:
    """Write the table in its three forms."""
    titles, cells = table(config, rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([titles, *cells])
    write_atomic(place / "sweep.csv", text.getvalue().encode())
    write_atomic(place / "sweep.json", orjson.dumps([asdict(row) for row in rows], option=orjson.OPT_INDENT_2))
    shown = [["" if cell is None else str(cell) for cell in line] for line in cells]
    lines = [f"# {config.name}", "", *(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *shown))]
    write_atomic(place / "sweep.md", ("\n".join(lines) + "\n").encode())


def keys_of(rows: Sequence[Row]) -> list[str]:
    """The keys in which points differ, in the order in which they stand in them."""
    return list(dict.fromkeys(key for row in sorted(rows, key=lambda row: row.point) for key in row.settings))
