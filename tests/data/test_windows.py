"""Windows are counted exactly, and every one is visited."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data.windows import Windows, draw, key, permute


def by_hand(spans, window, stride):
    return [place for start, stop in spans for place in range(start, stop, stride) if place + window + 1 <= stop]


@given(st.lists(st.integers(0, 24), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 9))
def test_windows_are_those_that_fit(sizes, window, stride):
    """TR-2: Each start is reachable by one number, none lies outside its span, and ``len`` counts them."""
    edges = np.cumsum([0, *sizes])
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    windows = Windows(spans, window, stride)
    expected = by_hand(spans, window, stride)
    assert len(windows) == len(expected)
    assert windows.starts(np.arange(len(windows))).tolist() == expected
    places = np.arange(edges[-1] + 2)
    assert windows.before(places).tolist() == [sum(start < place for start in expected) for place in places]


@pytest.mark.parametrize("size, n_windows", [(0, 0), (3, 0), (4, 1), (5, 2), (12, 9)])
def test_a_text_of_one_window_gives_one(size, n_windows):
    """TR-2."""
    assert len(Windows([(0, size)], window=3, stride=1)) == n_windows


def test_two_files_of_5_and_7_bytes_give_3_and_5_windows_of_3():
    """TR-4."""
    assert Windows([(0, 5), (5, 12)], window=2, stride=1).starts(np.arange(8)).tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 257, 997, 1024, 1025, 2000])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_a_permutation(n, epoch):
    """CX-8.2."""
    assert np.array_equal(np.sort(permute(np.arange(n), n, key(11, "data"), epoch)), np.arange(n))


@given(st.integers(1, 2000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_whatever_the_key_an_epoch_is_a_permutation(n, any_key, epoch):
    assert len(np.unique(permute(np.arange(n), n, any_key, epoch))) == n


def test_epochs_and_keys_give_other_orders():
    orders = [permute(np.arange(500), 500, key(seed, "data"), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert (order == other).mean() < 0.05


def test_a_position_alone_finds_its_window():
    """CX-8.2: Order is a function of the position: no walk from the beginning of the epoch."""
    whole = permute(np.arange(997), 997, 5, 3)
    assert [int(permute(np.array([place]), 997, 5, 3)[0]) for place in (0, 400, 996)] == whole[[0, 400, 996]].tolist()


def test_neighbours_in_order_are_not_neighbours_in_the_text():
    """A multiplicative hash passes the permutation test and still walks in even steps; a cipher does not."""
    steps = np.diff(permute(np.arange(2000), 2000, 5, 0))
    assert len(np.unique(steps)) > 1000


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n_files", [2, 4, 10])
def test_a_part_of_an_epoch_visits_files_in_proportion_to_their_windows(n_files):
    """B7.3: One file large, the others small: chi-square stays below its 0.1 % bound, 27.9 for ten files."""
    sizes = np.array([9000] + [600] * (n_files - 1))
    edges = np.cumsum([0, *sizes])
    windows = Windows(np.stack([edges[:-1], edges[1:]], axis=1), window=8, stride=1)
    counts = np.maximum(0, sizes - 8)
    for seed in range(5):
        seen = windows.starts(permute(np.arange(1500), len(windows), key(seed, "data"), 0))
        observed = np.bincount(np.searchsorted(edges, seen, side="right") - 1, minlength=n_files)
        assert chi_square(observed, counts / counts.sum() * 1500) < 28


@pytest.mark.parametrize("n_files", [2, 4, 10])
def test_file_and_offset_are_chosen_independently(n_files):
    """B7.2: In each of n equal files every offset is reached, not one in n of them."""
    spans = [(100 * number, 100 * (number + 1)) for number in range(n_files)]
    windows = Windows(spans, window=9, stride=1)
    starts = windows.starts(permute(np.arange(len(windows)), len(windows), 3, 0))
    for start, _ in spans:
        assert sorted(place - start for place in starts if start <= place < start + 100) == list(range(91))


def test_drawing_reaches_every_window_evenly():
    observed = np.bincount(draw(np.arange(70_000), 7, key(2, "data")), minlength=7)
    assert len(observed) == 7
    assert chi_square(observed, 10_000) < 22.5
