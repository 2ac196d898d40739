"""A tracker: ``sinks.use=[csv]`` writes ``curve.csv`` into the directory of the run."""

from collections.abc import Sequence

from meristem.sinks.trackers.follow import Followed, Record, scalars

MERISTEM_API = 1

SHOWN = "train/bits_per_byte"


class Csv:
    """Bits per byte of training by step.

    What is common to all trackers, ``meristem.sinks.trackers.follow`` does: each step comes once, of the branch that
    survived, and nothing is lost while this fails.
    """

    holds_back = True

    def __init__(self, run: Followed) -> None:
        self.id = run.id
        self._path = run.directory / "curve.csv"

    def open(self) -> int:
        self.restart()
        return 0

    def restart(self) -> None:
        self._path.write_text("step,bits_per_byte\n", encoding="utf-8")

    def write(self, records: Sequence[Record]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            for record in records:
                if SHOWN in (values := scalars(record)):
                    file.write(f"{record['step']},{values[SHOWN]}\n")

    def close(self, status: str | None) -> None:
        pass
