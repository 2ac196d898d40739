"""What reading the text costs a training, beside one whose batches lie in memory."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from meristem.bench.measure import Row
from meristem.data.prefetch import Batches, prefetched
from meristem.data.stream import Batch, Cursor
from meristem.optim.schedule import rate_factor
from meristem.recipes.pretrain import prepare_job
from meristem.runs.config import load_config
from meristem.runs.directory import opened
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from meristem.train.loop import Step, steps
from meristem.train.state import Held

N_STEPS: Final = 5
"""Steps of one repetition."""


class _Timed:
    """Batches, and the seconds that whoever takes them spends on it: passed, and of its own CPU time."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self.passed_s, self.own_s = batches, 0.0, 0.0

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at the cursor, and the cursor after it."""
        began = time.perf_counter(), time.thread_time()
        taken = self._batches.next(cursor)
        self.passed_s += time.perf_counter() - began[0]
        self.own_s += time.thread_time() - began[1]
        return taken


def batches(n_repeats: int) -> Iterator[Row]:
    """The default preset with its batches read beside it, and read when they are needed, turn by turn.

    A step over what it takes without taking its batches: from memory they would be taken in a microsecond.
    """
    config = load_config("default", ["train.max_time=null", f"train.steps={2 * (n_repeats + 1) * N_STEPS}"]).tree
    spent = {"ahead": [0.0] * 4, "needed": [0.0] * 4}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        run = stack.enter_context(opened(config, Path(place) / "run", Console(json=True), is_new=True))
        job = prepare_job(run, config, None)
        ahead = stack.enter_context(prefetched(job.stream, config.data.prefetch_bytes))
        ways = {"ahead": _Timed(ahead), "needed": _Timed(job.stream)}
        training = {name: _steps(job, way) for name, way in ways.items()}
        for repeat in range(n_repeats + 1):
            for name, made in training.items():
                way = ways[name]
                way.passed_s = way.own_s = 0.0
                began = time.perf_counter(), time.thread_time()
                for _ in islice(made, N_STEPS):
                    pass
                found = time.perf_counter() - began[0], way.passed_s, time.thread_time() - began[1], way.own_s
                if repeat:  # the first is the warm-up of everything
                    spent[name] = [sum(each) for each in zip(spent[name], found, strict=True)]
    is_loaded = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    how = "CPU time of the thread that trains, as the machine is loaded" if is_loaded else "of the time that passed"
    n_steps, n_tokens = n_repeats * N_STEPS, config.data.batch_size * config.data.seq_len
    for name, title, target in (("ahead", "read ahead", 1.01), ("needed", "read when they are needed", None)):
        whole_s, taking_s = spent[name][2:] if is_loaded else spent[name][:2]
        note = f"{how}; {1e3 * taking_s / n_steps:.2f} of {1e3 * whole_s / n_steps:.1f} ms a step of {n_tokens} tokens"
        labels = ("passed_s", "taking_passed_s", "thread_s", "taking_thread_s")
        figures = dict(zip(labels, spent[name], strict=True))
        ratio = whole_s / (whole_s - taking_s)
        yield Row(f"a step with batches {title}, over batches in memory", ratio, "x", target, "<=", note, figures)


def _steps(job: Job, batches: Batches) -> Iterator[Step]:
    """The training of a job on these batches; each has a progress of its own, and all move one model."""
    schedule = partial(rate_factor, job.config.schedule)
    return steps(Held(job.state), batches, schedule, config=job.config.train, device=job.device)
