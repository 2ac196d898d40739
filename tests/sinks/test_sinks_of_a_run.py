"""A run ends the same whatever its sinks and its screen do, and its directory is complete."""

import io
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import rich.console
import torch

from meristem.checkpoint.run import read
from meristem.checkpoint.store import newest
from meristem.errors import NoCheckpoint, SinkError
from meristem.events import silent
from meristem.recipes import pretrain as recipe
from meristem.recipes.pretrain import Result, pretrain
from meristem.runs.directory import opened
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from meristem.sinks.trackers import start
from meristem.sinks.trackers.follow import Followed
from recipes.small import config, overrides, write_text

BRIEF = ("train.steps=12", "checkpoint.every=4", "eval.n_samples=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("sinks"))


@pytest.fixture(scope="module")
def plain(text: Path) -> Result:
    """A run that only its files listen to, and a screen that takes everything."""
    return run(text, text.parent / "plain")


@pytest.fixture
def show_to(monkeypatch: pytest.MonkeyPatch):
    """Give the sinks that the next runs have."""
    return lambda sinks: monkeypatch.setattr(recipe, "opened", partial(opened, sinks=sinks))


def run(text: Path, place: Path, *settings: str, view: Console | None = None, resume: str = "auto") -> Result:
    view = view or Console(screen=rich.console.Console(file=io.StringIO()))
    return pretrain(config(text, *BRIEF, *settings), run_dir=place, view=view, resume=resume)


def events(place: Path, *names: str) -> list[dict]:
    return [event for event in read_records(place / "events.ndjson") if event["name"] in names]


def losses(place: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["metrics"]["nats"]) for r in history(place) if r["split"] == "train"]


def assert_same(found: Result, truth: Result) -> None:
    """The same losses and weights to the bit, and the same files."""
    assert losses(found.run_dir) == losses(truth.run_dir) and losses(found.run_dir)
    ours, theirs = (newest(result.run_dir / "checkpoints", silent) for result in (found, truth))
    assert ours and theirs and ours.step == theirs.step
    for name, tensor in theirs.tree("model").items():
        assert torch.equal(ours.tree("model")[name], tensor)
    listed = [{path.name for path in result.run_dir.iterdir()} for result in (found, truth)]
    assert listed[0] == listed[1]
    assert read(found.run_dir)["status"] == "finished"


class Tracker:
    """A sink that remembers; ``at_first`` is called with its first metrics."""

    def __init__(self, at_first=lambda: None) -> None:
        self.got: list[dict] = []
        self.is_closed = False
        self._at_first = at_first

    def __call__(self, record) -> None:
        if "metrics" in record and not any("metrics" in got for got in self.got):
            self._at_first()
        self.got.append(record)

    def close(self) -> None:
        self.is_closed = True


def test_cx6_1_sink_that_raises_on_every_call_changes_nothing(text, plain, tmp_path, show_to):
    """Same losses, weights and files; one warning; the manifest says what became of it. Another sink gets all."""

    def broken(record):
        raise ConnectionError("the tracker is down")

    tracker = Tracker()
    show_to({"broken": broken, "tracker": tracker})
    result = run(text, tmp_path / "run")
    assert_same(result, plain)
    (failed,) = events(result.run_dir, "sink.failed")
    assert failed["severity"] == "warning" and failed["payload"]["sink"] == "broken"
    sinks = {sink["name"]: sink for sink in read(result.run_dir)["sinks"]}
    assert list(sinks) == ["broken", "tracker", "console"]
    assert sinks["broken"]["status"] == "failed" and sinks["broken"]["dropped"] > 12
    assert sinks["tracker"] == {"name": "tracker", "id": None, "status": "ok", "dropped": 0}
    scalars = [(r["step"], r["split"], r["metrics"]) for r in tracker.got if "metrics" in r]
    assert scalars == [(r["step"], r["split"], r["metrics"]) for r in read_records(result.run_dir / "metrics.ndjson")]


@pytest.mark.fault
def test_cx6_1_sink_that_hangs_costs_the_run_its_end_time(text, plain, tmp_path, show_to):
    """From its first call on it never answers; the run trains on and waits two seconds for it at the end."""
    begun_s = time.monotonic()
    run(text, tmp_path / "free")
    free_s = time.monotonic() - begun_s
    show_to({"hangs": lambda record: threading.Event().wait(60)})
    begun_s = time.monotonic()
    result = run(text, tmp_path / "run")
    assert time.monotonic() - begun_s < 3 * free_s + 3
    assert_same(result, plain)
    assert read(result.run_dir)["sinks"][0]["status"] == "hung"
    assert [e["payload"]["sink"] for e in events(result.run_dir, "sink.failed")] == ["hangs"]


def test_cx6_2_sinks_are_closed_at_the_end(text, tmp_path, show_to):
    """The last thing they get is how the run ended."""
    tracker = Tracker()
    show_to({"tracker": tracker})
    run(text, tmp_path / "run")
    assert tracker.is_closed and tracker.got[-2]["name"] == "run.ended"
    assert tracker.got[-1]["schema"] == "meristem.system/1"  # the sampler's last reading


def test_cx6_2_sinks_are_closed_after_an_exception(text, tmp_path, show_to):
    """They get the exception and the end before they are closed."""
    tracker = Tracker()
    show_to({"tracker": tracker})
    with pytest.raises(NoCheckpoint):
        run(text, tmp_path / "run", resume="must")
    assert tracker.is_closed
    assert [r["name"] for r in tracker.got if "name" in r][-2:] == ["exception", "run.ended"]


def test_cx6_2_sinks_are_closed_after_sigterm_in_training(text, tmp_path, show_to):
    """The run ends after the step in progress, interrupted and saved."""
    tracker = Tracker(lambda: os.kill(os.getpid(), signal.SIGTERM))
    show_to({"tracker": tracker})
    result = run(text, tmp_path / "run", "train.steps=100000")
    assert result.status == "interrupted" and result.exit_code == 130
    assert tracker.is_closed
    assert [r["payload"] for r in tracker.got if r.get("name") == "run.ended"] == [
        {"status": "interrupted", "exit": 130}
    ]


def test_cx6_2_sinks_are_closed_after_sigterm_before_training(text, tmp_path, show_to, monkeypatch):
    """Where no step could end first the run unwinds as after Ctrl-C, and the signal is the system's again."""
    tracker = Tracker()
    show_to({"tracker": tracker})

    def prepare(*_arguments, **_more):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(recipe, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "run")
    assert tracker.is_closed
    assert read(tmp_path / "run")["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def screen_of(descriptor: int) -> Console:
    return Console(screen=rich.console.Console(file=os.fdopen(descriptor, "w"), force_terminal=True, width=80))


def test_closed_terminal_changes_nothing(text, plain, tmp_path, monkeypatch):
    """The terminal goes away in the middle of training: one warning in the records, and the run ends as it would."""
    ours, terminal = os.openpty()
    view, open_ends = screen_of(terminal), [ours]
    update = view.update

    def closing(*fields, loss=None, **more):
        if loss is not None and open_ends:
            os.close(open_ends.pop())
        update(*fields, loss=loss, **more)

    monkeypatch.setattr(view, "update", closing)
    result = run(text, tmp_path / "run", view=view)
    assert_same(result, plain)
    (failed,) = events(result.run_dir, "sink.failed")
    assert failed["payload"]["sink"] == "console" and "Input/output error" in failed["payload"]["cause"]
    assert not type(sys.stderr).__module__.startswith("rich")


@pytest.mark.fault
def test_terminal_that_takes_nothing_holds_nothing_up(text, plain, tmp_path):
    """A terminal that nobody reads, as one stopped with Ctrl-S: writing to it would block for ever."""
    ours, terminal = os.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    result = run(text, tmp_path / "run", view=screen_of(terminal))
    assert_same(result, plain)
    assert [(sink["name"], sink["status"]) for sink in read(result.run_dir)["sinks"]] == [("console", "hung")]
    (failed,) = events(result.run_dir, "sink.failed")
    assert failed["payload"]["sink"] == "console"
    os.close(ours)  # lets the thread go that still writes


def test_pipe_without_a_reader_changes_nothing(text, plain, tmp_path):
    """As with ``meristem train ... | head -1``: rich by itself would end the process."""
    reading, writing = os.pipe()
    os.close(reading)
    view = Console(screen=rich.console.Console(file=os.fdopen(writing, "w"), force_terminal=False))
    result = run(text, tmp_path / "run", view=view)
    assert_same(result, plain)
    (failed,) = events(result.run_dir, "sink.failed")
    assert "BrokenPipe" in failed["payload"]["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_command_survives_the_reader_of_its_words(text, tmp_path, stream):
    """Its reader takes one line and goes: the run finishes with exit code 0. With --json the result is on stdout."""
    words = ["train", "charrnn", *overrides(text, *BRIEF), "--run-dir", str(tmp_path / "run"), "--no-plan"]
    words += ["--json"] if stream == "stderr" else []
    process = subprocess.Popen(
        [sys.executable, "-c", "from meristem.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    lost, kept = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    assert lost.readline()
    lost.close()
    said = kept.read()
    assert process.wait(60) == 0, said
    assert read(tmp_path / "run")["status"] == "finished"
    assert [e["payload"]["sink"] for e in events(tmp_path / "run", "sink.failed")] == ["console"]
    assert ('"status":"finished"' in said.replace(" ", "")) == (stream == "stderr")
    assert "Traceback" not in said


@pytest.mark.parametrize("was_there", [False, True])
def test_cx_13_3_a_tracker_that_cannot_start_leaves_nothing(text, tmp_path, monkeypatch, was_there):
    """CX-6.4: one sentence, and no run: the directory is not made, or holds what it held."""

    def broken(run: Followed) -> None:
        raise OSError("no room\n  at all")

    monkeypatch.setitem(start.trackers._entries, "broken", broken)
    monkeypatch.setattr(start, "_require_library", lambda name: None)
    run_dir = tmp_path / "run"
    if was_there:
        run_dir.mkdir()
        (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(SinkError, match=r"the sink 'broken' cannot start: OSError: no room\. Mend that"):
        pretrain(config(text, "sinks.use=[broken]"), run_dir=run_dir)
    left = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else None
    assert left == (["notes.txt", "run.lock"] if was_there else None)
    assert pretrain(config(text, "train.steps=2"), run_dir=run_dir).status == "finished"
