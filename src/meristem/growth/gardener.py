"""Growth, step by step: observe -> propose -> check -> act (growth.md 17).

garden = tend(garden, reading, config, ask=ask, slots=names, ...)    # at a boundary: orders are given
garden = act_on(garden, site, config, step=step)                        # before the next step: they are carried out

All that is known between two steps is in the garden. What the model holds follows from the orders alone.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from torch import nn

from meristem.errors import BlendRefused, GrowthError, MeristemError, MissingDependency, MissingMetric
from meristem.events import Emit, Event, silent
from meristem.growth.acts import ACTS, Site, blending_of
from meristem.growth.attach import find_slot
from meristem.growth.blend import Confidence, blending
from meristem.growth.blueprint import blueprints
from meristem.growth.features import Observes, observed
from meristem.growth.garden import Garden, Order
from meristem.growth.isolation import WAYS
from meristem.growth.observe import Reading
from meristem.growth.policy import Decision, Mask, Proposal
from meristem.growth.proposal import DEEPENINGS
from meristem.growth.risk import judge
from meristem.growth.stage import OPEN, TRANSITIONS, Life, Stage
from meristem.models.growing import GrowConfig
from meristem.worker.breaker import Breaker

Ask: TypeAlias = Callable[[Reading, Mask, Breaker | None], Decision]
"""What asks a policy under its deadline."""

TARGETS: Final[Mapping[str, Stage]] = {
    "germinate": Stage.GERMINATED,
    "start_training": Stage.TRAINING,
    "start_blending": Stage.BLENDING,
    "stabilize": Stage.SHADOWING,
    "evaluate": Stage.PROBATIONARY,
    "fossilize": Stage.FOSSILIZED,
    "cull": Stage.CULLED,
    "embargo": Stage.EMBARGOED,
    "reset": Stage.RESETTING,
    "clear": Stage.DORMANT,
}
"""Operations, and the stage that each leads to."""

PROPOSED: Final[Mapping[str, str]] = {"blend": "start_blending", "fossilize": "fossilize", "cull": "cull"}
"""What a policy may propose for a seed that is there, and the operation that this is."""


@dataclass(frozen=True)
class Refusal:
    """Why an order is not carried out. code: one of few words that a program can act on."""

    code: str
    why: str


def next_order(garden: Garden, life: Life, config: GrowConfig, reading: Reading) -> Order | None:
    """The order by which a life goes on by itself, if it is due."""
    gates, since = config.gates, reading.step - life.since
    due: Mapping[Stage, tuple[str, int]] = {
        Stage.GERMINATED: ("start_training", 1),
        Stage.TRAINING: ("start_blending", gates.training_steps),
        Stage.BLENDING: ("stabilize", max(1, blending_of(garden, life, config).steps)),
        Stage.SHADOWING: ("evaluate", gates.holding_steps),
        Stage.PROBATIONARY: ("fossilize", max(gates.probation_steps, config.min_age - (life.since - life.born))),
        Stage.CULLED: ("embargo", 1),
        Stage.EMBARGOED: ("reset", 1),
        Stage.RESETTING: ("clear", 1),
    }
    operation, steps = due.get(life.stage, ("", 0))
    is_locked = life.stage is Stage.EMBARGOED and garden.is_locked(life.slot, reading.step)
    if not operation or since < steps or is_locked:
        return None
    return Order(operation, life.slot, life.seed, reading.run_id, reading.step, "it is due")


def mask_of(garden: Garden, reading: Reading, config: GrowConfig, *, free_parameters: int) -> Mask:
    """What a policy may propose now. free_parameters: how many a seed may have for the model to stay in its cap."""
    busy = {life.slot for life in garden.unfinished}
    empty = {each.slot for each in reading.slots if each.stage is Stage.DORMANT}
    free = {slot for slot in empty - busy if not garden.is_locked(slot, reading.step)}
    n_open = sum(life.stage in OPEN for life in garden.lives)
    why = ""
    if garden.is_stopped:
        why = "the structure is not changed any more"
    elif n_open >= config.max_open:
        why = f"{n_open} seeds are on their way, and grow.max_open is {config.max_open}"
    elif free_parameters < 1:
        why = "no parameter is left under grow.params_ratio"
    elif not free:
        why = "every slot is in use or locked"
    elif any(life.way == "frozen_host" and life.stage is Stage.TRAINING for life in garden.lives):
        why = "the host is frozen while a seed learns"
    old = {life.slot for life in garden.unfinished if reading.step - life.born >= config.min_age}
    return Mask(
        slots=frozenset(free),
        can_germinate=not why,
        may_cull=frozenset(life.slot for life in garden.unfinished if life.stage in OPEN and life.slot in old),
        blocked_blueprints=garden.blocked,
        free_parameters=free_parameters,
        why=why,
        can_deepen=not garden.is_stopped and not garden.unfinished,
    )


def order_of(garden: Garden, proposal: Proposal, reading: Reading, config: GrowConfig) -> Order | None:
    """What a proposal comes to; None where it is to wait. Raises MissingDependency where a name is missing in it."""
    if proposal.operation == "wait":
        return None
    if proposal.operation in DEEPENINGS:
        drawn = proposal.random_seed
        return Order(proposal.operation, "", "", reading.run_id, reading.step, proposal.why, random_seed=drawn)
    if not proposal.slot:
        raise MissingDependency(f"the policy proposed '{proposal.operation}' without a slot. Name one.", missing="slot")
    if proposal.operation != "germinate":
        life = garden.open_in(proposal.slot)
        seed = life.seed if life else ""
        operation = PROPOSED.get(proposal.operation, proposal.operation)
        return Order(operation, proposal.slot, seed, reading.run_id, reading.step, proposal.why)
    return Order(
        operation="germinate",
        slot=proposal.slot,
        seed=garden.next_seed(proposal.slot),
        run_id=reading.run_id,
        step=reading.step,
        why=proposal.why,
        blueprint=proposal.blueprint,
        settings=dict(proposal.settings),
        blend=str(blending(proposal.blend, config.blending)),
        way=proposal.way,
        random_seed=proposal.random_seed,
        needs=proposal.needs,
    )


def check_order(
    order: Order,
    garden: Garden,
    config: GrowConfig,
    *,
    run_id: str,
    step: int,
    slots: Collection[str],
    model: nn.Module | None = None,
) -> Refusal | None:
    """Why an order is not to be carried out, or None. Nothing is changed.

    slots: those of the model. model: where it is given, it has to have what a germination needs of it. Raises
    MissingDependency for an order that names no run, no seed or, where it is to germinate, no blueprint.
    """
    is_deepening = order.operation in DEEPENINGS
    needed = {"run_id": order.run_id} | ({} if is_deepening else {"seed": order.seed, "slot": order.slot})
    if order.operation == "germinate":
        needed["blueprint"] = order.blueprint or ""
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise MissingDependency(
            f"an order '{order.operation}' of step {order.step} names no {', '.join(missing)}. Every order names its "
            f"run, one about a seed that and its slot, and a germination its blueprint.",
            missing=missing,
        )
    refusals = [
        ("other_run", order.run_id != run_id, f"it is of the run {order.run_id}, and this is {run_id}"),
        ("expired", order.step < step - config.boundary_every, f"it was given at step {order.step}, long ago"),
        ("from_later", order.step > step, f"it was given at step {order.step}, which is to come"),
    ]
    refusals += _about_stack(garden) if is_deepening else _about_seed(order, garden, step, slots)
    for code, is_refused, why in refusals:
        if is_refused:
            return Refusal(code, why)
    return _germination(order, garden, config, step, model) if order.operation == "germinate" else None


def _about_stack(garden: Garden) -> list[tuple[str, bool, str]]:
    """What is asked before the whole stack is changed: slots of seeds are known by the blocks that they stand at."""
    seeds = ", ".join(life.seed for life in garden.unfinished)
    return [
        ("stopped", garden.is_stopped, "the structure is not changed any more"),
        ("seeds_open", bool(seeds), f"{seeds} had not ended"),
    ]


def _about_seed(order: Order, garden: Garden, step: int, slots: Collection[str]) -> list[tuple[str, bool, str]]:
    """What is asked of an order for a seed, of whatever stage."""
    life = next((each for each in garden.lives if each.seed == order.seed), None)
    before = life.stage if life else Stage.DORMANT
    is_over = life is not None and before is Stage.DORMANT
    target = TARGETS.get(order.operation)
    known = ", ".join([*TARGETS, *sorted(DEEPENINGS)])
    return [
        ("unknown_operation", target is None, f"'{order.operation}' is none of {known}"),
        ("unknown_slot", order.slot not in slots, f"there is no slot '{order.slot}'"),
        ("other_slot", life is not None and life.slot != order.slot, f"that seed is not in '{order.slot}'"),
        ("unknown_seed", life is None and order.operation != "germinate", f"there is no seed '{order.seed}'"),
        ("stopped", garden.is_stopped and target in OPEN, "the structure is not changed any more"),
        (
            "illegal_transition",
            target is not None and (target not in TRANSITIONS[before] or is_over),
            f"a seed that is {before.name} cannot be made {target.name if target else 'that'}",
        ),
        ("locked", target is Stage.RESETTING and garden.is_locked(order.slot, step), f"'{order.slot}' is locked"),
    ]


def _germination(
    order: Order, garden: Garden, config: GrowConfig, step: int, model: nn.Module | None
) -> Refusal | None:
    """What more is asked of a new seed."""
    now = garden.open_in(order.slot)
    n_open = sum(life.stage in OPEN for life in garden.lives)
    refusals = (
        ("occupied", now is not None, f"'{order.slot}' holds {now.seed if now else ''}"),
        ("locked", garden.is_locked(order.slot, step), f"'{order.slot}' is locked after a cull"),
        ("blocked", order.blueprint in garden.blocked, f"too many seeds '{order.blueprint}' were culled of late"),
        ("too_many", n_open >= config.max_open, f"{n_open} seeds are on their way"),
        ("wrong_number", order.seed != garden.next_seed(order.slot), f"the next is {garden.next_seed(order.slot)}"),
        ("unknown_way", order.way not in WAYS, f"'{order.way}' is no way to train"),
    )
    for code, is_refused, why in refusals:
        if is_refused:
            return Refusal(code, why)
    for code, settle in (
        ("unknown_blueprint", lambda: blueprints.get(order.blueprint or "")),
        ("wrong_settings", lambda: blueprints.get(order.blueprint or "").settle(order.settings)),
        ("unknown_blend", lambda: blending(order.blend)),
    ):
        try:
            settle()
        except MeristemError as cause:
            return Refusal(code, str(cause))
    return None if model is None else _host_of(order, model)


def _host_of(order: Order, model: nn.Module) -> Refusal | None:
    """What a seed asks of its host: modules, and logits where its blend reads them."""
    there = dict(model.named_modules())
    missing = [name for name in order.needs if name not in there]
    if missing:
        return Refusal("missing_layers", f"the model has no {', '.join(missing)}")
    if blending(order.blend).name == "confidence":
        try:
            Confidence().bind(model, find_slot(model, order.slot).widths[1])
        except BlendRefused as cause:
            return Refusal("no_readout", str(cause))
    return None


def tend(
    garden: Garden,
    reading: Reading,
    config: GrowConfig,
    *,
    ask: Ask,
    slots: Collection[str],
    free_parameters: int,
    observes: Observes | None = None,
    emit: Emit = silent,
) -> Garden:
    """The garden with the orders of this boundary in its queue: those by which lives go on, and what was proposed.

    ask: where no answer comes of it, no order does. slots: those of the model. observes: what the policy wants to see
    as numbers; where that is not there it is not asked.
    """
    orders = [order for life in garden.unfinished if (order := next_order(garden, life, config, reading))]
    mask = mask_of(garden, reading, config, free_parameters=free_parameters)
    garden, proposal = _proposed(garden, reading, mask, config, ask, observes, emit)
    if proposal is not None:
        try:
            order = order_of(garden, proposal, reading, config)
        except MissingDependency as cause:
            emit(Event("order.refused", {"step": reading.step, "code": "missing", "reason": str(cause)}, "warning"))
        else:
            orders += [order] if order else []
    given: dict[str, Order] = {}
    for order in orders:
        if order.slot in given:
            refusal: Refusal | None = Refusal(
                "second_at_boundary", f"'{order.slot}' has the order {given[order.slot].operation}"
            )
        else:
            refusal = _refusal(order, garden, config, reading, slots)
        if refusal:
            emit(Event("order.refused", order.to_json() | {"code": refusal.code, "reason": refusal.why}, "warning"))
        else:
            given[order.slot] = order
    return replace(garden, queue=(*garden.queue, *given.values()))


def _proposed(
    garden: Garden,
    reading: Reading,
    mask: Mask,
    config: GrowConfig,
    ask: Ask,
    observes: Observes | None,
    emit: Emit,
) -> tuple[Garden, Proposal | None]:
    """What the policy proposes and risk allows, and the garden that has heard both."""
    if observes is not None:
        try:
            normaliser, reading = observed(reading, observes, garden.normaliser, emit=emit)
        except (MissingMetric, MissingDependency) as cause:
            payload = {"run_id": reading.run_id, "step": reading.step, "why": str(cause)}
            emit(Event("feature.missing", payload | {"name": cause.fields.get("name")}, "warning"))
            return garden, None
        garden = replace(garden, normaliser=normaliser)
    decision = ask(reading, mask, garden.breaker)
    garden = replace(garden, breaker=decision.breaker)
    if decision.outcome is None:
        return garden, None
    verdict = judge(reading, decision.outcome, config.risk, garden.latch)
    garden = replace(garden, latch=verdict.latch)
    if verdict.action != "allow":
        reasons = [str(each) for each in verdict.reasons]
        emit(Event("risk.held_up", {"step": reading.step, "action": verdict.action, "reasons": reasons}, "warning"))
        return garden, None
    return garden, decision.outcome if isinstance(decision.outcome, Proposal) else None


def _refusal(
    order: Order, garden: Garden, config: GrowConfig, reading: Reading, slots: Collection[str]
) -> Refusal | None:
    try:
        return check_order(order, garden, config, run_id=reading.run_id, step=reading.step, slots=slots)
    except MissingDependency as cause:
        return Refusal("missing", str(cause))


def act_on(garden: Garden, site: Site, config: GrowConfig, *, run_id: str, step: int, emit: Emit = silent) -> Garden:
    """The garden after the orders of its queue were carried out, each checked once more; the model follows.

    Where a change of the model fails the model is what it was, and no structure is changed any more.
    """
    orders, garden = garden.queue, replace(garden, queue=())
    for order in orders:
        refusal = check_order(order, garden, config, run_id=run_id, step=step, slots=site.slots(), model=site.model)
        if refusal:
            emit(Event("order.refused", order.to_json() | {"code": refusal.code, "reason": refusal.why}, "warning"))
            continue
        try:
            garden = ACTS[order.operation](garden, order, site, config, step, emit)
        except GrowthError as cause:
            payload = {"order": order.operation, "slot": order.slot, "step": step, "why": str(cause)}
            emit(Event("growth.stopped", payload, "critical"))
            garden = replace(garden, is_stopped=True)
    return garden
