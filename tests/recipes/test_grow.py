"""A run that grows: whole, killed, rolled back, and against one that does not."""

import json
import shutil
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import orjson
import pytest
import torch

from meristem.checkpoint.run import read
from meristem.cli import run
from meristem.errors import RunError, UnknownKey, WrongValue
from meristem.growth.garden import Garden
from meristem.growth.graft import seeds_in
from meristem.growth.request import FOLDER, pending
from meristem.growth.stage import Stage
from meristem.models.growing import Limit, RiskConfig
from meristem.recipes.grow import Growth, grow, prepare
from meristem.recipes.pretrain import begun, pretrain, train_until_trouble
from meristem.runs.growth import draw_lives, lives_of, table
from meristem.runs.logging import Log
from meristem.runs.resume import contents
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.growing import (
    READINGS,
    TINY,
    Watching,
    assert_same,
    garden,
    growing,
    killed_at,
    losses,
    planted,
    run_to_the_end,
)
from recipes.small import config, write_text

WHOLE = ["GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("grow"))


@pytest.fixture(scope="module")
def run_dir(text: Path) -> Path:
    """Of a run in which one seed goes through all stages."""
    run_to_the_end(growing(text), text.parent / "whole")
    return text.parent / "whole"


def test_a_seed_lives_a_whole_life(run_dir):
    """Each stage comes at the boundary at which it is due, and each gate has its numbers in the record."""
    (life,) = Garden.from_json(garden(run_dir)).lives
    assert [each.after.name for each in life.history][:5] == WHOLE
    assert [each.step for each in life.history][:5] == [8, 10, 14, 18, 22]
    assert life.stage is Stage.FOSSILIZED and life.paired.n == 4
    results = [each.to_json() for each in Garden.from_json(garden(run_dir)).results]
    assert [each["gate"] for each in results][:6] == ["G0", "G1", "G2", "G3", "G4", "G6"]
    told = [each for each in read_records(run_dir / "events.ndjson") if each["name"].startswith("gate.")]
    assert [each["payload"]["gate"] for each in told] == [each["gate"] for each in results]
    assert read(run_dir)["status"] == "finished"


def test_its_life_is_told(run_dir, tmp_path):
    (found,) = lives_of(run_dir)
    titles, (row,) = table([found])
    shown = dict(zip(titles, row, strict=True))
    assert shown["seed"] == "blocks.1#0" and "blending 14" in shown["stages"] and shown["gained"]
    assert found.report and found.report.run_id and found.report.issued_at
    draw_lives(tmp_path / "lives.png", run_dir, [found])
    assert (tmp_path / "lives.png").read_bytes().startswith(b"\x89PNG")


def test_v3_killed_at_every_boundary_it_goes_on_to_the_bit(text, run_dir, tmp_path, monkeypatch):
    """After the graft, in the middle of its trial, and after the verdict, each time before that was saved."""
    settings = growing(text, "checkpoint.every=2")
    for step in (9, 13, 26):
        killed_at(monkeypatch, step, settings, tmp_path / "run")
    run_to_the_end(settings, tmp_path / "run")
    assert_same(tmp_path / "run", run_dir)
    kept, expected = garden(tmp_path / "run"), garden(run_dir)
    for order in (*kept["queue"], *expected["queue"]):
        del order["run_id"]
    assert kept == expected


@pytest.mark.slow
def test_v3_a_capped_seed_is_killed_on_trial_and_goes_on_to_the_bit(text, tmp_path, monkeypatch):
    """What the model does not say of the way in which it learns, the garden does."""
    policy = "{name: planted, settings: {at: 8, way: capped}}"
    settings = growing(text, "checkpoint.every=2", "train.steps=18", policy=policy)
    run_to_the_end(settings, tmp_path / "whole")
    killed_at(monkeypatch, 12, settings, tmp_path / "run")
    run_to_the_end(settings, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    (life,) = Garden.from_json(garden(tmp_path / "run")).lives
    assert life.way == "capped" and life.stage is Stage.BLENDING


@pytest.mark.parametrize("n_snapshots", [2, 0])
def test_v4_a_rollback_across_a_graft_brings_back_everything(text, tmp_path, n_snapshots):
    """From memory or from the disk: the probe costs what it cost, and the seed, its moments and its life are gone."""
    settings = growing(text, f"rollback.snapshots={n_snapshots}")
    with begun(
        settings,
        run_dir=tmp_path / "run",
        resume="never",
        view=None,
        planned=None,
        make_job=prepare,
        time_scale=1000.0,
    ) as (run, job, recovery):
        growth = Growth(run, job, recovery, planted(settings.grow.policy.settings))
        made = train_until_trouble(job, recovery, Log(run, job), growth)
        assert not any(islice(made, 8))
        recovery.save(reason="interval", metrics={})
        before, log = contents(job, recovery.safety, 0.0), job.state.topology
        expected = {name: {key: x.clone() for key, x in tree.items()} for name, tree in before.trees.items()}
        assert not any(islice(made, 3))
        (life,) = job.state.garden.lives
        assert life.stage is Stage.TRAINING and len(job.state.topology) > len(log)
        recovery.roll_back(reason="asked")
        after = contents(job, recovery.safety, 0.0)
        for name, tree in expected.items():
            assert after.trees[name].keys() == tree.keys()
            assert all(torch.equal(after.trees[name][key], tensor) for key, tensor in tree.items())
        assert (
            after.values["garden"] == before.values["garden"] and after.values["topology"] == before.values["topology"]
        )
        assert not seeds_in(job.model) and not job.state.garden.lives
        # What was undone comes again, on other text.
        assert not any(islice(train_until_trouble(job, recovery, Log(run, job), growth), 4))
        assert [each.stage for each in job.state.garden.lives] == [Stage.TRAINING]


@pytest.mark.slow
def test_a_grown_model_is_opened_by_name_alone(run_dir):
    """In a process that knows nothing of growth."""
    probe = (
        "import sys, meristem; model, _ = meristem.load(sys.argv[1]); "
        "print(sum(each.numel() for name, each in model.named_parameters() if '.slot.' in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, str(run_dir)], check=True, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "224\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_seed_is_certified_beside_the_run(text, tmp_path):
    """Its stages come at the same steps, and all is to the bit that of a run that does not ask for it."""
    run_to_the_end(growing(text, "grow.certify=true", "train.steps=12"), tmp_path / "run")
    run_to_the_end(growing(text, "train.steps=12"), tmp_path / "plain")
    told = [each["name"] for each in read_records(tmp_path / "run" / "events.ndjson")]
    assert told.count("certificate.issued") == 1
    (life,) = Garden.from_json(garden(tmp_path / "run")).lives
    assert [(each.after.name, each.step) for each in life.history] == [("GERMINATED", 8), ("TRAINING", 10)]
    assert_same(tmp_path / "run", tmp_path / "plain")


def test_v10_growth_that_is_never_triggered_changes_no_bit(text, tmp_path):
    """The same run without growth has the same losses, weights, moments and random numbers."""
    grow(growing(text, "train.steps=10", policy="{name: never}"), run_dir=tmp_path / "grown")
    pretrain(config(text, *TINY, "train.steps=10", preset="titans-mag"), run_dir=tmp_path / "plain")
    assert_same(tmp_path / "grown", tmp_path / "plain")


def test_a_seed_that_is_requested_from_outside_is_put_in_once(text, tmp_path, capsys):
    """While the loss still falls; a run that was killed before it was saved puts it in at the same step again."""
    policy = "{name: heuristic, settings: {blueprints: {bottleneck: {hidden: 8}}}}"
    settings = growing(text, "train.steps=8", "checkpoint.every=4", policy=policy)
    place = tmp_path / "run"
    grow(growing(text, "train.steps=2", policy=policy), run_dir=tmp_path / "short")
    assert run(["grow", "request", str(tmp_path / "short"), "--why", "another text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["why"] == "another text"
    (file,) = (tmp_path / "short" / FOLDER).iterdir()
    (place / FOLDER).mkdir(parents=True)
    shutil.copy(file, place / FOLDER)
    (place / FOLDER / "broken.json").write_text("{")
    run_to_the_end(settings, place)
    (life,) = Garden.from_json(garden(place)).lives
    assert (life.born, life.history[0].reason) == (2, "it was requested")
    assert orjson.loads((place / FOLDER / file.name).read_bytes())["seen"] == 2
    told = [each["name"] for each in read_records(place / "events.ndjson")]
    assert told.count("growth.requested") == 1 and "request.corrupt" in told
    assert [each.seen for each in pending(place, Garden(), 8)] == [2]
    assert not pending(place, Garden(), 1), "a boundary before it was seen knows nothing of it"
    assert not pending(place, Garden.from_json(garden(place)), 8)


def test_t5_a_policy_that_learns_sees_numbers_and_keeps_its_scales(text, tmp_path):
    """Its checkpoints have them; a file takes them to the next run, and one that cannot be read is refused."""
    file, Watching.seen = tmp_path / "scales.json", []
    policy = f"{{name: watching, normaliser: {file}, normaliser_every: 2}}"
    grow(growing(text, "train.steps=8", policy=policy), run_dir=tmp_path / "first")
    assert len(Watching.seen) == 3 and Watching.seen[0].features["blocks.1/stage/DORMANT"].is_present
    kept = orjson.loads(file.read_bytes())
    assert kept == garden(tmp_path / "first")["normaliser"] and kept["moments"]["step"][0] > 2
    grow(growing(text, "train.steps=4", policy=policy), run_dir=tmp_path / "second")
    assert abs(Watching.seen[3].features["step"].value) > 0, "it is scaled by what the first run has seen"
    policy = f"{{name: watching, normaliser: {file}/below, normaliser_every: 2}}"
    with pytest.raises(RunError, match="cannot be read"):
        grow(growing(text, "train.steps=4", policy=policy), run_dir=tmp_path / "third")
    assert not losses(tmp_path / "third")


def test_every_limit_of_risk_is_of_a_number_that_the_run_measures(text, tmp_path):
    """On a processor all but the share of an accelerator's memory and the conflict of objectives, which are not
    separated; the policy's own risk is of its proposal, and a jump of two evaluations."""
    READINGS.clear()
    policy = "{name: recording, settings: {at: 4, way: joint}}"
    grow(growing(text, "train.steps=9", policy=policy), run_dir=tmp_path / "run")
    limits = {name for name, kind in RiskConfig.model_fields.items() if kind.annotation is Limit}
    first, last = READINGS[0].metrics, READINGS[-1].metrics
    assert limits - last.keys() == {"policy_risk", "held_out_jump"} and len(READINGS[-1].held_out) > 1
    assert {name for name in limits & last.keys() if last[name] is None} == {"gradient_conflict", "memory_share"}
    assert first["apply_ms"] is None and first["loss_volatility"] is None and last["apply_ms"] > 0 < last["step_ms"]
    steps = [record["metrics"] for record in history(tmp_path / "run") if record["split"] == "train"]
    norms = [each["grad_norm"] for each in steps[: READINGS[-1].step]]
    assert last["gradient_norm"] == pytest.approx(statistics.median(norms))


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("grow.slots=[block.1]", "no module is called 'block.1'. Nearest: blocks.1"),
        ("grow.policy.name=plantd", "planted"),
        ("grow.params_ratio=1.0001", "grow.params_ratio=1.0001 leaves"),
    ],
)
def test_bad_input_is_one_sentence(text, tmp_path, setting, match):
    """Before a step is made, and with what to do."""
    with pytest.raises((WrongValue, UnknownKey), match=match) as caught:
        grow(growing(text, setting), run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "match"),
    [("{steps: [8], blueprint: bottle_neck}", "bottleneck"), ("{steps: [8], settings: {hiden: 8}}", "hidden")],
)
def test_a_policy_with_wrong_settings_is_refused_before_anything_is_made(text, tmp_path, settings, match):
    with pytest.raises((WrongValue, UnknownKey), match=match):
        grow(growing(text, policy=f"{{name: schedule, settings: {settings}}}"), run_dir=tmp_path / "run")
    assert not losses(tmp_path / "run")
