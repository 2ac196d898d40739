"""Growth in several processes: what one does, all do; and what one cannot do, none does (growth.md 25)."""

from pathlib import Path

import pytest
import torch

from distributed.processes import SMOOTH, Played, Stage
from meristem.checkpoint.store import entries, open_checkpoint
from meristem.growth.graft import seeds_in
from meristem.growth.stage import Stage as LifeStage
from meristem.models.load import load
from meristem.sinks.jsonl import read_records
from recipes.growing import GROWS, assert_same, garden, losses, trees
from recipes.small import overrides, write_text

pytestmark = pytest.mark.fault  # whole runs in processes of their own

GRAFT, PRUNE = 8, 20
TOLERANCE = 1e-5
"""Largest relative difference of a loss, and largest difference of a weight, to one process: sums over rows are rounded
in another order."""

SHARED = ("data.batch_size=6", "distributed.timeout_s=20", "checkpoint.every=1", "checkpoint.last=100", SMOOTH)


def planted(way: str, prune: int | None = None) -> str:
    """A seed that is put in at one step, and taken out at another."""
    cull = "" if prune is None else f", cull: {prune}"
    return f"grow.policy={{name: planted, settings: {{at: {GRAFT}, way: {way}{cull}}}}}"


KINDS = {
    "shadow": (planted("shadow"), "model.mlp=levels", "model.levels={count: 3, periods: [1, 2, 4]}"),
    "frozen_host": (planted("frozen_host"),),
    # A seed that carries a memory of its own from one sequence to the next.
    "reading_on": (
        "grow.policy={name: schedule, settings: {steps: [8], way: joint, blueprint: memory, settings: {head_dim: 4}}}",
        "data.order=sequential",
    ),
}
"""Ways to learn, each with something that a process has for itself."""


def run(stage: Stage, n_processes: int, folder: Path, *more: str, breaks: str = "") -> Played:
    """A run that grows in so many processes; where there is one in the folder already, it goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = overrides(write_text(folder), *GROWS, *SHARED, *more)
    return stage.play(n_processes, "grow", folder, overrides=settings, breaks=breaks)


def assert_close(two: Path, one: Path) -> None:
    """Two processes came to what one did."""
    assert losses(two) == pytest.approx(losses(one), rel=TOLERANCE)
    found, expected = trees(two), trees(one)
    for name in ("model", "optim"):
        assert found[name].keys() == expected[name].keys()
        for key, tensor in expected[name].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-3, atol=TOLERANCE)


def assert_one(played: Played) -> None:
    """Both processes hold the same bits, and know the same of their seeds."""
    first, second = played.found(0), played.found(1)
    assert first == second and first["status"] == "finished"


def stages(run_dir: Path) -> list[list[tuple[int, str]]]:
    """By seed, the stages of its life with the step at which each began, by name."""
    return [
        [(each["step"], LifeStage(each["after"]).name) for each in life["history"]] for life in garden(run_dir)["lives"]
    ]


@pytest.mark.timeout(300)
def test_g1_two_processes_graft_and_prune_as_one_and_survive_the_loss_of_one_of_them(stage, tmp_path):
    """Undisturbed: between the two to the bit, to one process within rounding, new parts included. One that is killed
    five steps after the graft and again after the removal takes the other with it, and both go on to the bit."""
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    more = (planted("joint", PRUNE), "grow.gates.training_steps=100")
    run(stage, 1, one, *more).found()
    assert_one(run(stage, 2, two, *more))
    assert_close(two / "run", one / "run")
    for step in (GRAFT + 5, PRUNE + 2):
        played = run(stage, 2, broken, *more, breaks=f"struck:1:{step}")
        assert played.codes == [1, -9]
        assert "AgreementFailed" in (broken / "0.err").read_text()
    assert_one(run(stage, 2, broken, *more))
    assert_same(broken / "run", two / "run")
    saved = {
        folder: {each.step: each.path for each in entries(folder / "run" / "checkpoints")} for folder in (one, two)
    }
    before, grafted, after = (open_checkpoint(saved[two][step]) for step in (GRAFT, GRAFT + 1, PRUNE + 1))
    moments = [set(each.tree("optim")) for each in (before, grafted, after)]
    assert moments[0] == moments[2] < moments[1]
    assert seeds_in(load(saved[two][PRUNE]).model).keys() == {"blocks.1"}
    assert not seeds_in(load(saved[two][GRAFT]).model), "a checkpoint before the graft still opens"
    # The first moment after one step is a tenth of the gradient.
    (alone,) = (open_checkpoint(saved[one][GRAFT + 1]).tree("optim"),)
    for name in moments[1] - moments[0]:
        torch.testing.assert_close(grafted.tree("optim")[name], alone[name], rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_v7_two_processes_grow_as_one(stage, tmp_path, kind):
    """A whole life: on trial, blended in, on probation, judged, kept or removed: the same stages at the same steps."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(stage, 1, one, *KINDS[kind]).found()
    assert_one(run(stage, 2, two, *KINDS[kind]))
    assert stages(two / "run") == stages(one / "run") and stages(one / "run")[0][-1][0] > GRAFT
    assert_close(two / "run", one / "run")


def test_v7_what_one_process_cannot_do_none_does(stage, tmp_path):
    """One finds that its model is not what was planned: both put back what there was, say so, and train on as a run in
    which nothing was ever put in; so do model and optimizer at the end, to the bit."""
    spoilt, plain = tmp_path / "spoilt", tmp_path / "plain"
    played = run(stage, 2, spoilt, planted("joint"), breaks=f"unlike:1:{GRAFT}")
    assert_one(played)
    never = run(stage, 2, plain, "grow.policy={name: never}")
    assert [played.found()[what] == never.found()[what] for what in ("weights", "moments")] == [True, True]
    assert stages(spoilt / "run") == []
    for place in (spoilt / "run", spoilt / "run/ranks/1"):
        told = [each for each in read_records(place / "events.ndjson") if each["name"].startswith("graft.")]
        assert {each["name"] for each in told} == {"graft.undone", "graft.refused"}
        assert any("process 1 refused: " in str(each["payload"]) for each in told)


def test_parts_of_a_model_do_not_grow(stage, tmp_path):
    """Where each process holds a part of a weight the run is refused in one sentence, before anything is trained."""
    played = run(stage, 2, tmp_path, planted("joint"), "distributed.shard=true")
    assert played.codes == [1, 1]
    assert (
        "a change of structure needs every parameter whole. Set distributed.shard=false"
        in (tmp_path / "1.err").read_text()
    )
