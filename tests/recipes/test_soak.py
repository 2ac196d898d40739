"""Steps without end leave nothing behind: memory, files and threads of the process stay as many as they were."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, linear_regression, median

import pytest

from meristem.sinks.jsonl import read_records

TESTS = Path(__file__).parents[1]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_tr9_soak_stays_flat(tmp_path, request):
    """RSS grows by less than 1 % over the second half of a run that saves, evaluates, takes snapshots and goes back.

    By default 2,000 steps; ``--soak 50000`` is the whole of it.
    """
    n_steps = request.config.getoption("--soak")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "recipes" / "soaked.py"), str(tmp_path), str(n_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert math.isfinite(found["bits_per_byte"])
    events = [event["name"] for event in read_records(tmp_path / "run" / "events.ndjson")]
    assert events.count("rollback.done") >= n_steps // 1000
    assert events.count("checkpoint.saved") >= n_steps // 500
    late = found["samples"][len(found["samples"]) // 2 :]
    rss = [sample["rss"] for sample in late]
    slope, _ = linear_regression(range(len(rss)), rss)
    growth = slope * len(rss) / fmean(rss)
    print(f"RSS {rss[0] / 2**20:.1f} to {rss[-1] / 2**20:.1f} MiB, {growth:+.3%} by its slope")
    assert growth < 0.01
    # A checkpoint in the making has a thread and a file, and a rollback changes the thread that reads ahead: what is
    # there at most times stays.
    for name in ("descriptors", "threads"):
        counts = [sample[name] for sample in late]
        first, last = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        assert median(first) == median(last) and max(last) <= max(first) + 1, f"{name}: {counts}"
