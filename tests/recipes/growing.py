"""A run of forty steps in which a seed lives a whole life."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from meristem.checkpoint.store import newest
from meristem.events import silent
from meristem.growth.features import Observes
from meristem.growth.observe import Mask, Observation, Reading
from meristem.growth.policy import NoCandidates, Policy, Proposal, policies
from meristem.recipes import grow as grow_module
from meristem.recipes.grow import grow
from meristem.recipes.pretrain import Result
from meristem.runs.config import Config
from meristem.sinks.records import history
from recipes.small import config

TINY = (
    "model.n_heads=2",
    "model.sliding_window=5",
    "memory.head_dim=4",
    "optim.lr=0.01",
    "eval.every=2",
    "eval.n_samples=0",
    "eval.learn_rate=false",
    "rollback.snapshot_every=4",
)
GROWS = (
    *TINY,
    "grow.enabled=true",
    "grow.slots=[blocks.1]",
    "grow.seed_warmup=0",
    "grow.shadow_every=1",
    "grow.boundary_every=2",
    "grow.blend_steps=4",
    "grow.embargo_steps=4",
    "grow.min_age=4",
    "grow.gates.training_steps=4",
    "grow.gates.pairs=8",
    "grow.gates.holding_steps=4",
    "grow.gates.quiet_steps=4",
    "grow.gates.impact_nats=1",
    "grow.gates.probation_steps=4",
    "grow.gates.recovery_steps=2",
)


def planted(settings: Mapping[str, Any]) -> Policy:
    """A policy that puts a seed in at a step, and takes it out at another."""

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        if reading.step == settings["at"] and mask.can_germinate:
            return Proposal(
                "germinate", min(mask.slots), "bottleneck", {"hidden": 8}, way=settings["way"], why="it is time"
            )
        if reading.step == settings.get("cull") and mask.may_cull:
            return Proposal("cull", min(mask.may_cull), why="it is time")
        return Proposal("wait")

    return propose


class Watching:
    """A policy that never grows, and looks at the run as numbers. What it saw stays with the class."""

    seen: ClassVar[list[Observation]] = []
    observes = Observes()

    def __init__(self, settings: Mapping[str, Any]) -> None: ...

    def __call__(self, reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        assert reading.observation is not None
        self.seen.append(reading.observation)
        return Proposal("wait")


READINGS: list[Reading] = []
"""What policies of the name ``recording`` were shown."""


def recording(settings: Mapping[str, Any]) -> Policy:
    """The planted policy, which keeps every reading in ``READINGS``."""
    propose = planted(settings)

    def proposed(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        READINGS.append(reading)
        return propose(reading, mask)

    return proposed


for name, make in {"planted": planted, "watching": Watching, "recording": recording}.items():
    if name not in policies.names():
        policies.register(name, make)


def growing(text: Path, *more: str, policy: str = "{name: planted, settings: {at: 8, way: shadow}}") -> Config:
    """The settings of such a run. policy: the name and settings of one; by default it grafts at step 8."""
    return config(text, *GROWS, f"grow.policy={policy}", *more, preset="titans-mag")


def losses(run_dir: Path) -> dict[int, float]:
    """Of training, by step; abandoned steps left out."""
    return {record["step"]: record["metrics"]["nats"] for record in history(run_dir) if record["split"] == "train"}


def trees(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of the newest checkpoint."""
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None
    return {name: checkpoint.tree(name) for name in ("model", "optim", "random")}


def garden(run_dir: Path) -> dict:
    """The garden of the newest checkpoint."""
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None
    return checkpoint.value("garden")


def assert_same(run_dir: Path, other: Path, *, names: tuple[str, ...] = ("model", "optim", "random")) -> None:
    """Losses and all tensors are equal to the bit."""
    assert losses(run_dir) == losses(other)
    found, expected = trees(run_dir), trees(other)
    for name in names:
        assert found[name].keys() == expected[name].keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in expected[name].items())


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it, and nothing is saved after it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, settings: Config, run_dir: Path) -> None:
    """Let a run die just before the step after ``step``: its orders were carried out, and nothing is saved of it."""
    before = grow_module.Growth.before

    def dying(self: grow_module.Growth) -> None:
        before(self)
        if self._job.state.progress.step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(grow_module.Growth, "before", dying)
        with pytest.raises(Killed):
            grow(settings, run_dir=run_dir)


def run_to_the_end(settings: Config, run_dir: Path) -> Result:
    result = grow(settings, run_dir=run_dir)
    assert result.status == "finished"
    return result
