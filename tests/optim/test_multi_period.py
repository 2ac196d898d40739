"""Levels that move at their own periods, and what waits in between."""

import math

import pytest
import torch
from torch import nn

from meristem.models.build import build as build_model
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build, split
from meristem.optim.kinds import KINDS
from optim.levels import Levelled, copied, equal, loss_at, step, train, weights
from zoo import VOCABULARY, ZOO, ids

every_kind = pytest.mark.parametrize("kind", KINDS)


def gradients(model, index):
    """Of the loss at an index, by name, without touching what the model holds."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss_at(model, index), list(model.parameters())), strict=True))


def plain(model: nn.Module, config: OptimConfig):
    """AdamW over two groups and one norm over everything: what this package did before it had levels."""
    decayed, rest = split(model)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-chargru", "lm-persistent"])
@pytest.mark.parametrize("clip", [0.05, None])
def test_one_level_is_bitwise_the_plain_path(name, clip):
    """Memory.md 6.4: L = 1, C = 1 is bitwise the plain path: fused AdamW, one norm, spoilt steps left out."""
    part = OptimConfig(lr=0.01, grad_clip=clip)
    mine, its = (build_model(*ZOO[name], VOCABULARY, random_seed=3) for _ in range(2))
    optimizer, other = build(mine, part), plain(its, part)
    for index in range(6):
        norms = []
        for model in (mine, its):
            logits_bto, _ = model(ids(2, random_seed=index))
            loss = logits_bto.square().mean() * (math.nan if index == 3 else 1.0)
            loss.backward()
            if model is mine:
                norms.append(optimizer.step(loss.detach()).norm)
            else:
                norms.append(nn.utils.clip_grad_norm_(its.parameters(), math.inf if clip is None else clip))
                other.found_inf = (~(torch.isfinite(loss) & torch.isfinite(norms[-1]))).float()
                other.step()
        optimizer.zero_grad()
        other.zero_grad()
        assert torch.equal(*norms) or index == 3
        assert equal(weights(mine), weights(its))


def test_a_level_that_always_fires_is_adamw():
    """S3b-S16: with every period 1 the steps are those of ``torch.optim.AdamW`` over all parameters."""
    model, other = Levelled(1, 1), Levelled(1, 1)
    optimizer = build(model, OptimConfig(weight_decay=0.0, grad_clip=None))
    truth = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for index in range(9):
        step(model, optimizer, index)
        loss_at(other, index).backward()
        truth.step()
        truth.zero_grad()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


def test_counters_count_fires():
    """S3b-S16: after 8 steps of (1, 8) the counters that correct the bias are (8, 1)."""
    model = Levelled(8)
    optimizer = build(model, OptimConfig())
    train(model, optimizer, range(8))
    counts = {int(held["step"]) for held in (optimizer.state[p] for p in (model.scale, *model.norm.parameters()))}
    assert counts == {8}
    assert {int(optimizer.state[p]["step"]) for p in model.layers[0].parameters()} == {1}
    assert optimizer.clock.count == 8


def test_four_levels_over_512_steps():
    """S1-M3: within 512 steps of (1, 8, 64, 512) the levels fire (512, 64, 8, 1) times, and every parameter moved."""
    model = Levelled(8, 64, 512)
    optimizer, before = build(model, OptimConfig()), weights(model)
    train(model, optimizer, range(512))
    slow = [int(optimizer.state[layer.weight]["step"]) for layer in model.layers]
    assert (int(optimizer.state[model.scale]["step"]), *slow) == (512, 64, 8, 1)
    assert not any(torch.equal(now, before[name]) for name, now in weights(model).items())


def test_a_level_is_frozen_between_its_fires():
    """S1-M1: over 24 steps the level of period 8 moves in steps 0, 8 and 16, and is the same to the bit between."""
    model = Levelled(8)
    optimizer, moved = build(model, OptimConfig()), []
    for index in range(24):
        before = weights(model)
        step(model, optimizer, index)
        changed = {name for name, now in weights(model).items() if not torch.equal(now, before[name])}
        assert {"scale", "norm.weight", "norm.bias"} <= changed
        moved += [index] if any(name.startswith("layers") for name in changed) else []
    assert moved == [0, 8, 16]


def test_pending_is_the_sum():
    """S1-M1: n equal gradients g leave n g waiting, none of it once the level has fired."""
    model = Levelled(8)
    optimizer = build(model, OptimConfig(lr=1e-30))
    found = []
    for _ in range(9):
        step(model, optimizer, 0)
        found.append(optimizer.pending[model.layers[0].weight].clone())
    gradient = gradients(model, 0)["layers.0.weight"]
    for n_steps, pending in enumerate(found[:8]):
        torch.testing.assert_close(pending, n_steps * gradient)
    assert not found[8].any()


def test_a_slow_level_is_adamw_on_sums():
    """Its fires are AdamW steps on the clipped sum of the gradients since the last, at its own rate and betas."""
    part = OptimConfig(lr=0.01, grad_clip=0.1, weight_decay=0.3, level_rates={3: 2.0}, level_betas={3: (0.5, 0.7)})
    model = Levelled(3)
    optimizer, slow = build(model, part), model.layers[0]
    other = nn.Linear(5, 5)
    other.load_state_dict(slow.state_dict())
    settings = {"lr": 0.02, "betas": (0.5, 0.7)}
    groups = [{"params": [other.weight], "weight_decay": 0.3}, {"params": [other.bias], "weight_decay": 0.0}]
    truth = torch.optim.AdamW(groups, **settings)
    sums = [torch.zeros_like(other.weight), torch.zeros_like(other.bias)]
    for index in range(8):
        found = gradients(model, index)
        sums = [held + found[f"layers.0.{name}"] for held, name in zip(sums, ("weight", "bias"), strict=True)]
        if index % 3 == 0:
            other.weight.grad, other.bias.grad = sums
            assert nn.utils.clip_grad_norm_(other.parameters(), 0.1) > 0.1, "it was in need of clipping"
            truth.step()
            sums = [torch.zeros_like(held) for held in sums]
        step(model, optimizer, index)
        torch.testing.assert_close(slow.weight, other.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(slow.bias, other.bias, rtol=0, atol=1e-6)


def test_levels_are_clipped_apart():
    """A slow level with a large sum takes nothing from the step of the fast one."""
    reached = []
    for factor in (1.0, 1e6):
        model = Levelled(2)
        optimizer = build(model, OptimConfig(name="sgd", momentum=0.0, lr=0.1, grad_clip=0.01))
        model.layers[0].weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        step(model, optimizer, 0)
        reached.append(model.scale.detach().clone())
    assert torch.equal(*reached)


def test_the_norm_told_is_that_of_this_step():
    """Of all levels together and before clipping, also where a level waits or takes a sum."""
    model = Levelled(2, 3)
    optimizer = build(model, OptimConfig(grad_clip=1e-3))
    for index in range(7):
        wanted = nn.utils.get_total_norm(gradients(model, index).values())
        torch.testing.assert_close(step(model, optimizer, index).norm, wanted)


@every_kind
@pytest.mark.parametrize("bad", [0, 4, 6])
def test_a_spoilt_step_leaves_everything_as_it_was(kind, bad):
    """Weights, moments, counters and what waits, whether a level was due (0, 6) or not (4); the clock goes on.

    What was due waits for its next turn, with all that had been gathered.
    """
    model = Levelled(3)
    optimizer = build(model, OptimConfig(name=kind, lr=0.01))
    train(model, optimizer, range(bad))
    before = weights(model), copied(state.tensors(model, optimizer))
    assert step(model, optimizer, bad, math.nan).is_skipped
    after = state.tensors(model, optimizer)
    assert equal(before[0], weights(model))
    assert optimizer.clock.count == bad + 1
    for name in before[1].keys() - {"clock/count"}:
        assert torch.equal(before[1][name], after[name]) or name.endswith("n_steps"), name
    new = after.keys() - before[1].keys()
    assert not any(after[name].any() for name in new if not name.endswith("n_steps")), "made in it, and still empty"
    train(model, optimizer, range(bad + 1, bad + 5))
    assert not any(torch.equal(now, before[0][name]) for name, now in weights(model).items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@every_kind
def test_nothing_is_lost_when_a_run_ends_between_fires(kind):
    """``flush`` moves what waits, and only that; a second one does nothing."""
    model = Levelled(3)
    optimizer = build(model, OptimConfig(name=kind, lr=0.01))
    train(model, optimizer, range(5))
    before = weights(model)
    optimizer.flush()
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"layers.0.weight", "layers.0.bias"}
    optimizer.flush()
    assert equal(after, weights(model))
    train(model, optimizer, range(5, 8))
    assert not torch.equal(model.layers[0].weight, after["layers.0.weight"]), "and the run may go on"


def test_nothing_is_lost_when_the_last_step_was_due_and_spoilt():
    model = Levelled(3)
    optimizer = build(model, OptimConfig(lr=0.01))
    train(model, optimizer, range(6))
    step(model, optimizer, 6, math.nan)
    before = weights(model)
    optimizer.flush()
    assert not torch.equal(model.layers[0].weight, before["layers.0.weight"])
    assert torch.equal(model.scale, before["scale"])


def test_nothing_waits_right_after_a_fire():
    model = Levelled(3)
    optimizer = build(model, OptimConfig())
    train(model, optimizer, range(4))
    before = weights(model)
    optimizer.flush()
    assert equal(before, weights(model))


def test_health_tells_agreement_from_a_random_walk():
    """Memory.md 6.4: gradients that agree give the ratio n; of alternating ones at most one is left."""
    coherent, alternating = Levelled(64), Levelled(64)
    for model, signs in ((coherent, (1.0, 1.0)), (alternating, (1.0, -1.0))):
        optimizer = build(model, OptimConfig(lr=1e-30))
        assert optimizer.health() == {}
        for index in range(21):
            step(model, optimizer, 0, signs[index % 2])
        health = optimizer.health()
        assert list(health) == [64] and health[64].n_steps == 20
        assert health[64].ratio == pytest.approx(20 if model is coherent else 0, abs=1e-3)


def test_pending_is_kept_in_full_precision():
    """A thousand small gradients add up in bfloat16 weights, whose own precision would lose them."""
    model = Levelled(10_000).to(torch.bfloat16)
    optimizer = build(model, OptimConfig(lr=1e-30))
    weight = model.layers[0].weight
    for _ in range(601):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0)
        optimizer.step()
    assert optimizer.pending[weight].dtype == torch.float32
    assert torch.equal(optimizer.pending[weight], torch.full_like(weight, 600.0, dtype=torch.float32))
