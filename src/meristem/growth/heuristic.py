"""The policy that is asked unless another is chosen: plant on a plateau, take out what did harm (growth.md 15).

All that it knows is in the reading: asked twice, it answers twice the same.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Annotated, Any

from pydantic import Field

from meristem.config import ConfigSection
from meristem.growth.observe import HeldOut, Mask, Reading, Trial
from meristem.growth.proposal import NoCandidates, Policy, Proposal
from meristem.growth.schedule import NO_SLOTS, best_slot, require_known, settled
from meristem.growth.stage import Way
from meristem.growth.trend import Trend

REQUESTED = "growth_requested"
"""The metric by which something outside requests a seed: above 0 it is due at once."""

NEXT = 0.1
"""The gain is that of the next tenth of the tokens."""

Count = Annotated[int, Field(ge=1, le=1000)]
Nats = Annotated[float, Field(ge=0)]


class HeuristicConfig(ConfigSection):
    """Of the policy ``heuristic``. An evaluation is one of held-out text."""

    blueprints: dict[str, dict[str, Any]] = Field(
        default={"bottleneck": {}, "gated_feedforward": {}, "low_rank": {}},
        min_length=1,
        description="Blueprints to choose from, with their settings; each is tried once, in this order, before one is "
        "chosen by what it gained.",
    )
    blend: str = Field(default="residual", description="How a seed enters, as channel(target=0.5, steps=50).")
    way: Way = Field(default="shadow", description="How a seed on trial gets its gradients.")
    random_seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(default=0, description="Of first weights.")
    span: Annotated[int, Field(ge=4, le=1000)] = Field(default=8, description="Evaluations that a line goes through.")
    flat_nats: Nats = Field(
        default=0.005,
        description="Plateau: the loss falls by less, at 95 %, over the next tenth of the tokens.",
    )
    flat_evaluations: Count = Field(default=3, description="Evaluations in a row at which it has to be so.")
    stable_fall: Nats = Field(default=0.05, description="Most that the loss of a settled host falls, as a share of it.")
    stable_rise: Nats = Field(default=0.03, description="Most that it rises.")
    stable_evaluations: Count = Field(default=3, description="Evaluations in a row at which it has to be so, once.")
    between_evaluations: Count = Field(default=5, description="Evaluations between two seeds.")
    cull_nats: Nats = Field(default=0.02, description="A live seed goes when the loss is higher by it than before.")
    cull_evaluations: Count = Field(default=5, description="Evaluations after the graft before it is judged.")
    drift_nats: Nats | None = Field(
        default=None,
        description="A seed is due when the loss stands above its least by this; null: never.",
    )
    exploration: Nats = Field(default=1.0, description="How much is tried of what was tried little.")


def heuristic(settings: Mapping[str, Any]) -> Policy:
    """Plant where the slot scores highest, when held-out loss is flat, has drifted, or one is requested; take out
    a live seed since whose graft the loss has risen. Raises MissingMetric where a score is needed."""
    config = settled(HeuristicConfig, settings, "heuristic")
    require_known(config.blueprints, config.blend)

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        if not reading.slots:
            return NO_SLOTS
        harm = harmful(reading, mask, config)
        if harm is not None:
            return Proposal("cull", harm[0], why=harm[1])
        why, is_due = occasion(reading, config)
        if not is_due:
            return Proposal("wait", why=why)
        if not mask.can_germinate or not mask.slots:
            return NoCandidates(mask.why or "no slot is free")
        blueprint = promising(reading, mask, config)
        if blueprint is None:
            return NoCandidates("every blueprint is blocked")
        return Proposal(
            "germinate",
            best_slot(reading, mask),
            blueprint,
            config.blueprints[blueprint],
            blend=config.blend,
            way=config.way,
            random_seed=config.random_seed + len(reading.trials),
            confidence=0.95,
            why=why,
        )

    return propose


def occasion(reading: Reading, config: HeuristicConfig) -> tuple[str, bool]:
    """Why a seed is due, or why none is, and whether one is."""
    if (reading.metrics.get(REQUESTED) or 0) > 0:
        return "it was requested", True
    held_out = reading.held_out
    if not has_settled(held_out, config):
        return "the host has not settled yet", False
    n_since = sum(each.step > reading.trials[-1].born for each in held_out) if reading.trials else len(held_out)
    if reading.trials and n_since < config.between_evaluations:
        return f"{n_since} evaluations since the last seed, expected {config.between_evaluations}", False
    if config.drift_nats is not None and len(held_out) >= config.flat_evaluations:
        above = min(each.nats for each in held_out[-config.flat_evaluations :]) - min(each.nats for each in held_out)
        if above > config.drift_nats:
            return f"the loss stands {above:.4f} nats above its least", True
    fall = plateau(held_out, config)
    if fall is None:
        return "the loss is falling, or too little is known of it", False
    return f"over the next tenth of the tokens the loss would fall by {fall:.4f} nats at most", True


def has_settled(held_out: Sequence[HeldOut], config: HeuristicConfig) -> bool:
    """Whether the loss once changed little for some evaluations in a row; once it did, this stays so."""
    n_quiet = 0
    for before, after in pairwise(each.nats for each in held_out):
        change = after - before
        n_quiet = n_quiet + 1 if -config.stable_fall * before <= change <= config.stable_rise * before else 0
        if n_quiet >= config.stable_evaluations:
            return True
    return False


def plateau(held_out: Sequence[HeldOut], config: HeuristicConfig) -> float | None:
    """The most, at 95 %, that the loss would fall over the next tenth of the tokens, where that is less than
    ``flat_nats`` at each of the last evaluations; else None.

    A loss that rises by as much is no plateau: what overfits or breaks down does not want for parameters.
    """
    upper = None
    for end in range(len(held_out) - config.flat_evaluations + 1, len(held_out) + 1):
        trend = Trend.of(held_out[end - config.span : end]) if end >= config.span else None
        if trend is None:
            return None
        fall, half = trend.gain(NEXT)
        upper = fall + half
        if upper >= config.flat_nats or fall <= -config.flat_nats:
            return None
    return upper


def harmful(reading: Reading, mask: Mask, config: HeuristicConfig) -> tuple[str, str] | None:
    """The youngest live seed since whose graft the loss has risen too far, and why it has to go."""
    ages = {
        each.slot: each.age_steps
        for each in reading.slots
        if each.slot in mask.may_cull and each.age_steps is not None and each.blend_weight
    }
    for slot, age in sorted(ages.items(), key=lambda item: (item[1], item[0])):
        born = reading.step - age
        before = [each.nats for each in reading.held_out if each.step <= born]
        after = [each.nats for each in reading.held_out if each.step > born]
        if before and len(after) >= config.cull_evaluations and after[-1] - before[-1] > config.cull_nats:
            rise = after[-1] - before[-1]
            return slot, f"the loss has risen by {rise:.4f} nats over {len(after)} evaluations since the graft"
    return None


def promising(reading: Reading, mask: Mask, config: HeuristicConfig) -> str | None:
    """The blueprint to plant next; None where all are blocked.

    Each is tried once. Then the highest of ``mean + s (c sqrt(ln N / n) - penalty)``: mean of gain in nats per FLOP
    that is added, as a share of the host's; s the spread of all gains; n trials of N. A removal is a penalty of 2 at
    first, which each evaluation since then halves. One of which no gain was measured comes last.
    """
    names = [name for name in config.blueprints if name.casefold() not in mask.blocked_blueprints]
    by_name = {
        name: [each for each in reading.trials if each.blueprint.casefold() == name.casefold()] for name in names
    }
    gains = {name: [gain for each in own if (gain := _gain(each)) is not None] for name, own in by_name.items()}
    every = [gain for own in gains.values() for gain in own]
    spread = pstdev(every) if len(every) > 1 else 0.0
    spread = spread or max(map(abs, every), default=0.0)
    n_trials = sum(map(len, by_name.values()))

    def worth(name: str) -> float:
        own = by_name[name]
        if not own:
            return math.inf
        if not gains[name]:
            return -math.inf
        wonder = config.exploration * math.sqrt(math.log(n_trials) / len(own))
        return fmean(gains[name]) + spread * (wonder - _penalty(own, reading.held_out))

    return max(names, key=worth, default=None)


def _gain(trial: Trial) -> float | None:
    """Nats per added FLOP; None where either was not measured."""
    if trial.gain_nats is None or not trial.flops_ratio:
        return None
    return trial.gain_nats / trial.flops_ratio


def _penalty(trials: Sequence[Trial], held_out: Sequence[HeldOut]) -> float:
    ends = [each.ended for each in trials if each.ended is not None and not each.is_kept]
    return math.fsum(2 * 0.5 ** sum(each.step > end for each in held_out) for end in ends)
