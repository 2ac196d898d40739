"""V3 by SIGKILL: a run that grows survives it at any moment of the life of a seed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.forks import Runs
from recipes.growing import GROWS, assert_same, garden, losses
from recipes.small import overrides, write_text

pytestmark = pytest.mark.fault

POLICY = "grow.policy={name: schedule, settings: {steps: [8], slots: [blocks.1], settings: {hidden: 8}}}"
KILLED_AFTER = (7, 10, 14, 19, 25)
"""Steps: before the graft, on trial, while it is blended in, on probation, and after the verdict."""


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(write_text(tmp_path_factory.mktemp("kill")), *GROWS, POLICY, "checkpoint.every=2")


@pytest.fixture(scope="module")
def truth(runs: Runs, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("truth") / "run"
    assert runs.run("titans-mag", settings, run_dir) == 0
    return run_dir


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", KILLED_AFTER)
def test_v3_a_run_that_grows_is_killed_and_goes_on_to_the_bit(runs, settings, truth, tmp_path, step):
    run_dir = tmp_path / "run"
    pid = runs.start("titans-mag", settings, run_dir)
    while not ((run_dir / "events.ndjson").exists() and len(losses(run_dir)) >= step):
        time.sleep(0.01)
    time.sleep(0.1 * random.Random(step).random())
    os.kill(pid, signal.SIGKILL)
    assert runs.wait(pid) == -signal.SIGKILL
    assert runs.run("titans-mag", settings, run_dir) == 0
    assert_same(run_dir, truth)
    assert [each["history"] for each in garden(run_dir)["lives"]] == [
        each["history"] for each in garden(truth)["lives"]
    ]
