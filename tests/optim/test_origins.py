"""Seeds beside their host in one optimizer: groups of their own, clipped, warmed up and dropped by themselves."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import SEEDS, bits, host, logits
from meristem.checkpoint.store import open_checkpoint, save
from meristem.errors import StateTransferFailed, WrongValue
from meristem.events import Event
from meristem.nn.slot import CHILD
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.kinds import KINDS
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import HOST, SEED, SeedSettings, origin_of
from meristem.optim.schedule import set_rates

PLACE, ORIGIN = "blocks.1", "seed:blocks.1"
every_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str, **settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"name": kind, "lr": 1e-2, **settings})


def step(model: nn.Module, optimizer: MultiPeriodOptimizer, index: int, seed: grow.Seed | None = None) -> None:
    """A step on the loss of the host alone, and of the seed alone on what is beside it."""
    loss = logits(model, zoo.ids(2, random_seed=index)).square().mean()
    loss.backward()
    for each in seed.parameters() if seed else ():
        each.grad = torch.full_like(each, 3.0)
    optimizer.step(loss.detach())
    optimizer.zero_grad()


def with_seed(kind: str, **settings: object) -> tuple[nn.Module, grow.Seed, MultiPeriodOptimizer]:
    """A host after two steps, with a seed that joined then and is not called."""
    model = grow.attach(host("preset-default", torch.float32), PLACE)
    optimizer = build(model, config_of(kind))
    for index in range(2):
        step(model, optimizer, index)
    seed = grow.graft(model, PLACE, "bottleneck", hidden=5)
    grow.set_blend(model, PLACE, 0.0)
    return model, seed, grow.carry_on(optimizer, model, config_of(kind), settings=SeedSettings(**settings))


def of_host(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, x in found.items()
        if origin_of(name) == HOST and not name.startswith(("seed:", "clock"))
    }


def test_the_name_of_a_seed_is_that_which_slots_give() -> None:
    model = grow.attach(host("preset-default"), PLACE)
    grow.graft(model, PLACE, "norm")
    assert {origin_of(name) for name, _ in model.named_parameters()} == {HOST, ORIGIN}
    assert SEED == f".{CHILD}.seed."


@pytest.mark.parametrize("kind, clip", [(kind, 1e-3) for kind in KINDS] + [("adamw", None)])
def test_a_host_moves_as_without_its_seed(kind: str, clip: float | None) -> None:
    """Its weights and moments are those of a run without one, to the bit, however large the gradients of the seed."""
    model = grow.attach(host("preset-default", torch.float32), PLACE)
    alone, config = copy.deepcopy(model), config_of(kind, grad_clip=clip)
    seed = grow.graft(model, PLACE, "gated_feedforward", hidden=7)
    grow.set_blend(model, PLACE, 0.0)
    mine, its = build(model, config), build(alone, config)
    first = bits(seed)
    for index in range(3):
        step(model, mine, index, seed)
        step(alone, its, index)
    assert of_host(dict(model.named_parameters())) == of_host(dict(alone.named_parameters()))
    assert of_host(state.tensors(model, mine)) == of_host(state.tensors(alone, its))
    assert bits(seed) != first


def test_groups_are_named_by_origin() -> None:
    """Growth.md 10.1: every parameter in one group, each group of one origin, the host's named as ever."""
    model, seed, optimizer = with_seed("muon")
    names = {group["name"]: group["origin"] for group in optimizer.param_groups}
    assert set(names.values()) == {HOST, ORIGIN}
    assert all(name.startswith(f"{ORIGIN}:level:1:") == (origin == ORIGIN) for name, origin in names.items())
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert optimizer.param_groups[0]["origin"] == HOST


@every_kind
def test_what_has_no_gradient_is_not_touched(kind: str) -> None:
    """No decay, no moments, no step count."""
    model, seed, optimizer = with_seed(kind, warmup_steps=0)
    first = bits(seed)
    step(model, optimizer, 2)
    assert bits(seed) == first and not any(each in optimizer.state for each in seed.parameters())
    step(model, optimizer, 3, seed)
    moved, gathered = bits(seed), copy.deepcopy([optimizer.state[each] for each in seed.parameters()])
    assert moved != first
    step(model, optimizer, 4)
    assert bits(seed) == moved
    for each, before in zip(seed.parameters(), gathered, strict=True):
        assert all(
            torch.equal(torch.as_tensor(optimizer.state[each][name]), torch.as_tensor(before[name])) for name in before
        )


class Slow(nn.Module):
    """A layer whose parameters move at every second step, with a slot whose seed moves with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)
        self.layer.period = 2

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_btd)


def test_a_slow_seed_without_gradients_is_not_touched_either() -> None:
    """What waits is used once; where nothing came, a level of a seed that is due stays as it is."""
    model = grow.attach(Slow(), "layer")
    seed = grow.graft(model, "layer", "low_rank", rank=2)
    optimizer = build(model, config_of("adamw"))
    seen: list[dict[str, bytes]] = []
    for index in range(6):
        model(torch.ones(1, 1, 5)).sum().backward()
        for each in seed.parameters():
            each.grad = torch.ones_like(each) if index == 1 else None
        optimizer.step()
        optimizer.zero_grad()
        seen.append(bits(seed))
    assert seen[0] == seen[1] != seen[2] == seen[3] == seen[4] == seen[5]
    assert optimizer.state[seed.layer.out.weight]["step"] == 1


def test_v9_a_spoilt_gradient_of_a_seed_is_dropped_alone() -> None:
    """The host steps as without it; the seed stays to the bit, and the drop is counted and saved."""
    model, seed, optimizer = with_seed("adamw", warmup_steps=0)
    alone, _, its = with_seed("adamw", warmup_steps=0)
    first = bits(seed)
    for spoilt in (math.nan, math.inf):
        loss = logits(model, zoo.ids(2)).square().mean()
        loss.backward()
        for each in seed.parameters():
            each.grad = torch.full_like(each, spoilt)
        assert not optimizer.step(loss.detach()).is_skipped
        optimizer.zero_grad()
        step(alone, its, 0)
    assert of_host(dict(model.named_parameters())) != of_host(
        dict(host("preset-default", torch.float32).named_parameters())
    )
    assert bits(seed) == first and optimizer.n_dropped() == {ORIGIN: 2}
    other = build(model, config_of("adamw"))
    state.restore(model, other, state.tensors(model, optimizer))
    assert other.n_dropped() == {ORIGIN: 2}
    assert grow.carry_on(other, model, config_of("adamw")).n_dropped() == {ORIGIN: 2}


def test_v9_a_spoilt_host_holds_its_seed_back() -> None:
    model, seed, optimizer = with_seed("adamw", warmup_steps=0)
    first = bits(model)
    (logits(model, zoo.ids(2)).mean() * math.nan).backward()
    for each in seed.parameters():
        each.grad = torch.ones_like(each)
    assert optimizer.step().is_skipped and bits(model) == first and optimizer.n_dropped() == {ORIGIN: 0}


def test_a_seed_is_clipped_by_its_own_norm() -> None:
    """Two gradients above its largest norm move it alike, whatever that of the host is."""
    found = []
    for size in (1.0, 50.0):
        model, seed, optimizer = with_seed("sgd", warmup_steps=0, grad_clip=0.1)
        loss = logits(model, zoo.ids(2)).square().mean()
        loss.backward()
        for each in seed.parameters():
            each.grad = torch.full_like(each, size)
        optimizer.step(loss.detach())
        found.append(torch.cat([each.detach().flatten() for each in seed.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_the_rate_of_a_seed_is_warmed_up_from_where_it_joined() -> None:
    """Growth.md 10.2: rate_g(t) = rate(t) scale_g (f0 + (1 - f0) min(1, (t - t0) / W)); that of the host is rate(t)."""
    model, seed, optimizer = with_seed("adamw", warmup_steps=4, warmup_start=0.2, rate_scale=0.5)
    assert optimizer.settings[ORIGIN].since == 2
    seen = []
    for index in range(6):
        set_rates(optimizer, 0.5)
        rates = {group["origin"]: group["lr"] for group in optimizer.param_groups}
        assert rates[HOST] == 0.5 * 1e-2
        seen.append(rates[ORIGIN] / rates[HOST])
        step(model, optimizer, index)
    assert seen == pytest.approx([0.5 * each for each in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)])
    assert SeedSettings(since=7).factor(7) == 0 and SeedSettings(since=7).factor(107) == 1


@pytest.mark.parametrize(
    "wrong", [{"rate_scale": 0.0}, {"warmup_steps": -1}, {"warmup_start": 1.5}, {"grad_clip": 0.0}]
)
def test_settings_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(WrongValue, match=f"a seed cannot be moved like this: {next(iter(wrong))} is"):
        SeedSettings(**wrong)


@every_kind
def test_the_settings_of_a_seed_are_saved(kind: str) -> None:
    """What an optimizer made anew does after a restore is what the old one does, its warm-up included, to the bit."""
    model, seed, optimizer = with_seed(kind, warmup_steps=6, rate_scale=0.3, grad_clip=None)
    step(model, optimizer, 2, seed)
    saved = {name: each.clone() for name, each in state.tensors(model, optimizer).items()}
    other_model = copy.deepcopy(model)
    other = build(other_model, config_of(kind))
    state.restore(other_model, other, saved)
    assert other.settings == optimizer.settings
    for index in (3, 4):
        for each, its in ((model, optimizer), (other_model, other)):
            set_rates(its, 0.7)
            step(each, its, index, grow.seeds_in(each)[PLACE])
    assert bits(model) == bits(other_model)


def test_the_settings_of_a_seed_are_in_a_checkpoint(tmp_path: Path) -> None:
    """Through the files of one and back."""
    model, seed, optimizer = with_seed("adamw", warmup_steps=6, rate_scale=0.3)
    step(model, optimizer, 2, seed)
    trees = {"optim": state.tensors(model, optimizer)}
    path = save(tmp_path, step=3, trees=trees, values={}, files={}, header={})
    other = build(model, config_of("adamw"))
    state.restore(model, other, open_checkpoint(path).tree("optim"))
    assert other.settings == {ORIGIN: SeedSettings(0.3, 6, since=2)} == optimizer.settings


def test_an_optimizer_that_was_saved_before_seeds_had_settings_is_restored() -> None:
    model, seed, optimizer = with_seed("adamw")
    saved = {name: x for name, x in state.tensors(model, optimizer).items() if not name.startswith("seed:")}
    other = build(model, config_of("adamw"))
    state.restore(model, other, saved)
    assert other.settings[ORIGIN].factor(other.clock.count) == 1


def test_l13_settings_go_on_with_their_seed() -> None:
    """Those of a seed that stays are kept when another joins or goes."""
    model, seed, optimizer = with_seed("adamw", rate_scale=0.3)
    grow.attach(model, "blocks.0")
    grow.graft(model, "blocks.0", "norm")
    both = grow.carry_on(optimizer, model, config_of("adamw"))
    assert both.settings == {"seed:blocks.0": SeedSettings(since=2), ORIGIN: SeedSettings(rate_scale=0.3, since=2)}
    grow.remove(model, "blocks.0")
    one = grow.carry_on(both, model, config_of("adamw"))
    assert one.settings == optimizer.settings
    grow.remove(model, PLACE)
    grow.graft(model, PLACE, "norm")
    assert grow.carry_on(one, model, config_of("adamw")).settings == {ORIGIN: SeedSettings(since=2)}


@pytest.fixture(params=[name for name in SEEDS if "-" not in name])
def blueprint(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_v2_a_seed_that_came_and_went_leaves_the_optimizer_as_it_was(blueprint: str) -> None:
    """Attach and detach is the identity on the bytes of host and optimizer."""
    model = grow.attach(host("preset-default", torch.float32), PLACE)
    optimizer = build(model, config_of("adamw"))
    step(model, optimizer, 0)
    before = bits(model), of_host(state.tensors(model, optimizer)), [group["name"] for group in optimizer.param_groups]
    name, settings = SEEDS[blueprint]
    grow.graft(model, PLACE, name, **settings)
    grown = grow.carry_on(optimizer, model, config_of("adamw"))
    grow.remove(model, PLACE)
    after = grow.carry_on(grown, model, config_of("adamw"))
    found = bits(model), of_host(state.tensors(model, after)), [group["name"] for group in after.param_groups]
    assert found == before and after.settings == {}


def test_l14_a_transfer_that_would_lose_moments_is_refused() -> None:
    """StateTransferFailed with an event, and the old optimizer goes on."""
    model, _, optimizer = with_seed("adamw")
    before, events = copy.deepcopy(state.tensors(model, optimizer)), list[Event]()
    with pytest.raises(StateTransferFailed, match="is of no use to the optimizer 'muon'.*stays in use"):
        grow.carry_on(optimizer, model, config_of("muon"), emit=events.append)
    assert [event.name for event in events] == ["optimizer.carry_failed"]
    found = state.tensors(model, optimizer)
    assert all(torch.equal(found[name], each) for name, each in before.items())
    grow.carry_on(optimizer, model, config_of("adamw"), emit=events.append)
    assert events[-1].name == "optimizer.carried"


def test_what_a_frozen_host_has_gathered_is_carried() -> None:
    model, seed, optimizer = with_seed("adamw")
    own = [each for name, each in model.named_parameters() if origin_of(name) == HOST]
    for each in own:
        each.requires_grad_(False)
    after = grow.carry_on(optimizer, model, config_of("adamw"))
    assert of_host(state.tensors(model, after)) == of_host(state.tensors(model, optimizer))
    assert not any(each.requires_grad for each in own) and after.settings == optimizer.settings


def test_a_step_without_gradients_of_the_host_reports_those_of_its_seeds() -> None:
    model, seed, optimizer = with_seed("adamw", warmup_steps=0)
    for each in seed.parameters():
        each.grad = torch.ones_like(each)
    n = sum(each.numel() for each in seed.parameters())
    assert float(optimizer.step(torch.tensor(1.0)).norm) == pytest.approx(math.sqrt(n))
