"""The gates between the stages of a seed: what was measured, held against what is asked (growth.md 13).

result = stability(life, Stability(paired=paired, gradient_ratio=0.2), config, step=400)

Each is a pure function. What was not measured fails: a gate never takes a number that is missing for a good one.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias

from meristem.events import Emit, Event, silent
from meristem.growth.stage import Life, Paired, Stage
from meristem.models.growing import GatesConfig

Gate: TypeAlias = Literal["G0", "G1", "G2", "G3", "G4", "G5", "G6"]
Status: TypeAlias = Literal["pass", "fail", "unmeasured"]

ENTRY: Final[Mapping[Stage, Gate]] = {
    Stage.GERMINATED: "G0",
    Stage.TRAINING: "G1",
    Stage.BLENDING: "G2",
    Stage.SHADOWING: "G3",
    Stage.PROBATIONARY: "G4",
    Stage.DORMANT: "G5",
    Stage.FOSSILIZED: "G6",
}
"""The gate that guards the entry to a stage; CULLED, EMBARGOED and RESETTING are always open."""


@dataclass(frozen=True)
class Check:
    """One number against what is asked of it. value: None where it was not measured. threshold: in words."""

    name: str
    value: float | None
    threshold: str
    status: Status

    @classmethod
    def of(
        cls, name: str, value: float | bool | None, *, least: float | None = None, most: float | None = None
    ) -> Self:
        """From ``least`` to ``most``, ends included. What is not finite was not measured."""
        words = " and ".join(f"{sign} {limit:g}" for sign, limit in ((">=", least), ("<=", most)) if limit is not None)
        low, high = -math.inf if least is None else least, math.inf if most is None else most
        if value is None or not math.isfinite(value) or math.isnan(low) or math.isnan(high):
            return cls(name, None, words, "unmeasured")
        is_in = low <= value <= high
        return cls(name, float(value), words, "pass" if is_in else "fail")

    @classmethod
    def holds(cls, name: str, is_so: bool | None) -> Self:
        """Something that has to be so."""
        status: Status = "unmeasured" if is_so is None else "pass" if is_so else "fail"
        return cls(name, None if is_so is None else float(is_so), "holds", status)


@dataclass(frozen=True)
class GateResult:
    """What a gate said of a seed at a step. missing: the host layers that it needs and that are not there (G3)."""

    gate: str
    seed: str
    step: int
    checks: tuple[Check, ...]
    missing: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Every check was measured and is as asked."""
        return all(check.status == "pass" for check in self.checks)

    @property
    def code(self) -> str:
        """Why it failed, as ``G2.paired:fail``; ``G2`` of one that passed."""
        worst = next((check for check in self.checks if check.status != "pass"), None)
        return self.gate if worst is None else f"{self.gate}.{worst.name}:{worst.status}"

    @property
    def number(self) -> str:
        """By which a life names it."""
        return f"{self.seed}/{self.gate}@{self.step}"

    def told(self, emit: Emit = silent) -> Self:
        """The result itself, which is an event from now on; and what is missing is one of its own."""
        emit(Event("gate.result" if self.passed else "gate.failed", self.to_json() | {"code": self.code}))
        if self.missing:
            payload = {"seed": self.seed, "step": self.step, "missing": list(self.missing)}
            emit(Event("mesh_coverage_missing", payload, "warning"))
        if any(check.name == "is_no_fallback" and check.status != "pass" for check in self.checks):
            emit(Event("gate.fallback_refused", {"seed": self.seed, "step": self.step}, "critical"))
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        return vars(self) | {"checks": [vars(check) for check in self.checks], "missing": list(self.missing)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave; the entry ``code`` of an event is passed over."""
        checks = tuple(Check(**check) for check in saved["checks"])
        return cls(saved["gate"], saved["seed"], saved["step"], checks, tuple(saved.get("missing", ())))


@dataclass(frozen=True)
class Sanity:
    """Of a seed that is to be grafted, G0. ratios: parameters and FLOPs of the grown model by those of its host.

    adds: the most that the seed adds to a probe.
    """

    is_known: bool | None = None
    is_empty: bool | None = None
    is_locked: bool | None = None
    is_blocked: bool | None = None
    params_ratio: float | None = None
    flops_ratio: float | None = None
    adds: float | None = None
    is_finite: bool | None = None


def sanity(life: Life, found: Sanity, *, params_ratio: float, flops_ratio: float, step: int) -> GateResult:
    """G0, to GERMINATED: what it is built from is known, its slot is free, and the model stays within its caps."""
    checks = (
        Check.holds("is_known", found.is_known),
        Check.holds("is_empty", found.is_empty),
        Check.holds("is_unlocked", None if found.is_locked is None else not found.is_locked),
        Check.holds("is_unblocked", None if found.is_blocked is None else not found.is_blocked),
        Check.of("params_ratio", found.params_ratio, most=params_ratio),
        Check.of("flops_ratio", found.flops_ratio, most=flops_ratio),
        Check.of("adds", found.adds, most=0.0),
        Check.holds("is_finite", found.is_finite),
    )
    return GateResult("G0", life.seed, step, checks)


@dataclass(frozen=True)
class Health:
    """Of a seed in its slot that has not learned yet, G1.

    changes: the most by which a logit of a probe differs from the host's, relative where the model is in bfloat16.
    n_reached: tensors of the seed that a finite gradient reaches, not all of them zero. the rest: whether its
    parameters have an owner and are in one group of the optimizer each, whether there is a state of the run to return
    to, whether gradients of the host are the same with and without the seed's pass, and whether its certificate is not
    one for quarantine.
    """

    changes: float | None = None
    n_reached: int | None = None
    is_owned: bool | None = None
    is_grouped: bool | None = None
    is_stored: bool | None = None
    is_isolated: bool | None = None
    is_certified: bool | None = None


def health(life: Life, found: Health, *, changes_most: float, step: int, needs_certificate: bool = False) -> GateResult:
    """G1, to TRAINING: it changes nothing, and it can learn."""
    checks = [
        Check.of("changes", found.changes, most=changes_most),
        Check.of("n_reached", found.n_reached, least=1),
        Check.holds("is_owned", found.is_owned),
        Check.holds("is_grouped", found.is_grouped),
        Check.holds("is_stored", found.is_stored),
    ]
    if life.way != "joint":  # in which the host learns with it
        checks.append(Check.holds("is_isolated", found.is_isolated))
    if needs_certificate:
        checks.append(Check.holds("is_certified", found.is_certified))
    return GateResult("G1", life.seed, step, tuple(checks))


@dataclass(frozen=True)
class Stability:
    """Of a seed that has learned, G2.

    gained: loss without it less loss with it, a held-out sequence each. gradient_ratio: size of its gradient in the
    square mean, by its host's.
    """

    gained: Paired | None = None
    gradient_ratio: float | None = None


def stability(life: Life, found: Stability, config: GatesConfig, *, step: int) -> GateResult:
    """G2, to BLENDING: with it the loss is lower, ``mean - 1.65 s / sqrt(n) > margin``."""
    lower = None if found.gained is None else found.gained.lower()
    n = None if found.gained is None else found.gained.n
    checks = (
        Check.of("age", step - life.since, least=config.training_steps),
        Check.of("n_pairs", n, least=config.pairs),
        Check.of("gained", lower, least=config.margin_nats),
        Check.of("gradient_ratio", found.gradient_ratio, least=config.gradient_least, most=config.gradient_most),
        Check.of("n_violations", life.n_violations, most=0),
    )
    return GateResult("G2", life.seed, step, checks)


@dataclass(frozen=True)
class Interface:
    """Of a seed that was blended in, G3.

    weight: its blend weight, where it is held; None while it is on its way. size_ratio: size of what the slot gives,
    by what its module gives. spread_ratio: spread of the training loss around its line, by that before blending.
    needed, registered: host layers that the order names, and those that are there.
    """

    weight: float | None = None
    size_ratio: float | None = None
    spread_ratio: float | None = None
    needed: Collection[str] = ()
    registered: Collection[str] = ()


def interface(life: Life, found: Interface, config: GatesConfig, *, target: float, step: int) -> GateResult:
    """G3, to SHADOWING: the blend weight has arrived, and what comes out is of the size and calm that it was."""
    missing = tuple(sorted(set(found.needed) - set(found.registered)))
    checks = (
        Check.of("weight", found.weight, least=target, most=target),
        Check.of("n_missing", len(missing), most=0),
        Check.of("size_ratio", found.size_ratio, least=config.size_least, most=config.size_most),
        Check.of("spread_ratio", found.spread_ratio, most=config.spread_most),
    )
    return GateResult("G3", life.seed, step, checks, missing)


@dataclass(frozen=True)
class Impact:
    """Of a model with a seed whose weight was held, G4.

    held_out, expected: nats per target as measured, and as the line through the evaluations before the graft says;
    error: how far that line may be off. is_fallback: the seed stands in for another that could not be had.
    quiet_steps: for how long the guard has said nothing. is_resumed: the model is the same after a pause of the seed.
    """

    held_out: float | None = None
    expected: float | None = None
    error: float | None = None
    is_fallback: bool | None = None
    quiet_steps: int | None = None
    is_resumed: bool | None = None


def impact(life: Life, found: Impact, config: GatesConfig, *, step: int) -> GateResult:
    """G4, to PROBATIONARY: the model is no worse than it would have become, and the run is quiet."""
    over, most = None, config.impact_nats
    if found.held_out is not None and found.expected is not None and found.error is not None:
        over, most = found.held_out - found.expected, config.impact_nats + found.error
    checks = (
        Check.of("age", step - life.since, least=config.holding_steps),
        Check.of("over_expected", over, most=most),
        Check.holds("is_no_fallback", None if found.is_fallback is None else not found.is_fallback),
        Check.of("quiet_steps", found.quiet_steps, least=config.quiet_steps),
        Check.holds("is_resumed", found.is_resumed),
    )
    return GateResult("G4", life.seed, step, checks)


@dataclass(frozen=True)
class Cleared:
    """Of a slot whose seed was removed, G5. before, after: SHA-256 of all bytes of the host, around the removal.

    n_left: parameters of the seed in groups or state of the optimizer. is_host_only: the topology is that without it.
    """

    is_empty: bool | None = None
    n_left: int | None = None
    is_disowned: bool | None = None
    is_host_only: bool | None = None
    before: str | None = None
    after: str | None = None
    is_locked: bool | None = None


def cleared(life: Life, found: Cleared, *, step: int) -> GateResult:
    """G5, to DORMANT: nothing is left of it, and its host is to the byte what it was."""
    is_same = None if found.before is None or found.after is None else found.before == found.after
    checks = (
        Check.holds("is_empty", found.is_empty),
        Check.of("n_left", found.n_left, most=0),
        Check.holds("is_disowned", found.is_disowned),
        Check.holds("is_host_only", found.is_host_only),
        Check.holds("is_host_same", is_same),
        Check.holds("is_unlocked", None if found.is_locked is None else not found.is_locked),
    )
    return GateResult("G5", life.seed, step, checks)


@dataclass(frozen=True)
class Contribution:
    """Of a seed that was fully live, G6.

    gained: loss without it less loss with it, a held-out sequence each. params_share, flops_share: what it adds to its
    host, by what its host has. recovered: the same difference after both went on for some steps, the host
    alone and with it; None where that was not done. has_room: whether the run would have lasted long enough for it.
    """

    gained: Paired | None = None
    params_share: float | None = None
    flops_share: float | None = None
    recovered: float | None = None
    has_room: bool = True


def rent(found: Contribution, config: GatesConfig) -> float | None:
    """What a seed has to bring, in nats: ``lambda_p dP / P + lambda_f dF / F``; None where its cost is not known."""
    if found.params_share is None or found.flops_share is None:
        return None
    return config.rent_parameters * found.params_share + config.rent_flops * found.flops_share


def contribution(life: Life, found: Contribution, config: GatesConfig, *, min_age: int, step: int) -> GateResult:
    """G6, to FOSSILIZED: what it brings is more than its rent, and more than half of it after a recovery of the host.

    The loss that its removal costs at once may be what the host unlearned for it; the recovery tells the two apart.
    """
    due = rent(found, config)
    lower = None if found.gained is None else found.gained.lower()
    checks = [
        Check.of("age", step - life.born, least=min_age),
        Check.of("probation", step - life.since, least=config.probation_steps),
        Check.of("n_pairs", None if found.gained is None else found.gained.n, least=config.pairs),
        Check.of("gained", None if due is None else lower, least=due),
    ]
    is_asked = config.recovery == "required" or (config.recovery == "if_room" and found.has_room)
    if is_asked:
        checks.append(
            Check.of("recovered", None if due is None else found.recovered, least=None if due is None else due / 2)
        )
    return GateResult("G6", life.seed, step, tuple(checks))
