"""Fusing, optimizers that follow, and everything that is refused with the model untouched."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, bits, grown, host, logits
from meristem.errors import MeristemError
from meristem.events import Event
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build

PLACE = PLACES["foreign"]


@pytest.mark.parametrize("reads", ["input", "output"])
@pytest.mark.parametrize("blend", ["residual", "channel"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
def test_a_fused_seed_is_part_of_the_weight(reads: str, blend: str, dtype: torch.dtype, bound: float) -> None:
    """The output stays, the slot is empty, and ``unfuse`` gives every bit back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = grow.attach(nn.Sequential(nn.Linear(20, 12)), "0", reads=reads).to(dtype)
        seed = grow.graft(model, "0", "low_rank", rank=3, blend=blend)
        nn.init.normal_(seed.layer.out.weight)
        x_btd = torch.randn(2, 7, 20).to(dtype)
    grow.set_blend(model, "0", 0.7)
    before, wanted = bits(model), model(x_btd)
    events: list[Event] = []
    fused = grow.fuse(model, "0", emit=events.append)
    assert (model(x_btd) - wanted).norm() <= bound * wanted.norm()
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and events[-1].name == "seed.fused"
    assert grow.unfuse(model, "0", fused) is seed and bits(model) == before


def test_a_feed_forward_of_ours_takes_a_fused_seed() -> None:
    place, tokens_bt = "blocks.1.mlp.gate_up", zoo.ids(2)
    model = grow.attach(host("preset-default"), "blocks.*.mlp.gate_up", reads="input")
    assert list(grow.slots_in(model)) == ["blocks.0.mlp.gate_up", place]
    nn.init.normal_(grow.graft(model, place, "low_rank", rank=3).layer.out.weight)
    wanted = logits(model, tokens_bt)
    grow.fuse(model, place)
    assert type(grow.strip(model).get_submodule(place)) is nn.Linear
    torch.testing.assert_close(logits(model, tokens_bt), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(wanted, logits(host("preset-default"), tokens_bt), atol=1e-4)


def test_a_removed_seed_goes_back_as_it_was() -> None:
    model, made = grown("foreign", "conv")
    before, events = bits(model), []
    assert grow.remove(model, PLACE, emit=events.append) is made
    assert bits(model) == bits(host("foreign")) and grow.seeds_in(model) == {}
    assert grow.graft(model, PLACE, made, emit=events.append) is made and bits(model) == before
    assert [event.name for event in events] == ["graft.undone", "graft.done"]


@pytest.mark.parametrize("curve", ["linear", "cosine", "sigmoid-6", "sigmoid-12", "sigmoid-24"])
@pytest.mark.parametrize("start, target", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7)])
def test_a_ramp_is_monotone_and_ends_where_it_was_sent(curve: str, start: float, target: float) -> None:
    model, made = grown("foreign", "norm")
    grow.set_blend(model, PLACE, start)
    grow.set_blend(model, PLACE, target, steps=11, curve=curve)
    seen = [float(made.blend_weight)]
    for _ in range(13):
        grow.advance(model)
        seen.append(float(made.blend_weight))
    rounded = [float(torch.tensor(each)) for each in (start, target)]
    assert seen[0] == rounded[0] and seen[11:] == [rounded[1]] * 3
    assert sorted(seen, reverse=start > target) == seen and len(set(seen)) == 12


@pytest.mark.parametrize("kind", ["adamw", "muon", "m3"])
def test_an_optimizer_of_ours_follows(kind: str) -> None:
    """Moments of the host are kept to the bit, a seed begins without any, and those of a removed one are gone."""
    model = grow.attach(host("preset-default", torch.float32), PLACES["preset-default"])
    config = OptimConfig(name=kind, lr=1e-3)
    optimizer = build(model, config)

    def step() -> None:
        logits(model, zoo.ids(2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    before = dict(optimizer.state)
    made = grow.graft(model, PLACES["preset-default"], "bottleneck", hidden=5)
    optimizer = grow.carry_on(optimizer, model, config)
    for parameter, state in before.items():
        for name, value in state.items():
            torch.testing.assert_close(optimizer.state[parameter][name], value, rtol=0, atol=0)
    assert not any(parameter in optimizer.state for parameter in made.parameters())
    first = bits(made)
    step()
    assert bits(made) != first
    grow.remove(model, PLACES["preset-default"])
    optimizer = grow.carry_on(optimizer, model, config)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for each in model.parameters()}


def test_an_optimizer_of_torch_takes_a_seed_and_gives_it_back() -> None:
    model, made = grown("foreign", "low_rank")
    optimizer = torch.optim.AdamW([x for key, x in model.named_parameters() if ".slot." not in key])
    optimizer.add_param_group({"params": [*made.parameters()], "lr": 1e-2})
    logits(model, zoo.ids(2)).square().mean().backward()
    optimizer.step()
    assert all(parameter in optimizer.state for parameter in made.parameters())
    grow.forget(optimizer, grow.remove(model, PLACE))
    assert len(optimizer.param_groups) == 1 and not any(each in optimizer.state for each in made.parameters())
    assert len(optimizer.state) == len([*model.parameters()])


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(29, 12), nn.Linear(12, 29, bias=False))
    model[1].weight = model[0].weight
    grow.attach(model, "1", reads="input")
    grow.graft(model, "1", "low_rank", rank=3)
    return model


def computed() -> nn.Module:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 29)))
    grow.attach(model, "0", reads="input")
    grow.graft(model, "0", "low_rank", rank=3)
    return model


def twice() -> nn.Module:
    layer = nn.Linear(12, 12)
    return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(nn.Linear(12, 12))})


def attached() -> nn.Module:
    return grow.attach(host("foreign"), PLACE)


def time_first() -> nn.Module:
    return nn.ModuleList([nn.TransformerEncoderLayer(12, 2, 17)])


REFUSED: list[tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = [
    (lambda: host("foreign"), lambda m: grow.attach(m, "body.layer.*"), "no module is called .*Nearest: body.layers"),
    (lambda: host("foreign"), lambda m: grow.attach(m, [PLACE, "nothing"]), "no module is called 'nothing'"),
    (lambda: host("foreign"), lambda m: grow.attach(m, "body.layers"), "ModuleList.*never called; name what it holds"),
    (lambda: host("foreign"), lambda m: grow.attach(m, "body.layers.0.linear1"), "Attach to 'body.layers.0'"),
    (lambda: host("preset-default"), lambda m: grow.attach(m, "blocks.0.mixer.recall.qkv"), "to 'blocks.0.mixer'"),
    (lambda: host("foreign"), lambda m: grow.attach(m, "embedding"), "does not say how wide it is.*width="),
    (lambda: host("foreign"), lambda m: grow.attach(m, "head", width=7), "has the width 29, and 7 was given"),
    (twice, lambda m: grow.attach(m, "a"), "'a' is 'b' as well"),
    (twice, lambda m: grow.attach(m, "c"), "calls every child"),
    (time_first, lambda m: grow.attach(m, "0"), "batch_first=False.*layout='tbd'"),
    (attached, lambda m: grow.attach(m, "body.layers.*"), "has one already"),
    (attached, lambda m: grow.graft(m, "body.layers.0", "norm"), "no slot is called 'body.layers.0'. Nearest"),
    (attached, lambda m: grow.graft(m, PLACE, "lowrank"), "no blueprint is called 'lowrank'. Nearest: low_rank"),
    (attached, lambda m: grow.graft(m, PLACE, "low_rank", rnk=4), "unknown key 'rnk'.*Did you mean 'rank'"),
    (attached, lambda m: grow.graft(m, PLACE, "low_rank", rank=0), "rank: found 0.*at least 1"),
    (attached, lambda m: grow.graft(m, PLACE, "low_rank", blend="adding"), "no blend is called"),
    (attached, lambda m: grow.graft(m, PLACE, "memory", head_dim=5), "heads of 5 cannot fill the width 12"),
    (attached, lambda m: grow.remove(m, PLACE), "is empty"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.graft(m, PLACE, "norm"), "holds a seed already"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.fuse(m, PLACE), "'norm' is no linear map"),
    (lambda: grown("foreign", "low_rank")[0], lambda m: grow.fuse(m, PLACE), "TransformerEncoderLayer, is no linear"),
    (tied, lambda m: grow.fuse(m, "1"), "shared by 0.weight and 1.weight"),
    (computed, lambda m: grow.fuse(m, "0"), "parametrization"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.set_blend(m, PLACE, 1.1), "blend weight of 1.1"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.set_blend(m, PLACE, 0.99, steps=5), "at least 0.02"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.set_blend(m, PLACE, 0, steps=5, curve="cosnie"), "cosine"),
    (lambda: grown("foreign", "norm")[0], lambda m: grow.replay(m, grow.to_json(m)), "Strip it first"),
]


@pytest.mark.parametrize("make, change, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_refused_leaves_the_model_untouched(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], object], message: str
) -> None:
    model = make()
    before, names = bits(model), [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(MeristemError, match=f"(?s){message}"):
        change(model)
    assert bits(model) == before and [(name, type(module)) for name, module in model.named_modules()] == names


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda log: log["changes"].pop(), "is broken"),
        (lambda log: log.pop("host"), "is broken"),
        (lambda log: log.clear(), "is broken"),
    ],
)
def test_a_broken_log_is_refused(change: Callable[[dict], object], message: str) -> None:
    log = json.loads(json.dumps(grow.to_json(grown("foreign", "norm")[0])))
    change(log)
    model = host("foreign")
    with pytest.raises(MeristemError, match=message):
        grow.replay(model, log)
    assert grow.slots_in(model) == {}


def test_a_log_of_another_model_is_refused() -> None:
    log = grow.to_json(grown("foreign", "norm")[0])
    with pytest.raises(MeristemError, match="a host with other weights"):
        grow.replay(host("preset-default"), log)


def test_a_blueprint_that_this_version_lacks_is_named_and_the_host_stays() -> None:
    grow.blueprints.register("of_tomorrow", grow.blueprints.get("norm"))
    try:
        model = grow.attach(host("foreign"), PLACE)
        grow.graft(model, PLACE, "of_tomorrow")
        log = grow.to_json(model)
    finally:
        del grow.blueprints._entries["of_tomorrow"]
    plain = host("foreign")
    with pytest.raises(MeristemError, match="no blueprint is called 'of_tomorrow'"):
        grow.replay(plain, log)
    assert grow.slots_in(plain) == {}


def test_a_blueprint_that_does_not_begin_at_zero_is_refused() -> None:
    """The actual seed is probed before it is put in."""
    grow.blueprints.register("loud", grow.Blueprint(lambda w, s: nn.Linear(*w), grow.blueprints.get("norm").settings))
    try:
        model = attached()
        with pytest.raises(MeristemError, match="'loud' .*adds .* to a probe; expected zero"):
            grow.graft(model, PLACE, "loud")
    finally:
        del grow.blueprints._entries["loud"]
    assert grow.seeds_in(model) == {}


def test_a_hidden_tensor_of_another_shape_is_named() -> None:
    model = grow.attach(nn.Sequential(nn.Identity()), "0", width=12)
    grow.graft(model, "0", "conv")
    with pytest.raises(MeristemError, match=r"slot '0' gives .*\(2, 7, 9\).*d = 12"):
        model(torch.zeros(2, 7, 9))
    with pytest.raises(MeristemError, match=r"slot '0' gives .*\(7, 12\)"):
        model(torch.zeros(7, 12))


def test_time_may_come_first() -> None:
    """A model that has time first reads what its twin reads that has rows first."""
    model = grow.attach(nn.Sequential(nn.Identity()), "0", width=12, layout="tbd")
    twin = grow.attach(nn.Sequential(nn.Identity()), "0", width=12)
    for each in (model, twin):
        nn.init.eye_(grow.graft(each, "0", "conv").layer.out.weight)
    x_btd = torch.randn(2, 7, 12)
    assert torch.equal(model(x_btd.transpose(0, 1)).transpose(0, 1), twin(x_btd))


def test_wrappers_of_several_processes_are_refused() -> None:
    model = nn.DataParallel(host("foreign"))
    with pytest.raises(MeristemError, match="wrapped by DataParallel.*Take the wrapper off"):
        grow.attach(model, "module.head", reads="input")
