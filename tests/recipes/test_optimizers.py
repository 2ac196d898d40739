"""Every optimizer, and all outer choices together, through one configuration and a whole run."""

import pytest
import torch

from meristem.memory.named import rules
from meristem.models.build import build
from meristem.models.load import load
from meristem.nn.cms_mlp import CMSMLP
from meristem.nn.mag import MemoryAsGate
from meristem.nn.self_reference import SelfReference
from meristem.optim.adamuon import AdaMuon
from meristem.optim.groups import build as build_optimizer
from meristem.optim.kinds import KINDS
from meristem.recipes.pretrain import pretrain
from meristem.sinks.records import history
from recipes.small import config, write_text

STEPS, CUT = 20, 7
BRIEF = (
    *(f"train.steps={STEPS}", f"checkpoint.every={CUT}", "checkpoint.last=9", "optim.lr=0.01", "model.dim=16"),
    *("eval.every=null", "eval.n_windows=2", "eval.n_windows_end=2", "eval.n_samples=0"),
)
LEVELS = ("model.levels.count=3", "model.levels.periods=[1, 2, 5]")


def nats(run):
    return [record["metrics"]["nats"] for record in history(run.run_dir) if record["split"] == "train"]


def weights(run):
    return load(run.checkpoint).model.state_dict()


def resumed(run, settings, place):
    """The same run from its first checkpoint on, elsewhere."""
    middle = next(path for path in (run.run_dir / "checkpoints").iterdir() if path.name.endswith(f"{CUT:08d}"))
    return pretrain(settings, run_dir=place / "resumed", resume=str(middle))


@pytest.mark.parametrize(
    "chosen", [*((f"optim.name={kind}",) for kind in KINDS), ("optim.name=m3", "optim.m3_ema=true")]
)
def test_every_kind_trains_the_micro_preset_and_resumes_to_the_bit(chosen, tmp_path):
    """S4-M12: one word of the configuration; the checkpoint lies between two updates of the slow levels."""
    settings = config(write_text(tmp_path), *BRIEF, *LEVELS, *chosen, preset="hope-attention-micro")
    run = pretrain(settings, run_dir=tmp_path / "whole")
    told = nats(run)
    print(chosen, f"{told[0]:.3f} -> {told[-1]:.3f} nats")
    assert sum(told[-3:]) < 0.95 * sum(told[:3])
    again = weights(resumed(run, settings, tmp_path))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(run).items())


def test_all_outer_choices_meet_in_one_config(tmp_path):
    """S3b-M4: AdaMuon, AdamW with betas and rates of each level, Atlas, convolution and a HOPE layer, trained together
    and resumed to the bit; what each key says is what was built."""
    settings = config(
        write_text(tmp_path),
        *BRIEF,
        *LEVELS,
        *("optim.name=adamuon", "optim.level_betas={5: [0.7, 0.8]}", "optim.level_rates={5: 3.0}"),
        *("model.layers=[{mixer: self_reference}, {mixer: mag, rule: atlas}]", "model.n_heads=2", "memory.conv=3"),
        preset="hope-micro",
    )
    model = build(settings.model, settings.memory, 256, 0)
    hope, atlas = (block.mixer for block in model.blocks)
    assert isinstance(hope, SelfReference) and isinstance(atlas, MemoryAsGate)
    rule, meant = atlas.recall.rule, rules.get("atlas")()
    assert (rule.span, rule.update.name, rule.features.name) == (meant.span, meant.update.name, meant.features.name)
    assert rule.span > 1, "and of no other rule"
    assert {hope.conv.weight_dc.shape[1], atlas.recall.conv.weight_dc.shape[1]} == {3}
    assert all(isinstance(block.mlp, CMSMLP) for block in model.blocks)
    optimizer = build_optimizer(model, settings.optim)
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW, AdaMuon]
    assert optimizer.clock.periods == (1, 2, 5)
    of_period = {group["period"]: group for group in optimizer.parts[0].param_groups}
    assert [of_period[period]["betas"] for period in (1, 2, 5)] == [(0.9, 0.95), (0.9, 0.95), (0.7, 0.8)]
    rates = {group["period"]: group["lr"] / settings.optim.lr for group in optimizer.param_groups}
    assert rates == pytest.approx({1: 1.0, 2: 2**0.5, 5: 3.0})
    run = pretrain(settings, run_dir=tmp_path / "whole")
    told, after, first = nats(run), weights(run), build(settings.model, settings.memory, 256, 0).state_dict()
    assert sum(told[-3:]) < 0.95 * sum(told[:3])
    assert not [name for name, tensor in after.items() if torch.equal(tensor, first[name])], "all of it learns"
    again = weights(resumed(run, settings, tmp_path))
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())
