"""Issue 9, 2.6: where there is no room outside forward, backward and step, the outcome is the same as inside.

What cannot be cut into smaller parts ends the run with advice and the exit code of training; a way back hands over to
the next. Every error here is the one that the allocator of the CPU really raises.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meristem.checkpoint import snapshots, store
from meristem.checkpoint.run import read
from meristem.drills.training import NEVER_FITS_BYTES, ask_too_much
from meristem.errors import OutOfDeviceBytes, SnapshotTooLarge
from meristem.events import silent
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.recipes import pretrain as recipe
from meristem.recipes.pretrain import Result, prepare_job, pretrain
from meristem.runs import logging, recovery, structure
from meristem.runs.resume import Job
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.train import loop
from recipes.small import config, write_text

SETTINGS = (
    "train.steps=20",
    "train.log_every=5",
    "train.measure_updates_every=10",
    "eval.every=8",
    "eval.batch_size=4",
    "checkpoint.every=6",
    "rollback.snapshot_every=5",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("no_room"))


def run(text: Path, place: Path, *more: str, change: Callable[[Job], Job] = lambda job: job) -> Result:
    tree = config(text, *SETTINGS, *more)
    return pretrain(tree, run_dir=place, view=Console(json=True), make_job=lambda *given: change(prepare_job(*given)))


def full_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *calls: int) -> None:
    """At these calls of a function, counted from 1, there is no room for what it makes."""
    usual, count = getattr(owner, name), itertools.count(1)
    monkeypatch.setattr(
        owner, name, lambda *given, **named: ask_too_much() if next(count) in calls else usual(*given, **named)
    )


PLACES = {
    "the model": (structure, "build", 1, None),
    "the optimizer": (structure, "trainable", 1, None),
    "the probe": (recovery, "cross_entropy", 4, 6),
    "figures of the memory": (logging, "memory_figures", 2, 8),
    "a checkpoint": (recovery, "gathered", 2, 6),
    "the run": (recovery, "write", 2, 6),
    "the gradients that wait": (MultiPeriodOptimizer, "flush", 1, 18),
    "samples": (recipe, "write_samples", 1, 20),
}
"""What there is no room for: what makes it, at which of its calls that is refused, and the last step that is saved."""


@pytest.mark.parametrize("what", PLACES)
def test_ends_with_advice_and_what_was_saved(text, tmp_path, monkeypatch, what):
    owner, name, call, last = PLACES[what]
    full_at(monkeypatch, owner, name, call)
    with pytest.raises(OutOfDeviceBytes, match=rf"no room is left on cpu for {what}: .*can't allocate memory.*Lower"):
        run(text, tmp_path / "run")
    found = read(tmp_path / "run")
    assert (found["status"], found["exit"]) == ("failed", 5)
    newest = store.newest(tmp_path / "run/checkpoints", silent)
    assert (newest and newest.step) == last
    monkeypatch.undo()
    assert run(text, tmp_path / "run").step == 20


def test_what_was_saved_does_not_fit(text, tmp_path, monkeypatch):
    run(text, tmp_path / "run", "train.steps=10")
    full_at(monkeypatch, recipe, "restore", 1)
    with pytest.raises(OutOfDeviceBytes, match="no room is left on cpu for what was saved"):
        run(text, tmp_path / "run", "train.steps=10")


def narrow(n_rows: int) -> Callable[[Job], Job]:
    """There is room for so many rows of held-out text, whatever the batch."""

    def change(job: Job) -> Job:
        def hook(model: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled() and inputs[0].shape[0] > n_rows:
                ask_too_much()

        job.model.register_forward_pre_hook(hook)
        return job

    return change


@pytest.mark.parametrize("batch", [3, 4])
def test_held_out_text_is_read_in_smaller_parts(text, tmp_path, batch):
    """As a batch of training is; what is measured is the same."""
    whole = run(text, tmp_path / "whole", f"eval.batch_size={batch}")
    cut = run(text, tmp_path / "cut", f"eval.batch_size={batch}", change=narrow(1))
    assert cut.nats == pytest.approx(whole.nats, rel=1e-6) and cut.step == whole.step == 20


def test_one_row_of_held_out_text_does_not_fit(text, tmp_path, monkeypatch):
    """The first evaluation is the one after step 8; only text of the recipe is refused, and not the probe."""
    full_at(monkeypatch, recipe, "cross_entropy", *range(1, 9))
    with pytest.raises(OutOfDeviceBytes, match=r"cpu for an evaluation of one row: .* Lower data\.seq_len"):
        run(text, tmp_path / "run")
    newest = store.newest(tmp_path / "run/checkpoints", silent)
    assert newest is not None and newest.step == 6


@pytest.mark.parametrize("asked", [(), ("rollback.snapshots=2",)], ids=["open", "asked"])
@pytest.mark.parametrize("moment", ["start", "later"])
def test_the_system_has_no_room_for_a_snapshot(text, tmp_path, monkeypatch, asked, moment):
    """Where a number was asked for that is an error; else the run goes on with fewer, and saves all the same."""
    monkeypatch.setattr(recovery, "available_bytes", lambda: 2**60)
    if moment == "start":
        monkeypatch.setattr(recovery, "expected_bytes", lambda _: NEVER_FITS_BYTES)
    else:
        usual, count = snapshots.needed_bytes, itertools.count(1)
        monkeypatch.setattr(
            snapshots, "needed_bytes", lambda trees: NEVER_FITS_BYTES if next(count) > 3 else usual(trees)
        )
    if asked:
        with pytest.raises(SnapshotTooLarge, match="the system gives no .* bytes for a snapshot in memory"):
            run(text, tmp_path / "run", *asked)
        return
    assert run(text, tmp_path / "run").step == 20
    told = events(tmp_path / "run", "rollback.fewer_snapshots")
    assert [event.get("step") for event in told] == ([None] if moment == "start" else [8, 10, 12, 15, 16, 18, 20, 20])
    newest = store.newest(tmp_path / "run/checkpoints", silent)
    assert newest is not None and newest.step == 20


def events(place: Path, name: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in read_records(place / "events.ndjson") if event["name"] == name]


def test_measuring_how_far_weights_move_goes_back_as_a_step_does(text, tmp_path, monkeypatch):
    """The copies that a weight is compared with are made within the step."""
    usual = loop.local

    def full(weight: Any) -> Any:
        monkeypatch.setattr(loop, "local", usual)
        return ask_too_much()

    monkeypatch.setattr(loop, "local", full)
    assert run(text, tmp_path / "run").step == 20
    (back,) = events(tmp_path / "run", "rollback.done")
    assert back["resumed_from"] == 8 and back["changed"] == {"n_micro_batches": 2}


def test_no_room_to_go_back_leads_to_the_next_way(text, tmp_path, monkeypatch):
    """The snapshot in memory cannot be put in place; the checkpoint can."""
    full_at(monkeypatch, recovery, "put_back_weights", 1)
    full_at(monkeypatch, loop, "local", 1)
    assert run(text, tmp_path / "run").step == 20
    (back,) = events(tmp_path / "run", "rollback.done")
    fast, full = back["attempts"]
    assert "no room is left on cpu for a rollback" in fast["failure"]
    assert (full["tier"], full["failure"], back["resumed_from"]) == ("full", None, 8)
