"""Orders, what they do, and what is refused (growth.md 17, 31): V1, KA10, T13, T19, TA3."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import house
import meristem
from growth.catalogue import bits, host
from growth.site import TinySite, evaluated, loose
from meristem.errors import MissingDependency, PolicyTimeout, UnknownKey
from meristem.events import Event
from meristem.growth import replay, topology
from meristem.growth import to_json as log_of
from meristem.growth.features import Observes
from meristem.growth.garden import Embargo, Garden, Order
from meristem.growth.gardener import TARGETS, act_on, check_order, order_of, tend
from meristem.growth.graft import advance, seeds_in
from meristem.growth.observe import Mask, Reading, SlotReading
from meristem.growth.policy import Decision, NoCandidates, Proposal
from meristem.growth.settle import settled_in
from meristem.growth.stage import TRANSITIONS, Stage
from meristem.runs.config import load_config
from meristem.worker.breaker import Breaker

SLOTS = ("blocks.0", "blocks.1")
SEED = {"blueprint": "bottleneck", "settings": {"hidden": 5}, "way": "joint"}


def order(operation: str = "germinate", slot: str = "blocks.0", seed: str = "blocks.0#0", step: int = 1) -> Order:
    made = Order(operation, slot, seed, "run", step, "asked")
    return replace(made, **SEED) if operation == "germinate" else made


def reading(garden: Garden, step: int = 1) -> Reading:
    stages = {life.slot: life.stage for life in garden.lives if life.is_open}
    slots = tuple(SlotReading(slot=slot, stage=stages.get(slot, Stage.DORMANT)) for slot in SLOTS)
    return Reading(run_id="run", step=step, tokens=100, flops=0.0, training_loss_nats=3.0, slots=slots)


def legal(garden: Garden, site: TinySite, step: int) -> list[Order]:
    """Every order that may be given now."""
    config, found = loose(), []
    for slot in SLOTS:
        life = garden.open_in(slot)
        for operation in TARGETS:
            seed = garden.next_seed(slot) if operation == "germinate" else life.seed if life else ""
            made = order(operation, slot, seed, step)
            is_full = slot in seeds_in(site.model) and operation == "germinate"
            if seed and not is_full and check_order(made, garden, config, run_id="run", step=step, slots=SLOTS) is None:
                found.append(made)
    return found


def assert_whole(garden: Garden, site: TinySite) -> None:
    """The laws of V1: between model, log, optimizer and garden nothing differs."""
    names = dict(site.model.named_parameters())
    grouped = [name for group in site.optimizer.param_groups for name in group["param_names"]]
    assert sorted(grouped) == sorted(names), "each parameter is in exactly one group, under its name"
    held = {id(each) for each in names.values()}
    assert {id(each) for each in site.optimizer.state} <= held, "no state is left behind"
    for life in garden.lives:
        stages = [Stage.DORMANT, *(each.after for each in life.history)]
        assert all(after in TRANSITIONS[before] for before, after in zip(stages, stages[1:], strict=False))
        assert (life.slot in seeds_in(site.model)) or not life.is_open
    assert Garden.from_json(garden.to_json()) == garden


def assert_replays(site: TinySite) -> None:
    """The log rebuilds the model: names, shapes, and with the state dict every byte."""
    twin = replay(host("preset-default", torch.float32), log_of(site.model))
    twin.load_state_dict(site.model.state_dict())
    assert bits(twin) == bits(site.model)
    assert topology(twin) == topology(site.model)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("n_orders", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_v1_random_legal_orders_keep_every_law(n_orders: int) -> None:
    draw, site, garden = random.Random(7), TinySite.of(*SLOTS), evaluated()
    config, reached = loose(), set()
    for step in range(1, n_orders + 1):
        choices = legal(garden, site, step)
        if sum(map(len, settled_in(site.model).values())) >= 6:  # or the model would only grow
            choices = [each for each in choices if each.operation != "fossilize"]
        if choices:
            # Were every order as likely, one life in a hundred would reach its verdict.
            weights = [1 if each.operation == "cull" else 8 for each in choices]
            garden = replace(garden, queue=tuple(draw.choices(choices, weights)), penalties={})
            garden = act_on(garden, site, config, run_id="run", step=step)
        site.train()
        advance(site.model)
        reached |= {each.after for life in garden.lives for each in life.history}
        assert_whole(garden, site)
    assert_replays(site)
    assert not garden.is_stopped
    if n_orders >= 1000:
        assert reached == set(Stage) - {Stage.UNKNOWN, Stage.TERMINATED}


def test_a_whole_life_by_tend_alone() -> None:
    """Without any policy the seed goes on at each boundary, and is kept where it brings its rent."""
    site, garden, config, heard = TinySite.of("blocks.0"), evaluated(), loose(), []
    garden = replace(garden, queue=(order(step=1),))
    for step in range(1, 9):
        garden = act_on(garden, site, config, run_id="run", step=step, emit=heard.append)
        garden = tend(
            garden,
            reading(garden, step + 1),
            config,
            ask=lambda reading, mask, breaker: Decision(Proposal("wait"), None, breaker),
            slots=SLOTS,
            free_parameters=100,
        )
        advance(site.model)
    (life,) = garden.lives
    assert [each.after.name for each in life.history] == [
        "GERMINATED",
        "TRAINING",
        "BLENDING",
        "SHADOWING",
        "PROBATIONARY",
        "FOSSILIZED",
    ]
    assert [each.step for each in life.history] == [1, 2, 3, 4, 5, 6]
    assert site.reports[0].outcome in ("success", "neutral")
    assert not seeds_in(site.model) and len(settled_in(site.model)["blocks.0"]) == 1
    assert [event.payload["gate"] for event in heard if event.name == "gate.result"] == "G0 G1 G2 G3 G4 G6".split()


def culled() -> Garden:
    return Garden(embargoes={"blocks.0": Embargo(100, 1)})


WRONG = {
    "unknown_operation": (order("grow"), Garden()),
    "other_run": (replace(order(), run_id="another"), Garden()),
    "expired": (order(step=1), Garden()),
    "from_later": (order(step=99), Garden()),
    "unknown_slot": (replace(order(), slot="blocks.7", seed="blocks.7#0"), Garden()),
    "unknown_seed": (order("cull"), Garden()),
    "stopped": (order(), Garden(is_stopped=True)),
    "illegal_transition": (order("fossilize"), None),
    "other_slot": (order("cull", slot="blocks.1"), None),
    "occupied": (order(seed="blocks.0#1"), None),
    "locked": (order(), culled()),
    "blocked": (order(), Garden(penalties={"bottleneck": 3.0})),
    "wrong_number": (order(seed="blocks.0#9"), Garden()),
    "unknown_way": (replace(order(), way="alone"), Garden()),
    "unknown_blueprint": (replace(order(), blueprint="bottle"), Garden()),
    "wrong_settings": (replace(order(), settings={"hiden": 3}), Garden()),
    "seeds_open": (Order("stack", "", "", "run", 1, "asked"), None),
    "unknown_blend": (replace(order(), blend="adding"), Garden()),
    "missing_layers": (replace(order(), needs=("blocks.1.mlp", "blocks.9.mlp")), Garden()),
    "no_readout": (replace(order(), blend="confidence"), Garden()),
}


@pytest.mark.parametrize("code", WRONG)
def test_ka10_each_wrong_order_has_its_code_and_no_effect(code: str) -> None:
    given, garden = WRONG[code]
    site = TinySite.of(*SLOTS)
    if garden is None:
        garden = act_on(Garden(queue=(order(),)), site, loose(), run_id="run", step=1)
    step = 30 if code == "expired" else 2
    config = loose(boundary_every=5)
    if code == "no_readout":
        site.model.readout = None
    refusal = check_order(given, garden, config, run_id="run", step=step, slots=SLOTS, model=site.model)
    assert refusal is not None and refusal.code == code and refusal.why
    before, heard = bits(site.model), list[Event]()
    after = act_on(replace(garden, queue=(given,)), site, config, run_id="run", step=step, emit=heard.append)
    assert after == replace(garden, queue=())
    assert bits(site.model) == before
    assert [(event.name, event.payload["code"]) for event in heard] == [("order.refused", code)]


def test_k4_what_a_proposal_needs_of_its_host_is_asked_again_when_it_has_arrived() -> None:
    """The seed is put in while the module is there, and does not pass G3 where it is not any more."""
    site, config, heard = TinySite.of(*SLOTS), loose(), list[Event]()
    proposal = Proposal("germinate", "blocks.0", "norm", needs=("blocks.1.mlp",))
    given = order_of(Garden(), proposal, reading(Garden(), 1), config)
    assert given is not None and Order.from_json(given.to_json()) == given and given.needs == ("blocks.1.mlp",)
    garden = evaluated()
    for step, each in enumerate(("germinate", "start_training", "start_blending"), 1):
        made = given if each == "germinate" else order(each, step=step)
        garden = act_on(replace(garden, queue=(made,)), site, config, run_id="run", step=step)
        advance(site.model)
    assert garden.figures[given.seed]["needs"] == ["blocks.1.mlp"]
    garden = garden.noted(given.seed, needs=["blocks.1.mlp", "blocks.9.mlp"])
    garden = replace(garden, queue=(order("stabilize", step=4),))
    after = act_on(garden, site, config, run_id="run", step=4, emit=heard.append)
    (told,) = [event for event in heard if event.name == "mesh_coverage_missing"]
    assert told.payload["missing"] == ["blocks.9.mlp"] and after.lives[0].stage is Stage.CULLED


@pytest.mark.parametrize("name", ["run_id", "seed", "slot", "blueprint"])
def test_t13_an_order_without_an_id_raises(name: str) -> None:
    with pytest.raises(MissingDependency, match=name):
        check_order(replace(order(), **{name: ""}), Garden(), loose(), run_id="run", step=1, slots=SLOTS)


@pytest.mark.parametrize(("operation", "moved"), [("insert", "blocks.2"), ("stack", "blocks.1")])
def test_the_whole_stack_is_made_deeper_once_no_seed_is_on_its_way(operation: str, moved: str) -> None:
    """Settled seeds move with their blocks; new blocks have a part of their own in the optimizer; log, model, optimizer
    and garden are of one moment, and a garden that is stopped or of another run is not changed."""
    site, garden, config = TinySite.of(*SLOTS), evaluated(), loose()
    garden = act_on(
        replace(garden, queue=(order(slot="blocks.1", seed="blocks.1#0"),)), site, config, run_id="run", step=1
    )
    for step, each in enumerate(("start_training", "start_blending", "stabilize", "evaluate", "fossilize"), 2):
        given = order(each, "blocks.1", "blocks.1#0", step)
        garden = act_on(replace(garden, queue=(given,)), site, config, run_id="run", step=step)
        advance(site.model)
    assert [*settled_in(site.model)] == [*SLOTS] and not garden.unfinished
    deepens, said = Order(operation, "", "", "run", 9, "asked"), site.logits(site.model)
    for wrong in (replace(garden, is_stopped=True), garden):
        after = act_on(replace(wrong, queue=(deepens,)), site, config, run_id="run" * (2 - wrong.is_stopped), step=9)
        assert after == wrong and len(site.model.blocks) == 2
    garden = act_on(replace(garden, queue=(deepens,)), site, config, run_id="run", step=9)
    assert [*site.slots()] == [f"blocks.{number}" for number in range(4)], "of all blocks, whatever was added"
    assert garden.deepened == (9,) and Garden.from_json(garden.to_json()) == garden and len(site.model.blocks) == 4
    assert settled_in(site.model)[moved] and torch.equal(said, site.logits(site.model)) is (operation == "insert")
    parts = {group["joined"] for group in site.optimizer.param_groups if "joined" in group}
    assert parts == set(site.optimizer.joined) and len(parts) == (2 if operation == "insert" else 1)
    site.train()
    assert_whole(garden, site)
    assert_replays(site)


def test_too_many_seeds_on_their_way_are_refused() -> None:
    site, config = TinySite.of(*SLOTS), loose(max_open=1)
    garden = act_on(Garden(queue=(order(),)), site, config, run_id="run", step=1)
    second = order(slot="blocks.1", seed="blocks.1#1", step=2)
    refusal = check_order(second, garden, config, run_id="run", step=2, slots=SLOTS)
    assert refusal is not None and refusal.code == "too_many"


@pytest.mark.parametrize("outcome", ["timeout", "nothing", "wait"])
def test_t19_where_a_policy_gives_no_proposal_no_order_comes_of_it(outcome: str) -> None:
    """A policy that is late, or has nothing to propose: the queue stays empty, the breaker is that of its answer."""
    breaker, heard = Breaker(n_failures=9), list[Event]()
    found = {
        "timeout": Decision(None, PolicyTimeout("late"), breaker),
        "nothing": Decision(NoCandidates("none"), None, breaker),
        "wait": Decision(Proposal("wait"), None, breaker),
    }[outcome]
    after = tend(
        Garden(),
        reading(Garden()),
        loose(),
        ask=lambda reading, mask, before: found,
        slots=SLOTS,
        free_parameters=100,
        emit=heard.append,
    )
    assert after == Garden(breaker=breaker)
    assert heard == []


def test_the_mask_says_what_may_be_proposed() -> None:
    seen: list[Mask] = []

    def ask(reading: Reading, mask: Mask, breaker: Breaker) -> Decision:
        seen.append(mask)
        return Decision(Proposal("wait"), None, breaker)

    garden = culled()
    for free in (100, 0):
        tend(garden, reading(garden), loose(), ask=ask, slots=SLOTS, free_parameters=free)
    assert seen[0].slots == {"blocks.1"} and seen[0].can_germinate and not seen[0].why
    assert not seen[1].can_germinate and "params_ratio" in seen[1].why


@given(st.integers(1, 12))
def test_a_lock_lasts_twice_as_long_each_time_and_at_most_sixteen_times(n: int) -> None:
    garden = Garden()
    for _ in range(n):
        garden = garden.culled("blocks.0", "norm", step=0, embargo_steps=200)
    assert garden.embargoes["blocks.0"] == Embargo(200 * min(2 ** (n - 1), 16), n)
    assert ("norm" in garden.blocked) == (n > 1)


def test_ta3_policies_risk_and_reports_do_not_know_each_other_nor_the_gardener() -> None:
    """It alone composes them: each can be another."""
    root = Path(meristem.__file__).parent
    known = {source.name: {target for _, target in house.imports(source)} for source in house.modules(root, "meristem")}
    parts = {
        "policy": ("policy", "heuristic", "schedule", "trend"),
        "risk": ("risk",),
        "report": ("report",),
        "gardener": ("gardener", "acts", "gates", "garden"),
    }
    for part, modules in parts.items():
        others = [f"meristem.growth.{name}" for other, names in parts.items() if other != part for name in names]
        for name in modules if part != "gardener" else ():
            crossed = [target for target in known[f"meristem.growth.{name}"] if target.startswith(tuple(others))]
            assert crossed == [], f"{name} imports {crossed}"


def test_ta1_one_configuration_feeds_gates_policy_and_risk() -> None:
    """Every part of it is one frozen value, and a key that no part knows is refused with the nearest."""
    config = load_config("default", ["grow.risk.quiet_steps=7", "grow.policy.inference_budget_ms=9"], {}).tree.grow
    assert (config.risk.quiet_steps, config.policy.inference_budget_ms) == (7, 9)
    with pytest.raises(UnknownKey, match="quiet_steps"):
        load_config("default", ["grow.risk.quiet_step=7"], {})
    with pytest.raises(ValidationError):
        config.risk = None


@pytest.mark.parametrize("name", ["training_loss_nats", "gradient_norm"])
def test_t7_a_policy_that_observes_is_asked_with_numbers_or_not_at_all(name: str) -> None:
    """What it sees is scaled by a normaliser that the garden keeps; where a number is missing, no order comes of it."""
    seen, heard = [], []

    def ask(reading: Reading, mask: Mask, breaker: Breaker | None) -> Decision:
        seen.append(reading.observation)
        return Decision(Proposal("wait"), None, breaker or Breaker())

    measured = replace(reading(Garden()), held_out=evaluated().held_out, metrics={"gradient_norm": 0.5})
    metrics = {"gradient_norm": None} if name == "gradient_norm" else measured.metrics
    nats = None if name == "training_loss_nats" else measured.training_loss_nats
    lacking = replace(measured, metrics=metrics, training_loss_nats=nats)
    told = {"ask": ask, "slots": SLOTS, "free_parameters": 100, "emit": heard.append}
    garden = tend(Garden(), measured, loose(), observes=Observes(("gradient_norm",)), **told)
    assert seen[0] is not None and seen[0].features["gradient_norm"].is_present and seen[0].slots == SLOTS
    assert garden.normaliser.moments["gradient_norm"] == (0.5, 0.0) and not heard
    assert Garden.from_json(garden.to_json()) == garden
    after = tend(garden, lacking, loose(), observes=Observes(("gradient_norm",)), **told)
    assert len(seen) == 1 and after == garden
    assert [(event.name, event.payload["name"]) for event in heard] == [("feature.missing", name)]
    tend(garden, lacking, loose(), observes=Observes(("gradient_norm",), is_strict=False), **told)
    assert seen[1].features[name] == (0.0, False)
    tend(Garden(), measured, loose(), **told)
    assert seen[2] is None, "who does not ask gets no numbers"
