"""Whether a proposal is too dangerous just now (growth.md 16): a judgement of numbers, which changes nothing.

verdict = judge(reading, proposal, thresholds, latch)
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

HARMLESS: Final = frozenset({"wait", "cull"})
"""Operations that risk does not stop: to take out what does harm has to be possible most of all when something is
wrong."""


@dataclass(frozen=True)
class Reason:
    """Why a proposal is held up. mark: what the value reached."""

    signal: str
    action: Action
    value: float
    mark: float

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


def judge(reading: Reading, proposal: Proposal | NoCandidates, thresholds: RiskConfig, latch: Latch) -> Verdict:
    """Whether a proposal may go on, by the numbers of the reading alone.

    ``wait``, ``cull`` and the absence of candidates are allowed whatever is found. A reason to pause sets the latch,
    which is cleared after ``quiet_steps`` without one, and not before the next judgement.
    """
    is_harmless = isinstance(proposal, NoCandidates) or proposal.operation in HARMLESS
    values = _run_values(reading)
    if not is_harmless and isinstance(proposal, Proposal):
        values["policy_risk"] = 1 - proposal.confidence
    reasons = tuple(_reached(values, thresholds))
    unmeasured = tuple(name for name, value in values.items() if value is None and _has_mark(thresholds, name))
    is_paused = any(each.action == "pause" for each in reasons)
    action: Action = "allow"
    if reasons and not is_harmless:
        action = "pause" if is_paused or latch.is_set else "downgrade"
    if is_paused:
        latch = Latch(reading.step)
    elif latch.paused_at is not None and reading.step - latch.paused_at >= thresholds.quiet_steps:
        latch = Latch()
    return Verdict(action, reasons, unmeasured, latch)


def _run_values(reading: Reading) -> dict[str, float | None]:
    """The signals of a run, by name."""
    own = {"policy_risk", "held_out_jump"}
    names = [name for name, kind in RiskConfig.model_fields.items() if kind.annotation is Limit and name not in own]
    last = [each.nats for each in reading.held_out[-2:]]
    jump = last[1] - last[0] if len(last) == 2 else None
    return {"held_out_jump": jump} | {name: reading.metrics.get(name) for name in names}


def _has_mark(thresholds: RiskConfig, name: str) -> bool:
    limit: Limit = getattr(thresholds, name)
    return limit.downgrade is not None or limit.pause is not None


def _reached(values: Mapping[str, float | None], thresholds: RiskConfig) -> Iterator[Reason]:
    for name, value in values.items():
        limit: Limit = getattr(thresholds, name)
        if value is None:
            continue
        if limit.pause is not None and value >= limit.pause:
            yield Reason(name, "pause", value, limit.pause)
        elif limit.downgrade is not None and value >= limit.downgrade:
            yield Reason(name, "downgrade", value, limit.downgrade)
