"""TensorBoard, MLflow and W&B hold what the files of a run hold, whatever happened to the run or to their servers."""

import http.server
import json
import math
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from meristem.checkpoint.run import read
from meristem.checkpoint.store import newest
from meristem.events import silent
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import load_config
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from meristem.sinks.trackers.follow import scalars
from recipes.forks import Runs
from recipes.small import overrides, write_text

pytestmark = [pytest.mark.extras, pytest.mark.timeout(300)]

ALL = "sinks.use=[tensorboard,mlflow,wandb]"
SETTINGS = ("train.steps=40", "optim.lr=0.03", "guard.span=12", "rollback.snapshots=2", "rollback.snapshot_every=4")
GARBLED = (*range(17, 20), *range(29, 36))
"""Batches whose text is corrupt, so that the guard goes back: once, and later twice in a row."""

Values = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        runs = Runs()
        yield runs
        runs.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(write_text(tmp_path_factory.mktemp("trackers")), *SETTINGS)


def truth(run_dir: Path) -> Values:
    """What ``runs export`` gives, as lists of step and value."""
    found: Values = {}
    for record in history(run_dir):
        for name, value in scalars(record).items():
            found.setdefault(name, []).append((record["step"], value))
    return found


def of_tensorboard(run_dir: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def mlflow_run(run_dir: Path, run_id: str | None = None) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("meristem")
    tag = f"tags.`meristem.run` = '{run_id or read(run_dir)['id']}'"
    (run,) = client.search_runs([experiment.experiment_id], tag)
    return client, run


def of_mlflow(run_dir: Path, run_id: str | None = None) -> Values:
    client, run = mlflow_run(run_dir, run_id)
    read = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in read.items()}


def n_in_mlflow(run_dir: Path) -> int:
    """How many values MLflow holds, seen from beside the run."""
    path = run_dir.parent / "mlflow.db"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM metrics").fetchone()[0])


def of_wandb(run_dir: Path) -> Values:
    """The one offline file: records of protobuf in the blocks of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # the first or a middle part of a record
            continue
        record, whole = wandb_internal_pb2.Record(), (record_bytes := whole) and b""
        record.ParseFromString(record_bytes)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                found.setdefault(name, []).append((items["_step"], value))
    return {name: values for name, values in found.items() if "/" in name and name != "meristem/seq"}


def assert_agree(run_dir: Path) -> None:
    """All three hold the history, TensorBoard in single precision."""
    expected = truth(run_dir)
    assert expected["train/nats"] and of_mlflow(run_dir) == expected and of_wandb(run_dir) == expected
    found = of_tensorboard(run_dir)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values]
        assert all(
            math.isclose(got, value, rel_tol=1e-6) for (_, got), (_, value) in zip(found[name], values, strict=True)
        )


def kill_at(runs: Runs, pid: int, run_dir: Path, step: int) -> None:
    """SIGKILL once that step is recorded."""
    while not any(r["step"] >= step for r in _records(run_dir)):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    runs.wait(pid)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.ndjson"
    return list(read_records(path)) if path.exists() else []


def test_t2_kill_resume_and_rollback_leave_one_value_per_step(runs, small, tmp_path):
    """Killed 7 steps after a checkpoint, resumed, rolled back three times: each tracker equals the history."""
    settings = [*small, ALL, "checkpoint.every=8"]
    run_dir = tmp_path / "run"
    kill_at(runs, runs.start("charrnn", settings, run_dir, garbled=GARBLED), run_dir, 15)
    assert runs.run("charrnn", settings, run_dir, garbled=GARBLED) == 0
    names = [event["name"] for event in read_records(run_dir / "events.ndjson")]
    assert names.count("rollback.done") >= 2 and "run.resumed" in names
    steps = [r["step"] for r in _records(run_dir) if r["split"] == "train"]
    assert len(steps) > len(set(steps)), "no step was made twice, so nothing was tested"
    assert_agree(run_dir)
    assert mlflow_run(run_dir)[1].info.status == "FINISHED"


def test_cx_13_2_offline_is_the_default_and_one_id_reaches_all(small, tmp_path, monkeypatch):
    """CX-13.2: nothing but this machine is called, by name or by number; each tracker holds the id of the run."""
    called: list[object] = []

    def recorded(find, at):
        def call(*given, **named):
            place = given[at][0] if isinstance(given[at], tuple) else given[at]
            if not str(place).startswith(("127.", "::1", "localhost", "/", "None")):
                called.append(place)
                raise ConnectionRefusedError("no network here")
            return find(*given, **named)

        return call

    monkeypatch.setattr(socket, "getaddrinfo", recorded(socket.getaddrinfo, 0))
    monkeypatch.setattr(socket.socket, "connect", recorded(socket.socket.connect, 1))
    run_dir = pretrain(
        load_config("charrnn", [*small, ALL, "train.steps=5"], {}).tree, run_dir=tmp_path / "run"
    ).run_dir
    assert called == []
    assert_agree(run_dir)
    assert mlflow_run(run_dir)[1].data.tags["meristem.run"] == read(run_dir)["id"]
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{read(run_dir)['id']}"))) == 1
    assert {each["name"]: each["status"] for each in read(run_dir)["sinks"]} == dict.fromkeys(
        ("tensorboard", "mlflow", "wandb", "console"), "ok"
    )


def test_t1_resume_with_another_length_goes_on_in_the_same_run(runs, small, tmp_path):
    """SIGKILL, then other train.steps: MLflow's run is the same, keeps both values, and ends as finished.

    CX-13.2: the id of the run is that of TensorBoard and W&B, and all agree on every value, offline.
    """
    run_dir = tmp_path / "run"
    pid = runs.start("charrnn", [*small, ALL, "train.steps=100000"], run_dir)
    while not n_in_mlflow(run_dir):
        time.sleep(0.02)
    kill_at(runs, pid, run_dir, 20)
    client, run = mlflow_run(run_dir)
    assert run.info.status == "RUNNING"
    n_steps = _records(run_dir)[-1]["step"] + 4
    assert runs.run("charrnn", [*small, ALL, f"train.steps={n_steps}"], run_dir) == 0
    _, after = mlflow_run(run_dir)
    assert after.info.run_id == run.info.run_id and after.info.status == "FINISHED"
    assert after.data.params["train.steps"] == "100000" and after.data.params["train.steps.2"] == str(n_steps)
    assert {s["name"]: s["id"] for s in read(run_dir)["sinks"]} == {
        "tensorboard": read(run_dir)["id"],
        "mlflow": run.info.run_id,
        "wandb": read(run_dir)["id"],
        "console": None,
    }
    assert_agree(run_dir)


def test_t1_killed_after_any_commit_mlflow_has_one_run_of_it(tmp_path):
    """Also amid the making of its database, between a value and the tag that says it, and while a run is replaced.

    A run of MLflow is replaced where the run itself went back behind what was in it, and by no kill.
    """
    from mlflow.entities import ViewType

    program = Path(__file__).with_name("killed_mlflow.py")
    names = json.loads(subprocess.run([sys.executable, program, tmp_path], check=True, stdout=subprocess.PIPE).stdout)
    assert len(names) > 15
    for name in names:
        run_dir = tmp_path / name
        client, run = mlflow_run(run_dir, name)
        assert run.info.status == "FINISHED", name
        assert of_mlflow(run_dir, name) == truth(run_dir), name
        binned = client.search_runs([run.info.experiment_id], f"tags.`meristem.run` = '{name}'", ViewType.DELETED_ONLY)
        events = list(read_records(run_dir / "events.ndjson"))
        n_returns = sum(event["name"] == "rollback.done" for event in events)
        n_returns += sum(event["name"] == "run.ended" and event["payload"]["status"] == "failed" for event in events)
        assert len(binned) <= n_returns, name


def test_cx6_2_no_tracker_run_stays_active(runs, small, tmp_path):
    """After SIGTERM it is killed, after an error failed."""
    run_dir = tmp_path / "stopped"
    pid = runs.start("charrnn", [*small, ALL, "train.steps=100000"], run_dir)
    while not any(r["step"] >= 5 for r in _records(run_dir)):
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert runs.wait(pid) == 130
    assert mlflow_run(run_dir)[1].info.status == "KILLED"
    assert_agree(run_dir)
    assert runs.run("charrnn", [*small, ALL], tmp_path / "failed", "must") != 0
    assert mlflow_run(tmp_path / "failed")[1].info.status == "FAILED"


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(params=["closed", "hangs", "answers 500"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that is of no use."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            listening.listen(64)  # it accepts, and never says a word
        port = listening.getsockname()[1]
        if request.param != "answers 500":
            yield f"http://127.0.0.1:{port}"
            return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_address[1]}"
        answering.shutdown()


@pytest.fixture(scope="module")
def plain(runs: Runs, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no tracker follows."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert runs.run("charrnn", small, run_dir) == 0
    return run_dir


def test_t1_a_server_that_is_away_changes_nothing(runs, small, plain, tmp_path, server):
    """The same weights to the bit, one warning, and the manifest says that the tracker did not get it."""
    away = ["sinks.use=[mlflow]", f"sinks.places={{mlflow: '{server}'}}"]
    assert runs.run("charrnn", [*small, *away], tmp_path / "run") == 0
    ours, theirs = (newest(run_dir / "checkpoints", silent) for run_dir in (tmp_path / "run", plain))
    assert ours and theirs and ours.step == theirs.step == 40
    assert all(torch.equal(tensor, ours.tree("model")[name]) for name, tensor in theirs.tree("model").items())
    warnings = [e for e in read_records(tmp_path / "run" / "events.ndjson") if e["name"] == "sink.failed"]
    assert {e["payload"]["sink"] for e in warnings} == {"mlflow"}
    assert read(tmp_path / "run")["sinks"][0]["status"] in ("failed", "hung")
    assert truth(tmp_path / "run").keys() == truth(plain).keys()
