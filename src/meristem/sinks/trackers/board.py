"""TensorBoard: event files in ``tensorboard`` of the run directory."""

import shutil
from collections.abc import Sequence
from typing import Any, Final

import yaml
from torch.utils.tensorboard import SummaryWriter

from meristem.sinks.trackers.follow import Followed, Record, scalars, seconds

FOLDER: Final = "tensorboard"


class TensorBoard:
    """Event files, which are written anew when the run is opened and when it returns to an earlier step.

    They begin with a mark that has a TensorBoard which is looking on forget what it had of the run.
    """

    holds_back: Final = False

    def __init__(self, run: Followed) -> None:
        self.id = run.id
        self._run, self._place = run, run.directory / FOLDER
        self._writer: Any = None

    def open(self) -> int:
        self.restart()
        return 0

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for tag, value in scalars(record).items():
                self._writer.add_scalar(tag, value, record["step"], walltime=seconds(record))

    def restart(self) -> None:
        self.close(None)
        shutil.rmtree(self._place, ignore_errors=True)
        self._writer = SummaryWriter(str(self._place), purge_step=0, flush_secs=2)
        text = yaml.safe_dump(dict(self._run.settings), allow_unicode=True)
        self._writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))

    def close(self, status: str | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
