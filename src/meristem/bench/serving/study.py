"""All that is measured of a server, in its order, and the page that holds it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from meristem.bench.estimate import table
from meristem.bench.measure import Row
from meristem.bench.serving.load import Say, health, idle, requests
from meristem.bench.serving.server import serving
from meristem.bench.serving.speed import TEMPERATURE, long_session, speeds
from meristem.bench.suite import to_json
from meristem.checkpoint.atomic import write_atomic
from meristem.events import silent
from meristem.runs.open import load

SCHEMA: Final = "meristem.serve-bench/1"
VERDICTS: Final = {True: "met", False: "**missed**", None: ""}


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


def measure(sizes: Sizes, checkpoint: Path | None, say: Say) -> Iterator[Row]:
    """The figures as they are measured. Servers and their sessions are in a temporary directory, gone at the end."""
    torch.set_num_threads(1)
    loaded = load(checkpoint, silent)
    # The text that is read beside the replies takes a place of its own.
    max_rows = max(sizes.sessions, default=1) + 1
    with tempfile.TemporaryDirectory(prefix="meristem-bench-") as place:
        with serving(Path(place) / "busy", checkpoint, max_rows) as server:
            if sizes.sessions:
                say("sessions that write together")
                yield from speeds(server, loaded, sizes.sessions, sizes.tokens, sizes.repeats)
            if sizes.long:
                say("a long session")
                yield from long_session(server, sizes.long)
            if sizes.text_bytes and sizes.sessions:
                say("a long text beside replies")
                yield from health(server, sizes.sessions[-1], sizes.text_bytes)
            if sizes.requests:
                say("many requests")
                yield from requests(server, sizes.requests, say)
        if sizes.idle:
            say("idle sessions")
            yield from idle(Path(place) / "idle", checkpoint, loaded, sizes.idle, say)


def report_of(rows: Sequence[Row], sizes: Sizes, command: str) -> dict[str, Any]:
    """For programs."""
    return to_json(rows, n_repeats=sizes.repeats) | {
        "schema": SCHEMA,
        "command": command,
        "sizes": asdict(sizes),
        "date": datetime.now(UTC).date().isoformat(),
        "load_average": os.getloadavg()[0],
    }


def write(out: Path, report: dict[str, Any]) -> None:
    """The page, and the JSON beside it."""
    write_atomic(out.with_suffix(".json"), orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(out, page(report).encode())


def page(report: dict[str, Any]) -> str:
    """The table for people, beside what was asked."""
    hardware = report["hardware"]
    shown = [
        (
            row["name"],
            f"{row['measured']:{',.0f' if row['measured'] >= 1000 else '.3g'}} {row['unit']}",
            "" if row["target"] is None else f"{row['sense']} {row['target']:g}",
            VERDICTS[row["is_met"]],
            row["note"],
        )
        for row in report["rows"]
    ]
    machine = f"{hardware['cpu']}, {hardware['cpu_count']} cores"
    lines = [
        "# What serving costs",
        "",
        f"Written by `{report['command']}` on {report['date']}: {machine}, torch {report['torch']}. At the end the "
        f"load average was {report['load_average']:.1f}, that of the measurement included.",
        "",
        *table(("what", "measured", "asked", "", "note"), shown),
        "",
        "The server is `meristem serve` in a process of its own, and the load comes over the loopback from another, on "
        f"the same cores. Tokens/s are medians of {report['repeats']}, of the time in which all sessions write; each "
        f"has a memory of its own, a text of its own behind it, and draws at a temperature of {TEMPERATURE}. In "
        "process the same batch is read and drawn in a loop, with no server, queue, text or JSON. An idle session is "
        "read from its file, which the operating system may still have in memory, and its turn is written to the disk.",
    ]
    return "\n".join([*lines, ""])
