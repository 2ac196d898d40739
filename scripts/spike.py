"""Runs over a text with a stretch of noise in it, with and without the guard: docs/spike.json and docs/spike.png.

python scripts/spike.py [--steps 2000]
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from meristem.checkpoint.store import Checkpoint
from meristem.data.stream import Batch, Cursor, Stream
from meristem.recipes.pretrain import prepare_job, pretrain
from meristem.runs.config import Config, load_config
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history

DOCS = Path(__file__).parents[1] / "docs"

SETTINGS = (
    "data.source=stdlib-docs",
    "data.seq_len=64",
    "data.batch_size=8",
    "tokenizer.kind=byte",
    "model.dim=48",
    "model.n_layers=2",
    "model.n_heads=2",
    "memory.head_dim=24",
    "device.device=cpu",
    "device.dtype=fp32",
    "device.threads=1",
    "optim.lr=0.003",
    "train.max_time=null",
    "eval.every=100",
    "eval.every_s=null",
    "eval.n_windows=64",
    "eval.n_windows_end=512",
    "eval.n_samples=0",
    "checkpoint.every_s=null",
)

BEGIN_SHARE, N_SPOILT = 0.95, 80
"""Where the noise begins, as a share of the run, and how many batches are noise."""


class Spoilt:
    """A stream of which some batches are random bytes, wherever in the run they are read."""

    def __init__(self, stream: Stream, first: int) -> None:
        self._stream, self._first = stream, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        batch, after = self._stream.next(cursor)
        if self._first <= cursor.position < self._first + N_SPOILT:
            generator = torch.Generator().manual_seed(cursor.position)
            rows = torch.randint(0, 256, (batch.tokens_bt.shape[0], batch.tokens_bt.shape[1] + 1), generator=generator)
            batch = replace(batch, tokens_bt=rows[:, :-1], targets_bt=rows[:, 1:])
        return batch, after


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=2000)
    n_steps = options.parse_args().steps
    first = int(BEGIN_SHARE * n_steps)
    with tempfile.TemporaryDirectory() as place:
        runs = {f"clean {seed}": run(Path(place), n_steps, seed=seed) for seed in range(3)}
        runs["guarded"] = run(Path(place), n_steps, first=first)
        runs["unguarded"] = run(Path(place), n_steps, "guard.enabled=false", first=first)
    clean = [runs[f"clean {seed}"]["bits_per_byte"] for seed in range(3)]
    noise = statistics.stdev(clean)
    found = {"steps": n_steps, "first_spoilt": first, "n_spoilt": N_SPOILT, "noise": noise, "runs": runs}
    (DOCS / "spike.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    for name, one in runs.items():
        print(f"{name:10} {one['bits_per_byte']:.4f} bits per byte, rollbacks {one['rollbacks']}")
    print(f"standard deviation of the clean runs: {noise:.4f}")


def run(place: Path, n_steps: int, *more: str, first: int | None = None, seed: int = 0) -> dict[str, Any]:
    """What one run came to: its curve, its last figure, and its number of rollbacks."""
    directory = place / f"{'clean' if first is None else 'spoilt'}-{seed}-{len(more)}"
    settings = [*SETTINGS, f"data.root={place}", f"train.steps={n_steps}", f"run.seed={seed}", *more]
    config = load_config("titans-mag", settings, {}).tree

    def make_job(run: Run, config: Config, checkpoint: Checkpoint | None) -> Job:
        job = prepare_job(run, config, checkpoint)
        return job if first is None else replace(job, stream=Spoilt(job.stream, first))  # type: ignore[arg-type]

    result = pretrain(config, run_dir=directory, view=Console(json=True), make_job=make_job)
    train = [record for record in history(directory) if record["split"] == "train"]
    rollbacks = [
        {key: event["payload"][key] for key in ("panicked_at", "resumed_from", "reason", "tier", "changed")}
        for event in read_records(directory / "events.ndjson")
        if event["name"] == "rollback.done"
    ]
    curve = [(record["step"], record["metrics"]["bits_per_byte"]) for record in train]
    return {"bits_per_byte": result.bits_per_byte, "rollbacks": rollbacks, "curve": curve}


def draw(found: dict[str, Any]) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    whole, end = figure.subplots(1, 2)
    for name, label in (("clean 0", "clean text"), ("unguarded", "noise, no guard"), ("guarded", "noise, guard")):
        curve = found["runs"][name]["curve"]
        for axes in (whole, end):
            axes.plot(
                *zip(*curve, strict=True), linewidth=1, label=f"{label}: {found['runs'][name]['bits_per_byte']:.3f}"
            )
    end.set_xlim(found["first_spoilt"] - found["steps"] // 20, found["steps"])
    for axes in (whole, end):
        axes.set(xlabel="step", ylabel="training loss in bits per byte")
    whole.set_title("whole run", fontsize="medium")
    end.set_title(f"its end; noise in batches {found['first_spoilt']:,} to "
                  f"{found['first_spoilt'] + found['n_spoilt']:,}", fontsize="medium")  # fmt: skip
    whole.legend(title="held out at the end, bits per byte", fontsize="small")
    figure.savefig(DOCS / "spike.png")


if __name__ == "__main__":
    main()
