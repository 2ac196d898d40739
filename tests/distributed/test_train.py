"""A run in several processes: what it comes to, what it leaves, and what it survives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.processes import SMOOTH, Played, Stage
from meristem.checkpoint.store import Checkpoint, find
from meristem.distributed.agreement import fingerprint
from meristem.events import silent
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.small import overrides, write_documents, write_text

pytestmark = pytest.mark.fault  # whole runs in processes of their own; test_training.py holds the law for steps

TOLERANCE = 1e-5
"""Largest difference of a weight to one process: sums over rows are rounded in another order."""

SETTINGS = (
    "model.n_heads=2",
    "model.sliding_window=5",
    "memory.head_dim=4",
    "model.mlp=levels",
    "model.levels={count: 3, periods: [1, 2, 4]}",
    "data.batch_size=6",
    "optim.lr=0.01",
    "train.steps=8",
    "eval.every=4",
    "checkpoint.every=3",
    "distributed.timeout_s=20",
    SMOOTH,
)

KINDS = {
    "replicated": (),
    "reading_on": ("data.order=sequential",),
    "sharded": ("distributed.shard=true",),
    "sharded_reading_on": ("distributed.shard=true", "data.order=sequential"),
    "documents": ("data.order=documents",),
    "sharded_documents": ("distributed.shard=true", "data.order=documents"),
    # A memory that carries views of the weights which it began from.
    "sharded_tnt": ("distributed.shard=true", "data.order=sequential", "memory.form=tnt"),
}


def run(stage: Stage, n_processes: int, folder: Path, *more: str, **given: Any) -> Played:
    """A small run in so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_documents(folder) if "data.order=documents" in more else write_text(folder)
    return stage.play(n_processes, "run", folder, overrides=overrides(text, *SETTINGS, *more), **given)


def saved(folder: Path) -> Checkpoint:
    """The newest checkpoint of the run."""
    return find(folder / "run", silent)


def losses(folder: Path) -> list[float]:
    """Of every step, as it was made last."""
    return [record["metrics"]["nats"] for record in history(folder / "run") if record["split"] == "train"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(stage, tmp_path, kind):
    """Twice the longest period: losses, weights and moments of the joined batch; between the two, to the bit."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(stage, 1, one, *KINDS[kind]).found()
    played = run(stage, 2, two, *KINDS[kind])
    first, second = played.found(0), played.found(1)
    assert first["status"] == second["status"] == "finished" and first["step"] == second["step"] == 8
    assert first["weights"] == second["weights"] or "sharded" in kind
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(two)) == 8
    for tree in ("model", "optim"):
        single, both = saved(one).tree(tree), saved(two).tree(tree)
        assert single.keys() == both.keys()
        for name, tensor in single.items():
            torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.fault
def test_weights_are_made_in_parts(stage, tmp_path):
    """Each of two processes makes its part of what one makes whole, to the bit, also of what was saved by another
    number; and it holds no more at once than its part, a block, and the factors of a tensor which is being drawn.
    """
    small = ("model.n_layers=8", "model.dim=24", "tokenizer.kind=byte", "train.steps=1", "distributed.shard=true")
    one, two = (run(stage, n_ranks, tmp_path / str(n_ranks), *small) for n_ranks in (1, 2))
    whole, *parts = (one.found()["made"], *(two.found(rank)["made"] for rank in (0, 1)))
    assert {made["tensors"] for made in parts} == {whole["tensors"]}
    resumed = {}
    for before, after in ((1, 2), (2, 1)):
        weights = fingerprint(saved(tmp_path / str(before)).tree("model"))
        again = run(stage, after, tmp_path / str(before), *small, "train.steps=2", resume="must")
        resumed[after] = [again.found(rank)["made"] for rank in range(after)]
        assert {made["saved"] for made in resumed[after]} == {weights} != {whole["saved"]}
    # What is mapped from a file counts as living, and takes no room that the system could not have back.
    for made, mapped_bytes in [(made, 0) for made in parts] + [(made, whole["whole_bytes"]) for made in resumed[2]]:
        drawing_bytes = made["block_bytes"] + 2 * made["tensor_bytes"]
        assert made["peak_bytes"] <= made["held_bytes"] + drawing_bytes + mapped_bytes
        assert made["held_bytes"] + drawing_bytes < made["whole_bytes"] == whole["whole_bytes"]


@pytest.mark.parametrize("kind", ["reading_on", "sharded_reading_on", "documents"])
@pytest.mark.parametrize("numbers", [(2, 1), (1, 2), (2, 3)], ids=str)
def test_a_run_goes_on_in_another_number_of_processes(stage, tmp_path, kind, numbers):
    """Saved after five steps, when slow levels have something waiting and memories have read: it ends as it would."""
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    run(stage, 1, straight, *KINDS[kind]).found()
    before, after = numbers
    run(stage, before, halved, *KINDS[kind], breaks="interrupted:0:4").found()
    assert saved(halved).step == 5 and saved(halved).tree("memory")
    assert saved(halved).manifest["world"] == {
        "size": before,
        "mesh": [before] if "sharded" in kind and before > 1 else None,
    }
    found = run(stage, after, halved, *KINDS[kind], resume="must").found()
    assert found["step"] == 8
    assert losses(halved) == pytest.approx(losses(straight), rel=1e-5) and len(losses(halved)) == 8
    for tree in ("model", "optim", "memory"):
        single, both = saved(straight).tree(tree), saved(halved).tree(tree)
        assert single.keys() == both.keys()
        for name, tensor in single.items():
            torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@pytest.mark.parametrize("tier", ["fast", "full"])
def test_s2_l21_all_go_back_together(stage, tmp_path, kind, tier):
    """One process finds no number in three steps: both skip them, go back to the same step, and go on."""
    more = ["train.steps=20", "rollback.snapshot_every=4", "eval.every=100"]
    more += [f"rollback.snapshots={3 if tier == 'fast' else 0}"]
    played = run(stage, 2, tmp_path, *KINDS[kind], *more, breaks="spoilt:1:10")
    assert played.found(0)["step"] == played.found(1)["step"] == 20
    own = (tmp_path / "run", tmp_path / "run/ranks/1")
    back = [
        [r["payload"] for r in read_records(place / "events.ndjson") if r["name"] == "rollback.done"] for place in own
    ]
    assert back[0] == back[1] and len(back[0]) == 1 and back[0][0]["tier"] == tier
    assert back[0][0]["panicked_at"] == 13 and back[0][0]["resumed_from"] in (8, 9)


def test_ctrl_c_in_one_process_stops_all(stage, tmp_path):
    """All end after the same step, and the run goes on from it."""
    played = run(stage, 2, tmp_path, "train.steps=30", breaks="interrupted:1:11")
    assert [played.found(rank)["status"] for rank in (0, 1)] == ["interrupted"] * 2
    assert played.found(0)["step"] == played.found(1)["step"] == saved(tmp_path).step
    assert run(stage, 2, tmp_path, "train.steps=30", resume="must").found()["step"] == 30


def test_what_each_process_did_is_recorded(stage, tmp_path):
    """The mean and the worst of speed and step; each has records of its own, and the first alone has checkpoints."""
    run(stage, 2, tmp_path).found()
    (figures, *_) = [r["metrics"] for r in history(tmp_path / "run") if r["split"] == "train"]
    assert 0 < figures["ranks/tokens_per_s/min"] <= figures["ranks/tokens_per_s/mean"]
    assert 0 < figures["ranks/step_s/mean"] <= figures["ranks/step_s/max"]
    ranks = [
        next(iter(read_records(place / "metrics.ndjson")))["rank"]
        for place in (tmp_path / "run", tmp_path / "run/ranks/1")
    ]
    assert ranks == [0, 1]
    assert not (tmp_path / "run/ranks/1/checkpoints").exists() and not (tmp_path / "run/ranks/1/report.md").exists()


@pytest.mark.parametrize("fault", ["struck", "lost"])
def test_a_killed_process_ends_the_others_and_all_go_on(stage, tmp_path, fault):
    """Killed in the middle of a step, or of going back together: the other one ends too, and says that it was left.

    Started again, they end with the losses of a run that nobody disturbed.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("train.steps=14", "distributed.timeout_s=3")
    run(stage, 2, whole, *more).found()
    played = run(stage, 2, broken, *more, breaks=f"{fault}:1:9")
    assert played.codes == [1, -9]
    assert "AgreementFailed" in (broken / "0.err").read_text()
    assert saved(broken).step == 9
    found = run(stage, 2, broken, *more, resume="must").found()
    assert found["step"] == 14
    assert losses(broken) == losses(whole) and len(losses(whole)) == 14


def test_s2_processes_that_went_apart_are_found(stage, tmp_path):
    """A weight of one differs: at the next snapshot all learn it and end, with what was saved before intact."""
    more = ("train.steps=20", "rollback.snapshot_every=4")
    played = run(stage, 2, tmp_path, *more, breaks="apart:1:9")
    assert played.codes == [1, 1]
    for rank in (0, 1):
        assert "the 2 processes have gone apart: checksums by rank" in (tmp_path / f"{rank}.err").read_text()
    assert saved(tmp_path).step == 9
    assert run(stage, 2, tmp_path, *more, resume="must").found()["step"] == 20


def test_s2_no_room_in_one_process_sends_all_back(stage, tmp_path):
    """The others have moved weights that it has not: all go back, and cut batches smaller from then on."""
    more = ("train.steps=12", "rollback.snapshot_every=4", "eval.every=100")
    played = run(stage, 2, tmp_path, *more, breaks="full:1:6")
    assert played.found(0)["weights"] == played.found(1)["weights"]
    for place in (tmp_path / "run", tmp_path / "run/ranks/1"):
        (back,) = [r["payload"] for r in read_records(place / "events.ndjson") if r["name"] == "rollback.done"]
        assert back["changed"] == {"n_micro_batches": 2} and back["resumed_from"] in (4, 6)
