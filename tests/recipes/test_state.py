"""The state of a training is in one place: put another there between two steps, and everything is of that one."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from meristem.checkpoint.store import find, open_checkpoint
from meristem.errors import CheckpointMismatch
from meristem.events import silent
from meristem.models import topology
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.load import load
from meristem.models.topology import Change
from meristem.nn.config import MemoryConfig
from meristem.plugins import Registry
from meristem.recipes.pretrain import Result, prepare_job, pretrain
from meristem.runs.directory import Run
from meristem.runs.resume import Job
from meristem.runs.structure import trainable
from meristem.serve.session import Session
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.small import config, write_text

WIDER = Change("wider", {"width": 19})
NARROW, WIDE = (256, 12), (256, 19)
"""Shapes of the embedding before and after."""

SETTINGS = ("train.steps=30", "eval.every=1000", "checkpoint.every=9", "rollback.snapshot_every=5")


def wider(model: torch.nn.Module, fields: Mapping[str, Any]) -> torch.nn.Module:
    """Another model altogether: what a change does to weights is no matter of the state."""
    return build(ModelConfig(name="charrnn", dim=fields["width"], n_layers=2), MemoryConfig(), 256, random_seed=3)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The change is one that this process can make again."""
    monkeypatch.setattr(topology, "changes", Registry("change", {"wider": wider}))


class Between(Console):
    """Acts after steps, between them."""

    def __init__(self, acts: Mapping[int, Callable[[], None]]) -> None:
        super().__init__(json=True)
        self._acts = dict(acts)

    def update(self, fields: Mapping[str, str], *, progress: float | None = None, loss: float | None = None) -> None:
        self._acts.pop(int(fields.get("step", 0)), lambda: None)()


def run(place: Path, *more: str, grows_at: int, spoilt_at: int | None = None) -> Result:
    """A run whose model is replaced after a step, and whose weights are no numbers after another."""
    held: list[tuple[Run, Job]] = []

    def make(run: Run, *given: Any) -> Job:
        job = prepare_job(run, *given)
        held.append((run, job))
        return job

    def grow() -> None:
        ((of, job),) = held
        larger = wider(job.model, WIDER.fields)
        log = (*job.state.topology, WIDER)
        job.state = trainable(larger, of, job.config, job.device, progress=job.state.progress, topology=log)

    def spoil() -> None:
        ((_, job),) = held
        with torch.no_grad():
            next(job.model.parameters()).fill_(math.nan)

    tree = config(write_text(place), *SETTINGS, *more)
    acts = {grows_at: grow} | ({spoilt_at: spoil} if spoilt_at else {})
    return pretrain(tree, run_dir=place / "run", view=Between(acts), make_job=make)


def shape(weights: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(next(tensor for name, tensor in weights.items() if "embedding" in name).shape)


def backs(place: Path) -> list[dict[str, Any]]:
    return [e["payload"] for e in read_records(place / "run" / "events.ndjson") if e["name"] == "rollback.done"]


def test_all_follow_the_state(tmp_path):
    """Snapshots, checkpoints, records, the way back and the report are those of the model that is there now."""
    result = run(tmp_path, "checkpoint.last=9", grows_at=12, spoilt_at=22)
    assert (result.status, result.step) == ("finished", 30)
    (back,) = backs(tmp_path)
    assert (back["resumed_from"], back["tier"]) == (20, "fast")
    before, after = (open_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{n:08d}") for n in (9, 30))
    assert (shape(before.tree("model")), shape(before.tree("optim"))) == (NARROW, NARROW)
    assert (shape(after.tree("model")), shape(after.tree("optim"))) == (WIDE, WIDE)
    assert before.value("topology") == []
    assert after.value("topology") == [{"name": "wider", "fields": {"width": 19}}]
    told = [record for record in history(tmp_path / "run") if record["split"] == "train"]
    assert [record["step"] for record in told] == list(range(1, 31))
    assert all(math.isfinite(record["metrics"]["nats"]) for record in told)
    model, _ = load(tmp_path / "run")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"A model of {n_parameters:,} parameters" in result.report.read_text()


@pytest.mark.parametrize("tier, more", [("fast", ()), ("full", ("rollback.snapshots=0",))])
def test_the_way_back_leads_over_a_change_of_structure(tmp_path, tier, more):
    """What the run was before has another structure, which is built again and trained on as it was, to the bit."""
    result = run(tmp_path, *more, "checkpoint.last=9", grows_at=21, spoilt_at=23)
    (back,) = backs(tmp_path)
    assert (back["resumed_from"], back["tier"]) == (20 if tier == "fast" else 18, tier)
    assert [attempt["tier"] for attempt in back["attempts"]] == [tier]
    assert result.step == 30
    last = find(tmp_path / "run", silent)
    assert (shape(last.tree("model")), last.value("topology")) == (NARROW, [])


def test_structure_is_built_again_where_a_run_or_a_session_goes_on(tmp_path, monkeypatch):
    """From the log in the checkpoint; a log with a change that is not known is refused by its name."""
    run(tmp_path, grows_at=12)
    settings = config(write_text(tmp_path), *SETTINGS, "train.steps=33")
    assert pretrain(settings, run_dir=tmp_path / "run").step == 33
    last = find(tmp_path / "run", silent)
    assert (shape(last.tree("model")), last.value("topology")[0]["name"]) == (WIDE, "wider")
    session = Session(*load(tmp_path / "run"))
    session.feed("7 times 7")
    session.save(tmp_path / "a.session")
    assert Session.load(tmp_path / "a.session", *load(tmp_path / "run")).n_tokens == 9
    monkeypatch.setattr(topology, "changes", Registry("change", {}))
    for go_on in (lambda: pretrain(settings, run_dir=tmp_path / "run"), lambda: load(tmp_path / "run")):
        with pytest.raises(
            CheckpointMismatch, match="a change of structure 'wider', which this meristem does not know"
        ):
            go_on()
