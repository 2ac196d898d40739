"""Risk: what holds a proposal up, and for how long (growth.md 16; T21)."""

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import ConflictingKeys
from meristem.growth import risk
from meristem.growth.measure import calm
from meristem.growth.observe import HeldOut, Reading
from meristem.growth.proposal import NoCandidates, Proposal
from meristem.growth.risk import Latch, Limit, RiskConfig, Verdict, judge

GERMINATE = Proposal("germinate", "a", "low_rank")
THRESHOLDS = RiskConfig()
LIMITS = {
    name: getattr(THRESHOLDS, name) for name in RiskConfig.model_fields if isinstance(getattr(THRESHOLDS, name), Limit)
}


def reading(step: int = 500, jump: float = 0.0, **metrics: float | None) -> Reading:
    held_out = (HeldOut(step - 200, 1, 1.0, 2.0), HeldOut(step - 100, 2, 2.0, 2.0 + jump))
    return Reading("run", step, 1000, 1e6, 2.0, held_out, metrics=metrics)


def judged(what: Reading, proposal: Proposal | NoCandidates = GERMINATE, **changes: Any) -> Verdict:
    given: dict[str, Any] = {"thresholds": THRESHOLDS, "latch": Latch()} | changes
    return judge(what, proposal, given.pop("thresholds"), given.pop("latch"), **given)


def at(name: str, value: float) -> Verdict:
    """The verdict where one signal has a value and all others are quiet."""
    if name == "policy_risk":
        return judged(reading(), replace(GERMINATE, confidence=1 - value))
    return judged(reading(jump=value) if name == "held_out_jump" else reading(**{name: value}))


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit != Limit()])
def test_each_signal_holds_up_from_its_mark_on(name: str) -> None:
    limit = LIMITS[name]
    for action, mark in (("downgrade", limit.downgrade), ("pause", limit.pause)):
        if mark is not None:
            found = at(name, mark + 1e-6)
            assert found.action == action
            assert [each.signal for each in found.reasons] == [name]
            assert name in str(found.reasons[0])
    least = min(mark for mark in (limit.downgrade, limit.pause) if mark is not None)
    assert (at(name, least - 1e-6).action, at(name, least - 1e-6).reasons) == ("allow", ())


@pytest.mark.parametrize("name", ["step_ms", "apply_ms"])
def test_signals_that_depend_on_the_machine_have_no_mark_unless_given(name: str) -> None:
    assert judged(reading(**{name: 1e9})).action == "allow"
    assert judged(reading(**{name: 5.0}), thresholds=RiskConfig(**{name: Limit(pause=4)})).action == "pause"


def test_what_a_run_records_says_how_quiet_it_is() -> None:
    """A line has no spread however steep; the spread is relative to the mean; of one step nothing is known."""
    line, noise = [3.0 - 0.01 * n for n in range(50)], [(-1) ** n * 0.9 for n in range(50)]
    quiet = calm(line, [1.0] * 50)
    assert quiet["loss_volatility"] == pytest.approx(0, abs=1e-9) and quiet["gradient_variance"] == 0
    loud = calm([a + b for a, b in zip(line, noise, strict=True)], [1.0] * 49 + [100.0])
    assert loud["loss_volatility"] == pytest.approx(0.9 / 2.755, rel=0.05)
    assert loud["gradient_norm"] == 1 and loud["gradient_variance"] > 10
    assert [each.signal for each in judged(reading(**quiet)).reasons] == []
    told = {each.signal for each in judged(reading(**loud)).reasons}
    assert told == {"loss_volatility", "gradient_variance"}
    assert {*calm([3.0], [1.0]).values()} == {None, 1.0} and {*calm([], []).values()} == {None}


def test_what_was_not_measured_is_listed_and_not_judged() -> None:
    found = judged(reading(gradient_norm=None, loss_volatility=0.01))
    assert found.action == "allow"
    assert "gradient_norm" in found.unmeasured and "gradient_conflict" in found.unmeasured
    assert "loss_volatility" not in found.unmeasured and "step_ms" not in found.unmeasured
    assert "held_out_jump" in judged(Reading("r", 1, 1, 1.0, 2.0)).unmeasured


@pytest.mark.parametrize("proposal", [Proposal("wait"), Proposal("cull", "a"), NoCandidates("x")])
def test_what_is_harmless_is_allowed_and_its_reasons_count(proposal: Proposal | NoCandidates) -> None:
    found = judged(reading(isolation_violations=1.0), proposal)
    assert (found.action, found.latch) == ("allow", Latch(500))
    assert [each.signal for each in found.reasons] == ["isolation_violations"]


def test_a_conservative_run_pauses_at_what_downgrades_others() -> None:
    what = reading(gradient_norm=6.0)
    assert judged(what).action == "downgrade"
    assert judged(what, latch=Latch(400)).action == "pause"
    assert judged(reading(), latch=Latch(400)).action == "allow"


def test_the_latch_is_cleared_after_200_quiet_steps_and_not_within_that_judgement() -> None:
    noisy, bad = {"gradient_norm": 6.0}, {"gradient_norm": 25.0}
    latch, actions = Latch(), []
    for step, metrics in ((100, bad), (200, noisy), (250, bad), (400, noisy), (450, noisy), (500, noisy)):
        found = judged(reading(step, **metrics), latch=latch)
        latch = Latch.from_json(found.latch.to_json())
        actions.append((step, found.action, latch.is_set))
    assert actions == [
        (100, "pause", True),
        (200, "pause", True),
        (250, "pause", True),
        (400, "pause", True),
        (450, "pause", False),
        (500, "downgrade", False),
    ]


@given(st.dictionaries(st.sampled_from(sorted({*LIMITS} - {"policy_risk"})), st.floats(0, 1000)), st.integers(0, 10**6))
def test_a_worse_number_never_gives_a_milder_verdict(metrics: dict[str, float], step: int) -> None:
    rank = ["allow", "downgrade", "pause"]
    found = judged(reading(step, **metrics))
    for name in metrics:
        worse = judged(reading(step, **(metrics | {name: metrics[name] + 100})))
        assert rank.index(worse.action) >= rank.index(found.action)
    assert found == judged(reading(step, **metrics))


def test_t21_thresholds_are_handed_in_frozen_and_nothing_else_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("settings were read")

    what, strict = reading(gradient_norm=1.0), RiskConfig(gradient_norm=Limit(pause=0.5))
    monkeypatch.setattr(risk.RiskConfig, "__init__", refuse)
    monkeypatch.setattr(risk.RiskConfig, "model_validate", refuse)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("builtins.open", refuse)
    verdicts = {repr((judged(what), judged(what, thresholds=strict))) for _ in range(1000)}
    assert len(verdicts) == 1 and judged(what, thresholds=strict).action == "pause"
    with pytest.raises(ValueError, match="frozen"):
        strict.quiet_steps = 1


@pytest.mark.parametrize("given", [{"gradient_nrm": {"pause": 1}}, {"gradient_norm": {"paus": 1}}])
def test_ta1_unknown_keys_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        RiskConfig.model_validate(given)


def test_marks_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConflictingKeys, match="Swap them"):
        Limit(downgrade=2, pause=1)
