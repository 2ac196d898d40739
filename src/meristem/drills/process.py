"""Drills in which a process is at fault: one that is killed, hangs, or listens badly; and a clock that jumps."""

import contextlib
import datetime
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import rich.console
import torch

from meristem.checkpoint import journal
from meristem.checkpoint import manifest as manifests
from meristem.checkpoint import run as runs
from meristem.checkpoint.store import newest
from meristem.drills.drill import Drill, Seen
from meristem.drills.scene import N_STEPS, SAVED_EVERY, Scene
from meristem.drills.training import LONG, STRETCH, garble
from meristem.errors import WorkerTimeout
from meristem.events import Event, silent
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.sinks import records
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.worker.process import Worker

PATIENCE_S: Final = 60.0
"""How long is waited for something that must come."""

PROGRAM: Final = "from meristem.cli import main; main()"
DAY: Final = datetime.timedelta(days=1)
_DRAW: Final = random.Random()


class Victim:
    """A run in a process of its own, by the command that a user gives."""

    def __init__(self, scene: Scene, name: str, command: list[str]) -> None:
        self.run_dir = scene.place / name
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MERISTEM__")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", *command],
            env=clean | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def of(cls, scene: Scene, name: str, *more: str) -> "Victim":
        """One that trains what ``scene`` says."""
        options = ["--run-dir", str(scene.place / name), "--no-plan"]
        return cls(scene, name, [PROGRAM, "train", "titans-mag", *scene.settings(*more), *options])

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def is_alive(self) -> bool:
        """It has not ended."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Signal it, and nobody else should it be gone."""
        self._process.send_signal(number)

    def until(self, is_so: Callable[[], bool]) -> bool:
        """Wait for something; false when the process ended before."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            if not self.is_alive() or time.monotonic() > deadline_s:
                return False
            time.sleep(0.002)
        return True

    def ended(self) -> int:
        """Its exit code, or minus the signal that killed it."""
        return self._process.wait(PATIENCE_S)

    def n_steps(self) -> int:
        """How many steps it has recorded."""
        path = self.run_dir / "metrics.ndjson"
        return sum(b'"split":"train"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0

    def is_saving(self) -> bool:
        """A checkpoint is half written."""
        return any((self.run_dir / "checkpoints").glob(".step-*.partial"))


def killed(drill: Drill, place: Path) -> Seen:
    """SIGKILL at a random moment of the run, and the same command again."""
    scene = Scene.at(place)
    truth = scene.run("truth")
    at, share = _DRAW.randrange(1, N_STEPS), _DRAW.random()
    victim = Victim.of(scene, "run")
    victim.until(lambda: victim.n_steps() >= at)
    time.sleep(0.02 * share)
    victim.send(signal.SIGKILL)
    code = victim.ended()
    n_steps = victim.n_steps()
    again = scene.run("run")
    resumed = [event["resumed_from"] for event in again.events("run.resumed")][-1:]
    checks = {
        "the process was killed": code == -signal.SIGKILL,
        # One save may be in flight, and the one before it is then on the disk.
        "at most the checkpoint in flight is lost": bool(resumed) and resumed[0] >= n_steps - 1 - 2 * SAVED_EVERY,
        "the same command ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }
    return Seen(checks, {"killed_after_step": n_steps, "resumed_from": resumed})


def killed_while_saving(drill: Drill, place: Path) -> Seen:
    """SIGKILL while a checkpoint is half written."""
    scene = Scene.at(place)
    truth = scene.run("truth")
    victim = Victim.of(scene, "run")
    while victim.until(lambda: victim.is_saving() and victim.n_steps() > SAVED_EVERY):
        victim.send(signal.SIGSTOP)  # what is half written stays so until it is killed
        time.sleep(0.01)
        if victim.is_saving():
            break
        victim.send(signal.SIGCONT)
    victim.send(signal.SIGKILL)
    code = victim.ended()
    half = [path.name for path in (victim.run_dir / "checkpoints").glob(".step-*.partial")]
    n_steps = victim.n_steps()
    again = scene.run("run")
    resumed = [event["resumed_from"] for event in again.events("run.resumed")][-1:] or [-1]
    undone = [event["kind"] for event in again.events("journal.undone")]
    left = [path.name for path in (victim.run_dir / "checkpoints").glob(".step-*")]
    checks = {
        "the process was killed in the middle of a save": code == -signal.SIGKILL and len(half) == 1,
        "the journal shows it, and it is undone": undone == ["save"],
        "the half checkpoint is gone": not left,
        "the run goes on from the checkpoint before it": half == [f".step-{resumed[0] + SAVED_EVERY:08d}.partial"],
        "the same command ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }
    return Seen(checks, {"half": half, "killed_after_step": n_steps, "resumed_from": resumed})


def killed_in_rollback(drill: Drill, place: Path) -> Seen:
    """SIGKILL after a rollback has put weights and moments back, and before it is done."""
    scene, steps = Scene.at(place), f"train.steps={LONG}"
    truth = scene.run("truth", steps, breaks=garble(STRETCH))
    victim = Victim(scene, "run", [f"from {__name__} import die; die()", str(place)])
    code = victim.ended()
    found = journal.uncommitted(journal.read(victim.run_dir / "journal"))
    again = scene.run("run", steps, breaks=garble(STRETCH))
    undone = [event["kind"] for event in again.events("journal.undone")]
    n_back = [len(ended.events("rollback.done")) for ended in (truth, again)]
    checks = {
        "the process was killed in the middle of a rollback": code == -signal.SIGKILL
        and [record.kind for record in found] == ["rollback"],
        "the journal shows it, and it is undone": undone == ["rollback"],
        "the run rolls back again, as an undisturbed one does": n_back[0] == n_back[1] >= 1,
        "the same command ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }
    return Seen(checks, {"rollbacks": n_back[1], "steps": again.n_steps()})


def die() -> None:
    """Make the run of the drill above in this process, and kill it in its first rollback."""

    def breaks(run: Run, job: Job) -> Job:
        def hook(*_: object) -> None:
            # Among what the model reads without training is the probe that ends a rollback.
            if not torch.is_grad_enabled():
                open_ones = journal.uncommitted(journal.read(run.directory / "journal"))
                if any(record.kind == "rollback" for record in open_ones):
                    os.kill(os.getpid(), signal.SIGKILL)

        job.model.register_forward_pre_hook(hook)
        return garble(STRETCH)(run, job)

    Scene(Path(sys.argv[1])).run("run", f"train.steps={LONG}", breaks=breaks)


def terminated(drill: Drill, place: Path) -> Seen:
    """SIGTERM, as a machine sends it that is shut down."""
    scene, no_saves = Scene.at(place), ("checkpoint.every=1000", "eval.every=1000")
    truth = scene.run("truth", *no_saves)
    victim = Victim.of(scene, "run", *no_saves)
    victim.until(lambda: victim.n_steps() >= 3)
    victim.send(signal.SIGTERM)
    code = victim.ended()
    saved = newest(victim.run_dir / "checkpoints", silent)
    n_steps, status = victim.n_steps(), runs.read(victim.run_dir)["status"]
    again = scene.run("run", *no_saves)
    recorded = [r["step"] for r in read_records(again.run_dir / "metrics.ndjson") if r["split"] == "train"]
    checks = {
        "the process ends with exit code 130": code == 130 and status == "interrupted",
        "after saving the step in progress": saved is not None
        and saved.step == n_steps
        and saved.manifest["reason"] == "signal",
        "the same command goes on, and makes no step twice": recorded == list(range(1, N_STEPS + 1)),
        "and ends as an undisturbed run, to the bit": again.exit_code == 0 and again.is_same_as(truth),
    }
    return Seen(checks, {"exit_code": code, "steps": n_steps})


def hanging_worker(drill: Drill, place: Path) -> Seen:
    """A call in another process that never comes back."""
    events: list[Event] = []
    with Worker("drill", n_spare=1, emit=events.append) as worker:
        worker.ready(PATIENCE_S)
        began, late, pid = time.monotonic(), "", None
        try:
            worker.call("time:sleep", 3600, 0.5)
        except WorkerTimeout as error:
            late, pid = str(error), cast(int, error.fields["pid"])
        seconds = time.monotonic() - began
        answer = worker.call("math:sqrt", 9, PATIENCE_S)
    checks = {
        "the call ends at its deadline, as WorkerTimeout": bool(late) and seconds < 0.5 + 1.0,
        "its process is gone": pid is not None and not _is_there(pid),
        "the next call returns": answer == 3,
        "a new process takes its place, as an event says": [event.name for event in events] == ["worker.restarted"],
    }
    return Seen(checks, {"message": late, "seconds": round(seconds, 3)})


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Screen:
    """A text file for a console, whose writes do what ``write`` does."""

    encoding = "utf-8"

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self.n_writes = 0

    def write(self, text: str) -> int:
        """Take some text, or fail to."""
        self.n_writes += 1
        self._write()
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        """Lines, and no live view."""
        return False


def listened_to(make: Callable[[threading.Event], Callable[[], None]], status: str) -> Callable[[Drill, Path], Seen]:
    """A screen that takes no more text, in the way that ``make`` gives; the event is set when the drill is over."""

    def act(drill: Drill, place: Path) -> Seen:
        scene, is_over = Scene.at(place), threading.Event()
        truth = scene.run("truth")
        screen = Screen(make(is_over))
        view = Console(screen=rich.console.Console(file=cast(IO[str], screen)))
        began = time.monotonic()
        try:
            ended = scene.run("run", view=view)
        finally:
            is_over.set()
        seconds = time.monotonic() - began
        failed = ended.events("sink.failed")
        found = [sink["status"] for sink in runs.read(ended.run_dir)["sinks"]]
        checks = {
            "the run ends as an undisturbed one, to the bit": ended.exit_code == 0 and ended.is_same_as(truth),
            "it was met, and not waited for": screen.n_writes > 0 and seconds < PATIENCE_S / 2,
            "one event names the sink": len(failed) == 1,
            f"the manifest says what became of it: {status}": found == [status],
        }
        return Seen(checks, {"seconds": round(seconds, 1), "failed": failed})

    return act


def _hang(is_over: threading.Event) -> Callable[[], None]:
    return lambda: cast(None, is_over.wait(PATIENCE_S))


def _die(_: threading.Event) -> Callable[[], None]:
    def write() -> None:
        raise OSError(5, os.strerror(5))

    return write


@contextlib.contextmanager
def jumping(jumps: Callable[[], datetime.timedelta]) -> Iterator[None]:
    """Inside, every time that a run writes down is off by what ``jumps`` says then."""

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + jumps()

    modules: tuple[Any, ...] = (records, runs, manifests)
    usual = [module.datetime for module in modules]
    for module in modules:
        module.datetime = types.SimpleNamespace(datetime=Jumping, UTC=datetime.UTC)
    try:
        yield
    finally:
        for module, was in zip(modules, usual, strict=True):
            module.datetime = was


def clock_jump(drill: Drill, place: Path) -> Seen:
    """The clock of the system jumps back by a day in the middle of a run, and later on by two."""
    scene = Scene.at(place)
    truth = scene.run("truth")
    progress = {"step": 0}

    def off() -> datetime.timedelta:
        return -DAY if 6 <= progress["step"] < 16 else DAY if progress["step"] >= 16 else datetime.timedelta()

    def breaks(run: Run, job: Job) -> Job:
        def hook(*_: object) -> None:
            progress["step"] += 1

        job.optimizer.register_step_post_hook(hook)
        return job

    with jumping(off):
        ended = scene.run("run", breaks=breaks)
    recorded = list(read_records(ended.run_dir / "metrics.ndjson"))
    times = [datetime.datetime.fromisoformat(record["ts"]) for record in recorded]
    n_back = sum(after < before for before, after in zip(times, times[1:], strict=False))
    last = newest(ended.run_dir / "checkpoints", silent)
    checks = {
        "the clock jumped back, and the records show it": n_back == 1,
        "the numbers of the records go on all the same": _rises([record["seq"] for record in recorded]),
        "the newest checkpoint is the last one": last is not None and last.step == N_STEPS,
        "the run ends as an undisturbed one, to the bit": ended.exit_code == 0 and ended.is_same_as(truth),
    }
    return Seen(checks, {"n_back": n_back, "exit_code": ended.exit_code, "steps": ended.n_steps()})


def _rises(numbers: list[int]) -> bool:
    return numbers == sorted(set(numbers))


DRILLS: Final = (
    Drill(
        "killed",
        "the process is killed at a random moment (SIGKILL, or the power)",
        "nothing; what was saved is whole",
        "the same command goes on from the last checkpoint, to the bit",
        None,
        killed,
    ),
    Drill(
        "killed-while-saving",
        "the process is killed while a checkpoint is half written",
        "the next process undoes the save and goes on from the checkpoint before it",
        "`journal.undone`; the same command goes on, to the bit",
        None,
        killed_while_saving,
    ),
    Drill(
        "killed-in-rollback",
        "the process is killed in the middle of a rollback",
        "the next process undoes it, comes to the same place from the last checkpoint and rolls back again",
        "`journal.undone`; the same command goes on, to the bit",
        None,
        killed_in_rollback,
    ),
    Drill(
        "terminated",
        "the process gets a signal to end (SIGTERM, Ctrl-C)",
        "ends after the step in progress, with a checkpoint of it",
        "the same command goes on, and no step is made twice",
        130,
        terminated,
    ),
    Drill(
        "hanging-worker",
        "a call in another process never comes back",
        "kills that process at the deadline of the call, and starts another",
        "`WorkerTimeout` says what was waited for; the caller decides",
        None,
        hanging_worker,
    ),
    Drill(
        "slow-sink",
        "the screen takes no more text and blocks",
        "does not wait for it: the sink has a queue and a thread of its own, and 2 s at the end",
        "`sink.failed`, and `hung` in run.json; the files of records are whole",
        0,
        listened_to(_hang, "hung"),
    ),
    Drill(
        "dying-sink",
        "the screen fails at every write",
        "goes on without it",
        "`sink.failed` with the cause; the files of records are whole",
        0,
        listened_to(_die, "ok"),
    ),
    Drill(
        "clock-jump",
        "the clock of the system jumps back by a day, and later on by two",
        "goes on: nothing is decided by that clock",
        "records are ordered by `seq`, whatever their times say; nothing to do",
        0,
        clock_jump,
    ),
)
