"""Weights & Biases, offline unless told otherwise: files in ``wandb`` of the run directory, for ``wandb sync``."""

import os
import shutil
from collections.abc import Sequence
from typing import Any, Final

import wandb

from meristem.sinks.trackers.follow import Followed, Record, scalars

FOLDER: Final = "wandb"


class WandB:
    """One run of W&B, whose id is the run's own.

    Offline, its files are written anew when the run is opened, since what an earlier process had not yet written when
    it was killed cannot be told. ``place`` is ``online`` or ``offline``.
    """

    holds_back: Final = True

    def __init__(self, run: Followed) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its library writes to a third host
        self.id = run.id
        self._followed, self._place = run, run.directory / FOLDER
        self._is_offline = run.place != "online"
        self._run: Any = None

    def open(self) -> int:
        if self._is_offline:
            self.restart()
            return 0
        self._begin()
        return int(self._run.summary.get("meristem/seq", 0))

    def write(self, records: Sequence[Record]) -> None:
        at: dict[int, dict[str, float]] = {}
        for record in records:
            at.setdefault(record["step"], {}).update(scalars(record))
        for step, values in at.items():
            self._run.log(values | {"meristem/seq": records[-1]["seq"]}, step=step)

    def restart(self) -> None:
        self.close(None)
        if self._is_offline:
            shutil.rmtree(self._place, ignore_errors=True)
        self._begin()

    def close(self, status: str | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "finished" else 1)
            self._run = None

    def _begin(self) -> None:
        self._place.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._followed.project,
            name=self._followed.name,
            id=self._followed.id,
            dir=str(self._followed.directory),
            resume="allow",
            mode="offline" if self._is_offline else "online",
            config=dict(self._followed.settings),
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, x_disable_stats=True, silent=True
            ),
        )
