"""Going back against the clock: tiers, deadlines, and the record of both."""

from collections.abc import Callable

import pytest

from meristem.errors import CheckpointCorrupt, RollbackFailed
from meristem.train.rollback import BOUNDS_S, FAST, FULL, Rollbacks, Tier, restore


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        def act() -> None:
            self.now_s += seconds
            if log is not None:
                log.append(name)

        return act


def fast(clock: Clock, *seconds: float, log: list[str] | None = None) -> Tier:
    named = zip(FAST, seconds, strict=True)
    return Tier("fast", {name: clock.taking(each, log, f"fast {name}") for name, each in named}, 0.5)


def full(clock: Clock, seconds: float, log: list[str] | None = None) -> Tier:
    return Tier("full", {"load": clock.taking(seconds, log, "full load")}, 12.0)


@pytest.mark.parametrize(("budgets", "deadline_s"), [(FAST, 0.5), (FULL, 12.0)])
def test_budgets_of_phases_add_up_to_the_deadline(budgets, deadline_s):
    assert sum(budgets.values()) == deadline_s


@pytest.mark.parametrize(("last_s", "is_violation"), [(0.249, False), (0.251, True)])
def test_ka6_latency_is_measured_against_the_deadline(last_s, is_violation):
    """499 ms are in time, 501 a violation; both stand, for time never undoes what was put in place."""
    clock = Clock()
    (attempt,) = restore([fast(clock, 0.1, 0.15, last_s), full(clock, 1.0)], clock)
    assert attempt.tier == "fast" and attempt.failure is None
    assert attempt.is_violation is is_violation
    assert attempt.seconds == pytest.approx(0.25 + last_s)
    latency = Rollbacks().observed([attempt]).latencies["fast"]
    assert latency.n_violations == is_violation
    assert sum(latency.counts) == 1 == latency.counts[BOUNDS_S.index(1.0 if is_violation else 0.5)]


def test_l20_result_holds_deadline_trip_time_and_seconds_per_phase():
    """A fast tier that trips before its last phase is left for the full one; every time is filled in and in order."""
    clock, log = Clock(), []
    tripped, done = restore([fast(clock, 0.2, 0.4, 0.1, log=log), full(clock, 2.0, log=log)], clock)
    assert log == ["fast prepare", "fast commit", "full load"]
    assert tripped.started_at < tripped.deadline_at < tripped.tripped_at == pytest.approx(100.6)
    assert tripped.deadline_at == pytest.approx(100.5)
    assert dict(tripped.phases) == pytest.approx({"prepare": 0.2, "commit": 0.4})
    assert tripped.failure == "0.600 s had passed before 'confirm', of 0.5 s"
    assert (done.tier, done.failure, done.tripped_at) == ("full", None, None)
    assert dict(done.phases) == pytest.approx({"load": 2.0})
    assert done.started_at >= tripped.tripped_at


def test_last_tier_may_be_late():
    clock = Clock()
    (attempt,) = restore([full(clock, 13.0)], clock)
    assert attempt.failure is None and attempt.is_violation


def test_failing_phase_hands_over_and_what_fails_last_is_told():
    clock = Clock()

    def fail() -> None:
        raise CheckpointCorrupt("model.safetensors has other bytes than were saved")

    broken = Tier("fast", {"prepare": fail}, 0.5)
    first, second = restore([broken, full(clock, 1.0)], clock)
    assert first.failure == "'prepare': model.safetensors has other bytes than were saved"
    assert second.failure is None
    with pytest.raises(RollbackFailed, match="fast: 'prepare': model.safetensors .*--resume PATH"):
        restore([broken], clock)
    with pytest.raises(RollbackFailed, match="nothing to roll back to"):
        restore([], clock)


def test_a_row_of_panics_ends_after_sound_steps():
    told = [(100, 1), (150, 2), (260, 3), (461, 1)]
    now = Rollbacks()
    for number, (step, in_row) in enumerate(told, start=1):
        now = now.panicked(step)
        assert (now.n, now.n_in_row) == (number, in_row)
    assert Rollbacks.from_json(now.to_json()) == now
