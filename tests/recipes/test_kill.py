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
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.forks import Runs
from recipes.small import overrides, write_text

pytestmark = pytest.mark.fault

STATEFUL = (
    "data.order=sequential",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.sliding_window=5",
    "memory.head_dim=4",
)
"""A model with a memory that is carried from window to window: everything that a checkpoint can hold."""

N_STEPS, SAVED_EVERY = 30, 4
"""Of a run that nothing is wrong with."""

GARBLED = (*range(17, 20), *range(29, 36))
"""The batches whose text is corrupt, so that the guard panics: once, and later twice in a row."""

N_GUARDED = 40
GUARDED = (
    *STATEFUL,
    f"train.steps={N_GUARDED}",
    "optim.lr=0.03",
    "guard.span=12",
    "rollback.snapshots=2",
    "rollback.snapshot_every=4",
    "eval.n_samples=0",
)
"""A run that goes back. Snapshots are of the steps at which checkpoints are, so that a process which has only these
goes back to where the one before it would have gone."""

RESUMABLE = (2 * SAVED_EVERY + 1, N_GUARDED)
"""The steps after which there surely is a checkpoint to go on from: the last save may be in flight."""

NEVER = 10**12


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    piece: ``step``, some time after a step was recorded, step 0 being the start of the run; or one of ``PIECES``.
    share: of the time that follows the step, which is for starting, a step with what follows it, or ending; or of the
        calls of functions in a piece. For ``resume`` the run is killed after ``step``, and then once more.
    """

    piece: str
    share: float
    step: int = 0

    def __str__(self) -> str:
        return f"{self.piece}-{self.step + self.share:.3f}"


def moments() -> Iterator[Moment]:
    """Without end, of every twenty the same number in each piece."""
    draw = random.Random(25)
    while True:
        yield from (Moment("step", draw.random(), draw.randrange(N_GUARDED + 1)) for _ in range(7))
        yield from (Moment("save", 0.97 * draw.random()) for _ in range(6))
        yield from (Moment("rollback", 0.97 * draw.random()) for _ in range(4))
        yield from (Moment("resume", 0.9 * draw.random(), draw.randrange(*RESUMABLE)) for _ in range(3))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moment" in metafunc.fixturenames:
        drawn = list(itertools.islice(moments(), metafunc.config.getoption("--kills")))
        metafunc.parametrize("moment", drawn, ids=str)


@dataclass(frozen=True)
class Truth:
    """An undisturbed run: how long its pieces took, its losses by step, and what it ended with.

    n_calls: of functions, by piece.
    """

    starting_s: float
    step_s: float
    ending_s: float
    losses: dict[int, float]
    trees: dict[str, dict[str, torch.Tensor]]
    n_calls: dict[str, int]

    def delay_s(self, moment: Moment) -> float:
        pieces = {0: self.starting_s, N_GUARDED: self.ending_s}
        return moment.share * pieces.get(moment.step, self.step_s)

    def call(self, moment: Moment) -> tuple[str, int]:
        return moment.piece, 1 + int(moment.share * self.n_calls[moment.piece])


@dataclass(frozen=True)
class Place:
    runs: Runs
    settings: list[str]
    truth: Truth

    def start(self, run_dir: Path, dies: tuple[str, int] | None = None) -> int:
        return self.runs.start("titans-mag", self.settings, run_dir, garbled=GARBLED, dies=dies)

    def run(self, run_dir: Path, dies: tuple[str, int] | None = None) -> int:
        return self.runs.wait(self.start(run_dir, dies))


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def place(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("kill")
    settings = overrides(write_text(folder), *GUARDED)
    place = Place(runs, settings, Truth(0, 0, 0, {}, {}, {}))
    n_calls = {}
    for piece in ("save", "rollback"):  # the first one also prepares the text
        assert place.run(folder / piece, (piece, NEVER)) == 0
        n_calls[piece] = int((folder / piece / f"calls-{piece}").read_text())
    times_s = [time.monotonic()]
    pid = place.start(folder / "truth")
    for n_steps in (1, N_GUARDED):
        wait_for(lambda n_steps=n_steps: has_steps(folder / "truth", n_steps))
        times_s.append(time.monotonic())
    assert runs.wait(pid) == 0
    times_s.append(time.monotonic())
    starting_s, training_s, ending_s = (after - before for before, after in itertools.pairwise(times_s))
    pid = place.start(folder / "resume")
    kill_after(runs, pid, folder / "resume", N_GUARDED // 2)
    assert place.run(folder / "resume", ("resume", NEVER)) == 0
    n_calls["resume"] = int((folder / "resume" / "calls-resume").read_text())
    found = Truth(starting_s, training_s / N_GUARDED, ending_s, *ends(folder / "truth"), n_calls)
    return Place(runs, settings, found)


@pytest.fixture(scope="module")
def plain(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("plain")
    settings = overrides(write_text(folder), *STATEFUL)
    assert runs.run("titans-mag", settings, folder / "truth") == 0
    return Place(runs, settings, Truth(0, 0, 0, *ends(folder / "truth"), {}))


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
    """What the tests below rely on: it goes back, and the same settings give the same in another process."""
    assert sorted(place.truth.losses) == list(range(1, N_GUARDED + 1))
    assert place.run(tmp_path / "run") == 0
    assert_same(tmp_path / "run", place.truth)
    returns = [event["payload"] for event in events(tmp_path / "run", "rollback.done")]
    assert [event["in_row"] for event in returns] == [1, 2]
    assert all(event["tier"] == "fast" for event in returns)


def test_tr9_killed_run_goes_on_to_the_bit(place, tmp_path, moment):
    """SIGKILL at any moment; the same command again ends with the same losses, weights, moments and memory.

    CX-3.6, CX-7.2.
    """
    run_dir = tmp_path / "run"
    if moment.piece in ("step", "resume"):
        kill_after(place.runs, place.start(run_dir), run_dir, moment.step, place.truth.delay_s(moment))
    if moment.piece != "step":
        assert place.run(run_dir, place.truth.call(moment)) == -signal.SIGKILL
    assert place.run(run_dir) == 0
    assert_same(run_dir, place.truth)
    if moment.piece == "step" and RESUMABLE[0] <= moment.step < min(GARBLED):
        # A save cannot be lost any more once the next one has begun.
        assert resumed_from(run_dir) >= ((moment.step - 1) // SAVED_EVERY - 1) * SAVED_EVERY


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(plain, tmp_path, number):
    """Exit code 130, a checkpoint of that very step, and nothing lost: no step is made twice."""
    run_dir = tmp_path / "run"
    pid = plain.runs.start("titans-mag", [*plain.settings, "checkpoint.every=1000"], run_dir)
    wait_for(lambda: has_steps(run_dir, 3))
    os.kill(pid, number)
    assert plain.runs.wait(pid) == 130
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None and checkpoint.manifest["reason"] == "signal"
    assert checkpoint.step == max(losses(run_dir)) < N_STEPS
    assert read(run_dir)["status"] == "interrupted"
    assert plain.runs.run("titans-mag", [*plain.settings, "checkpoint.every=1000"], run_dir) == 0
    records = [record for record in read_records(run_dir / "metrics.ndjson") if record["split"] == "train"]
    assert [record["step"] for record in records] == list(range(1, N_STEPS + 1))
    assert_same(run_dir, plain.truth)


def test_time_boxed_run_gets_the_time_it_had_left(plain, tmp_path):
    """Killed with most of its four seconds left, the second process trains for the rest of them and no longer."""
    run_dir = tmp_path / "run"
    settings = [*plain.settings, "train.steps=null", "train.max_time=4s", "eval.every=10000", "checkpoint.every=5"]
    pid = plain.runs.start("titans-mag", settings, run_dir)
    wait_for(lambda: newest(run_dir / "checkpoints", silent) is not None)
    os.kill(pid, signal.SIGKILL)
    plain.runs.wait(pid)
    saved = newest(run_dir / "checkpoints", silent)
    assert saved is not None
    saved_s = saved.value("progress")["seconds_used"]
    assert plain.runs.run("titans-mag", settings, run_dir) == 0
    used = seconds_used(run_dir)
    after = [seconds for seconds in used if seconds > saved_s]
    assert used == sorted(used)
    assert after[-1] >= 4 and all(seconds < 4 for seconds in after[:-1])


def kill_after(runs: Runs, pid: int, run_dir: Path, step: int, delay_s: float = 0.0) -> None:
    """SIGKILL so long after a step was recorded."""
    wait_for(lambda: step == 0 or has_steps(run_dir, step))
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    runs.wait(pid)


def wait_for(is_there: Callable[[], bool]) -> None:
    """However busy the machine is; only the time of the whole test is limited."""
    while not is_there():
        time.sleep(0.01)


def has_steps(run_dir: Path, n_steps: int) -> bool:
    are_open = all((run_dir / f"{stream}.ndjson").exists() for stream in ("metrics", "events"))
    return are_open and len(losses(run_dir)) >= n_steps


def resumed_from(run_dir: Path) -> int:
    return events(run_dir, "run.resumed")[0]["payload"]["resumed_from"]


def events(run_dir: Path, name: str) -> list[dict]:
    return [event for event in read_records(run_dir / "events.ndjson") if event["name"] == name]


def seconds_used(run_dir: Path) -> list[float]:
    return [record["metrics"]["seconds_used"] for record in history(run_dir) if record["split"] == "train"]
