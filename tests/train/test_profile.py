"""Traces of training: exactly the steps that were asked for, and no trace of the tracing in what is trained."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.profiler import record_function

from meristem.config import ConfigSection, load
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import ConfigError, DeadKey
from meristem.events import Event, silent
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build as build_optimizer
from meristem.train.config import ProfileConfig, TrainConfig
from meristem.train.loop import steps
from meristem.train.profile import activities, profiled
from meristem.train.progress import Progress
from meristem.train.state import Held

CPU = torch.device("cpu")


class Recorded:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[dict[str, object]]:
        return [dict(event.payload) for event in self.events if event.name == name]


def work(
    n_steps: int, config: ProfileConfig, directory: Path | None, emit: Recorded, device: torch.device = CPU
) -> list[int]:
    """Steps that leave a mark with their number; gives those that wrote something."""
    wrote = []
    with profiled(config, directory, device, emit) as tick:
        for step in range(1, n_steps + 1):
            with record_function("forward"), record_function(f"mark {step}"):
                torch.ones(8).sum()
            if tick(step):
                wrote.append(step)
    return wrote


def names_in(trace: Path) -> list[str]:
    return [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]


def marks(trace: Path) -> list[int]:
    """The steps of which a trace holds the work, each as often as it does."""
    found = [re.fullmatch(r"mark (\d+)", name) for name in names_in(trace)]
    return sorted(int(match[1]) for match in found if match)


@pytest.mark.parametrize(
    ("wait", "warmup", "n_active", "repeat", "windows"),
    [
        (0, 1, 3, 1, [[2, 3, 4]]),
        (3, 1, 3, 1, [[5, 6, 7]]),
        (1, 2, 3, 2, [[4, 5, 6], [10, 11, 12]]),
        (0, 1, 1, 3, [[2], [4], [6]]),
    ],
)
def test_l17_exactly_the_steps_that_were_asked_for(tmp_path, wait, warmup, n_active, repeat, windows):
    """Wait, warm up, trace, and that so often; then never again, however long the run goes on."""
    part, emit = ProfileConfig(steps=n_active, wait=wait, warmup=warmup, repeat=repeat), Recorded()
    wrote = work(20, part, tmp_path, emit)
    assert wrote == [window[-1] for window in windows]
    traces = sorted(tmp_path.glob("*.json"))
    assert [trace.stem for trace in traces] == [f"step-{window[-1]:06d}" for window in windows]
    assert [marks(trace) for trace in traces] == windows
    assert [sum(name.startswith("ProfilerStep#") for name in names_in(trace)) for trace in traces] == [
        n_active
    ] * repeat
    assert emit.named("profile.written") == [
        {"trace": str(trace), "table": str(trace.with_suffix(".txt")), "steps": n_active, "traced": ["cpu"]}
        for trace in traces
    ]
    assert len(emit.events) == repeat


@pytest.mark.parametrize(("n_steps", "n_recorded"), [(1, 0), (4, 0), (5, 1), (6, 2)])
def test_l17_a_window_that_is_cut_short_says_so(tmp_path, n_steps, n_recorded):
    """What was traced by then is written all the same."""
    emit = Recorded()
    work(n_steps, ProfileConfig(steps=3), tmp_path, emit)
    assert emit.named("profile.cut_short") == [{"recorded_steps": n_recorded, "wanted_steps": 3, "at_step": n_steps}]
    traces = list(tmp_path.glob("*.json"))
    assert [trace.name for trace in traces] == ([f"step-{n_steps:06d}.json"] if n_recorded else [])
    assert [marks(trace) for trace in traces] == ([list(range(5, n_steps + 1))] if n_recorded else [])


def test_off_does_nothing(tmp_path):
    """No directory, no events, no tracer."""
    emit = Recorded()
    assert work(3, ProfileConfig(), None, emit) == work(3, ProfileConfig(), tmp_path / "profile", emit) == []
    assert emit.events == [] and not (tmp_path / "profile").exists()


def test_the_table_says_where_the_time_went(tmp_path):
    """Phases and what is left of the step come to the whole; so do the operations, each counted without its callees."""

    def step() -> None:
        with record_function("data"):
            left = torch.randn(100, 90)
        with record_function("forward"):
            for _ in range(4):
                left @ left.T
        with record_function("optimizer"):
            left.add_(1)

    with profiled(ProfileConfig(steps=2, wait=0), tmp_path, CPU, silent) as tick:
        for number in range(1, 4):
            step()
            written = tick(number)
    assert [path.name for path in written] == ["step-000003.json", "step-000003.txt"]
    text = written[1].read_text()
    assert text.startswith("2 steps up to step 3, traced on cpu; the trace is step-000003.json\none step took ")
    phases, operations = text.split("\n\n")[1:]
    rows = [line.rsplit(maxsplit=2) for line in phases.splitlines()[1:]]
    assert [row[0] for row in rows] == ["data", "forward", "optimizer", "rest"]
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)
    rows = [line.rsplit(maxsplit=3) for line in operations.splitlines()[1:]]
    calls = {row[0]: float(row[3]) for row in rows}
    assert calls["aten::mm"] == 4 and calls["aten::add_"] == 1 and calls["python in forward"] == 1
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=1)
    times = [float(row[1]) for row in rows if "others" not in row[0]]
    assert times == sorted(times, reverse=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place: Path = tmp_path_factory.mktemp("text")
    text = place / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}, and so on.\n" for number in range(400)))
    return prepare(DataConfig(source=str(text), root=place), TokenizerConfig())


def trained(
    corpus: Corpus, config: ProfileConfig, directory: Path | None, emit: Recorded
) -> tuple[list[object], list[Tensor]]:
    """Losses and norms of a real run of eight steps, and the weights it ended at."""
    device = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)
    model = build(ModelConfig(name="chargru", dim=11, n_layers=2), MemoryConfig(), 256, random_seed=1)
    stream = Stream(corpus, "train", window=13, batch=3, order="shuffled", random_seed=5)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    limits = TrainConfig(max_time=None, steps=8)
    start, numbers = Progress(cursor=stream.start()), []
    with profiled(config, directory, CPU, emit) as tick:
        for step in steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=limits, device=device):
            numbers.append((step.loss_nats, step.grad_norm, step.rate, step.n_targets))
            tick(step.progress.step)
    return numbers, list(model.parameters())


def hinder(how: str, directory: Path) -> None:
    """Make a trace impossible to write, in one of the ways in which that happens."""
    if how == "no directory":
        directory.write_text("a file where the directory should be")
    else:
        name = "step-000007.json" if how == "trace" else "step-000007.txt"
        (directory / name / "inside").mkdir(parents=True)


@pytest.mark.parametrize("how", ["no directory", "trace", "table"])
def test_l18_a_failing_exporter_changes_nothing_but_is_told(corpus, tmp_path, how):
    """The same losses and weights to the bit without tracing, with it, and with tracing that fails."""
    plain, fine, failing = Recorded(), Recorded(), Recorded()
    part, place = ProfileConfig(steps=3, repeat=2, warmup=1), tmp_path / "profile"
    hinder(how, place)
    without, weights = trained(corpus, ProfileConfig(), None, plain)
    traced, weights_traced = trained(corpus, part, tmp_path / "other", fine)
    failed, weights_failed = trained(corpus, part, place, failing)
    assert without == traced == failed
    for mine, its, others in zip(weights, weights_traced, weights_failed, strict=True):
        assert torch.equal(mine, its) and torch.equal(mine, others)
    assert [event.name for event in plain.events] == []
    assert [event.name for event in fine.events] == ["profile.written", "profile.cut_short"]
    assert [(event.name, event.severity) for event in failing.events] == [("profile.failed", "warning")]
    (told,) = failing.named("profile.failed")
    assert told["while"] == "writing" and told["at_step"] == 7 and str(place) in str(told["message"])


def test_l18_a_disk_that_is_full_is_told(tmp_path):
    """Torch tells the terminal alone that it wrote nothing; here by a limit on the size of a file. No piece stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    emit = Recorded()
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with profiled(ProfileConfig(steps=1, wait=0), tmp_path, CPU, emit) as tick:
            for step in range(1, 3):
                for _ in range(200):
                    torch.ones(8).sum()
                tick(step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (told,) = emit.named("profile.failed")
    assert told["type"] == "OSError" and "wrote no trace" in str(told["message"])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002.txt"]


def test_l18_an_old_trace_does_not_pass_for_a_new_one(tmp_path):
    (tmp_path / "step-000002.json").write_text("of an earlier run")
    work(2, ProfileConfig(steps=1, wait=0), tmp_path, Recorded())
    assert marks(tmp_path / "step-000002.json") == [2]


def test_l18_a_tracer_that_cannot_start_is_told(tmp_path, monkeypatch):
    """Whatever torch raises, at its start as in its middle, ends the tracing alone."""

    def refuse(*_: object) -> None:
        raise RuntimeError("another tool traces this process")

    for method, what in (("start", "starting"), ("step", "tracing"), ("stop", "stopping")):
        emit = Recorded()
        with monkeypatch.context() as patched:
            patched.setattr(torch.profiler.profile, method, refuse)
            assert work(6, ProfileConfig(steps=1, wait=0), tmp_path, emit) == ([2] if method == "stop" else [])
        (told,) = emit.named("profile.failed")
        assert (told["while"], told["message"]) == (what, "another tool traces this process")


def test_an_error_of_training_passes_through(tmp_path):
    """What was traced until then is written."""
    emit = Recorded()
    with pytest.raises(ZeroDivisionError), profiled(ProfileConfig(steps=3, wait=0), tmp_path, CPU, emit) as tick:
        for step in range(1, 5):
            tick(step)
            if step == 3:
                raise ZeroDivisionError
    assert emit.named("profile.cut_short") == [{"recorded_steps": 2, "wanted_steps": 3, "at_step": 3}]
    assert (tmp_path / "step-000003.json").is_file()


@pytest.mark.parametrize("name", ["cuda:0", "mps", "xpu"])
def test_l19_what_cannot_be_traced_is_left_out_and_told(tmp_path, monkeypatch, name):
    """A torch that can trace the CPU alone traces a run on another device there, and says so."""
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CPU})
    emit = Recorded()
    work(2, ProfileConfig(steps=1, wait=0), tmp_path, emit, torch.device(name))
    kind = name.partition(":")[0]
    assert emit.named("profile.limited") == [{"device": name, "missing": kind, "traced": ["cpu"]}]
    assert [event.severity for event in emit.events] == ["warning", "info"]
    assert marks(tmp_path / "step-000002.json") == [2]


def test_l19_what_can_be_traced_is(monkeypatch):
    both = {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: both)
    emit = Recorded()
    assert set(activities(torch.device("cuda:0"), emit)) == both
    assert activities(CPU, emit) == (torch.profiler.ProfilerActivity.CPU,)
    assert emit.events == []


def test_l21_a_directory_is_needed(tmp_path):
    """The caller's or the configured one, which wins; none at all is refused before a step is made."""
    with pytest.raises(
        ConfigError, match=r"profile.steps is 1, but there is no directory.*Set profile.directory"
    ) as no:
        work(1, ProfileConfig(steps=1), None, Recorded())
    assert no.value.fields == {"path": "profile.directory", "value": None}
    part = ProfileConfig(steps=1, wait=0, directory=tmp_path / "mine")
    for given in (None, tmp_path / "yours"):
        work(2, part, given, Recorded())
    assert (tmp_path / "mine" / "step-000002.json").is_file() and not (tmp_path / "yours").exists()


class Tree(ConfigSection):
    profile: ProfileConfig = ProfileConfig()


def test_settings_that_nothing_would_read_are_refused():
    with pytest.raises(
        DeadKey, match=r"profile.wait, profile.repeat given, but profile.steps is 0.*Set profile.steps=3"
    ):
        load(Tree, overrides=["profile.wait=7", "profile.repeat=2"])
    assert load(Tree, overrides=["profile.wait=7", "profile.steps=1"]).tree.profile.wait == 7
    with pytest.raises(ValidationError):
        ProfileConfig(steps=1, warmup=0)


def test_the_terminal_is_left_alone(tmp_path):
    """The tracer of torch talks to stderr by itself, across the live view; and of windows that follow each other."""
    program = f"""
import torch
from pathlib import Path
from meristem.events import silent
from meristem.train.config import ProfileConfig
from meristem.train.profile import profiled
with profiled(ProfileConfig(steps=1, wait=0, repeat=2), Path({str(tmp_path)!r}), torch.device("cpu"), silent) as tick:
    for step in range(1, 6):
        torch.ones(3).sum()
        tick(step)
"""
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("", "")
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_la2_the_loop_does_without_tracing():
    """Its ranges cost nothing while nobody traces, and it loads where this part is missing."""
    program = """
import sys
sys.modules["meristem.train.profile"] = None
import meristem.train.loop
"""
    subprocess.run([sys.executable, "-c", program], check=True)
