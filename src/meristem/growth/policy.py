"""When, where and what to grow: policies by name, and the one way to ask one (growth.md 15).

with open_policy(config) as policy:
    decision = decide(policy, reading, mask, budget_ms=budget_ms(config), breaker=breaker_of(config), emit=emit)

A policy is asked between two steps. It proposes and changes nothing. Nothing of its settings is read when it is asked.
One that learns has an attribute ``observes``, and finds the numbers that this names in its reading (``features``).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from meristem.errors import (
    BreakerOpen,
    InferenceFailed,
    MeristemError,
    MissingMetric,
    OrderRefused,
    PolicyTimeout,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
    WrongValue,
)
from meristem.events import Emit, Event, silent
from meristem.growth.blend import blending
from meristem.growth.blueprint import blueprints
from meristem.growth.features import Observes
from meristem.growth.heuristic import heuristic
from meristem.growth.observe import Mask, Reading
from meristem.growth.proposal import DEEPENINGS, NoCandidates, Policy, Proposal
from meristem.growth.schedule import never, random, schedule
from meristem.growth.stage import TRANSITIONS, Stage
from meristem.models.growing import GrowPolicyConfig
from meristem.plugins import Origin, Registry
from meristem.worker.breaker import Breaker
from meristem.worker.deadline import Deadline
from meristem.worker.process import Worker
from meristem.worker.thread import in_thread

__all__ = [
    "Decision",
    "GrowPolicyConfig",
    "Mask",
    "NoCandidates",
    "Policy",
    "Proposal",
    "Reading",
    "breaker_of",
    "budget_ms",
    "decide",
    "observes_of",
    "open_policy",
    "policies",
]

START_S: Final = 120.0
"""How long the process of a policy may take until it has imported all that it needs."""
MAKE_S: Final = 10.0
"""How long another that takes its place may take to make the policy."""
MAKE, ANSWER = f"{__name__}:make_in_child", f"{__name__}:answer_in_child"

policies: Registry[Callable[[Mapping[str, Any]], Policy]] = Registry(
    "policy", {"never": never, "schedule": schedule, "random": random, "heuristic": heuristic}
)
"""Makers of policies by name: ``make(settings) -> policy``. Settings are checked then, and never again."""


@dataclass(frozen=True)
class Decision:
    """What came of asking: an outcome, or the error because of which there is none; and the breaker for next time.

    error: PolicyTimeout, InferenceFailed, OrderRefused, BreakerOpen, or MissingMetric, whose field ``name`` says what
    to measure before it is asked again.
    """

    outcome: Proposal | NoCandidates | None
    error: MeristemError | None
    breaker: Breaker


class Isolated:
    """A policy in a process of its own."""

    def __init__(self, worker: Worker, made: Mapping[str, Any], observes: Observes | None) -> None:
        """made: name and settings of the policy. observes: what it wants to see as numbers."""
        self._worker, self._made, self._is_cold = worker, made, False
        self.observes = observes

    def __call__(self, reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        return self.ask(reading, mask, START_S)

    def ask(self, reading: Reading, mask: Mask, deadline_s: float) -> Proposal | NoCandidates:
        """Its answer. The process is ended where that does not come in time; the errors are those of the worker.

        Before the first question to a process that took the place of such a one, it is given time to make the policy.
        """
        payload = {**self._made, "reading": reading.to_json(), "mask": mask.to_json()}
        try:
            if self._is_cold:
                self._worker.call(MAKE, self._made, MAKE_S)
            self._is_cold = False
            answer = self._worker.call(ANSWER, payload, deadline_s, expects=dict)
        except (WorkerTimeout, WorkerDied):
            self._is_cold = True
            raise
        if "missing" in answer:
            raise MissingMetric(answer["why"], name=answer["missing"])
        kind = Proposal if "proposal" in answer else NoCandidates
        return kind.from_json(answer.get("proposal", answer.get("no_candidates")))


@contextmanager
def open_policy(config: GrowPolicyConfig, *, emit: Emit = silent) -> Iterator[Policy]:
    """The policy that the settings name, and its process while the block lasts.

    Raises WrongValue for a name that nobody knows, PluginError for a plugin that does not load, what the policy's own
    settings raise, and WorkerError where its process does not start.
    """
    if not config.is_process_isolated:
        yield policies.get(config.name)(config.settings)
        return
    made = {"name": config.name, "settings": config.settings}
    imports = (__name__, *(origin.entry_point.partition(":")[0] for origin in _origins(config) if origin.entry_point))
    with Worker("policy", imports=imports, emit=emit) as worker:
        worker.ready(START_S)
        told = worker.call(MAKE, made, START_S, expects=dict)
        yield Isolated(worker, made, Observes.from_json(told) if told else None)


def observes_of(policy: Policy) -> Observes | None:
    """What a policy wants to see as numbers. Raises WrongValue for an attribute ``observes`` of another type."""
    found = getattr(policy, "observes", None)
    if found is not None and not isinstance(found, Observes):
        raise WrongValue(
            f"the attribute 'observes' of the policy is a {type(found).__name__}; expected growth.features.Observes. "
            f"Mend the policy.",
            value=found,
        )
    return found


def budget_ms(config: GrowPolicyConfig) -> float | None:
    """How long the policy may take: None for one of ours in this process, which does nothing but arithmetic, so that
    a run with it repeats to the bit however slow the machine is."""
    is_ours = any(origin.is_ours for origin in _origins(config))
    return None if is_ours and not config.is_process_isolated else config.inference_budget_ms


def _origins(config: GrowPolicyConfig) -> list[Origin]:
    return [origin for origin in policies.origins() if origin.name == config.name.casefold()]


def breaker_of(config: GrowPolicyConfig) -> Breaker:
    """The breaker of a policy that has not failed yet; it counts in steps."""
    return Breaker(config.breaker_failures, config.breaker_pause_steps, config.breaker_pause_steps)


def decide(
    policy: Policy,
    reading: Reading,
    mask: Mask,
    *,
    budget_ms: float | None,
    breaker: Breaker,
    score: Callable[[frozenset[str]], Mapping[str, float | None]] | None = None,
    emit: Emit = silent,
) -> Decision:
    """Ask a policy what to do. Whatever it does, training goes on: nothing is raised, and nothing is proposed in its
    place. (What ``score`` raises is raised.)

    The event of an outcome is ``policy.no_candidates`` or none; that of an error ``policy.timeout``, ``policy.failed``,
    ``order.refused``, ``feature.missing`` or, as a failure opens the breaker, ``breaker.changed`` after it.

    budget_ms: how long it may take; None asks it here and waits. breaker: in steps; the decision has the next one.
    score: measures these slots, as ``growth.score`` does, for a policy that cannot answer without; it is asked again
    then. So scores are paid for when a seed is due, and not at every boundary.
    """
    step = reading.step
    told = {"run_id": reading.run_id, "step": step}
    if breaker.state(step) == "open":
        error = BreakerOpen(
            f"the policy is not asked at step {step}, since it failed too often. It will be again {breaker.pause:g} "
            f"steps after its last failure.",
            name="policy",
        )
        return Decision(None, error, breaker)
    try:
        try:
            outcome = _asked(policy, reading, mask, budget_ms)
        except MissingMetric as error:
            if score is None or error.fields.get("name") != "score":
                raise
            reading = _scored(reading, score(mask.slots))
            outcome = _asked(policy, reading, mask, budget_ms)
        require_allowed(outcome, reading, mask)
    except MissingMetric as error:
        emit(Event("feature.missing", told | {"name": error.fields.get("name"), "why": str(error)}, "warning"))
        return Decision(None, error, breaker)
    except (PolicyTimeout, InferenceFailed, OrderRefused) as error:
        name = {PolicyTimeout: "policy.timeout", InferenceFailed: "policy.failed"}.get(type(error), "order.refused")
        emit(Event(name, told | {"code": error.fields.get("code"), "why": str(error)}, "error"))
        after = breaker.failed(step)
        if after.state(step) == "open":
            emit(Event("breaker.changed", told | {"name": "policy", "to": "open"}, "error"))
        return Decision(None, error, after)
    if isinstance(outcome, NoCandidates):
        emit(Event("policy.no_candidates", told | {"why": outcome.why}, "warning"))
    return Decision(outcome, None, breaker.succeeded(step))


def _scored(reading: Reading, scores: Mapping[str, float | None]) -> Reading:
    slots = [replace(each, score=scores.get(each.slot, each.score)) for each in reading.slots]
    return replace(reading, slots=tuple(slots))


def require_allowed(proposal: Proposal | NoCandidates, reading: Reading, mask: Mask) -> None:
    """Raise OrderRefused, with a code, for a proposal that names what is not there, or what may not be done now."""
    if isinstance(proposal, NoCandidates) or proposal.operation == "wait":
        return
    slots = {each.slot: each for each in reading.slots}
    if proposal.operation in DEEPENINGS:
        if not mask.can_deepen:
            raise _refused("not_now", "a deeper stack", "none, while seeds are on their way or nothing is changed")
        return
    if proposal.slot not in slots:
        raise _refused("unknown_slot", f"slot '{proposal.slot}'", f"one of {', '.join(slots) or 'none'}")
    if not 0 <= proposal.confidence <= 1:
        raise _refused("confidence", f"a confidence of {proposal.confidence}", "a number from 0 to 1")
    if proposal.operation == "germinate":
        _require_germination(proposal, mask)
    elif proposal.operation == "cull":
        if proposal.slot not in mask.may_cull:
            may = ", ".join(sorted(mask.may_cull)) or "none now"
            raise _refused("cull_not_allowed", f"the removal of the seed in '{proposal.slot}'", f"one of {may}")
    else:
        target = {"blend": Stage.BLENDING, "fossilize": Stage.FOSSILIZED}[proposal.operation]
        stage = slots[proposal.slot].stage
        if target not in TRANSITIONS[stage]:
            raise _refused(
                "stage", f"'{proposal.operation}' of a seed that is {stage.name}", "a seed that may go there"
            )
        _require_blend(proposal.blend)


def _require_germination(proposal: Proposal, mask: Mask) -> None:
    if not mask.can_germinate:
        raise _refused("not_now", "a germination", f"none, since {mask.why or 'nothing may be planted now'}")
    if proposal.slot not in mask.slots:
        raise _refused(
            "slot_taken", f"slot '{proposal.slot}'", f"a free one: {', '.join(sorted(mask.slots)) or 'none'}"
        )
    if proposal.blueprint.casefold() in mask.blocked_blueprints:
        raise _refused("blocked_blueprint", f"the blueprint '{proposal.blueprint}'", "one that is not blocked")
    try:
        found = blueprints.get(proposal.blueprint)
    except MeristemError as cause:
        raise _refused("unknown_blueprint", f"'{proposal.blueprint}'", f"a blueprint ({cause})") from cause
    try:
        found.settle(proposal.settings)
    except MeristemError as cause:
        raise _refused("settings", f"{dict(proposal.settings)}", f"settings of the blueprint ({cause})") from cause
    _require_blend(proposal.blend)


def _require_blend(text: str) -> None:
    try:
        blending(text)
    except MeristemError as cause:
        raise _refused("blend", f"'{text}'", f"a blend ({cause})") from cause


def _refused(code: str, found: str, expected: str) -> OrderRefused:
    return OrderRefused(
        f"the policy proposed {found}; expected {expected}. Nothing was changed: mend the policy.",
        code=code,
        found=found,
        expected=expected,
    )


def _asked(policy: Policy, reading: Reading, mask: Mask, budget_ms: float | None) -> Proposal | NoCandidates:
    """What a policy answers, or one of our errors that says why that is of no use."""
    try:
        if isinstance(policy, Isolated) and budget_ms is not None:
            answer = policy.ask(reading, mask, budget_ms / 1000)
        elif budget_ms is None:
            answer = policy(reading, mask)
        else:
            answer = in_thread("the policy", lambda _: policy(reading, mask), Deadline.after(budget_ms / 1000))
        return _whole(answer)
    except (MissingMetric, InferenceFailed):
        raise
    except WorkerTimeout as cause:
        # The deadline that ran out may be that of a new process, which had to make the policy first.
        within_ms = 1000 * float(
            str(cause.fields.get("deadline_s", START_S if budget_ms is None else budget_ms / 1000))
        )
        raise PolicyTimeout(
            f"the policy had not answered after {within_ms:g} ms. Mend it, give it more time, or have it asked in "
            f"another process, which can be ended.",
            code="timeout",
            **cause.fields,
        ) from cause
    except WorkerError as cause:
        if isinstance(cause.__cause__, MissingMetric):
            raise cause.__cause__ from None
        raise _failed(cause, str(cause.fields.get("reason") or "died")) from cause
    except (Exception, SystemExit) as cause:
        raise _failed(cause, "raised") from cause


def _whole(answer: object) -> Proposal | NoCandidates:
    """The answer, if its fields have the types that they should have."""
    kind = type(answer).__name__
    if type(answer) is not Proposal and type(answer) is not NoCandidates:
        raise InferenceFailed(
            f"the policy gave a {kind}; expected a Proposal or NoCandidates. Mend it.", code="wrong type"
        )
    try:
        return answer.checked()
    except WrongValue as cause:
        raise InferenceFailed(f"the policy gave a {kind} that is none: {cause}", code="wrong type") from cause


def _failed(cause: BaseException, code: str) -> InferenceFailed:
    return InferenceFailed(
        f"the policy gave no answer: {type(cause).__name__}: {cause}. Mend it; training goes on without it.",
        code=code,
        cause=repr(cause),
    )


def make_in_child(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Make the policy in its own process, so that settings that are wrong are found at the start; what it observes."""
    found = observes_of(_made(payload["name"], json.dumps(payload["settings"], sort_keys=True)))
    return found.to_json() if found else {}


def answer_in_child(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the policy in its own process."""
    policy = _made(payload["name"], json.dumps(payload["settings"], sort_keys=True))
    try:
        answer = _whole(policy(Reading.from_json(payload["reading"]), Mask.from_json(payload["mask"])))
    except MissingMetric as error:
        return {"missing": error.fields.get("name"), "why": str(error)}
    return {"proposal" if isinstance(answer, Proposal) else "no_candidates": answer.to_json()}


@cache
def _made(name: str, settings: str) -> Policy:
    return policies.get(name)(json.loads(settings))
