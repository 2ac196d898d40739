"""Trains the default and its baselines for the same time on the same text, three random seeds each, and writes
docs/comparison.md.

    .venv/bin/python scripts/compare.py [BUDGET] [DIRECTORY]

Two runs at a time, one thread each, so that whatever disturbs the machine disturbs both. Finished runs are not
repeated.
"""

import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from meristem.device.describe import describe
from meristem.sinks.records import history

PRESETS = ("titans-mag", "charformer", "delta-mag", "attention")
SEEDS = (0, 1, 2)
PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"


def start(preset: str, seed: int, budget: str, directory: Path) -> subprocess.Popen[bytes]:
    run_dir = directory / f"{preset}-{seed}"
    program = str(Path(sys.executable).with_name("meristem"))
    settings = [f"run.seed={seed}", f"train.max_time={budget}", "device.threads=1", "data.source=stdlib"]
    command = [program, "train", preset, *settings, "--run-dir", str(run_dir)]
    with (directory / f"{preset}-{seed}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def held_out(run_dir: Path) -> tuple[float, int]:
    """Bits per byte of the final evaluation, and how many tokens were read."""
    record = [record for record in history(run_dir) if record["task"] == "end"][-1]
    return record["metrics"]["bits_per_byte"], record["tokens"]


def page(budget: str, directory: Path) -> str:
    found = describe()
    lines = [
        "# The default against its baselines",
        "",
        f"Written by `scripts/compare.py` on {datetime.now(UTC):%Y-%m-%d}: {budget} of training each on one thread of "
        f"{found['hardware']['cpu']}, the text `stdlib`, random seeds {', '.join(map(str, SEEDS))}. Held-out bits per "
        "byte; less is better.",
        "",
        "| preset | median | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | tokens read |",
        "|---|---|" + "---|" * (len(SEEDS) + 1),
    ]
    for preset in PRESETS:
        results = [held_out(directory / f"{preset}-{seed}") for seed in SEEDS if done(directory / f"{preset}-{seed}")]
        if len(results) == len(SEEDS):
            bits = [bits_per_byte for bits_per_byte, _ in results]
            tokens = statistics.median(n_tokens for _, n_tokens in results)
            row = " | ".join(f"{value:.3f}" for value in bits)
            lines.append(f"| `{preset}` | **{statistics.median(bits):.3f}** | {row} | {tokens:,.0f} |")
    notes = [
        "",
        "`charformer`, a published reference size, reads bytes; the others read byte pairs, about three bytes a token. "
        "`attention` is the stack of the default without its memory: the same layers read more text in the same time.",
    ]
    return "\n".join([*lines, *notes, ""])


def done(run_dir: Path) -> bool:
    return run_dir.exists() and any(record["task"] == "end" for record in history(run_dir))


def main(budget: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    waiting = [(p, seed) for pair in (PRESETS[:2], PRESETS[2:]) for seed in SEEDS for p in pair]
    waiting = [(preset, seed) for preset, seed in waiting if not done(directory / f"{preset}-{seed}")]
    while waiting:
        pair, waiting = waiting[:2], waiting[2:]
        for process in [start(preset, seed, budget, directory) for preset, seed in pair]:
            if process.wait():
                raise SystemExit(f"{process.args} failed; its log is in {directory}")
        PAGE.write_text(page(budget, directory), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "180s", Path(sys.argv[2] if len(sys.argv) > 2 else "runs/comparison"))
