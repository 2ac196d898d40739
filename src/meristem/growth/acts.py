"""What each order does to a garden and to the run that it stands in; the gates stand before every stage (growth.md 17).

A seed whose gate fails is culled at once. Whatever is measured here is the same whenever a run comes here again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from meristem.errors import CheckpointMismatch, GrowthError, MeristemError, MissingMetric
from meristem.events import Emit, Event
from meristem.growth import gates
from meristem.growth.attach import find_slot
from meristem.growth.blend import blending
from meristem.growth.certify import Certificate
from meristem.growth.contribution import ablate, switched
from meristem.growth.garden import Garden, Order
from meristem.growth.gates import GateResult
from meristem.growth.graft import STEP, addition, build, cost_in, find_seed, seeds_in, set_blend
from meristem.growth.isolation import enter, leave
from meristem.growth.measure import (
    Gradients,
    expected,
    host_digest,
    is_grouped,
    largest_change,
    n_host_parameters,
    n_left,
    size_ratio,
    spread,
)
from meristem.growth.plan import Plan, plan_graft, plan_remove
from meristem.growth.report import GrowthReport, outcome_of
from meristem.growth.seed import Origin
from meristem.growth.stage import LIVE, Life, Paired, Stage, move
from meristem.growth.surgery.blocks import plan_interleave, plan_stack
from meristem.growth.surgery.fold import plan_fossilize
from meristem.models.growing import Blending, GrowConfig

CHANGES_MOST: Final = 1e-3
"""By how much a logit may differ, relative to the largest, where a model is in less than float32; else not at all."""


class Site(Protocol):
    """The run that a seed stands in, as the acts see it.

    tokens: that were read for training. quiet_steps: for how long the guard has said nothing. losses: of training, the
    newest last. flops_per_token: of the model as it is, forward. step_flops: of a training step. measure_flops: of a
    ``measure``.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def tokens(self) -> int: ...
    @property
    def quiet_steps(self) -> int | None: ...
    @property
    def losses(self) -> Sequence[float]: ...
    @property
    def flops_per_token(self) -> float: ...
    @property
    def step_flops(self) -> float: ...
    @property
    def measure_flops(self) -> float: ...

    def slots(self) -> Collection[str]:
        """The slots of the model."""

    def measure(self, model: nn.Module) -> Sequence[float]:
        """Held-out losses, a sequence each and always the same ones, in nats per target."""

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of a probe batch with its graph."""

    def logits(self, model: nn.Module) -> Tensor:
        """What the model says of the probe batch."""

    def evaluate(self) -> float | None:
        """What held-out text costs now, read as in every evaluation of the run."""

    def keep(self) -> bool:
        """Keep the run as it is, so that it can return to here; whether that could be done."""

    def change(self, plan: Plan) -> None:
        """Change the structure of the model; optimizer, engine and the log of changes follow, or nothing does."""

    def is_isolated(self, slot: str) -> bool | None:
        """Whether gradients of the host are the same with and without the pass of a seed."""

    def certify(self, slot: str) -> None:
        """Begin to probe the seed of a slot, beside the run."""

    def certificate(self, slot: str) -> Certificate | None:
        """What was found, once it is there; None where nothing could be."""

    def recover(self, slot: str, n_steps: int) -> tuple[float | None, bool]:
        """Loss without the seed after the host alone was trained on, less that with it after as many steps on the same
        text, both in copies; and whether the run lasts long enough for that."""

    def agreed(self, result: GateResult) -> GateResult:
        """What a gate said, in all processes of the run: what it said in the first."""

    def report(self, report: GrowthReport) -> None:
        """Write down how a seed ended."""


Act: TypeAlias = Callable[[Garden, Order, Site, GrowConfig, int, Emit], Garden]


def germinate(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Put a seed into its slot, switched off; a seed that G0 refuses is not put in, and the slot is locked."""
    blend = blending(order.blend, config.blending)
    origin = Origin.of(order.blueprint or "", order.settings, blend=blend.name, random_seed=order.random_seed)
    life = Life(seed=order.seed, slot=order.slot, origin=origin, born=step, way=order.way, since=step)
    found, shares = _sanity(garden, life, site, step)
    result = gates.sanity(life, found, params_ratio=config.params_ratio, flops_ratio=config.flops_ratio, step=step)
    result = site.agreed(result).told(emit)
    garden = garden.judged(result)
    if not result.passed:
        return garden.culled(order.slot, origin.blueprint, step=step, embargo_steps=config.embargo_steps)
    is_stored = site.keep()

    try:
        plan = plan_graft(
            site.model,
            order.slot,
            origin.blueprint,
            blend=origin.blend,
            random_seed=origin.random_seed,
            **origin.settings,
        )
        site.change(plan)
    except GrowthError as cause:
        payload = {"seed": life.seed, "slot": order.slot, "step": step, "reason": str(cause)}
        emit(Event("graft.refused", payload, "error"))
        return garden.culled(order.slot, origin.blueprint, step=step, embargo_steps=config.embargo_steps)
    set_blend(site.model, order.slot, 0.0)
    if config.certify:
        site.certify(order.slot)
    life = move(life, Stage.GERMINATED, step=step, reason=order.why, gate=result.number, emit=emit)
    noted = {**shares, "is_stored": is_stored, "blending": str(blend), "needs": list(order.needs)}
    return garden.with_life(life).noted(life.seed, **noted)


def _sanity(garden: Garden, life: Life, site: Site, step: int) -> tuple[gates.Sanity, dict[str, float]]:
    """What G0 asks, and the shares of the host's parameters and FLOPs that the seed adds."""
    model, origin = site.model, life.origin
    place = find_slot(model, life.slot)
    known = gates.Sanity(
        is_known=True,
        is_empty=place.seed is None,
        is_locked=garden.is_locked(life.slot, step),
        is_blocked=origin.blueprint in garden.blocked,
    )
    try:
        origin.described()
        spent = cost_in(model, place, origin)
    except MeristemError as cause:
        return replace(known, is_known=not isinstance(cause, CheckpointMismatch)), {}
    n_all = sum(each.numel() for each in model.parameters())
    n_host, flops = n_host_parameters(model), site.flops_per_token
    shares = {"params_share": spent.n_parameters / n_host, "flops_share": spent.flops_per_token / max(flops, 1.0)}
    seed = build(model, place, origin)
    found = replace(
        known,
        params_ratio=(n_all + spent.n_parameters) / n_host,
        flops_ratio=1 + shares["flops_share"],
        adds=addition(seed, place),
        is_finite=all(bool(each.isfinite().all()) for each in seed.parameters()),
    )
    return found, shares


def start_training(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Let a seed learn, if it changes nothing and can learn."""
    life, model = _life(garden, order), site.model
    own = [*find_seed(model, life.slot).parameters()]
    others = {id(each) for slot, seed in seeds_in(model).items() if slot != life.slot for each in seed.parameters()}
    certificate = site.certificate(life.slot) if config.certify else None
    found = gates.Health(
        changes=largest_change(model, life.slot, site.logits),
        n_reached=Gradients.of(model, life.slot, site.loss).n_reached,
        is_owned=not any(id(each) in others for each in own),
        is_grouped=is_grouped(site.optimizer, own),
        is_stored=bool(garden.figures.get(life.seed, {}).get("is_stored")),
        is_isolated=None if life.way == "joint" else site.is_isolated(life.slot),
        is_certified=None if certificate is None else certificate.handling != "quarantine",
    )
    is_exact = all(each.dtype in (torch.float32, torch.float64) for each in model.parameters())
    changes_most = 0.0 if is_exact else CHANGES_MOST
    result = gates.health(life, found, changes_most=changes_most, step=step, needs_certificate=bool(config.certify))
    passed, garden = _judged(garden, life, result, site, config, step, emit)
    if not passed:
        return garden
    enter(model, life.slot, life.way)
    life = move(life, Stage.TRAINING, step=step, reason=order.why, gate=result.number, emit=emit)
    return garden.with_life(life)


def start_blending(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Blend a seed in, if held-out text costs less with it."""
    life, model = _life(garden, order), site.model
    gained = _gained(site, life.slot)
    found = gates.Stability(gained=gained, gradient_ratio=Gradients.of(model, life.slot, site.loss).ratio)
    result = gates.stability(life, found, config.gates, step=step)
    garden = garden.spent(life.seed, 2 * site.measure_flops).noted(life.seed, tried=_plain(gained))
    passed, garden = _judged(garden, life, result, site, config, step, emit)
    if not passed:
        return garden
    _end_training(model, life)
    blend = blending_of(garden, life, config)
    if abs(find_seed(model, life.slot).way.weight - blend.target) >= STEP:
        set_blend(model, life.slot, blend.target, steps=blend.steps, curve=blend.curve)
    life = move(life, Stage.BLENDING, step=step, reason=order.why, gate=result.number, emit=emit)
    return garden.with_life(life).noted(life.seed, spread=spread(site.losses))


def stabilize(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Hold the blend weight and watch, if it has arrived and what comes out is of the size and calm that it was."""
    life, model = _life(garden, order), site.model
    course = find_seed(model, life.slot).way
    before, now = garden.figures.get(life.seed, {}).get("spread"), spread(site.losses)
    found = gates.Interface(
        weight=course.weight if course.is_done else None,
        size_ratio=size_ratio(model, life.slot, site.logits),
        spread_ratio=None if now is None or not before else now / before,
        needed=(life.slot, *garden.figures.get(life.seed, {}).get("needs", ())),
        registered={*site.slots(), *(name for name, _ in model.named_modules())},
    )
    target = blending_of(garden, life, config).target
    result = gates.interface(life, found, config.gates, target=target, step=step)
    passed, garden = _judged(garden, life, result, site, config, step, emit)
    if not passed:
        return garden
    return garden.with_life(move(life, Stage.SHADOWING, step=step, reason=order.why, gate=result.number, emit=emit))


def evaluate(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Make a seed fully live on probation, if the model is no worse than it would have become without it."""
    life, model = _life(garden, order), site.model
    line = expected(garden.held_out, born=life.born, tokens=site.tokens)
    held_out = site.evaluate()
    found = gates.Impact(
        held_out=held_out,
        expected=line and line[0],
        error=line and line[1],
        is_fallback=False,
        quiet_steps=site.quiet_steps,
        is_resumed=_is_resumed(model, life.slot, site),
    )
    result = gates.impact(life, found, config.gates, step=step)
    passed, garden = _judged(garden, life, result, site, config, step, emit)
    if not passed:
        return garden
    life = move(life, Stage.PROBATIONARY, step=step, reason=order.why, gate=result.number, emit=emit)
    return garden.with_life(life).noted(life.seed, held_out=held_out, expected=line and line[0])


@torch.no_grad()
def _is_resumed(model: nn.Module, slot: str, site: Site) -> bool:
    """Whether the model says the same after its seed was switched off and on again."""
    before = site.logits(model)
    with switched(model, {slot: 0.0}):
        site.logits(model)
    return torch.equal(before, site.logits(model))


def fossilize(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Make a seed part of its host for good, if it brings more than its rent; its slot is free then."""
    life = _life(garden, order)
    figures, gained = garden.figures.get(life.seed, {}), _gained(site, life.slot)
    recovered, has_room, flops = None, False, 2 * site.measure_flops
    if config.gates.recovery != "off":
        recovered, has_room = site.recover(life.slot, config.gates.recovery_steps)
        flops += has_room * 2 * (site.measure_flops + config.gates.recovery_steps * site.step_flops)
    found = gates.Contribution(
        gained=gained,
        params_share=figures.get("params_share"),
        flops_share=figures.get("flops_share"),
        recovered=recovered,
        has_room=has_room,
    )
    result = gates.contribution(life, found, config.gates, min_age=config.min_age, step=step)
    garden = garden.spent(life.seed, flops).noted(
        life.seed, gained=_plain(gained), rent=gates.rent(found, config.gates), recovered=recovered
    )
    passed, garden = _judged(garden, life, result, site, config, step, emit)
    if not passed:
        return garden
    plan = plan_fossilize(site.model, life.slot)
    site.change(plan)
    emit(Event("seed.fused", {"seed": life.seed, "step": step, **plan.fields}))
    life = move(life, Stage.FOSSILIZED, step=step, reason=order.why, gate=result.number, emit=emit)
    _report(garden, life, site, step, order.why)
    return garden.with_life(life)


def cull(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Take a seed out, because a policy or a gate wants it."""
    life = _life(garden, order)
    return _culled(garden, life, site, config, step, emit, reason=order.why)


def _culled(
    garden: Garden, life: Life, site: Site, config: GrowConfig, step: int, emit: Emit, *, reason: str, gate: str = ""
) -> Garden:
    _end_training(site.model, life)
    before, parameters = host_digest(site.model), [*find_seed(site.model, life.slot).parameters()]
    site.change(plan_remove(site.model, life.slot))
    after, left = host_digest(site.model), n_left(site.optimizer, parameters)
    was_live = life.stage in LIVE
    life = move(life, Stage.CULLED, step=step, reason=reason, gate=gate or None, emit=emit)
    emit(Event("seed.culled", {"seed": life.seed, "slot": life.slot, "step": step, "reason": reason}))
    _report(garden, life, site, step, reason)
    garden = garden.with_life(life).noted(life.seed, before=before, after=after, n_left=left, was_live=was_live)
    return garden.culled(life.slot, life.origin.blueprint, step=step, embargo_steps=config.embargo_steps)


def embargo(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Lock the slot of a culled seed."""
    life = _life(garden, order)
    until = garden.embargoes[life.slot].until
    return garden.with_life(move(life, Stage.EMBARGOED, step=step, reason=f"locked until step {until}", emit=emit))


def reset(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Clear what is left of it, once the lock has ended."""
    return garden.with_life(move(_life(garden, order), Stage.RESETTING, step=step, reason="unlocked", emit=emit))


def clear(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """End the life, if nothing is left of it; else no structure is changed any more."""
    life = _life(garden, order)
    figures = garden.figures.get(life.seed, {})
    names = [name for name, _ in site.model.named_parameters() if f".{life.slot}.slot.seed." in f".{name}"]
    found = gates.Cleared(
        is_empty=find_slot(site.model, life.slot).seed is None,
        n_left=figures.get("n_left"),
        is_disowned=not names,
        is_host_only=life.slot not in seeds_in(site.model),
        before=figures.get("before"),
        after=figures.get("after"),
        is_locked=garden.is_locked(life.slot, step),
    )
    result = site.agreed(gates.cleared(life, found, step=step)).told(emit)
    garden = garden.judged(result)
    if not result.passed:
        emit(Event("growth.stopped", {"seed": life.seed, "step": step, "code": result.code}, "critical"))
        return replace(garden, is_stopped=True)
    return garden.with_life(move(life, Stage.DORMANT, step=step, reason=order.why, gate=result.number, emit=emit))


def deepen(garden: Garden, order: Order, site: Site, config: GrowConfig, step: int, emit: Emit) -> Garden:
    """Make the whole stack twice as deep."""
    is_stack = order.operation == "stack"
    model = site.model
    site.change(plan_stack(model) if is_stack else plan_interleave(model, random_seed=order.random_seed))
    return replace(garden, deepened=(*garden.deepened, step))


ACTS: Final[Mapping[str, Act]] = {
    "germinate": germinate,
    "start_training": start_training,
    "start_blending": start_blending,
    "stabilize": stabilize,
    "evaluate": evaluate,
    "fossilize": fossilize,
    "cull": cull,
    "embargo": embargo,
    "reset": reset,
    "clear": clear,
    "insert": deepen,
    "stack": deepen,
}
"""Operations by name."""


def blending_of(garden: Garden, life: Life, config: GrowConfig) -> Blending:
    """How a seed is blended in."""
    return blending(garden.figures.get(life.seed, {}).get("blending", life.origin.blend), config.blending)


def _end_training(model: nn.Module, life: Life) -> None:
    """Let the host learn again, where it stood still while a seed learned, and the seed by what it adds alone."""
    find_seed(model, life.slot).learn_capped(False)
    if life.way == "frozen_host" and life.stage is Stage.TRAINING:
        leave(model, frozenset(name for name, _ in model.named_parameters()))


def _life(garden: Garden, order: Order) -> Life:
    return next(life for life in garden.lives if life.seed == order.seed)


def _judged(
    garden: Garden, life: Life, result: GateResult, site: Site, config: GrowConfig, step: int, emit: Emit
) -> tuple[bool, Garden]:
    """Whether a gate lets a seed through; and the garden, without the seed where it does not."""
    result = site.agreed(result).told(emit)
    garden = garden.judged(result)
    if result.passed:
        return True, garden
    return False, _culled(garden, life, site, config, step, emit, reason=result.code, gate=result.number)


def _gained(site: Site, slot: str) -> Paired | None:
    """Loss without a seed less loss with it, over held-out sequences; None where one of them is not finite."""
    try:
        return ablate(site.model, [slot], site.measure)
    except MissingMetric:
        return None


def _plain(paired: Paired | None) -> dict[str, float | int | None] | None:
    if paired is None:
        return None
    return {"n": paired.n, "mean": paired.mean, "lower": paired.lower(), "upper": paired.upper()}


def _report(garden: Garden, life: Life, site: Site, step: int, reason: str) -> None:
    """Write down how a seed ended."""
    figures = garden.figures.get(life.seed, {})
    after = [(tokens, nats) for at, tokens, _, nats in garden.held_out if at > life.born]
    lines = [(nats, expected(garden.held_out, born=life.born, tokens=tokens)) for tokens, nats in after]
    differences = [nats - line[0] for nats, line in lines if line]
    metrics = {
        name: figures.get(name) for name in ("params_share", "flops_share", "tried", "gained", "rent", "recovered")
    }
    site.report(
        GrowthReport(
            seed=life.seed,
            slot=life.slot,
            blueprint=life.origin.blueprint,
            run_id="",
            outcome=outcome_of(life, differences),
            metrics=metrics,
            born=life.born,
            ended=step,
            flops_spent=figures.get("flops_spent", 0.0),
            notes=reason,
        )
    )
