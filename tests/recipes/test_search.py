"""A search draws from what is known and nothing else; a run is ended by what it recorded, whenever that is read."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meristem.cli import app
from meristem.errors import ConflictingKeys, MissingExtra
from meristem.events import Event
from meristem.recipes.sweeps import run as run_room
from meristem.recipes.sweeps import work
from meristem.recipes.sweeps.config import PruneConfig, SearchConfig, SweepConfig, read_sweep
from meristem.recipes.sweeps.picture import plot_sweep
from meristem.recipes.sweeps.points import Row, point_of
from meristem.recipes.sweeps.prune import Ruling, ruling
from meristem.recipes.sweeps.run import sweep
from meristem.recipes.sweeps.search import drawn, pruned_at, require_optuna
from meristem.recipes.sweeps.table import ordered
from meristem.sinks.records import Records
from recipes.test_sweep import TINY, written

KEYS = {"optim.lr": {"low": 1e-5, "high": 1.0, "log": True}, "optim.name": ["adamw", "muon", None]}
SEARCH = SearchConfig.model_validate({"n": 40, "n_random": 3, "keys": KEYS})


def row(point: int, settings: dict, value: float | None, **more: object) -> Row:
    return Row(point, settings, "finished", 0, value, 10, **more)


def cost(settings: dict) -> float:
    """Least at a rate of 0.01 with one of the choices."""
    return (math.log10(settings["optim.lr"]) + 2) ** 2 + (settings["optim.name"] is not None)


@pytest.mark.extras
def test_a_search_goes_where_earlier_points_were_good() -> None:
    """Two at a time, of which one knows nothing of the other, most points are near the best rate and the best choice.

    Drawn again from the same rows it is the same, also where these came back from JSON, and with the sign of the metric
    negated about.
    """
    rows = [row(n, {"optim.lr": lr, "optim.name": "adamw"}, None) for n, lr in enumerate((1e-4, 1e-3, 0.5), 1)]
    rows = [row(each.point, each.settings, cost(each.settings)) for each in rows]
    rows.append(Row(4, {"optim.lr": 0.9, "optim.name": "muon"}, "failed", 5, None, None))
    for number in range(5, 41):
        known, pending = rows[: number - 2], [each.settings for each in rows[number - 2 :]]
        settings = drawn(SEARCH, number, known, pending, lower_is_better=True)
        again = [Row(**{**json.loads(json.dumps(vars(each))), "reports": ()}) for each in known]
        negated = [replace(each, value=None if each.value is None else -each.value) for each in again]
        assert settings == drawn(SEARCH, number, negated, pending, lower_is_better=False)
        rows.append(row(number, settings, cost(settings)))
    found = [each.settings for each in rows[4:]]
    assert sum(settings["optim.name"] is None for settings in found) >= 18  # 12 of 36 at random
    assert sum(1e-3 <= settings["optim.lr"] <= 1e-1 for settings in found) >= 20  # 14 at random
    assert all(1e-5 <= settings["optim.lr"] <= 1.0 for settings in found)


@pytest.mark.extras
def test_a_run_is_compared_with_those_that_finished() -> None:
    """At each evaluation, with the best that it had so far, once enough of them are known and from a step on."""
    rows = [row(n, {}, 1.0, reports=((2, 3.0 + n), (4, 2.0 + n))) for n in range(4)]
    rows.append(Row(9, {}, "pruned", 0, 99.0, 2, ((2, 99.0),)))
    prune = PruneConfig(percentile=50.0, after_points=4)

    def at(*reports: tuple[int, float], prune: PruneConfig = prune, rows: list[Row] = rows) -> int | None:
        return pruned_at(prune, reports, rows, lower_is_better=True)

    assert at((2, 4.0), (4, 3.0)) is None and at((2, 5.0)) == 2 and at((2, 4.0), (4, 3.9), (6, 9.0)) == 4
    assert at((2, 9.0), rows=rows[:3]) is None
    assert at((2, 9.0), (4, 9.0), prune=prune.model_copy(update={"after_step": 3})) == 4
    assert pruned_at(prune, [(2, 9.0)], rows, lower_is_better=False) is None


def test_what_the_guard_did_is_counted_once(tmp_path: Path) -> None:
    """A resume makes some rollbacks again. Whenever the records are read, the answer is none yet, or the same one."""
    config = SweepConfig(name="a", list=({},), prune=PruneConfig(rollbacks=2, warnings=3))
    records, found = Records(tmp_path, "run"), []

    def say(name: str, **payload: object) -> None:
        records.event(Event(name, payload))
        found.append(ruling(config, tmp_path, 20, ()))

    records.metrics(4, 4, 0.0, "val", {"bits_per_byte": 5.0})
    say("rollback.done", resumed_from=3)
    say("guard.verdict", level="warn", step=5)
    say("guard.verdict", level="panic", step=5)
    say("run.resumed", resumed_from=2, seq=1)
    say("guard.verdict", level="warn", step=5)
    say("rollback.done", resumed_from=3)
    records.metrics(6, 6, 0.0, "val", {"bits_per_byte": 4.0})
    say("guard.verdict", level="warn", step=6)
    assert found == [None] * 7
    say("rollback.done", resumed_from=5)
    records.metrics(8, 8, 0.0, "val", {"bits_per_byte": 3.0})
    say("guard.verdict", level="warn", step=9)
    records.close()
    assert found[-2:] == [Ruling(((4, 5.0), (6, 4.0)), "rollbacks of its guard: 2")] * 2


def test_without_optuna_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'meristem\[sweep\]'"):
        sweep(read_sweep(written(tmp_path, search={"n": 9, "keys": KEYS})), print)
    assert not (tmp_path / "sweeps").exists()
    require_optuna(read_sweep(written(tmp_path, list=[{}], prune={"rollbacks": 1})))


@pytest.mark.extras
def test_a_search_is_shown_before_it_starts(tmp_path: Path) -> None:
    """The points drawn at random as they are, of the others what each waits for; how many at once is part of it."""
    path = written(tmp_path, search={"n": 7, "n_random": 4, "keys": {"run.seed": [1, 2]}}, jobs=3)
    said = CliRunner().invoke(app, ["config", "sweep", str(path), "--json"])
    points = json.loads(said.stdout)
    assert [point["number"] for point in points] == list(range(1, 8))
    assert [point["settings"] is None for point in points] == [False] * 4 + [True] * 3
    assert (
        "007    drawn from what the first 4 come to" in CliRunner().invoke(app, ["config", "sweep", str(path)]).stdout
    )
    (tmp_path / "sweeps" / "a").mkdir(parents=True)
    (tmp_path / "sweeps" / "a" / "sweep.yaml").write_text(path.read_text().replace("jobs: 3", "jobs: 2"))
    with pytest.raises(ConflictingKeys, match="holds another sweep"):
        sweep(read_sweep(path), print)


def test_the_picture_shows_what_there_is(tmp_path: Path) -> None:
    """Numbers, choices, a key that does not differ, points without a value; and nothing at all."""
    pytest.importorskip("matplotlib")
    config = SweepConfig(name="a", list=({},))
    rows = [
        row(1, {"optim.lr": 0.1, "optim.name": "adamw", "run.seed": 0}, 3.0, reports=((2, 5.0), (4, 4.0))),
        Row(2, {"optim.lr": 0.001, "optim.name": None, "run.seed": 0}, "pruned", 0, 4.5, 2, ((2, 4.5),), "why"),
        Row(3, {"optim.lr": 0.002, "optim.name": "muon", "run.seed": 0}, "failed", 5, None, None),
    ]
    assert [each.point for each in ordered(config, rows)] == [1, 2, 3]
    plot_sweep(config, tmp_path, ordered(config, rows))
    size_bytes = (tmp_path / "sweep.png").stat().st_size
    plot_sweep(config, tmp_path, rows[2:])
    assert size_bytes > (tmp_path / "sweep.png").stat().st_size > 1000


class Process:
    """A run that nobody has started."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.signals: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.signals.append("terminate")

    def kill(self) -> None:
        self.signals.append("kill")


def test_a_run_is_ended_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its records say so it gets one signal, is killed where it does not end; the decision stays what it was."""
    config, process, now_s = SweepConfig(name="a", list=({},), prune=PruneConfig(rollbacks=1)), Process(), [0.0]
    monkeypatch.setattr(work, "started", lambda words, log: process)
    monkeypatch.setattr(work.time, "monotonic", lambda: now_s[0])
    processes = work.Processes(config, tmp_path)
    processes.start(point_of(config, 1, {}), 20, (), 0)
    records = Records(processes.run_dir(1), "run")

    def look() -> list:
        now_s[0] += 1
        return list(processes.ended())

    records.metrics(2, 2, 0.0, "val", {"bits_per_byte": 5.0})
    assert look() == [] and process.signals == []
    records.event(Event("rollback.done", {"resumed_from": 1}))
    records.close()
    assert look() == look() == [] and process.signals == ["terminate"]
    now_s[0] += 61
    assert look() == [] and process.signals == ["terminate", "kill"]
    process.code = -9
    ((point, code, found),) = look()
    assert (point.number, code, found) == (1, -9, Ruling(((2, 5.0),), "rollbacks of its guard: 1"))
    assert look() == []


class Killed(Exception):
    """In the middle of a sweep."""


def swept(path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, n_kills: int) -> tuple[dict[str, bytes], list[int]]:
    """The tables of a sweep whose runs last as long as it pleases the seed, and the order in which they ended."""
    chance, order = random.Random(seed), []

    def started(words: list[str], log: Path) -> Process:
        """A run that writes its records at once, and ends some polls later."""
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        run_dir, lr = Path(words[words.index("--run-dir") + 1]), float(settings["optim.lr"])
        records = Records(run_dir, "run")
        for step in (2, 4, 6, 6):
            records.metrics(step, step, 0.0, "val", {"bits_per_byte": (math.log10(lr) + 2) ** 2 + 1 / step})
        records.close()
        process, n_left = Process(), [chance.randrange(1, 9)]

        def poll() -> int | None:
            n_left[0] -= 1
            if n_left[0] == 0:
                order.append(int(run_dir.name))
            return 0 if n_left[0] <= 0 else None

        monkeypatch.setattr(process, "poll", poll)
        monkeypatch.setattr(process, "wait", lambda timeout=None: 0, raising=False)
        return process

    monkeypatch.setattr(work, "started", started)
    for number in range(n_kills):
        n_said = [0]

        def say(line: str, most: int = number + 2, n_said: list[int] = n_said) -> None:
            n_said[0] += 1
            if n_said[0] == most:
                raise Killed

        with pytest.raises(Killed):
            sweep(read_sweep(path), say)
    sweep(read_sweep(path), lambda line: None)
    place = path.parent / "sweeps" / "a"
    return {name: (place / name).read_bytes() for name in ("sweep.md", "sweep.json", "points.ndjson")}, order


@pytest.mark.extras
def test_which_run_ends_first_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once, which end in any order; cut off three times and started again: the same points, ended alike."""
    monkeypatch.setattr(run_room, "_POLL_S", 0.0)
    monkeypatch.setattr(run_room, "plot_sweep", lambda *given: None)
    monkeypatch.setattr(work, "_LOOK_EVERY_S", 0.0)
    keys = {"optim.lr": {"low": 1e-5, "high": 1.0, "log": True}}
    settings, found = TINY | {"eval.every": 2}, []
    for seed, n_kills in ((1, 0), (2, 0), (3, 3)):
        (tmp_path / str(seed)).mkdir()
        search = {"n": 14, "n_random": 4, "keys": keys}
        path = written(tmp_path / str(seed), search=search, prune={"percentile": 50.0}, jobs=3, settings=settings)
        found.append(swept(path, monkeypatch, seed, n_kills))
    (tables, order), (other_tables, other_order), (killed_tables, _) = found
    assert tables == other_tables == killed_tables and order != other_order
    statuses = [each["status"] for each in json.loads(tables["sweep.json"])]
    assert len(statuses) == 14 and set(statuses) == {"finished", "pruned"}
