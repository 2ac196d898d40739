"""Whether a proposal is too dangerous just now (growth.md 16): a judgement of numbers, which changes nothing.

verdict = judge(reading, proposal, thresholds, latch, vetting=Vetting(band="low"))
latch = verdict.latch

Thresholds come in as an argument, and nothing else is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from meristem.growth.observe import Reading, Record
from meristem.growth.proposal import NoCandidates, Proposal
from meristem.models.growing import Limit, RiskConfig

Action: TypeAlias = Literal["allow", "downgrade", "pause"]
Band: TypeAlias = Literal["low", "medium", "high", "critical"]
Handling: TypeAlias = Literal["standard", "restricted", "quarantine"]

HARMLESS: Final = frozenset({"wait", "cull"})
"""Operations that risk does not stop: to take out what does harm has to be possible most of all when something is
wrong."""


@dataclass(frozen=True)
class Vetting:
    """What is known of the blueprint that a proposal names, in this slot; None is unknown."""

    risk: float | None = None
    band: Band | None = None
    handling: Handling | None = None


@dataclass(frozen=True)
class Reason:
    """Why a proposal is held up. mark: what the value reached."""

    signal: str
    action: Action
    value: float | str
    mark: float | str

    def __str__(self) -> str:
        return f"{self.signal} is {self.value}, and {self.action} begins at {self.mark}"


@dataclass(frozen=True)
class Latch(Record):
    """Whether a run is conservative, saved with it. paused_at: the last step with a reason to pause, or None.

    A conservative run pauses at what downgrades others.
    """

    paused_at: int | None = None

    @property
    def is_set(self) -> bool:
        return self.paused_at is not None


@dataclass(frozen=True)
class Verdict:
    """allow: the proposal may be carried out; downgrade: not its change of structure; pause: nothing of it.

    reasons: all that were found, also where the proposal is harmless. unmeasured: signals with a mark and no number;
    they were not judged. latch: for the next judgement.
    """

    action: Action
    reasons: tuple[Reason, ...]
    unmeasured: tuple[str, ...]
    latch: Latch


def judge(
    reading: Reading,
    proposal: Proposal | NoCandidates,
    thresholds: RiskConfig,
    latch: Latch,
    *,
    vetting: Vetting | None = None,
) -> Verdict:
    """Whether a proposal may go on, by the numbers of the reading alone.

    ``wait``, ``cull`` and the absence of candidates are allowed whatever is found. A reason to pause sets the latch,
    which is cleared after ``quiet_steps`` without one, and not before the next judgement.
    """
    is_harmless = isinstance(proposal, NoCandidates) or proposal.operation in HARMLESS
    values = _run_values(reading)
    if not is_harmless and isinstance(proposal, Proposal):
        known = vetting or Vetting()
        values |= {"policy_risk": 1 - proposal.confidence, "blueprint_risk": known.risk}
        reasons = [*_reached(values, thresholds), *_vetted(known)]
    else:
        reasons = list(_reached(values, thresholds))
    unmeasured = tuple(name for name, value in values.items() if value is None and _has_mark(thresholds, name))
    is_paused = any(each.action == "pause" for each in reasons)
    action: Action = "allow"
    if reasons and not is_harmless:
        action = "pause" if is_paused or latch.is_set else "downgrade"
    if is_paused:
        latch = Latch(reading.step)
    elif latch.paused_at is not None and reading.step - latch.paused_at >= thresholds.quiet_steps:
        latch = Latch()
    return Verdict(action, tuple(reasons), unmeasured, latch)


def _run_values(reading: Reading) -> dict[str, float | None]:
    """The signals of a run, by name."""
    own = {"policy_risk", "blueprint_risk", "held_out_jump"}
    names = [name for name, kind in RiskConfig.model_fields.items() if kind.annotation is Limit and name not in own]
    values = {name: reading.metrics.get(name) for name in (*names, "gpu_share", "gpu_free_bytes")}
    last = [each.nats for each in reading.held_out[-2:]]
    return {"held_out_jump": last[1] - last[0] if len(last) == 2 else None} | values


def _has_mark(thresholds: RiskConfig, name: str) -> bool:
    limit = getattr(thresholds, name)
    return isinstance(limit, Limit) and (limit.downgrade is not None or limit.pause is not None)


def _reached(values: Mapping[str, float | None], thresholds: RiskConfig) -> Iterator[Reason]:
    share, free = values["gpu_share"], values["gpu_free_bytes"]
    if share is not None and free is not None and share >= thresholds.gpu_share and free <= thresholds.gpu_free_bytes:
        yield Reason("gpu_free_bytes", "pause", free, thresholds.gpu_free_bytes)
    for name, value in values.items():
        limit = getattr(thresholds, name)
        if value is None or not isinstance(limit, Limit):
            continue
        if limit.pause is not None and value >= limit.pause:
            yield Reason(name, "pause", value, limit.pause)
        elif limit.downgrade is not None and value >= limit.downgrade:
            yield Reason(name, "downgrade", value, limit.downgrade)


def _vetted(vetting: Vetting) -> Iterator[Reason]:
    if vetting.handling == "quarantine":
        yield Reason("handling", "pause", "quarantine", "quarantine")
    if vetting.band == "critical":
        yield Reason("band", "pause", "critical", "critical")
    elif vetting.band == "high":
        yield Reason("band", "downgrade", "high", "high")
