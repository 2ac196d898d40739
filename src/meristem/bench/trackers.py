"""What it costs to write down a run and to show it to every tracker that is installed, in time of the processor.

Time of the processor and not of the clock: trackers work on threads beside the training, and what a machine does
besides changes nothing of the ratio.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from meristem.bench.measure import Row
from meristem.events import Event
from meristem.extras import is_there
from meristem.recipes.pretrain import prepare_job, training_steps
from meristem.runs.config import load_config
from meristem.runs.directory import Run, opened
from meristem.runs.logging import Log
from meristem.sinks.console import Console
from meristem.sinks.records import history

TRACKERS: Final = ("tensorboard", "mlflow", "wandb")
PRESET: Final = "default"
N_RECORDS: Final = 100
"""Of one repetition; a checkpoint covers every tenth, which is when trackers that hold steps back get them."""
N_WARM: Final = 20


def trackers(n_repeats: int) -> Iterator[Row]:
    """The share of a step of the default preset that its records take, all trackers on: one in ``train.log_every``
    steps."""
    found = [name for name in TRACKERS if is_there(name)]
    words = [f"sinks.use=[{','.join(found)}]", "train.max_time=null"]
    words.append(f"train.steps={(n_repeats + 1) * load_config(PRESET).tree.train.log_every}")
    config = load_config(PRESET, words).tree
    shares, steps_s, records_s = [], [], []
    with (
        tempfile.TemporaryDirectory() as place,
        opened(config, Path(place) / "run", Console(json=True), is_new=True) as run,
    ):
        job = prepare_job(run, config, None)
        log, began, written = Log(run, job), _cpu_s(), 0
        for step in training_steps(job):
            if not step.is_logged:
                continue
            step_s = (_cpu_s() - began) / config.train.log_every
            if not written:
                # A record as a run makes it; and what the trackers need to begin.
                log.take(step)
                metrics = history(run.directory)[-1]["metrics"]
                written = _write(run, metrics, config.train.steps or 0, N_WARM)
            else:
                began = _cpu_s()
                written = _write(run, metrics, written, N_RECORDS)
                record_s = (_cpu_s() - began) / N_RECORDS
                shares.append(record_s / config.train.log_every / step_s)
                steps_s.append(step_s)
                records_s.append(record_s)
            began = _cpu_s()
    missing = [name for name in TRACKERS if name not in found]
    note = f"{1e3 * statistics.median(records_s):.2f} ms a record of {len(metrics)} values, one in "
    note += (
        f"{config.train.log_every} steps of {1e3 * statistics.median(steps_s):.0f} ms; {', '.join(found) or 'files'}"
    )
    note += f"; not installed: {', '.join(missing)}" if missing else ""
    target = None if missing else 1.0
    yield Row("records and all trackers, share of the steps", 100 * statistics.median(shares), "%", target, "<=", note)


def _write(run: Run, metrics: dict[str, Any], last_step: int, n_records: int) -> int:
    """Write records of the steps after ``last_step``, and wait until every sink has taken them; gives the last step."""
    for step in range(last_step + 1, last_step + n_records + 1):
        run.records.metrics(step, step, 0.0, "train", metrics)
        if step % 10 == 0:
            run.emit(_covered(step))
    run.emit(_covered(step))
    for name in TRACKERS:
        done = threading.Event()
        with suppress(KeyError):  # not among those of the run
            run.emitter.later(name, done.set)
            done.wait(60)
    return last_step + n_records


def _covered(step: int) -> Event:
    """What a run says of a checkpoint of that step."""
    return Event("checkpoint.saved", {"step": step, "is_sound": True})


def _cpu_s() -> float:
    """Seconds of the processor that this process and those that it started have had."""
    total_s = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            total_s += times.user + times.system
    return total_s
