"""All that is measured of a server, part by part, and the page that holds it."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from meristem.bench.estimate import table
from meristem.bench.measure import Row
from meristem.bench.serving.load import Say, health, idle, requests
from meristem.bench.serving.server import Server, serving
from meristem.bench.serving.speed import TEMPERATURE, long_session, speeds
from meristem.bench.suite import to_json
from meristem.checkpoint.atomic import write_atomic
from meristem.errors import WrongValue
from meristem.events import silent
from meristem.models.load import Loaded
from meristem.runs.open import load

SCHEMA: Final = "meristem.serve-bench/2"
VERDICTS: Final = {True: "met", False: "**missed**", None: ""}
PARTS: Final = {
    "speeds": "sessions that write together",
    "long": "a long session",
    "health": "a long text beside replies",
    "requests": "many requests",
    "idle": "idle sessions",
}
"""What can be measured by itself, in the order of the page."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; 0 leaves a part out.

    sessions: that write together, ascending. tokens: that each writes. long: tokens that one session reads. text_bytes:
    that are read beside ``sessions[-1]`` replies.
    """

    sessions: tuple[int, ...] = (1, 8, 64)
    tokens: int = 200
    long: int = 100_000
    text_bytes: int = 1_000_000
    requests: int = 100_000
    idle: int = 10_000
    repeats: int = 3

    def has(self, part: str) -> bool:
        """Whether there is anything of a part to be measured."""
        sizes = {"speeds": len(self.sessions), "long": self.long, "requests": self.requests, "idle": self.idle}
        return bool(sizes.get(part, self.text_bytes and self.sessions))


def measure(
    sizes: Sizes, parts: Sequence[str], checkpoint: Path | None, say: Say, heard: Callable[[Row], object]
) -> Iterator[dict[str, Any]]:
    """Parts as they are measured, each with a server of its own, whose sessions are gone at its end.

    heard: is given each figure at once.
    """
    torch.set_num_threads(1)
    loaded = load(checkpoint, silent)
    for part in PARTS:
        if part not in parts or not sizes.has(part):
            continue
        say(PARTS[part])
        load_average, rows = os.getloadavg()[0], []
        with tempfile.TemporaryDirectory(prefix="meristem-bench-") as place:
            for row in _rows(part, sizes, checkpoint, loaded, Path(place), say):
                heard(row)
                rows.append(row)
        yield _found(part, sizes, load_average, rows)


def _rows(part: str, sizes: Sizes, checkpoint: Path | None, loaded: Loaded, place: Path, say: Say) -> Iterator[Row]:
    if part == "idle":
        yield from idle(place, checkpoint, loaded, sizes.idle, say)
        return
    # The text that is read beside the replies takes a place of its own.
    with serving(place, checkpoint, max(sizes.sessions, default=1) + 1) as server:
        yield from _of_a_server(part, sizes, loaded, server, say)


def _of_a_server(part: str, sizes: Sizes, loaded: Loaded, server: Server, say: Say) -> Iterator[Row]:
    if part == "speeds":
        return speeds(server, loaded, sizes.sessions, sizes.tokens, sizes.repeats)
    if part == "long":
        return long_session(server, sizes.long)
    if part == "health":
        return health(server, sizes.sessions[-1], sizes.text_bytes)
    return requests(server, sizes.requests, say)


def _found(part: str, sizes: Sizes, load_average: float, rows: Sequence[Row]) -> dict[str, Any]:
    """A part for programs. load_average: before it began."""
    date = datetime.now(UTC).date().isoformat()
    found = to_json(rows, n_repeats=sizes.repeats) | {"part": part, "sizes": asdict(sizes), "date": date}
    return found | {"load_average": load_average}


def report_of(parts: Sequence[dict[str, Any]], command: str, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """For programs: these parts, and of an earlier report those that are not among them.

    WrongValue where the earlier one was measured elsewhere, so that its figures do not belong beside these.
    """
    own = [found | {"command": command} for found in parts]
    kept = [] if earlier is None else [found for found in earlier["parts"] if found["part"] not in {*map(_name, parts)}]
    machines = {(str(found["hardware"]), found["torch"]) for found in (*own, *kept)}
    if len(machines) > 1:
        raise WrongValue("the page holds figures of another machine or another torch. Choose another --out.", key="out")
    return {"schema": SCHEMA, "parts": sorted([*own, *kept], key=lambda found: [*PARTS].index(_name(found)))}


def _name(found: dict[str, Any]) -> str:
    return str(found["part"])


def read(out: Path) -> dict[str, Any] | None:
    """The report beside a page; None where there is none of this schema."""
    place = out.with_suffix(".json")
    found = orjson.loads(place.read_bytes()) if place.exists() else None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def write(out: Path, report: dict[str, Any]) -> None:
    """The page, and the JSON beside it."""
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, page(report).encode())


def page(report: dict[str, Any]) -> str:
    """The table for people, beside what was asked."""
    first = report["parts"][0]
    machine = f"{first['hardware']['cpu']}, {first['hardware']['cpu_count']} cores, torch {first['torch']}"
    shown = [
        (
            row["name"],
            f"{row['measured']:{',.0f' if row['measured'] >= 1000 else '.3g'}} {row['unit']}",
            "" if row["target"] is None else f"{row['sense']} {row['target']:g}",
            VERDICTS[row["is_met"]],
            row["note"],
        )
        for found in report["parts"]
        for row in found["rows"]
    ]
    how = [
        (PARTS[found["part"]], found["date"], f"{found['load_average']:.1f}", f"`{found['command']}`")
        for found in report["parts"]
    ]
    lines = [
        "# What serving costs",
        "",
        f"Measured on {machine}. Each part has a server of its own, and was measured by itself.",
        "",
        *table(("what", "measured", "asked", "", "note"), shown),
        "",
        *table(("part", "measured on", "load average before", "written by"), how),
        "",
        "A load average of 1 is one other program that computes all the time. The server is `meristem serve` in a "
        "process of its own, and the load comes over the loopback from another, on the same cores. Tokens/s are "
        f"medians of {first['repeats']}, of the time in which all sessions write; each has a memory of its own, a text "
        f"of its own behind it, and draws at a temperature of {TEMPERATURE}. Tokens that the server sends together "
        "count as one: from token to token is from one event to the next. In process the same batch is read and drawn "
        "in a loop, with no server, queue, text or JSON. An idle session is read from its file, which the operating "
        "system may still have in memory, and its turn is written to the disk.",
    ]
    return "\n".join([*lines, ""])
