"""Documents stay on their side of the split."""

import numpy as np
import pytest

from meristem.data.split import assign, cut_points, ratios_for, require_ratios
from meristem.errors import SplitError

RATIOS = (0.8, 0.15, 0.05)


def test_a_thousand_more_records_move_none():
    """CX-8.1."""
    before = {f"record {number}": assign(f"record {number}", RATIOS) for number in range(1000)}
    after = {f"record {number}": assign(f"record {number}", RATIOS) for number in range(2000)}
    assert {name: after[name] for name in before} == before


def test_sizes_are_the_ratios_within_three_sigma():
    """CX-8.1."""
    n = 10_000
    counts = np.bincount([assign(f"{number}.txt", RATIOS) for number in range(n)], minlength=3)
    for count, ratio in zip(counts, RATIOS, strict=True):
        assert abs(count - n * ratio) < 3 * np.sqrt(n * ratio * (1 - ratio))


def test_holding_out_more_only_takes_from_training():
    small = {number for number in range(2000) if assign(str(number), ratios_for(0.1)) == 1}
    large = {number for number in range(2000) if assign(str(number), ratios_for(0.3)) == 1}
    assert small < large


def test_another_salt_is_another_split():
    mine, other = ([assign(str(number), RATIOS, salt) for number in range(200)] for salt in ("a", "b"))
    assert mine != other


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_share_of_one_takes_all_and_a_share_of_none_nothing(part):
    ratios = [0.0, 0.0, 0.0]
    ratios[part] = 1.0
    assert {assign(str(number), ratios) for number in range(300)} == {part}


@pytest.mark.parametrize("ratios", [(0.9, 0.2, 0.0), (1.1, -0.1, 0.0), (0.5, 0.5), (0.9, 0.1, 1e-8)])
def test_shares_that_are_no_shares_are_refused(ratios):
    with pytest.raises(SplitError, match="three shares of one"):
        require_ratios(ratios)


def test_a_cut_gives_contiguous_parts():
    assert cut_points(1000, (0.9, 0.1, 0.0)) == (900, 1000)
