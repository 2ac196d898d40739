"""Policies that do not depend on the loss: never, at fixed places of the budget, and there at random (growth.md 15)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from meristem.config import ConfigSection
from meristem.config.mistakes import explain
from meristem.errors import MissingMetric, WrongValue
from meristem.growth.blend import blending
from meristem.growth.blueprint import blueprints
from meristem.growth.observe import Mask, Reading
from meristem.growth.proposal import Deepening, NoCandidates, Policy, Proposal
from meristem.growth.stage import Way

Section = TypeVar("Section", bound=ConfigSection)

BUDGET_SHARE = "budget_share"
"""The metric that says which share of its budget a run has spent."""

N_DEEPENINGS = "n_deepenings"
"""The metric that says how often a run was made deeper."""

LOSS_BLIND = frozenset({"never", "schedule", "random"})
"""Policies that decide without what held-out text costs."""

NO_SLOTS = NoCandidates("the model has no slot")

Share = Annotated[float, Field(gt=0, lt=1)]


def settled(section: type[Section], given: Mapping[str, Any], policy: str) -> Section:
    """The settings of a policy with defaults. Raises UnknownKey or WrongValue with what was found."""
    try:
        return section.model_validate(dict(given))
    except ValidationError as cause:
        raise explain(cause, section, lambda path: f"the settings of the policy '{policy}'") from cause


def require_known(candidates: Mapping[str, Mapping[str, Any]], blend: str) -> None:
    """Raise WrongValue or UnknownKey unless these are blueprints with settings of theirs, and a blend."""
    for name, given in candidates.items():
        blueprints.get(name).settle(given)
    blending(blend)


class NeverConfig(ConfigSection):
    """Of the policy ``never``: it has no settings."""


class Times(ConfigSection):
    """When a seed is due, and how it is trained and enters."""

    shares: tuple[Share, ...] = Field(default=(), description="Shares of the budget at which a seed is due.")
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="Steps at which a seed is due.")
    blend: str = Field(default="residual", description="How it enters, as channel(target=0.5, steps=50).")
    way: Way = Field(default="shadow", description="How it gets its gradients.")
    random_seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(default=0, description="Of its first weights.")


class ScheduleConfig(Times):
    """Of the policy ``schedule``: the n-th seed comes into the n-th slot, after the last the first comes again.

    With another operation than ``germinate`` no seed is due, and only the times and ``random_seed`` are read.
    """

    operation: Literal["germinate"] | Deepening = Field(
        default="germinate",
        description="What is due: a seed (germinate), or a model twice as deep: with a block above each that adds "
        "nothing yet (insert), or with the whole stack again on top of itself (stack).",
    )
    slots: tuple[str, ...] = Field(default=(), description="Slots in turn; none: the free one of the highest score.")
    blueprint: str = Field(default="bottleneck", description="What seeds are built from.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the blueprint.")


class RandomConfig(Times):
    """Of the policy ``random``: the times of a schedule, and a drawn slot and blueprint."""

    blueprints: dict[str, dict[str, Any]] = Field(
        default={"bottleneck": {}, "gated_feedforward": {}, "low_rank": {}},
        min_length=1,
        description="Blueprints to draw from, with their settings.",
    )


def never(settings: Mapping[str, Any]) -> Policy:
    """A policy that proposes nothing."""
    settled(NeverConfig, settings, "never")
    waits = Proposal("wait", why="this policy never grows")
    return lambda reading, mask: waits


def schedule(settings: Mapping[str, Any]) -> Policy:
    """A policy that plants at fixed steps and shares of the budget. What could not be planted then stays due."""
    config = settled(ScheduleConfig, settings, "schedule")
    _require_times(config, "schedule")
    if config.operation != "germinate":
        return _deepens(config, config.operation)
    require_known({config.blueprint: config.settings}, config.blend)

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        if (early := _unless_due(reading, mask, config)) is not None:
            return early
        turn = len(reading.trials)
        slot = config.slots[turn % len(config.slots)] if config.slots else best_slot(reading, mask)
        if slot in {each.slot for each in reading.slots} - mask.slots:
            return NoCandidates(f"it is the turn of slot '{slot}', which is not free")
        if config.blueprint.casefold() in mask.blocked_blueprints:
            return NoCandidates(f"the blueprint '{config.blueprint}' is blocked")
        return _germination(config, turn, slot, (config.blueprint, config.settings))

    return propose


def _deepens(config: ScheduleConfig, operation: Deepening) -> Policy:
    unread = sorted(config.model_fields_set - {"operation", "shares", "steps", "random_seed"})
    if unread:
        raise WrongValue(
            f"the policy 'schedule' has {', '.join(unread)} beside operation: {operation}, which plants no seed and "
            f"reads shares, steps and random_seed alone. Remove them, or set operation: germinate.",
            value=unread,
        )

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        n_done, n_due = int(reading.metrics.get(N_DEEPENINGS) or 0), _n_due(reading, config)
        if n_due <= n_done:
            return Proposal("wait", why=f"it was made deeper {n_done} times, and {n_due} are due")
        if not mask.can_deepen:
            return NoCandidates("a seed is on its way, or the structure is not changed any more")
        return Proposal(operation, random_seed=config.random_seed + n_done, why=f"deepening {n_done + 1} is due")

    return propose


def random(settings: Mapping[str, Any]) -> Policy:
    """A policy that plants at fixed times what a hash of ``random_seed`` and the number of seeds so far draws."""
    config = settled(RandomConfig, settings, "random")
    _require_times(config, "random")
    require_known(config.blueprints, config.blend)

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        if (early := _unless_due(reading, mask, config)) is not None:
            return early
        turn = len(reading.trials)
        free = sorted(name for name in config.blueprints if name.casefold() not in mask.blocked_blueprints)
        if not free:
            return NoCandidates("every blueprint is blocked")
        blueprint = _drawn(free, f"{config.random_seed}/{turn}/blueprint")
        slot = _drawn(sorted(mask.slots), f"{config.random_seed}/{turn}/slot")
        return _germination(config, turn, slot, (blueprint, config.blueprints[blueprint]))

    return propose


def best_slot(reading: Reading, mask: Mask) -> str:
    """The free slot of the highest score, of equal ones the first by name. Raises MissingMetric where none has one."""
    scores = {each.slot: each.score for each in reading.slots if each.slot in mask.slots and each.score is not None}
    if not scores:
        raise MissingMetric(
            f"none of the free slots {', '.join(sorted(mask.slots))} has a score. Measure them with growth.score, put "
            f"them into the reading and ask again.",
            name="score",
        )
    return min(scores, key=lambda slot: (-scores[slot], slot))


def _unless_due(reading: Reading, mask: Mask, config: Times) -> Proposal | NoCandidates | None:
    """What to answer where no seed is due or none can be planted."""
    if not reading.slots:
        return NO_SLOTS
    n_due = _n_due(reading, config)
    if n_due <= len(reading.trials):
        return Proposal("wait", why=f"{len(reading.trials)} seeds were planted and {n_due} are due")
    if not mask.can_germinate or not mask.slots:
        return NoCandidates(mask.why or "no slot is free")
    return None


def _n_due(reading: Reading, config: Times) -> int:
    """How often it was time by now. Raises MissingMetric where that goes by shares and no budget is known."""
    n_due = sum(step <= reading.step for step in config.steps)
    if config.shares:
        share = reading.metrics.get(BUDGET_SHARE)
        if share is None:
            raise MissingMetric(
                f"the reading of step {reading.step} lacks the metric '{BUDGET_SHARE}', and shares of the budget are "
                f"when it is time. Give a run that has a budget, or set steps.",
                name=BUDGET_SHARE,
            )
        n_due += sum(each <= share for each in config.shares)
    return n_due


def _germination(config: Times, turn: int, slot: str, what: tuple[str, Mapping[str, Any]]) -> Proposal:
    return Proposal(
        "germinate",
        slot,
        what[0],
        what[1],
        blend=config.blend,
        way=config.way,
        random_seed=config.random_seed + turn,
        why=f"seed {turn + 1} is due",
    )


def _require_times(config: Times, policy: str) -> None:
    if not config.shares and not config.steps:
        raise WrongValue(
            f"the policy '{policy}' has neither shares nor steps, and would never grow. Set one, as shares: [0.25], "
            f"or choose the policy 'never'.",
            value=[],
        )


def _drawn(names: Sequence[str], what: str) -> str:
    """One of them, the same in every process and version of Python."""
    return names[int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") % len(names)]
