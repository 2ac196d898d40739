"""A sweep: which runs it is, that a failing one stops no other, and that kills change nothing of its table."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from meristem.config import dump_yaml
from meristem.errors import ConfigError, ConflictingKeys, MeristemError
from meristem.recipes.sweeps.config import read_sweep
from meristem.recipes.sweeps.points import points_of
from meristem.recipes.sweeps.run import RECORD, sweep
from recipes.forks import Runs

TINY = {
    "data.source": "stdlib-docs",
    "data.seq_len": 17,
    "data.batch_size": 2,
    "model.dim": 12,
    "model.n_layers": 1,
    "train.steps": 6,
    "train.max_time": None,
    "eval.n_windows_end": 2,
    "checkpoint.every": 2,
}
QUICK = TINY | {
    "train.steps": 12,
    "eval.every": 2,
    "eval.n_windows": 2,
    "eval.n_samples": 0,
    "eval.reading_tokens": 0,
    "eval.learn_rate": False,
}


def written(place: Path, **changes: object) -> Path:
    said = {"name": "a", "dir": str(place / "sweeps"), "base": "charrnn", "settings": TINY}
    path = place / "sweep.yaml"
    path.write_text(dump_yaml(said | changes))
    return path


def settings_of(path: Path) -> list[dict]:
    return [dict(point.settings) for point in points_of(read_sweep(path))]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    grid = {"optim.lr": [0.1, 0.01], "optim.name": ["adamw", "muon"], "run.seed": [0, 1, 2]}
    found = settings_of(written(tmp_path, grid=grid))
    assert len(found) == 12 == len({str(each) for each in found})
    assert found[0] == {"optim.lr": 0.1, "optim.name": "adamw", "run.seed": 0}


def test_random_points_are_those_of_their_seed(tmp_path: Path) -> None:
    """Within the ranges, whole where these are, and the same again."""
    keys = {
        "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "model.dim": {"low": 8, "high": 64},
        "optim.name": ["adamw", "muon"],
    }
    path = written(tmp_path, random={"n": 200, "random_seed": 3, "keys": keys})
    found = settings_of(path)
    assert found == settings_of(path)
    assert all(1e-4 <= each["optim.lr"] <= 1e-1 and 8 <= each["model.dim"] <= 64 for each in found)
    assert all(isinstance(each["model.dim"], int) for each in found)
    assert 70 < sum(each["optim.lr"] < 10**-2.5 for each in found) < 130
    assert found != settings_of(written(tmp_path, random={"n": 200, "random_seed": 4, "keys": keys}))


def test_cx_4_5_every_point_is_tried_before_the_first_run(tmp_path: Path) -> None:
    """CX-4.5: of 2 x 3 with one value that is none, nothing starts, and the error names the point."""
    path = written(tmp_path, grid={"run.seed": [0, 1], "optim.lr": [0.1, 0.01, -1]})
    with pytest.raises(ConfigError, match=r"point 3 of the sweep \(run.seed=0 optim.lr=-1\).*optim.lr"):
        sweep(read_sweep(path), print)
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    "changes, why",
    [
        ({}, "exactly one of grid, random, list and search, not none"),
        ({"grid": {"run.seed": [1]}, "list": [{"run.seed": 1}]}, "not grid and list"),
        ({"grids": {}, "list": [{"run.seed": 1}]}, "unknown key 'grids'.*grid"),
        ({"random": {"n": 2, "keys": {"optim.lr": {"low": 2, "high": 1}}}}, "low below high"),
        ({"random": {"n": 0, "keys": {"optim.lr": [1]}}}, "random.n"),
        ({"list": [{"optim.lrr": 1}]}, "optim.lrr.*optim.lr"),
        ({"list": [{}], "base": "charrn"}, "charrnn"),
        ({"list": [{}], "jobs": 0}, "jobs"),
        ({"list": [{}], "prune": {}}, "one of percentile, rollbacks and warnings"),
        ({"list": [{}], "prune": {"percentile": 50}, "settings": {"eval.every": None}}, "eval.every is None. Set both"),
        ({"search": {"n": 2, "keys": {"optim.lr": {"low": 0.1, "high": -1.5}}}}, "low below high"),
        ({"search": {"n": 2, "keys": {"optim.lr": {"low": -1, "high": 1}}}}, r"\(optim.lr=-1\).*optim.lr"),
    ],
)
def test_a_file_that_describes_none(tmp_path: Path, changes: dict, why: str) -> None:
    with pytest.raises(MeristemError, match=why) as caught:
        points_of(read_sweep(written(tmp_path, **changes)))
    assert caught.value.exit_code == 2


def test_a_directory_of_another_sweep_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "sweeps" / "a"
    place.mkdir(parents=True)
    (place / "sweep.yaml").write_text(written(tmp_path, list=[{"run.seed": 1}]).read_text())
    with pytest.raises(ConflictingKeys, match="holds another sweep"):
        sweep(read_sweep(written(tmp_path, list=[{"run.seed": 2}])), print)
    assert not (place / RECORD).exists()


def test_a_point_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConflictingKeys, match=r"point 1 needs .* by its plan, and memory_gib is 0.01"):
        sweep(read_sweep(written(tmp_path, list=[{"run.seed": 1}], memory_gib=0.01)), print)


def made(path: Path) -> int:
    return subprocess.run(
        [sys.executable, "-m", "meristem", "sweep", str(path)], capture_output=True, check=False
    ).returncode


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_cx_4_5_a_failing_point_stops_no_other(tmp_path: Path) -> None:
    """CX-4.5: one that fails beside two that do not gives three rows, in the order of the metric."""
    points = [{"run.seed": 1}, {"data.source": str(tmp_path / "nowhere")}, {"optim.lr": 0.02}]
    assert made(written(tmp_path, list=points, jobs=2)) == 1
    with open(tmp_path / "sweeps" / "a" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["status"] for row in rows) == ["failed", "finished", "finished"]
    assert (rows[2]["point"], rows[2]["exit"]) == ("2", "4")
    values = [float(row["val/bits_per_byte"]) for row in rows[:2]]
    assert values == sorted(values)


@pytest.fixture
def forks() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


SEARCH = {"n": 8, "n_random": 3, "keys": {"optim.lr": {"low": 1e-4, "high": 1.0, "log": True}, "run.seed": [0, 1]}}


@pytest.mark.fault
@pytest.mark.extras
@pytest.mark.timeout(600)
def test_cx_4_5_two_kills_change_nothing_of_the_table(tmp_path: Path, forks: Runs) -> None:
    """CX-4.5: a search of eight runs, killed at two moments and started again, draws and ends the same runs, and has
    the rows that an undisturbed one has, each once.

    What it started is gone with it, so that no two processes write to one run.
    """
    (tmp_path / "calm").mkdir()
    given = {"search": SEARCH, "prune": {"percentile": 50.0, "after_points": 2}, "jobs": 2, "settings": QUICK}
    calm, path = written(tmp_path / "calm", **given), written(tmp_path, **given)
    assert forks.wait(forks.start_sweep(calm)) == 0
    place = tmp_path / "sweeps" / "a"
    record, runs = place / RECORD, place / "runs"
    for n_rows in (1, 4):
        pid = forks.start_sweep(path)
        until = time.monotonic() + 300
        while (
            (len(record.read_bytes().splitlines()) if record.exists() else 0) < n_rows
            or not runs.is_dir()
            or not any("running" in each.read_text() for each in runs.glob("*/run.json"))
        ):
            assert time.monotonic() < until
            time.sleep(0.01)
        children = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait(pid) == -signal.SIGKILL
        psutil.wait_procs(children, timeout=60)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert forks.wait(forks.start_sweep(path)) == 0
    for name in ("sweep.md", "sweep.csv", "sweep.json", "sweep.png"):
        assert (place / name).read_bytes() == (tmp_path / "calm" / "sweeps" / "a" / name).read_bytes()
    assert len(record.read_bytes().splitlines()) == 8
    statuses = [row["status"] for row in csv.DictReader((place / "sweep.csv").read_text().splitlines())]
    assert {"finished", "pruned"} == set(statuses)
