"""A page of figures that are measured part by part: each has its date, its load and its command, and stays until it is
measured again."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.bench.estimate import table
from meristem.bench.measure import Row
from meristem.bench.suite import to_json
from meristem.checkpoint.atomic import write_atomic
from meristem.errors import WrongValue

VERDICTS: Final = {True: "met", False: "**missed**", None: ""}


@dataclass(frozen=True)
class Parts:
    """What a page is made of. names: what each part is called, in the order of the page."""

    schema: str
    names: Mapping[str, str]

    def require(self, asked: Iterable[str]) -> None:
        """WrongValue for a part that there is not."""
        if unknown := set(asked) - set(self.names):
            raise WrongValue(f"there is no part '{min(unknown)}'; there are {', '.join(self.names)}.", key="part")

    def read(self, out: Path) -> dict[str, Any] | None:
        """The report beside a page; None where there is none of this schema."""
        place = out.with_suffix(".json")
        found = orjson.loads(place.read_bytes()) if place.exists() else None
        return found if isinstance(found, dict) and found.get("schema") == self.schema else None

    def report(
        self, parts: Sequence[dict[str, Any]], command: str, earlier: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For programs: these parts, and of an earlier report those that are not among them.

        WrongValue where the earlier one was measured elsewhere, so that its figures do not belong beside these.
        """
        own = [found | {"command": command} for found in parts]
        measured = {str(found["part"]) for found in parts}
        kept = [] if earlier is None else [found for found in earlier["parts"] if found["part"] not in measured]
        machines = {(str(found["hardware"]), found["torch"]) for found in (*own, *kept)}
        if len(machines) > 1:
            raise WrongValue(
                "the page holds figures of another machine or another torch. Choose another --out.", key="out"
            )
        order = [*self.names]
        return {"schema": self.schema, "parts": sorted([*own, *kept], key=lambda found: order.index(found["part"]))}

    def how(self, report: Mapping[str, Any]) -> list[str]:
        """Lines of the table that says when, at what load and by which command each part was measured."""
        rows = [
            (self.names[found["part"]], found["date"], f"{found['load_average']:.1f}", f"`{found['command']}`")
            for found in report["parts"]
        ]
        return table(("part", "measured on", "load average before", "written by"), rows)


def measured(name: str, n_repeats: int, rows: Iterator[Row], heard: Callable[[Row], object]) -> dict[str, Any]:
    """One part for programs; ``heard`` is given each figure at once."""
    load_average, found = os.getloadavg()[0], []
    for row in rows:
        heard(row)
        found.append(row)
    date = datetime.now(UTC).date().isoformat()
    return to_json(found, n_repeats=n_repeats) | {"part": name, "date": date, "load_average": load_average}


def write(out: Path, report: Mapping[str, Any], page: str) -> None:
    """The page, and the JSON beside it."""
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, page.encode())


def machine(report: Mapping[str, Any]) -> str:
    """What it was measured on, in words."""
    first = report["parts"][0]
    return f"{first['hardware']['cpu']}, {first['hardware']['cpu_count']} cores, torch {first['torch']}"


def figures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of the table of these figures, beside what was asked."""
    shown = [
        (
            row["name"],
            amount(row),
            "" if row["target"] is None else f"{row['sense']} {row['target']:g}",
            VERDICTS[row["is_met"]],
            row["note"],
        )
        for row in rows
    ]
    return table(("what", "measured", "asked", "", "note"), shown)


def amount(row: Mapping[str, Any]) -> str:
    """A figure with its unit; ``-`` where nothing could be measured."""
    value = row["measured"]
    return "-" if value is None else f"{value:{',.0f' if value >= 1000 else '.3g'}} {row['unit']}"
