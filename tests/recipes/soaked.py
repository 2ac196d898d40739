"""A long run of a tiny model in a process of its own: prints what the process held every so many steps, as JSON.

python soaked.py FOLDER STEPS
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from meristem.data.stream import Batch, Cursor
from meristem.recipes.pretrain import prepare_job, pretrain
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from recipes.small import config, write_text

N_SAMPLES = 100
NOISE_EVERY = 700
"""Once in so many batches five are noise, and the run goes back: that must leave nothing behind either."""


class Watched:
    """A stream that looks at the process every ``every`` batches, and is noise now and then."""

    def __init__(self, job: Job, every: int) -> None:
        self._stream, self._every, self._process = job.stream, every, psutil.Process()
        self.samples: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        if cursor.position % self._every == 0:
            self.samples.append(
                {
                    "rss": self._process.memory_info().rss,
                    "descriptors": self._process.num_fds(),
                    "threads": self._process.num_threads(),
                    "s": time.perf_counter(),
                }
            )
        batch, after = self._stream.next(cursor)
        if cursor.position % NOISE_EVERY >= NOISE_EVERY - 5:
            rows = torch.randint(128, 256, (3, 18), generator=torch.Generator().manual_seed(cursor.position))
            batch = replace(batch, tokens_bt=rows[:, :-1], targets_bt=rows[:, 1:])
        return batch, after


def main(folder: Path, n_steps: int) -> None:
    watched: list[Watched] = []

    def make_job(*given: Any) -> Job:
        job = prepare_job(*given)
        watched.append(Watched(job, n_steps // N_SAMPLES))
        return replace(job, stream=watched[0])  # type: ignore[arg-type]

    tree = config(
        write_text(folder),
        f"train.steps={n_steps}",
        "train.log_every=20",
        "optim.lr=0.01",
        "model.n_layers=1",
        "model.n_heads=2",
        "model.sliding_window=5",
        "memory.head_dim=4",
        "eval.every=500",
        "checkpoint.every=250",
        "sinks.system_every_s=1",
        preset="titans-mag",
    )
    result = pretrain(tree, run_dir=folder / "run", view=Console(json=True), make_job=make_job)
    print(json.dumps({"bits_per_byte": result.bits_per_byte, "samples": watched[0].samples}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
