"""The processes of a sweep: each run in one of its own, several at once."""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meristem.recipes.sweeps.config import SweepConfig
from meristem.recipes.sweeps.points import Point, Row
from meristem.recipes.sweeps.prune import Ruling, ruling

INTERRUPTED: Final = 130
_GRACE_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.5
_STREAMS: Final = ("metrics.ndjson", "events.ndjson")


@dataclass
class Working:
    """A point at work.

    needed_bytes: by its plan. last_step: at which it ends by itself. rows: the points that it is compared with.
    seen_bytes: the size of its records when they were last read, at ``seen_s``. ended_s: when it was ended.
    """

    point: Point
    process: "subprocess.Popen[bytes]"
    needed_bytes: int
    last_step: int | None
    rows: Sequence[Row]
    seen_bytes: int = -1
    seen_s: float = -math.inf
    ended_s: float | None = None


class Processes:
    """Those that are at work, by the number of their point."""

    def __init__(self, config: SweepConfig, place: Path) -> None:
        self._config, self._place = config, place
        self.working: dict[int, Working] = {}
        (place / "logs").mkdir(exist_ok=True)

    def has_room(self, needed_bytes: int) -> bool:
        """Whether one more may start that needs so much."""
        if len(self.working) >= self._config.jobs:
            return False
        if self._config.memory_gib is None or not self.working:
            return True
        used = sum(each.needed_bytes for each in self.working.values())
        return used + needed_bytes <= self._config.memory_gib * 2**30

    def start(self, point: Point, last_step: int | None, rows: Sequence[Row], needed_bytes: int) -> None:
        """Begin a point, or go on with it."""
        words = ["train", self._config.base, *point.words, "--run-dir", str(self.run_dir(point.number))]
        process = started([*words, "--resume", "auto", "--json"], self._place / "logs" / f"{point.name}.txt")
        self.working[point.number] = Working(point, process, needed_bytes, last_step, rows)

    def ended(self) -> Iterator[tuple[Point, int, Ruling | None]]:
        """The points whose processes have ended, with their exit codes and what ended them early.

        Those that are found to be worth no more are sent the signal to end.
        """
        for number, each in list(self.working.items()):
            code = each.process.poll()
            if code is not None:
                del self.working[number]
                yield each.point, code, self._ruling(each)
            elif each.ended_s is None:
                self._look(each)
            elif time.monotonic() - each.ended_s > _GRACE_S:
                each.process.kill()

    def end(self) -> None:
        """Have what still works leave a checkpoint, and wait for it; kill what takes too long."""
        for each in self.working.values():
            each.process.terminate()
        until = time.monotonic() + _GRACE_S
        for each in self.working.values():
            try:
                each.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    def run_dir(self, number: int) -> Path:
        """Of a point."""
        return self._place / "runs" / f"{number:03d}"

    def _look(self, each: Working) -> None:
        """End a run whose new records say that it is worth no more."""
        now = time.monotonic()
        if self._config.prune is None or now - each.seen_s < _LOOK_EVERY_S:
            return
        paths = [self.run_dir(each.point.number) / name for name in _STREAMS]
        size_bytes = sum(path.stat().st_size for path in paths if path.exists())
        is_new, each.seen_bytes, each.seen_s = size_bytes != each.seen_bytes, size_bytes, now
        if is_new and self._ruling(each) is not None:
            each.process.terminate()
            each.ended_s = now

    def _ruling(self, each: Working) -> Ruling | None:
        return ruling(self._config, self.run_dir(each.point.number), each.last_step, each.rows)


def started(words: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """A process of ``meristem`` with these words, which ends with this one on Linux."""
    command = [sys.executable, "-m", "meristem", *words]
    with open(log, "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=end_with(os.getpid())
        )


def end_with(parent: int) -> Callable[[], None]:
    """What a new process does first: on Linux it is killed when its parent is, so that nobody works for no one."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    library, death_signal = ctypes.CDLL(None), 1

    def prepare() -> None:
        library.prctl(death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(INTERRUPTED)

    return prepare
