"""A run survives whatever stops it: the loss sequence of a resumed one is that of an undisturbed one, to the bit."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from meristem.checkpoint.run import read
from meristem.checkpoint.store import newest
from meristem.events import silent
from meristem.sinks.lines import read_records
from meristem.sinks.records import history
from recipes.forks import Runs
from recipes.small import overrides, write_text

pytestmark = pytest.mark.fault

STATEFUL = ("data.order=sequential", "model.n_layers=1", "model.heads=2", "model.span=5", "memory.head_width=4")
"""A model with a memory that is carried from window to window: everything that a checkpoint can hold."""

N_KILLS = 25
MOMENTS = [(index + random.Random(index).random()) / N_KILLS for index in range(N_KILLS)]
"""When a run is killed, as shares of its life: one in every twenty-fifth, evaluating, saving and ending included."""


@dataclass(frozen=True)
class Truth:
    """An undisturbed run: how long it took, its losses by step, and what it ended with."""

    life_s: float
    losses: dict[int, float]
    trees: dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Place:
    runs: Runs
    settings: list[str]
    truth: Truth


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kill")
    settings = overrides(write_text(folder), *STATEFUL)
    runs = Runs()
    for name in ("first", "second"):  # the first one also prepares the text
        started = time.monotonic()
        assert runs.run("titans-mag", settings, folder / name) == 0
    yield Place(runs, settings, truth_of(folder / "second", time.monotonic() - started))
    runs.close()


def truth_of(run_dir: Path, life_s: float) -> Truth:
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None
    return Truth(life_s, losses(run_dir), {name: checkpoint.tree(name) for name in ("model", "optim", "memory")})


def losses(run_dir: Path) -> dict[int, float]:
    """What the run really did, abandoned steps left out."""
    return {record["step"]: record["metrics"]["nats"] for record in history(run_dir) if record["split"] == "train"}


def assert_same(run_dir: Path, truth: Truth) -> None:
    found = truth_of(run_dir, truth.life_s)
    assert found.losses == truth.losses
    for name, tree in truth.trees.items():
        assert found.trees[name].keys() == tree.keys()
        assert all(torch.equal(found.trees[name][key], tensor) for key, tensor in tree.items())


def test_the_undisturbed_run_repeats(place, tmp_path):
    """What the tests below rely on: the same settings give the same losses and the same end in another process."""
    assert sorted(place.truth.losses) == list(range(1, 31))
    assert place.runs.run("titans-mag", place.settings, tmp_path / "run") == 0
    assert_same(tmp_path / "run", place.truth)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment:.3f}")
def test_killed_run_goes_on_to_the_bit(place, tmp_path, moment):
    """SIGKILL at any moment; the same command again ends with the same losses, weights, moments and memory."""
    pid = place.runs.start("titans-mag", place.settings, tmp_path / "run")
    time.sleep(moment * place.truth.life_s)
    os.kill(pid, signal.SIGKILL)
    place.runs.wait(pid)
    assert place.runs.run("titans-mag", place.settings, tmp_path / "run") == 0
    assert_same(tmp_path / "run", place.truth)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(place, tmp_path, number):
    """Exit code 130, a checkpoint of that very step, and nothing lost: no step is made twice."""
    run_dir = tmp_path / "run"
    pid = place.runs.start("titans-mag", [*place.settings, "checkpoint.every=1000"], run_dir)
    wait_for(lambda: has_steps(run_dir, 3))
    os.kill(pid, number)
    assert place.runs.wait(pid) == 130
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None and checkpoint.manifest["reason"] == "signal"
    assert checkpoint.step == max(losses(run_dir)) < 30
    assert read(run_dir)["status"] == "interrupted"
    assert place.runs.run("titans-mag", [*place.settings, "checkpoint.every=1000"], run_dir) == 0
    records = [record for record in read_records(run_dir / "metrics.ndjson") if record["split"] == "train"]
    assert [record["step"] for record in records] == list(range(1, 31))
    assert_same(run_dir, place.truth)


def test_time_boxed_run_gets_the_time_it_had_left(place, tmp_path):
    """Killed after some of its three seconds, the second process trains for the rest of them and no longer."""
    run_dir = tmp_path / "run"
    settings = [*place.settings, "train.steps=null", "train.budget=3s", "evaluate.every=10000", "checkpoint.every=60"]
    pid = place.runs.start("titans-mag", settings, run_dir)
    wait_for(lambda: newest(run_dir / "checkpoints", silent) is not None and seconds_used(run_dir)[-1] > 1.5)
    os.kill(pid, signal.SIGKILL)
    place.runs.wait(pid)
    saved = newest(run_dir / "checkpoints", silent)
    assert saved is not None
    saved_s = saved.value("progress")["seconds_used"]
    assert place.runs.run("titans-mag", settings, run_dir) == 0
    used = seconds_used(run_dir)
    after = [seconds for seconds in used if seconds > saved_s]
    assert used == sorted(used)
    assert after[-1] >= 3 and all(seconds < 3 for seconds in after[:-1])


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_steps(run_dir: Path, n_steps: int) -> bool:
    return (run_dir / "metrics.ndjson").exists() and len(losses(run_dir)) >= n_steps


def seconds_used(run_dir: Path) -> list[float]:
    return [record["metrics"]["seconds_used"] for record in history(run_dir) if record["split"] == "train"]
