"""What a run pays for not being lost: the guard, events and snapshots, and checkpoints written beside the training."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from meristem.bench.measure import Row
from meristem.recipes.pretrain import begin, prepare_job, training_steps
from meristem.runs.config import load_config
from meristem.runs.directory import opened
from meristem.runs.recovery import recovering
from meristem.sinks.console import Console

N_STEPS: Final = 100
"""One interval of ``rollback.snapshot_every``: each repetition has one snapshot and as many verdicts as steps."""


def safety(n_repeats: int) -> Iterator[Row]:
    """The default preset, as it trains: seconds in ``Recovery`` over seconds of steps, and what a save takes of
    them."""
    config = load_config("default", [f"train.steps={(n_repeats + 1) * N_STEPS}", "train.max_time=null"]).tree
    shares, saves, copies = [], [], []
    with (
        tempfile.TemporaryDirectory() as place,
        opened(config, Path(place) / "run", Console(json=True), is_new=True) as run,
    ):
        job = prepare_job(run, config, None)
        with recovering(run, job, begin(run, job, "never", None)) as recovery:
            watched_s = step_s = 0.0
            for step in training_steps(job):
                began = time.perf_counter()
                recovery.check(step)
                watched_s += time.perf_counter() - began
                step_s += step.seconds
                if step.progress.step % N_STEPS:
                    continue
                # The first interval is the warm-up of everything.
                if step.progress.step > N_STEPS:
                    shares.append(watched_s / step_s)
                    saves.append(_seconds(partial(recovery.save, reason="interval", metrics={})))
                    recovery.wait()
                    copies.append(_seconds(partial(recovery.snapshot, "interval")))
                watched_s = step_s = 0.0
    share, save, copy = statistics.median(shares), statistics.median(saves), statistics.median(copies)
    note = f"one snapshot in {N_STEPS} steps; each step checked"
    yield Row("guard, events and snapshots, share of the steps", 100 * share, "%", 3.0, "<=", note)
    yield Row("training waits for a save", 1e3 * save, "ms", note=f"a snapshot alone takes {1e3 * copy:.1f} ms")
    every_s = config.checkpoint.every_s or 60.0
    yield Row("saves, share of the time", 100 * save / every_s, "%", note=f"one in {every_s:g} s")


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
