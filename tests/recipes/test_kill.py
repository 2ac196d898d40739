"""A run survives whatever stops it: the loss sequence of a resumed one is that of an undisturbed one, to the bit."""

import itertools
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

N_STEPS, SAVED_EVERY = 30, 4


@dataclass(frozen=True)
class Moment:
    """When a run is killed: some time after a step of it was recorded, step 0 being its start.

    share: of the time that the next thing takes, which is starting, a step with what follows it, or ending.
    """

    step: int
    share: float


_DRAW = random.Random(25)
MOMENTS = [
    *(Moment(0, _DRAW.random()) for _ in range(3)),
    *(Moment(1 + number * (N_STEPS - 2) // 18, _DRAW.random()) for number in range(19)),
    *(Moment(N_STEPS, _DRAW.random()) for _ in range(3)),
]
"""Twenty-five, spread over the whole life: starting, training, evaluating, saving, reporting."""


@dataclass(frozen=True)
class Truth:
    """An undisturbed run: how long its pieces took, its losses by step, and what it ended with."""

    starting_s: float
    step_s: float
    ending_s: float
    losses: dict[int, float]
    trees: dict[str, dict[str, torch.Tensor]]

    def delay_s(self, moment: Moment) -> float:
        pieces = {0: self.starting_s, N_STEPS: self.ending_s}
        return moment.share * pieces.get(moment.step, self.step_s)


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
    assert runs.run("titans-mag", settings, folder / "first") == 0  # this one also prepares the text
    times_s = [time.monotonic()]
    pid = runs.start("titans-mag", settings, folder / "second")
    for n_steps in (1, N_STEPS):
        wait_for(lambda n_steps=n_steps: has_steps(folder / "second", n_steps))
        times_s.append(time.monotonic())
    assert runs.wait(pid) == 0
    times_s.append(time.monotonic())
    starting_s, training_s, ending_s = (after - before for before, after in itertools.pairwise(times_s))
    yield Place(runs, settings, Truth(starting_s, training_s / N_STEPS, ending_s, *ends(folder / "second")))
    runs.close()


def ends(run_dir: Path) -> tuple[dict[int, float], dict[str, dict[str, torch.Tensor]]]:
    """The losses of a run, and the tensors it ended with."""
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None
    return losses(run_dir), {name: checkpoint.tree(name) for name in ("model", "optim", "memory")}


def losses(run_dir: Path) -> dict[int, float]:
    """What the run really did, abandoned steps left out."""
    return {record["step"]: record["metrics"]["nats"] for record in history(run_dir) if record["split"] == "train"}


def assert_same(run_dir: Path, truth: Truth) -> None:
    found_losses, found_trees = ends(run_dir)
    assert found_losses == truth.losses
    for name, tree in truth.trees.items():
        assert found_trees[name].keys() == tree.keys()
        assert all(torch.equal(found_trees[name][key], tensor) for key, tensor in tree.items())


def test_the_undisturbed_run_repeats(place, tmp_path):
    """What the tests below rely on: the same settings give the same losses and the same end in another process."""
    assert sorted(place.truth.losses) == list(range(1, N_STEPS + 1))
    assert place.runs.run("titans-mag", place.settings, tmp_path / "run") == 0
    assert_same(tmp_path / "run", place.truth)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment.step + moment.share:.3f}")
def test_killed_run_goes_on_to_the_bit(place, tmp_path, moment):
    """SIGKILL at any moment; the same command again ends with the same losses, weights, moments and memory."""
    run_dir = tmp_path / "run"
    pid = place.runs.start("titans-mag", place.settings, run_dir)
    wait_for(lambda: moment.step == 0 or has_steps(run_dir, moment.step))
    time.sleep(place.truth.delay_s(moment))
    os.kill(pid, signal.SIGKILL)
    place.runs.wait(pid)
    assert place.runs.run("titans-mag", place.settings, run_dir) == 0
    assert_same(run_dir, place.truth)
    n_saved = max(0, moment.step - 1) // SAVED_EVERY * SAVED_EVERY
    assert n_saved == 0 or resumed_from(run_dir) >= n_saved


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
    assert checkpoint.step == max(losses(run_dir)) < N_STEPS
    assert read(run_dir)["status"] == "interrupted"
    assert place.runs.run("titans-mag", [*place.settings, "checkpoint.every=1000"], run_dir) == 0
    records = [record for record in read_records(run_dir / "metrics.ndjson") if record["split"] == "train"]
    assert [record["step"] for record in records] == list(range(1, N_STEPS + 1))
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
    are_open = all((run_dir / f"{stream}.ndjson").exists() for stream in ("metrics", "events"))
    return are_open and len(losses(run_dir)) >= n_steps


def resumed_from(run_dir: Path) -> int:
    events = read_records(run_dir / "events.ndjson")
    return next(event["payload"]["resumed_from"] for event in events if event["name"] == "run.resumed")


def seconds_used(run_dir: Path) -> list[float]:
    return [record["metrics"]["seconds_used"] for record in history(run_dir) if record["split"] == "train"]
