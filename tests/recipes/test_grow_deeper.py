"""A budget of operations, and a schedule that makes the whole model deeper: killed, resumed, and what it costs."""

from pathlib import Path

import pytest

from meristem.checkpoint.store import Checkpoint, newest, open_checkpoint
from meristem.device.resolve import resolve
from meristem.events import silent
from meristem.growth import isolation
from meristem.growth.garden import Garden
from meristem.models.load import load
from meristem.optim.schedule import ScheduleProgress, rate_factor
from meristem.recipes.grow import grow
from meristem.recipes.plan.flops import counted, forward_flops
from meristem.recipes.pretrain import PASSES, pretrain
from meristem.runs.config import Config
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.growing import assert_same, garden, growing, killed_at, run_to_the_end
from recipes.small import config, write_text

POLICY = "{name: schedule, settings: {operation: OPERATION, shares: [0.3]}}"
BYTES = ("tokenizer.kind=byte", "checkpoint.every=4", "grow.seed_warmup=4")
N_TARGETS = 51
"""Of a step."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("deeper"))


def deepened(text: Path, operation: str, *more: str) -> Config:
    return growing(text, *BYTES, *more, policy=POLICY.replace("OPERATION", operation))


def last(run_dir: Path) -> Checkpoint:
    checkpoint = newest(run_dir / "checkpoints", silent)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", ["insert", pytest.param("stack", marks=pytest.mark.slow)])
def test_it_is_twice_as_deep_from_its_share_on_and_goes_on_to_the_bit(text, tmp_path, monkeypatch, operation):
    """At the first boundary after the share; killed before that was saved it goes on to the bit, its spending too."""
    settings = deepened(text, operation, "train.steps=null", "train.flops=4.0e7")
    run_to_the_end(settings, tmp_path / "whole")
    (step,) = garden(tmp_path / "whole")["deepened"]
    killed_at(monkeypatch, step + 1, settings, tmp_path / "run")
    run_to_the_end(settings, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    one, other = (last(tmp_path / name).value("progress") for name in ("run", "whole"))
    assert one["flops"] == other["flops"] >= 4e7 and garden(tmp_path / "run")["deepened"] == [step]
    (done,) = (each for each in read_records(tmp_path / "whole" / "events.ndjson") if each["name"] == "graft.done")
    assert done["step"] == step and (done["payload"]["max_error"] == 0) is (operation == "insert")
    spent = {each["step"]: each["metrics"]["flops"] for each in history(tmp_path / "run") if "flops" in each["metrics"]}
    assert max(flops for at, flops in spent.items() if at < step) < 0.3 * 4e7 + 4e6
    model, _ = load(last(tmp_path / "run").path)
    assert len(model.blocks) == 4
    saved = last(tmp_path / "run").tree("optim")
    since = [float(each[4]) for name, each in saved.items() if name.startswith("joined:")]
    assert since == ([step] * 2 if operation == "insert" else [step])
    n_steps = other["step"]
    assert saved["blocks.0.mlp.out.weight/step"] == n_steps
    # What is copied has the moments too; what is fresh has made the steps since.
    assert saved["blocks.3.mlp.out.weight/step"] == (n_steps - step if operation == "insert" else n_steps)


@pytest.mark.slow
def test_what_a_state_carries_moves_with_its_block(text, tmp_path):
    """In text that is read on and on, the memory of a block goes on in it, and a new one begins."""
    run_to_the_end(deepened(text, "insert", "data.order=sequential", "train.steps=9"), tmp_path / "run")
    assert garden(tmp_path / "run")["deepened"] == [4]
    assert {name.split(".")[1] for name in last(tmp_path / "run").tree("memory")} == {"0", "1", "2", "3"}


def test_a_budget_of_operations_is_spent_and_counted(text, tmp_path):
    """Three forward passes a step, known wherever held-out text was read; the rate falls to the end of the budget."""
    own = config(text, "tokenizer.kind=byte", "train.steps=null", "train.flops=5.0e6")
    assert (own.train.steps, own.train.tokens, own.train.max_time) == (None, None, None)
    result = pretrain(own, run_dir=tmp_path / "run")
    model, _ = load(result.checkpoint)
    each = PASSES * forward_flops(model, resolve(own.device, silent), own.data.seq_len)
    assert result.flops == pytest.approx(each * result.tokens)
    assert 5e6 <= result.flops < 5e6 + each * N_TARGETS and result.step > 3
    records = list(history(tmp_path / "run"))
    evaluated = [record for record in records if record["split"] == "val"]
    assert evaluated[-1]["metrics"]["flops"] == result.flops
    rates = [record["metrics"]["rate"] for record in records if record["split"] == "train"]
    done = ScheduleProgress(share=1 - (5e6 - (result.flops - each * N_TARGETS)) / 5e6, step=0, tokens=0)
    assert rates[-1] == pytest.approx(own.optim.lr * rate_factor(own.schedule, done))


def test_trials_gates_and_deciding_are_paid_for(text, tmp_path):
    """What a run has spent beside its training is what was done for its seed; one that is not tried spends nothing."""
    shadow = growing(text, *BYTES, "train.steps=null", "train.flops=1.7e8", "eval.every=4")
    result = grow(shadow, run_dir=tmp_path / "run")
    known = Garden.from_json(open_checkpoint(result.checkpoint).value("garden"))
    beside = result.flops - known.flops
    assert beside > known.probe_flops > 0 and result.flops >= 1.7e8
    n_evaluations = len(known.held_out)
    site_evaluation = 5 * 17 * known.flops / (PASSES * result.tokens)
    assert beside - known.probe_flops > 0.9 * n_evaluations * site_evaluation


@pytest.mark.parametrize(("slot", "is_played"), [("blocks.0", True), ("blocks.1", True), ("blocks.1", False)])
def test_a_shadow_pass_is_charged_with_what_it_computes(text, tmp_path, monkeypatch, slot, is_played):
    """Every operation of the passes of a seed, from where they begin, and none that they leave out."""
    passes = []
    real = isolation.shadow_gradients

    def watched(*began, **how):
        assert (how["tape"] is not None) is is_played
        found = []
        passes.append(counted(lambda: found.append(real(*began, **how))))
        return found[0]

    monkeypatch.setattr(isolation, "shadow_gradients", watched)
    if not is_played:
        monkeypatch.setattr(isolation, "_is_whole", lambda *_: False)
    settings = growing(text, *BYTES, f"grow.slots=[{slot}]", "grow.gates.training_steps=99", "train.steps=14")
    result = grow(settings, run_dir=tmp_path / "run")
    known = Garden.from_json(open_checkpoint(result.checkpoint).value("garden"))
    (life,) = known.lives
    assert life.paired.n == len(passes) == 4
    assert known.figures[life.seed]["flops_spent"] == pytest.approx(sum(passes))
    share = sum(passes) / (4 * known.flops / result.step)
    # Of a step by the native core they are 0.34, 0.46 and 0.50, of one by tensor code 0.30, 0.42 and 0.50.
    assert share < 0.4 if slot == "blocks.1" and is_played else 0.4 < share < 0.9
