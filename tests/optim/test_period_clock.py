"""The clock: what fires when, and what is no clock."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import WrongValue
from meristem.optim.period_clock import Clock

increasing = st.sets(st.integers(1, 600), min_size=1, max_size=5).map(lambda found: tuple(sorted(found)))
clocks = st.builds(Clock, st.integers(0, 10**9), increasing, st.sampled_from(["steps", "tokens"]))


def test_the_exact_schedule():
    """S1-M1: over 24 counts level 1 of (1, 8) fires at 0, 8 and 16."""
    clock, fired = Clock(0, (1, 8), "steps"), []
    for _ in range(24):
        fired.append(clock.pulse())
        clock = clock.advanced(1)
    assert [count for count, (fast, _) in enumerate(fired) if fast] == list(range(24))
    assert [count for count, (_, slow) in enumerate(fired) if slow] == [0, 8, 16]


def test_firings_of_the_default_periods():
    """S1-M3: of (1, 8, 64, 512) the levels fire 512, 64, 8 and 1 times in 512 counts; 1.142578 a count."""
    pulses = [Clock(count, (1, 8, 64, 512), "tokens").pulse() for count in range(512)]
    fires = tuple(map(sum, zip(*pulses, strict=True)))
    assert fires == (512, 64, 8, 1)
    assert sum(fires) / 512 == pytest.approx(1.142578, abs=1e-6)


@given(clocks, st.integers(0, 5000), st.integers(0, 5000))
def test_two_observers_see_one_pulse(clock, first, second):
    """A pulse is a function of the value: looking changes nothing, and how the clock came to its count does not matter.

    That holds for a clock that was saved and restored, too.
    """
    assert clock.pulse() == clock.pulse()
    restored = Clock.from_json(json.loads(json.dumps(clock.to_json())))
    assert restored == clock
    assert restored.advanced(first).advanced(second).pulse() == clock.advanced(first + second).pulse()


@pytest.mark.parametrize("periods", [(1, 8), (3, 7, 50)])
def test_all_fire_at_zero(periods):
    assert all(Clock(0, periods, "tokens").pulse())


def test_everything_wrong_is_said_at_once():
    with pytest.raises(WrongValue) as caught:
        Clock(-1, (0, 8, 8, 4), "hours")
    for reason in (
        "the count is -1; expected 0 or more",
        "the unit is 'hours'; expected steps or tokens",
        "the first period is 0; expected 1 or more",
        "period 8 follows 8; expected periods that increase strictly",
        "period 4 follows 8",
    ):
        assert reason in str(caught.value)


def test_a_clock_without_levels_is_refused():
    with pytest.raises(WrongValue, match="there is no period; expected one for each level"):
        Clock(0, (), "steps")
