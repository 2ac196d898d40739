"""Numbers continued beyond where they were seen."""

from hypothesis import given
from hypothesis import strategies as st

from meristem.recipes.plan.fit import extrapolate

WHOLE = st.integers(-(10**15), 10**15)


@given(WHOLE, WHOLE, st.integers(1, 10**6), st.lists(st.integers(1, 10**4), min_size=2, max_size=4, unique=True))
def test_lines_are_continued_exactly(offset, slope, length, lengths):
    """Whatever the places, a line through its own points is that line, in whole numbers."""
    samples = {n: {"line": offset + slope * n, "constant": offset} for n in lengths}
    assert extrapolate(samples, length) == {"line": offset + slope * length, "constant": offset}


def test_one_sample_is_a_constant_and_what_a_sample_lacks_is_zero():
    assert extrapolate({7: {"a": 3}}, 1000) == {"a": 3}
    assert extrapolate({1: {"a": 2}, 2: {"a": 2, "b": 5}}, 3) == {"a": 2, "b": 10}
