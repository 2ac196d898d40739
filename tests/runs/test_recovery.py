"""A run that goes wrong goes back: snapshots, checkpoints, the guard and the emergency level, together in a recipe."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meristem.checkpoint import store
from meristem.checkpoint.journal import read as read_journal
from meristem.checkpoint.journal import uncommitted
from meristem.checkpoint.snapshots import SnapshotBuffer
from meristem.data.stream import Batch, Cursor
from meristem.errors import Halted, RollbackFailed, SnapshotTooLarge
from meristem.events import silent
from meristem.recipes.pretrain import Result, prepare_job, pretrain
from meristem.runs.recovery import Recovery
from meristem.runs.resume import Job, newest_sound
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from meristem.train.emergency import FILE, Level, read_shared
from recipes.small import config, write_text

SOON = (
    "train.steps=50",
    "checkpoint.every=1000",
    "optim.lr=0.02",
    "rollback.snapshot_every=5",
)
"""A model that has learnt enough after thirty steps to be hurt by noise, and a snapshot every five."""

Change = Callable[[Job], Job]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("shelter"))


def run(text: Path, place: Path, *more: str, change: Change = lambda job: job) -> Result:
    tree = config(text, *SOON, "eval.every=1000", *more)
    return pretrain(tree, run_dir=place, view=Console(json=True), make_job=lambda *given: change(prepare_job(*given)))


def events(place: Path, name: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in read_records(place / "events.ndjson") if event["name"] == name]


def losses(place: Path) -> dict[int, float]:
    return {record["step"]: record["metrics"]["nats"] for record in history(place) if record["split"] == "train"}


class Spoilt:
    """A stream of which some batches are something else."""

    def __init__(self, job: Job, positions: range) -> None:
        self._stream, self._positions = job.stream, positions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        batch, after = self._stream.next(cursor)
        if cursor.position in self._positions:
            rows = torch.randint(128, 256, (3, 18), generator=torch.Generator().manual_seed(cursor.position))
            batch = replace(batch, tokens_bt=rows[:, :-1], targets_bt=rows[:, 1:])
        return batch, after


def spoilt(positions: range) -> Change:
    return lambda job: replace(job, stream=Spoilt(job, positions))


def at_call(number: int, act: Callable[[nn.Module], None]) -> Change:
    """Something is done to the model before one of its forward passes in training, once."""

    def change(job: Job) -> Job:
        n_calls = 0

        def count(model: nn.Module, inputs: object) -> None:
            nonlocal n_calls
            n_calls += torch.is_grad_enabled()
            if n_calls == number and torch.is_grad_enabled():
                act(model)

        job.model.register_forward_pre_hook(count)
        return job

    return change


def spoil_weights(model: nn.Module) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)


def test_spike_is_passed(text, tmp_path):
    """Noise in a stretch of the text: the run goes back, skips it, and what is recorded is what then happened."""
    result = run(text, tmp_path / "run", change=spoilt(range(32, 35)))
    first, *more = events(tmp_path / "run", "rollback.done")
    assert (first["panicked_at"], first["resumed_from"], first["tier"]) == (35, 30, "fast")
    assert first["changed"] == {"skipped_batches": [30, 35]}
    assert [again["changed"] for again in more] == []
    assert result.status == "finished" and result.step == 50
    kept = losses(tmp_path / "run")
    assert sorted(kept) == list(range(1, 51))
    assert max(kept[step] for step in range(31, 51)) < 1.5 * kept[30]


def test_second_panic_in_a_row_skips_more_and_lowers_the_rate(text, tmp_path):
    run(text, tmp_path / "run", change=spoilt(range(32, 41)))
    first, second = events(tmp_path / "run", "rollback.done")
    assert first["changed"] == {"skipped_batches": [30, 35]}
    assert second["changed"] == {"skipped_batches": [35, 43], "rate_factor": 0.5, "until_step": 35}
    rates = {record["step"]: record["metrics"]["rate"] for record in history(tmp_path / "run")
             if record["split"] == "train"}  # fmt: skip
    assert rates[31] < 0.6 * rates[30]


def test_spoilt_weights_come_back(text, tmp_path):
    """NaN in a weight: every step is skipped until the guard panics, and then training goes on from the snapshot."""
    result = run(text, tmp_path / "run", change=at_call(33, spoil_weights))
    (back,) = events(tmp_path / "run", "rollback.done")
    assert (back["reason"], back["panicked_at"], back["resumed_from"]) == ("nonfinite, skipped", 35, 30)
    checkpoint = store.open_checkpoint(result.checkpoint)
    assert all(tensor.isfinite().all() for tensor in checkpoint.tree("model").values())
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())


def test_accelerator_goes_back_where_steps_are_read_together(text, tmp_path, monkeypatch):
    """Issue 9, 2.6: ten skipped steps that are read at once end no run that can go back."""
    monkeypatch.setattr(Tensor, "is_cpu", False)
    more = ("train.log_every=20", "rollback.snapshot_every=20")
    result = run(text, tmp_path / "run", *more, change=at_call(23, spoil_weights))
    (back,) = events(tmp_path / "run", "rollback.done")
    assert (back["panicked_at"], back["resumed_from"]) == (40, 20)
    assert (result.status, result.step) == ("finished", 50)


def test_without_the_guard_it_does_not(text, tmp_path):
    """What the tests above would miss, were it not for the guard."""
    run(text, tmp_path / "run", "guard.enabled=false", change=spoilt(range(32, 35)))
    assert events(tmp_path / "run", "rollback.done") == []
    kept = losses(tmp_path / "run")
    assert max(kept[step] for step in range(33, 36)) > 1.5 * kept[30]


def test_state_on_disk_serves_where_none_is_in_memory(text, tmp_path):
    """The full tier: the newest checkpoint that was saved while the run was sound, and not the one saved in trouble."""
    saved = ("rollback.snapshots=0", "checkpoint.every=17")
    run(text, tmp_path / "run", *saved, change=spoilt(range(32, 35)))
    (back,) = events(tmp_path / "run", "rollback.done")
    assert (back["tier"], back["panicked_at"], back["resumed_from"]) == ("full", 35, 17)
    assert list(back["attempts"][0]["phases"]) == ["load", "model", "optimizer", "verify"]


def test_damaged_snapshot_leads_to_the_disk(text, tmp_path):
    """A snapshot whose probe does not cost what it did is not trusted."""

    def change(job: Job) -> Job:
        take = SnapshotBuffer.take

        def damaged(buffer: SnapshotBuffer, *given: Any, **named: Any) -> Any:
            snapshot = take(buffer, *given, **named)
            if named["tag"] != "save":
                list(snapshot.trees["model"].values())[-1].view(-1)[0] += 1
            return snapshot

        SnapshotBuffer.take = damaged  # type: ignore[method-assign]
        restored.append(lambda: setattr(SnapshotBuffer, "take", take))
        return replace(job, stream=Spoilt(job, range(32, 35)))

    restored: list[Callable[[], None]] = []
    try:
        run(text, tmp_path / "run", "checkpoint.every=24", change=change)
    finally:
        restored[0]()
    (back,) = events(tmp_path / "run", "rollback.done")
    fast, full = back["attempts"]
    assert fast["tier"] == "fast" and "the probe costs" in fast["failure"]
    assert (full["tier"], full["failure"], back["resumed_from"]) == ("full", None, 24)


def test_nowhere_to_go_back_to(text, tmp_path):
    with pytest.raises(RollbackFailed, match="no whole checkpoint that was saved while the run was sound"):
        run(text, tmp_path / "run", "rollback.snapshots=0", "checkpoint.every=1000", change=at_call(2, spoil_weights))
    assert read_shared(tmp_path / "run" / FILE).level == Level.HALT
    journal = read_journal(tmp_path / "run" / "journal")
    assert [record.what for record in journal if record.kind == "rollback"] == ["begin", "undo"]


def test_what_does_not_help_halts_the_run(text, tmp_path):
    """Three panics in a row: level 4, exit code 5, and the state before the trouble is saved and can be resumed."""
    with pytest.raises(Halted, match="rolled back 3 times in a row, the last time from step 33 to 30"):
        run(text, tmp_path / "run", change=spoilt(range(32, 1000)))
    assert read_shared(tmp_path / "run" / FILE).level == Level.HALT
    newest = store.newest(tmp_path / "run" / "checkpoints", silent)
    assert newest is not None and (newest.step, newest.manifest["reason"]) == (30, "rollback")
    assert [event["level"] for event in events(tmp_path / "run", "emergency.raised")][-1] == 4
    result = run(text, tmp_path / "run")
    assert result.step == 50


def test_no_room_to_move_the_weights(text, tmp_path):
    """An out-of-memory error in the optimizer: the same text again, in smaller parts, and the losses are those."""

    def change(job: Job) -> Job:
        step, n_calls = job.optimizer.step, 0

        def short(loss: Tensor) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == 8:
                raise torch.OutOfMemoryError("no room for moments")
            return step(loss)

        job.optimizer.step = short  # type: ignore[method-assign]
        return job

    run(text, tmp_path / "clean")
    run(text, tmp_path / "short", change=change)
    (back,) = events(tmp_path / "short", "rollback.done")
    assert back["changed"] == {"n_micro_batches": 2} and back["resumed_from"] == 5
    clean, short = losses(tmp_path / "clean"), losses(tmp_path / "short")
    assert clean.keys() == short.keys()
    assert all(short[step] == pytest.approx(clean[step], abs=1e-5) for step in clean)


def test_snapshots_that_do_not_fit(text, tmp_path):
    """An asked number is refused with the numbers; by default there are fewer, and an event says so."""
    with pytest.raises(SnapshotTooLarge, match="rollback.snapshots=3 of .* Raise rollback.max_bytes"):
        run(text, tmp_path / "asked", "rollback.snapshots=3", "rollback.max_bytes=1000")
    run(text, tmp_path / "open", "rollback.max_bytes=1000")
    (told,) = events(tmp_path / "open", "rollback.fewer_snapshots")
    assert told["snapshots"] == 0 and told["max_bytes"] == 1000


@pytest.mark.parametrize("snapshots", ["0", "2"])
def test_guarded_run_is_the_unguarded_one_where_nothing_is_wrong(text, tmp_path, snapshots):
    """Bit for bit: watching changes nothing."""
    run(text, tmp_path / "off", "guard.enabled=false", "rollback.snapshots=0")
    run(text, tmp_path / "on", f"rollback.snapshots={snapshots}")
    assert losses(tmp_path / "on") == losses(tmp_path / "off")


def test_every_change_has_its_end(text, tmp_path):
    """Saves and rollbacks stand in the journal, begun and done."""
    run(text, tmp_path / "run", change=spoilt(range(32, 35)))
    journal = read_journal(tmp_path / "run" / "journal")
    assert uncommitted(journal) == []
    assert {record.kind for record in journal} == {"save", "rollback"}
    assert read_shared(tmp_path / "run" / FILE).level == Level.CONSERVATIVE


def test_weight_that_no_step_reads_is_missed_all_the_same(text, tmp_path):
    """NaN in the vector of a token that the text does not have: no loss shows it, how far weights move does."""

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model.embedding.weight[200] = math.nan

    run(text, tmp_path / "run", "train.measure_updates_every=10", change=at_call(33, spoil))
    warned = events(tmp_path / "run", "guard.verdict")
    assert [(each["step"], each["detectors"]) for each in warned] == [(40, ["update"]), (50, ["update"])]


def test_a_saved_checkpoint_says_of_which_step_it_is(text, tmp_path, monkeypatch):
    """T1: it is written beside the training, so that the record of its event may be of a later step.

    Trackers take the steps up to it as final, and none of one that a resume would pass over.
    """
    plainly = store.save

    def late(*given: Any, step: int, **named: Any) -> Path:
        while step < 12 and history(tmp_path / "run")[-1]["step"] < step + 2:
            time.sleep(0.002)
        return plainly(*given, step=step, **named)

    monkeypatch.setattr(store, "save", late)
    run(text, tmp_path / "run", "train.steps=12", "checkpoint.every=5")
    saved = [e for e in read_records(tmp_path / "run" / "events.ndjson") if e["name"] == "checkpoint.saved"]
    assert [e["payload"]["step"] for e in saved] == [5, 10, 12]
    assert [e["step"] >= e["payload"]["step"] + 2 for e in saved] == [True, True, False]
    assert all(e["payload"]["is_sound"] for e in saved)


def test_a_checkpoint_that_a_resume_would_pass_over_is_said_not_to_be_sound(text, tmp_path, monkeypatch):
    """T1: what was saved while the probe cost no number."""
    monkeypatch.setattr(Recovery, "_probe", lambda _: math.nan)
    run(text, tmp_path / "run", "train.steps=6", "checkpoint.every=3", "guard.enabled=false")
    assert {event["is_sound"] for event in events(tmp_path / "run", "checkpoint.saved")} == {False}
    assert newest_sound(tmp_path / "run" / "checkpoints", silent) is None
