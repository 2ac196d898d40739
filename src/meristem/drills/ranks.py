"""Drills of a run in several processes."""

import os
import signal
from pathlib import Path
from typing import Final

import psutil

from meristem.checkpoint import run as runs
from meristem.drills.drill import Drill, Seen
from meristem.drills.process import Victim
from meristem.drills.scene import Ended, Scene

N_STEPS: Final = 60
SETTINGS: Final = ("--nproc", "2", f"train.steps={N_STEPS}", "eval.every=1000")


def rank_killed(drill: Drill, place: Path) -> Seen:
    """SIGKILL for the second of two processes, in the middle of training."""
    scene = Scene.at(place)
    truth = Victim.of(scene, "truth", *SETTINGS)
    code = truth.ended()
    victim = Victim.of(scene, "run", *SETTINGS)
    victim.until(lambda: victim.n_steps() >= N_STEPS // 3)
    pids = [child.pid for child in psutil.Process(victim.pid).children() if child.environ().get("RANK") == "1"]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    codes = [code, victim.ended()]
    ended, undisturbed = (
        Ended(each.run_dir, code) for each, code in zip((victim, truth), reversed(codes), strict=True)
    )
    resumed = [event["resumed_from"] for event in ended.events("run.resumed")]
    checks = {
        "one of two processes was killed": len(pids) == 1,
        "all start again from the last checkpoint, by themselves": len(resumed) == 1 and 0 < resumed[0] < N_STEPS,
        "the run finishes": codes == [0, 0] and runs.read(victim.run_dir)["status"] == "finished",
        "and ends as an undisturbed run, to the bit": ended.is_same_as(undisturbed),
    }
    return Seen(checks, {"exit_codes": codes, "resumed_from": resumed})


DRILLS: Final = (
    Drill(
        name="rank-killed",
        fault="one of several processes is killed in the middle of training",
        does="the others end instead of waiting for it; all start again from the last checkpoint, up to "
        "`distributed.max_restarts` times",
        user="a warning says which process was lost; nothing to do",
        exit_code=0,
        act=rank_killed,
    ),
)
