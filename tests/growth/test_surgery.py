"""Operators on models of ours: what they preserve, how they are undone, how the optimizer follows (growth.md 11.2)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, bits, grown, host, logits
from meristem.errors import MeristemError
from meristem.growth.plan import Plan
from meristem.growth.surgery import (
    carry_state,
    plan_activate_vocabulary,
    plan_add_heads,
    plan_add_level,
    plan_copy_blocks,
    plan_extend_vocabulary,
    plan_fossilize,
    plan_insert_block,
    plan_interleave,
    plan_raise_rank,
    plan_remove_block,
    plan_shrink_vocabulary,
    plan_stack,
    plan_unsettle,
    plan_widen_residual,
)
from meristem.models.build import build as build_model
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.origins import FROM_THE_START, HOST, SeedSettings
from meristem.optim.schedule import set_rates
from meristem.optim.state import restore, tensors

Make = Callable[[nn.Module], Plan]

OPERATORS: dict[str, Make] = {
    "insert below": lambda m: plan_insert_block(m, 0),
    "insert inside": lambda m: plan_insert_block(m, 1, random_seed=3),
    "interleave": lambda m: plan_interleave(m, random_seed=3),
    "insert on top": lambda m: plan_insert_block(m, len(m.blocks), like=0),
    "remove": lambda m: plan_remove_block(m, 0),
    "copy": lambda m: plan_copy_blocks(m, [1], 1),
    "stack": plan_stack,
    "extend": lambda m: plan_extend_vocabulary(m, 3),
    "widen": lambda m: plan_widen_residual(m, 17),
}
HEADS = {"heads": lambda m: plan_add_heads(m, 1, 3)}
"""Of models whose mixer is attention without persistent tokens."""
PAIRS = [(name, operator) for name in ("preset-default", "lm-persistent") for operator in OPERATORS] + [
    ("preset-titans-mal", "insert inside"),
    ("preset-titans-mal", "widen"),
    ("preset-gated-delta", "widen"),
    ("preset-hope-attention", "insert below"),
    ("preset-attention", "heads"),
]


def of_ours(kind: str) -> Callable[[nn.Module], MultiPeriodOptimizer]:
    return lambda model: build(model, OptimConfig(name=kind, lr=1e-2))


def trained(name: str, kind: str = "adamw", dtype: torch.dtype = torch.float32) -> tuple[Any, MultiPeriodOptimizer]:
    model: Any = host(name, dtype)
    optimizer = of_ours(kind)(model)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    logits(model, zoo.ids(2)).clamp(-50, 50).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def operate(model: nn.Module, optimizer: Any, plan: Plan, kind: str = "adamw") -> Any:
    return grow.transaction(model, optimizer, plan, zoo.ids(2), rebuild=of_ours(kind)).optimizer


def nudged(model: nn.Module) -> None:
    """Move every weight: a zero must not hide what it multiplies."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.mark.parametrize(("name", "operator"), PAIRS)
def test_v5_v11_an_operator_does_what_its_plan_says(name: str, operator: str) -> None:
    """Logits stay where it says so, the log rebuilds the model, which learns, splits and is causal (V5, V11)."""
    model, optimizer = trained(name, dtype=torch.float64)
    wanted = logits(model, zoo.ids(2))
    plan = (OPERATORS | HEADS)[operator](model)
    before = sum(each.numel() for each in model.parameters())
    optimizer = operate(model, optimizer, plan)
    found = logits(model, zoo.ids(2))[..., : wanted.shape[-1]]
    bound = {"exact": 0.0, "rounding": 1e-11}.get(plan.preserves)
    if bound is not None:
        torch.testing.assert_close(found, wanted[..., : found.shape[-1]], rtol=0, atol=bound)
    assert sum(each.numel() for each in model.parameters()) - before == plan.n_parameters
    assert plan.flops_per_token is not None and plan.flops_per_token * plan.n_parameters > 0
    twin = build_model(*zoo.ZOO[name], zoo.VOCABULARY, 3, grow.topology(model)).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, zoo.ids(2)), logits(model, zoo.ids(2)))
    step(model, optimizer)
    nudged(model)
    tokens_bt = zoo.ids(3)
    whole_bto, _ = model(tokens_bt)
    first_bto, state = model(tokens_bt[:, :5])
    then_bto, _ = model(tokens_bt[:, 5:], state)
    torch.testing.assert_close(torch.cat([first_bto, then_bto], dim=1), whole_bto, rtol=0, atol=1e-9)
    later_bt = tokens_bt.clone()
    later_bt[:, 8:] = (later_bt[:, 8:] + 1) % zoo.VOCABULARY
    torch.testing.assert_close(logits(model, later_bt)[:, :8], whole_bto[:, :8], rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(model, tokens_bt[1:2]), whole_bto[1:2], rtol=0, atol=1e-9)


INVERSES: dict[str, tuple[Make, Make]] = {
    "block": (lambda m: plan_insert_block(m, 1), lambda m: plan_remove_block(m, 1)),
    "top": (lambda m: plan_insert_block(m, len(m.blocks)), lambda m: plan_remove_block(m, len(m.blocks) - 1)),
    "vocabulary": (lambda m: plan_extend_vocabulary(m, 2), lambda m: plan_shrink_vocabulary(m, 2)),
    "seed": (lambda m: grow.plan_graft(m, empty(m), "norm"), lambda m: grow.plan_remove(m, [*grow.seeds_in(m)][-1])),
    "rank": (
        lambda m: grow.plan_graft(m, empty(m), "low_rank", rank=2),
        lambda m: grow.plan_remove(m, [*grow.seeds_in(m)][-1]),
    ),
}
FORWARD: dict[str, Make] = {name: make for name, (make, _) in INVERSES.items()} | {
    "widen": lambda m: plan_widen_residual(m, m.embedding.weight.shape[1] + 2),
    "copy": lambda m: plan_copy_blocks(m, [0], 0),
    "raise": lambda m: plan_raise_rank(m, "blocks.0.mlp.gate_up", 4),
}


def empty(model: nn.Module) -> str:
    """The first slot without a seed."""
    return next(name for name, slot in grow.slots_in(model).items() if slot.seed is None)


def given_steps(model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[str, str], n_steps: int = 5) -> None:
    """Steps with gradients by the name that a parameter had at first, too small to be clipped; zeros without one."""
    for number in range(n_steps):
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(number + sum(map(ord, names.get(name, ""))))
            drawn = 1e-4 * torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.grad = drawn if name in names else torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def slotted(kind: str) -> tuple[Any, MultiPeriodOptimizer]:
    model, _ = trained("preset-attention")
    grow.attach(model, ["blocks.0", "blocks.1"])
    optimizer = of_ours(kind)(model)
    given_steps(model, optimizer, {name: name for name, _ in model.named_parameters()}, 2)
    return model, optimizer


@settings(max_examples=7, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.sampled_from([*FORWARD]), max_size=4), st.sampled_from(["adamw", "muon", "m3"]))
def test_what_was_not_touched_goes_on_as_if_nothing_had_happened(operators: list[str], kind: str) -> None:
    """By the same gradients the next five updates of every parameter that kept its shape are those of a twin."""
    model, optimizer = slotted(kind)
    twin, twin_optimizer = slotted(kind)
    names = {name: name for name, _ in model.named_parameters()}
    for operator in operators:
        try:
            plan = FORWARD[operator](model)
        except (MeristemError, StopIteration):
            continue
        optimizer = operate(model, optimizer, plan, kind)
        sources = {name: carry.source for name, carry in plan.sources.items() if name not in plan.resized}
        seen: set[str] = set()
        names = {new: names[old] for new, old in sources.items() if old in names and not (old in seen or seen.add(old))}
    given_steps(model, optimizer, names)
    given_steps(twin, twin_optimizer, {name: name for name, _ in twin.named_parameters() if name in names.values()})
    now, then = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(torch.equal(now[name], then[old]) for name, old in names.items())


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.sampled_from([*INVERSES]), min_size=1, max_size=3), st.sampled_from(["adamw", "muon"]))
def test_v2_changes_and_their_inverses_leave_nothing(operators: list[str], kind: str) -> None:
    """Last made, first undone: weights, optimizer, log and the next five steps are those of a twin to the bit."""
    model, optimizer = slotted(kind)
    twin, twin_optimizer = slotted(kind)
    made = []
    for operator in operators:
        try:
            plan = INVERSES[operator][0](model)
        except StopIteration:
            continue
        optimizer = operate(model, optimizer, plan, kind)
        made.append(operator)
    for operator in reversed(made):
        optimizer = operate(model, optimizer, INVERSES[operator][1](model), kind)
    assert bits(model) == bits(twin) and grow.topology(model) == grow.topology(twin)
    for _ in range(5):
        step(model, optimizer)
        step(twin, twin_optimizer)
    assert bits(model) == bits(twin)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamuon", "m3", "sgd"])
def test_g1_a_grown_model_and_its_optimizer_are_saved_and_go_on(kind: str) -> None:
    """From files alone: the next steps are those of the one that was not saved; what is new begins with nothing."""
    model, optimizer = trained("preset-attention", kind)
    for make in (OPERATORS["insert inside"], OPERATORS["extend"], OPERATORS["widen"]):
        optimizer = operate(model, optimizer, make(model), kind)
    assert not any(optimizer.state.get(each) for each in model.blocks[1].parameters())
    again = build_model(*zoo.ZOO["preset-attention"], zoo.VOCABULARY, 3, grow.topology(model))
    again.load_state_dict(model.state_dict())
    follower = of_ours(kind)(again)
    restore(again, follower, {name: each.clone() for name, each in tensors(model, optimizer).items()})
    for _ in range(3):
        step(model, optimizer)
        step(again, follower)
    assert bits(again) == bits(model)


def test_fresh_channels_learn() -> None:
    """Of two zeros neither would: what reads them is drawn, and after two steps what writes them has moved."""
    model, optimizer = trained("preset-default")
    optimizer = operate(model, optimizer, plan_widen_residual(model, 16))
    step(model, optimizer)
    step(model, optimizer)
    fresh = [model.blocks[0].mlp.out.weight[12:], model.blocks[1].mixer.out.weight[12:], model.embedding.weight[:, 12:]]
    assert all(bool(each.any()) for each in fresh)


def test_tokens_that_are_not_in_use_take_no_share_and_get_no_gradient() -> None:
    for name in ("preset-attention", "lm-persistent"):
        model, optimizer = trained(name)
        optimizer = operate(model, optimizer, plan_extend_vocabulary(model, 3))
        said_bto = logits(model, torch.tensor([[1, zoo.VOCABULARY + 2, 4]]))
        assert not said_bto.softmax(-1)[..., -3:].any() and bool(said_bto.log_softmax(-1).isfinite().all())
        torch.nn.functional.cross_entropy(logits(model, zoo.ids(1))[0], zoo.ids(1)[0]).backward()
        head = model.embedding if model.head is None else model.head
        assert not head.weight.grad[-3:].any()
        model.zero_grad()
        operate(model, optimizer, plan_activate_vocabulary(model))
        assert bool(logits(model, zoo.ids(1)).softmax(-1)[..., -3:].all())


def test_the_state_of_a_reader_moves_with_its_blocks() -> None:
    """What was read before a block came is not read again, whoever reads on."""
    model, optimizer = trained("preset-default", dtype=torch.float64)
    tokens_bt = zoo.ids(2)
    wanted, _ = model(tokens_bt)
    _, state = model(tokens_bt[:, :5])
    plan = plan_insert_block(model, 1)
    optimizer = operate(model, optimizer, plan)
    state = carry_state(plan, state)
    assert [*state["layer"]] == ["0", "2"]
    found, state = model(tokens_bt[:, 5:9], state)
    torch.testing.assert_close(found, wanted[:, 5:9], rtol=0, atol=1e-10)
    plan = plan_remove_block(model, 1)
    operate(model, optimizer, plan)
    found, _ = model(tokens_bt[:, 9:], carry_state(plan, state))
    torch.testing.assert_close(found, wanted[:, 9:], rtol=0, atol=1e-10)


def test_slots_and_seeds_move_with_their_blocks() -> None:
    model, optimizer = trained("preset-default")
    grow.attach(model, "blocks.1")
    made = grow.graft(model, "blocks.1", "low_rank", rank=2)
    nudged(made)
    wanted = logits(model, zoo.ids(2))
    optimizer = grow.carry_on(optimizer, model, OptimConfig(lr=1e-2))
    optimizer = operate(model, optimizer, plan_insert_block(model, 0))
    assert grow.seeds_in(model) == {"blocks.2": made} and made.slot == "blocks.2"
    assert torch.equal(logits(model, zoo.ids(2)), wanted)
    optimizer = operate(model, optimizer, plan_copy_blocks(model, [2], 3))
    assert [*grow.seeds_in(model)] == ["blocks.2", "blocks.3"]
    optimizer = operate(model, optimizer, plan_insert_block(model, 4))
    assert [*grow.slots_in(model)] == ["blocks.2", "blocks.3", "blocks.4"], "it is like the block below it"
    operate(model, optimizer, grow.plan_graft(model, "blocks.4", "norm"))
    host_again = build_model(*zoo.ZOO["preset-default"], zoo.VOCABULARY, 3)
    again = grow.replay(host_again, grow.to_json(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))


@pytest.mark.parametrize("name", ["foreign", "preset-default"])
def test_a_low_rank_seed_gets_more_rank(name: str) -> None:
    """In any model: the same function, its moments kept, and a log that says the new rank."""
    place = "head"
    model: Any = grow.attach(host(name, torch.float64), place, reads="input")
    made = grow.graft(model, place, "low_rank", rank=2)
    nudged(made)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    moment = optimizer.state[made.layer.down.weight]["exp_avg"].clone()
    wanted = logits(model, zoo.ids(2))
    plan = plan_raise_rank(model, place, 5)
    assert (plan.n_parameters, plan.flops_per_token) == (3 * (12 + 29), 6.0 * (12 + 29))
    grow.transaction(model, optimizer, plan, zoo.ids(2))
    torch.testing.assert_close(logits(model, zoo.ids(2)), wanted, rtol=0, atol=1e-12)
    assert torch.equal(optimizer.state[made.layer.down.weight]["exp_avg"][:2], moment)
    again = grow.replay(host(name, torch.float64), grow.to_json(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))


@pytest.mark.parametrize("blend", ["residual", "channel"])
@pytest.mark.parametrize(
    ("name", "blueprint"), [("preset-default", "gated_feedforward"), ("lm-persistent", "bottleneck")]
)
def test_a_parallel_feed_forward_seed_becomes_channels_of_its_host(name: str, blueprint: str, blend: str) -> None:
    """Its weights stand beside the old ones, the slot is free, and a log of the host's settings has the wider layer."""
    place = "blocks.1.mlp"
    model: Any = grow.attach(host(name, torch.float64), place, reads="input")
    made = grow.graft(model, place, blueprint, hidden=5, is_normed=False, blend=blend)
    nudged(made)
    grow.set_blend(model, place, 1.0 if blend == "residual" else 0.7)
    optimizer: Any = of_ours("adamw")(model)
    step(model, optimizer)
    wanted = logits(model, zoo.ids(2))
    kept = {name: each.clone() for name, each in optimizer.state[model.blocks[1].mlp.out.weight].items()}
    of_seed = optimizer.state[made.layer.out.weight]["exp_avg"].clone()
    first = "gate_up" if blueprint == "gated_feedforward" else "up"
    of_first = optimizer.state[getattr(made.layer, first).weight]["exp_avg"][:5].clone()
    plan = plan_fossilize(model, place)
    assert plan.fields["how"] == "concatenated"
    optimizer = operate(model, optimizer, plan)
    torch.testing.assert_close(logits(model, zoo.ids(2)), wanted, rtol=0, atol=1e-11)
    assert model.blocks[1].mlp.out.weight.shape == (12, 17 + 5) and grow.seeds_in(model) == {}
    assert torch.equal(optimizer.state[model.blocks[1].mlp.out.weight]["exp_avg"][:, :17], kept["exp_avg"])
    fresh = optimizer.state[model.blocks[1].mlp.out.weight]["exp_avg"][:, 17:]
    assert torch.equal(fresh, of_seed if blend == "residual" else torch.zeros_like(of_seed))
    moved = optimizer.state[model.get_submodule(f"{place}.{first}").weight]["exp_avg"]
    assert torch.equal(moved[17 : 17 + 5], of_first)
    again = build_model(*zoo.ZOO[name], zoo.VOCABULARY, 3, grow.topology(model)).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))
    step(model, optimizer)
    grow.graft(model, place, blueprint, hidden=3)


def beside_attention(blend: str = "residual", **settings: Any) -> tuple[Any, grow.Seed]:
    """A model with attention, and heads beside those of its second block, moved off their first values."""
    model: Any = grow.attach(host("preset-attention", torch.float64), MIXER, reads="input")
    mixer = model.blocks[1].mixer
    like = {"n_heads": 3, "head_dim": mixer.out.in_features // mixer.heads, "sliding_window": mixer.span}
    made = grow.graft(model, MIXER, "attention", is_normed=False, blend=blend, **like | settings)
    nudged(made)
    return model, made


MIXER = "blocks.1.mixer"


@pytest.mark.parametrize("blend", ["residual", "channel"])
def test_heads_beside_attention_become_heads_of_it(blend: str) -> None:
    """Weights, moments and what readers carry stand beside the old ones, and the log has the wider layer."""
    model, made = beside_attention(blend)
    grow.set_blend(model, MIXER, 1.0 if blend == "residual" else 0.7)
    optimizer: Any = of_ours("adamw")(model)
    step(model, optimizer)
    tokens_bt, mixer = zoo.ids(2), model.blocks[1].mixer
    wanted, _ = model(tokens_bt)
    _, state = model(tokens_bt[:, :5])
    old = mixer.out.in_features
    was = optimizer.state[mixer.qkv.weight]["exp_avg"].clone()
    of_seed = optimizer.state[made.layer.qkv.weight]["exp_avg"].clone()
    of_out = optimizer.state[made.layer.out.weight]["exp_avg"].clone()
    plan = plan_fossilize(model, MIXER)
    assert plan.fields["how"] == "concatenated" and plan.preserves == "rounding"
    optimizer = operate(model, optimizer, plan)
    assert mixer.heads == 2 + 3 and grow.seeds_in(model) == {}
    torch.testing.assert_close(logits(model, tokens_bt), wanted, rtol=0, atol=1e-11)
    then_bto, _ = model(tokens_bt[:, 5:], carry_state(plan, state))
    torch.testing.assert_close(then_bto, wanted[:, 5:], rtol=0, atol=1e-10)
    moved = optimizer.state[mixer.qkv.weight]["exp_avg"].unflatten(0, (3, -1))
    assert torch.equal(moved[:, :old].flatten(0, 1), was) and torch.equal(moved[:, old:].flatten(0, 1), of_seed)
    fresh = optimizer.state[mixer.out.weight]["exp_avg"][:, old:]
    assert torch.equal(fresh, of_out if blend == "residual" else torch.zeros_like(of_out))
    again = build_model(*zoo.ZOO["preset-attention"], zoo.VOCABULARY, 3, grow.topology(model)).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, tokens_bt), logits(model, tokens_bt))
    step(model, optimizer)
    grow.graft(model, MIXER, "attention", n_heads=1, head_dim=4)


@pytest.mark.parametrize("settings", [{"head_dim": 4}, {"sliding_window": 2}, {"rope": False}, {"blend": "gated"}])
def test_heads_of_another_kind_are_settled(settings: dict[str, Any]) -> None:
    model, _ = beside_attention(**settings)
    assert plan_fossilize(model, MIXER).fields["how"] == "settled"


def test_what_stands_behind_a_gate_on_the_output_keeps_its_input() -> None:
    """A settled seed whose blend reads the output would see another one, were the next seed made part of the layer."""
    place = "blocks.1.mlp"
    model: Any = grow.attach(host("preset-default", torch.float64), place, reads="input")
    nudged(grow.graft(model, place, "bottleneck", hidden=3, blend="gated"))
    operate(model, None, plan_fossilize(model, place))
    nudged(grow.graft(model, place, "gated_feedforward", hidden=5, is_normed=False))
    wanted = logits(model, zoo.ids(2))
    operate(model, None, plan_fossilize(model, place))
    assert torch.equal(logits(model, zoo.ids(2)), wanted)


def test_a_reader_goes_on_with_fresh_heads() -> None:
    """They have read nothing but zeros, and nothing is made of them yet."""
    model, _ = trained("preset-attention", dtype=torch.float64)
    tokens_bt = zoo.ids(2)
    wanted, _ = model(tokens_bt)
    _, state = model(tokens_bt[:, :5])
    plan = plan_add_heads(model, 0, 1)
    operate(model, None, plan)
    then_bto, _ = model(tokens_bt[:, 5:], carry_state(plan, state))
    torch.testing.assert_close(then_bto, wanted[:, 5:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["foreign", "preset-default"])
@pytest.mark.parametrize("first", ["conv", "attention", "norm", "memory"])
def test_a_settled_seed_stays_and_makes_room(name: str, first: str) -> None:
    """The same function and states to the bit; another seed comes after it; files rebuild both; it can come back."""
    place = PLACES[name]
    model, made = grown(name, first)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    tokens_bt, held = zoo.ids(2), dict(optimizer.state[next(made.layer.parameters())])
    wanted = logits(model, tokens_bt)
    state = model(tokens_bt[:, :5])[1] if name != "foreign" else None
    before = bits(model)
    grow.transaction(model, optimizer, plan_fossilize(model, place), tokens_bt)
    assert torch.equal(logits(model, tokens_bt), wanted) and grow.seeds_in(model) == {}
    assert optimizer.state[next(made.layer.parameters())] == held
    second = grow.graft(model, place, "attention", n_heads=1, head_dim=4, sliding_window=3)
    assert torch.equal(logits(model, tokens_bt), wanted)
    if state is not None:
        then_bto, after = model(tokens_bt[:, 5:], state)
        torch.testing.assert_close(then_bto, wanted[:, 5:], rtol=0, atol=1e-10)
        assert "slot_blocks_1" in after["layer"]["1"]
    nudged(second)
    again = grow.replay(host(name), grow.to_json(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, tokens_bt), logits(model, tokens_bt))
    assert not torch.allclose(logits(model, tokens_bt), wanted, atol=1e-4)
    if state is not None:
        first_bto, state = model(tokens_bt[:, :5])
        then_bto, _ = model(tokens_bt[:, 5:], state)
        torch.testing.assert_close(torch.cat([first_bto, then_bto], 1), logits(model, tokens_bt), rtol=0, atol=1e-10)
    grow.remove(model, place)
    grow.transaction(model, optimizer, plan_unsettle(model, place), tokens_bt)
    assert bits(model) == before and torch.equal(logits(model, tokens_bt), wanted)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("lm-levels-each", "below"),
        ("lm-levels-each", "on_top"),
        ("lm-levels-pooled", "below"),
        ("lm-levels-pooled", "on_top"),
        ("lm-mag-frequency-output", "below"),
        ("preset-titans-mal", "on_top"),
    ],
)
def test_a_block_gets_one_more_level(name: str, where: Any) -> None:
    """Old levels keep weights and moments under their new numbers; a log rebuilds it, twice over; and it learns."""
    model, optimizer = trained(name, dtype=torch.float64)
    wanted = logits(model, zoo.ids(2))
    for expected in ("nothing",) if "levels" not in name else ("exact", "exact") if name.endswith("each") else ("",):
        was = {id(each): optimizer.state[each] for each in model.parameters()}
        plan = plan_add_level(model, 1, where)
        assert not expected or plan.preserves == expected
        optimizer = operate(model, optimizer, plan)
        if plan.preserves == "exact":
            assert torch.equal(logits(model, zoo.ids(2)), wanted)
        for parameter in [each for each in model.parameters() if id(each) in was]:
            assert all(torch.equal(value, was[id(parameter)][key]) for key, value in optimizer.state[parameter].items())
    again = build_model(*zoo.ZOO[name], zoo.VOCABULARY, 3, grow.topology(model)).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, zoo.ids(2)), logits(model, zoo.ids(2)))
    nudged(model)
    whole_bto, _ = model(zoo.ids(2))
    first_bto, state = model(zoo.ids(2)[:, :5])
    then_bto, _ = model(zoo.ids(2)[:, 5:], state)
    torch.testing.assert_close(torch.cat([first_bto, then_bto], dim=1), whole_bto, rtol=0, atol=1e-9)
    step(model, optimizer)


def _side_by_side() -> nn.Module:
    return zoo.moved(*zoo.ZOO["lm-hybrid-attention"], torch.float32)


def _seeded() -> nn.Module:
    model = grow.attach(host("preset-default"), "blocks.0")
    grow.graft(model, "blocks.0", "norm")
    return model


def _parallel_off() -> nn.Module:
    model = grow.attach(host("preset-default"), "blocks.0.mlp", reads="input")
    grow.graft(model, "blocks.0.mlp", "gated_feedforward", hidden=3, is_normed=False)
    grow.set_blend(model, "blocks.0.mlp", 0.0)
    return model


def _seeded_off() -> nn.Module:
    model = _seeded()
    grow.set_blend(model, "blocks.0", 0.0)
    return model


def of(name: str) -> Callable[[], nn.Module]:
    return lambda: host(name)


REFUSED: list[tuple[Callable[[], nn.Module], Make, str]] = [
    (_side_by_side, lambda m: plan_insert_block(m, 0), "stand side by side"),
    (of("foreign"), lambda m: plan_insert_block(m, 0), "it is a Foreign"),
    (of("preset-default"), lambda m: plan_insert_block(m, 4), "from 0 to 2"),
    (of("preset-default"), lambda m: plan_insert_block(m, 0, like=-1), "from 0 to 1"),
    (of("preset-default"), lambda m: plan_remove_block(m, 2), "block 2 was found; expected a number from 0 to 1"),
    (of("preset-default"), lambda m: plan_extend_vocabulary(m, 0), "0 tokens were found"),
    (of("preset-default"), plan_activate_vocabulary, "are in use"),
    (of("preset-default"), lambda m: plan_shrink_vocabulary(m, 29), "it has 29 tokens"),
    (of("preset-default"), lambda m: plan_widen_residual(m, 12), "it is 12 wide, and 12 is no more"),
    (_seeded, lambda m: plan_widen_residual(m, 16), "the seed in blocks.0 has the width"),
    (of("preset-titans-mac"), lambda m: plan_widen_residual(m, 16), "is a MemoryAsContext"),
    (of("preset-hope-attention"), lambda m: plan_widen_residual(m, 16), "is a CMSMLP"),
    (of("preset-attention"), lambda m: plan_add_level(m, 0), "a Attention and a SwiGLU has no levels"),
    (of("preset-titans-mac"), lambda m: plan_add_level(m, 0), "MemoryAsContext"),
    (_seeded, lambda m: plan_unsettle(m, "blocks.0"), "has 0 settled seeds and an open one"),
    (_parallel_off, lambda m: plan_fossilize(m, "blocks.0.mlp"), "has the blend weight 0"),
    (_seeded_off, lambda m: plan_fossilize(m, "blocks.0"), "has arrived above 0"),
    (of("preset-default"), lambda m: plan_add_heads(m, 0, 1), "is a MemoryAsGate, and heads are added to attention"),
    (of("lm-persistent"), lambda m: plan_add_heads(m, 0, 1), "would see its persistent tokens"),
    (of("preset-attention"), lambda m: plan_add_heads(m, 0, 0), "0 heads were found"),
    (_seeded, lambda m: plan_raise_rank(m, "blocks.0", 4), "is a 'norm', which has no rank"),
]


@pytest.mark.parametrize(("make", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_an_operator_cannot_do_is_refused(make: Callable[[], nn.Module], change: Make, message: str) -> None:
    model = make()
    before: Any = bits(model), [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(MeristemError, match=message):
        change(model)
    assert (bits(model), [(name, type(module)) for name, module in model.named_modules()]) == before


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_came_later_warms_up_alone_and_is_clipped_with_its_host(kind: str) -> None:
    """Blocks that came together or one by one have groups of their own beside equal ones, a rate that rises from where
    they joined, and it is saved; a further change keeps it."""
    model, optimizer = trained("preset-default", kind)
    optimizer = operate(model, optimizer, plan_stack(model), kind)
    assert optimizer.joined == {"joined:0": FROM_THE_START} and {unit[0] for unit in optimizer.units} == {HOST}
    optimizer.joined["joined:0"] = SeedSettings(warmup_steps=4, since=optimizer.clock.count)
    seen = []
    for _ in range(5):
        set_rates(optimizer, 0.5)
        seen.append({group["lr"] / (0.5 * group["rate"]) for group in optimizer.param_groups if "joined" in group})
        assert all(group["lr"] == 0.5 * group["rate"] for group in optimizer.param_groups if "joined" not in group)
        step(model, optimizer)
    assert seen == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}]
    own = [name for group in optimizer.param_groups if "joined" in group for name in group["param_names"]]
    assert {name.split(".")[1] for name in own} == {"2", "3"}
    assert sorted(own) == sorted(
        name for name, _ in model.named_parameters() if name.startswith(("blocks.2", "blocks.3"))
    )
    other = of_ours(kind)(model)
    restore(model, other, tensors(model, optimizer))
    assert other.joined == optimizer.joined
    after = operate(model, optimizer, plan_insert_block(model, 4), kind)
    assert after.joined == {**optimizer.joined, "joined:1": FROM_THE_START}
