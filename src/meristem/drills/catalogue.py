"""Every drill by name, and how one is run."""

import time
from pathlib import Path
from typing import Final

from meristem.drills.disk import DRILLS as OF_DISKS
from meristem.drills.drill import Drill, Outcome, Seen
from meristem.drills.process import DRILLS as OF_PROCESSES
from meristem.drills.ranks import DRILLS as OF_RANKS
from meristem.drills.training import DRILLS as OF_TRAINING
from meristem.plugins import Registry

drills: Final[Registry[Drill]] = Registry(
    "drill",
    {drill.name: drill for drill in (*OF_TRAINING, *OF_DISKS, *OF_PROCESSES, *OF_RANKS)},
    accepts=lambda thing: isinstance(thing, Drill),
)


def run_drill(drill: Drill, place: Path) -> Outcome:
    """Break what the drill breaks, in an empty directory, and say what became of it."""
    began = time.monotonic()
    seen, error = Seen({}), None
    try:
        seen = drill.act(drill, place)
    except Exception as cause:  # noqa: BLE001 - whatever a fault leads to is an outcome, and here a wrong one
        error = f"{type(cause).__name__}: {cause}"
    return Outcome(drill.name, drill.fault, drill.does, seen, time.monotonic() - began, error)
