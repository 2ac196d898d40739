"""The rate over the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.optim.part import SchedulePart
from meristem.optim.schedule import rate_factor

PART = SchedulePart(shape="cosine", warmup=0.1, floor=0.2)


@pytest.mark.parametrize(("progress", "factor"), [(0.05, 0.505), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (1.7, 0.2)])
def test_golden_values(progress, factor):
    """Half of the warm-up, its end, the middle of the cosine, its end, and beyond."""
    assert rate_factor(PART, progress) == pytest.approx(factor)


def test_constant_holds_after_warmup():
    part = SchedulePart(shape="constant", warmup=0.1)
    assert [rate_factor(part, progress) for progress in (0.1, 0.5, 1.0)] == [1.0, 1.0, 1.0]


@given(st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1))
def test_factor_is_positive_until_the_floor_and_never_above_one(progress, warmup, floor):
    factor = rate_factor(SchedulePart(warmup=warmup, floor=floor), progress)
    assert min(floor, 0.01) <= factor <= 1


@given(st.floats(0.1, 1), st.floats(0.1, 1))
def test_rate_never_rises_after_warmup(one, other):
    early, late = sorted((one, other))
    assert rate_factor(PART, early) >= rate_factor(PART, late)
