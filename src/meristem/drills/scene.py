"""The tiny run that drills break, and what can be seen of it from outside."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import rich.console
import torch

from meristem.checkpoint.store import Checkpoint, newest
from meristem.errors import MeristemError
from meristem.events import silent
from meristem.recipes.pretrain import prepare_job, pretrain
from meristem.runs.config import Config, load_config
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history

N_STEPS: Final = 24
SAVED_EVERY: Final = 4

SETTINGS: Final = (
    "tokenizer.vocab_size=300",
    "data.seq_len=16",
    "data.batch_size=4",
    "data.order=sequential",
    "device.device=cpu",
    "device.dtype=fp32",
    "device.threads=1",
    "model.dim=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.sliding_window=5",
    "memory.head_dim=8",
    "optim.lr=0.03",
    f"train.steps={N_STEPS}",
    "train.max_time=null",
    "train.log_every=1",
    "guard.span=12",
    "rollback.snapshots=2",
    f"rollback.snapshot_every={SAVED_EVERY}",
    "eval.every=8",
    "eval.every_s=null",
    "eval.n_windows=4",
    "eval.n_windows_end=6",
    "eval.n_samples=0",
    f"checkpoint.every={SAVED_EVERY}",
    "checkpoint.every_s=null",
)
"""A model with a memory that is carried from sequence to sequence, and nothing that hangs on the clock."""

MakeJob = Callable[[Run, Config, Checkpoint | None], Job]
Break = Callable[[Run, Job], Job]


class Crash(BaseException):
    """The run ends here, as if the process had: nobody takes notice of it."""


@dataclass(frozen=True)
class Ended:
    """How a run ended, and what it left behind. ``error``: the type of what ended it."""

    run_dir: Path
    exit_code: int
    error: str | None = None
    message: str = ""

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The payloads of its events of these names, with the name among them."""
        records = read_records(self.run_dir / "events.ndjson")
        return [{"event": event["name"], **event["payload"]} for event in records if event["name"] in names]

    def n_steps(self) -> int:
        """The last step that it really made."""
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Nats by step, those of abandoned steps left out."""
        found = history(self.run_dir)
        return {record["step"]: record["metrics"]["nats"] for record in found if record["split"] == "train"}

    def held_out_nats(self) -> float:
        """What the held-out text cost when it was last read."""
        return [record["metrics"]["nats"] for record in history(self.run_dir) if record["split"] == "val"][-1]

    def trees(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Weights, moments and memory of its newest whole checkpoint; none where there is no such."""
        checkpoint = newest(self.run_dir / "checkpoints", silent)
        names = ("model", "optim", "memory")
        return {} if checkpoint is None else {name: checkpoint.tree(name) for name in names if checkpoint.has(name)}

    def value(self, name: str) -> Any:
        """A plain value of its newest whole checkpoint."""
        checkpoint = newest(self.run_dir / "checkpoints", silent)
        return None if checkpoint is None else checkpoint.value(name)

    def is_same_as(self, other: "Ended") -> bool:
        """Losses, weights, moments and memory are those of the other run, to the bit."""
        ours, theirs = self.trees(), other.trees()
        return self.losses() == other.losses() and ours.keys() == theirs.keys() and all(
            ours[name].keys() == tree.keys() and all(torch.equal(ours[name][key], leaf) for key, leaf in tree.items())
            for name, tree in theirs.items()
        )  # fmt: skip

    def is_finite(self) -> bool:
        """Every weight and moment that it ended with is a number."""
        tensors = [leaf for tree in self.trees().values() for leaf in tree.values() if leaf.is_floating_point()]
        return bool(tensors) and all(bool(leaf.isfinite().all()) for leaf in tensors)


@dataclass(frozen=True)
class Scene:
    """A directory with a text, and tiny runs over it."""

    place: Path

    @classmethod
    def at(cls, place: Path) -> "Scene":
        """Write the text there."""
        (place / "text.txt").write_text("".join(_lines()), encoding="utf-8")
        return cls(place)

    def settings(self, *more: str) -> list[str]:
        """Settings of the run, as words of a command line; ``more`` wins."""
        return [f"data.source={self.place / 'text.txt'}", f"data.root={self.place}", *SETTINGS, *more]

    def run(self, name: str, *more: str, breaks: Break | None = None, view: Console | None = None) -> Ended:
        """Train to the end, or to wherever ``breaks`` leads; a second run of the same name goes on with the first.

        breaks: gives the job in another form; it may also put hooks into its model and its optimizer.
        """

        def make(run: Run, config: Config, checkpoint: Checkpoint | None) -> Job:
            job = prepare_job(run, config, checkpoint)
            return breaks(run, job) if breaks else job

        run_dir = self.place / name
        config = load_config("titans-mag", self.settings(*more), {}).tree
        try:
            result = pretrain(config, run_dir=run_dir, make_job=make, view=view or quiet())
        except MeristemError as error:
            return Ended(run_dir, error.exit_code, type(error).__name__, str(error))
        except Crash:
            return Ended(run_dir, 1, "Crash")
        return Ended(run_dir, result.exit_code)


def quiet() -> Console:
    """A screen that nobody sees."""
    return Console(screen=rich.console.Console(file=io.StringIO()))


def cut_off(at: int) -> Break:
    """The run ends in the forward of that step, counted from its start, and does not know why."""

    def breaks(run: Run, job: Job) -> Job:
        count = counting()

        def end(*_: object) -> None:
            if torch.is_grad_enabled() and next(count) == at:
                raise Crash

        job.model.register_forward_pre_hook(end)
        return job

    return breaks


def counting() -> Iterator[int]:
    """1, 2, 3, ..."""
    number = 0
    while True:
        number += 1
        yield number


def _lines() -> Iterator[str]:
    for number in range(500):
        yield f"{number} times {number} is {number * number}, they say.\n"
