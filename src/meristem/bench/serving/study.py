"""All that is measured of a server, part by part, and the page that holds it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from meristem.bench.measure import Row
from meristem.bench.parts import Parts, figures, machine, measured
from meristem.bench.serving.load import Say, health, idle, requests
from meristem.bench.serving.server import Server, serving
from meristem.bench.serving.speed import TEMPERATURE, long_session, speeds
from meristem.events import silent
from meristem.models.load import Loaded
from meristem.native.decoding import share_readers
from meristem.runs.open import load

PARTS: Final = Parts(
    "meristem.serve-bench/2",
    {
        "speeds": "sessions that write together",
        "long": "a long session",
        "health": "a long text beside replies",
        "requests": "many requests",
        "idle": "idle sessions",
    },
)
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
    share_readers(1)
    loaded = load(checkpoint, silent)
    for part in PARTS.names:
        if part not in parts or not sizes.has(part):
            continue
        say(PARTS.names[part])
        with tempfile.TemporaryDirectory(prefix="meristem-bench-") as place:
            found = measured(part, sizes.repeats, _rows(part, sizes, checkpoint, loaded, Path(place), say), heard)
        yield found | {"sizes": asdict(sizes)}


def _rows(part: str, sizes: Sizes, checkpoint: Path | None, loaded: Loaded, place: Path, say: Say) -> Iterator[Row]:
    if part == "idle":
        yield from idle(place, checkpoint, loaded, sizes.idle, say)
        return
    # The text that is read beside the replies takes a place of its own.
    n_rows = max(sizes.sessions, default=1) + 1
    with serving(place / "sessions", checkpoint, n_rows) as server:
        if part == "speeds":
            with serving(place / "others", checkpoint, n_rows, n_threads=1) as single:
                yield from speeds(server, single, loaded, sizes.sessions, sizes.tokens, sizes.repeats)
            return
        yield from _of_a_server(part, sizes, server, say)


def _of_a_server(part: str, sizes: Sizes, server: Server, say: Say) -> Iterator[Row]:
    if part == "long":
        return long_session(server, sizes.long)
    if part == "health":
        return health(server, sizes.sessions[-1], sizes.text_bytes)
    return requests(server, sizes.requests, say)


def page(report: dict[str, Any]) -> str:
    """The table for people, beside what was asked."""
    lines = [
        "# What serving costs",
        "",
        f"Measured on {machine(report)}. Each part has a server of its own, and was measured by itself.",
        "",
        *figures(row for found in report["parts"] for row in found["rows"]),
        "",
        *PARTS.how(report),
        "",
        "A load average of 1 is one other program that computes all the time. The server is `meristem serve` in a "
        "process of its own, and the load comes over the loopback from another, on the same cores. Tokens/s are "
        f"medians of {report['parts'][0]['repeats']}, of the time in which all sessions write; each has a memory of "
        f"its own, a text of its own behind it, and draws at a temperature of {TEMPERATURE}. Tokens sent together "
        "count as one: from token to token is from one event to the next. In process the same batch is read and drawn "
        "in a loop by one thread, with no server, queue, text or JSON; it is compared with a server of one thread "
        "(`--threads 1`), which leaves a processor to all that. An idle session is read from its file, which the "
        "operating system may still have in memory, and its turn is written to the disk.",
    ]
    return "\n".join([*lines, ""])
